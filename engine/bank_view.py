"""What one question may see of a bank, and how its passages are scored, chosen and gathered.

On a CPU with integer products, full blocks and sheets are scored approximately, by 8-bit keys; passages near
the best are settled on the exact keys, so that what is chosen, and every score of it, is the exact one. A
``BankView`` is a consistent snapshot with a visibility mask: later adds and removals never reach it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.exact_keys import ExactKeys, Fetch
from msa_memory.engine.lexical import LexicalIndex, bm25
from msa_memory.engine.picked_keys import PickedKeys
from msa_memory.engine.quantized import QuantizedKeys, QuantizedQuery, score_bfloat16
from msa_memory.engine.runs import RunMaxima
from msa_memory.engine.sheets import Sheet

__all__ = ["BankView", "BlockView", "Numbers", "Postings", "Selection", "SheetView", "visibility"]

TILE_CHUNKS = 1024
"""Chunks of one exact product on a CPU, whose keys and results fit its cache."""
SKIM_CUTS = (512, 256)
"""How many passages a skim keeps after its first pass, and after the next layers."""
SKIM_BELOW = 2.0
"""What the estimates of the others are lowered by: cosines differ by at most that."""
SETTLED = 128
"""Most relevant passages whose scores are exact on every layer."""
LEAST_SETTLED = 32
"""Best passages of one layer whose scores are exact, however few are asked for."""
Numbers = NDArray[np.int64]
Postings = Mapping[int, tuple[Numbers, Numbers]]


@dataclass(frozen=True, slots=True)
class Selection:
    """Passages one router layer chose for one question: numbers and scores, best first."""

    numbers: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SheetView:
    """A sheet as one view sees it; beside ``BlockView``."""

    sheet: Sheet
    lengths: Tensor
    used: int
    numbers: Numbers
    visible: NDArray[np.bool_]
    full: bool = True


@dataclass(frozen=True, slots=True)
class BlockView:
    keys: Tensor
    lengths: Tensor
    used: int
    numbers: Numbers
    visible: NDArray[np.bool_]
    edges: Numbers
    """Every passage's first chunk, and their end."""
    quantized: dict[int, QuantizedKeys]
    full: bool

    def quantize(self, slot: int) -> QuantizedKeys:
        """The 8-bit copy of one layer, made at the first call."""
        if slot not in self.quantized:
            self.quantized[slot] = QuantizedKeys.of(self.keys[slot]).pack()
        return self.quantized[slot]


