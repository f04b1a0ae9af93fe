"""Decode attention: one new token per sequence over [template head; chosen chunks; own tokens].

The chosen passages' pooled chunks stay where they are: a table names their rows, so nothing is copied into
a contiguous cache when a router changes its mind. The keys of a sequence are split among programs, each
reading a KV head once for all query heads that share it. Shape letters as in ``engine.ops``; B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    multiprocessors,
    next_power,
)
from msa_memory.errors import EngineError

__all__ = ["Context", "attend_decode", "attend_decode_reference"]

BLOCK_KEYS = 64
LARGEST_SPLITS = 64


@dataclass(frozen=True, slots=True)
class Context:
    """What B sequences attend to in one layer.

    ``head_keys``, ``head_values`` ``[G, h, D]``: the template head, shared by all. ``memory_keys``,
    ``memory_values`` ``[M, G, D]``: pooled chunks of many passages; sequence b reads the rows
    ``rows[b, :row_counts[b]]`` (int32 ``[B, R]`` and ``[B]``). ``own_keys``, ``own_values`` ``[B, G, S, D]``
    with ``own_lengths`` int32 ``[B]`` tokens each, the newest included.
    """

    head_keys: Tensor
    head_values: Tensor
    memory_keys: Tensor
    memory_values: Tensor
    rows: Tensor
    row_counts: Tensor
    own_keys: Tensor
    own_values: Tensor
    own_lengths: Tensor


def attend_decode_reference(query: Tensor, context: Context, scale: float) -> Tensor:
    """The same in plain torch: one contiguous cache per sequence."""
    outputs = []
    for index, one in enumerate(query):
        rows = context.rows[index, : int(context.row_counts[index])].long()
        length = int(context.own_lengths[index])
        keys = torch.cat(
            (
                context.head_keys,
                context.memory_keys[rows].transpose(0, 1),
                context.own_keys[index, :, :length],
            ),
            1,
        )
        values = torch.cat(
            (
                context.head_values,
                context.memory_values[rows].transpose(0, 1),
                context.own_values[index, :, :length],
            ),
            1,
        )
        outputs.append(ops.attend(one[None], keys, values, scale) if keys.shape[1] else one[None] * 0)
    return torch.cat(outputs) if outputs else torch.empty_like(query)


def attend_decode(query: Tensor, context: Context, scale: float) -> Tensor:
    """Attention of one token per sequence over its whole context: ``[B, H, D]`` -> ``[B, H, D]``.

    Lengths are read on the device alone, so a captured graph may be replayed while they grow. A sequence
    without any key yields zeros.

    Raises:
        EngineError: shapes, dtypes or devices do not fit together.
    """
    _check(query, context)
    sequences, heads, dim = query.shape
    groups = context.head_keys.shape[0]
    shared = heads // groups
    lines = max(16, next_power(shared))
    room = context.head_keys.shape[1] + context.rows.shape[1] + context.own_keys.shape[2]
    busy = triton.cdiv(2 * multiprocessors(query.device), max(1, sequences * groups))
    narrow = query.dtype == torch.float32 or dim > 128  # else registers spill
    block = BLOCK_KEYS // 4 if narrow else BLOCK_KEYS
    splits = max(1, min(LARGEST_SPLITS, busy, triton.cdiv(room, block)))
    sums = torch.empty(sequences, groups, splits, lines, dim, device=query.device)
    norms = torch.empty(sequences, groups, splits, 2, lines, device=query.device)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    query = query.contiguous()
    if sequences:
        _split_kernel[(splits, groups, sequences)](
            query, sums, norms,
            context.head_keys, context.head_values, context.memory_keys, context.memory_values,
            context.rows, context.row_counts, context.own_keys, context.own_values, context.own_lengths,
            context.head_keys.shape[1], scale * 1.4426950408889634,
            *context.head_keys.stride()[:2], *context.head_values.stride()[:2],
            *context.memory_keys.stride()[:2], *context.memory_values.stride()[:2],
            *context.own_keys.stride()[:3], *context.own_values.stride()[:3], context.rows.stride(0),
            SHARED=shared, LINES=lines, DIM=dim, BLOCK=block,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3,
        )  # fmt: skip
        _join_kernel[(groups, sequences)](
            sums, norms, out, splits, SHARED=shared, LINES=lines, DIM=dim, num_warps=4
        )
    return out


def _check(query: Tensor, context: Context) -> None:
    check_head_dim(query.shape[-1])
    states = [
        context.head_keys, context.head_values, context.memory_keys, context.memory_values,
        context.own_keys, context.own_values,
    ]  # fmt: skip
    tables = [context.rows, context.row_counts, context.own_lengths]
    check_floats("attend_decode", query, *states)
    check_together("attend_decode", query, *states, *tables)
    sequences, heads, dim = query.shape
    groups = context.head_keys.shape[0]
    fits = (
        heads % groups == 0
        and context.head_keys.shape == context.head_values.shape
        and context.memory_keys.shape == context.memory_values.shape
        and context.own_keys.shape == context.own_values.shape
        and context.memory_keys.shape[1:] == (groups, dim)
        and context.own_keys.shape[:2] == (sequences, groups)
        and context.rows.shape[0] == len(context.row_counts) == len(context.own_lengths) == sequences
        and all(x.shape[-1] == dim and x.stride(-1) == 1 for x in states)
    )
    if not fits:
        raise EngineError(
            f"query {tuple(query.shape)}, head {tuple(context.head_keys.shape)}, memory "
            f"{tuple(context.memory_keys.shape)} and own tokens {tuple(context.own_keys.shape)} do not fit: "
            "expected [B, H, D], [G, h, D], [M, G, D] and [B, G, S, D] with D contiguous"
        )
    if any(table.dtype != torch.int32 for table in tables) or context.rows.stride(1) != 1:
        raise EngineError(
            f"rows and lengths are {[t.dtype for t in tables]}; expected int32, rows contiguous"
        )


@jit()
def _take_in(query, total, top, mass, keys, values, key_at, value_at, inside, scale, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block of keys into a running softmax: sum of values, largest logit and mass of every line."""
    depth = tl.arange(0, total.shape[1])
    key = tl.load(keys + key_at[:, None] + depth[None, :], mask=inside[:, None], other=0.0)
    value = tl.load(values + value_at[:, None] + depth[None, :], mask=inside[:, None], other=0.0)
    logit = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    logit = tl.where(inside[None, :], logit, float("-inf"))
    larger = tl.maximum(top, tl.max(logit, 1))
    weight = tl.exp2(logit - larger[:, None])
    fade = tl.exp2(top - larger)
    mass = mass * fade + tl.sum(weight, 1)
    total = tl.dot(weight.to(value.dtype), value, total * fade[:, None], input_precision=PRECISION)
    return total, larger, mass


