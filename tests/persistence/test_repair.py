"""The chain of commits, and verify with repair: what is noticed, what is mended, and what stays named."""

import logging
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import delete, insert, select, text, update

from msa_memory.errors import CatalogDamagedError, NotFoundError, ReadOnlyError, StateDamagedError
from msa_memory.persistence import Store
from msa_memory.persistence.tables import (
    commits,
    documents,
    erasures,
    events,
    passages,
    segments,
)


@pytest.fixture
def filled(any_store, new) -> Store:
    any_store.add([new(any_store, f"doc{i}", f"text of {i}", parts=2, metadata={"i": i}) for i in range(5)])
    any_store.replace(new(any_store, "doc1", "another text"))
    any_store.forget("default", ids=["doc4"])
    assert any_store.verify() == ()
    return any_store


def tamper(store: Store, *statements: object) -> None:
    with store._database.writing() as connection:
        for statement in statements:
            connection.execute(statement)


def states_of_all(store: Store) -> dict[int, dict[str, bytes]]:
    return {
        record.number: {name: bytes(tensor.data) for name, tensor in store.states(record).items()}
        for record in store.changes(0).added
    }


def test_rows_that_vanish_or_come_back_are_noticed(filled):
    with filled._database.reading() as connection:
        row = dict(connection.execute(select(documents).where(documents.c.id == "doc0")).mappings().one())
    filled.forget("default", ids=["doc0"])
    assert filled.verify() == ()
    tamper(filled, insert(documents).values(row))  # as it was, stamp included
    assert any("brought back" in problem for problem in filled.verify())
    tamper(filled, delete(documents).where(documents.c.id == "doc0"))
    assert filled.verify() == ()
    tamper(filled, delete(documents).where(documents.c.id == "doc2"))
    assert any("some were lost" in problem for problem in filled.verify())


@pytest.mark.parametrize("column", ["added", "removed", "digest"])
def test_an_altered_commit_is_named(filled, column):
    tamper(filled, update(commits).where(commits.c.generation == 2).values({column: b"\1" * 32}))
    assert any("commit" in problem for problem in filled.verify())


def test_a_dropped_commit_is_named(filled):
    tamper(filled, delete(commits).where(commits.c.generation == 3))
    assert any("misses commits 3 to 3" in problem for problem in filled.verify())


def test_another_history_of_the_same_length_is_refused(folder, store, new, tmp_path):
    """A copy that went its own way has as many commits, but not those that were acknowledged."""
    import shutil

    store.add([new(store, "a")])
    store.close()
    shutil.copytree(folder, tmp_path / "copy")
    for path, id in ((folder, "b"), (tmp_path / "copy", "c")):
        with Store.open(path) as either:
            either.add([new(either, id)])
    shutil.copy(tmp_path / "copy" / "catalog.sqlite3", folder / "catalog.sqlite3")
    with pytest.raises(CatalogDamagedError, match="was acknowledged: another copy"):
        Store.open(folder)


def test_compacting_folds_the_chain(filled, new):
    before = filled.generation()
    filled.compact()
    with filled._database.reading() as connection:
        kept = connection.scalars(select(commits.c.generation).order_by(commits.c.generation)).all()
    assert kept == [before, before + 1]
    assert filled.verify() == ()
    filled.add([new(filled, "later")])
    filled.compact()
    assert filled.verify() == ()
    tamper(filled, delete(documents).where(documents.c.id == "doc2"))
    assert any("some were lost" in problem for problem in filled.verify())


def encode(states_of, asked: list[int]):
    def again(passage):
        asked.append(passage.record.number)
        assert passage.text == passage.document_text[passage.record.start : passage.record.end]
        return states_of(passage.record.number)

    return again


def damage_block(store: Store, record) -> None:
    if store._folder is None:
        store._segments._blocks[record.segment, record.offset][40] ^= 0xFF
        return
    with (store._folder.states / record.segment).open("r+b") as file:
        file.seek(record.offset + 40)
        byte = file.read(1)[0]
        file.seek(record.offset + 40)
        file.write(bytes([byte ^ 0xFF]))


def test_damaged_states_are_made_again_from_the_text(filled, states_of):
    expected, asked = states_of_all(filled), []
    victims = [record for record in filled.changes(0).added if record.document_id in ("doc0", "doc3")]
    for record in victims[1:3]:
        damage_block(filled, record)
    with pytest.raises(StateDamagedError, match="repair"):
        filled.states(victims[1])
    generation = filled.generation()
    done = filled.repair(encode(states_of, asked))
    assert asked == [record.number for record in victims[1:3]]
    assert len(done.repaired) == 2
    assert done.remaining == ()
    assert states_of_all(filled) == expected
    assert [record.number for record in filled.changes(generation).added] == asked
    assert filled.changes(generation).removed == ()
    assert filled.verify() == ()
    assert filled.repair(encode(states_of, asked)) == type(done)((), ())


