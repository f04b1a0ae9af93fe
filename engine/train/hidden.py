"""Cached hidden states for router training.

A routing key is a linear, position-free map of a chunk's mean layer input, so the chunk means are all a
router ever needs of a document. They are computed once with the frozen backbone and kept in bfloat16;
the projections then train on them without running the model again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.states import HeadStates

__all__ = ["HiddenStates", "cache_documents", "cache_questions"]

SHARD_ITEMS = 512
Compute = Callable[[Sequence[list[int]]], list[Tensor]]


@dataclass(slots=True)
class HiddenStates:
    """Ragged rows of layer inputs: item i owns ``rows[:, starts[i] : starts[i + 1]]`` of ``[L, R, E]``."""

    rows: Tensor
    starts: Tensor

    def lengths(self) -> Tensor:
        return self.starts.diff()

    def flat(self, items: Tensor) -> Tensor:
        """Row indices of these items, one after another."""
        return torch.cat([torch.arange(int(self.starts[i]), int(self.starts[i + 1])) for i in items])


class _Capture:
    """Causal attention over packed sequences behind a shared prefix; keeps the inputs of some layers."""

    def __init__(self, decoder: Decoder, layers: Sequence[int], lengths: list[int], head: HeadStates | None):
        self.layers, self.lengths, self.head = set(layers), lengths, head
        self.last = max(layers)
        self.scale = decoder.config.head_dim**-0.5
        self.inputs: list[Tensor] = []

    def __call__(self, layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if layer in self.layers:
            self.inputs.append(h)
        if layer == self.last:
            return None
        if self.head is None:
            return ops.attend_documents(q, k, v, self.lengths, self.scale)
        return self._behind_head(layer, self.head, q, k, v)

    def _behind_head(self, layer: int, head: HeadStates, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs, start = [], 0
        for length in self.lengths:
            part = slice(start, start + length)
            start += length
            keys = torch.cat((head.keys[layer], k[part].transpose(0, 1)), dim=1)
            values = torch.cat((head.values[layer], v[part].transpose(0, 1)), dim=1)
            outputs.append(ops.attend(q[part], keys, values, self.scale))
        return torch.cat(outputs)


@torch.inference_mode()
def cache_documents(
    decoder: Decoder, documents: Sequence[list[int]], layers: Sequence[int], chunk: int, folder: Path
) -> HiddenStates:
    """Chunk means of the inputs of ``layers`` for token-id documents, each encoded alone from position 0.

    Finished shards in ``folder`` are reused, so an interrupted run goes on where it stopped.
    """

    def compute(batch: Sequence[list[int]]) -> list[Tensor]:
        parts = []
        for ids in batch:
            capture = _Capture(decoder, layers, [len(ids)], None)
            decoder(torch.tensor(ids), torch.arange(len(ids)), capture)
            parts.append(torch.stack([ops.pool_chunks(h, chunk) for h in capture.inputs]))
        return parts

    return _sharded(documents, compute, folder, "documents")


@torch.inference_mode()
def cache_questions(
    decoder: Decoder,
    head: HeadStates,
    questions: Sequence[list[int]],
    layers: Sequence[int],
    position: int,
    folder: Path,
    batch_size: int = 64,
) -> HiddenStates:
    """Inputs of ``layers`` for every question token, behind the template head, from ``position``."""

    def compute(batch: Sequence[list[int]]) -> list[Tensor]:
        parts: list[Tensor] = []
        for start in range(0, len(batch), batch_size):
            rows = batch[start : start + batch_size]
            lengths = [len(ids) for ids in rows]
            capture = _Capture(decoder, layers, lengths, head)
            ids = torch.tensor([token for row in rows for token in row])
            positions = torch.cat([torch.arange(position, position + length) for length in lengths])
            decoder(ids, positions, capture)
            parts.extend(torch.stack(capture.inputs).split(lengths, dim=1))
        return parts

    return _sharded(questions, compute, folder, "questions")


def _sharded(items: Sequence[list[int]], compute: Compute, folder: Path, what: str) -> HiddenStates:
    folder.mkdir(parents=True, exist_ok=True)
    shards, started = [], time.monotonic()
    for start in range(0, len(items), SHARD_ITEMS):
        path = folder / f"{what}-{start:07d}.safetensors"
        if not path.exists():
            parts = compute(items[start : start + SHARD_ITEMS])
            lengths = torch.tensor([part.shape[1] for part in parts])
            scratch = path.with_suffix(".partial")
            save_file({"rows": torch.cat(parts, dim=1).bfloat16(), "lengths": lengths}, scratch)
            scratch.rename(path)
            done = min(start + SHARD_ITEMS, len(items))
            print(f"{what}: {done}/{len(items)} in {time.monotonic() - started:.0f} s", flush=True)
        shards.append(path)
    return _join(shards)


def _join(paths: Iterable[Path]) -> HiddenStates:
    loaded = [load_file(path) for path in paths]
    lengths = torch.cat([shard["lengths"] for shard in loaded])
    rows = torch.cat([shard.pop("rows") for shard in loaded], dim=1)
    starts = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    return HiddenStates(rows, starts)
