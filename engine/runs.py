"""Maxima over consecutive runs of one long vector, such as a passage's chunks among all chunks.

A sparse table (Bender and Farach-Colton, "The LCA Problem Revisited", 2000): maxima of all stretches of 1,
2, 4, ... values by whole-vector operations, then every run as the two stretches that cover it. Three times
as fast on a CPU as reducing run by run, where runs are short.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["RunMaxima"]


class RunMaxima:
    """Runs of ``lengths`` ``[R]``, all at least 1, one after another."""

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        self.total = int(lengths.sum())
        starts = torch.from_numpy(np.cumsum(lengths) - lengths)
        levels = torch.from_numpy(np.frexp(lengths)[1].astype(np.int64) - 1)  # floor(log2)
        self._levels = int(levels.max()) + 1 if len(lengths) else 1
        self._first = levels * self.total + starts
        self._second = self._first + torch.from_numpy(lengths) - (1 << levels)

    def of(self, values: Tensor) -> Tensor:
        """Maxima ``[R]`` of ``values`` ``[sum(lengths)]``."""
        table = values.new_empty(self._levels, self.total)
        table[0] = values
        for level in range(1, self._levels):
            half, end = 1 << (level - 1), self.total - (1 << level) + 1
            narrower = table[level - 1]
            torch.maximum(narrower[:end], narrower[half : half + end], out=table[level, :end])
        flat = table.view(-1)
        return torch.maximum(flat[self._first], flat[self._second])
