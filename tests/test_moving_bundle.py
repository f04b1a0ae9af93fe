"""A namespace in one file and back: everything comes along, nothing is encoded, and no file is trusted."""

import asyncio
import hashlib
import json
import os
import struct
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save_file

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.engine.engine import Engine
from msa_memory.errors import (
    ConfigError,
    ConflictError,
    InvalidDocumentError,
    LimitError,
    LockedError,
    ModelMismatchError,
    MSAError,
    ReadOnlyError,
    StorageError,
)
from msa_memory.moving import exporting, open_bundle
from msa_memory.moving.lines import read_documents, read_messages
from msa_memory.moving.tensors import TensorFileError, read_tensors, tensor_file
from msa_memory.persistence import Bundles
from msa_memory.testing import open_memory, tiny_model
from msa_memory.types import TensorBytes

FACTS = {
    "bob": "Bob lives in Oslo and repairs violins.",
    "ann": "Ann paints lighthouses in Bergen.",
    "oz": "Dorothy walked to the emerald city with the lion.",
}
Members = dict[str, bytes]
Edit = Callable[[Members], object]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[MemoryModel]:
    """A memory with everything a document can have."""
    with open_memory(tmp_path / "from") as memory:
        fill(memory)
        memory.namespace("other").add("Nothing of this may travel.", id="secret")
        yield memory


@pytest.fixture
def target(tmp_path: Path) -> Iterator[MemoryModel]:
    with open_memory(tmp_path / "to") as memory:
        yield memory


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the engine encodes from here on."""
    texts: list[str] = []
    encode = Engine.encode

    def spy(engine: Engine, number: int, header: str, text: str) -> object:
        texts.append(text)
        return encode(engine, number, header, text)

    monkeypatch.setattr(Engine, "encode", spy)
    return texts


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle to damage."""
    with open_memory() as memory:
        fill(memory)
        path = tmp_path_factory.mktemp("sample") / "sample.msa"
        memory.export(path)
    return path


def fill(memory: MemoryModel) -> None:
    memory.add_many([{"id": id, "content": text} for id, text in FACTS.items()])
    memory.update(
        "bob", "Bob moved to Bergen; he still repairs violins.", metadata={"deep": {"a": [1, None]}}
    )
    memory.update("bob", metadata={"title": "Bob \N{SNOWMAN}"})
    memory.add(
        "The ferry leaves at noon.\nIt is blue.",
        id="\u202e../ferry\n",
        timestamp="2020-02-29T12:00:00+01:00",
        expires_at=datetime(2090, 1, 1, tzinfo=UTC),
        source="timetable",
        trust="high",
    )
    memory.add("long " * 1500, id="long", metadata={"title": "Long"})
    session = memory.session("talk/1")
    session.append("system", "Be brief.")
    session.append("user", "Where is the ferry?", name="Eve", key="k1", timestamp="2024-05-06")
    session.append("assistant", "In the harbour.")


def contents(memory: MemoryModel) -> dict[str, Any]:
    """Everything people see of a memory but its namespace, and that it is sound."""
    assert memory.verify() == ()
    no_namespace = {"exclude": {"namespace"}}
    documents = {
        doc.id: (doc.model_dump(**no_namespace), [version.model_dump() for version in memory.history(doc.id)])
        for doc in memory.list(limit=1000)
    }
    messages = {
        id: [message.model_dump(**no_namespace) for message in memory.session(id).messages()]
        for id in memory.sessions()
    }
    return {"documents": documents, "messages": messages}


def states(memory: MemoryModel) -> dict[tuple[str, int], dict[str, bytes]]:
    """The bytes of all states by document and passage."""
    store = memory._shared.store
    return {
        (record.document_id, record.ordinal): {
            name: bytes(tensor.data) for name, tensor in store.states(record).items()
        }
        for record in store.changes(0).added
        if record.namespace == memory.namespace_name
    }


