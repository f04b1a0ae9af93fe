"""The command that makes a page to look at: ``inspect``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from msa_memory.cli.call import Call
from msa_memory.cli.options import Where
from msa_memory.cli.output import readable_size

__all__ = ["inspect"]


def inspect(
    call: Call,
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="The memory's folder; else as --memory says.")
    ] = None,
    question: Annotated[
        str | None,
        typer.Option("--question", "-q", metavar="TEXT", help="Answer this, and show how it went."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="The page to write.")
    ] = Path("memory.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    k: Annotated[
        int | None, typer.Option("-k", "--k", min=1, metavar="N", help="How many documents to read, at most.")
    ] = None,
    where: Where = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Documents on the page, at most.")] = 2000,
) -> None:
    """Write one HTML page that shows what the memory holds and, for a question, what its routers saw."""
    from msa_memory.inspection import look, render, write_page

    if folder is not None:
        call = replace(call, folder=folder.expanduser())
    with call.open() as memory, call.out.busy("Looking"):
        findings = look(memory, question, where=where, k=k, limit=limit)
    size = write_page(output, render(findings, name=call.folder.resolve().name), overwrite=overwrite)
    shown = len(findings.documents)
    if call.out.json:
        left_out = findings.documents_left_out
        call.out.document({"path": str(output), "size_bytes": size, "documents": shown, "left_out": left_out})
        return
    call.out.line(
        f"wrote {output} ({readable_size(size)}): the texts of {shown:,} documents, readable by you only"
    )
    if findings.documents_left_out:
        call.out.note(f"{findings.documents_left_out:,} older documents are left out; --limit takes more")
