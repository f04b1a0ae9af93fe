"""The lexical signal: which rare words of a question stand in a passage, one more score beside the routers.

Terms are hashed words kept with a passage's states, so they are stored, moved and erased as one with them.
Scores are BM25 over the passages that are visible to the question and nothing else: no other namespace's
words show in them. Source: Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine.sheets import Sheet

__all__ = ["COMMON_WORDS", "LexicalIndex", "bm25", "passage_terms", "question_terms"]

SATURATION, LENGTH_SHARE = 1.2, 0.75
"""BM25's k1 and b."""
BACKGROUND = 50
"""Passages of ordinary text that are counted in: three passages alone cannot say which words are rare."""
COMMON_WORDS = frozenset(
    "a an and are as at be by did do does for from had has have he her his how i in is it its of on or she "
    "that the their them they this to was were what when where which who why will with you your".split()
)
"""Words that stand in half of that background; all others in none of it."""
Numbers = NDArray[np.int64]
_NONE = np.empty(0, dtype=np.int64)
_WORD = re.compile(r"\w+")
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff\uf900-\ufaff]+")
"""Scripts written without spaces: Japanese, Chinese, Thai, Lao. Their words are pairs of characters."""
_ENDINGS = ("ing", "ed", "es", "s", "ly")


def passage_terms(text: str) -> Tensor:
    """Hashes of a passage's words and how often each occurs: int64 ``[terms, 2]``, ascending by hash."""
    counts = Counter(map(_hash, _words(text)))
    return torch.tensor(sorted(counts.items()), dtype=torch.int64).view(-1, 2)


def question_terms(text: str) -> frozenset[int]:
    """Hashes of the words of a question."""
    return frozenset(map(_hash, _words(text)))


def _words(text: str) -> Iterable[str]:
    for word in _WORD.findall(text.casefold()):
        if _UNSPACED.match(word):
            yield from (word[at : at + 2] for at in range(max(1, len(word) - 1)))
        else:
            yield _stem(word)


def _stem(word: str) -> str:
    """Without a common English ending, where at least three letters are left."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word.removesuffix("e") if len(word) > 3 else word


def _hash(word: str) -> int:
    return crc32(word.encode("utf-8", "surrogatepass"))


_COMMON = frozenset(_hash(_stem(word)) for word in COMMON_WORDS)


class LexicalIndex:
    """Postings of all passages of a bank, by term. Not thread-safe: the bank's owner adds and removes.

    Those of a sheet stay in it. ``terms_of`` gives the terms of a passage whose sheet cannot be read, None
    where the passage cannot be read either.
    """

    def __init__(self, terms_of: Callable[[int], Tensor | None] = lambda number: None) -> None:
        self._terms_of = terms_of
        self._postings: dict[int, _Postings] = {}
        self._terms: dict[int, Numbers] = {}
        self._lengths: dict[int, int] = {}
        self._sheets: list[Sheet] = []
        self._in_sheets: tuple[Numbers, Numbers] | None = None
        """Numbers of all passages in sheets, ascending, and their words."""

    def add(self, number: int, terms: Tensor) -> None:
        """Hold the terms ``[terms, 2]`` of a passage."""
        table = terms.numpy()
        self._terms[number] = table[:, 0].copy()
        self._lengths[number] = int(table[:, 1].sum())
        for term, count in table.tolist():
            self._postings.setdefault(term, _Postings()).append(number, count)

    def remove(self, numbers: Iterable[int]) -> None:
        """Hold nothing of these passages any more; unknown numbers are ignored."""
        gone = [number for number in numbers if number in self._terms]
        touched = {term for number in gone for term in self._terms.pop(number).tolist()}
        for number in gone:
            del self._lengths[number]
        lost = np.array(sorted(gone), dtype=np.int64)
        for term in touched:
            if not self._postings[term].drop(lost):
                del self._postings[term]

    def add_sheet(self, sheet: Sheet) -> None:
        """Hold the terms of a sheet's passages, which must not be held otherwise."""
        self._sheets.append(sheet)
        self._in_sheets = None

    def remove_sheet(self, sheet: Sheet) -> None:
        """Hold nothing of a sheet any more."""
        self._sheets = [held for held in self._sheets if held is not sheet]
        self._in_sheets = None

    def lengths(self, numbers: Numbers) -> NDArray[np.float32]:
        """Words per passage ``[P]``; 0 where a passage is not held."""
        lengths = np.zeros(len(numbers), dtype=np.float32)
        known, words = self._words_in_sheets()
        if len(known):
            places = np.minimum(np.searchsorted(known, numbers), len(known) - 1)
            lengths = np.where(known[places] == numbers, words[places], 0).astype(np.float32)
        if self._lengths:
            alone = np.array([self._lengths.get(number, 0) for number in numbers.tolist()], dtype=np.float32)
            lengths = np.maximum(lengths, alone)  # a passage is held once
        return lengths

    def _words_in_sheets(self) -> tuple[Numbers, Numbers]:
        if self._in_sheets is None:
            numbers = np.concatenate([_NONE, *(sheet.numbers for sheet in self._sheets)])
            words = np.concatenate([_NONE, *(sheet.words for sheet in self._sheets)])
            order = np.argsort(numbers)
            self._in_sheets = numbers[order], words[order]
        return self._in_sheets

    def postings(self, terms: Iterable[int]) -> Mapping[int, tuple[Numbers, Numbers]]:
        """Passage numbers and counts of each term that occurs anywhere."""
        asked = sorted(terms)
        parts: dict[int, list[tuple[Numbers, Numbers]]] = {
            term: [self._postings[term].arrays()] for term in asked if term in self._postings
        }
        for sheet in self._sheets:
            found = sheet.postings(asked)
            for term, part in (self._read(sheet, asked) if found is None else found).items():
                parts.setdefault(term, []).append(part)
        return {term: _joined(found) for term, found in parts.items()}

    def _read(self, sheet: Sheet, asked: list[int]) -> dict[int, tuple[Numbers, Numbers]]:
        """A sheet's postings from its passages themselves."""
        found: dict[int, list[tuple[int, int]]] = {}
        wanted = set(asked)
        for number in sheet.numbers.tolist():
            terms = self._terms_of(number)
            for term, count in () if terms is None else terms.tolist():
                if term in wanted:
                    found.setdefault(term, []).append((number, count))
        tables = {term: np.array(pairs, dtype=np.int64) for term, pairs in found.items()}
        return {term: (table[:, 0], table[:, 1]) for term, table in tables.items()}


