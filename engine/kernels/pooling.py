"""Chunk means of keys, values and routing rows of a packed batch of passages, in one launch.

Every row of a layer's outputs is read once. Sums run in float32 per chunk, so neither a passage's length
nor its neighbours in the batch change one bit of its states. Shape letters as in ``engine.ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.kernels.launching import (
    check_floats,
    check_head_dim,
    check_together,
    jit,
    next_power,
)
from msa_memory.errors import EngineError

__all__ = ["ChunkTable", "PooledLayer", "chunk_table", "pool_states", "pool_states_reference"]

COLUMNS = 128  # of one program; 64 tokens x 128 columns are 16 kB of bf16
TOKENS = 64  # read at a time; longer chunks take several rounds


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """Where the chunks of a packed batch begin: built once per batch, used by every layer.

    ``bounds`` int32 ``[C+1]``: chunk c holds the tokens from ``bounds[c]`` up to ``bounds[c+1]``.
    ``chunks`` gives the number of chunks of every passage.
    """

    bounds: Tensor
    chunk: int
    lengths: tuple[int, ...]
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PooledLayer:
    """Pooled ``keys`` and ``values`` ``[C, G, D]`` and pooled ``routing`` rows ``[R, ...]`` of one layer."""

    keys: Tensor
    values: Tensor
    routing: Tensor


def chunk_table(lengths: Sequence[int], chunk: int, device: torch.device | str) -> ChunkTable:
    """Cut passages of these many tokens into chunks, each from its own first token.

    Raises:
        EngineError: a passage has no tokens, or ``chunk`` is below 1.
    """
    if chunk < 1 or any(length < 1 for length in lengths):
        raise EngineError(
            f"cannot cut passages of {list(lengths)} tokens into chunks of {chunk}; all must be at least 1"
        )
    starts, begin = [], 0
    for length in lengths:
        starts.append(np.arange(begin, begin + length, chunk, dtype=np.int32))
        begin += length
    bounds = np.concatenate([*starts, np.array([begin], dtype=np.int32)])
    return ChunkTable(
        torch.from_numpy(bounds).to(device), chunk, tuple(lengths), tuple(len(part) for part in starts)
    )


def pool_states_reference(
    keys: Tensor, values: Tensor, routing: Tensor, table: ChunkTable, routing_table: ChunkTable
) -> PooledLayer:
    """The same in plain torch, passage by passage."""

    def pool(x: Tensor, cut: ChunkTable) -> Tensor:
        parts = x.split(list(cut.lengths))
        return torch.cat([x[:0], *(ops.pool_chunks(part, cut.chunk) for part in parts)])

    return PooledLayer(pool(keys, table), pool(values, table), pool(routing, routing_table))


def pool_states(
    keys: Tensor, values: Tensor, routing: Tensor, table: ChunkTable, routing_table: ChunkTable
) -> PooledLayer:
    """Arithmetic mean over the tokens each chunk really holds, in the inputs' dtype (msa-spec 5.3).

    Args:
        keys, values: ``[N, G, D]`` of one layer; D a power of two.
        routing: ``[N, ...]`` rows that become routing keys: the layer's normed input (projecting its
            means equals pooling its projections) or the keys themselves.
        table, routing_table: chunks of K and V, and of the routing rows; both over the same N tokens.

    Raises:
        EngineError: shapes, dtypes or devices do not fit together.
    """
    check_head_dim(keys.shape[-1])
    check_floats("pool_states", keys, values, routing)
    check_together("pool_states", keys, values, routing, table.bounds, routing_table.bounds)
    tokens = keys.shape[0]
    if values.shape != keys.shape or routing.shape[0] != tokens:
        raise EngineError(
            f"keys {tuple(keys.shape)}, values {tuple(values.shape)} and routing rows "
            f"{tuple(routing.shape)} must hold the same tokens, keys and values the same heads"
        )
    if table.lengths != routing_table.lengths or sum(table.lengths) != tokens:
        raise EngineError(
            f"the chunk tables cut {sum(table.lengths)} and {sum(routing_table.lengths)} tokens in passages; "
            f"the layer holds {tokens}: build both from the lengths of this batch"
        )
    rows = [x.flatten(1) for x in (keys, values, routing)]
    rows = [x if x.stride(1) == 1 else x.contiguous() for x in rows]
    chunks, routing_chunks = sum(table.chunks), sum(routing_table.chunks)
    pooled = PooledLayer(
        keys.new_empty(chunks, *keys.shape[1:]),
        values.new_empty(chunks, *values.shape[1:]),
        routing.new_empty(routing_chunks, *routing.shape[1:]),
    )
    width, routing_width = rows[0].shape[1], rows[2].shape[1]
    blocks, routing_blocks = triton.cdiv(width, COLUMNS), triton.cdiv(routing_width, COLUMNS)
    programs = chunks * blocks
    if tokens:
        _pool_kernel[(programs + routing_chunks * routing_blocks,)](
            *rows,
            pooled.keys,
            pooled.values,
            pooled.routing,
            table.bounds,
            routing_table.bounds,
            programs,
            *(x.stride(0) for x in rows),
            width,
            routing_width,
            TOKENS=min(TOKENS, max(16, next_power(table.chunk))),
            ROUTING_TOKENS=min(TOKENS, max(16, next_power(routing_table.chunk))),
            COLUMNS=COLUMNS,
            num_warps=4,
        )
    return pooled


@jit()
def _mean(rows, pooled, bounds, stride, width, chunk, block, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    first, last = tl.load(bounds + chunk), tl.load(bounds + chunk + 1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        place = token.to(tl.int64)[:, None] * stride + column[None, :]
        inside = (token < last)[:, None] & (column < width)[None, :]
        total += tl.sum(tl.load(rows + place, mask=inside, other=0.0).to(tl.float32), 0)
    mean = total / (last - first).to(tl.float32)
    tl.store(pooled + chunk.to(tl.int64) * width + column, mean, mask=column < width)


@jit("programs")
def _pool_kernel(  # type: ignore[no-untyped-def]
    keys,
    values,
    routing,
    pooled_keys,
    pooled_values,
    pooled_routing,
    bounds,
    routing_bounds,
    programs,
    key_stride,
    value_stride,
    routing_stride,
    width,
    routing_width,
    TOKENS: tl.constexpr,
    ROUTING_TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: one chunk and COLUMNS columns, of K and V both or of the routing rows."""
    program = tl.program_id(0)
    if program < programs:
        blocks = tl.cdiv(width, COLUMNS)
        chunk, block = program // blocks, program % blocks
        _mean(keys, pooled_keys, bounds, key_stride, width, chunk, block, TOKENS, COLUMNS)
        _mean(values, pooled_values, bounds, value_stride, width, chunk, block, TOKENS, COLUMNS)
    else:
        blocks = tl.cdiv(routing_width, COLUMNS)
        chunk, block = (program - programs) // blocks, (program - programs) % blocks
        _mean(
            routing, pooled_routing, routing_bounds, routing_stride, routing_width,
            chunk, block, ROUTING_TOKENS, COLUMNS,
        )  # fmt: skip
