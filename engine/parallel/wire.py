"""Tensors as one run of bytes, for exchanges between ranks. Nothing that is read is ever executed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msa_memory.errors import EngineError

__all__ = ["as_bytes", "pack", "packed_bytes", "unpack"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
_WORD = 8


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Dtypes, shapes and contents of tensors as uint8 ``[n]`` on the CPU."""
    head = [len(tensors)]
    for tensor in tensors:
        head += [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
    parts = [torch.tensor(head, dtype=torch.int64).view(torch.uint8)]
    return torch.cat([*parts, *map(as_bytes, tensors)])


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's contents as uint8 ``[n]`` on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8) if len(flat) else torch.empty(0, dtype=torch.uint8)


def unpack(data: Tensor) -> list[Tensor]:
    """The tensors that ``pack`` made these bytes of.

    Raises:
        EngineError: the bytes end before their tensors do.
    """
    at = 0

    def take(size: int) -> Tensor:
        nonlocal at
        if at + size > len(data):
            raise EngineError(f"a message of {len(data)} bytes ends before its tensors; expected {at + size}")
        part = data[at : at + size].clone()
        at += size
        return part

    def numbers(count: int) -> list[int]:
        found: list[int] = take(_WORD * count).view(torch.int64).tolist()
        return found

    kinds = []
    for _ in range(numbers(1)[0]):
        code, dim = numbers(2)
        kinds.append((_DTYPES[code], numbers(dim)))
    tensors = []
    for dtype, shape in kinds:
        size = dtype.itemsize
        for edge in shape:
            size *= edge
        tensors.append(take(size).view(dtype).view(shape))
    return tensors


def packed_bytes(contents: int, tensors: int, dims: int) -> int:
    """Bytes of ``contents`` bytes in so many tensors of at most ``dims`` axes, once packed."""
    return contents + _WORD * (1 + tensors * (2 + dims))
