"""Commands that show what a memory holds: ``list``, ``show``, ``history``, ``sessions``, ``stats``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from msa_memory.cli.call import Call
from msa_memory.cli.options import Where
from msa_memory.cli.output import Output, one_line, readable_size
from msa_memory.types import Document, DocumentVersion, Message, Stats

__all__ = ["history", "list_documents", "sessions", "show", "stats"]

EXCERPT_CHARS = 200


def list_documents(
    call: Call,
    where: Where = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Documents on a page.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the page before this one ended.")] = None,
) -> None:
    """List documents, newest first, a page at a time."""
    with call.open() as memory:
        page = memory.list(where, limit=limit, cursor=cursor)
    if call.out.json:
        call.out.document(page.model_dump(mode="json"))
        return
    rows = [
        (document.id, document.timestamp.date().isoformat(), str(document.tokens), _summary(document))
        for document in page
    ]
    if rows:
        call.out.table(["id", "date", "tokens", "text"], rows)
    else:
        call.out.note("no documents")
    if page.next_cursor:
        call.out.note(f"there are more: repeat with --cursor {page.next_cursor}")


def show(
    call: Call,
    id: Annotated[str, typer.Argument(help="The document's id.")],
    history: Annotated[bool, typer.Option("--history", help="List its versions too, oldest first.")] = False,
) -> None:
    """Show a document: its text, its metadata and, if asked, its versions."""
    with call.open() as memory:
        document = memory.get(id)
        versions = memory.history(id) if history else ()
    if call.out.json:
        extra = {"history": [version.model_dump(mode="json") for version in versions]} if history else {}
        call.out.document({**document.model_dump(mode="json"), **extra})
        return
    call.out.fields(_document_fields(document))
    call.out.line(f"\n{document.text}")
    if history:
        call.out.line()
        _print_history(call.out, versions)


def history(call: Call, id: Annotated[str, typer.Argument(help="The document's id.")]) -> None:
    """List a document's versions, oldest first; restore brings one back."""
    with call.open() as memory:
        versions = memory.history(id)
    if call.out.json:
        call.out.document([version.model_dump(mode="json") for version in versions])
    else:
        _print_history(call.out, versions)


def sessions(
    call: Call,
    id: Annotated[str | None, typer.Argument(help="A session, to print its messages.")] = None,
) -> None:
    """List the sessions, oldest first, or print one's messages."""
    with call.open() as memory:
        names = memory.sessions() if id is None else []
        messages = memory.session(id).messages() if id is not None else []
    if call.out.json:
        call.out.document(names if id is None else [message.model_dump(mode="json") for message in messages])
        return
    for name in names:
        call.out.line(one_line(name))
    if messages:
        _print_messages(call.out, messages)
    if not names and not messages:
        call.out.note("no sessions" if id is None else "no messages")


def stats(call: Call) -> None:
    """Show the memory's sizes and its model."""
    with call.open() as memory:
        sizes = memory.stats
    if call.out.json:
        call.out.document(sizes.model_dump(mode="json"))
    else:
        call.out.fields([("memory", str(call.folder)), *_stats_fields(sizes)])


def _summary(document: Document) -> str:
    title = document.metadata.get("title")
    text = f"{title}: {document.text[:EXCERPT_CHARS]}" if isinstance(title, str) else document.text
    return one_line(text, EXCERPT_CHARS)


def _document_fields(document: Document) -> list[tuple[str, str]]:
    fields = [
        ("id", document.id),
        ("namespace", document.namespace),
        ("version", str(document.version)),
        ("date", document.timestamp.isoformat(timespec="seconds")),
        ("added", document.created_at.isoformat(timespec="seconds")),
        ("changed", document.updated_at.isoformat(timespec="seconds")),
        ("expires", document.expires_at.isoformat(timespec="seconds") if document.expires_at else ""),
        ("source", document.source or ""),
        ("trust", document.trust or ""),
        ("passages", str(document.passages)),
        ("tokens", str(document.tokens)),
        ("metadata", json.dumps(document.metadata, ensure_ascii=False) if document.metadata else ""),
    ]
    return [(name, value) for name, value in fields if value]


def _stats_fields(sizes: Stats) -> list[tuple[str, str]]:
    return [
        ("namespace", f"{sizes.namespace} (of {sizes.namespaces})"),
        ("documents", f"{sizes.documents:,}"),
        ("passages", f"{sizes.passages:,}"),
        ("tokens", f"{sizes.tokens:,}"),
        ("catalog", readable_size(sizes.catalog_bytes)),
        ("states", readable_size(sizes.state_bytes)),
        ("model", sizes.model or "none yet"),
        ("fingerprint", sizes.fingerprint or "none yet"),
    ]


def _print_history(out: Output, versions: Sequence[DocumentVersion]) -> None:
    rows = [
        (
            str(version.version),
            version.created_at.isoformat(timespec="seconds"),
            "current" if version.current else "",
            one_line(version.text, EXCERPT_CHARS),
        )
        for version in versions
    ]
    out.table(["version", "since", "", "text"], rows)


def _print_messages(out: Output, messages: Sequence[Message]) -> None:
    rows = [
        (
            str(message.position),
            message.timestamp.isoformat(timespec="seconds"),
            message.role if message.name is None else f"{message.role} {message.name}",
            one_line(message.content, EXCERPT_CHARS),
        )
        for message in messages
    ]
    out.table(["", "time", "who", "text"], rows)
