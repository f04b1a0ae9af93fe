"""Files and folders as documents to add: what is text gets read, what is not is named with the reason.

Knows the file system; opens no memory.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msa_memory.config import MemoryConfig
from msa_memory.documents import read_item
from msa_memory.errors import MSAError

__all__ = ["FileReader", "Skipped"]

_HEADING = re.compile(r"\s*#[ \t]+(\S[^\n]*)")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or folder that is not added, and why."""

    path: str
    reason: str


class FileReader:
    """Collects ``found``, ready for ``add_many``, and ``skipped``.

    A document's id is its path relative to the current folder; a file outside of it goes by its path relative
    to where the named folder or file lies. Inside a folder, hidden entries and symbolic links are skipped.
    """

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.skipped: list[Skipped] = []

    def read(self, named: Path) -> None:
        """Read a file, or every file below a folder in the order of their names."""
        named = Path(os.path.abspath(named.expanduser()))
        here = Path.cwd()
        base = here if named.is_relative_to(here) else named.parent
        if not named.is_dir():
            self._read_file(named, base)
            return
        for path in self._below(named, base):
            self._read_file(path, base)

    def _below(self, folder: Path, base: Path) -> list[Path]:
        files = []
        for place, folders, names in os.walk(folder, onerror=lambda error: self._refused(error, base)):
            seen = self._visible(Path(place), [*folders, *names], base)
            folders[:] = sorted(set(folders) & seen)
            files += [Path(place, name) for name in sorted(set(names) & seen)]
        return files

    def _visible(self, place: Path, names: list[str], base: Path) -> set[str]:
        reasons = {name: "hidden" for name in names if name.startswith(".")}
        reasons |= {name: "symbolic link" for name in names if (place / name).is_symlink()}
        for name in sorted(reasons):
            self._skip(place / name, base, reasons[name])
        return set(names) - set(reasons)

    def _read_file(self, path: Path, base: Path) -> None:
        try:
            text = _read_text(path)
            item = {
                "content": text,
                "id": path.relative_to(base).as_posix(),
                "metadata": {"path": path.relative_to(base).as_posix(), "title": _title(path, text)},
            }
            read_item(
                item, MemoryConfig()
            )  # the checks of add: one empty file is no reason to refuse the rest
        except (OSError, ValueError, MSAError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            self._skip(path, base, reason or str(error))
        else:
            self.found.append(item)

    def _refused(self, error: OSError, base: Path) -> None:
        self._skip(Path(error.filename), base, error.strerror or str(error))

    def _skip(self, path: Path, base: Path, reason: str) -> None:
        self.skipped.append(Skipped(path.relative_to(base).as_posix(), reason))


def _read_text(path: Path) -> str:
    """The file's text; ValueError says what it is instead."""
    if not path.is_file():
        raise ValueError("not a regular file")
    most = 4 * MemoryConfig().max_document_chars  # UTF-8 takes at most 4 bytes per character
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most:,} bytes")
    if b"\x00" in data:
        raise ValueError("not text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error


def _title(path: Path, text: str) -> str:
    """A Markdown file's first heading if it starts with one, else the file's name."""
    heading = _HEADING.match(text) if path.suffix.lower() in (".md", ".markdown") else None
    return heading[1].strip() if heading else path.stem
