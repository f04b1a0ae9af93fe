"""The count of acknowledged commits, kept outside the database and fsynced.

A database can lose its newest commits without noticing (a damaged or deleted write-ahead log). A catalog
behind this counter has lost some; a catalog ahead of it has only crashed between its commit and this
file, which is harmless. Two checksummed slots are written in turn, so a torn write leaves the other one.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from msa_memory.errors import CatalogDamagedError
from msa_memory.persistence.disk import guarded, opened, sync, sync_folder, write_at

__all__ = ["CommitCounter"]

_SLOT_BYTES = 4096


class CommitCounter:
    """Reads and writes one counter file; the caller holds the writer lock to write."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def create(self, bank_id: str) -> None:
        """Write generation 0 for a new bank."""
        slot = _encode(bank_id, 0).ljust(_SLOT_BYTES, b"\0")
        with guarded("create the commit counter", self._path):
            with opened(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as descriptor:
                write_at(descriptor, slot * 2, 0)
                sync(descriptor)
            sync_folder(self._path.parent)

    def read(self) -> tuple[str, int] | None:
        """Bank id and acknowledged generation; None without a file; CatalogDamagedError if unreadable."""
        slots = self._slots()
        if slots is None:
            return None
        valid = [slot for slot in slots if slot is not None]
        if not valid:
            raise CatalogDamagedError(
                f"the commit counter {self._path} is damaged: neither of its two slots has a valid checksum; "
                "restore the bank's folder from a backup"
            )
        return max(valid, key=lambda slot: slot[1])

    def write(self, bank_id: str, generation: int) -> None:
        """Record ``generation`` as acknowledged; returns when it is on the medium."""
        slots = self._slots() or (None, None)
        ages = [-1 if slot is None else slot[1] for slot in slots]
        with (
            guarded("record an already stored commit in", self._path),
            opened(self._path, os.O_RDWR | os.O_CREAT) as descriptor,
        ):
            write_at(descriptor, _encode(bank_id, generation), ages.index(min(ages)) * _SLOT_BYTES)
            sync(descriptor)

    def damaged_slots(self) -> int:
        """How many of the two slots fail their checksum; 0 in health, 1 after a torn write."""
        return sum(slot is None for slot in self._slots() or ())

    def _slots(self) -> tuple[tuple[str, int] | None, tuple[str, int] | None] | None:
        with guarded("read the commit counter", self._path):
            try:
                with opened(self._path, os.O_RDONLY) as descriptor:
                    data = os.pread(descriptor, 2 * _SLOT_BYTES, 0)
            except FileNotFoundError:
                return None
        return _decode(data[:_SLOT_BYTES]), _decode(data[_SLOT_BYTES:])


def _encode(bank_id: str, generation: int) -> bytes:
    body = f"msa-memory {bank_id} {generation:020d}"
    return f"{body} {zlib.crc32(body.encode()):08x}\n".encode()


def _decode(slot: bytes) -> tuple[str, int] | None:
    line = slot.partition(b"\n")[0]
    body, _, checksum = line.rpartition(b" ")
    if checksum != f"{zlib.crc32(body):08x}".encode():
        return None
    _, bank_id, generation = body.decode().split(" ")
    return bank_id, int(generation)
