"""Bytes onto a disk, for certain: full writes, fsync of files and folders, OSError as StorageError.

Every change this package makes to a file of a bank, other than the database's own, goes through here.
Knows no format and no database.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msa_memory.errors import StorageError

__all__ = ["guarded", "move", "open_file", "opened", "remove", "sync", "sync_folder", "truncate", "write_at"]

_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone stops at the drive's cache


@contextmanager
def guarded(action: str, path: Path) -> Iterator[None]:
    """Raise StorageError, naming the action and the path, where the block raises OSError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot {action} {path}: {error.strerror or error}; check free space and permissions"
        ) from error


@contextmanager
def opened(path: Path, flags: int, mode: int = 0o600) -> Iterator[int]:
    """A file descriptor for the length of the block; OSError passes through."""
    descriptor = open_file(path, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """A file descriptor that the caller closes; new files are their owner's only."""
    return os.open(path, flags, mode)


def sync(descriptor: int) -> None:
    """Return when what was written through ``descriptor`` is on the medium."""
    if _FULL_SYNC is not None:
        fcntl.fcntl(descriptor, _FULL_SYNC)
    else:
        os.fdatasync(descriptor)  # the size is data enough; times can wait


def sync_folder(path: Path) -> None:
    """Make created, renamed and removed entries of a folder durable."""
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` bytes, however many system calls that takes."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def truncate(descriptor: int, size_bytes: int) -> None:
    """Cut a file off, or fill it up with zeros."""
    os.ftruncate(descriptor, size_bytes)


def remove(path: Path) -> None:
    """Delete a file, if it is there; durable with the next ``sync_folder``."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def move(source: Path, target: Path) -> None:
    """Put a synced file in another's place, in one step; durable when this returns."""
    os.rename(source, target)
    sync_folder(target.parent)
