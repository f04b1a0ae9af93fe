"""A bank moves to another model in one step, with all its texts, whatever happens on the way there."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from msa_memory import MemoryModel
from msa_memory.engine.engine import Engine
from msa_memory.errors import (
    ConflictError,
    EngineError,
    ModelMismatchError,
    ModelNotFoundError,
    MSAError,
    ReadOnlyError,
)
from msa_memory.moving import reencode
from msa_memory.persistence import Reencoding
from msa_memory.testing import open_memory, tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models beside the tiny one, with other weights each."""
    folder = tmp_path_factory.mktemp("models")
    return [changed(tiny_model(folder / f"model{factor}"), factor) for factor in (2, 3)]


def changed(model: Path, factor: float) -> Path:
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"] *= factor
    save_file(weights, model / "model.safetensors")
    return model


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[MemoryModel]:
    with open_memory(tmp_path / "memory") as memory:
        memory.add_many(
            {"id": f"d{i}", "content": f"Person {i} lives in house {i}.", "timestamp": f"2020-01-{i + 1:02}"}
            for i in range(8)
        )
        memory.update("d0", metadata={"title": "Boats"})
        memory.namespace("other").add("Elsewhere lives nobody.", id="else")
        memory.add("Over.", id="over", expires_at=datetime.now(UTC) - timedelta(days=1))
        memory.session("talk").append("user", "Where is the boat?")
        yield memory


def contents(memory: MemoryModel) -> dict[str, Any]:
    assert memory.verify() == ()
    documents = {doc.id: (doc, memory.history(doc.id)) for doc in memory.list(limit=100)}
    return {"documents": documents, "messages": memory.session("talk").messages()}


def states(memory: MemoryModel) -> dict[tuple[str, str, int], dict[str, bytes]]:
    store = memory._shared.store
    return {
        (record.namespace, record.document_id, record.ordinal): {
            name: bytes(tensor.data) for name, tensor in store.states(record).items()
        }
        for record in store.changes(0).added
    }


def test_it_becomes_what_the_new_model_would_have_made(
    memory: MemoryModel, models: list[Path], tmp_path: Path
) -> None:
    before, reported = contents(memory), []
    receipt = memory.reencode(models[0], progress=lambda done, total: reported.append((done, total)))
    assert (receipt.documents, receipt.encoded) == (11, 11)
    assert reported[-1] == (11, 11)
    assert contents(memory) == before
    assert memory.stats.model == str(models[0])
    with open_memory(model=models[0]) as fresh:
        for document in reversed(memory.list(limit=100).items):
            if document.id.startswith("d"):
                fresh.add(
                    document.text, id=document.id, metadata=document.metadata, timestamp=document.timestamp
                )
        fresh_states, ours = states(fresh), states(memory)
        assert all(ours[name] == fresh_states[name] for name in fresh_states)
    assert [hit.id for hit in memory.search("house 5", k=1)] == ["d5"]
    assert [hit.id for hit in memory.namespace("other").search("house", k=1)] == ["else"]
    assert memory.add("Person 9 lives in house 9.", id="d9").version == 1
    with open_memory(tmp_path / "memory", model=None) as again:
        assert [hit.id for hit in again.search("house 9", k=1)] == ["d9"]
        assert again.verify() == ()


