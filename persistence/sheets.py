"""Files with a copy of what the states of many passages say, laid out for routing, to be mapped at opening.

Each covers a range of one segment and says which rows of the catalog it was made of: it counts only while
those are what they were. Nothing is lost with such a file, and none is ever trusted unchecked: its sections
have checksums, verified at first touch. Erasing a byte of a covered range overwrites and removes the whole
file, its first bytes first, so that whoever has it mapped can tell. Knows sections as bytes only.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from msa_memory.errors import StateDamagedError
from msa_memory.persistence.blocks import BlockError
from msa_memory.persistence.disk import guarded, move, opened, remove, sync, sync_folder, write_at

__all__ = ["SheetFiles", "SheetPages", "SheetPlace", "tie"]

SHEET_FORMAT = 1
_MAGIC = b"msasheet"
_PAGE_BYTES = 4096
_HEAD_BYTES = 16  # magic, length of the header, its CRC-32
_NAME = re.compile(r"(segment-\d{8})-(\d{10})-(\d{10})\.sheet")
_UNFINISHED = "sheet"  # one at a time, under the writer lock; a crash leaves it to the next writer
_PIECE_BYTES = 1 << 20
_ZEROS = bytes(_PIECE_BYTES)


class SheetPlace(NamedTuple):
    """The range of a segment that a sheet covers."""

    segment: str
    first: int
    end: int

    @property
    def name(self) -> str:
        """Of the file; two places never share one."""
        return f"{self.segment.removesuffix('.seg')}-{self.first:010d}-{self.end:010d}.sheet"

    def overlaps(self, segment: str, offset: int, length: int) -> bool:
        """Whether a span of a segment touches this range."""
        return self.segment == segment and offset < self.end and offset + length > self.first


def tie(bank_id: str, fingerprint: str, rows: Iterable[Sequence[Any]]) -> str:
    """What a sheet made of these rows of the catalog, in this order, is known by."""
    digest = hashlib.sha256(f"{SHEET_FORMAT} {bank_id} {fingerprint}\n".encode())
    digest.update(repr([tuple(row) for row in rows]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


class SheetPages:
    """One sheet's file, mapped: pages that are not read take no memory. BlockError for what is no sheet."""

    def __init__(self, path: Path) -> None:
        try:
            with opened(path, os.O_RDONLY) as descriptor:
                size = os.fstat(descriptor).st_size
                self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise BlockError(f"the file cannot be mapped: {error}") from error
        self.path = path
        header = self._header()
        try:
            self.tie = str(header["tie"])
            self.numbers = tuple(map(int, header["numbers"]))
            self._sections = {str(name): tuple(map(int, place)) for name, place in header["sections"].items()}
            complete = all(
                0 <= start <= start + length <= size for start, length, _ in self._sections.values()
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BlockError("its header is not a sheet's") from error
        if not complete:
            raise BlockError(f"the file ends at byte {size}, within a section")
        self._verified: set[str] = set()

    def _header(self) -> dict[str, Any]:
        head = self._map[:_HEAD_BYTES]
        length, checksum = (int.from_bytes(head[at : at + 4], "little") for at in (8, 12))
        data = self._map[_HEAD_BYTES : _HEAD_BYTES + length]
        if head[:8] != _MAGIC or zlib.crc32(data) != checksum:
            raise BlockError("its header is damaged")
        header = json.loads(data)
        return header if isinstance(header, dict) else {}

    @property
    def names(self) -> tuple[str, ...]:
        """The sections."""
        return tuple(self._sections)

    def section(self, name: str) -> memoryview:
        """The bytes of a section, as they are on disk; StateDamagedError if they are not what was written."""
        if name not in self._sections:
            raise StateDamagedError(f"the sheet {self.path.name} has no section {name!r}")
        start, length, checksum = self._sections[name]
        data = memoryview(self._map)[start : start + length]
        if name not in self._verified:
            if zlib.crc32(data) != checksum:
                raise StateDamagedError(
                    f"section {name!r} of {self.path.name} is damaged; its passages are read one by one "
                    "until it is made anew"
                )
            self._verified.add(name)
        return data

    def intact(self) -> bool:
        """Whether nothing was erased since; asked after reading, it speaks for all that was read."""
        return self._map[:8] == _MAGIC

    def close(self) -> None:
        """Nothing: the file is erased with the states, and the mapping ends with its last reader."""

    def nbytes(self) -> int:
        """Bytes of memory that are this process's own: none."""
        return 0


class SheetFiles:
    """The sheets of one folder of segments. Writers hold the writer lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def places(self) -> list[SheetPlace]:
        """All sheets there are, sound or not."""
        with guarded("list", self._folder):
            try:
                found = [_NAME.fullmatch(name) for name in os.listdir(self._folder)]
            except FileNotFoundError:
                return []
        return sorted(
            SheetPlace(f"{match[1]}.seg", int(match[2]), int(match[3]))
            for match in found
            if match is not None
        )

    def open(self, place: SheetPlace) -> SheetPages:
        """A sheet's pages; BlockError if they are none."""
        return SheetPages(self._folder / place.name)

    def erased(self, place: SheetPlace) -> bool:
        """Whether a sheet is gone, or was on its way out when a write was interrupted."""
        try:
            with opened(self._folder / place.name, os.O_RDONLY) as descriptor:
                return os.pread(descriptor, len(_MAGIC), 0) == bytes(len(_MAGIC))
        except FileNotFoundError:
            return True

    def write(
        self, place: SheetPlace, known_by: str, numbers: Sequence[int], sections: Mapping[str, bytes]
    ) -> SheetPages:
        """Write a sheet, in the place of one that covers the same range; durable when this returns."""
        self.drop([place])
        unfinished, target = self._folder / _UNFINISHED, self._folder / place.name
        with guarded("write the sheet", target):
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
            with opened(unfinished, flags) as descriptor:
                for start, data in _laid_out(known_by, numbers, sections):
                    write_at(descriptor, data, start)
                sync(descriptor)
            move(unfinished, target)
        return SheetPages(target)

    def drop(self, places: Iterable[SheetPlace]) -> None:
        """Overwrite and remove sheets, durably; those that are not there are skipped."""
        self._drop(place.name for place in places)

    def drop_unfinished(self) -> None:
        """What a crash left of writing one."""
        self._drop([_UNFINISHED])

    def _drop(self, names: Iterable[str]) -> None:
        gone = False
        for name in names:
            path = self._folder / name
            with guarded("remove", path), suppress(FileNotFoundError):
                if path.stat().st_nlink == 1:
                    _zero(path)
                remove(path)
                gone = True
        if gone:
            with guarded("remove files from", self._folder):
                sync_folder(self._folder)


def _laid_out(
    known_by: str, numbers: Sequence[int], sections: Mapping[str, bytes]
) -> list[tuple[int, bytes]]:
    """Where in the file the header and each section go; sections start on pages of their own."""
    sums = {name: (len(data), zlib.crc32(data)) for name, data in sections.items()}

    def head(base: int) -> tuple[bytes, dict[str, int]]:
        places, starts, end = {}, {}, base
        for name, (length, checksum) in sums.items():
            places[name], starts[name] = (end, length, checksum), end
            end += _paged(length)
        header = {"tie": known_by, "numbers": list(numbers), "sections": places}
        data = json.dumps(header, separators=(",", ":")).encode()
        checksum = zlib.crc32(data)
        return _MAGIC + len(data).to_bytes(4, "little") + checksum.to_bytes(4, "little") + data, starts

    base = _paged(len(head(0)[0]) + _PAGE_BYTES)  # the starts take more digits than zeros do
    header, starts = head(base)
    return [(0, header), *((starts[name], data) for name, data in sections.items())]


def _paged(size_bytes: int) -> int:
    return -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES


def _zero(path: Path) -> None:
    """Zeros over a whole file, from its first byte on, synced."""
    with opened(path, os.O_RDWR) as descriptor:
        size = os.fstat(descriptor).st_size
        for start in range(0, size, len(_ZEROS)):
            write_at(descriptor, memoryview(_ZEROS)[: size - start], start)
        sync(descriptor)
