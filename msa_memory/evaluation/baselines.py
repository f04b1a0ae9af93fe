"""What finds passages without a memory model: BM25 and a dense embedder, over the same documents.

Both take documents one by one and give them up again, as a memory does. Nothing here answers.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from msa_memory.errors import ConfigError
from msa_memory.progress import progress_reporter

__all__ = ["DenseSearch", "Embed", "Retriever", "WordSearch"]

STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these "
    "they this to was will with".split()
)
SATURATION, LENGTH_SHARE = 1.5, 0.75
BATCH, KEEP_EVERY = 32, 1024
Vectors = NDArray[np.float32]
Embed = Callable[[Sequence[str]], Vectors]
_WORD = re.compile(r"\b\w\w+\b")


class Retriever(Protocol):
    """Finds documents by id."""

    def add(self, documents: Mapping[str, str]) -> None:
        """Hold more documents, texts by id."""

    def remove(self, ids: Iterable[str]) -> None:
        """Hold these documents no longer."""

    def best(self, question: str, k: int) -> list[str]:
        """Ids of the ``k`` best documents, best first; ties go to the one that came earlier."""


class WordSearch:
    """Okapi BM25 in Lucene's form with English stop words, k1 1.5 and b 0.75."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._holders: dict[str, dict[str, int]] = {}
        self._index: _WordIndex | None = None

    def add(self, documents: Mapping[str, str]) -> None:
        for id, text in documents.items():
            self._counts[id] = Counter(words(text))
            for word, often in self._counts[id].items():
                self._holders.setdefault(word, {})[id] = often
        self._index = None

    def remove(self, ids: Iterable[str]) -> None:
        for id in ids:
            for word in self._counts.pop(id):
                del self._holders[word][id]
        self._index = None

    def best(self, question: str, k: int) -> list[str]:
        if self._index is None:
            self._index = _WordIndex(self._counts, self._holders)
        return self._index.best(words(question), k)


class _WordIndex:
    """A state of the documents, with what one question after another can share."""

    def __init__(self, counts: Mapping[str, Counter[str]], holders: Mapping[str, Mapping[str, int]]) -> None:
        self.ids = list(counts)
        self._place = {id: place for place, id in enumerate(self.ids)}
        lengths = np.array([count.total() for count in counts.values()], dtype=np.float32)
        mean = max(1.0, float(lengths.mean())) if len(lengths) else 1.0
        self._norm = SATURATION * (1 - LENGTH_SHARE + LENGTH_SHARE * lengths / mean)
        self._holders = holders
        self._gains: dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}

    def best(self, asked: Sequence[str], k: int) -> list[str]:
        scores = np.zeros(len(self.ids), dtype=np.float32)
        for word in asked:
            rows, gains = self._gain(word)
            scores[rows] += gains
        return [self.ids[place] for place in _best(scores, k)]

    def _gain(self, word: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows that hold a word and what each gains by it."""
        if word not in self._gains:
            holders = self._holders.get(word, {})
            rows = np.array([self._place[id] for id in holders], dtype=np.int64)
            often = np.array(list(holders.values()), dtype=np.float32)
            rarity = math.log(1 + (len(self.ids) - len(rows) + 0.5) / (len(rows) + 0.5))
            gains = rarity * often / (often + self._norm[rows])
            self._gains[word] = rows, gains.astype(np.float32)
        return self._gains[word]


def words(text: str) -> list[str]:
    """Lower-cased words of at least two characters that are no stop words."""
    return [word for word in _WORD.findall(text.lower()) if word not in STOP_WORDS]


class DenseSearch:
    """Cosine between embeddings of questions and documents.

    Args:
        embed: unit vectors ``[N, D]`` of texts.
        kept: a file that keeps the documents' embeddings; written as they come, so that an interrupted
            run goes on, and read again by the next one.
    """

    def __init__(self, embed: Embed, kept: Path | None = None) -> None:
        self._embed, self._kept = embed, kept
        self._known: dict[str, Vectors] = _read_vectors(kept)
        self._vectors: dict[str, Vectors] = {}
        self._table: Vectors | None = None

    def add(self, documents: Mapping[str, str]) -> None:
        keys = {id: hashlib.sha256(text.encode()).hexdigest() for id, text in documents.items()}
        missing = {key: documents[id] for id, key in keys.items() if key not in self._known}
        self._learn(missing)
        self._vectors |= {id: self._known[key] for id, key in keys.items()}
        self._table = None

    def remove(self, ids: Iterable[str]) -> None:
        for id in ids:
            del self._vectors[id]
        self._table = None

    def best(self, question: str, k: int) -> list[str]:
        ids = list(self._vectors)
        if not ids:
            return []
        if self._table is None:
            self._table = np.stack(list(self._vectors.values()))
        return [ids[place] for place in _best(self._table @ self._embed([question])[0], k)]

    def _learn(self, texts: Mapping[str, str]) -> None:
        """Embed texts by their hash, those of like length together."""
        order = sorted(texts, key=lambda key: len(texts[key]))
        with progress_reporter(None, len(order), "Embedding") as report:
            for start in range(0, len(order), BATCH):
                part = order[start : start + BATCH]
                found = self._embed([texts[key] for key in part])
                self._known |= dict(zip(part, found, strict=True))
                report(start + len(part))
                if start // BATCH % (KEEP_EVERY // BATCH) == 0 or start + BATCH >= len(order):
                    self._keep(len(order))

    def _keep(self, fresh: int) -> None:
        """Write the file anew, whole or not at all; a few fresh texts are not worth that."""
        if self._kept is None or fresh < BATCH:
            return
        table = {"vectors": np.stack(list(self._known.values()))}
        beside = self._kept.with_name(self._kept.name + ".part")
        save_file(table, beside, metadata={"keys": " ".join(self._known)})
        beside.replace(self._kept)


def _read_vectors(kept: Path | None) -> dict[str, Vectors]:
    if kept is None or not kept.is_file():
        return {}
    try:
        with safe_open(kept, "numpy") as file:
            keys = file.metadata()["keys"].split()
        return dict(zip(keys, load_file(kept)["vectors"], strict=True))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{kept} holds no embeddings of this program ({error}); delete it or name another"
        ) from error


def _best(scores: NDArray[np.float32], k: int) -> list[int]:
    """Places of the ``k`` highest scores; ties go to the earlier one."""
    found: list[int] = np.argsort(-scores, kind="stable")[:k].tolist()
    return found
