"""Approximate scores of many chunks on a CPU: a fast first look by 8-bit integers, or by bfloat16.

Routing keys are kept a second time as 8-bit integers. The CPU's integer products take them row by row, as a
file holds them, or packed, which is 1.1 to 1.7 times as fast but a copy in memory that takes a while to make.
Where there is neither, bfloat16 products take the keys themselves.

Knows one layer of one block of keys and one question; not passages or masks. Scores come with the size of
their error, so that a caller can settle the best ones on the exact keys (``bank``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from msa_memory.engine import ops

__all__ = ["QuantizedKeys", "QuantizedQuery", "score_bfloat16", "usable"]

LEVELS = 127
MIDDLE = 128
"""What stands for 0 in queries on packed keys, which are taken unsigned."""
DEVIATIONS = 6.0
"""Rounding errors of single components are independent: their sum passes 6 standard deviations about once
in a billion."""


@dataclass(frozen=True, slots=True)
class QuantizedQuery:
    """Router queries of one question: ``folded`` ``[T, F]``, and as int8 ``values`` in units of ``step``."""

    folded: Tensor
    values: Tensor
    unsigned: Tensor
    """The values as uint8 around 128."""
    step: float
    norm: float
    """Length of the longest folded query."""

    @classmethod
    def of(cls, query: Tensor, groups: int, query_reduce: str) -> QuantizedQuery:
        """Quantise router queries ``[T, H, D]``; reductions that commute with the product happen here."""
        if query_reduce == "last":
            query = query[-1:]
        folded = ops.fold_queries(query.float(), groups)
        if query_reduce == "mean":
            folded = folded.mean(0, keepdim=True)
        step = float(folded.abs().max()) / LEVELS or 1.0
        values = (folded / step).round_().to(torch.int8)
        unsigned = values.view(torch.uint8) ^ MIDDLE
        return cls(folded, values, unsigned, step, float(folded.norm(dim=-1).max()))


@dataclass(frozen=True, slots=True)
class QuantizedKeys:
    """Routing keys of C chunks on one layer: ``levels`` int8 ``[C, F]``, one scale per chunk.

    Where ``packed``, the levels are in oneDNN's own layout.
    """

    levels: Tensor
    scales: Tensor
    largest_scale: float
    largest_norm: float
    packed: bool = False

    @classmethod
    def of(cls, keys: Tensor) -> QuantizedKeys:
        """Quantise keys ``[C, G, D]``."""
        rows = keys.flatten(1).float()
        largest = rows.abs().amax(1)
        scales = torch.where(largest > 0, largest / LEVELS, 1.0)
        norm = float(rows.norm(dim=1).max())
        levels = (rows / scales[:, None]).round_().to(torch.int8)
        return cls(levels, scales, float(largest.max()) / LEVELS, norm)

    def pack(self) -> QuantizedKeys:
        """The same keys, packed."""
        packed = torch.ops.onednn.qlinear_prepack(self.levels, None)
        return replace(self, levels=packed, packed=True)

    @property
    def nbytes(self) -> int:
        return self.levels.numel() + self.scales.nbytes

    def score(self, query: QuantizedQuery, out: Tensor, scale: float = 1.0) -> None:
        """Write approximate scores, ``scale`` times the best token's, to float32 ``out`` ``[C]``.

        A shorter ``out`` takes those of the first chunks.
        """
        if not self.packed:
            best = torch._int_mm(query.values, self.levels.T).amax(0)
            torch.mul(best[: len(out)], self.scales[: len(out)], out=out).mul_(query.step * scale)
            return
        products: Tensor = torch.ops.onednn.qlinear_pointwise.default(  # [T, C]
            query.unsigned, query.step * scale, MIDDLE, self.levels, self.scales, _zeros(len(self.scales)),
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        torch.amax(products[:, : len(out)], 0, out=out)

    def error(self, query: QuantizedQuery) -> float:
        """By how much a score may differ from the exact one: 6 standard deviations of the rounding."""
        component = math.hypot(query.norm * self.largest_scale, self.largest_norm * query.step)
        return DEVIATIONS * component / math.sqrt(12)


def score_bfloat16(query: QuantizedQuery, keys: Tensor) -> tuple[Tensor, float] | None:
    """Approximate scores float32 ``[C]`` of bfloat16 keys ``[C, G, D]`` of unit length, and their error.

    None for other keys, or on a CPU without such products.
    """
    if keys.dtype != torch.bfloat16 or not torch.cpu._is_avx512_bf16_supported():
        return None
    products = query.folded.bfloat16() @ keys.flatten(1).T  # [T, C]
    # Queries and products are rounded by at most 1/512 of their size, the keys' own rounding included.
    return products.amax(0).float(), query.norm * math.sqrt(keys.shape[1]) * 1.01 / 256


@lru_cache(maxsize=8)
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


@lru_cache(maxsize=1)
def usable() -> bool:
    """Whether this CPU multiplies 8-bit integers without loss and this torch uses it.

    Older CPUs saturate sums of two products at 16 bits, which the trial's largest values would show; the
    float32 scores are faster there anyway.
    """
    if not torch.cpu._is_vnni_supported() or not torch.backends.mkldnn.is_available():
        return False
    query = QuantizedQuery.of(torch.full((2, 2, 64), 2.0 * LEVELS), 2, "max")
    found = torch.empty(2, 32)
    try:
        keys = QuantizedKeys.of(torch.full((32, 2, 64), 1.0))
        keys.score(query, found[0])
        keys.pack().score(query, found[1])
    except (AttributeError, RuntimeError):  # a torch without these products
        return False
    return bool(torch.allclose(found, torch.tensor(128.0 * LEVELS), rtol=1e-6))
