"""Power loss at any moment: what was not synced may be missing or torn, what was acknowledged is there.

Our own writes are recorded where ``disk`` makes them, SQLite's through a VFS that forwards to its own one.
A recording is cut after any operation; of what was not synced by then any part may have reached the disk.
"""

import _sqlite3
import ctypes
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from msa_memory.errors import StateDamagedError
from msa_memory.persistence import Store, disk
from msa_memory.persistence.folder import LOCK, SEAL

SECTOR_BYTES = 512


@dataclass
class Operation:
    """Something that happened to a path; ``kind`` is a verb of ``Disk``, or "acknowledged"."""

    kind: str
    path: str = ""
    offset: int = 0
    data: bytes = b""
    target: str = ""
    expected: object = None


class Recorder:
    """Stands for the module ``os`` inside ``disk`` and notes what it does to the files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.operations: list[Operation] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def note(self, kind: str, path: object, **more: Any) -> None:
        name = os.fspath(path) if isinstance(path, os.PathLike) else str(path)
        if name.startswith(self.folder) and " (deleted)" not in name and not name.endswith("-shm"):
            self.operations.append(Operation(kind, name, **more))

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        new = not os.path.exists(path)
        descriptor = os.open(path, flags, mode)
        if new:
            self.note("create", path)
        elif flags & os.O_TRUNC:
            self.note("truncate", path, offset=0)
        return descriptor

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        self.note("write", _path(descriptor), offset=offset, data=bytes(data))
        return os.pwrite(descriptor, data, offset)

    def fdatasync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)
        self.note("sync", _path(descriptor))

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        self.note("sync_folder", _path(descriptor))

    def ftruncate(self, descriptor: int, size: int) -> None:
        self.note("truncate", _path(descriptor), offset=size)
        os.ftruncate(descriptor, size)

    def unlink(self, path: Any) -> None:
        os.unlink(path)
        self.note("unlink", path)

    def rename(self, source: Any, target: Any) -> None:
        os.rename(source, target)
        self.note("rename", source, target=os.fspath(target))


def _path(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


class Vfs(ctypes.Structure):
    """``sqlite3_vfs`` as far as it is used here; the rest is copied as it is."""


Open = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(Vfs),
    ctypes.c_void_p,  # the name: SQLite keeps this very pointer for as long as the file is open
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_int),
)
Delete = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Vfs), ctypes.c_char_p, ctypes.c_int)
Vfs._fields_ = [
    ("version", ctypes.c_int),
    ("file_bytes", ctypes.c_int),
    ("path_bytes", ctypes.c_int),
    ("following", ctypes.c_void_p),
    ("name", ctypes.c_char_p),
    ("data", ctypes.c_void_p),
    ("open", Open),
    ("delete", Delete),
    ("others", ctypes.c_void_p * 14),
]
Write = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
Truncate = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
Sync = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


class Methods(ctypes.Structure):
    """``sqlite3_io_methods``, what changes files named."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("close", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("write", Write),
        ("truncate", Truncate),
        ("sync", Sync),
        ("others", ctypes.c_void_p * 13),
    )


