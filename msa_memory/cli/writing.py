"""Commands that change a memory: ``add``, ``update``, ``restore``, ``forget``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from msa_memory.cli.call import Call
from msa_memory.cli.files import FileReader, Skipped
from msa_memory.cli.options import Files, Meta, Where, read_metadata, read_stdin
from msa_memory.cli.output import Output, one_line, readable_size
from msa_memory.errors import InvalidDocumentError
from msa_memory.types import Document, ForgetReceipt

__all__ = ["add", "forget", "restore", "update"]

MOST_SHOWN = 20
STDIN = "-"


class OnConflict(Enum):
    """What ``add`` does when an id is taken."""

    error = "error"
    replace = "replace"
    skip = "skip"


def add(
    call: Call,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts to remember; - reads stdin.")
    ] = None,
    files: Files = None,
    id: Annotated[
        str | None, typer.Option(help="The document's id; else a file's path, else made up.")
    ] = None,
    meta: Meta = None,
    timestamp: Annotated[
        str | None, typer.Option(metavar="DATE", help="When it was said or happened, as 2026-01-31.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Where it comes from; filter by it as $source.")] = None,
    trust: Annotated[str | None, typer.Option(help="How far to trust it; filter by it as $trust.")] = None,
    on_conflict: Annotated[OnConflict, typer.Option(help="What to do if an id is taken.")] = OnConflict.error,
) -> None:
    """Remember texts, files, folders or stdin; prints the ids.

    Every file is one document: its id is its path from here, its metadata its path and title. Files that are
    not UTF-8 text, hidden ones and symbolic links in folders are skipped and reported.
    """
    items, skipped = _items(texts or (), files or ())
    _report_skipped(call.out, skipped)
    if id is not None and len(items) != 1:
        raise typer.BadParameter(f"goes with one document, not with {len(items)}", param_hint="--id")
    given = {
        "timestamp": timestamp,
        "source": source,
        "trust": trust,
        **({"id": id} if id is not None else {}),
    }
    own = read_metadata(meta)
    items = [{**item, **given, "metadata": {**item.get("metadata", {}), **own}} for item in items]
    with call.open_or_create() as memory, call.out.busy("Remembering", when=len(items) == 1):
        documents = memory.add_many(items, on_conflict=on_conflict.value)
    _print_added(call.out, documents, skipped)


def update(
    call: Call,
    id: Annotated[str, typer.Argument(help="The document's id.")],
    text: Annotated[str | None, typer.Argument(help="Its new text; - reads stdin.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", exists=True, dir_okay=False, help="Read the new text from a file."),
    ] = None,
    meta: Meta = None,
) -> None:
    """Change a document: its text, its metadata (merged), or both."""
    content, metadata = _new_text(text, file), read_metadata(meta) if meta else None
    with call.open_for_changes() as memory, call.out.busy("Remembering"):
        document = memory.update(id, content, metadata=metadata)
    if call.out.json:
        call.out.document(_without_text(document))
    else:
        call.out.line(f"{one_line(document.id)} is now at version {document.version}")


def restore(
    call: Call,
    id: Annotated[str, typer.Argument(help="The document's id.")],
    version: Annotated[int, typer.Argument(help="Which version; history lists them.")],
) -> None:
    """Bring an earlier version of a document back, as its newest."""
    with call.open_for_changes() as memory, call.out.busy("Remembering"):
        document = memory.restore(id, version)
    if call.out.json:
        call.out.document(_without_text(document))
    else:
        call.out.line(f"{one_line(document.id)} is now at version {document.version}")


def forget(
    call: Call,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Which documents.")] = None,
    where: Where = None,
    session: Annotated[
        str | None, typer.Option(metavar="ID", help="A session, with all its messages.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
) -> None:
    """Erase documents, by id, filter or session: text, versions and states. Shows which, and asks before."""
    with call.open() if dry_run else call.open_for_changes() as memory:
        receipt = memory.forget(ids or None, where=where, session=session, dry_run=True)
        if not dry_run and (receipt.ids or session is not None):
            if not yes:
                _confirm(call.out, receipt)
            shown = receipt.ids if session is None else None  # what was shown, no more
            receipt = memory.forget(shown, session=session)
    if call.out.json:
        call.out.document(receipt.model_dump(mode="json"))
    else:
        call.out.line(_described(receipt))


def _items(texts: Sequence[str], files: Sequence[Path]) -> tuple[list[dict[str, Any]], list[Skipped]]:
    if not texts and not files:
        raise typer.BadParameter("nothing to remember: give TEXT, - for stdin, or --file PATH")
    reader = FileReader()
    for path in files:
        reader.read(path)
    items = [{"content": read_stdin() if text == STDIN else text} for text in texts]
    if not items and not reader.found:
        _report_skipped(Output(json=False), reader.skipped)
        raise InvalidDocumentError("nothing to remember: no file there is text")
    return [*items, *reader.found], reader.skipped


def _new_text(text: str | None, file: Path | None) -> str | None:
    if text is not None and file is not None:
        raise typer.BadParameter("give the new text as TEXT or as --file, not both")
    if file is None:
        return read_stdin() if text == STDIN else text
    reader = FileReader()
    reader.read(file)
    if reader.skipped:
        raise InvalidDocumentError(f"{file}: {reader.skipped[0].reason}")
    return str(reader.found[0]["content"])


def _report_skipped(out: Output, skipped: Sequence[Skipped]) -> None:
    for entry in skipped[:MOST_SHOWN]:
        out.note(f"skipped {entry.path}: {entry.reason}")
    if len(skipped) > MOST_SHOWN:
        out.note(f"skipped {len(skipped) - MOST_SHOWN} more")


def _print_added(out: Output, documents: Sequence[Document], skipped: Sequence[Skipped]) -> None:
    if out.json:
        out.document(
            {
                "documents": [_without_text(document) for document in documents],
                "skipped": [asdict(entry) for entry in skipped],
            }
        )
        return
    for document in documents:
        out.line(document.id if document.id.isprintable() else one_line(document.id))
    passages = sum(document.passages for document in documents)
    out.note(f"remembered {_count(len(documents), 'document')} in {_count(passages, 'passage')}")


def _without_text(document: Document) -> dict[str, Any]:
    return document.model_dump(mode="json", exclude={"text"})


def _confirm(out: Output, receipt: ForgetReceipt) -> None:
    for id in receipt.ids[:MOST_SHOWN]:
        out.note(f"  {id}")
    if len(receipt.ids) > MOST_SHOWN:
        out.note(f"  and {len(receipt.ids) - MOST_SHOWN} more")
    if not out.confirm(f"Forget {_what(receipt)} for good?"):
        out.note("nothing was forgotten")
        raise typer.Exit(1)


def _described(receipt: ForgetReceipt) -> str:
    if not any(receipt.counts.values()):
        return "nothing matches"
    verb = "would forget" if receipt.dry_run else "forgot"
    size = f"{_count(receipt.counts['passages'], 'passage')}, {readable_size(receipt.bytes_erased)} of states"
    lines = [f"{verb} {_what(receipt)} ({size})"]
    shown = receipt.ids[:MOST_SHOWN] if receipt.dry_run else ()
    lines += [f"  {id}" for id in shown]
    lines += [f"  and {len(receipt.ids) - len(shown)} more"] if 0 < len(shown) < len(receipt.ids) else []
    lines += [f"beyond reach: {place}" for place in receipt.beyond_reach]
    return "\n".join(lines)


def _what(receipt: ForgetReceipt) -> str:
    documents = _count(len(receipt.ids), "document")
    messages = receipt.counts.get("messages", 0)
    return f"{documents} and {_count(messages, 'message')}" if messages else documents


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
