"""Commands that move a memory: ``export``, ``import``, ``fork``, ``reencode``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from msa_memory.cli.call import Call
from msa_memory.cli.output import one_line, readable_size
from msa_memory.cli.writing import OnConflict
from msa_memory.types import ImportReceipt

__all__ = ["export", "fork", "import_file", "reencode"]


class Origin(Enum):
    """Systems whose exports can be imported."""

    mem0 = "mem0"
    langgraph = "langgraph"


def export(
    call: Call,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The bundle to write.", dir_okay=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a namespace to one file: texts, versions, states and sessions."""
    with call.open() as memory, call.out.busy("Exporting"):
        receipt = memory.export(file, overwrite=overwrite)
    if call.out.json:
        call.out.document(receipt.model_dump(mode="json"))
        return
    call.out.line(
        f"wrote {receipt.documents:,} documents and {receipt.messages:,} messages to {receipt.path} "
        f"({readable_size(receipt.size_bytes)})"
    )
    call.out.line(f"SHA-256 {receipt.sha256}")
    for id in receipt.without_states:
        call.out.note(f"the states of {one_line(id)} are damaged: only its text is in the bundle")


def import_file(
    call: Call,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The bundle or export.", exists=True, dir_okay=False),
    ],
    origin: Annotated[
        Origin | None, typer.Option("--from", help="What wrote the file, if it is no bundle of this program.")
    ] = None,
    on_conflict: Annotated[
        OnConflict, typer.Option(help="What to do if an id of the bundle is taken by something else.")
    ] = OnConflict.error,
    again: Annotated[
        bool,
        typer.Option("--reencode", help="Read all texts anew: another model's bundle, or an untrusted one."),
    ] = False,
) -> None:
    """Bring a bundle, or another system's export, into a namespace. Running it again finishes it."""
    if origin is not None and (again or on_conflict is not OnConflict.error):
        raise typer.BadParameter("goes without --on-conflict and --reencode", param_hint="--from")
    with call.open_or_create() as memory:
        if origin is None:
            receipt = memory.import_bundle(file, on_conflict=on_conflict.value, reencode=again)
            call.out.document(receipt.model_dump(mode="json")) if call.out.json else _print(call, receipt)
            return
        documents = memory.import_from(origin.value, file)
    if call.out.json:
        call.out.document({"documents": [document.id for document in documents]})
    else:
        call.out.line(f"the export's {len(documents):,} memories are here")


def fork(
    call: Call,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new or empty folder for the copy.")],
) -> None:
    """Copy the whole memory to another folder; state files are shared until either side changes them."""
    with call.open_for_changes() as memory, call.out.busy("Copying"):
        memory.fork(folder).close()
    if call.out.json:
        call.out.document({"path": str(folder)})
    else:
        call.out.line(str(folder))


def reencode(
    call: Call,
    new_model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="The new model; else the memory's own, changed since."),
    ] = None,
) -> None:
    """Move the whole memory to another model. Running it again after an interruption goes on."""
    with call.open_for_changes() as memory:
        receipt = memory.reencode(new_model)
    if call.out.json:
        call.out.document(receipt.model_dump(mode="json"))
    elif receipt.documents:
        call.out.line(f"moved {receipt.documents:,} documents to {receipt.model}")
    else:
        call.out.line(f"the memory is {receipt.model}'s already")


def _print(call: Call, receipt: ImportReceipt) -> None:
    call.out.line(
        f"imported {receipt.added:,} documents and {receipt.messages:,} messages; "
        f"replaced {receipt.replaced:,}, kept {receipt.unchanged:,} that say the same and "
        f"{receipt.skipped:,} that say something else"
    )
