"""Reading many passages in one forward pass, for GPUs: packed end to end, each attending to itself alone.

The states are those of ``encoding``, passage by passage; how a device rounds a larger product is the only
difference. Keys, values and routing keys of a batch stay packed, so that a bank and a tier take them in a
few copies. Needs Triton to be installed, also where it falls back to plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_memory.engine import kernels, ops
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.kernels.pooling import (
    PooledLayer,
    chunk_table,
    pool_states,
    pool_states_reference,
)
from msa_memory.engine.states import PassageStates
from msa_memory.engine.transfer import sent, sent_numbers
from msa_memory.errors import EngineError

__all__ = ["PackedStates", "encode_packed"]


@dataclass(frozen=True, slots=True)
class PackedStates:
    """Pooled states of several passages on L router layers, one passage after another.

    ``keys``, ``values`` ``[L, C, G, D]``; ``router_keys`` ``[L, R, G, D]``; ``chunks`` and ``router_chunks``
    say how many rows each passage has.
    """

    keys: Tensor
    values: Tensor
    router_keys: Tensor
    chunks: tuple[int, ...]
    router_chunks: tuple[int, ...]

    def apart(self) -> list[PassageStates]:
        """The states of each passage, in host memory and without terms; three copies for all of them."""
        keys, values = (
            pooled.transpose(1, 2).cpu().split(list(self.chunks), 2) for pooled in (self.keys, self.values)
        )
        router_keys = self.router_keys.cpu().split(list(self.router_chunks), 1)
        return list(map(PassageStates, keys, values, router_keys))


@torch.inference_mode()
def encode_packed(decoder: Decoder, passages: Sequence[Sequence[int]]) -> PackedStates:
    """States of passages given as token ids.

    Raises:
        EngineError: a passage has no tokens, or the decoder has no router layers.
    """
    if decoder.msa is None:
        raise EngineError("this model has no memory routers: train some with `msa-memory train router`")
    if not passages or not all(passages):
        raise EngineError("every passage needs at least one token, and a batch at least one passage")
    lengths = [len(ids) for ids in passages]
    reader = _BatchReader(decoder, decoder.msa, lengths)
    tokens = sent_numbers([token for ids in passages for token in ids], decoder.device)
    positions = sent(torch.cat([torch.arange(length) for length in lengths]), decoder.device)
    decoder(tokens, positions, reader)
    return PackedStates(
        torch.stack([pooled.keys for pooled in reader.pooled]),
        torch.stack([pooled.values for pooled in reader.pooled]),
        torch.stack(reader.router_keys),
        reader.table.chunks,
        reader.router_table.chunks,
    )


class _BatchReader:
    """Causal attention inside each passage; pools router layers as they pass."""

    def __init__(self, decoder: Decoder, msa: MSAConfig, lengths: list[int]) -> None:
        self.decoder, self.msa, self.lengths = decoder, msa, lengths
        self.scale = decoder.config.head_dim**-0.5
        self.table = chunk_table(lengths, msa.chunk, decoder.device)
        self.router_table = chunk_table(lengths, msa.router_chunk, decoder.device)
        self.pooled: list[PooledLayer] = []
        self.router_keys: list[Tensor] = []

    def __call__(self, layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if layer in self.msa.router_layers:
            self._pool(layer, h, k, v)
            if layer == self.msa.router_layers[-1]:
                return None
        return ops.attend_documents(q, k, v, self.lengths, self.scale)

    def _pool(self, layer: int, h: Tensor, k: Tensor, v: Tensor) -> None:
        pool = pool_states if kernels.usable(k, k.shape[-1]) else pool_states_reference
        decoupled = self.msa.decouple_router
        pooled = pool(k, v, h if decoupled else k, self.table, self.router_table)
        routing = pooled.routing
        if decoupled:
            routing = self.decoder.attention(layer).router_key(routing)
        self.pooled.append(pooled)
        self.router_keys.append(ops.normalize_heads(routing) if self.msa.router_normalize else routing)
