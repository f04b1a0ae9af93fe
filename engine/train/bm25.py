"""BM25 over training passages, to find distractors that look right. Small and in memory; not for serving."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["BM25", "words"]

K1, B = 1.5, 0.75
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-cased words."""
    return _WORD.findall(text.lower())


class BM25:
    """Ranks texts for a query (Robertson and Zaragoza 2009, with the non-negative inverse frequency)."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        lengths = np.array([count.total() for count in counts], dtype=np.float32)
        norm = K1 * (1 - B + B * lengths / max(1.0, float(lengths.mean()))) if len(texts) else lengths
        holders: defaultdict[str, list[int]] = defaultdict(list)
        for number, count in enumerate(counts):
            for word in count:
                holders[word].append(number)
        self.size = len(texts)
        self._postings: dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}
        for word, numbers in holders.items():
            at = np.array(numbers)
            often = np.array([counts[number][word] for number in numbers], dtype=np.float32)
            rarity = math.log1p((self.size - len(numbers) + 0.5) / (len(numbers) + 0.5))
            self._postings[word] = (at, rarity * often * (K1 + 1) / (often + norm[at]))

    def best(self, query: str, k: int) -> list[int]:
        """Numbers of the ``k`` best texts that share a word with ``query``; ties go to the earlier one."""
        scores = np.zeros(self.size, dtype=np.float32)
        for word in sorted(set(words(query))):
            if word in self._postings:
                at, gain = self._postings[word]
                scores[at] += gain
        order = np.lexsort((np.arange(self.size), -scores))[:k]
        return [int(number) for number in order if scores[number] > 0]
