"""``Haystack``: ordinary text cut into documents, as many tokens of it as an evaluation asks for.

Beyond its end the text comes again with other names: every capitalised word inside a sentence is swapped
for another one of the text, by a seeded permutation of its own for every pass.
"""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msa_memory.errors import ConfigError

__all__ = ["Haystack", "hide", "read_haystack"]

DOCUMENT_CHARS = 1600
"""About 400 tokens: one passage."""
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True)
class Haystack:
    """Documents of plain text, in order, without end."""

    documents: tuple[str, ...]
    seed: int = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Id and text of one document after another; ids say the pass and the place."""
        names = sorted({name for text in self.documents for name in _NAME.findall(text)})
        number = 0
        while True:
            swapped = self._swapped(names, number) if number else {}
            for place, text in enumerate(self.documents):
                yield f"hay-{number}-{place:06d}", _renamed(text, swapped)
            number += 1

    def _swapped(self, names: Sequence[str], number: int) -> dict[str, str]:
        others = list(names)
        random.Random(f"{self.seed}-{number}").shuffle(others)
        return dict(zip(names, others, strict=True))


def read_haystack(paths: Sequence[Path], *, seed: int = 0) -> tuple[Haystack, tuple[str, ...]]:
    """The texts of the files (UTF-8, plain or gzip), and documents kept out of them to hide needles in.

    Raises:
        ConfigError: a file is not readable, or they hold less than two documents of text.
    """
    documents: list[str] = []
    for path in paths:
        try:
            with (
                gzip.open(path, "rt", encoding="utf-8")
                if path.suffix == ".gz"
                else path.open(encoding="utf-8") as file
            ):
                documents += _documents(file.read())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not readable as text: {error}") from error
    random.Random(seed).shuffle(documents)
    hosts = max(1, min(64, len(documents) // 8))
    if len(documents) < 2:
        raise ConfigError(
            f"the haystack files hold {len(documents)} documents of {DOCUMENT_CHARS} characters; "
            "two are needed at least: give more text"
        )
    return Haystack(tuple(documents[hosts:]), seed), tuple(documents[:hosts])


def _renamed(text: str, swapped: Mapping[str, str]) -> str:
    return _NAME.sub(lambda found: swapped.get(found[0], found[0]), text)


def _documents(text: str) -> list[str]:
    """A text in pieces of whole sentences, each about ``DOCUMENT_CHARS`` long."""
    pieces: list[str] = []
    piece: list[str] = []
    size = 0
    for sentence in _SENTENCE.split(text.strip()):
        for part in (sentence[at : at + DOCUMENT_CHARS] for at in range(0, len(sentence), DOCUMENT_CHARS)):
            if piece and size + len(part) > DOCUMENT_CHARS:
                pieces.append(" ".join(piece))
                piece, size = [], 0
            piece.append(part)
            size += len(part) + 1
    return [*pieces, " ".join(piece)] if piece else pieces


def hide(text: str, sentence: str, rng: random.Random) -> str:
    """The text with a sentence between two of its own, or at either end."""
    parts = _SENTENCE.split(text)
    parts.insert(rng.randint(0, len(parts)), sentence)
    return " ".join(parts)
