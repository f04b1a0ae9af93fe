"""Cached hidden states for router training.

A routing key is a linear, position-free map of a chunk's mean layer input, so the chunk means are all a
router ever needs of a document. They are computed once with the frozen model and kept in bfloat16; the
projections then train on them without running the model again.

A shard's file name is a digest of everything its content depends on (weights with any adapter in them,
layers, chunk or position, token ids), so a shard made by another model or from other texts is never read,
and an interrupted run goes on with the first shard it lacks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.states import HeadStates
from msa_memory.engine.train.run import Paused
from msa_memory.errors import ConfigError

__all__ = ["HiddenCache", "HiddenStates", "weights_digest"]

SHARD_ITEMS = 256
BATCH_TOKENS = 1024
Ids = Sequence[int]
Report = Callable[[str, int, int], None]
"""(what, items done, items in all), after every shard."""


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

    def pick(self, items: Sequence[int]) -> HiddenStates:
        """These items alone, in this order."""
        some = torch.tensor(items, dtype=torch.long)
        starts = torch.cat((torch.zeros(1, dtype=torch.long), self.lengths()[some].cumsum(0)))
        return HiddenStates(self.rows[:, self.flat(some)], starts)


def weights_digest(decoder: Decoder) -> str:
    """SHA-256 (hex) of the weights that decide hidden states: all but the routers' own, in their dtype."""
    digest = hashlib.sha256()
    for name, weight in sorted(decoder.named_parameters()):
        if ".router_" not in name:
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(eq=False)
class HiddenCache:
    """Inputs of some layers of a frozen decoder, kept in ``folder`` across runs.

    ``weights`` is the digest of the decoder's; once the ``deadline`` (monotonic) is over, the next shard
    raises Paused.
    """

    decoder: Decoder
    layers: tuple[int, ...]
    folder: Path
    report: Report = lambda what, done, total: None
    deadline: float | None = None
    weights: str = field(init=False)

    def __post_init__(self) -> None:
        self.weights = weights_digest(self.decoder)

    def documents(self, documents: Sequence[Ids], chunk: int) -> HiddenStates:
        """Chunk means for token-id documents, each encoded alone from position 0."""

        def compute(batch: Sequence[Ids]) -> list[Tensor]:
            rows = self._inputs(batch, None, 0)
            return [torch.stack([ops.pool_chunks(h, chunk) for h in item]) for item in rows]

        return self._sharded("documents", documents, compute, {"chunk": chunk})

    def questions(self, questions: Sequence[Ids], head: HeadStates, position: int) -> HiddenStates:
        """One row per question token, behind the template head, from ``position``."""

        def compute(batch: Sequence[Ids]) -> list[Tensor]:
            return self._inputs(batch, head, position)

        settings = {"head": _digest_of(head.keys, head.values), "position": position}
        return self._sharded("questions", questions, compute, settings)

    @torch.inference_mode()
    def _inputs(self, items: Sequence[Ids], head: HeadStates | None, position: int) -> list[Tensor]:
        """Layer inputs ``[L, tokens, E]`` of every item."""
        capture = _Capture(self.decoder, self.layers, [len(ids) for ids in items], head)
        device = self.decoder.device
        ids = torch.tensor([token for item in items for token in item], device=device)
        positions = [torch.arange(position, position + len(item), device=device) for item in items]
        self.decoder(ids, torch.cat(positions), capture)
        return list(torch.stack(capture.inputs).split(capture.lengths, dim=1))

    def _sharded(
        self,
        what: str,
        items: Sequence[Ids],
        compute: Callable[[Sequence[Ids]], list[Tensor]],
        settings: dict[str, object],
    ) -> HiddenStates:
        if not items:
            raise ConfigError(f"there are no {what} to encode; training needs some")
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = []
        for start in range(0, len(items), SHARD_ITEMS):
            part = items[start : start + SHARD_ITEMS]
            about = {
                "weights": self.weights,
                "layers": self.layers,
                **settings,
                "ids": list(map(list, part)),
            }
            name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
            path = self.folder / f"{what}-{name}.safetensors"
            if not _readable(path):
                if self.deadline is not None and time.monotonic() >= self.deadline:
                    raise Paused(f"encoding stopped at {start} of {len(items)} {what}")
                rows = [row for batch in _batches(part) for row in compute(batch)]
                _write(path, rows)
            shards.append(path)
            self.report(what, start + len(part), len(items))
        return _join(shards)


class _Capture:
    """Causal attention over packed sequences behind a shared prefix; keeps the inputs of some layers."""

    def __init__(
        self, decoder: Decoder, layers: Sequence[int], lengths: list[int], head: HeadStates | None
    ) -> None:
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


def _batches(items: Sequence[Ids]) -> Iterator[Sequence[Ids]]:
    """Consecutive items of at most ``BATCH_TOKENS`` tokens together; a longer one comes alone."""
    start, size = 0, 0
    for index, ids in enumerate(items):
        if size and size + len(ids) > BATCH_TOKENS:
            yield items[start:index]
            start, size = index, 0
        size += len(ids)
    yield items[start:]


def _digest_of(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _readable(path: Path) -> bool:
    """Whether a shard is there and whole; a truncated one is made again."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _write(path: Path, rows: Sequence[Tensor]) -> None:
    lengths = torch.tensor([row.shape[1] for row in rows])
    scratch = path.with_suffix(".partial")
    save_file({"rows": torch.cat(list(rows), dim=1).bfloat16().cpu(), "lengths": lengths}, scratch)
    scratch.replace(path)


def _join(paths: Sequence[Path]) -> HiddenStates:
    """All shards' rows in one tensor, filled in place: two copies would not fit where one just does."""
    lengths = []
    for path in paths:
        with safe_open(path, framework="pt") as shard:
            lengths.append(shard.get_tensor("lengths"))
    starts = torch.cat((torch.zeros(1, dtype=torch.long), torch.cat(lengths).cumsum(0)))
    at, rows = 0, torch.empty(0)
    for path in paths:
        with safe_open(path, framework="pt") as shard:
            part = shard.get_tensor("rows")
        if at == 0:
            rows = part.new_empty((part.shape[0], int(starts[-1]), part.shape[2]))
        rows[:, at : at + part.shape[1]] = part
        at += part.shape[1]
    return HiddenStates(rows, starts)
