"""The count of acknowledged commits and the digest of their chain, kept outside the database and fsynced.

A database can lose its newest commits without noticing (a damaged or deleted write-ahead log). A catalog
behind this counter has lost some; one with another digest at this count has other commits than those
acknowledged; one ahead of it has only crashed between its commit and this file, which is harmless. Two
checksummed slots are written in turn, so a torn write leaves the other one.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import NamedTuple

from msa_memory.errors import CatalogDamagedError
from msa_memory.persistence.disk import guarded, opened, sync, sync_folder, write_at

__all__ = ["Acknowledged", "CommitCounter"]

_SLOT_BYTES = 4096


class Acknowledged(NamedTuple):
    """The newest commit anybody was told of; banks of the first schema recorded no digest."""

    bank_id: str
    generation: int
    digest: bytes | None


class CommitCounter:
    """Reads and writes one counter file; the caller holds the writer lock to write."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def create(self, bank_id: str) -> None:
        """Write generation 0 for a new bank."""
        slot = _encode(Acknowledged(bank_id, 0, None)).ljust(_SLOT_BYTES, b"\0")
        with guarded("create the commit counter", self._path):
            with opened(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as descriptor:
                write_at(descriptor, slot * 2, 0)
                sync(descriptor)
            sync_folder(self._path.parent)

    def read(self) -> Acknowledged | None:
        """The newest acknowledged commit; None without a file; CatalogDamagedError if unreadable."""
        slots = self._slots()
        if slots is None:
            return None
        valid = [slot for slot in slots if slot is not None]
        if not valid:
            raise CatalogDamagedError(
                f"the commit counter {self._path} is damaged: neither of its two slots has a valid checksum; "
                "restore the bank's folder from a backup"
            )
        return max(valid, key=lambda slot: slot.generation)

    def write(self, acknowledged: Acknowledged) -> None:
        """Record a commit as acknowledged; returns when it is on the medium."""
        slots = self._slots() or (None, None)
        ages = [-1 if slot is None else slot.generation for slot in slots]
        with (
            guarded("record an already stored commit in", self._path),
            opened(self._path, os.O_RDWR | os.O_CREAT) as descriptor,
        ):
            write_at(descriptor, _encode(acknowledged), ages.index(min(ages)) * _SLOT_BYTES)
            sync(descriptor)

    def damaged_slots(self) -> int:
        """How many of the two slots fail their checksum; 0 in health, 1 after a torn write."""
        return sum(slot is None for slot in self._slots() or ())

    def _slots(self) -> tuple[Acknowledged | None, Acknowledged | None] | None:
        with guarded("read the commit counter", self._path):
            try:
                with opened(self._path, os.O_RDONLY) as descriptor:
                    data = os.pread(descriptor, 2 * _SLOT_BYTES, 0)
            except FileNotFoundError:
                return None
        return _decode(data[:_SLOT_BYTES]), _decode(data[_SLOT_BYTES:])


def _encode(acknowledged: Acknowledged) -> bytes:
    bank_id, generation, digest = acknowledged
    body = f"msa-memory {bank_id} {generation:020d} {digest.hex() if digest else '-'}"
    return f"{body} {zlib.crc32(body.encode()):08x}\n".encode()


def _decode(slot: bytes) -> Acknowledged | None:
    line = slot.partition(b"\n")[0]
    body, _, checksum = line.rpartition(b" ")
    if checksum != f"{zlib.crc32(body):08x}".encode():
        return None
    _, bank_id, generation, *rest = body.decode().split(" ")
    return Acknowledged(bank_id, int(generation), bytes.fromhex(rest[0]) if rest and rest[0] != "-" else None)
