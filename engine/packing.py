"""Weights packed for decoding, which reads every weight once per token: 4 bits where they came so, else 8.

A matrix whose groups of 32 hold at most 16 evenly spaced values was stored in 4 bits (GGUF's Q4_1) and is
kept so, exactly up to the rounding of two bfloat16 numbers per group. Any other matrix gets 8 bits with a
scale per row. A low-rank change is kept beside the matrix it belongs to. CPU only; knows no layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LinearMap", "LowRank", "PackedMap", "PlainMap", "pack", "pack_rows", "packable"]

GROUP = 32
BLOCK = 32
"""torch's kernels read past the end of matrices whose sizes are not whole blocks."""
LEVELS = 15
ROWS = 1024
"""Rows converted at a time: what fits a cache converts faster."""
ROUNDING = 2.0**-7
"""How far a stored weight may lie from its level, as a part of its group's largest: bfloat16's own rounding
of the weight and of the two ends that the levels are worked out from."""

LowRank = tuple[Tensor, Tensor]
"""A ``[rank, in]`` and B ``[out, rank]``, already scaled: the change is ``B @ A``."""


class PlainMap:
    """``x @ W.T + bias`` in the weight's own dtype."""

    rows_alike = False
    """Whether a row's result is the same bits whatever rows it is computed with."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    @property
    def bits(self) -> int:
        return 8 * self.weight.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Int4:
    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        self.levels = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous()  # [in/32, out, 2]

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.levels)
        return out


class _Int8:
    """Rows are filled up to whole blocks, which the kernel needs; ``in`` has to be whole blocks already."""

    def __init__(self, weight: Tensor) -> None:
        self.rows = len(weight)
        weight = F.pad(weight, (0, 0, 0, -self.rows % BLOCK))
        low, high = weight.aminmax(dim=1)
        largest = torch.maximum(-low, high).float().clamp_min(torch.finfo(torch.float32).tiny)
        self.scales = (largest / 127).to(weight.dtype)  # the codes are of the scales as they are kept
        self.codes = torch.empty(weight.shape, dtype=torch.int8)
        rows = zip(weight.split(ROWS), self.scales.float()[:, None].split(ROWS), strict=True)
        for part, (values, scales) in zip(self.codes.split(ROWS), rows, strict=True):
            part.copy_((values.float() / scales).round_().clamp_(-127, 127))

    def __call__(self, x: Tensor) -> Tensor:
        out = torch._weight_int8pack_mm(x, self.codes, self.scales)
        return out if self.rows == len(self.codes) else out[:, : self.rows]


class PackedMap:
    """``x @ (W + B @ A).T + bias`` with W in 4 or 8 bits and the change in 8."""

    rows_alike = True

    def __init__(self, weight: _Int4 | _Int8, change: LowRank | None, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.change = (_Int8(change[0]), _Int8(change[1])) if change is not None else None

    def __call__(self, x: Tensor) -> Tensor:
        out = self.weight(x)
        if self.change is not None:
            out += self.change[1](self.change[0](x))
        if self.bias is not None:
            out += self.bias
        return out

    @property
    def bits(self) -> int:
        """Bits per weight of the matrix, scales aside."""
        return 4 if isinstance(self.weight, _Int4) else 8


LinearMap = PlainMap | PackedMap


def packable(weight: Tensor) -> bool:
    """Whether torch's kernels take a matrix ``[out, in]`` of this type and shape."""
    return weight.dtype == torch.bfloat16 and not any(size % BLOCK for size in weight.shape)


def pack(
    base: Sequence[Tensor],
    merged: Sequence[Tensor],
    changes: Sequence[LowRank | None],
    bias: Tensor | None = None,
) -> PackedMap:
    """One map of several bfloat16 matrices ``[out_i, in]`` that read the same input, stacked by rows.

    Args:
        base: the matrices as the checkpoint stores them.
        merged: the same with their low-rank change; read where ``base`` was not stored in 4 bits.
        changes: each matrix's change, None where it has none.
    """
    found = [_four_bits(weight) for weight in base]
    kept = [levels for levels in found if levels is not None]
    if len(kept) < len(found):
        return PackedMap(_Int8(torch.cat(tuple(merged))), None, bias)
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return PackedMap(_Int4(codes, scales, zeros), _stacked(base, changes), bias)


def pack_rows(weight: Tensor) -> PackedMap:
    """One bfloat16 matrix ``[out, in]`` in 8 bits, whatever it was stored in."""
    return PackedMap(_Int8(weight), None, None)


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes 0..15 ``[out, in]`` with scales and zeros ``[out, in/32]``; None where it takes more bits.

    A weight is ``(code - 8) * scale + zero``.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / LEVELS
    codes = ((groups - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    error = torch.addcmul(low, codes, step).sub_(groups).abs_().amax(-1, keepdim=True)
    if bool((error > ROUNDING * torch.maximum(low.abs(), high.abs())).any()):
        return None
    zero = low + 8 * step
    return codes.flatten(1).to(torch.uint8), step[..., 0].to(weight.dtype), zero[..., 0].to(weight.dtype)


def _stacked(weights: Sequence[Tensor], changes: Sequence[LowRank | None]) -> LowRank | None:
    """The changes of stacked matrices as one: A's below each other, B's along the diagonal."""
    if not any(change is not None for change in changes):
        return None
    a = [change[0] for change in changes if change is not None]
    rows = [
        change[1] if change is not None else weight.new_zeros(len(weight), 0)
        for weight, change in zip(weights, changes, strict=True)
    ]
    down, up = torch.cat(a), torch.block_diag(*rows)
    missing = -len(down) % BLOCK
    return F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))
