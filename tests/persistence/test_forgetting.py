"""Forgetting: what is selected, what is gone, and which bytes remain anywhere in the folder."""

import json
import threading
from pathlib import Path

import pytest
from sqlalchemy import func, select

from msa_memory.errors import ConfigError, InvalidFilterError, NotFoundError, StorageError
from msa_memory.persistence import Store
from msa_memory.persistence.segments import FileSegments
from msa_memory.persistence.tables import tombstones


def files_with(folder: Path, needle: bytes) -> list[str]:
    return [file.name for file in sorted(folder.rglob("*")) if file.is_file() and needle in file.read_bytes()]


def state_bytes(states) -> bytes:
    return bytes(states["keys"].data)


@pytest.mark.parametrize("selection", [{}, {"ids": []}, {"where": {}}, {"ids": ["a"], "where": {"x": 1}}])
def test_an_empty_or_double_selector_is_an_error(any_store, new, selection):
    any_store.add([new(any_store, "a")])
    with pytest.raises(ConfigError, match="exactly one"):
        any_store.forget("default", **selection)
    assert any_store.count("default") == 1


def test_unknown_ids_remove_nothing(any_store, new):
    any_store.add([new(any_store, "a")])
    with pytest.raises(NotFoundError, match="'b'"):
        any_store.forget("default", ids=["a", "b"])
    with pytest.raises(NotFoundError):
        any_store.forget("other", ids=["a"])
    with pytest.raises(InvalidFilterError):
        any_store.forget("default", where={"a": {"$regex": "."}})
    assert any_store.count("default") == 1


def test_receipt_counts_what_went(any_store, new):
    any_store.add([new(any_store, "a", parts=3), new(any_store, "b")])
    any_store.replace(new(any_store, "a", "second", parts=2))
    generation = any_store.generation()
    plan = any_store.forget("default", ids=["a"], dry_run=True)
    assert (plan.dry_run, plan.masked_at, plan.erased_at) == (True, None, None)
    assert any_store.generation() == generation
    receipt = any_store.forget("default", ids=["a", "a"])
    counts = {"documents": 1, "versions": 1, "passages": 2, "messages": 0}
    assert (receipt.ids, receipt.counts) == (("a",), counts)
    assert (plan.ids, plan.counts, plan.bytes_erased) == (receipt.ids, receipt.counts, receipt.bytes_erased)
    assert receipt.bytes_erased > 0
    if any_store._database.is_sqlite:
        assert receipt.masked_at <= receipt.erased_at
    else:
        assert (receipt.erased_at, "VACUUM FULL" in receipt.beyond_reach[0]) == (None, True)
    assert not receipt.dry_run
    assert any_store.count("default") == 1
    assert any_store.verify() == ()


def test_forget_by_filter_and_by_namespace(any_store, new):
    any_store.add([new(any_store, f"d{i}", metadata={"i": i}) for i in range(6)])
    any_store.add([new(any_store, "d0", namespace="other")])
    assert any_store.forget("default", where={"i": {"$gte": 4}}).ids == ("d4", "d5")
    nothing = any_store.forget("default", where={"i": 99})
    assert (nothing.ids, nothing.counts["documents"], nothing.dry_run) == ((), 0, False)
    with pytest.raises(ConfigError, match="repeat the namespace"):
        any_store.forget_namespace("default", confirm="yes")
    assert len(any_store.forget_namespace("default", confirm="default").ids) == 4
    assert any_store.namespaces() == ("other",)
    with pytest.raises(NotFoundError, match="no documents"):
        any_store.forget_namespace("default", confirm="default")


def test_a_string_is_one_id(any_store, new):
    any_store.add([new(any_store, "ab"), new(any_store, "a"), new(any_store, "b")])
    assert any_store.forget("default", ids="ab").ids == ("ab",)


def test_tombstones_tell_other_readers(any_store, new):
    any_store.add([new(any_store, "a", parts=2), new(any_store, "b")])
    seen = any_store.changes(0)
    any_store.forget("default", ids=["a"])
    any_store.add([new(any_store, "a")])
    delta = any_store.changes(seen.generation)
    assert delta.removed == tuple(record.number for record in seen.added if record.document_id == "a")
    assert [record.document_id for record in delta.added] == ["a"]
    assert not {record.number for record in delta.added} & set(delta.removed)


def test_compact_drops_tombstones_and_late_readers_compare_all_there_is(any_store, new):
    def kept() -> int:
        with any_store._database.reading() as connection:
            return connection.execute(select(func.count()).select_from(tombstones)).scalar_one()

    any_store.add([new(any_store, f"d{i}", parts=2) for i in range(10)])
    early = any_store.changes(0)
    assert early.complete
    any_store.forget("default", ids=[f"d{i}" for i in range(5)])
    assert not any_store.changes(early.generation).complete
    just_before = any_store.generation()
    any_store.compact()
    assert kept() == 1, "the highest number ever given out stays known"
    late = any_store.changes(early.generation)
    assert late.complete
    assert [record.document_id for record in late.added] == [f"d{i}" for i in range(5, 10) for _ in range(2)]
    assert late.removed == ()
    for seen in (just_before, any_store.generation()):
        delta = any_store.changes(seen)
        assert (delta.complete, delta.added, delta.removed) == (False, (), ())
    any_store.forget("default", ids=["d9"])
    delta = any_store.changes(just_before)
    assert not delta.complete
    assert delta.removed == tuple(r.number for r in early.added if r.document_id == "d9")
    any_store.compact()
    assert kept() == 1
    assert min(any_store.reserve_numbers(3)) > max(record.number for record in early.added)
    assert any_store.verify() == ()


