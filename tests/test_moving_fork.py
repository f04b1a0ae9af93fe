"""A fork is the same memory in another folder, and from then on neither can touch the other."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from msa_memory import MemoryModel
from msa_memory.errors import LockedError, ReadOnlyError, StorageError
from msa_memory.persistence import fork, fork_bank
from msa_memory.testing import open_memory


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[MemoryModel]:
    with open_memory(tmp_path / "from") as memory:
        memory.add_many([{"id": f"d{i}", "content": f"Person {i} lives in house {i}."} for i in range(6)])
        memory.update("d0", "Person 0 lives on a boat.")
        memory.namespace("other").add("Elsewhere.", id="d0")
        memory.session("talk").append("user", "Where is the boat?")
        yield memory


def contents(memory: MemoryModel) -> dict[str, Any]:
    """Everything of all namespaces, and that it is sound."""
    assert memory.verify() == ()
    found: dict[str, Any] = {}
    for name in memory._shared.store.namespaces():
        view = memory.namespace(name)
        found[name] = (
            [(doc, view.history(doc.id)) for doc in view.list(limit=100)],
            [view.session(id).messages() for id in view.sessions()],
        )
    return found


def segments(folder: Path) -> list[os.stat_result]:
    return [path.stat() for path in sorted((folder / "states").iterdir())]


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_fork_is_the_same_memory(memory: MemoryModel, tmp_path: Path) -> None:
    with memory.fork(tmp_path / "to") as copy:
        assert contents(copy) == contents(memory)
        assert copy.namespace_name == memory.namespace_name
        ours, theirs = (memory.search("boat", k=6), copy.search("boat", k=6))
        assert [(hit.id, hit.score) for hit in ours] == [(hit.id, hit.score) for hit in theirs]
        assert all(stat.st_nlink == 2 for stat in segments(tmp_path / "to"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "to"]
    assert (tmp_path / "to").stat().st_mode & 0o777 == 0o700


def test_neither_side_can_harm_the_other(memory: MemoryModel, tmp_path: Path) -> None:
    with memory.fork(tmp_path / "to") as copy:
        whole = contents(memory)
        copy.forget(["d1", "d2"])
        copy.add("Only in the copy.", id="new")
        copy.compact()
        assert contents(memory) == whole
        half = contents(copy)
        memory.forget(["d3", "d4", "d5"])
        memory.update("d0", "Person 0 sank.")
        memory.add("Only in the first.", id="new")
        memory.compact()
        assert contents(copy) == half
        assert [hit.id for hit in copy.search("house 4", k=1)] == ["d4"]
        assert {doc.id for doc in memory.list()} >= {"d1", "d2", "new"}
        assert all(stat.st_nlink == 1 for stat in segments(tmp_path / "to"))


def test_what_was_forgotten_is_in_no_fork(memory: MemoryModel, tmp_path: Path) -> None:
    memory.forget("d3")
    memory.fork(tmp_path / "to").close()
    assert b"Person 3" not in all_bytes(tmp_path / "to")
    assert b"Person 4" in all_bytes(tmp_path / "to")


def test_where_links_do_not_work_files_are_copied(
    memory: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(fork.os, "link", refuse)
    with memory.fork(tmp_path / "to") as copy:
        assert contents(copy) == contents(memory)
        assert all(stat.st_nlink == 1 for stat in segments(tmp_path / "to"))


def test_a_memory_in_ram_forks_to_disk(tmp_path: Path) -> None:
    with open_memory() as memory:
        memory.add_many([{"id": f"d{i}", "content": f"Person {i} lives here."} for i in range(5)])
        memory.forget("d2")
        memory.fork(tmp_path / "to").close()
        with open_memory(tmp_path / "to") as copy:
            assert contents(copy) == contents(memory)


def test_a_fork_needs_an_empty_place_and_a_writable_memory(memory: MemoryModel, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("taken", "taken/file", "from", "link"):
        with pytest.raises(StorageError):
            memory.fork(tmp_path / name)
    (tmp_path / "empty").mkdir()
    memory.fork(tmp_path / "empty").close()
    with open_memory(tmp_path / "from", read_only=True) as reader, pytest.raises(ReadOnlyError):
        reader.fork(tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_full_disk_leaves_nothing(
    memory: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("sync", "move", "sync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(fork, name, refuse)
            with pytest.raises(StorageError, match="No space"):
                memory.fork(tmp_path / "to")
        left = {path.name for path in tmp_path.iterdir()}
        assert left <= {"from", "to"}
        if "to" in left:  # it was moved there, and is whole
            with open_memory(tmp_path / "to") as copy:
                assert contents(copy) == contents(memory)


def test_one_fork_to_a_folder_at_a_time(memory: MemoryModel, tmp_path: Path) -> None:
    with fork._beside(tmp_path / "to"), pytest.raises(LockedError, match="another fork"):
        fork_bank(memory._shared.store, tmp_path / "to")
    memory.fork(tmp_path / "to").close()


async def test_forks_while_others_write_are_consistent(memory: MemoryModel, tmp_path: Path) -> None:
    """A writer keeps two documents equal; no fork sees them differ."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for turn in range(10_000):
                if stop.is_set():
                    return
                pair = [{"id": id, "content": f"turn {turn} of {id}"} for id in ("left", "right")]
                memory.add_many(pair, on_conflict="replace", progress=False)
                memory.forget("right") if turn % 5 == 4 else None
        except BaseException as error:
            failures.append(error)

    memory.add_many([{"id": id, "content": f"turn -1 of {id}"} for id in ("left", "right")])
    thread = threading.Thread(target=write)
    thread.start()
    for number in range(4):
        async with await memory.afork(tmp_path / f"to{number}") as copy:
            assert await copy.averify() == ()
            texts = {doc.id: doc.text for doc in await copy.alist(limit=100)}
            left, right = (texts.get(id, "").split(" of ")[0] for id in ("left", "right"))
            assert left == right or not right
        await asyncio.sleep(0)
    stop.set()
    thread.join()
    assert not failures