@jit("head_length", "rows_stride")
def _split_kernel(  # type: ignore[no-untyped-def]
    query, sums, norms,
    head_keys, head_values, memory_keys, memory_values, rows, row_counts, own_keys, own_values, own_lengths,
    head_length, scale,
    head_key_group, head_key_token, head_value_group, head_value_token,
    memory_key_row, memory_key_group, memory_value_row, memory_value_group,
    own_key_sequence, own_key_group, own_key_token, own_value_sequence, own_value_group, own_value_token,
    rows_stride,
    SHARED: tl.constexpr, LINES: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one span of one sequence's keys for one KV head."""
    split, group, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    chosen, own = tl.load(row_counts + sequence), tl.load(own_lengths + sequence)
    everything = head_length + chosen + own
    span = tl.cdiv(tl.cdiv(everything, tl.num_programs(0)), BLOCK) * BLOCK
    begin = split * span
    end = tl.minimum(begin + span, everything)

    line, depth = tl.arange(0, LINES), tl.arange(0, DIM)
    heads = tl.num_programs(1) * SHARED
    query_at = (sequence * heads + group * SHARED + line)[:, None] * DIM + depth[None, :]
    q = tl.load(query + query_at, mask=(line < SHARED)[:, None], other=0.0)
    total = tl.zeros([LINES, DIM], tl.float32)
    # The least finite number in place of -inf: differences of it stay numbers.
    top = tl.full([LINES], -3.0e38, tl.float32)
    mass = tl.zeros([LINES], tl.float32)

    for start in range(begin, tl.minimum(end, head_length), BLOCK):
        token = start + tl.arange(0, BLOCK)
        total, top, mass = _take_in(
            q, total, top, mass, head_keys + group * head_key_group, head_values + group * head_value_group,
            token * head_key_token, token * head_value_token, token < tl.minimum(end, head_length),
            scale, PRECISION,
        )  # fmt: skip
    for start in range(tl.maximum(begin, head_length), tl.minimum(end, head_length + chosen), BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < tl.minimum(end, head_length + chosen)
        row = tl.load(rows + sequence * rows_stride + place - head_length, mask=inside, other=0).to(tl.int64)
        total, top, mass = _take_in(
            q, total, top, mass,
            memory_keys + group * memory_key_group, memory_values + group * memory_value_group,
            row * memory_key_row, row * memory_value_row, inside, scale, PRECISION,
        )  # fmt: skip
    for start in range(tl.maximum(begin, head_length + chosen), end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        token = place - head_length - chosen
        total, top, mass = _take_in(
            q, total, top, mass,
            own_keys + sequence * own_key_sequence + group * own_key_group,
            own_values + sequence * own_value_sequence + group * own_value_group,
            token * own_key_token, token * own_value_token, place < end, scale, PRECISION,
        )  # fmt: skip

    share = (sequence * tl.num_programs(1) + group) * tl.num_programs(0) + split
    tl.store(sums + (share * LINES + line)[:, None] * DIM + depth[None, :], total)
    tl.store(norms + share * 2 * LINES + line, top)
    tl.store(norms + (share * 2 + 1) * LINES + line, mass)


@jit("splits")
def _join_kernel(sums, norms, out, splits, SHARED: tl.constexpr, LINES: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: the spans of one sequence and KV head as one attention."""
    group, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    line, depth = tl.arange(0, LINES), tl.arange(0, DIM)
    total = tl.zeros([LINES, DIM], tl.float32)
    top = tl.full([LINES], -3.0e38, tl.float32)
    mass = tl.zeros([LINES], tl.float32)
    base = (sequence * tl.num_programs(0) + group) * splits
    for split in range(splits):
        share = base + split
        part = tl.load(sums + (share * LINES + line)[:, None] * DIM + depth[None, :])
        part_top = tl.load(norms + share * 2 * LINES + line)
        part_mass = tl.load(norms + (share * 2 + 1) * LINES + line)
        larger = tl.maximum(top, part_top)
        fade, weight = tl.exp2(top - larger), tl.exp2(part_top - larger)
        total = total * fade[:, None] + part * weight[:, None]
        mass = mass * fade + part_mass * weight
        top = larger
    total = total / tl.where(mass > 0.0, mass, 1.0)[:, None]
    heads = tl.num_programs(0) * SHARED
    place = (sequence * heads + group * SHARED + line)[:, None] * DIM + depth[None, :]
    tl.store(out + place, total, mask=(line < SHARED)[:, None])
