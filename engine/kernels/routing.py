"""Routing: every visible chunk scored against several questions in one pass over the keys of a layer.

With head-mean reduction the score is linear in the query (``ops.fold_queries``), so a pass is one
[chunks, G*D] x [G*D, columns] product whose result never reaches memory: token and passage reductions,
the visibility mask and the top-k of every block of passages happen where it was computed. Tiles of
chunks in which nothing is visible are not read. Head-max routing is left to ``ops.score_chunks``.

Keys may lie in several tensors (the blocks of a ``MemoryBank``): a plan, made once per view of the bank,
says where. Work is cut into ranges of whole passages inside one tensor, and a fixed number of programs
walks over them. Shape letters as in ``engine.ops``; B questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.kernels import FLOATS
from msa_memory.engine.kernels.launching import (
    capability,
    check_floats,
    check_head_dim,
    check_together,
    jit,
    multiprocessors,
    next_power,
)
from msa_memory.engine.kernels.ranking import LARGEST_NUMBER, check_top_k, merge_top, pack
from msa_memory.engine.transfer import sent
from msa_memory.errors import EngineError

__all__ = [
    "KeyBlock",
    "Routed",
    "RoutingPlan",
    "Tiling",
    "plan_routing",
    "quantize_keys",
    "route_questions",
    "route_questions_reference",
]

RANGES_PER_MULTIPROCESSOR = 16  # evens out multiprocessors of unequal speed
WARPS_PER_MULTIPROCESSOR = 16  # two to four programs, which hide each other's waiting
SMALLEST_RANGE = 128  # chunks
LEAST_COLUMNS = 16  # of a matrix instruction
LARGEST_COLUMNS = 128  # question tokens of one product
MOST_QUESTIONS = 32  # of one product: the passage reduction holds several numbers for each in registers
RANKED_ELEMENTS = 1024  # ranks one program holds in registers while it picks the best

QUANTIZED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
QUERY_REDUCTIONS, CHUNK_REDUCTIONS = ("max", "mean", "last"), ("max", "mean")


@dataclass(frozen=True, slots=True)
class KeyBlock:
    """Routing keys of some passages, one after another from row 0.

    ``keys`` ``[L, rows, G, D]`` for L router layers, float or quantised; ``scales`` float32 ``[L, rows]``,
    one factor per chunk, for quantised keys only; ``lengths`` rows of each passage, all at least 1;
    ``numbers`` int64 ``[P]`` passage numbers. Rows behind the last passage are never read.
    """

    keys: Tensor
    lengths: Sequence[int]
    numbers: NDArray[np.int64]
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Where a view's keys lie, ready for the kernel. Holds the blocks, so their memory stays.

    ``places`` int64 ``[R, 4]``: per range, elements from the first block's keys to its first row in layer
    0, elements from one layer to the next, and the same two for scales. ``sizes`` int32 ``[R, 4]``: first
    chunk, chunks, first passage, passages. ``passages`` int32 ``[C]``: the passage of every chunk;
    ``lengths`` and ``numbers`` int32 ``[P]``; ``everything`` uint8 ``[P]`` is a mask that hides nothing.
    """

    blocks: tuple[KeyBlock, ...]
    places: Tensor
    sizes: Tensor
    passages: Tensor
    lengths: Tensor
    numbers: Tensor
    everything: Tensor
    largest_range: int

    @property
    def count(self) -> int:
        """Passages."""
        return self.numbers.shape[0]

    def __reduce__(self) -> tuple[object, ...]:
        """Addresses mean nothing to a copy, or to another process: it plans anew."""
        return plan_routing, (self.blocks,)


