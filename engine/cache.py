"""Preallocated key/value caches of one running sequence, one per layer.

The memory a router layer attends to sits in front of the sequence's own tokens, so attention always
reads one contiguous slice and nothing is concatenated while decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msa_memory.engine.states import HeadStates

__all__ = ["LayerCache", "SequenceCache"]


class LayerCache:
    """K and V of one layer: ``[G, room for memory | own tokens, D]``; both parts grow in place."""

    def __init__(self, kv_heads: int, head_dim: int, capacity: int, like: Tensor) -> None:
        self.front = 0
        self.memory = 0
        self.length = 0
        self.keys = like.new_empty(kv_heads, capacity, head_dim)
        self.values = torch.empty_like(self.keys)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add T own tokens, ``[T, G, D]`` each."""
        tokens = keys.shape[0]
        if self.front + self.length + tokens > self.keys.shape[1]:
            self._resize(self.front, max(2 * self.length, self.length + tokens + 64))
        part = slice(self.front + self.length, self.front + self.length + tokens)
        self.keys[:, part] = keys.transpose(0, 1)
        self.values[:, part] = values.transpose(0, 1)
        self.length += tokens

    def set_memory(self, keys: Tensor, values: Tensor) -> None:
        """Replace the memory in front by ``[G, M, D]`` pooled keys and values."""
        size = keys.shape[1]
        if size > self.front:
            self._resize(size, self.keys.shape[1] - self.front)
        part = slice(self.front - size, self.front)
        self.keys[:, part] = keys
        self.values[:, part] = values
        self.memory = size

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[G, memory + length, D]`` to attend to."""
        part = slice(self.front - self.memory, self.front + self.length)
        return self.keys[:, part], self.values[:, part]

    def truncate(self, length: int) -> None:
        """Forget own tokens from ``length`` on."""
        self.length = min(self.length, length)

    def _resize(self, front: int, capacity: int) -> None:
        groups, _, dim = self.keys.shape
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(groups, front + capacity, dim)
            kept = slice(self.front - self.memory, self.front + self.length)
            new[:, front - self.memory : front + self.length] = old[:, kept]
            setattr(self, name, new)
        self.front = front


class SequenceCache:
    """The caches of all layers of one sequence, started with the template head's states."""

    def __init__(self, head: HeadStates, capacity: int) -> None:
        layers, groups, _, dim = head.keys.shape
        self.layers = [LayerCache(groups, dim, head.length + capacity, head.keys) for _ in range(layers)]
        for index, layer in enumerate(self.layers):
            layer.append(head.keys[index].transpose(0, 1), head.values[index].transpose(0, 1))

    @property
    def length(self) -> int:
        """Own tokens held, the head included."""
        return self.layers[-1].length

    def truncate(self, length: int) -> None:
        """Forget own tokens from ``length`` on, in every layer."""
        for layer in self.layers:
            layer.truncate(length)
