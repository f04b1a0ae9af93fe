"""``Journal``: every single result of an evaluation, one JSON line each; a run that was killed goes on.

The first line says what was asked of whom. A file made with other settings is refused, never mixed in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self

from msa_memory.errors import ConfigError

__all__ = ["Journal", "Row"]

Row = dict[str, Any]
_Given = ParamSpec("_Given")


class Journal:
    """Results by key, in a file or, without a path, in memory only.

    Args:
        settings: whatever must be the same for results to belong together (model, seed, files).
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._rows: dict[str, Row] = {}
        self._file = None
        if path is None:
            return
        header = json.loads(json.dumps({"settings": dict(settings)}))
        lines = _whole_lines(path)
        if lines and lines[0] != header:
            raise ConfigError(
                f"{path} holds the results of another run ({json.dumps(lines[0])[:200]}); expected "
                f"{json.dumps(header)}: name another file with --log, or delete it"
            )
        for line in lines[1:]:
            self._rows[line["key"]] = line["result"]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        if not lines:
            self._write(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, key: object) -> bool:
        """Whether there is a result under ``key``."""
        return key in self._rows

    def once(self, key: str, work: Callable[_Given, Row], *given: _Given.args, **named: _Given.kwargs) -> Row:
        """The result under ``key``: the kept one, or that of doing the work."""
        if key not in self._rows:
            result = json.loads(json.dumps(work(*given, **named)))
            self._write({"key": key, "result": result})
            self._rows[key] = result
        return self._rows[key]

    def _write(self, line: Row) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()


def _whole_lines(path: Path) -> list[Row]:
    """The file's lines; one that a killed run left unfinished is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    try:
        lines = [json.loads(line) for line in data[:end].splitlines()]
        if not all(isinstance(line, dict) and line.keys() >= {"key", "result"} for line in lines[1:]):
            raise ValueError("a line is no result")
    except ValueError as error:
        raise ConfigError(f"{path} is no journal of an evaluation: {error}; name another file") from error
    if end < len(data):
        os.truncate(path, end)
    return lines