@dataclass(frozen=True, slots=True)
class Routed:
    """What one router layer makes of B questions.

    ``scores`` float32 ``[B, P]`` in the plan's order, -inf where masked. ``numbers`` int64 and ``best``
    float32 ``[B, k]``: the best passages first, -1 and -inf where fewer are visible.
    """

    scores: Tensor
    numbers: Tensor
    best: Tensor


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: chunk rows and key columns of a tile, warps and pipeline stages."""

    rows: int
    depth: int
    warps: int
    stages: int


def quantize_keys(keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys ``[..., G, D]`` as int8 or float8_e4m3fn with one scale per chunk, float32 ``[...]``."""
    if dtype not in QUANTIZED:
        raise EngineError(f"routing keys cannot be quantised to {dtype}; expected one of {list(QUANTIZED)}")
    largest = keys.float().abs().amax((-2, -1))
    scales = torch.where(largest > 0, largest / QUANTIZED[dtype], 1.0)
    scaled = keys.float() / scales[..., None, None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def plan_routing(blocks: Sequence[KeyBlock]) -> RoutingPlan:
    """Lay out routing over these blocks, in ranges of whole passages that many programs can share.

    Raises:
        EngineError: no block, blocks of different kinds, or numbers beyond 2**31 - 1.
    """
    if not blocks:
        raise EngineError(
            "a routing plan needs at least one block of keys; without any nothing can be chosen"
        )
    _check_blocks(blocks)
    device = blocks[0].keys.device
    total = sum(int(sum(block.lengths)) for block in blocks)
    share = max(SMALLEST_RANGE, triton.cdiv(total, multiprocessors(device) * RANGES_PER_MULTIPROCESSOR))
    places, sizes, chunk, passage = [], [], 0, 0
    for block in blocks:
        lengths = np.asarray(block.lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        first = np.unique(starts // share, return_index=True)[1]
        last = np.append(first[1:], len(lengths))
        ends = np.append(starts, lengths.sum())
        places.append(_places(block, blocks[0], starts[first]))
        sizes.append(
            np.stack((chunk + starts[first], ends[last] - starts[first], passage + first, last - first), 1)
        )
        chunk, passage = chunk + int(lengths.sum()), passage + len(lengths)
    all_sizes = np.concatenate(sizes)
    all_lengths = np.concatenate([np.asarray(block.lengths, dtype=np.int32) for block in blocks])

    def table(values: NDArray[np.generic], dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype)).to(device)

    return RoutingPlan(
        tuple(blocks),
        table(np.concatenate(places), np.int64),
        table(all_sizes, np.int32),
        table(np.repeat(np.arange(len(all_lengths)), all_lengths), np.int32),
        table(all_lengths, np.int32),
        table(np.concatenate([block.numbers for block in blocks]), np.int32),
        torch.ones(len(all_lengths), dtype=torch.uint8, device=device),
        int(all_sizes[:, 3].max(initial=0)),
    )


def _places(block: KeyBlock, base: KeyBlock, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    keys, scales = block.keys, block.scales
    offset = (keys.data_ptr() - base.keys.data_ptr()) // keys.element_size()
    columns = [offset + rows * keys.stride(1), np.full_like(rows, keys.stride(0))]
    if scales is None or base.scales is None:
        columns += [np.zeros_like(rows)] * 2
    else:
        offset = (scales.data_ptr() - base.scales.data_ptr()) // 4
        columns += [offset + rows, np.full_like(rows, scales.stride(0))]
    return np.stack(columns, 1)


def _check_blocks(blocks: Sequence[KeyBlock]) -> None:
    kinds = {(b.keys.dtype, b.keys.device, len(b.keys), b.keys.shape[2:], b.scales is None) for b in blocks}
    if len(kinds) != 1:
        raise EngineError(f"blocks of {len(kinds)} kinds of routing keys; expected one: {kinds}")
    [(dtype, _, _, (groups, dim), without_scales)] = kinds
    check_head_dim(dim)
    if without_scales != (dtype not in QUANTIZED) or dtype not in (*FLOATS, *QUANTIZED):
        raise EngineError(
            f"routing keys are {dtype} {'without' if without_scales else 'with'} scales; expected a float "
            f"type without, or one of {list(QUANTIZED)} with one scale per chunk (see quantize_keys)"
        )
    for block in blocks:
        packed = block.keys.stride()[1:] == (groups * dim, dim, 1) and block.keys.data_ptr() % 16 == 0
        if not packed or block.keys.stride(0) * block.keys.element_size() % 16:
            raise EngineError(
                f"routing keys of strides {block.keys.stride()} are not packed rows at addresses "
                "divisible by 16; pass them as allocated, or .contiguous()"
            )
        _check_scales(block)
        if len(block.lengths) != len(block.numbers) or sum(block.lengths) > block.keys.shape[1]:
            raise EngineError(
                f"{len(block.numbers)} passages with {len(block.lengths)} lengths over {sum(block.lengths)} "
                f"rows do not fit a block of {block.keys.shape[1]} rows"
            )
        if len(block.lengths) and min(block.lengths) < 1:
            raise EngineError("a passage without chunks cannot be routed to; every length must be at least 1")
        if len(block.numbers) and not 0 <= block.numbers.min() <= block.numbers.max() <= LARGEST_NUMBER:
            raise EngineError(
                f"passage numbers from {block.numbers.min()} to {block.numbers.max()}; the kernels rank "
                f"numbers from 0 to {LARGEST_NUMBER}"
            )


def _check_scales(block: KeyBlock) -> None:
    rows, scales = tuple(block.keys.shape[:2]), block.scales
    if scales is None:
        return
    if scales.dtype != torch.float32 or scales.shape != rows or not scales.is_contiguous():
        raise EngineError(
            f"scales are {scales.dtype} {tuple(scales.shape)}; expected contiguous float32 {rows}"
        )


def route_questions_reference(
    plan: RoutingPlan,
    slot: int,
    queries: Sequence[Tensor],
    *,
    top_k: int,
    scale: float,
    visible: Tensor | None = None,
    query_reduce: str = "max",
    chunk_reduce: str = "max",
) -> Routed:
    """The same in plain torch, question by question, over all heads in float32."""
    keys = torch.cat([_float_keys(block, slot) for block in plan.blocks])
    scores = torch.empty(len(queries), plan.count, device=keys.device)
    for row, query in zip(scores, queries, strict=True):
        chunks = ops.score_chunks(
            query.float(), keys, head_reduce="mean", query_reduce=query_reduce, scale=scale
        )
        if plan.count:
            row[:] = ops.reduce_passages(chunks, plan.lengths.long(), chunk_reduce)
    if visible is not None:
        scores.masked_fill_(~visible, -torch.inf)
    by_number = torch.argsort(plan.numbers)
    order = by_number[torch.argsort(scores[:, by_number], dim=1, descending=True, stable=True)][:, :top_k]
    best = scores.gather(1, order)
    numbers = torch.where(best == -torch.inf, -1, plan.numbers.long()[order])
    short = (0, top_k - order.shape[1])
    pad = torch.nn.functional.pad
    return Routed(scores, pad(numbers, short, value=-1), pad(best, short, value=-torch.inf))


def _float_keys(block: KeyBlock, slot: int) -> Tensor:
    used = int(sum(block.lengths))
    keys = block.keys[slot, :used].float()
    return keys if block.scales is None else keys * block.scales[slot, :used, None, None]


def route_questions(
    plan: RoutingPlan,
    slot: int,
    queries: Sequence[Tensor],
    *,
    top_k: int,
    scale: float,
    visible: Tensor | None = None,
    query_reduce: str = "max",
    chunk_reduce: str = "max",
    tiling: Tiling | None = None,
) -> Routed:
    """Score and rank all visible passages for B questions on router layer ``slot``, heads averaged.

    Args:
        queries: per question its router queries ``[T, H, D]``; T may differ.
        scale: factor on the dot products.
        visible: bool ``[P]`` for all questions or ``[B, P]``; None shows everything.
        tiling: how to cut the product, for measurements; None picks.

    Raises:
        EngineError: no question, a question without tokens, or tensors that do not fit the plan.
    """
    _check_reductions(query_reduce, chunk_reduce)
    _check_queries(queries, visible, plan, slot)
    check_top_k(top_k)
    keys, scales = plan.blocks[0].keys, plan.blocks[0].scales
    questions, passages = len(queries), plan.count
    dtype = keys.dtype if keys.dtype in FLOATS else torch.bfloat16
    folded, columns = _fold(queries, keys.shape[2], query_reduce, dtype)
    tiling = tiling or _tiling(folded.shape[2], columns.questions, folded.shape[3], keys.dtype)
    ranked = RANKED_ELEMENTS // columns.questions
    parts = triton.cdiv(plan.largest_range, ranked)
    ranges = plan.sizes.shape[0]
    scores = torch.empty(passages, questions, device=keys.device)
    ranks = torch.empty(questions, ranges * parts * top_k, dtype=torch.int64, device=keys.device)
    work = ranges * folded.shape[0]
    if passages:
        seen = plan.everything if visible is None else visible.contiguous().view(torch.uint8)
        programs = min(work, multiprocessors(keys.device) * WARPS_PER_MULTIPROCESSOR // tiling.warps)
        _route_kernel[(programs,)](
            keys,
            keys if scales is None else scales,
            folded,
            plan.places,
            plan.sizes,
            plan.passages,
            plan.lengths,
            plan.numbers,
            seen,
            scores,
            ranks,
            slot,
            work,
            folded.shape[0],
            folded.shape[1],
            questions,
            seen.stride(0) if seen.dim() == 2 else 0,
            parts,
            top_k,
            scale,
            folded.shape[3],
            WIDTH=folded.shape[3],
            QUESTIONS=columns.questions,
            TOKENS=columns.tokens,
            ROWS=tiling.rows,
            DEPTH=tiling.depth,
            RANKED=ranked,
            SCALED=scales is not None,
            MEAN=chunk_reduce == "mean",
            STAGES=tiling.stages,
            PRECISION="ieee" if dtype == torch.float32 else "tf32",
            num_warps=tiling.warps,
        )
    numbers, best = merge_top(ranks, top_k)
    return Routed(scores.T, numbers, best)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Which question token stands in which column of the products.

    ``tokens_at`` int64 ``[groups, blocks, questions * tokens]`` counts the tokens of all questions in a
    row. ``questions`` of a group share a pass over the keys; more tokens than a product holds take blocks.
    """

    tokens_at: Tensor
    questions: int
    tokens: int


@lru_cache(maxsize=64)
def _columns(lengths: tuple[int, ...], largest: int, device: torch.device) -> _Columns:
    """A question with fewer tokens than another repeats its last one, which changes no maximum."""
    longest = max(lengths)
    tokens = min(next_power(longest), largest)
    together = max(1, min(next_power(len(lengths)), largest // tokens, MOST_QUESTIONS))
    tokens = max(tokens, LEAST_COLUMNS // together)
    blocks, groups = triton.cdiv(longest, tokens), triton.cdiv(len(lengths), together)
    last = np.cumsum(lengths) - 1
    first = last + 1 - np.asarray(lengths)
    at = np.zeros((groups * together, blocks * tokens), dtype=np.int64)
    at[: len(lengths)] = np.minimum(first[:, None] + np.arange(blocks * tokens), last[:, None])
    shaped = at.reshape(groups, together, blocks, tokens).swapaxes(1, 2).reshape(groups, blocks, -1)
    return _Columns(sent(torch.from_numpy(shaped), device), together, tokens)


def _fold(
    queries: Sequence[Tensor], groups: int, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, _Columns]:
    """Queries summed inside each KV group, side by side: ``[groups, blocks, questions * tokens, F]``.

    Mean and last over tokens are applied here, for they commute with the product.
    """
    if reduction == "mean":
        queries = [query.float().mean(0, keepdim=True) for query in queries]
    elif reduction == "last":
        queries = [query[-1:] for query in queries]
    largest = LARGEST_COLUMNS if dtype != torch.float32 else LARGEST_COLUMNS // 4
    columns = _columns(tuple(len(query) for query in queries), largest, queries[0].device)
    folded = ops.fold_queries(torch.cat(list(queries)).float(), groups)
    return folded.to(dtype)[columns.tokens_at], columns


def _check_reductions(query_reduce: str, chunk_reduce: str) -> None:
    if query_reduce not in QUERY_REDUCTIONS or chunk_reduce not in CHUNK_REDUCTIONS:
        raise EngineError(
            f"reductions {query_reduce!r} over tokens and {chunk_reduce!r} over chunks; expected one of "
            f"{QUERY_REDUCTIONS} and one of {CHUNK_REDUCTIONS}"
        )


def _check_queries(queries: Sequence[Tensor], visible: Tensor | None, plan: RoutingPlan, slot: int) -> None:
    keys = plan.blocks[0].keys
    layers, _, groups, dim = keys.shape
    if not queries:
        raise EngineError("route_questions got no question; it needs at least one")
    if not 0 <= slot < layers:
        raise EngineError(f"router layer slot {slot} is none of the {layers} the keys hold")
    check_together("route_questions", keys, plan.places, *queries, *([] if visible is None else [visible]))
    check_floats("route_questions", *queries)
    for query in queries:
        tokens, heads, width = query.shape
        if not tokens or heads % groups or width != dim:
            raise EngineError(
                f"router queries {tuple(query.shape)} do not fit keys of {groups} heads of {dim}: expected "
                f"at least one token, a multiple of {groups} heads and width {dim}"
            )
    shapes = ((plan.count,), (len(queries), plan.count))
    if visible is not None and (visible.dtype != torch.bool or tuple(visible.shape) not in shapes):
        raise EngineError(
            f"the mask is {visible.dtype} {tuple(visible.shape)}; expected bool, {shapes[0]} or {shapes[1]}"
        )


def _tiling(columns: int, questions: int, width: int, dtype: torch.dtype) -> Tiling:
    """Tiles that keep registers free of spills (tests/engine/test_kernel_compile.py compiles them).

    ``columns`` and ``questions`` of one product; ``width`` of a key row.
    """
    whole = width & -width
    if dtype == torch.float32:
        return Tiling(32, 16, 8, 2)
    depth = min(whole, 64 if dtype in FLOATS else 128)
    if capability() >= 90:
        return Tiling(128, depth, 8 if columns > LEAST_COLUMNS else 4, 3)
    if columns <= 64 and questions <= 8:
        return Tiling(64, depth, 4, 4)
    return Tiling(64, min(32 if questions == 1 else 64, depth), 8, 3)


@jit()
def _larger_of_passage(value, passage, next_value, next_passage):  # type: ignore[no-untyped-def]
    larger = tl.maximum(value, next_value)
    return tl.where(passage == next_passage, larger, next_value), next_passage


@jit()
def _sum_of_passage(value, passage, next_value, next_passage):  # type: ignore[no-untyped-def]
    return tl.where(passage == next_passage, value + next_value, next_value), next_passage


@jit()
def _token_max(  # type: ignore[no-untyped-def]
    keys, columns, row, inside, blocks, width,
    WIDTH: tl.constexpr, QUESTIONS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of ROWS chunks for QUESTIONS questions, the best token of each: ``[ROWS, QUESTIONS]``."""
    best = tl.full([ROWS, QUESTIONS], float("-inf"), tl.float32)
    column = tl.arange(0, QUESTIONS * TOKENS)
    depth = tl.arange(0, DEPTH)
    for block in range(blocks):
        query_at = columns + (block * QUESTIONS * TOKENS + column[None, :]) * WIDTH + depth[:, None]
        key_at = keys + row[:, None] * WIDTH + depth[None, :]
        product = tl.zeros([ROWS, QUESTIONS * TOKENS], tl.float32)
        for start in tl.range(0, width, DEPTH, num_stages=STAGES):
            key = tl.load(key_at + start, mask=inside[:, None]).to(columns.dtype.element_ty)
            query = tl.load(query_at + start)
            product = tl.dot(key, query, product, input_precision=PRECISION)
        if TOKENS > 1:
            best = tl.maximum(best, tl.max(tl.reshape(product, [ROWS, QUESTIONS, TOKENS]), 2))
        else:
            best = tl.maximum(best, product)
    return best


@jit("slot", "work", "groups", "blocks", "questions", "visible_stride", "parts", "top_k")
def _route_kernel(  # type: ignore[no-untyped-def]
    keys,
    scales,
    columns,
    places,
    sizes,
    chunk_passages,
    lengths,
    numbers,
    visible,
    scores,
    ranks,
    slot,
    work,
    groups,
    blocks,
    questions,
    visible_stride,
    parts,
    top_k,
    scale,
    width,
    WIDTH: tl.constexpr,
    QUESTIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANKED: tl.constexpr,
    SCALED: tl.constexpr,
    MEAN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A fixed number of programs shares the work: ranges of passages, each for every group of questions.

    Groups of one range are neighbours in that order, so that they meet its keys in the L2 cache.
    """
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        part, group = item // groups, item % groups
        layer_keys = tl.load(places + part * 4) + slot * tl.load(places + part * 4 + 1)
        range_keys = keys + tl.multiple_of(layer_keys, 16)
        range_columns = columns + group.to(tl.int64) * blocks * QUESTIONS * TOKENS * WIDTH
        first, count = tl.load(sizes + part * 4), tl.load(sizes + part * 4 + 1)
        question = group * QUESTIONS + tl.arange(0, QUESTIONS)
        asked = question < questions

        open_score = tl.zeros([QUESTIONS], tl.float32)  # of the passage that the last tile left unfinished
        open_passage = -1
        for start in range(0, count, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = row < count
            passage = tl.load(chunk_passages + first + row, mask=inside, other=-1)
            following = tl.load(chunk_passages + first + row + 1, mask=row + 1 < count, other=-1)
            see = inside[:, None] & asked[None, :]
            mask_at = question.to(tl.int64)[None, :] * visible_stride + passage[:, None]
            seen = tl.load(visible + mask_at, mask=see, other=0)  # [ROWS, QUESTIONS]
            score = tl.full([ROWS, QUESTIONS], float("-inf"), tl.float32)
            if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:
                score = _token_max(
                    range_keys, range_columns, row, inside, blocks, width,
                    WIDTH, QUESTIONS, TOKENS, ROWS, DEPTH, STAGES, PRECISION,
                )  # fmt: skip
                if SCALED:
                    layer_scales = tl.load(places + part * 4 + 2) + slot * tl.load(places + part * 4 + 3)
                    factor = tl.load(scales + layer_scales + row, mask=inside, other=0.0)
                    score = score * factor[:, None]
                score = score * scale
            same = tl.broadcast_to(passage[:, None], [ROWS, QUESTIONS])
            unfinished = passage == open_passage
            final = row == tl.minimum(start + ROWS, count) - 1
            if MEAN:
                score, _ = tl.associative_scan((score, same), 0, _sum_of_passage)
                score = tl.where(unfinished[:, None], score + open_score[None, :], score)
                open_score = tl.sum(tl.where(final[:, None], score, 0.0), 0)
                chunks = tl.load(lengths + passage, mask=inside, other=1)
                score = score / chunks.to(tl.float32)[:, None]
            else:
                score, _ = tl.associative_scan((score, same), 0, _larger_of_passage)
                larger = tl.maximum(score, open_score[None, :])
                score = tl.where(unfinished[:, None], larger, score)
                open_score = tl.max(tl.where(final[:, None], score, float("-inf")), 0)
            open_passage = tl.max(tl.where(final, passage, -1), 0)
            ends = (passage != following)[:, None] & see
            score_at = passage.to(tl.int64)[:, None] * questions + question[None, :]
            tl.store(scores + score_at, tl.where(seen != 0, score, float("-inf")), mask=ends)

        # Other threads of this program wrote the scores it now ranks.
        tl.debug_barrier()
        range_passage, passages = tl.load(sizes + part * 4 + 2), tl.load(sizes + part * 4 + 3)
        all_parts = work // groups * parts
        for piece in range(parts):
            place = piece * RANKED + tl.arange(0, RANKED)
            here = place < passages
            number = tl.load(numbers + range_passage + place, mask=here, other=0)
            score_at = (range_passage + place).to(tl.int64)[:, None] * questions + question[None, :]
            known = here[:, None] & asked[None, :]
            ranked = pack(tl.load(scores + score_at, mask=known, other=float("-inf")), number[:, None])
            slots = (question.to(tl.int64) * all_parts + part * parts + piece) * top_k
            for index in range(top_k):
                best = tl.max(ranked, 0)
                tl.store(ranks + slots + index, best, mask=asked)
                ranked = tl.where(ranked == best[None, :], -0x8000000000000000, ranked)
