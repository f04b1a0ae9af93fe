"""Commands that look after a memory as a whole: ``verify``, ``compact``."""

from __future__ import annotations

from typing import Annotated

import typer

from msa_memory.cli.call import Call
from msa_memory.cli.output import one_line, readable_size

__all__ = ["compact", "verify"]


def verify(
    call: Call,
    repair: Annotated[
        bool, typer.Option("--repair", help="Encode damaged states anew from the kept text.")
    ] = False,
) -> None:
    """Check every stored byte; exit code 1 if anything is damaged, or still is after a repair."""
    with call.open_for_changes() if repair else call.open() as memory, call.out.busy("Checking"):
        found = memory.verify()
        problems = memory.verify(repair=True) if repair and found else found
    repaired = [line for line in found if line not in problems]
    if call.out.json:
        extra = {"repaired": repaired} if repair else {}
        call.out.document({"sound": not problems, "problems": list(problems), **extra})
    else:
        for line in (*(f"repaired: {line}" for line in repaired), *(problems or ("the memory is sound",))):
            call.out.line(one_line(line))
    if problems:
        raise typer.Exit(1)


def compact(call: Call) -> None:
    """Erase what has expired and free the space that forgetting left."""
    with call.open_for_changes() as memory, call.out.busy("Compacting"):
        freed = memory.compact()
    if call.out.json:
        call.out.document({"bytes_freed": freed})
    else:
        call.out.line(f"freed {readable_size(max(freed, 0))}")