class RecordingVfs:
    """Makes SQLite's default VFS one that notes writes, truncations, syncs and deletions, then does them."""

    def __init__(self, recorder: Recorder) -> None:
        library = ctypes.CDLL(_sqlite3.__file__)
        library.sqlite3_vfs_find.restype = ctypes.POINTER(Vfs)
        self._library = library
        self._recorder = recorder
        self._real = library.sqlite3_vfs_find(None)
        self._paths: dict[int, str] = {}
        self._methods: dict[int, Methods] = {}
        self._kept: list[object] = []  # ctypes callbacks live as long as something refers to them
        self._vfs = Vfs()
        ctypes.memmove(ctypes.byref(self._vfs), self._real, ctypes.sizeof(Vfs))
        self._vfs.name = b"recording"
        self._vfs.open, self._vfs.delete = Open(self._open), Delete(self._delete)

    def __enter__(self) -> None:
        self._library.sqlite3_vfs_register(ctypes.byref(self._vfs), 1)

    def __exit__(self, *_: object) -> None:
        self._library.sqlite3_vfs_register(self._real, 1)
        self._library.sqlite3_vfs_unregister(ctypes.byref(self._vfs))

    def _open(self, vfs: Any, name: int | None, file: int, flags: int, out: Any) -> int:
        path = os.fsdecode(ctypes.string_at(name)) if name else ""
        new = bool(path) and not os.path.exists(path)
        result = int(self._real.contents.open(self._real, name, file, flags, out))
        if result == 0 and path:
            if new:
                self._recorder.note("create", path)
            self._paths[file] = path
            table = ctypes.c_void_p.from_address(file)
            table.value = ctypes.addressof(self._recording(table.value or 0))
        return result

    def _delete(self, vfs: Any, name: bytes, sync: int) -> int:
        result = int(self._real.contents.delete(self._real, name, sync))
        if result == 0:
            self._recorder.note("unlink", os.fsdecode(name))
            if sync:
                self._recorder.note("sync_folder", Path(os.fsdecode(name)).parent)
        return result

    def _recording(self, address: int) -> Methods:
        if address not in self._methods:
            real = Methods.from_address(address)
            copy = Methods()
            ctypes.memmove(ctypes.byref(copy), address, ctypes.sizeof(Methods))
            copy.write, copy.truncate, copy.sync = (
                Write(self._write(real)),
                Truncate(self._truncate(real)),
                Sync(self._sync(real)),
            )
            self._kept += [copy.write, copy.truncate, copy.sync]
            self._methods[address] = copy
        return self._methods[address]

    def _write(self, real: Methods) -> Callable[[int, int, int, int], int]:
        def write(file: int, data: int, size: int, offset: int) -> int:
            self._recorder.note("write", self._paths[file], offset=offset, data=ctypes.string_at(data, size))
            return int(real.write(file, data, size, offset))

        return write

    def _truncate(self, real: Methods) -> Callable[[int, int], int]:
        def truncate(file: int, size: int) -> int:
            self._recorder.note("truncate", self._paths[file], offset=size)
            return int(real.truncate(file, size))

        return truncate

    def _sync(self, real: Methods) -> Callable[[int, int], int]:
        def sync(file: int, flags: int) -> int:
            result = int(real.sync(file, flags))
            path = self._paths[file]
            self._recorder.note("sync", path)
            if path.endswith("-wal"):  # SQLite's VFS syncs the folder at the first sync of a new log
                self._recorder.note("sync_folder", Path(path).parent)
            return result

        return sync


