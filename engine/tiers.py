"""Where pooled K/V wait until a router chooses them: pinned host memory, or files mapped into it.

A fetch is started as soon as the choice is queued on the device and runs on a stream of its own, beside the
layer's local attention. From pinned memory the host is never asked; mapped files need it once per layer,
to learn the choice. Without CUDA both do the same work at once. Knows passage numbers and rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msa_memory.engine import kernels
from msa_memory.engine.states import PassageStates
from msa_memory.engine.transfer import sent
from msa_memory.errors import EngineError, NotFoundError

__all__ = ["Chosen", "Fetching", "StateTier", "tier_bytes"]

GROWTH = 1024  # passage numbers that the table grows by at least


@dataclass(frozen=True, slots=True)
class Chosen:
    """Pooled keys and values ``[B, room, G, D]`` of B questions, of which ``counts`` int32 ``[B]`` count."""

    keys: Tensor
    values: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class Fetching:
    """A fetch under way; ``wait`` makes the current stream wait for it, not the host."""

    chosen: Chosen
    ready: torch.cuda.Event | None = None

    def wait(self) -> Chosen:
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.chosen.counts.device)
            stream.wait_event(self.ready)
            for tensor in (self.chosen.keys, self.chosen.values, self.chosen.counts):
                tensor.record_stream(stream)
        return self.chosen


class StateTier:
    """Pooled K/V of all passages, row by row, per router layer.

    Args:
        layers, groups, dim: shape of one chunk's states on all router layers.
        rows: chunks it can hold.
        folder: keep them in files there, mapped; None keeps them in host memory, pinned where
            ``device`` is a CUDA device.
    """

    def __init__(
        self,
        layers: int,
        groups: int,
        dim: int,
        rows: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        folder: Path | None = None,
    ) -> None:
        self.device, self.rows, self.used, self.largest = torch.device(device), rows, 0, 0
        self.mapped = folder is not None
        shape = (layers, rows, groups, dim)
        pinned = self.device.type == "cuda" and folder is None
        self._pools = [
            torch.empty(shape, dtype=dtype, pin_memory=pinned)
            if folder is None
            else _mapped(folder / f"{name}.bin", shape, dtype)
            for name in ("keys", "values")
        ]
        self._places = np.zeros((GROWTH, 2), dtype=np.int32)
        self._on_device: Tensor | None = None
        self._like = torch.empty(0, dtype=dtype, device=self.device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return sum(pool[:, : self.used].nbytes for pool in self._pools)

    def make_room(self, chunks: int) -> None:
        """Take so many more chunks without being full: in twice the memory, and without what was removed.

        Raises:
            EngineError: the tier is mapped and too small; files do not grow.
        """
        if self.used + chunks <= self.rows:
            return
        if self.mapped:
            raise EngineError(
                f"the mapped tier holds {self.used} of {self.rows} chunks and cannot take {chunks} more; "
                "make it with more rows"
            )
        if self._stream is not None:
            self._stream.synchronize()  # fetches under way read the old rows
        numbers = np.flatnonzero(self._places[:, 1])
        first, counts = self._places[numbers].astype(np.int64).T
        before = np.cumsum(counts) - counts
        count = int(counts.sum())
        rows = torch.from_numpy(np.repeat(first - before, counts) + np.arange(count))
        self.rows = max(2 * count, count + chunks)
        self._pools = [self._moved(pool, rows) for pool in self._pools]
        self._places[numbers, 0] = before
        self.used, self._on_device = count, None

    def _moved(self, pool: Tensor, rows: Tensor) -> Tensor:
        """Memory of the present size whose first rows are these of another."""
        shape = (len(pool), self.rows, *pool.shape[2:])
        fresh = torch.empty(shape, dtype=pool.dtype, pin_memory=self._stream is not None)
        for old, new in zip(pool, fresh, strict=True):
            torch.index_select(old, 0, rows, out=new[: len(rows)])
        return fresh

    def chunks(self, number: int) -> int:
        """Chunks of a passage; 0 where it is not held."""
        return int(self._places[number, 1]) if 0 <= number < len(self._places) else 0

    def add(self, number: int, states: PassageStates) -> None:
        """Hold a passage's K/V under its number.

        Raises:
            EngineError: the tier is full.
        """
        self.add_rows([number], [states.chunks], states.keys.transpose(1, 2), states.values.transpose(1, 2))

    def add_rows(self, numbers: Iterable[int], chunks: Iterable[int], keys: Tensor, values: Tensor) -> None:
        """Hold several passages' chunks ``[L, M, G, D]``, one passage after another."""
        first = self.used
        if first + keys.shape[1] > self.rows:
            raise EngineError(
                f"the tier holds {first} of {self.rows} chunks and cannot take {keys.shape[1]} more; make it "
                "with more rows"
            )
        for pool, rows in zip(self._pools, (keys, values), strict=True):
            pool[:, first : first + rows.shape[1]] = rows
        for number, count in zip(numbers, chunks, strict=True):
            self._grow(number)
            self._places[number] = (self.used, count)
            self.used += count
            self.largest = max(self.largest, count)
        self._on_device = None

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[L, G, C, D]`` of one passage, in host memory.

        Raises:
            NotFoundError: it is not held.
        """
        first, count = self._places[number].tolist() if number < len(self._places) else (0, 0)
        if not count:
            raise NotFoundError(f"this tier holds no passage {number}")
        keys, values = (pool[:, first : first + count].transpose(1, 2) for pool in self._pools)
        return keys, values

    def remove(self, numbers: Iterable[int]) -> None:
        """Let go of these passages; their rows are zeroed. Unknown numbers are ignored."""
        for number in numbers:
            if number < len(self._places):
                first, count = self._places[number].tolist()
                for pool in self._pools:
                    pool[:, first : first + count] = 0
                self._places[number] = 0
        self._on_device = None

    def fetch(self, slot: int, numbers: Tensor) -> Fetching:
        """Start fetching the chosen passages ``[B, k]`` (-1 for none) of one router layer."""
        room = max(1, numbers.shape[1] * self.largest)
        if self._stream is None:
            return Fetching(self._gather(slot, numbers, room))
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            chosen = self._gather(slot, numbers, room)
            numbers.record_stream(self._stream)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return Fetching(chosen, ready)

    def _gather(self, slot: int, numbers: Tensor, room: int) -> Chosen:
        keys, values = (pool[slot] for pool in self._pools)
        if not self.mapped and kernels.usable(self._like, keys.shape[2]):
            from msa_memory.engine.kernels.gathering import gather_chunks

            return Chosen(*gather_chunks(keys, values, self._table(), numbers, room))
        return self._gather_by_host(keys, values, numbers, room)

    def _gather_by_host(self, keys: Tensor, values: Tensor, numbers: Tensor, room: int) -> Chosen:
        """The host reads the choice, collects the rows and sends them: it waits for the device once."""
        shape, rows = (len(numbers), room, *keys.shape[1:]), []
        for chosen in numbers.tolist():
            places = [self._places[n].tolist() for n in chosen if 0 <= n < len(self._places)]
            rows.append([first + index for first, count in places for index in range(count)])
        pinned = self._stream is not None
        collected: list[Tensor] = []
        for pool in (keys, values):
            out = torch.zeros(shape, dtype=pool.dtype, pin_memory=pinned)
            for index, wanted in enumerate(rows):
                torch.index_select(
                    pool, 0, torch.tensor(wanted, dtype=torch.long), out=out[index, : len(wanted)]
                )
            collected.append(out.to(self.device, non_blocking=True))
        counts = torch.tensor([len(wanted) for wanted in rows], dtype=torch.int32)
        found_keys, found_values = collected
        return Chosen(found_keys, found_values, counts.to(self.device))

    def _table(self) -> Tensor:
        if self._on_device is None:
            self._on_device = sent(torch.from_numpy(self._places), self.device)
        return self._on_device

    def _grow(self, number: int) -> None:
        if number >= len(self._places):
            more = np.zeros(
                (max(GROWTH, number + 1 - len(self._places), len(self._places)), 2), dtype=np.int32
            )
            self._places = np.concatenate((self._places, more))


def tier_bytes(chunks: int, layers: int, groups: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of K and V of so many chunks: what a tier must have room for."""
    return 2 * chunks * layers * groups * dim * dtype.itemsize


def _mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = int(np.prod(shape)) * dtype.itemsize
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as made:
        made.truncate(size)
    return torch.from_file(str(file), shared=True, size=int(np.prod(shape)), dtype=dtype).view(shape)
