"""Reading documents into states: each passage alone, positions from zero, pooled per chunk.

Source: Memory Sparse Attention, arXiv 2603.23516, section 3; msa-spec sections 4 and 5. A passage attends to
itself alone; passages are read together only where that changes no bit of any one's states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from msa_memory.engine import ops
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.states import HeadStates, PassageStates
from msa_memory.errors import EngineError

__all__ = ["encode_head", "encode_passage", "encode_passages", "rows_apart", "token_batches"]

TRIAL_ROWS = 192
TRIAL_PARTS = ((0, 1), (5, 8), (0, 17), (23, 82), (64, 192), (7, 191))
Known = TypeVar("Known", bound=tuple[Sequence[int], Any])
"""A passage's token ids and what else its owner knows of it."""
_tried: WeakKeyDictionary[Decoder, dict[int, bool]] = WeakKeyDictionary()


class _PassageReader:
    """Causal attention within each passage; pools K, V and routing keys on router layers as they pass."""

    def __init__(self, decoder: Decoder, msa: MSAConfig, lengths: Sequence[int]) -> None:
        self.decoder, self.msa, self.lengths = decoder, msa, list(lengths)
        self.scale = decoder.config.head_dim**-0.5
        self.layers = frozenset(msa.router_layers)
        self.pooled: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
        """Of each router layer: keys and values ``[G, C, D]`` and routing keys ``[R, G, D]`` by passage."""

    def __call__(self, layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if layer in self.layers:
            self.pooled.append(
                (self._pool(k), self._pool(v), self._router_keys(layer, h if self.msa.decouple_router else k))
            )
            if layer == self.msa.router_layers[-1]:
                return None
        outputs = [
            ops.attend(queries, keys.transpose(0, 1), values.transpose(0, 1), self.scale)
            for queries, keys, values in zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _pool(self, x: Tensor) -> list[Tensor]:
        return [ops.pool_chunks(part, self.msa.chunk).transpose(0, 1) for part in x.split(self.lengths)]

    def _router_keys(self, layer: int, x: Tensor) -> list[Tensor]:
        parts = [ops.pool_chunks(part, self.msa.router_chunk) for part in x.split(self.lengths)]
        pooled = torch.cat(parts)
        if self.msa.decouple_router:
            # No position and no bias: projecting the pooled input equals pooling the projections.
            pooled = self.decoder.attention(layer).router_key(pooled)
        if self.msa.router_normalize:
            pooled = ops.normalize_heads(pooled)
        return list(pooled.split([len(part) for part in parts]))

    def states(self) -> list[PassageStates]:
        return [
            PassageStates(*(torch.stack([layer[kind][index] for layer in self.pooled]) for kind in range(3)))
            for index in range(len(self.lengths))
        ]


def encode_passage(decoder: Decoder, ids: Sequence[int]) -> PassageStates:
    """States of one passage given as token ids.

    Raises:
        EngineError: no tokens, or the decoder has no router layers.
    """
    return encode_passages(decoder, [ids])[0]


@torch.inference_mode()
def encode_passages(decoder: Decoder, passages: Sequence[Sequence[int]]) -> list[PassageStates]:
    """States of passages in one forward pass, packed end to end.

    They are those of each passage alone, bit for bit, where ``rows_apart``; elsewhere larger products may be
    rounded differently.

    Raises:
        EngineError: no passages, one has no tokens, or the decoder has no router layers.
    """
    if decoder.msa is None:
        raise EngineError("this model has no memory routers: train some with `msa-memory train router`")
    if not passages or not all(passages):
        raise EngineError("a passage needs at least one token; it has none")
    lengths = [len(ids) for ids in passages]
    reader = _PassageReader(decoder, decoder.msa, lengths)
    tokens = torch.tensor([token for ids in passages for token in ids], device=decoder.device)
    positions = torch.cat([torch.arange(length, device=decoder.device) for length in lengths])
    decoder(tokens, positions, reader)
    return reader.states()


def rows_apart(decoder: Decoder) -> bool:
    """Whether this CPU computes every row of a product alike, bit for bit, whatever stands beside it.

    Passages read together have the very states that each has alone then. oneDNN's bfloat16 products are like
    that, float32 ones are not. A trial on one layer's weights tells, once per number of threads.
    """
    if decoder.device.type != "cpu":
        return False
    known = _tried.setdefault(decoder, {})
    threads = torch.get_num_threads()
    if threads not in known:
        known[threads] = _try_rows(decoder)
    return known[threads]


@torch.inference_mode()
def _try_rows(decoder: Decoder) -> bool:
    random = torch.Generator().manual_seed(0)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear) and ".layers.0." in f".{name}.":
            rows = torch.randn(TRIAL_ROWS, module.in_features, generator=random).to(module.weight.dtype)
            together = module(rows)
            for start, end in TRIAL_PARTS:
                if not torch.equal(module(rows[start:end]), together[start:end]):
                    return False
    return True


def token_batches(passages: Iterable[Known], most: int) -> Iterator[list[Known]]:
    """Passages, each behind its token ids, in batches of at most ``most`` tokens or of one passage."""
    batch: list[Known] = []
    tokens = 0
    for passage in passages:
        if batch and tokens + len(passage[0]) > most:
            yield batch
            batch, tokens = [], 0
        batch.append(passage)
        tokens += len(passage[0])
    if batch:
        yield batch


@torch.inference_mode()
def encode_head(decoder: Decoder, ids: Sequence[int]) -> HeadStates:
    """Keys and values of the template head in every layer; it attends causally to itself only."""
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append(k.transpose(0, 1))
        values.append(v.transpose(0, 1))
        return ops.attend(q, keys[-1], values[-1], decoder.config.head_dim**-0.5)

    tokens = torch.tensor(list(ids), dtype=torch.long, device=decoder.device)
    decoder(tokens, torch.arange(len(ids), device=decoder.device), attend)
    return HeadStates(torch.stack(keys), torch.stack(values))