def test_a_lost_segment_is_made_again(folder, store, new, states_of):
    store.add([new(store, f"d{i}", parts=2) for i in range(4)])
    expected = states_of_all(store)
    (folder / "states" / "segment-00000001.seg").unlink()
    store.close()
    with Store.open(folder) as opened:
        assert opened.damage == ()
        opened.add([new(opened, "later")])
        assert len(opened.verify()) == 8
        done = opened.repair(encode(states_of, []))
        assert (len(done.repaired), done.remaining) == (8, ())
        assert {number: expected[number] for number in expected} == {
            number: states for number, states in states_of_all(opened).items() if number in expected
        }


def test_compacting_goes_on_past_a_damaged_block(folder, store, new, states_of):
    store.add([new(store, f"d{i}", parts=2) for i in range(10)])
    records = store.changes(0).added
    kept, victim = records[-1], records[-2]
    expected = states_of_all(store)[kept.number]
    damage_block(store, victim)
    store.forget("default", ids=[f"d{i}" for i in range(8)])
    store.compact()
    assert {name: bytes(t.data) for name, t in store.states(kept).items()} == expected
    [problem] = store.verify()
    assert "'d9'" in problem
    assert store.repair(encode(states_of, [])).remaining == ()
    assert states_of_all(store)[victim.number] == {
        name: bytes(t.data) for name, t in states_of(victim.number).items()
    }


def test_filters_and_counters_are_derived_again(filled, states_of):
    tamper(
        filled,
        text("UPDATE attributes SET value = '21' WHERE path = 'i'"),
        update(segments).values(size=10),
        insert(erasures).values(segment="segment-00000001.seg", offset=0, length=500, hash="x"),
    )
    assert len(filled.verify()) == 5
    done = filled.repair(encode(states_of, []))
    assert done.remaining == ()
    assert [document.id for document in filled.list("default", {"i": 3})] == ["doc3"]
    assert filled.verify() == ()
    assert len(states_of_all(filled)) == len(filled.changes(0).added)


def test_what_is_lost_stays_named_until_it_is_accepted(filled, new, states_of):
    tamper(
        filled,
        delete(passages).where(passages.c.number == 0),
        update(documents).where(documents.c.id == "doc3").values(text="poison"),
    )
    assert any("lost" in problem for problem in filled.verify())
    done = filled.repair(encode(states_of, []))
    assert any("lost" in problem for problem in done.repaired)
    assert len(done.remaining) == 2
    assert all(any(f"'{name}'" in problem for problem in done.remaining) for name in ("doc0", "doc3"))
    filled.replace(new(filled, "doc0", "text of 0", parts=2, metadata={"i": 0}))
    filled.forget("default", ids=["doc3"])
    assert filled.verify() == ()
    assert filled.get("default", "doc2").text == "text of 2"


def break_index(folder: Path, id: str) -> None:
    """Spell an id wrongly in the index by ids only, as a flipped bit would."""
    file = folder / "catalog.sqlite3"
    with sqlite3.connect(file) as connection:
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE tbl_name='documents' AND name LIKE 'sqlite_auto%'"
        ).fetchone()
    connection.close()
    data = file.read_bytes()
    place = data.index(b"default" + id.encode(), (page - 1) * 4096, page * 4096)
    broken = bytearray(data)
    broken[place + len("default")] ^= 1
    file.write_bytes(bytes(broken))


def test_a_damaged_index_hides_nothing(folder, store, new, states_of, caplog):
    store.add([new(store, f"d{i}") for i in range(6)])
    store.close()
    break_index(folder, "d3")
    with caplog.at_level(logging.ERROR, logger="msa_memory"), Store.open(folder) as damaged:
        assert damaged.damage
        assert "index" in caplog.text
        for read in (
            lambda: damaged.get("default", "d3"),
            lambda: damaged.list("default"),
            lambda: damaged.count("default"),
        ):
            with pytest.raises(CatalogDamagedError, match="repair"):
                read()
        document = new(damaged, "more")
        with pytest.raises(CatalogDamagedError, match="repair"):
            damaged.add([document])
        assert damaged.get("default", "d1").id == "d1"
        assert len(states_of_all(damaged)) == 6
        assert damaged.repair(encode(states_of, [])).remaining == ()
        assert damaged.damage == ()
        assert damaged.get("default", "d3").id == "d3"
        damaged.add([document])
        with pytest.raises(NotFoundError):
            damaged.get("default", "none")
    with Store.open(folder) as whole:
        assert whole.verify() == ()
        assert whole.count("default") == 7


def test_repairing_is_a_write(folder, store, again):
    with pytest.raises(ReadOnlyError):
        again(read_only=True).repair(dict)


def test_events_say_who_and_when_but_not_what(filled, new):
    found = filled.events("default")
    assert [event.kind for event in found] == ["forget", "replace", "add"]
    assert [(event.count, event.document is None) for event in found] == [(1, False), (1, False), (5, False)]
    assert all(event.actor.rpartition(":")[2].isdigit() for event in found)
    assert filled.events("default", limit=1) == found[:1]
    filled.forget_namespace("default", confirm="default")
    assert filled.events("default") == ()
    assert {event.namespace for event in filled.events()} == {None}
    with filled._database.reading() as connection:
        rows = connection.execute(select(events)).all()
    assert not [value for row in rows for value in row if isinstance(value, str) and "doc" in value]
