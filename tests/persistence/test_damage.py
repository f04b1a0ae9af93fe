"""Damaged, lost and outdated files: named errors, and what is not damaged stays readable."""

import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from msa_memory.errors import CatalogDamagedError, StateDamagedError, StorageError
from msa_memory.persistence import Store


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0xFF]))


@pytest.fixture
def filled(folder, new) -> Path:
    """A closed bank of ten documents with two passages each."""
    with Store.open(folder) as store:
        store.bind_model(model="m", fingerprint="f", info={})
        store.add(
            [
                new(store, f"doc{i}", f"the unmistakable text {i} ", parts=2, metadata={"i": i})
                for i in range(10)
            ]
        )
        store.replace(new(store, "doc9", "doc9 once more"))
    return folder


@pytest.mark.parametrize("where", [0, 9, 60, -1])
def test_a_flipped_state_byte_names_its_document(filled, where):
    with Store.open(filled) as store:
        victim = next(record for record in store.changes(0).added if record.document_id == "doc3")
        flip(
            filled / "states" / victim.segment,
            victim.offset + (where if where >= 0 else victim.length + where),
        )
    with Store.open(filled) as store:
        for record in store.changes(0).added:
            if record.number == victim.number:
                with pytest.raises(StateDamagedError) as caught:
                    store.states(record)
                for part in (
                    "'doc3'",
                    "'default'",
                    f"passage {victim.number}",
                    victim.segment,
                    f"byte {victim.offset} ",
                ):
                    assert part in str(caught.value)
            else:
                assert store.states(record)
        [problem] = store.verify()
        assert problem == str(caught.value)


def test_blocks_of_another_place_are_refused(filled):
    """Rows that changed their blocks, checksums included; and a record that leads to another's block."""
    with Store.open(filled) as store:
        records = store.changes(0).added
        left, right = records[2], records[3]
        assert left.length == right.length
    with sqlite3.connect(filled / "catalog.sqlite3") as connection:
        for record, place in ((left, right), (right, left)):
            connection.execute(
                "UPDATE passages SET offset=?, checksum=? WHERE number=?",
                (place.offset, place.checksum, record.number),
            )
    connection.close()
    with Store.open(filled) as store:
        with pytest.raises(StateDamagedError, match="does not fit its stamp"):
            store.states(store.changes(0).added[2])
        one, other = store.changes(0).added[4:6]
        astray = replace(one, offset=other.offset, checksum=other.checksum)
        assert store.states(astray) == store.states(one) != store.states(other)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_cut_or_missing_segment(filled, keep, new):
    segment = filled / "states" / "segment-00000001.seg"
    data = segment.read_bytes()
    size = int(len(data) * keep) if keep < 1 else keep
    segment.write_bytes(data[:size])
    if not size:
        segment.unlink()
    with Store.open(filled) as store:
        whole, cut = [], []
        for record in store.changes(0).added:
            (whole if record.offset + record.length <= size else cut).append(record)
        assert all(store.states(record) for record in whole)
        for record in cut:
            with pytest.raises(StateDamagedError, match=f"'{record.document_id}'"):
                store.states(record)
        assert store.get("default", "doc5").text == "the unmistakable text 5 "
        store.add([new(store, "later")])
        assert store.states(store.changes(0).added[-1])
        assert len(store.verify()) == len(cut) > 0


def test_a_segment_cut_while_it_is_mapped_is_no_crash(filled):
    with Store.open(filled) as store:
        records = store.changes(0).added
        store.states(records[-1])
        segment = filled / "states" / records[-1].segment
        segment.write_bytes(segment.read_bytes()[:50])
        with pytest.raises(StateDamagedError):
            store.states(records[-1])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.99])
def test_a_truncated_catalog_is_named(filled, share):
    file = filled / "catalog.sqlite3"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    for read_only in (False, True):
        with pytest.raises(CatalogDamagedError):
            Store.open(filled, read_only=read_only)
    assert file.stat().st_size == int(len(data) * share)


