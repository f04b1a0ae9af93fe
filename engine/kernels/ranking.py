"""Ranks as sortable numbers, and the merge of partial top-k lists.

A passage with its score is one int64: the score's bits, made ordered, above the complement of the passage
number. Larger is better and equal scores go to the lower number, as in ``engine.bank_view``, so ranking needs
one comparison and no tie rule, and lists of several blocks, devices or hosts merge in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msa_memory.engine.kernels.launching import check_together, jit
from msa_memory.errors import EngineError

__all__ = [
    "EMPTY",
    "LARGEST_NUMBER",
    "LARGEST_TOP_K",
    "Ranked",
    "check_top_k",
    "merge_top",
    "merge_top_reference",
    "pack_scores",
    "unpack_scores",
]

EMPTY = -(1 << 63)
"""The rank of no passage: masked, or a place in a list that is longer than what is visible."""
LARGEST_NUMBER = (1 << 31) - 1
LARGEST_TOP_K = 1024
MERGE_BLOCK = 4096

Ranked = tuple[Tensor, Tensor]
"""Passage numbers int64 ``[B, k]``, -1 where fewer are visible, and their scores float32, -inf there."""


def check_top_k(top_k: int) -> None:
    """Raise EngineError for a ``top_k`` the kernels do not rank."""
    if not 1 <= top_k <= LARGEST_TOP_K:
        raise EngineError(f"top_k is {top_k}; the kernels rank 1 to {LARGEST_TOP_K} passages per question")


def pack_scores(scores: Tensor, numbers: Tensor) -> Tensor:
    """Ranks int64 of float32 ``scores`` and the passage ``numbers`` they belong to; -inf becomes EMPTY."""
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ LARGEST_NUMBER, bits).long()
    return torch.where(scores == -torch.inf, EMPTY, (ordered << 32) | (LARGEST_NUMBER - numbers.long()))


def unpack_scores(ranks: Tensor) -> Ranked:
    """Numbers and scores that ``pack_scores`` made these ranks of."""
    bits = (ranks >> 32).int()
    scores = torch.where(bits < 0, bits ^ LARGEST_NUMBER, bits).view(torch.float32)
    empty = ranks == EMPTY
    numbers = torch.where(empty, -1, LARGEST_NUMBER - (ranks & 0xFFFFFFFF))
    return numbers, torch.where(empty, -torch.inf, scores)


def merge_top_reference(ranks: Tensor, top_k: int) -> Ranked:
    """The same in plain torch."""
    rows, count = ranks.shape
    padded = torch.cat((ranks, ranks.new_full((rows, max(0, top_k - count)), EMPTY)), 1)
    return unpack_scores(padded.sort(1, descending=True).values[:, :top_k])


def merge_top(ranks: Tensor, top_k: int) -> Ranked:
    """The best ``top_k`` of ranks int64 ``[B, n]`` in any order, best first.

    Raises:
        EngineError: ``top_k`` is out of range or the ranks are no int64 matrix.
    """
    check_top_k(top_k)
    check_together("merge_top", ranks)
    if ranks.dtype != torch.int64 or ranks.dim() != 2:
        raise EngineError(f"ranks are {ranks.dtype} {tuple(ranks.shape)}; expected int64 [questions, n]")
    ranks = ranks.contiguous()
    questions = ranks.shape[0]
    numbers = ranks.new_empty(questions, top_k)
    scores = torch.empty(questions, top_k, dtype=torch.float32, device=ranks.device)
    while questions:
        count = ranks.shape[1]
        block = min(MERGE_BLOCK, max(128, triton.next_power_of_2(count)))
        blocks = max(1, triton.cdiv(count, block))
        merged = ranks.new_empty(questions, blocks * top_k)
        _merge_kernel[(questions, blocks)](
            ranks, merged, numbers, scores, count, top_k, LAST=blocks == 1, BLOCK=block, num_warps=8
        )
        if blocks == 1:
            break
        ranks = merged
    return numbers, scores


@jit()
def pack(score, number):  # type: ignore[no-untyped-def]
    """Ranks of float32 scores and int32 numbers; see ``pack_scores``."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    rank = (ordered << 32) | (0x7FFFFFFF - number).to(tl.int64)
    return tl.where(score == float("-inf"), -0x8000000000000000, rank)


@jit("count", "top_k")
def _merge_kernel(ranks, merged, numbers, scores, count, top_k, LAST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: the top_k of one block of one question's ranks; the last level writes them unpacked."""
    question, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(ranks + question * count + place, mask=place < count, other=-0x8000000000000000)
    for index in range(top_k):
        best = tl.max(rank, 0)
        if LAST:
            high = (best >> 32).to(tl.int32)
            score = tl.where(high < 0, high ^ 0x7FFFFFFF, high).to(tl.float32, bitcast=True)
            empty = best == -0x8000000000000000
            number = tl.where(empty, -1, 0x7FFFFFFF - (best & 0xFFFFFFFF))
            tl.store(numbers + question * top_k + index, number)
            tl.store(scores + question * top_k + index, tl.where(empty, float("-inf"), score))
        else:
            tl.store(merged + (question * tl.num_programs(1) + block) * top_k + index, best)
        rank = tl.where(rank == best, -0x8000000000000000, rank)
