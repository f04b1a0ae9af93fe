"""The state blocks of a bank: appended to segment files, read by position, overwritten to erase.

Knows names, offsets and bytes; what a block means is in ``blocks``, which bytes count is in the catalog:
a segment's committed size is the truth, whatever lies beyond it is a crashed write. Bytes inside the
committed size are never moved or reused. A file with a second hard link (a fork's) is never written:
appending goes to a new segment, and erasing first gives this bank a file of its own. Sheets that cover
bytes which go (``sheets``) go first.
"""

from __future__ import annotations

import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from msa_memory.errors import StorageError
from msa_memory.persistence.blocks import BlockError, aligned
from msa_memory.persistence.disk import (
    guarded,
    move,
    open_file,
    opened,
    remove,
    sync,
    sync_folder,
    truncate,
    write_at,
)
from msa_memory.persistence.sheets import SheetFiles, SheetPlace

__all__ = ["FileSegments", "MemorySegments", "Placed", "SEGMENT_LIMIT_BYTES", "Segments", "Span", "next_name"]

SEGMENT_LIMIT_BYTES = 256 * 1024 * 1024
_PIECE_BYTES = 1 << 20
_ZEROS = bytes(_PIECE_BYTES)
_NAME = re.compile(r"segment-(\d{8})\.seg")
_COPY = "copy"  # one at a time, under the writer lock; a crash leaves it to the next one


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
    """What a store asks of its segments. Writers hold the writer lock; ``read`` needs none.

    ``sizes`` is always the committed size in bytes of every segment, from the catalog.
    """

    sheets: SheetFiles | None
    """Copies of what blocks say, which go with the blocks; None where there are no files."""

    def append(
        self, blocks: Iterable[bytes], sizes: Mapping[str, int], *, fresh: bool = False
    ) -> list[Placed]:
        """Append and fsync; on any failure cut back to ``sizes`` and raise StorageError.

        ``fresh`` starts a new segment even where the newest has room.
        """
        ...

    def read(self, span: Span) -> bytes:
        """The bytes of a span as they are now; BlockError if they are not there."""
        ...

    def erase(self, spans: Iterable[Span]) -> None:
        """Overwrite with zeros and fsync; spans of files already removed are skipped."""
        ...

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Remove what lies beyond the committed sizes."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Overwrite and delete whole segments that no passage refers to."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes each segment occupies now, committed or not."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


def next_name(names: Iterable[str]) -> str:
    """The name after the newest of ``names``; names are never used twice."""
    return f"segment-{max(map(_number, names), default=0) + 1:08d}.seg"