@pytest.mark.parametrize("name", ["catalog.sqlite3", "commit"])
def test_a_lost_file_is_damage_not_an_empty_memory(filled, name):
    (filled / name).unlink()
    for read_only in (True, False):
        with pytest.raises(CatalogDamagedError, match="backup"):
            Store.open(filled, read_only=read_only)
    shutil.rmtree(filled / "states")
    with pytest.raises(CatalogDamagedError):
        Store.open(filled)


def test_only_states_left_is_damage(filled):
    for name in ("catalog.sqlite3", "commit", "lock"):
        (filled / name).unlink()
    with pytest.raises(CatalogDamagedError, match="missing or empty"):
        Store.open(filled)


def test_a_lost_write_ahead_log_is_noticed(folder, store, new, tmp_path):
    store.add([new(store, f"d{i}") for i in range(5)])
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with Store.open(copy) as whole:
        assert whole.count("default") == 5
    shutil.rmtree(copy)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    for read_only in (True, False):
        with pytest.raises(CatalogDamagedError):
            Store.open(copy, read_only=read_only)


def test_an_older_copy_of_the_catalog_is_noticed(filled, new, tmp_path):
    shutil.copy(filled / "catalog.sqlite3", tmp_path / "old")
    with Store.open(filled) as store:
        store.add([new(store, "newer")])
    shutil.copy(tmp_path / "old", filled / "catalog.sqlite3")
    with pytest.raises(CatalogDamagedError, match=r"has 3 commits, but 4 were acknowledged"):
        Store.open(filled)


def test_a_catalog_that_goes_back_under_an_open_store(filled, new, tmp_path):
    with Store.open(filled) as store:
        store.add([new(store, "newer")])
        seen = store.changes(0).generation
        with store._database.writing() as connection:
            connection.exec_driver_sql("UPDATE bank SET generation = generation - 2")
        with pytest.raises(CatalogDamagedError, match=f"generation {seen} was seen"):
            store.changes(seen)
        document = new(store, "x")
        with pytest.raises(CatalogDamagedError, match="acknowledged"):
            store.add([document])
        assert "acknowledged" in store.verify()[0]


def test_the_counter_survives_one_torn_slot(filled, new):
    for slot in (0, 4096):
        flip(filled / "commit", slot + 30)
        with Store.open(filled) as store:
            assert "damaged slot" in store.verify()[0]
            store.add([new(store, f"again{slot}")])
            assert store.verify() == ()
    flip(filled / "commit", 30)
    flip(filled / "commit", 4126)
    with pytest.raises(CatalogDamagedError, match="counter"):
        Store.open(filled)


@pytest.mark.parametrize(
    ("statement", "reads"),
    [
        ("UPDATE documents SET text = 'poison' WHERE id = 'doc4'", "get"),
        ("UPDATE documents SET metadata = '{}' WHERE id = 'doc4'", "get"),
        ("UPDATE documents SET version = 2 WHERE id = 'doc4'", "get"),
        ("UPDATE documents SET text = x'ff' WHERE id = 'doc4'", "get"),
        ("UPDATE documents SET namespace = 'stolen' WHERE id = 'doc4'", None),
        ("UPDATE versions SET text = 'poison'", "history"),
        ("UPDATE attributes SET value = 'x' WHERE document = 4", None),
        ("DELETE FROM attributes WHERE document = 4", None),
        ("DELETE FROM passages WHERE document = 4 AND ordinal = 1", None),
    ],
)
def test_changed_rows_are_named(filled, statement, reads):
    with sqlite3.connect(filled / "catalog.sqlite3") as connection:
        assert connection.execute(statement).rowcount > 0
    connection.close()
    name = "doc9" if "versions" in statement else "doc4"
    with Store.open(filled) as store:
        assert f"'{name}'" in store.verify()[0]
        if reads == "history":
            with pytest.raises(CatalogDamagedError, match="'doc9'"):
                store.history("default", "doc9")
        elif reads:
            with pytest.raises(CatalogDamagedError, match="'doc4'"):
                store.get("default", "doc4")
            with pytest.raises(CatalogDamagedError):
                store.passages(store.visible("default").tolist())
        assert store.get("default", "doc5").text == "the unmistakable text 5 "


def test_storage_errors_say_where(tmp_path):
    with pytest.raises(StorageError, match="does-not-exist"):
        Store.open(Path("/proc/does-not-exist/bank"))