def test_everything_comes_along_and_nothing_is_encoded(
    memory: MemoryModel, target: MemoryModel, encoded: list[str], tmp_path: Path
) -> None:
    out = memory.export(tmp_path / "out.msa")
    assert (out.documents, out.versions, out.messages) == (7, 2, 3)
    assert out.size_bytes == (tmp_path / "out.msa").stat().st_size
    assert out.sha256 == hashlib.sha256((tmp_path / "out.msa").read_bytes()).hexdigest()
    encoded.clear()
    into = target.import_bundle(tmp_path / "out.msa")
    assert not encoded
    assert (into.added, into.messages, into.encoded) == (7, 3, 0)
    assert contents(target) == contents(memory)
    assert states(target) == states(memory)
    for question in ("violins in Bergen", "ferry", "long"):
        found = [(hit.id, hit.score, hit.text) for hit in target.search(question)]
        assert found == [(hit.id, hit.score, hit.text) for hit in memory.search(question)]
    assert target.namespace("other").count() == 0
    assert target.session("talk/1").append("user", "And now?").position == 3
    assert target.session("talk/1").append("user", "Where?", key="k1").content == "Where is the ferry?"


def test_into_another_namespace_beside_others(memory: MemoryModel, tmp_path: Path) -> None:
    memory.export(tmp_path / "out.msa")
    copy = memory.namespace("copy")
    copy.import_bundle(tmp_path / "out.msa")
    assert contents(copy) == contents(memory)
    copy.forget("bob")
    assert memory.get("bob").version == 3
    assert [hit.id for hit in memory.search("violins", k=1)] == ["bob"]


