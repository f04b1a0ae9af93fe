"""Reading documents into states: each passage alone, positions from zero, pooled per chunk.

Source: Memory Sparse Attention, arXiv 2603.23516, section 3; msa-spec sections 4 and 5. A passage is
always computed by itself, so nothing else in a bank or a batch can change one bit of its states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.states import HeadStates, PassageStates
from msa_memory.errors import EngineError

__all__ = ["encode_head", "encode_passage"]


class _PassageReader:
    """Causal attention within one passage; pools K, V and routing keys on router layers as they pass."""

    def __init__(self, decoder: Decoder, msa: MSAConfig) -> None:
        self.decoder, self.msa = decoder, msa
        self.scale = decoder.config.head_dim**-0.5
        self.slot = {layer: slot for slot, layer in enumerate(msa.router_layers)}
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.router_keys: list[Tensor] = []

    def __call__(self, layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if layer in self.slot:
            self._pool(layer, h, k, v)
            if layer == self.msa.router_layers[-1]:
                return None
        return ops.attend(q, k.transpose(0, 1), v.transpose(0, 1), self.scale)

    def _pool(self, layer: int, h: Tensor, k: Tensor, v: Tensor) -> None:
        self.keys.append(ops.pool_chunks(k, self.msa.chunk).transpose(0, 1))  # [G, C, D]
        self.values.append(ops.pool_chunks(v, self.msa.chunk).transpose(0, 1))
        self.router_keys.append(self._router_keys(layer, h, k))

    def _router_keys(self, layer: int, h: Tensor, k: Tensor) -> Tensor:
        if self.msa.decouple_router:
            # No position and no bias: projecting the pooled input equals pooling the projections.
            pooled = self.decoder.attention(layer).router_key(ops.pool_chunks(h, self.msa.router_chunk))
        else:
            pooled = ops.pool_chunks(k, self.msa.router_chunk)
        return ops.normalize_heads(pooled) if self.msa.router_normalize else pooled

    def states(self) -> PassageStates:
        return PassageStates(torch.stack(self.keys), torch.stack(self.values), torch.stack(self.router_keys))


@torch.inference_mode()
def encode_passage(decoder: Decoder, ids: Sequence[int]) -> PassageStates:
    """States of one passage given as token ids.

    Raises:
        EngineError: no tokens, or the decoder has no router layers.
    """
    if decoder.msa is None:
        raise EngineError("this model has no memory routers: train some with `msa-memory train router`")
    if not ids:
        raise EngineError("a passage needs at least one token; it has none")
    reader = _PassageReader(decoder, decoder.msa)
    tokens = torch.tensor(ids, device=decoder.device)
    decoder(tokens, torch.arange(len(ids), device=decoder.device), reader)
    return reader.states()


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
