"""Answer questions about a text file over several ranks: torchrun -m msa_memory.engine.parallel FILE."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from msa_memory.engine.engine import load_engine
from msa_memory.engine.models import DEFAULT_MODEL, resolve
from msa_memory.engine.parallel.cluster import join
from msa_memory.engine.parallel.memory import ParallelMemory
from msa_memory.engine.parallel.shard import Shard
from msa_memory.engine.sampling import SamplingOptions

__all__ = ["app"]

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def ask(
    file: Annotated[Path, typer.Argument(help="texts, one passage per line", exists=True, dir_okay=False)],
    model: Annotated[str, typer.Option(help="registered name, local folder or hub id")] = DEFAULT_MODEL,
    device: Annotated[str, typer.Option(help="cpu or cuda; every rank takes the GPU of its number")] = "cpu",
    k: Annotated[int, typer.Option(help="passages read per question")] = 4,
    max_new_tokens: int = 64,
    timeout_s: Annotated[float, typer.Option(help="how long a rank may take for one request")] = 120.0,
) -> None:
    """Spread a file's lines over the ranks and answer each line of standard input."""
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    with join(device, timeout_s=timeout_s) as cluster:
        registered = None if Path(model).exists() else model
        engine = load_engine(resolve(model), name=registered, device=device)
        if not cluster.leads:
            cluster.serve(Shard(cluster, engine))
            return
        memory = ParallelMemory(cluster, engine)
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        memory.add(dict(enumerate(line for line in lines if line)))
        typer.echo(f"{len(memory.bank)} passages over {cluster.size} ranks", err=True)
        for question in filter(None, map(str.strip, sys.stdin)):
            read = memory.query(question, k=k, options=SamplingOptions(max_new_tokens=max_new_tokens))
            typer.echo(f"{read.text.strip()}\t{','.join(map(str, read.numbers))}")


if __name__ == "__main__":
    app()
