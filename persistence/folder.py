"""The folder of a bank on disk: what lies where, and whether a folder is a bank at all.

Creates folders and empty files; knows no SQL and no block.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from msa_memory.errors import ConfigError, StorageError
from msa_memory.persistence.disk import guarded, opened, sync_folder

__all__ = ["BankFolder", "CATALOG", "COMMIT", "LOCK", "SEAL", "STATES", "state_folder"]

CATALOG, COMMIT, LOCK, SEAL, STATES = "catalog.sqlite3", "commit", "lock", "seal", "states"


class BankFolder:
    """Paths of one bank; ``state_root`` is where states and commit counter lie, if elsewhere."""

    def __init__(self, root: Path, state_root: Path | None = None) -> None:
        self.root = root
        self.catalog = root / CATALOG
        self.lock = root / LOCK
        self.seal = root / SEAL
        self.commit = (state_root or root) / COMMIT
        self.states = (state_root or root) / STATES

    def holds_states(self) -> bool:
        """Whether any segment file has bytes in it."""
        with guarded("list", self.states):
            return self.states.is_dir() and any(
                file.stat().st_size for file in self.states.glob("segment-*.seg")
            )

    def check(self) -> None:
        """StorageError if the path is a file or a folder with other content than a bank's."""
        with guarded("look into", self.root):
            if not self.root.exists():
                return
            if not self.root.is_dir():
                raise StorageError(f"{self.root} is a file; expected a folder for the bank")
            names = sorted(entry.name for entry in self.root.iterdir())
        if names and not {CATALOG, COMMIT}.intersection(names) and not self._is_unfinished(set(names)):
            raise StorageError(
                f"{self.root} is not a bank: it holds {names[:5]} and no {CATALOG}; "
                "give an empty or new folder"
            )

    def _is_unfinished(self, names: set[str]) -> bool:
        """Whether a crash during creation, or a lost catalog, explains what is there."""
        return names <= {LOCK, SEAL, STATES} and all(
            file.name.startswith("segment-")
            for file in (self.states.iterdir() if self.states.is_dir() else ())
        )

    def create(self) -> None:
        """Make the folders, open to their owner only."""
        for folder in dict.fromkeys((self.root, self.states.parent, self.states)):
            with guarded("create the folder", folder):
                if not folder.exists():
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    folder.mkdir(mode=0o700, exist_ok=True)
                    sync_folder(folder.parent)

    def create_catalog(self) -> None:
        """Make an empty database file that only its owner may read."""
        with guarded("create", self.catalog):
            with opened(self.catalog, os.O_RDWR | os.O_CREAT):
                pass
            sync_folder(self.root)


def state_folder(url: str | None) -> Path | None:
    """The local folder a ``state_url`` names; ConfigError for anything else."""
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    if parts.scheme or not url:
        raise ConfigError(
            f"state_url {url[:80]!r} is not supported; expected a local folder or a file:// URL"
        )
    return Path(url)
