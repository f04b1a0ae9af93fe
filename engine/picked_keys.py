"""Exact routing keys of some passages out of many, brought together tile by tile.

A tile fits the CPU's cache, and every tile takes the place of the one before: fresh memory would be mapped,
and paid for page by page.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["PickedKeys"]


class PickedKeys:
    """Where the keys lie: rows of blocks ``[L, C, G, D]``, and passages' own tensors ``[L, R, G, D]``."""

    def __init__(self) -> None:
        self._sources: list[tuple[Tensor, Tensor | None]] = []
        """Keys, and which of their chunks; None for all of them."""

    def add_rows(self, keys: Tensor, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        """Chunks from each start to before its end."""
        lengths = ends - starts
        shifts = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
        self._sources.append((keys, torch.from_numpy(shifts + np.arange(len(shifts)))))

    def add(self, keys: Tensor) -> None:
        """All chunks of one passage."""
        self._sources.append((keys, None))

    def tiles(self, slot: int, size: int) -> Iterator[Tensor]:
        """Keys ``[size, G, D]`` of one router layer in the order they were added, fewer in the last tile.

        A tile is good until the next one is asked for.
        """
        like = self._sources[0][0]
        groups, dim = like.shape[2:]
        tile, filled = like.new_empty(size, groups * dim), 0
        for keys, places in self._sources:
            rows, taken = keys[slot].flatten(1), 0
            total = len(rows) if places is None else len(places)
            while taken < total:
                count = min(total - taken, size - filled)
                part = tile[filled : filled + count]
                if places is None:
                    part.copy_(rows[taken : taken + count])
                else:
                    torch.index_select(rows, 0, places[taken : taken + count], out=part)
                taken, filled = taken + count, filled + count
                if filled == size:
                    yield tile.view(size, groups, dim)
                    filled = 0
        if filled:
            yield tile[:filled].view(filled, groups, dim)
