"""What pooled memory is worth by chunk size: the answer loss with a passage closed, remembered, read or both.

For every chunk size the same short low-rank tuning starts from the same model, and the same held-out
questions are asked four ways. Nothing in between is kept but the runs themselves, so that a later call
goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msa_memory.engine.engine import Engine
from msa_memory.engine.train.adapter import AdapterTraining, evaluate, train_adapter
from msa_memory.engine.train.exercises import Exercises
from msa_memory.engine.train.mixture import Mixture, MixtureOptions

__all__ = ["CHUNKS", "REMEMBERING", "TUNING", "fidelity"]

CHUNKS = (16, 32, 64, 128)
TUNING = AdapterTraining(steps=80, first_layer=0, learning_rate=1e-3)
REMEMBERING = MixtureOptions(recall_rows=0.8, alone_rows=1.0)
"""Mostly rows that practise remembering; the rest keeps the reading of texts as it was."""
WAYS = ("closed", "memory", "text", "both")


def fidelity(
    open_engine: Callable[[], Engine],
    exercises: Callable[[Engine], tuple[Exercises, Exercises]],
    recipe: AdapterTraining,
    mixture: MixtureOptions,
    out: Path,
    *,
    chunks: Sequence[int] = CHUNKS,
    probes: int = 200,
    data: str = "",
    deadline: float | None = None,
    report: Callable[[int, int, dict[str, Any]], None] = lambda chunk, step, figures: None,
) -> dict[str, Any]:
    """Answer losses in nats per token by chunk size, before and after tuning.

    Args:
        open_engine: a fresh engine for every chunk size.
        exercises: what to train on and what was kept for the probes.
        report: called with chunk size, step and the step's figures.

    Raises:
        Paused: the ``deadline`` (monotonic) is over; the next call goes on.
    """
    curve: dict[str, Any] = {}
    for chunk in chunks:
        engine = open_engine()
        engine.decoder.msa = engine.msa.with_options(chunk=chunk)
        train, kept = exercises(engine)
        end = engine.prompt.tail[0]
        rows = Mixture(kept, (), end, mixture)
        asked: dict[str, list[Any]] = {way: [] for way in WAYS}
        for number in range(probes):
            for way, row in rows.probe(number).items():
                asked[way].append(row)
        before = evaluate(engine.decoder, asked, recipe.micro_batch_tokens)
        train_adapter(
            engine.decoder,
            Mixture(train, (), end, mixture).row,
            recipe,
            out / f"chunk-{chunk}",
            data=f"{data} {chunk} {mixture}",
            deadline=deadline,
            report=lambda step, figures, chunk=chunk: report(chunk, step, figures),  # type: ignore[misc]
        )
        after = evaluate(engine.decoder, asked, recipe.micro_batch_tokens)
        size = engine.decoder.config
        per_chunk = 2 * len(engine.msa.router_layers) * size.num_kv_heads * size.head_dim * 2
        curve[str(chunk)] = {"before": before, "after": after, "kv_bytes_per_token": per_chunk / chunk}
    return {"probes": probes, "chunks": curve}