def test_the_file_is_what_it_says(
    memory: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard tools read it, the same memory gives the same bytes, and nobody else may read it."""
    monkeypatch.setattr(exporting, "PART_DOCUMENTS", 2)
    monkeypatch.setattr(exporting, "PART_MESSAGES", 2)
    old = os.umask(0)
    try:
        first, second = (memory.export(tmp_path / name) for name in ("a", "b"))
    finally:
        os.umask(old)
    assert first.sha256 == second.sha256
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    with zipfile.ZipFile(tmp_path / "a") as archive:
        assert archive.testzip() is None
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members.pop("manifest.json"))
    assert manifest["counts"] == {"documents": 7, "versions": 2, "passages": first.passages, "messages": 3}
    assert manifest["model"]["fingerprint"] == memory.stats.fingerprint
    assert "/" not in manifest["model"]["name"]
    assert {name: entry["sha256"] for name, entry in manifest["members"].items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in members.items()
    }
    assert len(members) == 4 + 4 + 2
    tensors: dict[str, Any] = {}
    for name, data in members.items():
        if name.startswith("states-"):
            tensors |= {f"{name}.{key}": tensor for key, tensor in load_tensors(data).items()}
        else:
            assert all(json.loads(line) for line in data.decode().splitlines())
    assert len(tensors) == sum(len(of) for of in states(memory).values())
    assert b"Nothing of this" not in (tmp_path / "a").read_bytes()


def test_a_second_import_changes_nothing(memory: MemoryModel, target: MemoryModel, tmp_path: Path) -> None:
    memory.export(tmp_path / "out.msa")
    target.import_bundle(tmp_path / "out.msa")
    before, generation = contents(target), target._shared.store.generation()
    for mode in ("error", "replace", "skip"):
        again = target.import_bundle(tmp_path / "out.msa", on_conflict=mode)
        assert (again.added, again.replaced, again.unchanged, again.messages) == (0, 0, 7, 0)
    assert contents(target) == before
    assert target._shared.store.generation() == generation


def test_conflicts(memory: MemoryModel, target: MemoryModel, tmp_path: Path) -> None:
    memory.export(tmp_path / "out.msa")
    target.add("Another Ann.", id="ann")
    before = contents(target)
    with pytest.raises(ConflictError, match=r"'ann'.*nothing was imported"):
        target.import_bundle(tmp_path / "out.msa")
    assert contents(target) == before
    skipped = target.import_bundle(tmp_path / "out.msa", on_conflict="skip")
    assert (skipped.added, skipped.skipped, skipped.replaced) == (6, 1, 0)
    assert target.get("ann").text == "Another Ann."
    replaced = target.import_bundle(tmp_path / "out.msa", on_conflict="replace")
    assert (replaced.unchanged, replaced.replaced) == (6, 1)
    assert [version.text for version in target.history("ann")] == ["Another Ann.", FACTS["ann"]]
    assert target.verify() == ()


def test_a_document_that_changes_under_an_import_is_a_conflict(
    memory: MemoryModel, target: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.export(tmp_path / "out.msa")
    target.add("Another Ann.", id="ann")
    bring = Bundles.bring

    def late(rows: Bundles, arrivals: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Bundles, "bring", bring)
            target.update("ann", "Ann changed meanwhile.")
            bring(rows, arrivals)

    monkeypatch.setattr(Bundles, "bring", late)
    with pytest.raises(ConflictError, match="import it again"):
        target.import_bundle(tmp_path / "out.msa", on_conflict="replace")
    monkeypatch.undo()
    assert [doc.text for doc in target.list()] == ["Ann changed meanwhile."]
    assert target.import_bundle(tmp_path / "out.msa", on_conflict="replace").replaced == 1
    assert len(target.history("ann")) == 3
    assert target.verify() == ()


def test_an_expired_document_makes_room(memory: MemoryModel, target: MemoryModel, tmp_path: Path) -> None:
    memory.export(tmp_path / "out.msa")
    target.add("Over.", id="ann", expires_at=datetime.now(UTC) - timedelta(days=1))
    assert target.import_bundle(tmp_path / "out.msa").added == 7
    assert contents(target) == contents(memory)


def test_conflicting_messages(memory: MemoryModel, target: MemoryModel, tmp_path: Path) -> None:
    memory.export(tmp_path / "out.msa")
    target.session("talk/1").append("system", "Be long.")
    target.session("talk/1").append("system", "Another under the key.", key="k1")
    with pytest.raises(ConflictError, match="message 0 of session 'talk/1'"):
        target.import_bundle(tmp_path / "out.msa")
    assert target.count() == 0
    assert target.import_bundle(tmp_path / "out.msa", on_conflict="skip").messages == 1
    said = [message.content for message in target.session("talk/1").messages()]
    assert said == ["Be long.", "Another under the key.", "In the harbour."]
    assert target.import_bundle(tmp_path / "out.msa", on_conflict="replace").messages == 2
    assert contents(target) == contents(memory)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "to").rglob("*") if path.is_file())
    assert b"Be long." not in everything


def test_another_model_has_to_read_the_texts(memory: MemoryModel, tmp_path: Path, encoded: list[str]) -> None:
    memory.export(tmp_path / "out.msa")
    model = tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 2
    save_file(weights, model / "model.safetensors")
    encoded.clear()
    with open_memory(tmp_path / "to", model=model) as target:
        with pytest.raises(ModelMismatchError, match="reencode=True"):
            target.import_bundle(tmp_path / "out.msa")
        assert target.count() == 0
        assert target.import_bundle(tmp_path / "out.msa", reencode=True).encoded == 7
        assert contents(target) == contents(memory)
        assert [hit.id for hit in target.search("violins", k=1)] == ["bob"]
    assert encoded


def test_reencode_believes_no_states(memory: MemoryModel, target: MemoryModel, tmp_path: Path) -> None:
    """States that say something else than the text are made anew where the file is not trusted."""
    memory.export(tmp_path / "out.msa")

    def swap(members: Members) -> None:
        tensors = read_tensors(members["states-000001.safetensors"])
        for name in [name for name in tensors if name.startswith("1.0.")]:
            tensors[name] = tensors["2" + name[1:]]
        members["states-000001.safetensors"] = b"".join(tensor_file(tensors))

    rewrite(tmp_path / "out.msa", swap)
    assert target.import_bundle(tmp_path / "out.msa", reencode=True).encoded == 7
    assert states(target) == states(memory)


def test_a_model_that_reads_numbers_reads_again(tmp_path: Path, encoded: list[str]) -> None:
    model = tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["msa_config"]["layout"] = {"documents": "numbered"}
    (model / "config.json").write_text(json.dumps(config))
    with open_memory(model=model) as memory, open_memory(model=model) as target:
        memory.add(FACTS["bob"], id="bob")
        memory.export(tmp_path / "out.msa")
        target.add("First.", id="first")
        assert target.import_bundle(tmp_path / "out.msa").encoded == 1
        numbers = {record.number for record in target._shared.store.changes(0).added}
        assert len(numbers) == 2


def test_damaged_states_leave_the_text(memory: MemoryModel, target: MemoryModel, tmp_path: Path) -> None:
    record = next(r for r in memory._shared.store.changes(0).added if r.document_id == "ann")
    with (tmp_path / "from" / "states" / record.segment).open("r+b") as file:
        file.seek(record.offset + record.length - 1)
        last = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last[0] ^ 1]))
    out = memory.export(tmp_path / "out.msa")
    assert out.without_states == ("ann",)
    into = target.import_bundle(tmp_path / "out.msa")
    assert (into.added, into.encoded) == (7, 1)
    assert [hit.id for hit in target.search("lighthouses", k=1)] == ["ann"]
    assert target.verify() == ()


async def test_async_twins(memory: MemoryModel, target: MemoryModel, tmp_path: Path) -> None:
    async def ticks(of: asyncio.Future[Any]) -> int:
        count = 0
        while not of.done():
            await asyncio.sleep(0)
            count += 1
        return count

    moving = asyncio.ensure_future(memory.aexport(tmp_path / "out.msa"))
    assert await ticks(moving) > 10
    assert (await moving).sha256 == memory.export(tmp_path / "same.msa").sha256
    moving = asyncio.ensure_future(target.aimport_bundle(tmp_path / "out.msa"))
    assert await ticks(moving) > 10
    assert (await moving).added == 7
    assert contents(target) == contents(memory)
    (tmp_path / "out.msa").write_bytes((tmp_path / "out.msa").read_bytes()[:-100])
    with pytest.raises(StorageError, match="cannot be trusted"):
        await target.aimport_bundle(tmp_path / "out.msa")


async def test_a_cancelled_export_leaves_nothing(memory: MemoryModel, tmp_path: Path) -> None:
    started = asyncio.Event()
    pieces = exporting.Export.__iter__
    loop = asyncio.get_running_loop()

    def slow(export: exporting.Export) -> Iterator[bytes]:
        for piece in pieces(export):
            loop.call_soon_threadsafe(started.set)
            yield piece

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting.Export, "__iter__", slow)
        task = asyncio.ensure_future(memory.aexport(tmp_path / "out.msa"))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_where_an_export_may_go(memory: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.msa"
    path.write_text("precious")
    with pytest.raises(StorageError, match="exists already"):
        memory.export(path)
    assert path.read_text() == "precious"
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "sync", refuse)
        with pytest.raises(StorageError, match="No space"):
            memory.export(path, overwrite=True)
    assert path.read_text() == "precious"
    memory.export(path, overwrite=True)
    with pytest.raises(StorageError):
        memory.export(tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match="does not exist"):
        memory.export(tmp_path / "no" / "folder")
    (tmp_path / ".link.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        memory.export(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"from", "out.msa", ".link.partial"}


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_one_export_to_a_file_at_a_time(memory: MemoryModel, tmp_path: Path) -> None:
    pieces = iter(exporting.Export(memory._shared.store, "default"))
    with exporting._beside(tmp_path / "out.msa", False):
        next(pieces)
        with pytest.raises(LockedError, match="another export"):
            memory.export(tmp_path / "out.msa")
    memory.export(tmp_path / "out.msa")


def test_read_only_memories_export_and_do_not_import(memory: MemoryModel, tmp_path: Path) -> None:
    memory.close()
    with open_memory(tmp_path / "from", read_only=True) as reader:
        assert reader.export(tmp_path / "out.msa").documents == 7
        with pytest.raises(ReadOnlyError):
            reader.import_bundle(tmp_path / "out.msa")


def test_an_empty_namespace_travels_too(target: MemoryModel, tmp_path: Path) -> None:
    target.export(tmp_path / "out.msa")
    assert target.import_bundle(tmp_path / "out.msa").added == 0


def test_expired_documents_stay(target: MemoryModel, tmp_path: Path) -> None:
    target.add("Already over.", expires_at=datetime.now(UTC) - timedelta(days=1))
    assert target.export(tmp_path / "out.msa").documents == 0


def test_exporting_while_others_write(memory: MemoryModel, tmp_path: Path) -> None:
    """The bundle holds the texts of the moment it began, less what was forgotten meanwhile."""
    texts = {f"n{i}": f"Number {i} says this. " * 30 for i in range(40)}
    others = {document.id for document in memory.list(limit=1000)}
    memory.add_many([{"id": id, "content": text} for id, text in texts.items()])
    session = memory.session("log")
    begun, gone = threading.Event(), []
    failures: list[BaseException] = []

    def change() -> None:
        try:
            begun.wait(60)
            for i, id in enumerate(texts):
                session.append("user", f"Changing {id}.")
                if i % 2:
                    memory.forget(id)
                    gone.append(id)
                else:
                    memory.update(id, f"Number {i} says something else.")
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "PART_DOCUMENTS", 4)
        pieces = iter(exporting.Export(memory._shared.store, "default", beside=tmp_path))
        export = [next(pieces)]  # the moment
        begun.set()
        for piece in pieces:
            export.append(piece)
            if len(export) == 5:
                thread.join()
    thread.join()
    assert not failures
    assert len(gone) == 20
    (tmp_path / "out.msa").write_bytes(b"".join(export))
    with open_memory() as copy:
        receipt = copy.import_bundle(tmp_path / "out.msa")
        assert copy.verify() == ()
        found = {document.id: document for document in copy.list(limit=1000)}
        assert found.keys() - texts.keys() == others
        assert texts.keys() - found.keys() <= set(gone)
        for id in texts.keys() & found.keys():
            assert (found[id].text, found[id].version) == (texts[id], 1)
        assert copy.session("log").messages() == []
        assert receipt.encoded > 0, "the states of what was replaced meanwhile are gone"
        for id in FACTS:
            assert copy.search(found[id].text, k=1)[0].id == id


def test_an_export_holds_nobody_up(memory: MemoryModel, tmp_path: Path) -> None:
    """While the file is written there is no transaction: forgetting erases at once."""
    pieces = iter(exporting.Export(memory._shared.store, "default", beside=tmp_path))
    next(pieces)
    id = next(iter(FACTS))
    receipt = memory.forget(id)
    assert receipt.erased_at is not None
    rest = b"".join(pieces)
    assert FACTS[id].encode() not in rest


# files nobody should trust


def members_of(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, members: Members, **options: Any) -> None:
    """A bundle of these members with a manifest that fits them, unless they bring their own."""
    members = dict(members)
    if (given := members.pop("manifest.json", None)) is not None:
        manifest = json.loads(given)
        manifest["members"] = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
        }
        members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w", options.pop("compression", zipfile.ZIP_STORED)) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def rewrite(path: Path, edit: Edit) -> None:
    members = members_of(path)
    edit(members)
    write(path, members)


def lines(edit: Callable[[list[Any]], object], member: str = "documents-000001.jsonl") -> Edit:
    """Edits the parsed lines of a member."""

    def change(members: Members) -> None:
        parsed = [json.loads(line) for line in members[member].decode().split("\n") if line]
        edit(parsed)
        members[member] = "".join(json.dumps(line) + "\n" for line in parsed).encode()

    return change


def document(**fields: Any) -> Edit:
    """Sets fields of the last document."""
    return lines(lambda parsed: parsed[-1]["document"].update(fields))


def message(**fields: Any) -> Edit:
    return lines(lambda parsed: parsed[-1]["message"].update(fields), "messages-000001.jsonl")


def tensor(edit: Callable[[dict[str, TensorBytes]], object]) -> Edit:
    def change(members: Members) -> None:
        tensors = read_tensors(members["states-000001.safetensors"])
        edit(tensors)
        members["states-000001.safetensors"] = b"".join(tensor_file(tensors))

    return change


def add_member(name: str) -> Edit:
    return lambda members: members.update({name: b"x"})


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def refused(target: MemoryModel, path: Path, expected: type[MSAError] | tuple[type[MSAError], ...]) -> str:
    """The import fails by name, stores nothing and touches no other file."""
    around = {entry: entry.stat().st_mtime_ns for entry in path.parent.rglob("*") if "to" not in entry.parts}
    with pytest.raises(expected) as caught:
        target.import_bundle(path)
    assert (target.count(), target.sessions()) == (0, [])
    assert {
        entry: entry.stat().st_mtime_ns for entry in path.parent.rglob("*") if "to" not in entry.parts
    } == around
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        add_member("../../evil"),
        add_member("/etc/passwd"),
        add_member("C:\\evil"),
        add_member("documents-000001.jsonl/../../x"),
        add_member("states-1.safetensors"),
        add_member("code.py"),
        add_member("documents-000002.jsonl\0.txt"),
        lambda members: members.pop("states-000001.safetensors"),
        lambda members: members.update({"documents-000001.jsonl": b"no JSON\n"}),
        lambda members: members.update({"documents-000001.jsonl": b"\xff\xfe\n"}),
        lambda members: members.update({"documents-000001.jsonl": b"[]\n"}),
        lambda members: members.update({"documents-000001.jsonl": b'{"message": {}}\n'}),
        lambda members: members.update({"states-000001.safetensors": b"short"}),
        lambda members: members.update({"states-000001.safetensors": b"\xff" * 16}),
        lines(lambda parsed: parsed.append({"version": parsed[0]["version"]})),
        lines(lambda parsed: parsed.insert(0, parsed[0])),
        lines(lambda parsed: parsed.append(parsed[-1])),
        document(version=0),
        document(version=True),
        document(version=2**40),
        document(timestamp=None),
        document(passages=7),
        document(passages=[{"start": 0, "end": 10**9, "tokens": 3, "header": ""}]),
        document(passages=[{"start": -1, "end": 2, "tokens": 3, "header": ""}]),
        document(passages=[{"start": 0, "end": 2, "tokens": "3", "header": ""}]),
        message(role="root"),
        message(position=-1),
        message(timestamp=None),
        lines(lambda parsed: parsed.append(parsed[-1]), "messages-000001.jsonl"),
        tensor(lambda tensors: tensors.update({"0.0.keys": TensorBytes("F32", (4, 1, 1, 32), b"\0" * 512)})),
        tensor(lambda tensors: tensors.update({"0.0.more": tensors["0.0.keys"]})),
        tensor(
            lambda tensors: tensors.update(
                {
                    "0.0.keys": TensorBytes(
                        "F32", tensors["0.0.keys"].shape, b"\xff" * len(tensors["0.0.keys"].data)
                    )
                }
            )
        ),
        tensor(lambda tensors: tensors.update({"0.0.keys": TensorBytes("F32", (), b"\0" * 4)})),
        tensor(lambda tensors: tensors.update({"0.0.terms": tensors["0.0.keys"]})),
    ],
)
def test_what_no_export_writes_is_refused(
    target: MemoryModel, sample: Path, tmp_path: Path, edit: Edit
) -> None:
    path = tmp_path / "bad.msa"
    path.write_bytes(sample.read_bytes())
    rewrite(path, edit)
    refused(target, path, (StorageError, InvalidDocumentError))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (document(text=""), InvalidDocumentError),
        (document(text=7), InvalidDocumentError),
        (document(text="half \ud83d"), InvalidDocumentError),
        (document(id=""), InvalidDocumentError),
        (document(id="x" * 600), InvalidDocumentError),
        (document(id=None), InvalidDocumentError),
        (document(metadata=[1]), InvalidDocumentError),
        (document(metadata={"a": nested(60)}), LimitError),
        (document(metadata={"a": "x" * 70_000}), LimitError),
        (document(created_at="soon"), InvalidDocumentError),
        (document(created_at=None), InvalidDocumentError),
        (document(source=3), InvalidDocumentError),
        (message(session=""), InvalidDocumentError),
        (message(content=""), InvalidDocumentError),
        (message(key=5), InvalidDocumentError),
        (
            lambda members: members.update({"documents-000001.jsonl": b"[" * 200_000 + b"\n"}),
            (LimitError, StorageError),
        ),
    ],
)
def test_what_add_would_refuse_is_refused(
    target: MemoryModel, sample: Path, tmp_path: Path, edit: Edit, expected: type[MSAError]
) -> None:
    path = tmp_path / "bad.msa"
    path.write_bytes(sample.read_bytes())
    rewrite(path, edit)
    refused(target, path, expected)


def test_limits_of_the_importing_memory_count(sample: Path, tmp_path: Path) -> None:
    config = MemoryConfig(max_document_chars=100)
    with open_memory(tmp_path / "to", config=config) as target:
        assert "max_document_chars" in refused(target, sample, LimitError)


def raw(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def central(data: bytearray, field: int, format: str, value: int) -> None:
    """Overwrites a field of the first entry of the central directory."""
    struct.pack_into(format, data, data.index(b"PK\x01\x02") + field, value)


def end_record(data: bytearray, field: int, format: str, value: int) -> None:
    struct.pack_into(format, data, data.rindex(b"PK\x05\x06") + field, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.clear(),
        lambda data: data.extend(b"more"),
        lambda data: data.__delitem__(slice(-30, None)),
        lambda data: data.__delitem__(slice(0, 4000)),
        lambda data: data.__setitem__(slice(0, 4), b"GIF8"),
        lambda data: central(data, 8, "<H", 0x1),  # encrypted
        lambda data: central(data, 10, "<H", zipfile.ZIP_DEFLATED),
        lambda data: central(data, 38, "<L", 0o120777 << 16),  # a link
        lambda data: central(data, 24, "<L", 2**31),  # a bomb by its declared size
        lambda data: central(data, 42, "<L", 17),  # another place
        lambda data: end_record(data, 16, "<L", 10),  # the directory is elsewhere
        lambda data: end_record(data, 20, "<H", 4),  # a comment
    ],
)
def test_a_file_that_is_not_such_a_zip_is_refused(
    target: MemoryModel, sample: Path, tmp_path: Path, change: Callable[[bytearray], object]
) -> None:
    path = tmp_path / "bad.msa"
    write(path, members_of(sample))
    raw(path, change)
    refused(target, path, StorageError)


def test_names_twice_compressed_members_and_huge_directories(
    target: MemoryModel, sample: Path, tmp_path: Path
) -> None:
    members, path = members_of(sample), tmp_path / "bad.msa"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        for name, data in [*members.items(), ("documents-000001.jsonl", b"")]:
            archive.writestr(name, data)
    assert "twice" in refused(target, path, StorageError)
    write(path, {**members, "documents-000002.jsonl": b"\n" * 10_000_000}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    assert "compressed" in refused(target, path, StorageError)
    write(path, members)
    raw(path, lambda data: end_record(data, 12, "<L", 2**32 - 1))
    assert "directory" in refused(target, path, LimitError)


def test_overlapping_members_are_refused(target: MemoryModel, sample: Path, tmp_path: Path) -> None:
    """Two entries of one place would let a small file declare any amount."""
    members, path = members_of(sample), tmp_path / "bad.msa"
    write(path, members | {"documents-000002.jsonl": members["documents-000001.jsonl"]})
    data = bytearray(path.read_bytes())
    entries = [place for place in range(len(data)) if data.startswith(b"PK\x01\x02", place)]
    names = [bytes(data[place + 46 : place + 46 + data[place + 28]]).decode() for place in entries]
    first, second = (entries[names.index(f"documents-00000{number}.jsonl")] for number in (1, 2))
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    path.write_bytes(data)
    refused(target, path, StorageError)


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{}",
        b'{"format": "something else"}',
        b'{"format": "msa-memory-bundle", "version": 2, "members": {}}',
        b'{"format": "msa-memory-bundle", "version": 1}',
        b'{"format": "msa-memory-bundle", "version": 1, "members": []}',
        b"[" * 100_000,
    ],
)
def test_a_wrong_manifest_is_refused(
    target: MemoryModel, sample: Path, tmp_path: Path, manifest: bytes
) -> None:
    path = tmp_path / "bad.msa"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members_of(sample), "manifest.json": manifest}.items():
            archive.writestr(name, data)
    refused(target, path, StorageError)


def test_wrong_checksums_and_no_file_at_all(target: MemoryModel, sample: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.msa"
    path.write_bytes(sample.read_bytes().replace(b"violins", b"violets"))
    assert "SHA-256" in refused(target, path, StorageError)
    with pytest.raises(StorageError, match="No such file"):
        target.import_bundle(tmp_path / "missing")
    with pytest.raises(StorageError):
        target.import_bundle(tmp_path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_named_or_harmless(sample: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = sample.read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(
            st.integers(0, len(damaged) - 1) | st.integers(max(0, len(damaged) - 900), len(damaged) - 1)
        )
        damaged[place] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    path = tmp_path / "damaged.msa"
    path.write_bytes(damaged)
    try:
        found = read_all(path)
    except MSAError:
        return
    assert found == read_all(sample)


def read_all(path: Path) -> list[object]:
    with open_bundle(path) as reader:
        config = MemoryConfig()
        found: list[object] = [reader.manifest["model"]["fingerprint"]]
        for name in reader.names("documents"):
            found += read_documents(reader.read(name), config)
        for name in reader.names("messages"):
            found += read_messages(reader.read(name), "default", config)
        return found + [sorted(read_tensors(reader.read(name))) for name in reader.names("states")]


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.tuples(st.sampled_from(["F32", "BF16", "I64"]), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    )
)
def test_tensor_files_are_safetensors(shapes: dict[str, tuple[str, list[int]]]) -> None:
    sizes = {"F32": 4, "BF16": 2, "I64": 8}
    tensors = {}
    for name, (dtype, shape) in shapes.items():
        count = sizes[dtype]
        for size in shape:
            count *= size
        tensors[name] = TensorBytes(dtype, tuple(shape), bytes(range(256))[:count] * (count > 0))
    data = b"".join(tensor_file(tensors))
    assert {name: tuple(tensor.shape) for name, tensor in load_tensors(data).items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    again = read_tensors(data)
    assert {name: (each.dtype, each.shape, bytes(each.data)) for name, each in again.items()} == {
        name: (each.dtype, each.shape, each.data) for name, each in tensors.items()
    }


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [10**30, 0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "O8", "shape": [1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}, "b": {"dtype": "I64", "shape": [1],
         "data_offsets": [0, 8]}},
        {"a": {"shape": [1]}},
        {"a": 7},
        [],
    ],
)  # fmt: skip
def test_other_tensor_files_are_refused(header: Any) -> None:
    head = json.dumps(header).encode()
    with pytest.raises(TensorFileError):
        read_tensors(len(head).to_bytes(8, "little") + head + b"\0" * 8)