def test_no_byte_of_a_forgotten_document_remains(folder, store, new, states_of):
    """Text, old text, id, metadata, source and states; in catalog, log and segments, store still open."""
    store.add([new(store, f"filler-{i}", f"filler text {i} " * 9, metadata={"i": i}) for i in range(300)])
    secret = new(
        store, "SECRET-ID", "SECRET-ONE " + "long enough to overflow a page " * 400, parts=3,
        metadata={"k": "SECRET-META"}, source="SECRET-SOURCE",
    )  # fmt: skip
    store.add([secret])
    store.replace(new(store, "SECRET-ID", "SECRET-TWO", metadata={"k": "SECRET-LATER"}))
    numbers = [record.number for record in store.changes(0).added if record.document_id == "SECRET-ID"]
    patterns = [state_bytes(states_of(number)) for number in numbers]
    assert files_with(folder, b"SECRET-ONE")
    assert all(files_with(folder, pattern) for pattern in patterns)
    receipt = store.forget("default", ids=["SECRET-ID"])
    assert receipt.erased_at is not None
    assert [place.partition(":")[0] for place in receipt.beyond_reach] == ["copies made before"]
    assert files_with(folder, b"SECRET") == []
    assert [pattern for pattern in patterns if files_with(folder, pattern)] == []
    assert store.count("default") == 300
    assert store.verify() == ()


def test_moved_index_entries_leave_no_copy(folder, store, new):
    """SQLite's secure_delete misses entries that moved between pages; some of 500 ids would show."""
    import random

    ids = [f"{random.Random(i).getrandbits(64):016x}" for i in range(1500)]
    store.add([new(store, id) for id in ids])
    gone = ids[::3]
    store.forget("default", ids=gone)
    everything = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    assert [id for id in gone if id.encode() in everything] == []
    assert all(id.encode() in everything for id in ids[1::3])


def test_replacing_erases_the_old_states(folder, store, new, states_of):
    store.add([new(store, "a", parts=2)])
    numbers = [record.number for record in store.changes(0).added]
    store.replace(new(store, "a", "again"))
    assert [n for n in numbers if files_with(folder, state_bytes(states_of(n)))] == []


def test_an_open_reader_delays_erasure_and_the_receipt_says_so(folder, store, new, again):
    store.add([new(store, "a", "SECRET text"), new(store, "b")])
    reader = again()
    with reader._database.reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM documents").scalar() == 2
        receipt = store.forget("default", ids=["a"])
    assert receipt.masked_at is not None
    assert receipt.erased_at is None
    assert "write-ahead log" in receipt.beyond_reach[0]
    store.add([new(store, "c")])
    assert files_with(folder, b"SECRET") == []


def test_an_interrupted_erasure_is_finished_by_the_next_write(folder, store, new, states_of, monkeypatch):
    store.add([new(store, "a", "SECRET text"), new(store, "b")])
    pattern = state_bytes(states_of(store.changes(0).added[0].number))

    def fail(self, spans):
        raise StorageError("the disk is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(FileSegments, "erase", fail)
        receipt = store.forget("default", ids=["a"])
    assert (receipt.erased_at, "on fire" in receipt.beyond_reach[0]) == (None, True)
    assert store.exists("default", ["a"]) == set()
    assert files_with(folder, pattern) != []
    store.close()
    with Store.open(folder) as reopened:
        reopened.add([new(reopened, "c")])
    assert files_with(folder, pattern) == []
    assert files_with(folder, b"SECRET") == []


def test_compact_frees_what_was_forgotten(folder, store, new, again):
    store.add([new(store, f"d{i}", parts=4) for i in range(50)])
    other = again()
    records = [record for record in other.changes(0).added if record.document_id == "d49"]
    before = [bytes(other.states(record)["keys"].data) for record in records]
    store.forget("default", ids=[f"d{i}" for i in range(40)])
    size = store.stats("default").state_bytes
    assert store.compact() > 0
    assert store.stats("default").state_bytes < size / 3
    assert store.verify() == ()
    assert [bytes(other.states(record)["keys"].data) for record in records] == before
    with Store.open(folder) as fresh:
        assert [bytes(fresh.states(record)["keys"].data) for record in records] == before
        assert fresh.verify() == ()


def test_compacting_an_emptied_bank_never_reuses_names(folder, store, new, again):
    store.add([new(store, "a")])
    reader = again()
    reader.states(reader.changes(0).added[0])
    store.forget("default", ids=["a"])
    store.compact()
    assert list((folder / "states").iterdir()) == []
    store.add([new(store, "b")])
    [record] = reader.changes(0).added
    assert record.segment == "segment-00000002.seg"
    assert reader.states(record)
    assert store.verify() == ()


def test_two_namespaces_forget_concurrently(store, new):
    for name in ("left", "right"):
        store.add([new(store, f"d{i}", namespace=name, metadata={"of": name}) for i in range(20)])
    failures: list[str] = []

    def work(name: str) -> None:
        for i in range(20):
            store.forget(name, ids=[f"d{i}"])
            listed = [document.metadata["of"] for document in store.list(name)]
            if listed != [name] * (19 - i):
                failures.append(json.dumps([name, i, listed]))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("left", "right")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.namespaces() == ()
