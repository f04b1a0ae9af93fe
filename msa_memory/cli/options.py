"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from msa_memory.errors import InvalidDocumentError

__all__ = ["Documents", "Files", "Meta", "Where", "read_metadata", "read_stdin", "read_where"]


def read_where(text: str) -> dict[str, Any]:
    """A filter given as JSON; wrong usage unless it is an object."""
    try:
        where = json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise typer.BadParameter(f'{text!r} is not JSON ({error}); for example {{"year": 2024}}') from error
    if not isinstance(where, dict):
        raise typer.BadParameter(f'{text!r} is no JSON object; for example {{"year": 2024}}')
    return where


def read_metadata(pairs: Sequence[str] | None) -> dict[str, Any]:
    """``key=value`` pairs; a value that is JSON counts as such (``year=2024``), any other is text."""
    metadata = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--meta")
        metadata[key] = _json_or_text(value)
    return metadata


def read_stdin() -> str:
    """Everything on stdin."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidDocumentError(f"stdin is not UTF-8 text (byte {error.start})") from error


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


Where = Annotated[
    dict[str, Any] | None,
    typer.Option(parser=read_where, metavar="JSON", help='Only documents that match, as {"year": 2024}.'),
]
Meta = Annotated[
    list[str] | None,
    typer.Option("--meta", metavar="KEY=VALUE", help="Metadata; a JSON value counts as such. Repeatable."),
]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--file", "-f", exists=True, help="A file, or a folder with all text files in it. Repeatable."
    ),
]
Documents = Annotated[int, typer.Option("-k", "--k", min=1, metavar="N", help="How many documents, at most.")]