class _Open:
    """A descriptor that closes when its last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class FileSegments:
    """Segments as files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.sheets: SheetFiles | None = SheetFiles(folder)
        self._open: dict[str, _Open] = {}
        self._opening = threading.Lock()

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
        shared = self._is_shared(self._folder / name)
        damaged = self.sizes().get(name, 0) < sizes[name]  # shorter than committed: leave it as it is
        if fresh or shared or damaged:
            return next_name(sizes), 0
        return name, aligned(sizes[name])

    def _switch(self, descriptor: int, name: str) -> int:
        self._finish(descriptor)
        return open_file(self._folder / name, os.O_RDWR | os.O_CREAT)

    @staticmethod
    def _finish(descriptor: int) -> None:
        if descriptor >= 0:
            try:
                sync(descriptor)
            finally:
                os.close(descriptor)

    def read(self, span: Span) -> bytes:
        _number(span.segment)
        data = b""
        for again in (False, True):  # the file may have been replaced by a copy since it was opened
            data = self._read(self._reader(span.segment, again), span)
            if len(data) == span.length:
                return data
        raise BlockError(f"the file ends at byte {span.offset + len(data)} or before, the block at "
                         f"{span.offset + span.length}")  # fmt: skip

    @staticmethod
    def _read(file: _Open, span: Span) -> bytes:
        try:
            end = os.fstat(file.descriptor).st_size
            return os.pread(file.descriptor, max(min(span.length, end - span.offset), 0), span.offset)
        except OSError as error:
            raise BlockError(f"the file cannot be read: {error.strerror}") from error

    def _reader(self, name: str, again: bool) -> _Open:
        file = None if again else self._open.get(name)
        if file is not None:
            return file
        with self._opening:
            try:
                file = self._open[name] = _Open(self._folder / name)
            except OSError as error:
                raise BlockError(f"the file cannot be opened: {error.strerror}") from error
            return file

    def erase(self, spans: Iterable[Span]) -> None:
        by_segment: dict[str, list[Span]] = {}
        for span in spans:
            by_segment.setdefault(span.segment, []).append(span)
        self._drop_sheets(
            lambda place: any(place.overlaps(*span) for span in by_segment.get(place.segment, ()))
        )
        for name, group in by_segment.items():
            _number(name)
            path = self._folder / name
            with guarded("erase states in", path), suppress(FileNotFoundError):
                self._own(path)
                _overwrite(path, group)

    def cut(self, sizes: Mapping[str, int]) -> None:
        found = self.sizes()
        self.remove(name for name in found if name not in sizes)
        self._drop_copy()
        self._drop_sheets(lambda place: place.end > sizes.get(place.segment, 0))
        for name, size in found.items():
            path = self._folder / name
            with guarded("cut the unfinished end of", path):
                if size > sizes.get(name, size):
                    self._own(path)
                    with opened(path, os.O_RDWR) as descriptor:
                        truncate(descriptor, sizes[name])
                        sync(descriptor)

    def _drop_copy(self) -> None:
        """What a crash left of making a file this bank's own."""
        copy = self._folder / _COPY
        with guarded("remove", copy), suppress(FileNotFoundError):
            _overwrite(copy, [Span(_COPY, 0, copy.stat().st_size)])
            remove(copy)
        if self.sheets is not None:
            self.sheets.drop_unfinished()

    def _drop_sheets(self, chosen: Callable[[SheetPlace], bool]) -> None:
        if self.sheets is not None:
            self.sheets.drop([place for place in self.sheets.places() if chosen(place)])

    def remove(self, names: Iterable[str]) -> None:
        names, gone = set(names), False
        self._drop_sheets(lambda place: place.segment in names)
        for name in sorted(names):
            _number(name)
            self._open.pop(name, None)
            path = self._folder / name
            with guarded("remove", path), suppress(FileNotFoundError):
                if not self._is_shared(path):
                    _overwrite(path, [Span(name, 0, path.stat().st_size)])
                remove(path)
                gone = True
        if gone:
            with guarded("remove files from", self._folder):
                sync_folder(self._folder)

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
        self._open = {}

    @staticmethod
    def _is_shared(path: Path) -> bool:
        try:
            return path.stat().st_nlink > 1
        except FileNotFoundError:
            return False

    def _own(self, path: Path) -> None:
        """Put a copy in the place of a file that another bank holds too."""
        if not self._is_shared(path):
            return
        copy = path.with_name(_COPY)
        with opened(path, os.O_RDONLY) as source, opened(copy, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as target:
            offset = 0
            while piece := os.pread(source, _PIECE_BYTES, offset):
                write_at(target, piece, offset)
                offset += len(piece)
            sync(target)
        move(copy, path)
        self._open.pop(path.name, None)


class MemorySegments:
    """Segments of a bank in memory: every block is an array of its own, nothing touches a disk."""

    def __init__(self) -> None:
        self.sheets: SheetFiles | None = None
        self._blocks: dict[tuple[str, int], bytearray] = {}

    def append(
        self, blocks: Iterable[bytes], sizes: Mapping[str, int], *, fresh: bool = False
    ) -> list[Placed]:
        name = next_name(sizes) if fresh or not sizes else max(sizes, key=_number)
        end = 0 if name not in sizes else aligned(sizes[name])
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

    def read(self, span: Span) -> bytes:
        try:
            return bytes(self._blocks[span.segment, span.offset])
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


def _overwrite(path: Path, spans: Iterable[Span]) -> None:
    """Zeros over spans of a file, as far as it reaches."""
    with opened(path, os.O_RDWR) as descriptor:
        size = os.fstat(descriptor).st_size
        for _, offset, length in spans:
            end = min(offset + length, size)
            for start in range(offset, end, len(_ZEROS)):
                write_at(descriptor, memoryview(_ZEROS)[: end - start], start)
        sync(descriptor)


def _number(name: str) -> int:
    match = _NAME.fullmatch(name)
    if match is None:
        raise StorageError(f"{name[:64]!r} is not a segment's name; expected one like 'segment-00000001.seg'")
    return int(match[1])
