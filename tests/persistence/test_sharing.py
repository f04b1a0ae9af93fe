"""Several stores, threads and processes on one bank."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from msa_memory.errors import LockedError
from msa_memory.persistence import Store

WORKER = Path(__file__).with_name("worker.py")


def test_another_store_sees_changes_as_a_delta(store, new, again):
    store.add([new(store, "a", parts=2), new(store, "b")])
    other = again()
    first = other.changes(0)
    assert (len(first.added), first.removed) == (3, ())
    nothing = other.changes(first.generation)
    assert (nothing.generation, nothing.added, nothing.removed) == (first.generation, (), ())
    store.add([new(store, "c")])
    store.forget("default", ids=["a"])
    assert other.generation() == first.generation + 2
    delta = other.changes(first.generation)
    assert [record.document_id for record in delta.added] == ["c"]
    assert not delta.grew
    assert delta.removed == tuple(r.number for r in first.added if r.document_id == "a")
    assert other.visible("default").tolist() == sorted(
        {r.number for r in (*first.added, *delta.added)} - set(delta.removed)
    )
    other.add([new(other, "d")])
    assert store.get("default", "d").id == "d"
    assert store.verify() == other.verify() == ()


def test_processes_add_concurrently(folder, store):
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), "mix", str(folder), f"p{i}", "25"], stdout=subprocess.PIPE
        )
        for i in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    lines = [line.split() for output in outputs for line in output.splitlines()]
    added, gone = ({line[1] for line in lines if line[0] == verb} for verb in ("add", "forget"))
    assert (len(added), len(gone)) == (50, 12)
    assert {document.id for document in store.list("default", limit=1000)} == added - gone
    assert store.verify() == ()


def test_threads_share_one_store(any_store, new):
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for i in range(8):
                any_store.add([new(any_store, f"{name}-{i}", parts=2, namespace=name)])
                for record in any_store.changes(0).added:
                    if record.namespace == name:
                        any_store.states(record)
                if i % 2:
                    any_store.forget(name, ids=[f"{name}-{i}"])
                assert all(document.namespace == name for document in any_store.list(name))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [any_store.count(f"t{i}") for i in range(4)] == [4] * 4
    assert any_store.verify() == ()


def test_a_held_lock_is_named_and_reading_goes_on(folder, store, new):
    store.add([new(store, "a")])
    with Store.open(folder, lock_timeout_s=0.1) as other:
        document = new(other, "b")
        with store._writer.held():
            with pytest.raises(LockedError, match=rf"process {os.getpid()} .*0\.1 s"):
                other.add([document])
            assert other.count("default") == 1
            with Store.open(folder) as third:
                assert third.count("default") == 1
        other.add([document])


def test_a_lock_held_by_a_thread_is_named(folder, new):
    with Store.open(folder, lock_timeout_s=0.05) as store:
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with store._writer.held():
                held.set()
                done.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(10)
        with pytest.raises(LockedError, match="another thread"):
            store.compact()
        done.set()
        thread.join()
        store.compact()


@pytest.mark.postgres
def test_two_hosts_share_one_postgresql_catalog(postgres_url, tmp_path, new, states_of):
    shared = str(tmp_path / "shared")
    options = {"catalog_url": postgres_url, "state_url": shared, "lock_timeout_s": 0.2}
    with Store.open(tmp_path / "one", **options) as one, Store.open(tmp_path / "two", **options) as two:
        one.bind_model(model="m", fingerprint="f", info={})
        one.add([new(one, "a")])
        two.add([new(two, "b")])
        for store in (one, two):
            for record in store.changes(0).added:
                assert bytes(store.states(record)["keys"].data) == states_of(record.number)["keys"].data
            assert store.verify() == ()
        document = new(two, "c")
        with one._writer.held(), pytest.raises(LockedError, match="advisory"):
            two.add([document])
        receipt = two.forget("default", ids=["a"])
        assert "VACUUM FULL" in receipt.beyond_reach[0]
        assert one.exists("default", ["a"]) == set()
