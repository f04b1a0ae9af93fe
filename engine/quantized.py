"""Approximate scores of many chunks on a CPU: a fast first look by 8-bit integers, or by bfloat16.

Routing keys are kept a second time as 8-bit integers, packed for the CPU's integer products. Where no such
copy was made yet, bfloat16 products take the keys as they are.

Knows one layer of one block of keys and one question; not passages or masks. Scores come with the size of
their error, so that a caller can settle the best ones on the exact keys (``bank``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from msa_memory.engine import ops

__all__ = ["QuantizedKeys", "QuantizedQuery", "score_bfloat16", "usable"]

LEVELS = 127
MIDDLE = 128
"""What stands for 0 in the queries, which these products take unsigned; the keys are signed."""
DEVIATIONS = 6.0
"""Rounding errors of single components are independent: their sum passes 6 standard deviations about once
in a billion."""


@dataclass(frozen=True, slots=True)
class QuantizedQuery:
    """Router queries of one question, ``folded`` ``[T, F]``, and their ``values``: uint8 around 128, in units
    of ``step``.
    """

    folded: Tensor
    values: Tensor
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
        values = (folded / step).round_().add_(MIDDLE).to(torch.uint8)
        return cls(folded, values, step, float(folded.norm(dim=-1).max()))


@dataclass(frozen=True, slots=True)
class QuantizedKeys:
    """Routing keys of C chunks on one layer, one scale per chunk; ``packed`` is oneDNN's own layout."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    largest_scale: float
    largest_norm: float

    @classmethod
    def of(cls, keys: Tensor) -> QuantizedKeys:
        """Quantise and pack keys ``[C, G, D]``."""
        rows = keys.flatten(1).float()
        largest = rows.abs().amax(1)
        scales = torch.where(largest > 0, largest / LEVELS, 1.0)
        norm = float(rows.norm(dim=1).max())
        levels = (rows / scales[:, None]).round_().to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(levels, None)
        zeros = torch.zeros(len(scales), dtype=torch.int32)
        return cls(packed, scales, zeros, float(largest.max()) / LEVELS, norm)

    @property
    def nbytes(self) -> int:
        return self.packed.numel() + self.scales.nbytes + self.zeros.nbytes

    def score(self, query: QuantizedQuery) -> Tensor:
        """Approximate scores of all chunks, the best token of each: float32 ``[C]``."""
        products: Tensor = torch.ops.onednn.qlinear_pointwise.default(
            query.values, query.step, MIDDLE, self.packed, self.scales, self.zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return products.amax(0)

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


@lru_cache(maxsize=1)
def usable() -> bool:
    """Whether this CPU multiplies 8-bit integers without loss and this torch uses it.

    Older CPUs saturate sums of two products at 16 bits, which the trial's largest values would show; the
    float32 scores are faster there anyway.
    """
    if not torch.cpu._is_vnni_supported() or not torch.backends.mkldnn.is_available():
        return False
    query = QuantizedQuery(
        torch.full((2, 128), 127.0), torch.full((2, 128), 255, dtype=torch.uint8), 1.0, 1.0
    )
    try:
        found = QuantizedKeys.of(torch.full((32, 2, 64), 1.0)).score(query)
    except (AttributeError, RuntimeError):  # operators of a torch without oneDNN
        return False
    expected = LEVELS * LEVELS * 128 * torch.tensor(1.0) / LEVELS
    return bool(torch.allclose(found, expected.expand(32), rtol=1e-6))
