"""The question/passage files training reads: gzip or plain JSON lines.

A passage line has ``passage_id``, ``text`` and optionally ``title``; a question line has ``question``
and ``passage_ids`` (all passages that hold the answer) or ``passage_id``.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msa_memory.errors import ConfigError

__all__ = ["Passage", "Question", "read_passages", "read_questions", "read_rows"]


@dataclass(frozen=True, slots=True)
class Passage:
    id: str
    text: str
    title: str | None


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    text: str
    gold: tuple[str, ...]
    answers: tuple[str, ...]
    source: str


def read_passages(paths: list[Path]) -> list[Passage]:
    """All passages of the files, in order. Raises ConfigError naming the file and line that is off."""
    return [
        Passage(str(_need(row, "passage_id", where)), str(_need(row, "text", where)), row.get("title"))
        for path in paths
        for where, row in read_rows(path)
    ]


def read_questions(paths: list[Path]) -> list[Question]:
    """All questions of the files, in order. Raises ConfigError naming the file and line that is off."""
    questions = []
    for path in paths:
        for where, row in read_rows(path):
            gold = row.get("passage_ids") or [_need(row, "passage_id", where)]
            questions.append(
                Question(
                    str(row.get("id", where)),
                    str(_need(row, "question", where)),
                    tuple(map(str, gold)),
                    tuple(row.get("answers") or ()),
                    str(row.get("source", path.name)),
                )
            )
    return questions


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a JSON lines file stands (``file:line``) and the row. Raises ConfigError."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path.name}:{number}", json.loads(line)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable as JSON lines: {error}") from error


def _need(row: dict[str, Any], key: str, where: str) -> Any:
    if not row.get(key):
        raise ConfigError(f"{where} has no {key!r}; see msa_memory.engine.train.data for the format")
    return row[key]
