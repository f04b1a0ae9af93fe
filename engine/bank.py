"""The living bank: routing keys of every passage, resident and scored in fixed blocks.

On a CPU with integer products, blocks that are full have a second, 8-bit copy of their keys (``quantized``).
It scores all passages approximately; those near the best are settled on the exact keys, so that what is
chosen, and every score of it, is the exact one. A bank told to be ``exact`` never looks at that copy.

Knows passage numbers, routing keys and how to fetch a passage's K/V; not texts, documents or SQL. A
``BankView`` is a consistent snapshot with a visibility mask: later adds and removals never reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine import kernels, ops
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.lexical import LexicalIndex, bm25
from msa_memory.engine.quantized import QuantizedKeys, QuantizedQuery, score_bfloat16, usable
from msa_memory.engine.states import PassageStates

if TYPE_CHECKING:
    from msa_memory.engine.kernels.routing import RoutingPlan

__all__ = ["BankView", "MemoryBank", "Selection"]

BLOCK_CHUNKS = 4096
TILE_CHUNKS = 512
"""Chunks of one exact product on a CPU, whose keys and results fit its cache."""
SKIM_EVERY, SKIM_FIRST = 5, 3
"""A skim scores the fourth router layer and every fifth after it. On 13,359 passages of real text (default
model) all 16 best of each of 60 questions were among the 512 that those three layers put first."""
SKIM_KEPT = 512
"""Passages that a skim leaves for the exact scores of all layers."""
SKIM_BELOW = 2.0
"""What the estimates of the others are lowered by: cosines differ by at most that."""
SETTLED = 128
"""Most relevant passages whose scores are exact on every layer."""
LEAST_SETTLED = 32
"""Best passages of one layer whose scores are exact, however few are asked for."""
Fetch = Callable[[int], PassageStates]
Numbers = NDArray[np.int64]
Postings = Mapping[int, tuple[Numbers, Numbers]]


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
    quantized: dict[int, QuantizedKeys] = field(default_factory=dict)
    """By layer slot, made while the block is full; a changed block starts with none."""

    def fits(self, chunks: int) -> bool:
        return self.used + chunks <= self.keys.shape[1]

    def append(self, number: int, router_keys: Tensor) -> None:
        chunks = router_keys.shape[1]
        self.keys[:, self.used : self.used + chunks] = router_keys
        self.numbers.append(number)
        self.lengths.append(chunks)
        self.used += chunks
        self.quantized = {}  # of a block that was full once, before later ones went


@dataclass(frozen=True, slots=True)
class _BlockView:
    keys: Tensor
    lengths: Tensor
    used: int
    numbers: Numbers
    visible: NDArray[np.bool_]
    quantized: dict[int, QuantizedKeys]
    full: bool

    def quantize(self, slot: int) -> QuantizedKeys:
        """The 8-bit copy of one layer, made at the first call."""
        if slot not in self.quantized:
            self.quantized[slot] = QuantizedKeys.of(self.keys[slot])
        return self.quantized[slot]


class MemoryBank:
    """Routing keys of all passages in memory, by passage number.

    Not thread-safe: one owner adds and removes; views may be read anywhere. ``fetch`` gives a passage's
    full states when a router layer has chosen it. ``exact``: every score comes from the keys as they are.
    ``skim_from``: chunks from which on questions ``skim``; None, the default, never.
    """

    skim_from: int | None = None

    def __init__(
        self, msa: MSAConfig, fetch: Fetch, *, device: torch.device | str = "cpu", exact: bool = False
    ) -> None:
        self.msa = msa
        self.exact = exact
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
        quantizes = self._quantizes()
        for block in self._blocks:
            numbers = np.asarray(block.numbers, dtype=np.int64)
            mask = np.ones(len(numbers), dtype=bool) if visible is None else np.isin(numbers, visible)
            if mask.any():
                lengths = torch.tensor(block.lengths, device=self.device)
                full = quantizes and block is not self._blocks[-1]
                blocks.append(
                    _BlockView(block.keys, lengths, block.used, numbers, mask, block.quantized, full)
                )
        view = BankView(self.msa, tuple(blocks), self.fetch, self.lexical)
        chunks = sum(block.used for block in blocks)
        suited = self.msa.router_normalize and not self.exact and len(self.msa.router_layers) > SKIM_FIRST
        view.skims = suited and self.skim_from is not None and chunks >= self.skim_from
        return view

    def quantize(self) -> None:
        """Make the 8-bit copies of all full blocks now, which questions else do one block at a time."""
        for block in self.view()._blocks if self._quantizes() else ():
            for slot in range(len(block.keys) if block.full else 0):
                block.quantize(slot)

    def nbytes(self) -> int:
        """Bytes of resident routing keys, their 8-bit copies included."""
        copies = [copy.nbytes for block in self._blocks for copy in block.quantized.values()]
        return sum(block.keys.nbytes for block in self._blocks) + sum(copies)

    def _quantizes(self) -> bool:
        suitable = self.device.type == "cpu" and self.msa.head_reduce == "mean"
        return suitable and not self.exact and usable()

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
        block.quantized = {}


class BankView:
    """What one question may see of a bank, frozen at the time it was taken."""

    skims = False
    """Whether questions that attend to no memory should ``skim`` instead of scoring layer by layer."""

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
        blocks = [replace(b, visible=b.visible & ~np.isin(b.numbers, masked)) for b in self._blocks]
        view = BankView(self.msa, blocks, self.fetch, self._lexical)
        view.skims = self.skims
        return view

    def score_words(self, terms: frozenset[int]) -> NDArray[np.float32]:
        """BM25 of all passages of ``numbers`` for a question's terms, 0..1; masked passages score 0."""
        lengths, postings = self.words(terms)
        return bm25(postings, terms, self.numbers, lengths, self.visible)

    def words(self, terms: Iterable[int]) -> tuple[NDArray[np.float32], Postings]:
        """What ``score_words`` goes by: words per passage of ``numbers``, and the postings of these terms."""
        return self._lexical.lengths(self.numbers), self._lexical.postings(terms)

    def score(self, slot: int, query: Tensor, *, best: int | None = None) -> NDArray[np.float32]:
        """Scores of all passages of ``numbers`` for router queries ``[T, H, D]`` on router layer ``slot``.

        Masked passages score -inf. Products have one shape, so a passage's score does not depend on the
        others, nor on how full its block is. With ``best`` only that many of the highest need be exact, and
        at least 32 are; the others may come from 8-bit keys, with small errors.
        """
        if self._blocks and self.msa.head_reduce == "mean" and kernels.usable(query, query.shape[-1]):
            return self._score_in_one_pass(slot, query)
        if best is not None and any(block.full for block in self._blocks):
            return self._score_quantized(slot, query, max(best, LEAST_SETTLED))
        parts = [self._score_block(block, slot, query) for block in self._blocks]
        scores = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
        return np.where(self.visible, scores, np.float32(-np.inf))

    def settle(
        self, scores: NDArray[np.float32], queries: Sequence[Tensor], bonus: NDArray[np.float32] | float = 0.0
    ) -> NDArray[np.float32]:
        """Scores ``[L, P]`` with those of the most relevant passages exact on every layer.

        Relevant is what has the highest mean over the layers, plus ``bonus`` ``[P]``. ``queries`` are each
        layer's router queries.
        """
        if self.skims or not any(block.full for block in self._blocks):
            return scores  # exact where it matters
        chosen = _highest(scores.mean(0) + bonus, SETTLED)
        settled = scores.copy()
        for slot, query in enumerate(queries):
            settled[slot, chosen] = self._score_some(slot, query, chosen)
        return settled

    def skim(
        self, queries: Sequence[Tensor], bonus: NDArray[np.float32] | float = 0.0
    ) -> NDArray[np.float32]:
        """Scores ``[L, P]`` of all layers, from a full pass over a few of them.

        The 512 passages with the highest mean over those layers, plus ``bonus`` ``[P]``, get their exact
        scores on every layer. The others keep that mean, lowered by 2 so that none comes before those 512.
        Their choice depends on nothing but the visible passages' keys: there is no index to build, to keep
        or to erase.
        """
        first = range(min(SKIM_FIRST, len(queries) - 1), len(queries), SKIM_EVERY)
        rough = np.mean([self.score(slot, queries[slot], best=1) for slot in first], axis=0)
        chosen = _highest(rough + bonus, SKIM_KEPT)
        scores = np.repeat((rough - np.float32(SKIM_BELOW))[None], len(queries), axis=0)
        for slot, query in enumerate(queries):
            scores[slot, chosen] = self._score_some(slot, query, chosen)
        return scores

    def _score_block(self, block: _BlockView, slot: int, query: Tensor) -> NDArray[np.float32]:
        return self._reduce(self._score_rows(block.keys[slot, : block.used], query), block.lengths)

    def _score_rows(self, keys: Tensor, query: Tensor) -> Tensor:
        """Exact scores ``[C]`` of chunks ``[C, G, D]``."""
        return ops.score_tiles(
            query,
            keys,
            TILE_CHUNKS,
            head_reduce=self.msa.head_reduce,
            query_reduce=self.msa.query_reduce,
            scale=self.msa.score_scale(query.shape[-1]),
        )

    def _reduce(self, chunks: Tensor, lengths: Tensor) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = (
            ops.reduce_passages(chunks, lengths, self.msa.chunk_reduce).cpu().numpy()
        )
        return scores

    def _score_quantized(self, slot: int, query: Tensor, best: int) -> NDArray[np.float32]:
        scale = self.msa.score_scale(query.shape[-1])
        quantized = QuantizedQuery.of(query, self._blocks[0].keys.shape[2], self.msa.query_reduce)
        chunks = torch.empty(sum(block.used for block in self._blocks))
        error, spare, start = 0.0, 1, 0
        for block in self._blocks:
            part = chunks[start : start + block.used]
            start += block.used
            known = slot in block.quantized
            if block.full and (known or spare):  # no question waits for more than one copy
                spare -= not known
                keys = block.quantize(slot)
                part[:] = keys.score(quantized)[: block.used]
                error = max(error, keys.error(quantized) * scale)
                part *= scale
            elif found := self._score_roughly(quantized, block.keys[slot, : block.used]):
                torch.mul(found[0], scale, out=part)
                error = max(error, found[1] * scale)
            else:
                part[:] = self._score_rows(block.keys[slot, : block.used], query)
        scores = np.where(self.visible, self._reduce_all(chunks), np.float32(-np.inf))
        chosen = _highest(scores, best, 2 * error)
        scores[chosen] = self._score_some(slot, query, chosen)
        return scores

    def _score_roughly(self, query: QuantizedQuery, keys: Tensor) -> tuple[Tensor, float] | None:
        return score_bfloat16(query, keys) if self.msa.router_normalize else None

    def _reduce_all(self, chunks: Tensor) -> NDArray[np.float32]:
        """Scores of all passages from those of all chunks."""
        lengths = self._lengths
        if self.msa.chunk_reduce == "mean":
            return self._reduce(chunks, torch.from_numpy(lengths))
        best: NDArray[np.float32] = np.maximum.reduceat(chunks.numpy(), np.cumsum(lengths) - lengths)
        return best

    @cached_property
    def _lengths(self) -> Numbers:
        return np.concatenate([block.lengths.numpy() for block in self._blocks])

    def _score_some(self, slot: int, query: Tensor, chosen: Numbers) -> NDArray[np.float32]:
        """Exact scores of the passages at these ascending places of ``numbers``."""
        rows, counts = [], []
        for block, first, lengths, starts in self._places:
            low, high = np.searchsorted(chosen, (first, first + len(starts)))
            if low < high:
                inside = chosen[low:high] - first
                counts.append(lengths[inside])
                rows.append(block.keys[slot][torch.from_numpy(_ranges(starts[inside], counts[-1]))])
        if not rows:
            return np.empty(0, dtype=np.float32)
        return self._reduce(
            self._score_rows(torch.cat(rows), query), torch.from_numpy(np.concatenate(counts))
        )

    @cached_property
    def _places(self) -> list[tuple[_BlockView, int, Numbers, Numbers]]:
        """Every block, its first passage's place in ``numbers``, its passages' chunks and first rows."""
        places, first = [], 0
        for block in self._blocks:
            lengths = block.lengths.numpy()
            places.append((block, first, lengths, np.cumsum(lengths) - lengths))
            first += len(lengths)
        return places

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


def _highest(scores: NDArray[np.float32], count: int, margin: float = 0.0) -> Numbers:
    """Where the ``count`` highest finite scores are, and others at most ``margin`` lower; ascending."""
    if count < len(scores):
        floor = np.partition(scores, len(scores) - count)[len(scores) - count] - margin
        return np.flatnonzero((scores >= floor) & np.isfinite(scores))
    return np.flatnonzero(np.isfinite(scores))


def _ranges(starts: Numbers, lengths: Numbers) -> Numbers:
    """``starts[i] .. starts[i] + lengths[i] - 1`` of every i, one after another."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
