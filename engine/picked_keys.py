"""Exact routing keys of some passages out of many, brought together layer by layer.

One layer of a few hundred passages fits memory that the allocator hands out again and again; all layers at
once would be mapped, and paid for page by page, at every question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["PickedKeys"]


class PickedKeys:
    """Where the keys lie: rows of blocks ``[L, C, G, D]``, and passages' own tensors ``[L, R, G, D]``."""

    def __init__(self) -> None:
        self._sources: list[tuple[Tensor, Tensor] | Tensor] = []
        self._chunks = 0

    def add_rows(self, keys: Tensor, spans: Sequence[tuple[int, int]]) -> None:
        """Chunks from the first to before the second number of each span."""
        rows = torch.cat([torch.arange(start, end) for start, end in spans])
        self._sources.append((keys, rows))
        self._chunks += len(rows)

    def add(self, keys: Tensor) -> None:
        """All chunks of one passage."""
        self._sources.append(keys)
        self._chunks += keys.shape[1]

    def layer(self, slot: int) -> Tensor:
        """Keys ``[C, G, D]`` of one router layer, in the order they were added."""
        first = self._sources[0]
        like = first if isinstance(first, Tensor) else first[0]
        groups, dim = like.shape[2:]
        picked = like.new_empty(self._chunks, groups * dim)
        at = 0
        for source in self._sources:
            if isinstance(source, Tensor):
                rows = source[slot].flatten(1)
                picked[at : at + len(rows)] = rows
                at += len(rows)
            else:
                keys, places = source
                torch.index_select(keys[slot].flatten(1), 0, places, out=picked[at : at + len(places)])
                at += len(places)
        return picked.view(-1, groups, dim)
