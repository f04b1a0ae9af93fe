"""Interrupted writes: kills, full disks and failures at every step leave the bank as before or after."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from msa_memory.errors import MSAError, StorageError
from msa_memory.persistence import NewDocument, Store, disk
from msa_memory.persistence.commit_counter import CommitCounter

WORKER = Path(__file__).with_name("worker.py")


def contents(store: Store) -> dict[str, tuple[int, str]]:
    return {
        document.id: (document.version, document.text) for document in store.list("default", limit=10_000)
    }


def snapshot(store: Store) -> tuple[object, ...]:
    return contents(store), store.changes(0), store.stats("default").state_bytes


class Failing:
    """Lets a function run ``after`` times, then raises ``error`` at every call."""

    def __init__(self, function: Callable[..., object], after: int, error: BaseException) -> None:
        self.function, self.left, self.error = function, after, error
        self.failed = False

    def __call__(self, *arguments: object) -> object:
        if self.left == 0:
            self.failed = True
            raise self.error
        self.left -= 1
        return self.function(*arguments)


def attempt(store: Store, action: str, document: NewDocument) -> StorageError | None:
    try:
        if action == "add":
            store.add([document])
        elif action == "replace":
            store.replace(document)
        else:
            store.forget("default", ids=["old"])
    except StorageError as error:
        return error
    return None


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
@pytest.mark.parametrize("action", ["add", "replace", "forget"])
def test_a_full_disk_at_every_step(folder, store, new, monkeypatch, call, action):
    """Each write and each fsync fails once; the bank is then as before, or as after the commit."""
    store.add([new(store, "kept", parts=2), new(store, "old", "old text", parts=2)])
    outcomes = set()
    for after in range(12):
        document = new(store, "fresh" if action == "add" else "old", "new text", parts=3)
        before, generation = snapshot(store), store.generation()
        failing = Failing(getattr(os, call), after, OSError(28, "No space left on device"))
        with monkeypatch.context() as patch:
            patch.setattr(disk.os, call, failing)
            error = attempt(store, action, document)
        outcome = "done"
        if error is not None:
            assert isinstance(error.__cause__, OSError)
            assert str(folder) in str(error)
            outcome = "stored" if store.generation() > generation else "refused"
        outcomes.add(outcome)
        if outcome == "refused":
            assert snapshot(store) == before
        else:
            assert store.generation() == generation + 1
        assert store.verify() == ()
        with Store.open(folder) as fresh:
            assert contents(fresh) == contents(store)
        if not failing.failed:
            break
        store.forget_namespace("default", confirm="default")
        store.add([new(store, "kept", parts=2), new(store, "old", "old text", parts=2)])
    assert not failing.failed
    assert "done" in outcomes
    assert {"refused", "stored"} & outcomes


def test_a_file_size_limit_of_the_system(folder, store, new):
    """A real EFBIG from the kernel, in SQLite's files as well as in ours."""
    store.add([new(store, f"d{i}", parts=2) for i in range(20)])
    before = contents(store)
    program = f"""
import resource, sys
sys.path.insert(0, {str(WORKER.parent)!r})
from pathlib import Path
from conftest import make_document
from msa_memory.errors import StorageError
from msa_memory.persistence import Store
refused = 0
with Store.open(Path({str(folder)!r})) as store:
    documents = [make_document(store, f"big{{i}}", "x" * 5000, parts=1) for i in range(200)]
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        store.add(documents)
    except StorageError as error:
        refused = 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(refused, store.count("default"), store.verify())
    store.add([make_document(store, f"after{{limit}}")])
"""
    for limit in (16_384, 150_000):
        done = subprocess.run([sys.executable, "-c", program, str(limit)], capture_output=True, text=True)
        assert done.stdout.strip() == f"1 {len(before)} ()", done.stderr
        before[f"after{limit}"] = (1, f"This is what after{limit} says.")
    assert contents(store) == before
    assert store.verify() == ()


def test_a_crash_before_the_acknowledgement_is_no_damage(folder, new, monkeypatch):
    with Store.open(folder) as store:
        store.bind_model(model="m", fingerprint="f", info={})
        store.add([new(store, "a")])
        with monkeypatch.context() as patch:
            patch.setattr(CommitCounter, "write", Failing(None, 0, KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                store.add([new(store, "b")])
    with Store.open(folder) as store:
        assert sorted(contents(store)) == ["a", "b"]
        store.add([new(store, "c")])
        assert store.verify() == ()


def test_the_tail_of_a_crashed_write_is_cut_by_the_next(folder, store, new):
    store.add([new(store, "a")])
    states = folder / "states"
    segment = states / "segment-00000001.seg"
    size = segment.stat().st_size
    with segment.open("ab") as file:
        file.write(b"half a block")
    (states / "segment-00000002.seg").write_bytes(b"another")
    with Store.open(folder) as reader:
        assert reader.states(reader.changes(0).added[0])
    assert segment.stat().st_size > size
    store.forget("default", ids=["a"])
    assert segment.stat().st_size == size
    assert not (states / "segment-00000002.seg").exists()


def test_segments_roll_over(folder, store, new, monkeypatch):
    monkeypatch.setattr("msa_memory.persistence.segments.SEGMENT_LIMIT_BYTES", 2000)
    store.add([new(store, f"d{i}", parts=3) for i in range(6)])
    store.add([new(store, "last")])
    files = sorted((folder / "states").iterdir())
    assert len(files) > 2
    assert all(file.stat().st_size <= 2000 for file in files)
    for record in store.changes(0).added:
        assert store.states(record)
    store.forget("default", ids=[f"d{i}" for i in range(5)])
    store.compact()
    assert store.verify() == ()
    assert contents(store).keys() == {"d5", "last"}


def test_errors_name_our_classes_only(store, new, monkeypatch):
    """A database that fails in the middle of a commit raises ours, and the bank goes on."""
    store.add([new(store, "a")])
    before = snapshot(store)
    document = new(store, "b")
    with store._database.writing() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER stop BEFORE INSERT ON documents BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    with pytest.raises(MSAError) as caught:
        store.add([document])
    assert type(caught.value).__module__ == "msa_memory.errors"
    assert "This is what" not in str(caught.value)
    assert snapshot(store) == before
    with store._database.writing() as connection:
        connection.exec_driver_sql("DROP TRIGGER stop")
    store.add([document])
    assert store.verify() == ()