class BankView:
    """What one question may see of a bank, frozen at the time it was taken."""

    skims = False
    """Whether questions that attend to no memory should ``skim`` instead of scoring layer by layer."""
    skim_order: tuple[tuple[int, ...], ...] = ()
    """The router layers, by their place among them, that a skim scores in full, and those it looks at before
    each further cut."""

    def __init__(
        self,
        msa: MSAConfig,
        blocks: Sequence[BlockView | SheetView],
        fetch: Fetch,
        lexical: LexicalIndex,
        exact: ExactKeys,
    ) -> None:
        self.msa = msa
        self.fetch = fetch
        self._lexical = lexical
        self._exact_keys = exact
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
        masks = visibility([block.numbers for block in self._blocks], masked)
        blocks = [replace(b, visible=b.visible & ~mask) for b, mask in zip(self._blocks, masks, strict=True)]
        view = BankView(self.msa, blocks, self.fetch, self._lexical, self._exact_keys)
        view.skims, view.skim_order = self.skims, self.skim_order
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
        if best is not None and any(block.full for block in self._blocks):
            return self._score_quantized(slot, query, max(best, LEAST_SETTLED))
        parts = [self._score_block(place, slot, query) for place in range(len(self._blocks))]
        scores = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
        return np.where(self.visible, scores, np.float32(-np.inf))

    def settle(
        self,
        scores: NDArray[np.float32],
        queries: Sequence[Tensor],
        bonus: NDArray[np.float32] | float = 0.0,
        count: int = 0,
    ) -> NDArray[np.float32]:
        """Scores ``[L, P]`` with those of the most relevant passages exact on every layer.

        Relevant is what has the highest weighted mean over the layers, plus ``bonus`` ``[P]``: ``count`` of
        them, and at least 128, as the scores say that are returned. ``queries`` are each layer's router
        queries.
        """
        count = max(count, SETTLED)
        if not any(block.full for block in self._blocks) or (self.skims and count == SETTLED):
            return scores  # exact where it matters
        settled, done = scores.copy(), np.zeros(len(self.numbers), dtype=bool)
        while True:  # an exact score may be lower than it looked, and let another one in
            best = _highest(self.msa.mean_of_layers(settled) + bonus, count)
            chosen = best[~done[best]]
            if not len(chosen):
                return settled
            self._settle(settled, queries, chosen)
            done[chosen] = True

    def _settle(self, scores: NDArray[np.float32], queries: Sequence[Tensor], chosen: Numbers) -> None:
        """Put the exact scores of these places in; what cannot be read scores -inf everywhere."""
        scores[:, chosen] = self._score_places(dict(enumerate(queries)), chosen)
        scores[:, ~self.visible] = -np.inf

    def skim(
        self,
        queries: Sequence[Tensor],
        bonus: NDArray[np.float32] | float = 0.0,
        *,
        best: int | None = None,
    ) -> NDArray[np.float32]:
        """Scores ``[L, P]`` of all layers, from a full pass over a few of them.

        Passages go on by what the layers so far say of their relevance, plus ``bonus`` ``[P]``: 512 are
        looked at on a few more layers, 256 of them on a few more, and 128 (or ``best``, if that is more) on
        all. These have their exact scores on every layer. The others keep the first pass's mean, lowered
        by 2 so that none comes before those. The choice depends on nothing but the visible passages' keys:
        there is no index to build, to keep or to erase.
        """
        first, *later = self.skim_order
        found = np.stack([self._score_first(slot, queries[slot]) for slot in first])
        rough = self.msa.mean_of_layers(found, first)
        shift = np.broadcast_to(np.asarray(bonus, dtype=np.float32), rough.shape)
        cuts = [max(cut, best or 0) for cut in (*SKIM_CUTS, SETTLED)]
        kept = _highest(rough + shift, cuts[0])
        found, seen = found[:, kept], list(first)
        for slots, cut in zip(later, cuts[1:], strict=True):
            if slots:
                more = self._score_places({slot: queries[slot] for slot in slots}, kept)
                found, seen = np.concatenate((found, more)), [*seen, *slots]
                on = _highest(self.msa.mean_of_layers(found, seen) + shift[kept], cut)
                kept, found = kept[on], found[:, on]
        scores = np.repeat((rough - np.float32(SKIM_BELOW))[None], len(queries), axis=0)
        exact = seen[len(first) :]
        scores[np.array(exact, dtype=np.int64)[:, None], kept] = found[len(first) :]
        rest = {slot: query for slot, query in enumerate(queries) if slot not in exact}
        scores[np.array(list(rest))[:, None], kept] = self._score_places(rest, kept)
        scores[:, ~self.visible] = -np.inf
        return scores

    def _score_places(self, queries: Mapping[int, Tensor], chosen: Numbers) -> NDArray[np.float32]:
        """Exact scores of the passages at these ascending places of ``numbers``, a row per query's layer.

        A passage that cannot be read becomes invisible and scores -inf.
        """
        scores = np.empty((len(queries), len(chosen)), dtype=np.float32)
        if not len(chosen):
            return scores
        picked, lengths = self._pick(chosen), torch.from_numpy(self._lengths[chosen])
        for row, (slot, query) in zip(scores, queries.items(), strict=True):
            row[:] = self._reduce(self._score_tiles(picked.tiles(slot, TILE_CHUNKS), query), lengths)
        scores[:, ~self.visible[chosen]] = -np.inf
        return scores

    def _score_block(self, place: int, slot: int, query: Tensor) -> NDArray[np.float32]:
        return self._reduce(
            self._score_tiles(self._block_tiles(place, slot), query), self._blocks[place].lengths
        )

    def _pick(self, chosen: Numbers) -> PickedKeys:
        """Exact keys of the passages at these ascending places of ``numbers``.

        A passage that cannot be read becomes invisible; zeros stand for it.
        """
        picked = PickedKeys()
        edges = np.searchsorted(chosen, self._firsts)
        for place in np.flatnonzero(np.diff(edges)).tolist():
            self._pick_of_block(picked, place, chosen[edges[place] : edges[place + 1]] - self._firsts[place])
        return picked

    def _pick_of_block(self, picked: PickedKeys, place: int, inside: Numbers) -> None:
        block = self._blocks[place]
        if isinstance(block, BlockView):
            picked.add_rows(block.keys, block.edges[inside], block.edges[inside + 1])
            return
        layers, groups, dim = block.sheet.shape
        for index in inside.tolist():
            keys = self._exact_keys.get(int(block.numbers[index])) if block.visible[index] else None
            if keys is None:
                self.visible[int(self._firsts[place]) + index] = False
                keys = torch.zeros(layers, int(block.sheet.lengths[index]), groups, dim)
            picked.add(keys)

    def _block_tiles(self, place: int, slot: int) -> Iterable[Tensor]:
        """Exact keys of all passages of a block, as ``_pick`` does."""
        block = self._blocks[place]
        if isinstance(block, BlockView):
            tiles: Sequence[Tensor] = block.keys[slot, : block.used].split(TILE_CHUNKS)
            return tiles
        picked = PickedKeys()
        self._pick_of_block(picked, place, np.arange(len(block.numbers)))
        return picked.tiles(slot, TILE_CHUNKS)

    def _score_tiles(self, tiles: Iterable[Tensor], query: Tensor) -> Tensor:
        """Exact scores ``[C]`` of chunks that come in tiles ``[c, G, D]``."""
        return ops.score_tiles(
            query,
            tiles,
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

    def _score_first(self, slot: int, query: Tensor) -> NDArray[np.float32]:
        """Scores for a skim: approximate ones, where there are some."""
        if any(block.full for block in self._blocks):
            return self._score_approximately(slot, query)[0]
        return self.score(slot, query)

    def _score_quantized(self, slot: int, query: Tensor, best: int) -> NDArray[np.float32]:
        scores, error = self._score_approximately(slot, query)
        done = np.zeros(len(scores), dtype=bool)
        while True:  # a second time only where some could not be read, and others take their places
            chosen = _highest(scores, best, 2 * error)
            chosen = chosen[~done[chosen]]
            scores[chosen] = self._score_places({slot: query}, chosen)[0]
            done[chosen] = True
            if np.isfinite(scores[chosen]).all():
                return scores

    def _score_approximately(self, slot: int, query: Tensor) -> tuple[NDArray[np.float32], float]:
        """Scores of all passages and by how much one may differ from the exact score."""
        scale = self.msa.score_scale(query.shape[-1])
        quantized = QuantizedQuery.of(query, self._groups, self.msa.query_reduce)
        chunks = torch.empty(sum(block.used for block in self._blocks))
        error, spare, start = 0.0, 1, 0
        for place, block in enumerate(self._blocks):
            part = chunks[start : start + block.used]
            start += block.used
            found: float | None
            if isinstance(block, SheetView):
                found = block.sheet.score(slot, quantized, part, scale)
            elif block.full and (slot in block.quantized or spare):  # no question waits for two copies
                spare -= slot not in block.quantized
                keys = block.quantize(slot)
                keys.score(quantized, part, scale)
                found = keys.error(quantized) * scale
            else:
                found = self._score_roughly(quantized, block.keys[slot, : block.used], part, scale)
            if found is None:
                part[:] = self._score_tiles(self._block_tiles(place, slot), query)
            else:
                error = max(error, found)
        return np.where(self.visible, self._reduce_all(chunks), np.float32(-np.inf)), error

    def _score_roughly(self, query: QuantizedQuery, keys: Tensor, out: Tensor, scale: float) -> float | None:
        found = score_bfloat16(query, keys) if self.msa.router_normalize else None
        if found is None:
            return None
        torch.mul(found[0], scale, out=out)
        return found[1] * scale

    def _reduce_all(self, chunks: Tensor) -> NDArray[np.float32]:
        """Scores of all passages from those of all chunks."""
        if self.msa.chunk_reduce == "mean":
            return self._reduce(chunks, torch.from_numpy(self._lengths))
        best: NDArray[np.float32] = self._passages.of(chunks).numpy()
        return best

    @cached_property
    def _passages(self) -> RunMaxima:
        return RunMaxima(self._lengths)

    @cached_property
    def _lengths(self) -> Numbers:
        return np.concatenate([block.lengths.numpy() for block in self._blocks])

    @cached_property
    def _firsts(self) -> Numbers:
        """Every block's first passage's place in ``numbers``, and their end."""
        return np.cumsum([0, *(len(block.numbers) for block in self._blocks)])

    @cached_property
    def _groups(self) -> int:
        block = self._blocks[0]
        return block.sheet.shape[1] if isinstance(block, SheetView) else block.keys.shape[2]

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


def visibility(parts: Sequence[Numbers], chosen: Numbers | None) -> list[NDArray[np.bool_]]:
    """Which numbers of each part are among the ``chosen``, all when None; as arrays of their own."""
    if not parts:
        return []
    joined = np.concatenate(parts)
    mask = np.ones(len(joined), dtype=bool) if chosen is None else np.isin(joined, chosen)
    return np.split(mask, np.cumsum([len(part) for part in parts])[:-1])


def _highest(scores: NDArray[np.float32], count: int, margin: float = 0.0) -> Numbers:
    """Where the ``count`` highest finite scores are, and others at most ``margin`` lower; ascending."""
    if count < 1:
        return np.empty(0, dtype=np.int64)
    if count < len(scores):
        floor = np.partition(scores, len(scores) - count)[len(scores) - count] - margin
        return np.flatnonzero((scores >= floor) & np.isfinite(scores))
    return np.flatnonzero(np.isfinite(scores))