def test_changed_weights_under_the_same_name(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    with open_memory(tmp_path / "memory", model=model) as memory:
        memory.add("Bob repairs violins.", id="bob")
    changed(model, 2)
    with open_memory(tmp_path / "memory", model=model) as memory:
        with pytest.raises(ModelMismatchError, match="reencode"):
            memory.search("violins")
        assert memory.reencode().encoded == 1
        assert [hit.id for hit in memory.search("violins")] == ["bob"]
        again = memory.reencode()
        assert (again.documents, again.encoded) == (0, 0)


def test_others_learn_that_the_model_changed(memory: MemoryModel, models: list[Path], tmp_path: Path) -> None:
    with open_memory(tmp_path / "memory") as other, open_memory(tmp_path / "memory") as idle:
        other.search("house")
        memory.reencode(models[0])
        for use in (
            lambda: other.search("house"),
            lambda: other.add("late"),
            lambda: other.update("d1", "late"),
            lambda: idle.add("late"),
            lambda: idle.search("late"),
        ):
            with pytest.raises(ModelMismatchError, match="open"):
                use()
        assert other.get("d1").text == "Person 1 lives in house 1."
        assert memory.count() == 9
        assert memory.verify() == ()


def test_an_interrupted_move_goes_on(
    memory: MemoryModel, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reencode, "BATCH_DOCUMENTS", 2)
    stop_after(monkeypatch, 5)
    with pytest.raises(EngineError, match="stopped"):
        memory.reencode(models[0])
    monkeypatch.undo()
    assert [hit.id for hit in memory.search("house 5", k=1)] == ["d5"]
    memory.update("d1", "Person 1 moved into a lighthouse.")
    memory.add("Person 8 keeps sheep.", id="d8")
    memory.forget("d2")
    memory.compact()  # erases the expired document too
    assert memory.verify() == ()
    receipt = memory.reencode(models[0])
    assert (receipt.documents, receipt.encoded) == (10, 10 - 4 + 2)  # of the four, d1 and d2 changed
    for question, id in (("lighthouse", "d1"), ("sheep", "d8"), ("house 7", "d7")):
        assert [hit.id for hit in memory.search(question, k=1)] == [id]
    assert memory.verify() == ()


def stop_after(monkeypatch: pytest.MonkeyPatch, passages: int) -> None:
    encode, done = Engine.encode, []

    def counted(engine: Engine, number: int, header: str, text: str) -> object:
        if len(done) == passages:
            raise EngineError("stopped")
        done.append(number)
        return encode(engine, number, header, text)

    monkeypatch.setattr(Engine, "encode", counted)


def test_forgetting_erases_what_was_made_for_the_new_model_too(
    memory: MemoryModel, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reencode, "BATCH_DOCUMENTS", 4)
    made: dict[str, bytes] = {}
    encode = Engine.encode

    def kept(engine: Engine, number: int, header: str, text: str) -> Any:
        found = encode(engine, number, header, text)
        made[text] = bytes(found.to_bytes()["keys"].data)
        return found

    monkeypatch.setattr(Engine, "encode", kept)
    with monkeypatch.context() as patch:
        patch.setattr(Reencoding, "finish", refuse)
        with pytest.raises(EngineError, match="refused"):
            memory.reencode(models[0])
    folder = tmp_path / "memory"
    gone, stays = (made[f"Person {i} lives in house {i}."] for i in (3, 4))
    assert gone in all_bytes(folder)
    memory.forget("d3")
    assert gone not in all_bytes(folder)
    assert stays in all_bytes(folder)
    memory.compact()
    assert stays in all_bytes(folder)
    assert memory.reencode(models[1]).encoded == memory.count() + 1  # of another namespace; these are new
    assert stays not in all_bytes(folder)
    assert memory.verify() == ()


def refuse(*_: object) -> None:
    raise EngineError("refused")


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_the_last_of_two_moves_wins(memory: MemoryModel, models: list[Path], tmp_path: Path) -> None:
    store = memory._shared.store
    memory.search("house")
    first = Reencoding(store, "a" * 64)
    first.start()
    waiting = first.waiting(2)
    first.put([(waiting[0], [])])
    Reencoding(store, "b" * 64).start()
    assert memory.reencode(models[0]).documents == 11
    assert memory.verify() == ()


def test_a_move_that_was_overtaken_stops(
    memory: MemoryModel, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reencode, "BATCH_DOCUMENTS", 2)
    with open_memory(tmp_path / "memory") as other:
        overtaken = []

        def overtake(done: int, total: int) -> None:
            if not overtaken:
                overtaken.append(done)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(Reencoding, "finish", refuse)
                    with pytest.raises(EngineError):
                        other.reencode(models[1])

        with pytest.raises(ConflictError, match="somebody else"):
            memory.reencode(models[0], progress=overtake)
        assert [hit.id for hit in memory.search("house 5", k=1)] == ["d5"]
        assert other.reencode(models[1]).encoded == 0


async def test_questions_go_on_under_the_old_model(memory: MemoryModel, models: list[Path]) -> None:
    """Until the switch every question is answered; at the switch a running one may have to be asked again."""
    memory.search("house")
    answered, stop = [], threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        while not stop.is_set():
            try:
                assert memory.search("house 5", k=1)[0].id == "d5"
                answered.append(memory.stats.fingerprint)
            except (EngineError, ModelMismatchError):
                pass
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    await memory.areencode(models[0])
    while len(set(answered)) < 2 and not failures:
        assert any(thread.is_alive() for thread in threads)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert (await memory.areencode(tiny_model())).encoded == 11
    assert (await memory.asearch("house 5", k=1))[0].id == "d5"


def test_what_cannot_be_moved(memory: MemoryModel, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        memory.reencode(tmp_path / "no-model")
    with open_memory(tmp_path / "memory", read_only=True) as reader, pytest.raises(ReadOnlyError):
        reader.reencode(models[0])
    with pytest.raises(MSAError):
        memory.reencode(7)
    assert [hit.id for hit in memory.search("house 5", k=1)] == ["d5"]
    with open_memory() as empty:
        assert empty.reencode(models[0]).documents == 0
        empty.add("Now there is something.", id="x")
        assert empty.search("something")[0].id == "x"
