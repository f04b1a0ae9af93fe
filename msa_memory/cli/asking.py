"""Commands that ask a memory: ``ask`` and ``search``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from msa_memory.cli.call import Call
from msa_memory.cli.options import Documents, Where
from msa_memory.cli.output import Output, Stop, one_line
from msa_memory.types import Answer, AnswerChunk, Source

__all__ = ["ask", "search"]

EXCERPT_CHARS = 200


def ask(
    call: Call,
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    k: Annotated[
        int | None, typer.Option("-k", "--k", min=1, metavar="N", help="How many documents to read, at most.")
    ] = None,
    where: Where = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text. Repeatable.")
    ] = None,
) -> None:
    """Answer a question from the memory as it is written, then list the sources (* marks the cited ones)."""
    options: dict[str, Any] = {"k": k, "where": where, "max_new_tokens": max_new_tokens, "stop": stop or None}
    with call.open() as memory, call.out.busy("Thinking") as ready:
        if call.out.json:
            call.out.document(memory.query(question, **options).model_dump(mode="json"))
            return
        answer = _print_pieces(call.out, memory.stream(question, **options), ready)
    if answer.sources:
        call.out.line()
        _print_sources(call.out, answer.sources)


def search(
    call: Call,
    query: Annotated[str, typer.Argument(help="What to look for.")],
    k: Documents = 5,
    where: Where = None,
) -> None:
    """List the documents that match best, without asking the model to answer."""
    with call.open() as memory, call.out.busy("Searching"):
        sources = memory.search(query, k=k, where=where)
    if call.out.json:
        call.out.document({"sources": [source.model_dump(mode="json") for source in sources]})
    elif sources:
        _print_sources(call.out, sources)
    else:
        call.out.note("nothing to search: no document is visible here")


def _print_pieces(out: Output, chunks: Iterator[AnswerChunk], ready: Stop) -> Answer:
    """Print the answer while it comes in; the whole of it."""
    started, answer = False, Answer(text="", found=False)
    for chunk in chunks:
        answer = chunk.answer or answer
        text = chunk.text if started else chunk.text.lstrip()
        if text:
            ready()
            out.piece(text)
            started = True
    ready()
    out.line("" if started else answer.text)
    return answer


def _print_sources(out: Output, sources: Sequence[Source]) -> None:
    rows = [
        (
            "*" if source.cited else "",
            f"{source.score:.3f}",
            source.id,
            source.timestamp.date().isoformat(),
            one_line(source.text, EXCERPT_CHARS),
        )
        for source in sources
    ]
    out.table(["", "score", "id", "date", "text"], rows)
