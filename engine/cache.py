"""Preallocated key/value caches of one running sequence, one per layer.

The memory a router layer attends to sits in front of the sequence's own tokens, so attention always
reads one contiguous slice and nothing is concatenated while decoding.
"""

from __future__ import annotations

from torch import Tensor

from msa_memory.engine.states import HeadStates

__all__ = ["LayerCache", "SequenceCache"]


class LayerCache:
    """K and V of one layer: ``[G, room for memory | own tokens, D]``; both parts grow in place."""

    def __init__(self, kv_heads: int, head_dim: int, capacity: int, like: Tensor) -> None:
        self.front = 0
        self.memory = 0
        self.length = 0
        self.unfilled: Tensor | None = None
        """How many of the memory's first keys mean nothing, ``[]``, as long as only the device knows."""
        self._hold(like.new_empty(2 * kv_heads, capacity, head_dim))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add T own tokens, ``[T, G, D]`` each."""
        part = self._room_for(keys.shape[0])
        self.keys[:, part] = keys.transpose(0, 1)
        self.values[:, part] = values.transpose(0, 1)

    def append_joined(self, both: Tensor) -> None:
        """Add T own tokens whose keys and values are one tensor ``[T, 2G, D]``: one copy instead of two."""
        part = self._room_for(both.shape[0])
        self._both[:, part] = both.transpose(0, 1)

    def set_memory(self, keys: Tensor, values: Tensor, unfilled: Tensor | None = None) -> None:
        """Replace the memory in front by ``[G, M, D]`` pooled keys and values.

        Where the host does not know yet how many there are, ``unfilled`` says how many of the first are
        none, until ``keep_memory`` drops those.
        """
        size = keys.shape[1]
        if size > self.front:
            self._resize(size, self.keys.shape[1] - self.front)
        part = slice(self.front - size, self.front)
        self.keys[:, part] = keys
        self.values[:, part] = values
        self.memory, self.unfilled = size, unfilled

    def keep_memory(self, size: int) -> None:
        """Keep the last so many of the memory's keys and values."""
        self.memory, self.unfilled = min(self.memory, size), None

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[G, memory + length, D]`` to attend to."""
        part = slice(self.front - self.memory, self.front + self.length)
        return self.keys[:, part], self.values[:, part]

    def own(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[G, length, D]`` of the own tokens alone."""
        part = slice(self.front, self.front + self.length)
        return self.keys[:, part], self.values[:, part]

    def in_memory(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[G, memory, D]`` of the memory alone."""
        part = slice(self.front - self.memory, self.front)
        return self.keys[:, part], self.values[:, part]

    def truncate(self, length: int) -> None:
        """Forget own tokens from ``length`` on."""
        self.length = min(self.length, length)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, the room for more included."""
        return self._both.nbytes

    def _room_for(self, tokens: int) -> slice:
        """Where the next own tokens go."""
        start = self.front + self.length
        if start + tokens > self._both.shape[1]:
            self._resize(self.front, max(2 * self.length, self.length + tokens + 64))
        self.length += tokens
        return slice(start, start + tokens)

    def _resize(self, front: int, capacity: int) -> None:
        rows, _, dim = self._both.shape
        new = self._both.new_empty(rows, front + capacity, dim)
        kept = slice(self.front - self.memory, self.front + self.length)
        new[:, front - self.memory : front + self.length] = self._both[:, kept]
        self._hold(new)
        self.front = front

    def _hold(self, both: Tensor) -> None:
        """Keys and values ``[2G, room, D]``."""
        self._both = both
        self.keys, self.values = both.chunk(2)


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

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, the room for more included."""
        return sum(layer.nbytes for layer in self.layers)

    def truncate(self, length: int) -> None:
        """Forget own tokens from ``length`` on, in every layer."""
        for layer in self.layers:
            layer.truncate(length)
