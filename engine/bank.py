"""The living bank: routing keys of every passage, resident and scored in fixed blocks.

Knows passage numbers, routing keys and how to fetch a passage's K/V; not texts, documents or SQL. A
``BankView`` is a consistent snapshot with a visibility mask: later adds and removals never reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine import kernels, ops
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.lexical import LexicalIndex, bm25
from msa_memory.engine.states import PassageStates

if TYPE_CHECKING:
    from msa_memory.engine.kernels.routing import RoutingPlan

__all__ = ["BankView", "MemoryBank", "Selection"]

BLOCK_CHUNKS = 4096
Fetch = Callable[[int], PassageStates]
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Selection:
    """Passages one router layer chose for one question: numbers and scores, best first."""

    numbers: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(slots=True)
class _Block:
    """A fixed number of chunk rows per layer; passages are contiguous and never straddle blocks."""

    keys: Tensor  # [L, capacity, G, D]
    numbers: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    used: int = 0

    def fits(self, chunks: int) -> bool:
        return self.used + chunks <= self.keys.shape[1]

    def append(self, number: int, router_keys: Tensor) -> None:
        chunks = router_keys.shape[1]
        self.keys[:, self.used : self.used + chunks] = router_keys
        self.numbers.append(number)
        self.lengths.append(chunks)
        self.used += chunks


@dataclass(frozen=True, slots=True)
class _BlockView:
    keys: Tensor
    lengths: Tensor
    used: int
    numbers: Numbers
    visible: NDArray[np.bool_]


class MemoryBank:
    """Routing keys of all passages in memory, by passage number.

    Not thread-safe: one owner adds and removes; views may be read anywhere. ``fetch`` gives a passage's
    full states when a router layer has chosen it.
    """

    def __init__(self, msa: MSAConfig, fetch: Fetch, *, device: torch.device | str = "cpu") -> None:
        self.msa = msa
        self.fetch = fetch
        self.device = torch.device(device)
        self.lexical = LexicalIndex()
        self._blocks: list[_Block] = []
        self._home: dict[int, _Block] = {}
        self._dead = 0

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, number: int) -> bool:
        return number in self._home

    @property
    def numbers(self) -> tuple[int, ...]:
        """Passage numbers held, ascending."""
        return tuple(sorted(self._home))

    def add(self, number: int, router_keys: Tensor, terms: Tensor | None = None) -> None:
        """Hold a passage's router keys ``[L, R, G, D]`` and terms ``[terms, 2]`` under its number."""
        block = self._room_for(router_keys)
        block.append(number, router_keys)
        self._home[number] = block
        if terms is not None:
            self.lexical.add(number, terms)

    def remove(self, numbers: Iterable[int]) -> None:
        """Stop holding these passages; unknown numbers are ignored. Their rows are zeroed."""
        for block, gone in self._by_block(numbers).items():
            self._rebuild(self._blocks[block], gone)
            self.lexical.remove(gone)
        self._blocks = [block for block in self._blocks if block.numbers]

    def view(self, visible: Numbers | None = None) -> BankView:
        """A snapshot in which only ``visible`` passage numbers (all when None) can be chosen."""
        blocks = []
        for block in self._blocks:
            numbers = np.asarray(block.numbers, dtype=np.int64)
            mask = np.ones(len(numbers), dtype=bool) if visible is None else np.isin(numbers, visible)
            if mask.any():
                lengths = torch.tensor(block.lengths, device=self.device)
                blocks.append(_BlockView(block.keys, lengths, block.used, numbers, mask))
        return BankView(self.msa, tuple(blocks), self.fetch, self.lexical)

    def nbytes(self) -> int:
        """Bytes of resident routing keys."""
        return sum(block.keys.nbytes for block in self._blocks)

    def _room_for(self, router_keys: Tensor) -> _Block:
        layers, chunks, groups, dim = router_keys.shape
        if not self._blocks or not self._blocks[-1].fits(chunks):
            shape = (layers, max(BLOCK_CHUNKS, chunks), groups, dim)
            self._blocks.append(_Block(torch.zeros(shape, dtype=router_keys.dtype, device=self.device)))
        return self._blocks[-1]

    def _by_block(self, numbers: Iterable[int]) -> dict[int, set[int]]:
        places = {id(block): index for index, block in enumerate(self._blocks)}
        gone: dict[int, set[int]] = {}
        for number in numbers:
            home = self._home.pop(number, None)
            if home is not None:
                gone.setdefault(places[id(home)], set()).add(number)
        return gone

    def _rebuild(self, block: _Block, gone: set[int]) -> None:
        """Move the survivors to fresh rows: running views keep the old tensor, the new one has no trace."""
        kept = torch.zeros_like(block.keys)
        numbers, lengths, read, write = [], [], 0, 0
        for number, length in zip(block.numbers, block.lengths, strict=True):
            if number not in gone:
                kept[:, write : write + length] = block.keys[:, read : read + length]
                numbers.append(number)
                lengths.append(length)
                write += length
            read += length
        block.keys, block.numbers, block.lengths, block.used = kept, numbers, lengths, write


