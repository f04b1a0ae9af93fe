"""A progress bar on the terminal, or the caller's own function; nothing where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "progress_reporter"]

Progress = Callable[[int], None]


@contextmanager
def progress_reporter(
    progress: bool | Callable[[int, int], None] | None, total: int, label: str = "Remembering"
) -> Iterator[Progress]:
    """A function of the number done: draws a bar, calls ``progress(done, total)`` or does nothing.

    ``progress`` None draws a bar when stderr is a terminal and there is more than one item.
    """
    if callable(progress):
        report = progress
        yield lambda done: report(done, total)
        return
    if progress is False or (progress is None and (total < 2 or not sys.stderr.isatty())):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
