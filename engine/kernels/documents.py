"""Causal attention inside each document of a packed batch, for encoding many passages in one forward.

A program reads one document alone and starts at its first token, so the batch around a passage changes
nothing of its states. Shape letters as in ``engine.ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from msa_memory.engine.kernels.launching import (
    capability,
    check_floats,
    check_head_dim,
    check_together,
    jit,
)
from msa_memory.errors import EngineError

__all__ = ["attend_documents"]


def attend_documents(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], scale: float
) -> Tensor:
    """``ops.attend_documents``, its plain torch reference, in one launch without a loop over documents.

    ``query`` ``[N, H, D]``, ``keys`` and ``values`` ``[N, G, D]``; ``lengths`` sum to N.

    Returns:
        ``[N, H, D]``.

    Raises:
        EngineError: shapes, dtypes or devices do not fit together.
    """
    tokens, heads, dim = query.shape
    check_head_dim(dim)
    check_floats("attend_documents", query, keys, values)
    check_together("attend_documents", query, keys, values)
    groups = keys.shape[1]
    if keys.shape != values.shape or keys.shape[::2] != (tokens, dim) or heads % groups:
        raise EngineError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not "
            "fit: expected [N, H, D] and twice [N, G, D] with H a multiple of G"
        )
    if sum(lengths) != tokens or any(length < 1 for length in lengths):
        raise EngineError(
            f"documents of {list(lengths)} tokens do not fill a batch of {tokens}; each needs at least one"
        )
    query, keys, values = (x if x.stride(2) == 1 else x.contiguous() for x in (query, keys, values))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lines, block, warps = _tiling(query.dtype, dim)
    if tokens:
        tiles = _tiles(tuple(lengths), lines, query.device)
        _documents_kernel[(heads, tiles.shape[0])](
            query, keys, values, out, tiles, scale * 1.4426950408889634,
            *query.stride()[:2], *keys.stride()[:2], *values.stride()[:2],
            SHARED=heads // groups, DIM=dim, LINES=lines, BLOCK=block,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=warps, num_stages=2,
        )  # fmt: skip
    return out


def _tiling(dtype: torch.dtype, dim: int) -> tuple[int, int, int]:
    """Query lines, keys at a time and warps of one program, within the registers of every target."""
    if dtype == torch.float32:
        return 16, 16, 4
    if dim > 64:
        return (128 if dim == 128 else 64, 64 if dim == 128 and capability() >= 90 else 32, 8)
    return 128 if capability() >= 90 else 64, 64, 4


@lru_cache(maxsize=16)
def _tiles(lengths: tuple[int, ...], lines: int, device: torch.device) -> Tensor:
    """Work int32 ``[tiles, 3]``: where a document begins, a tile in it, and its length."""
    parts, begin = [], 0
    for length in lengths:
        first = np.arange(0, length, lines, dtype=np.int32)
        parts.append(np.stack((np.full_like(first, begin), first, np.full_like(first, length)), 1))
        begin += length
    return torch.from_numpy(np.concatenate(parts)).to(device)


@jit()
def _over_keys(  # type: ignore[no-untyped-def]
    q, total, top, mass, keys, values, key_stride, value_stride, begin, end, last, row, scale,
    DIAGONAL: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A running softmax over the keys from ``begin`` to ``end``; with DIAGONAL up to each row's own token."""
    depth = tl.arange(0, total.shape[1])
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = (token < last)[:, None]
        key = tl.load(keys + token[:, None] * key_stride + depth[None, :], mask=inside, other=0.0)
        value = tl.load(values + token[:, None] * value_stride + depth[None, :], mask=inside, other=0.0)
        logit = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale
        if DIAGONAL:
            logit = tl.where(token[None, :] <= row[:, None], logit, float("-inf"))
        larger = tl.maximum(top, tl.max(logit, 1))
        weight = tl.exp2(logit - larger[:, None])
        fade = tl.exp2(top - larger)
        mass = mass * fade + tl.sum(weight, 1)
        total = tl.dot(weight.to(value.dtype), value, total * fade[:, None], input_precision=PRECISION)
        top = larger
    return total, top, mass


@jit()
def _documents_kernel(  # type: ignore[no-untyped-def]
    query, keys, values, out, tiles, scale,
    query_token, query_head, key_token, key_group, value_token, value_group,
    SHARED: tl.constexpr, DIM: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: LINES tokens of one document, counted from its first, for one query head."""
    head, tile = tl.program_id(0), tl.program_id(1)
    begin, first = tl.load(tiles + tile * 3).to(tl.int64), tl.load(tiles + tile * 3 + 1)
    last = tl.load(tiles + tile * 3 + 2)
    query += begin * query_token + head * query_head
    keys += begin * key_token + head // SHARED * key_group
    values += begin * value_token + head // SHARED * value_group
    row, depth = first + tl.arange(0, LINES), tl.arange(0, DIM)
    mine = (row < last)[:, None]
    q = tl.load(query + row[:, None] * query_token + depth[None, :], mask=mine, other=0.0)
    total = tl.zeros([LINES, DIM], tl.float32)
    # The least finite number in place of -inf: differences of it stay numbers.
    top = tl.full([LINES], -3.0e38, tl.float32)
    mass = tl.zeros([LINES], tl.float32)
    total, top, mass = _over_keys(
        q, total, top, mass, keys, values, key_token, value_token, 0, first, last, row, scale,
        False, BLOCK, PRECISION,
    )  # fmt: skip
    total, top, mass = _over_keys(
        q, total, top, mass, keys, values, key_token, value_token,
        first, tl.minimum(first + LINES, last), last, row, scale, True, BLOCK, PRECISION,
    )  # fmt: skip
    width = tl.num_programs(0) * DIM
    out += begin * width + head * DIM
    tl.store(out + row[:, None] * width + depth[None, :], total / mass[:, None], mask=mine)
