"""What a command prints: results on stdout, everything else on stderr, stored text made harmless.

Stored text may be hostile: terminal control codes are taken out and nothing is read as rich markup.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Output", "Stop", "clean", "one_line", "readable_size"]

Stop = Callable[[], None]
_GAP = 2  # between two columns of a table
_LAST_COLUMN, _LEAST_LAST_COLUMN = 100, 20  # in a pipe or a file; on the narrowest terminal
# Whole CSI and OSC-like sequences, then every control character that is left. Bidirectional overrides too:
# they make text read as something else.
_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-_]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_HALVES = re.compile(r"[\ud800-\udfff]")


def clean(text: str) -> str:
    """Text that a terminal shows and never obeys; newlines and tabs stay."""
    text = _SEQUENCES.sub("", text.replace("\r\n", "\n"))
    return _HALVES.sub("\N{REPLACEMENT CHARACTER}", _CONTROLS.sub("", text))


def one_line(text: str, most: int | None = None) -> str:
    """``clean`` text on a single line, so that it cannot pose as further rows; cut to ``most`` characters."""
    line = " ".join(clean(text if most is None else text[: 4 * most]).split())
    return line if most is None or len(line) <= most else line[: most - 1].rstrip() + "…"


def readable_size(size_bytes: int) -> str:
    """Bytes as people read them: ``950 B``, ``1.5 MB``."""
    size, units = float(size_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


class Output:
    """Where one run prints. ``json``: results are one JSON document instead of tables and lines."""

    def __init__(self, *, json: bool) -> None:
        self.json = json

    def document(self, value: Any) -> None:
        """The run's one JSON document; plain ASCII, so nothing in it reaches a terminal as a control code."""
        print(json.dumps(value, indent=2, allow_nan=False))

    def line(self, text: str = "") -> None:
        """A line, or lines, of result."""
        print(clean(text))

    def piece(self, text: str) -> None:
        """A piece of a text that is still being written."""
        print(clean(text), end="", flush=True)

    def note(self, text: str) -> None:
        """A line for whoever watches; never part of the result."""
        print(clean(text), file=sys.stderr, flush=True)

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table: its last column is cut to the room left, its ids fold on a narrow terminal only."""
        cells = [[one_line(cell) for cell in row] for row in rows]
        widths = [max(map(cell_len, column)) for column in zip(headings, *cells, strict=True)]
        taken = sum(widths[:-1]) + _GAP * len(widths[:-1])
        width = Console().width if sys.stdout.isatty() else taken + _LAST_COLUMN
        table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
        for heading in headings[:-1]:
            table.add_column(heading, overflow="fold", no_wrap=heading != "id")
        table.add_column(headings[-1], no_wrap=True, max_width=max(_LEAST_LAST_COLUMN, width - taken))
        for row in cells:
            table.add_row(*map(Text, row))
        Console(width=width).print(table)

    def fields(self, rows: Iterable[tuple[str, str]]) -> None:
        """Names and values, one pair a line."""
        shown = [(name, one_line(value)) for name, value in rows]
        width = max((len(name) for name, _ in shown), default=0)
        for name, value in shown:
            print(f"{name:<{width}}  {value}".rstrip())

    @contextmanager
    def busy(self, label: str, *, when: bool = True) -> Iterator[Stop]:
        """A sign of life while the block runs, if stderr is a terminal; call what it gives to end it."""
        if not (when and sys.stderr.isatty()):
            yield lambda: None
            return
        status = Console(stderr=True).status(label)
        with status:
            yield status.stop

    def confirm(self, question: str) -> bool:
        """Ask on stderr; anything but yes, and the end of stdin, is no."""
        print(f"{clean(question)} [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")