class BankView:
    """What one question may see of a bank, frozen at the time it was taken."""

    def __init__(
        self, msa: MSAConfig, blocks: Sequence[_BlockView], fetch: Fetch, lexical: LexicalIndex
    ) -> None:
        self.msa = msa
        self.fetch = fetch
        self._lexical = lexical
        self._blocks = tuple(blocks)
        parts = [block.numbers for block in blocks]
        masks = [block.visible for block in blocks]
        self.numbers: Numbers = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        self.visible = np.concatenate(masks) if masks else np.empty(0, dtype=bool)

    def __len__(self) -> int:
        """Passages that can be chosen."""
        return int(self.visible.sum())

    def without(self, numbers: Iterable[int]) -> BankView:
        """The same snapshot with more passages masked."""
        masked = np.fromiter(numbers, dtype=np.int64)
        blocks = [
            _BlockView(b.keys, b.lengths, b.used, b.numbers, b.visible & ~np.isin(b.numbers, masked))
            for b in self._blocks
        ]
        return BankView(self.msa, blocks, self.fetch, self._lexical)

    def score_words(self, terms: frozenset[int]) -> NDArray[np.float32]:
        """BM25 of all passages of ``numbers`` for a question's terms, 0..1; masked passages score 0."""
        lengths = self._lexical.lengths(self.numbers)
        return bm25(self._lexical.postings(terms), terms, self.numbers, lengths, self.visible)

    def score(self, slot: int, query: Tensor) -> NDArray[np.float32]:
        """Scores of all passages of ``numbers`` for router queries ``[T, H, D]`` on router layer ``slot``.

        Masked passages score -inf. Whole blocks are always scored, so a passage's score does not depend
        on how full its block is.
        """
        if self._blocks and self.msa.head_reduce == "mean" and kernels.usable(query, query.shape[-1]):
            return self._score_in_one_pass(slot, query)
        parts = []
        for block in self._blocks:
            chunks = ops.score_chunks(
                query.float(),
                block.keys[slot].float(),
                head_reduce=self.msa.head_reduce,
                query_reduce=self.msa.query_reduce,
                scale=self.msa.score_scale(query.shape[-1]),
            )
            scores = ops.reduce_passages(chunks[: block.used], block.lengths, self.msa.chunk_reduce)
            parts.append(scores.cpu().numpy())
        scores_all = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
        return np.where(self.visible, scores_all, np.float32(-np.inf))

    @cached_property
    def _plan(self) -> RoutingPlan:
        from msa_memory.engine.kernels.routing import KeyBlock, plan_routing

        return plan_routing([KeyBlock(b.keys, b.lengths.tolist(), b.numbers) for b in self._blocks])

    def _score_in_one_pass(self, slot: int, query: Tensor) -> NDArray[np.float32]:
        from msa_memory.engine.kernels.routing import route_questions

        routed = route_questions(
            self._plan,
            slot,
            [query],
            top_k=1,
            scale=self.msa.score_scale(query.shape[-1]),
            visible=torch.from_numpy(self.visible).to(query.device),
            query_reduce=self.msa.query_reduce,
            chunk_reduce=self.msa.chunk_reduce,
        )
        scores: NDArray[np.float32] = routed.scores[0].cpu().numpy()
        return scores

    def select(self, scores: NDArray[np.float32], k: int) -> Selection:
        """The k best visible passages, fewer when fewer are visible; ties go to the lower number."""
        k = min(k, len(self))
        if k <= 0:
            return Selection((), ())
        floor = np.partition(scores, len(scores) - k)[len(scores) - k]
        candidates = np.flatnonzero((scores >= floor) & self.visible)
        order = np.lexsort((self.numbers[candidates], -scores[candidates]))[:k]
        best = candidates[order]
        return Selection(tuple(self.numbers[best].tolist()), tuple(scores[best].tolist()))

    def gather(self, slot: int, numbers: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled keys and values ``[G, M, D]`` of all chunks of these passages, ascending by number."""
        keys, values = [], []
        for number in sorted(numbers):
            states = self.fetch(number)
            keys.append(states.keys[slot])
            values.append(states.values[slot])
        return (
            torch.cat(keys, dim=1).to(like.device, like.dtype),
            torch.cat(values, dim=1).to(like.device, like.dtype),
        )
