"""Digests of checkpoint files, remembered so that opening a model does not read gigabytes again.

A remembered digest counts only while the file's size, modification time (ns) and inode are what they
were. The memory is a small JSON file in the cache folder; losing it costs time, never correctness.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from msa_memory.config import cache_folder
from msa_memory.errors import CheckpointError

__all__ = ["file_digest", "fingerprint_files"]

_MEMORY = "digests.json"
_MOST_ENTRIES = 1000


def file_digest(path: Path, *, cache_dir: Path | None = None) -> str:
    """SHA-256 (hex) of a file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = Path(path).resolve()
    memory = (cache_dir if cache_dir is not None else cache_folder()) / _MEMORY
    try:
        stamp = _stamp(path)
        digests = _load(memory)
        known = digests.get(str(path))
        if known and known[:3] == stamp:
            return str(known[3])
        digest = _sha256(path)
        if _stamp(path) == stamp:
            _save(memory, {**digests, str(path): [*stamp, digest]})
        return digest
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def fingerprint_files(paths: Iterable[Path], *, cache_dir: Path | None = None) -> str:
    """SHA-256 (hex) over the names and contents of files; their order and folders do not matter.

    Raises:
        CheckpointError: a file cannot be read.
    """
    entries = sorted((Path(path).name, file_digest(path, cache_dir=cache_dir)) for path in paths)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _load(memory: Path) -> dict[str, list[int | str]]:
    try:
        value = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _save(memory: Path, digests: dict[str, list[int | str]]) -> None:
    """Best effort: two processes may overwrite each other's news, and a read-only cache is no error."""
    newest = dict(list(digests.items())[-_MOST_ENTRIES:])
    temporary = memory.with_name(f"{_MEMORY}.{uuid.uuid4().hex}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(newest), encoding="utf-8")
        os.replace(temporary, memory)
    except OSError:
        temporary.unlink(missing_ok=True)
