"""States of passages that were encoded but not stored yet, set aside on disk so that they need no memory.

A file without a name in the bank's folder: it is gone with its process, however that ends. Knows blocks as
bytes only.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import IO

from msa_memory.errors import StorageError
from msa_memory.persistence.disk import guarded, truncate, write_at
from msa_memory.persistence.records import StagedStates

__all__ = ["Spool"]


class Spool:
    """Blocks put in by any thread and taken out once each, in a file of ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()
        self._end = 0
        self._waiting: set[StagedStates] = set()

    def put(self, number: int, block: bytes) -> StagedStates:
        """Set the block of passage ``number`` aside."""
        with self._lock, guarded("set states aside in", self._folder):
            if self._file is None:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115, closed by close()
            staged = StagedStates(number, self._end, len(block))
            write_at(self._file.fileno(), block, staged.offset)
            self._end += len(block)
            self._waiting.add(staged)
            return staged

    def read(self, staged: StagedStates) -> bytes:
        """A block as it was put; StorageError for one that is not here or was taken."""
        with self._lock, guarded("read states set aside in", self._folder):
            if self._file is None or staged not in self._waiting:
                raise StorageError(
                    f"the staged states of passage {staged.number} are not here; add a document to the "
                    "memory that staged it, once"
                )
            return os.pread(self._file.fileno(), staged.length, staged.offset)

    def drop(self, staged: StagedStates) -> None:
        """Let go of a block; the file shrinks when none is left."""
        with self._lock:
            self._waiting.discard(staged)
            if self._file is not None and not self._waiting:
                with guarded("empty", self._folder):
                    truncate(self._file.fileno(), 0)
                self._end = 0

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file, self._waiting, self._end = None, set(), 0
