"""The state blocks of a bank: appended to segment files, read through a memory map, overwritten to erase.

Knows names, offsets and bytes; what a block means is in ``blocks``, which bytes count is in the catalog:
a segment's committed size is the truth, whatever lies beyond it is a crashed write. Bytes inside the
committed size are never cut off or reused, so a mapped reader cannot be surprised.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from msa_memory.errors import StorageError
from msa_memory.persistence.blocks import BlockError, aligned
from msa_memory.persistence.disk import guarded, opened, sync, sync_folder, write_at

__all__ = ["FileSegments", "MemorySegments", "Placed", "SEGMENT_LIMIT_BYTES", "Segments", "Span", "next_name"]

SEGMENT_LIMIT_BYTES = 256 * 1024 * 1024
_ZEROS = bytes(1 << 20)
_NAME = re.compile(r"segment-(\d{8})\.seg")


class Span(NamedTuple):
    """A range of bytes in a segment."""

    segment: str
    offset: int
    length: int


class Placed(NamedTuple):
    """Where a block was appended, and its CRC-32."""

    segment: str
    offset: int
    length: int
    checksum: int


class Segments(Protocol):
    """What a store asks of its segments. Writers hold the writer lock; ``view`` needs none.

    ``sizes`` is always the committed size in bytes of every segment, from the catalog.
    """

    def append(
        self, blocks: Iterable[bytes], sizes: Mapping[str, int], *, fresh: bool = False
    ) -> list[Placed]:
        """Append and fsync; on any failure cut back to ``sizes`` and raise StorageError.

        ``fresh`` starts a new segment even where the newest has room.
        """
        ...

    def view(self, span: Span) -> memoryview:
        """The bytes of a span, read-only where they lie in a file; BlockError if they are not there."""
        ...

    def erase(self, spans: Iterable[Span]) -> None:
        """Overwrite with zeros and fsync; spans of files already removed are skipped."""
        ...

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Remove what lies beyond the committed sizes."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Delete whole segments that no passage refers to."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes each segment occupies now, committed or not."""
        ...

    def close(self) -> None:
        """Release files and maps; views handed out stay valid."""
        ...


def next_name(names: Iterable[str]) -> str:
    """The name after the newest of ``names``; names are never used twice."""
    return f"segment-{max(map(_number, names), default=0) + 1:08d}.seg"