@dataclass
class Inode:
    """A file's bytes on the medium, and what was done to it since its last sync."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[Operation] = field(default_factory=list)


class Disk:
    """What a disk holds while operations arrive, and what it may hold after a loss of power."""

    def __init__(self, folder: Path) -> None:
        self.now = {
            str(path): Inode(bytearray(path.read_bytes())) for path in folder.rglob("*") if path.is_file()
        }
        self.durable = dict(self.now)
        self.names: list[tuple[Operation, Inode | None]] = []

    def apply(self, operation: Operation) -> None:
        match operation.kind:
            case "create":
                self.now[operation.path] = Inode()
                self.names.append((operation, self.now[operation.path]))
            case "unlink":
                self.now.pop(operation.path)
                self.names.append((operation, None))
            case "rename":
                self.now[operation.target] = self.now.pop(operation.path)
                self.names.append((operation, self.now[operation.target]))
            case "write" | "truncate":
                self.now[operation.path].pending.append(operation)
            case "sync":
                inode = self.now[operation.path]
                for each in inode.pending:
                    change(inode.durable, each)
                inode.pending = []
            case "sync_folder":
                inside = [each for each in self.names if os.path.dirname(each[0].path) == operation.path]
                for each in inside:
                    rename(self.durable, *each)
                self.names = [each for each in self.names if each not in inside]

    def after_power_loss(self, generator: random.Random, kept: float) -> dict[str, bytes]:
        """Files on the medium: each unsynced write arrived with probability ``kept``, the last one torn."""
        entries = dict(self.durable)
        arrived = int(kept * len(self.names)) if kept in (0, 1) else generator.randint(0, len(self.names))
        for each in self.names[:arrived]:
            rename(entries, *each)
        files = {}
        for path, inode in entries.items():
            content = bytearray(inode.durable)
            survivors = [each for each in inode.pending if generator.random() < kept]
            if survivors and kept < 1 and survivors[-1].kind == "write":
                torn = survivors[-1]
                sectors = generator.randint(0, len(torn.data) // SECTOR_BYTES)
                survivors[-1] = Operation(
                    "write", torn.path, torn.offset, torn.data[: sectors * SECTOR_BYTES]
                )
            for each in survivors:
                change(content, each)
            files[path] = bytes(content)
        return files


def change(content: bytearray, operation: Operation) -> None:
    end = operation.offset + len(operation.data)
    if operation.kind == "truncate":
        del content[operation.offset :]
        content.extend(bytes(operation.offset - len(content)))
    elif operation.data:
        content.extend(bytes(max(end - len(content), 0)))
        content[operation.offset : end] = operation.data


def rename(entries: dict[str, Inode], operation: Operation, inode: Inode | None) -> None:
    if operation.kind == "unlink":
        entries.pop(operation.path, None)
    elif inode is not None:
        entries.pop(operation.path, None)
        entries[operation.target or operation.path] = inode


def contents(store: Store) -> object:
    states = {
        (record.document_id, record.ordinal): bytes(store.states(record)["keys"].data)
        for record in store.changes(0).added
    }
    documents = {
        document.id: (document.version, document.text, document.metadata)
        for document in store.list("default")
    }
    return documents, states


def copied(store: Store, numbers: Iterable[int]) -> dict[str, bytes]:
    """The sections of a sheet of these passages."""
    records = store.records(numbers)
    return {"keys": b"".join(bytes(store.states(records[number])["keys"].data) for number in numbers)}


def shelve(store: Store) -> None:
    """Keep a sheet, which is nothing that was acknowledged."""
    numbers = [record.number for record in store.changes(0).added][:8]
    assert store.keep_sheet(numbers, copied(store, numbers)) is not None


def workload(store: Store, new: Callable[..., Any]) -> Iterator[None]:
    """One of everything; yields when something was acknowledged."""
    store.add([new(store, "a", "text of a", parts=2)])
    yield
    store.add([new(store, f"many{i}", f"text {i} " * 200, metadata={"i": i}) for i in range(6)])
    yield
    shelve(store)
    store.replace(new(store, "a", "another text of a", parts=3))
    yield
    shelve(store)
    store.update_metadata("default", "many1", {"i": 10})
    yield
    store.forget("default", ids=["many2", "old0"])
    yield
    store.add([new(store, "late", "text " * 2000, parts=4)])
    yield
    store.forget("default", where={"i": {"$gte": 3}})
    yield
    store.compact()
    yield
    store.add([new(store, "last", parts=2)])
    yield
    store.close()


@pytest.fixture
def recording(folder, new, monkeypatch) -> tuple[Path, list[Operation], object]:
    """A bank as it was before, what was done to it, and what it held at first."""
    with Store.open(folder) as store:
        store.bind_model(model="tiny", fingerprint="f" * 64, info={"layers": 2})
        store.add([new(store, f"old{i}", f"old text {i}", parts=2) for i in range(4)])
        first = contents(store)
    before = folder.with_name("before")
    shutil.copytree(folder, before)
    recorder = Recorder(folder)
    with monkeypatch.context() as patch, RecordingVfs(recorder):
        patch.setattr(disk, "os", recorder)
        store = Store.open(folder)
        for _ in workload(store, new):
            recorder.operations.append(Operation("acknowledged", expected=contents(store)))
    kinds = {operation.kind for operation in recorder.operations}
    assert kinds >= {"create", "write", "truncate", "sync", "sync_folder", "unlink", "rename", "acknowledged"}
    written = {Path(operation.path).name for operation in recorder.operations if operation.kind == "write"}
    assert {"catalog.sqlite3", "catalog.sqlite3-wal", "commit"} <= written
    return before, recorder.operations, first


def check(files: dict[str, bytes], folder: Path, allowed: list[object], new: Callable[..., Any]) -> None:
    """Open what is left, find what was acknowledged, write to it, and find it sound."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "states").mkdir(parents=True)
    for path, data in files.items():
        if Path(path).name not in (LOCK, SEAL) or data:
            Path(path).write_bytes(data)
    with Store.open(folder) as store:
        assert store.damage == ()
        found = contents(store)
        assert found in allowed
        problems = [problem for problem in store.verify() if "commit counter" not in problem]
        assert problems == []
        for pages in store.load().sheets:
            with suppress(StateDamagedError):
                assert {name: pages.section(name) for name in pages.names} == copied(store, pages.numbers)
        store.add([new(store, "after")])
        assert store.verify() == ()
    with Store.open(folder) as store:
        assert store.count("default") == len(found[0]) + 1


@pytest.mark.parametrize(
    "every", [pytest.param(31, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.soak)]
)
def test_power_loss_after_any_operation(recording, folder, new, every):
    before, operations, first = recording
    shutil.rmtree(folder)
    shutil.copytree(before, folder)
    disk_model = Disk(folder)
    expected = [first, *(each.expected for each in operations if each.kind == "acknowledged")]
    generator, acknowledged, checked = random.Random(3), 0, 0
    for index, operation in enumerate(operations):
        if operation.kind == "acknowledged":
            acknowledged += 1
            continue
        disk_model.apply(operation)
        if index % every == 0:
            allowed = expected[acknowledged : acknowledged + 2]
            for kept in (0, 1, 0.5):
                check(disk_model.after_power_loss(generator, kept), folder, allowed, new)
                checked += 1
    assert checked > 60
    check(
        {path: bytes(inode.durable) for path, inode in disk_model.durable.items()}, folder, expected[-1:], new
    )