def _joined(parts: list[tuple[Numbers, Numbers]]) -> tuple[Numbers, Numbers]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([numbers for numbers, _ in parts]), np.concatenate([counts for _, counts in parts])


class _Postings:
    """Passages that hold one term and how often, in the order they came."""

    __slots__ = ("_counts", "_fresh", "_numbers")

    def __init__(self) -> None:
        self._numbers, self._counts = _NONE, _NONE
        self._fresh: list[tuple[int, int]] = []

    def append(self, number: int, count: int) -> None:
        self._fresh.append((number, count))

    def arrays(self) -> tuple[Numbers, Numbers]:
        if self._fresh:
            fresh = np.array(self._fresh, dtype=np.int64)
            self._numbers = np.concatenate((self._numbers, fresh[:, 0]))
            self._counts = np.concatenate((self._counts, fresh[:, 1]))
            self._fresh = []
        return self._numbers, self._counts

    def drop(self, lost: Numbers) -> bool:
        """Forget these passages; False when none is left."""
        numbers, counts = self.arrays()
        kept = ~np.isin(numbers, lost)
        self._numbers, self._counts = numbers[kept], counts[kept]
        return bool(kept.any())


def bm25(
    postings: Mapping[int, tuple[Numbers, Numbers]],
    terms: frozenset[int],
    numbers: Numbers,
    lengths: NDArray[np.float32],
    visible: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """BM25 of every passage of ``numbers`` ``[P]`` as a share of the question's best possible score, 0..1.

    Masked passages count for nothing: they score 0 and no frequency or mean length includes them. Words
    that no visible passage holds lower everybody's share.
    """
    scores = np.zeros(len(numbers), dtype=np.float32)
    count = int(visible.sum())
    if not count or not terms:
        return scores
    norm = SATURATION * (1 - LENGTH_SHARE + LENGTH_SHARE * lengths / max(1.0, lengths[visible].mean()))
    order = np.argsort(numbers, kind="stable")
    best = 0.0
    for term in sorted(terms):
        rows, counts = _rows_of(postings.get(term), numbers, order, visible)
        idf = _rarity(len(rows), count, common=term in _COMMON)
        best += idf * (SATURATION + 1)
        scores[rows] += idf * counts * (SATURATION + 1) / (counts + norm[rows])
    return scores / np.float32(best)


def _rarity(holding: int, count: int, *, common: bool) -> float:
    """Inverse document frequency of a term that ``holding`` of ``count`` visible passages have."""
    holding += BACKGROUND // 2 if common else 0
    return math.log(1 + (count + BACKGROUND - holding + 0.5) / (holding + 0.5))


def _rows_of(
    found: tuple[Numbers, Numbers] | None, numbers: Numbers, order: Numbers, visible: NDArray[np.bool_]
) -> tuple[Numbers, NDArray[np.float32]]:
    """Where a term's visible passages stand among ``numbers``, and its counts there."""
    if found is None:
        return _NONE, np.empty(0, dtype=np.float32)
    places = np.searchsorted(numbers, found[0], sorter=order)
    rows = order[np.minimum(places, len(numbers) - 1)]
    there = (numbers[rows] == found[0]) & visible[rows]
    return rows[there], found[1][there].astype(np.float32)
