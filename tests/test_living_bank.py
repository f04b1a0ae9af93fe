"""A memory that is open keeps in step with one that forgets and compacts beside it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.errors import CheckpointError, ConfigError
from msa_memory.persistence import PassageRecord, Store
from msa_memory.testing import open_memory

FACTS = {f"d{i}": f"Keeper {i} feeds the {animal}." for i, animal in enumerate("lion bear wolf seal".split())}


def test_removals_without_tombstones_are_seen_too(tmp_path: Path) -> None:
    """``compact`` drops the tombstones an open reader has not read yet: it then compares all there is."""
    with open_memory(tmp_path / "bank") as writer, open_memory(tmp_path / "bank") as reader:
        writer.add_many([{"id": id, "content": text} for id, text in FACTS.items()])
        assert {hit.id for hit in reader.search("Keeper feeds", k=9)} == FACTS.keys()
        writer.forget("d1")
        writer.update("d2", "Keeper 2 feeds the wolf twice.")
        writer.compact()
        writer.add("Keeper 9 feeds the owl.", id="d9")
        hits = {hit.id: hit.text for hit in reader.search("Keeper feeds", k=9)}
        assert hits.keys() == {"d0", "d2", "d3", "d9"}
        assert hits["d2"] == "Keeper 2 feeds the wolf twice."
        bank = reader._shared.bank
        assert bank is not None
        assert sorted(bank.records) == sorted(bank.bank.view().numbers.tolist())
        writer.forget("d0")
        writer.compact()
        assert {hit.id for hit in reader.search("Keeper feeds", k=9)} == {"d2", "d3", "d9"}


QUESTIONS = ("Which keeper feeds the bear?", "Who feeds the owl at night?", "the keepers")


@pytest.fixture
def shelved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose 40 passages lie in sheets of about 8 chunks."""
    monkeypatch.setattr("msa_memory.engine.bank.BLOCK_CHUNKS", 8)
    with open_memory(tmp_path / "bank") as memory:
        memory.add_many([{"id": f"k{i}", "content": fact(i)} for i in range(40)])
        memory.search("anything")
    assert len(sheets(tmp_path / "bank")) > 4
    return tmp_path / "bank"


def fact(number: int) -> str:
    animal = "lion bear wolf seal owl".split()[number % 5]
    return f"Keeper {number} feeds the {animal} at {'noon' if number % 3 else 'night'}."


def sheets(folder: Path) -> list[Path]:
    return sorted((folder / "states").glob("*.sheet"))


def asked(memory: MemoryModel) -> list[object]:
    return [memory.search(question, k=7) for question in QUESTIONS] + [
        memory.explain(question) for question in QUESTIONS
    ]


def held_loose(folder: Path) -> list[object]:
    """What a memory says whose bank keeps every key as it is."""
    with open_memory(folder, read_only=True) as memory:
        memory._bank()._shelves = False
        return asked(memory)


