"""The checksum of a catalog file as it was when its bank was last closed.

SQLite has no checksums of pages: a flipped bit in an index would hide a document without an error. A file
that fits its seal needs no further check. One that does not may have been written by a process that did
not come to close it, and is then checked row by row; so a missing or outdated seal does no harm.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from msa_memory.persistence.disk import guarded, opened, write_at

__all__ = ["CHECKED_BYTES", "fits_seal", "write_seal"]

CHECKED_BYTES = 1 << 30
"""Larger catalogs have no seal; ``verify`` checks them."""

_PIECE_BYTES = 1 << 20
_LINE_BYTES = 64


def write_seal(seal: Path, catalog: Path) -> None:
    """Record the checksum of a catalog that nobody writes to."""
    with guarded("seal", catalog):
        if catalog.stat().st_size <= CHECKED_BYTES:
            with opened(seal, os.O_RDWR | os.O_CREAT) as descriptor:
                write_at(descriptor, _line(catalog), 0)


def fits_seal(seal: Path, catalog: Path) -> bool:
    """Whether the catalog is what was sealed, with nothing in its write-ahead log."""
    with guarded("check the seal of", catalog):
        try:
            if catalog.with_name(f"{catalog.name}-wal").stat().st_size:
                return False
        except FileNotFoundError:
            pass
        try:
            with opened(seal, os.O_RDONLY) as descriptor:
                return os.pread(descriptor, _LINE_BYTES, 0) == _line(catalog)
        except FileNotFoundError:
            return False


def _line(catalog: Path) -> bytes:
    checksum, size = 0, 0
    with opened(catalog, os.O_RDONLY) as descriptor:
        while piece := os.pread(descriptor, _PIECE_BYTES, size):
            checksum, size = zlib.crc32(piece, checksum), size + len(piece)
    return f"msa-memory seal {size:020d} {checksum:08x}\n".encode().ljust(_LINE_BYTES, b" ")
