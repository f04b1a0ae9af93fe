"""Forgetting for real: nothing left in any file, and answers as if the forgotten had never been there."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.errors import NotFoundError
from msa_memory.testing import open_memory
from msa_memory.types import TensorBytes

BRIEF = MemoryConfig(max_new_tokens=12, passage_tokens=64)
QUESTIONS = ["Who repairs violins?", "the lighthouse in Bergen", "tea after ten minutes", "zyxomma"]
KEPT = {
    "bob": "Bob lives in Oslo and repairs violins.",
    "ann": "Ann paints lighthouses in Bergen.",
    "tea": "Green tea tastes bitter after ten minutes. " * 12,
    "oz": "Dorothy walked to the emerald city with the lion.",
}
SECRET = "zyxomma"
"""A word of no other text; every secret below holds it."""


def traces(folder: Path, *needles: bytes) -> list[tuple[str, bytes]]:
    """Files of a folder, its logs included, in which one of these byte strings occurs."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes().lower()
            found += [(path.name, needle) for needle in needles if needle.lower() in data]
    return found


def states_of(memory: MemoryModel) -> dict[int, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """Every state that the store holds, byte for byte, by passage number."""

    def plain(tensor: TensorBytes) -> tuple[str, tuple[int, ...], bytes]:
        return tensor.dtype, tensor.shape, bytes(tensor.data)

    return {
        record.number: {name: plain(tensor) for name, tensor in memory._store.states(record).items()}
        for record in memory._store.changes(0).added
    }


def answers_of(memory: MemoryModel) -> list[object]:
    """What every way of asking says, with scores as the floats they are."""
    asked: list[object] = []
    for question in QUESTIONS:
        asked.append(memory.query(question).model_dump(exclude={"timings"}))
        asked.append(memory.search(question, k=50))
        asked.append(memory.explain(question))
        asked.append(memory.context(question))
    return asked


def routing_keys_of(memory: MemoryModel) -> list[tuple[int, bytes]]:
    """The resident rows that the routers score, in order: number and bytes."""
    memory.search("anything")  # brings them up to date
    rows = []
    for block in memory._bank().bank._blocks:
        start = 0
        for number, length in zip(block.numbers, block.lengths, strict=True):
            rows.append((number, block.keys[:, start : start + length].numpy().tobytes()))
            start += length
        assert not block.keys[:, start:].any(), "what is not a row of a passage is zero"
    return rows


def live(memory: MemoryModel) -> None:
    """A life in which secrets come, change, are said and go, between what stays."""
    kept = iter(KEPT.items())

    def keep() -> None:
        id, text = next(kept)
        memory.add(text, id=id, timestamp="2026-01-31", metadata={"title": id})

    memory.add(f"The {SECRET} flies at dusk.", id=f"{SECRET}-1", metadata={"title": SECRET})
    keep()
    memory.add(f"A {SECRET} is a dragonfly. " * 20, id="long", metadata={"kind": SECRET}, source=SECRET)
    memory.query("zyxomma")
    keep()
    memory.update("long", f"The {SECRET} was renamed.")
    memory.update("long", metadata={"more": f"about the {SECRET}"})
    memory.restore("long", 1)
    session = memory.session(f"about {SECRET}")
    session.append("system", f"You love the {SECRET}.")
    session.append("user", f"Tell me of the {SECRET}.", name=f"Dr {SECRET}", key=f"{SECRET} key")
    keep()
    session.chat(f"Is the {SECRET} rare?")
    memory.add(f"Soon gone: {SECRET}.", id="gone", ttl=1e-6)
    keep()
    memory.forget([f"{SECRET}-1", "long"])
    session.forget()


@pytest.fixture
def lived(tmp_path: Path) -> Iterator[MemoryModel]:
    with open_memory(tmp_path / "lived", config=BRIEF) as memory:
        live(memory)
        memory.compact()
        yield memory


@pytest.fixture
def never_told(tmp_path: Path, lived: MemoryModel) -> Iterator[MemoryModel]:
    """A memory given only what stayed in the other, with the same passage numbers."""
    numbers = {source.passage for source in lived.search("Bob", k=50)}
    records = lived._store.changes(0).added
    assert numbers <= {record.number for record in records}
    with open_memory(tmp_path / "never told", config=BRIEF) as memory:
        for id, text in KEPT.items():
            first = min(record.number for record in records if record.document_id == id)
            while (number := memory._store.reserve_numbers(1)[0]) < first - 1:
                pass
            assert number == first - 1
            memory.add(text, id=id, timestamp="2026-01-31", metadata={"title": id})
        yield memory


def test_after_forgetting_it_is_as_if_it_had_never_been_there(
    lived: MemoryModel, never_told: MemoryModel
) -> None:
    assert len(states_of(lived)) > len(KEPT)
    assert states_of(lived) == states_of(never_told)
    assert routing_keys_of(lived) == routing_keys_of(never_told)
    assert answers_of(lived) == answers_of(never_told)


@pytest.mark.parametrize("chunks", [16, 40])
def test_it_is_so_wherever_the_rows_lie(
    lived: MemoryModel, never_told: MemoryModel, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small blocks, which forgetting leaves with gaps and adding alone fills."""
    monkeypatch.setattr("msa_memory.engine.bank.BLOCK_CHUNKS", chunks)
    for memory in (lived, never_told):
        memory._shared.bank = None
    lived.search("anything")
    for number in range(4):
        lived.add(f"The {SECRET} of bush number {number}. " * 3, id=f"bush {number}")
        lived.search("anything")
    lived.forget([f"bush {number}" for number in range(4)])
    bank = lived._bank().bank
    assert len(bank._blocks) + len(bank._shelves) > 1
    assert answers_of(lived) == answers_of(never_told)


def test_it_is_so_in_another_memory_too(tmp_path: Path, lived: MemoryModel, never_told: MemoryModel) -> None:
    with open_memory(tmp_path / "lived", config=BRIEF) as reopened:
        assert answers_of(reopened) == answers_of(never_told)
        assert routing_keys_of(reopened) == routing_keys_of(never_told)


def test_it_is_so_at_once_and_without_compact(tmp_path: Path, never_told: MemoryModel) -> None:
    with open_memory(tmp_path / "another", config=BRIEF) as memory:
        live(memory)
        assert answers_of(memory) == answers_of(never_told)
        found, expected = states_of(memory), states_of(never_told)
        assert {number: found[number] for number in expected} == expected


def test_a_memory_that_was_open_meanwhile_forgets_too(tmp_path: Path) -> None:
    """Its resident rows go at its next question, and no state can be read from then on."""
    with open_memory(tmp_path / "m", config=BRIEF) as one, open_memory(tmp_path / "m", config=BRIEF) as two:
        one.add_many([{"id": id, "content": text} for id, text in KEPT.items()])
        one.add(f"The {SECRET} flies at dusk.", id="secret")
        (number,) = (source.passage for source in two.search(SECRET, k=1))
        record = two._bank().records[number]
        one.forget("secret")
        assert [source.id for source in two.search(SECRET, k=9) if source.id == "secret"] == []
        assert number not in two._bank().records
        assert number not in two._bank().bank
        for memory in (one, two):
            with pytest.raises(NotFoundError):
                memory._store.states(record)
        assert routing_keys_of(one) == routing_keys_of(two)
        assert two.verify() == ()


def test_no_byte_of_it_is_left_in_any_file(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with open_memory(folder, config=BRIEF) as memory:
        memory.add_many([{"id": id, "content": text} for id, text in KEPT.items()])
        memory.add(f"The {SECRET} flies at dusk.", id=f"id {SECRET}", metadata={"kind": SECRET})
        memory.session(f"about {SECRET}").append("user", f"Tell me of the {SECRET}.", key=f"key {SECRET}")
        memory.session("other").append("user", f"Not again that {SECRET}!")
        memory.update(f"id {SECRET}", f"The {SECRET} was renamed.")
        held = [message.document_id for message in memory.session("other").messages()]
        documents = [
            f"id {SECRET}",
            *held,
            *(m.document_id for m in memory.session(f"about {SECRET}").messages()),
        ]
        numbers = [r.number for r in memory._store.changes(0).added if r.document_id in documents]
        states = [
            data
            for number in numbers
            for name, (_, _, data) in states_of(memory)[number].items()
            if np.frombuffer(data, dtype=np.uint8).any()
        ]
        assert len(states) >= 3 * len(documents)
        assert len(traces(folder, SECRET.encode(), *states)) >= len(states) + 1, "they can be found at all"
        memory.forget([f"id {SECRET}", *held])
        receipt = memory.forget(session=f"about {SECRET}")
        assert receipt.erased_at is not None
        assert traces(folder, SECRET.encode(), *states) == []
        assert [document_id.encode() for document_id in held if traces(folder, document_id.encode())] == []
        assert memory.verify() == ()
    assert traces(folder, SECRET.encode(), *states) == []
    with open_memory(folder, config=BRIEF) as memory:
        assert {document.id for document in memory.list()} == set(KEPT)


def test_nothing_of_a_long_life_is_left(tmp_path: Path, lived: MemoryModel) -> None:
    assert traces(tmp_path / "lived", SECRET.encode()) == []
    assert lived.verify() == ()
    assert lived.count() == len(KEPT)
    assert lived.sessions() == []


def test_a_forgotten_namespace_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with open_memory(folder, config=BRIEF) as memory:
        memory.add(KEPT["bob"])
        view = memory.namespace(f"the {SECRET} club")
        view.add(f"The {SECRET} flies at dusk.", id=f"id {SECRET}")
        view.session(f"about {SECRET}").append("system", f"You love the {SECRET}.")
        memory.forget_namespace(f"the {SECRET} club", confirm=f"the {SECRET} club")
        assert traces(folder, SECRET.encode()) == []
        assert memory.count() == 1