class _Mapped:
    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(self.descriptor).st_size
        self.view = memoryview(mmap.mmap(self.descriptor, size, prot=mmap.PROT_READ) if size else b"")

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class FileSegments:
    """Segments as files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, _Mapped] = {}
        self._mapping = threading.Lock()

    def append(
        self, blocks: Iterable[bytes], sizes: Mapping[str, int], *, fresh: bool = False
    ) -> list[Placed]:
        try:
            with guarded("write states to", self._folder):
                return self._append(blocks, sizes, fresh)
        except BaseException:
            self.cut(sizes)
            raise

    def _append(self, blocks: Iterable[bytes], sizes: Mapping[str, int], fresh: bool) -> list[Placed]:
        placed: list[Placed] = []
        name, end = self._room(sizes, fresh)
        descriptor = -1
        try:
            for block in blocks:
                full = end > 0 and end + len(block) > SEGMENT_LIMIT_BYTES
                if full:
                    name, end = next_name([name, *sizes]), 0
                if full or descriptor < 0:
                    descriptor = self._switch(descriptor, name)
                write_at(descriptor, block, end)
                placed.append(Placed(name, end, len(block), zlib.crc32(block)))
                end = aligned(end + len(block))
        finally:
            self._finish(descriptor)
        if any(place.offset == 0 for place in placed):
            sync_folder(self._folder)
        return placed

    def _room(self, sizes: Mapping[str, int], fresh: bool) -> tuple[str, int]:
        if not sizes:
            return next_name(()), 0
        name = max(sizes, key=_number)
        damaged = self.sizes().get(name, 0) < sizes[name]  # shorter than committed: leave it as it is
        if fresh or damaged:
            return next_name(sizes), 0
        return name, aligned(sizes[name])

    def _switch(self, descriptor: int, name: str) -> int:
        self._finish(descriptor)
        return os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600)

    @staticmethod
    def _finish(descriptor: int) -> None:
        if descriptor >= 0:
            try:
                sync(descriptor)
            finally:
                os.close(descriptor)

    def view(self, span: Span) -> memoryview:
        end = span.offset + span.length
        mapped = self._maps.get(span.segment)
        if mapped is None or end > len(mapped.view):
            mapped = self._map(span.segment)
        size = min(len(mapped.view), os.fstat(mapped.descriptor).st_size)
        if end > size:  # touching a map past the end of its file would kill the process with SIGBUS
            raise BlockError(f"the file ends at byte {size}, the block at {end}")
        return mapped.view[span.offset : end]

    def _map(self, name: str) -> _Mapped:
        _number(name)
        with self._mapping:
            try:
                mapped = self._maps[name] = _Mapped(self._folder / name)
            except OSError as error:
                raise BlockError(f"the file cannot be opened: {error.strerror}") from error
            return mapped

    def erase(self, spans: Iterable[Span]) -> None:
        by_segment: dict[str, list[Span]] = {}
        for span in spans:
            by_segment.setdefault(span.segment, []).append(span)
        for name, group in by_segment.items():
            _number(name)
            path = self._folder / name
            with guarded("erase states in", path):
                try:
                    self._overwrite(path, group)
                except FileNotFoundError:
                    continue

    @staticmethod
    def _overwrite(path: Path, spans: Iterable[Span]) -> None:
        with opened(path, os.O_RDWR) as descriptor:
            size = os.fstat(descriptor).st_size
            for _, offset, length in spans:
                end = min(offset + length, size)
                for start in range(offset, end, len(_ZEROS)):
                    write_at(descriptor, memoryview(_ZEROS)[: end - start], start)
            sync(descriptor)

    def cut(self, sizes: Mapping[str, int]) -> None:
        for name, size in self.sizes().items():
            path = self._folder / name
            with guarded("cut the unfinished end of", path):
                if name not in sizes:
                    path.unlink()
                elif size > sizes[name]:
                    with opened(path, os.O_RDWR) as descriptor:
                        os.ftruncate(descriptor, sizes[name])
                        sync(descriptor)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            _number(name)
            self._maps.pop(name, None)
            with guarded("remove", self._folder / name):
                (self._folder / name).unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        with guarded("list", self._folder):
            try:
                with os.scandir(self._folder) as entries:
                    return {
                        entry.name: entry.stat().st_size for entry in entries if _NAME.fullmatch(entry.name)
                    }
            except FileNotFoundError:
                return {}

    def close(self) -> None:
        self._maps = {}


class MemorySegments:
    """Segments of a bank in memory: every block is an array of its own, nothing touches a disk."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, int], bytearray] = {}

    def append(
        self, blocks: Iterable[bytes], sizes: Mapping[str, int], *, fresh: bool = False
    ) -> list[Placed]:
        name = next_name(sizes) if fresh or not sizes else max(sizes, key=_number)
        end = aligned(sizes.get(name, 0))
        placed: list[Placed] = []
        try:
            for block in blocks:
                self._blocks[name, end] = bytearray(block)
                placed.append(Placed(name, end, len(block), zlib.crc32(block)))
                end = aligned(end + len(block))
        except BaseException:
            self.cut(sizes)
            raise
        return placed

    def view(self, span: Span) -> memoryview:
        try:
            return memoryview(self._blocks[span.segment, span.offset]).toreadonly()
        except KeyError:
            raise BlockError("it is not in memory") from None

    def erase(self, spans: Iterable[Span]) -> None:
        for segment, offset, length in spans:
            block = self._blocks.pop((segment, offset), None)
            if block is not None:
                block[:] = bytes(length)

    def cut(self, sizes: Mapping[str, int]) -> None:
        for segment, offset in [key for key in list(self._blocks) if key[1] >= sizes.get(key[0], 0)]:
            del self._blocks[segment, offset]

    def remove(self, names: Iterable[str]) -> None:
        gone = set(names)
        self._blocks = {key: block for key, block in self._blocks.items() if key[0] not in gone}

    def sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for (name, _), block in list(self._blocks.items()):
            sizes[name] = sizes.get(name, 0) + len(block)
        return sizes

    def close(self) -> None:
        self._blocks = {}


def _number(name: str) -> int:
    match = _NAME.fullmatch(name)
    if match is None:
        raise StorageError(f"{name[:64]!r} is not a segment's name; expected one like 'segment-00000001.seg'")
    return int(match[1])