def test_opening_reads_no_states_and_finds_the_same(shelved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = held_loose(shelved)
    read: list[int] = []
    states = Store.states

    def counted(store: Store, record: PassageRecord) -> Any:
        read.append(record.number)
        return states(store, record)

    monkeypatch.setattr(Store, "states", counted)
    for read_only in (False, True):
        read.clear()
        with open_memory(shelved, read_only=read_only) as memory:
            memory._bank().refresh()
            assert len(read) < 10, "only what fills no sheet yet"
            assert asked(memory) == expected
            bank = memory._bank()
            assert sorted(bank.records) == sorted(bank.bank.view().numbers.tolist())


@pytest.mark.parametrize("missing", [False, True])
def test_sheets_that_are_gone_are_made_anew(shelved: Path, missing: bool) -> None:
    expected, names = held_loose(shelved), [file.name for file in sheets(shelved)]
    for file in sheets(shelved):
        if missing:
            file.unlink()
        else:
            file.write_bytes(b"")
    with open_memory(shelved, read_only=True) as memory:
        assert asked(memory) == expected
        assert memory._bank().bank._shelves, "in memory"
    with open_memory(shelved) as memory:
        assert asked(memory) == expected
        assert memory.verify() == ()
    assert [file.name for file in sheets(shelved)] == names


def test_a_damaged_sheet_is_not_believed_and_made_anew(
    shelved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, whole = held_loose(shelved), [file.read_bytes() for file in sheets(shelved)]
    for file, data in zip(sheets(shelved), whole, strict=True):
        file.write_bytes(data[:4096] + bytes(byte ^ 0x55 for byte in data[4096:]))
    with open_memory(shelved) as memory:
        assert len(memory.verify()) == len(whole)
        for _ in range(3):
            assert asked(memory) == expected
        assert "is damaged" in caplog.text or "StateDamaged" in caplog.text
        assert memory.verify() == ()
    assert [file.read_bytes() for file in sheets(shelved)] == whole


@pytest.mark.parametrize("compacts", [False, True])
def test_a_reader_of_sheets_sees_what_others_do(shelved: Path, compacts: bool) -> None:
    gone = {f"k{i}" for i in range(3, 40, 9)}
    with open_memory(shelved) as reader, open_memory(shelved) as writer:
        asked(reader)
        writer.forget(sorted(gone))
        if compacts:
            more = {f"k{i}" for i in range(20, 38)} - gone
            writer.forget(sorted(more))
            gone |= more
            writer.compact()
        writer.add("Keeper 99 feeds the owl at night.", id="k99")
        assert asked(reader) == asked(writer) == held_loose(shelved)
        found = {source.id for source in reader.search("Keeper feeds", k=99)}
        assert found == {f"k{i}" for i in (*range(40), 99)} - gone
        assert reader.verify() == ()
        writer.add_many([{"id": f"n{i}", "content": fact(i)} for i in range(40)])
        assert asked(reader) == asked(writer) == held_loose(shelved)
    with open_memory(shelved) as later:
        assert asked(later) == held_loose(shelved)


def test_what_comes_little_by_little_goes_to_sheets_too(shelved: Path) -> None:
    before = len(sheets(shelved))
    with open_memory(shelved) as memory:
        for number in range(100, 130):
            memory.add(fact(number), id=f"k{number}")
            memory.search("anything")
            assert memory._bank().bank.loose_chunks < 40
        assert len(sheets(shelved)) > before + 3
        assert asked(memory) == held_loose(shelved)
        assert memory.verify() == ()


def test_a_question_under_way_survives_that_its_sheets_are_erased(shelved: Path) -> None:
    with open_memory(shelved) as reader, open_memory(shelved) as writer:
        bank = reader._bank()
        view = bank.view("default", None)
        engine = reader._engine()
        before = engine.route(QUESTIONS[0], view)
        writer.forget(["k5", "k21"])
        after = engine.route(QUESTIONS[0], view)
        gone = [record.number for record in bank.records.values() if record.document_id in ("k5", "k21")]
        left = ~np.isin(after.numbers, gone)
        assert (after.numbers == before.numbers).all()
        lost = np.isneginf(after.scores[:, ~left])
        assert (lost | (after.scores == before.scores)[:, ~left]).all(), "gone, or as they were"
        best = np.argsort(-before.mean()[left])[:8]
        assert (after.scores[:, left][:, best] == before.scores[:, left][:, best]).all()


def test_damaged_states_under_a_sheet_are_named_and_left_out(
    shelved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_memory(shelved) as memory:
        [best, *_] = memory.search(QUESTIONS[0], k=1)
        record = memory._store.records([best.passage])[best.passage]
    segment = shelved / "states" / record.segment
    data = bytearray(segment.read_bytes())
    data[record.offset + record.length // 2] ^= 1
    segment.write_bytes(data)
    with open_memory(shelved) as memory:
        found = memory.search(QUESTIONS[0], k=39)
        assert len(found) == 39
        assert best.id not in {source.id for source in found}
        assert best.id in caplog.text
        assert "left out of this memory until it is repaired" in caplog.text
        assert memory.verify(repair=True) == ()
        assert best.id in {source.id for source in memory.search(QUESTIONS[0], k=1)}


@pytest.mark.parametrize("routing", ["exact", "skim"])
def test_every_score_that_is_shown_is_exact(
    shelved: Path, monkeypatch: pytest.MonkeyPatch, routing: Any
) -> None:
    """However many are asked for, and however few are settled to begin with."""
    with open_memory(shelved, read_only=True) as memory:
        memory._bank().bank.exact = True
        memory._bank()._shelves = False
        expected = {question: memory.search(question, k=40) for question in QUESTIONS}
        contexts = [memory.context(question) for question in QUESTIONS]
    for module, name, value in (
        ("bank_view", "SETTLED", 2),
        ("engine", "SETTLED", 2),
        ("bank_view", "SKIM_CUTS", (40, 40)),
    ):
        monkeypatch.setattr(f"msa_memory.engine.{module}.{name}", value)
    monkeypatch.setattr("msa_memory.engine.bank_view.LEAST_SETTLED", 1)
    with open_memory(shelved, config=MemoryConfig(routing=routing)) as memory:
        for question, sources in expected.items():
            for k in (1, 3, 17, 40):
                assert memory.search(question, k=k) == sources[:k]
        assert [memory.context(question) for question in QUESTIONS] == contexts


def test_routing_is_as_the_options_and_the_model_say(tmp_path: Path) -> None:
    for routing, skim_from in (("auto", 131_072), ("exact", None), ("skim", 1)):
        with open_memory(tmp_path / "bank", config=MemoryConfig(routing=routing)) as memory:
            assert memory._bank().bank.skim_from == skim_from
            assert memory._bank().bank.skim_layers == ()
    with open_memory(tmp_path / "bank") as memory:
        engine = memory._engine()
        for layers, slots in (((1,), (0,)), ((3, 1), (0, 1)), ((), (0,))):
            bank = engine.new_bank(lambda number: pytest.fail(f"{number} was fetched"))
            bank.skim_layers = layers
            assert bank.view().skim_order[0] == slots
        bank.skim_layers = (2,)
        with pytest.raises(CheckpointError, match=r"skim_layers names \[2\].*\[1, 3\]"):
            bank.view()
    with pytest.raises(ConfigError, match="routing"):
        MemoryConfig(routing="fast")


def test_what_answers_are_decoded_with_can_be_chosen(tmp_path: Path) -> None:
    with open_memory(tmp_path / "bank", config=MemoryConfig(decode_weights="packed")) as memory:
        memory.add("Bob repairs violins.")
        with pytest.raises(ConfigError, match="decode_weights='packed' needs bfloat16"):
            memory.query("What does Bob repair?")
    with open_memory(tmp_path / "bank", config=MemoryConfig(decode_weights="exact")) as memory:
        assert memory.query("What does Bob repair?").sources
