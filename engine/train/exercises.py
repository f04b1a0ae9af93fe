"""Passages, the questions about them that can be trained on, and the search for look-alike passages.

Knows which questions have short answers and where the passages spell them; how they become prompts is
``mixture``'s business.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msa_memory.engine.layout import PromptLayout
from msa_memory.engine.train.bm25 import BM25
from msa_memory.engine.train.data import Passage, Question, read_rows
from msa_memory.errors import ConfigError

__all__ = ["Asked", "Exercises", "Unanswerable", "held_out", "places", "read_unanswerable", "scouted"]

SOURCES = {
    "squad1.1": 4.0,
    "nq-open": 2.5,
    "2wiki-train": 3.0,
    "qed": 1.5,
    "fairytaleqa": 0.6,
    "pubmedqa": 0.5,
}
"""How often a source's passages are drawn; 1 where it is not named."""
RANKED = 24
WHOLE_TOKENS = (220, 420)
"""Passages are read whole where the answer is not one spot: at most so long, one passage and several."""


@dataclass(frozen=True, slots=True)
class Unanswerable:
    """A question whose answer is not in the passage it was written for."""

    text: str
    passage: str


def read_unanswerable(paths: Sequence[Path], split: str = "train") -> list[Unanswerable]:
    """Questions of the files that are marked as belonging to ``split``, or not marked at all.

    Raises:
        ConfigError: a file is not readable, or a line lacks ``question`` or ``distractor_passage_id``.
    """
    found = []
    for path in paths:
        for where, row in read_rows(path):
            if row.get("split", split) != split:
                continue
            if not row.get("question") or not row.get("distractor_passage_id"):
                raise ConfigError(f"{where} needs a 'question' and a 'distractor_passage_id'")
            found.append(Unanswerable(str(row["question"]), str(row["distractor_passage_id"])))
    return found


def held_out(passage: Passage, *, one_in: int = 16) -> bool:
    """Whether a training passage is kept for evaluation: whole articles, by their title."""
    return zlib.crc32((passage.title or passage.id).encode()) % one_in == 0


def scouted(passage: Passage) -> bool:
    """Whether a passage is of the half of the articles that scouting routers learn from.

    Routers know the passages they learned by heart, where they have nothing left to teach the layers below
    them; on the other half's they show what they lack.
    """
    return zlib.crc32((passage.title or passage.id).encode()) % 32 >= 16


@dataclass(frozen=True, slots=True)
class Asked:
    """A usable question: passages that hold the answer (numbers) and the answer as they spell it."""

    text: str
    gold: tuple[int, ...]
    answers: tuple[str, ...]
    extractive: bool


@dataclass(slots=True)
class Exercises:
    """Passages, their questions and the search for distractors.

    Args:
        passages, questions: of one side of the held-out split; questions about other passages are left out.
        answer_tokens: longer answers are left out.
    """

    passages: list[Passage]
    questions: list[Question]
    unanswerable: list[Unanswerable]
    prompt: PromptLayout
    answer_tokens: int = 24
    asked: list[Asked] = field(init=False)
    by_passage: list[list[int]] = field(init=False)
    trick: list[list[str]] = field(init=False)
    drawn: list[tuple[int, float]] = field(init=False)
    """Passages that can be drawn and how often, by their questions' source."""
    _search: BM25 = field(init=False)
    _offsets: dict[int, list[tuple[int, int]]] = field(init=False, default_factory=dict)
    _ranked: dict[int, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        number = {passage.id: n for n, passage in enumerate(self.passages)}
        self._search = BM25([f"{passage.title or ''} {passage.text}" for passage in self.passages])
        self.asked, sources = [], []
        for question in self.questions:
            if set(question.gold) <= number.keys():
                gold = tuple(number[id] for id in question.gold)
                if (usable := self._usable(question, gold)) is not None:
                    self.asked.append(usable)
                    sources.append(question.source)
        self.by_passage = [[] for _ in self.passages]
        self.trick = [[] for _ in self.passages]
        weights: dict[int, float] = {}
        for index, (asked, source) in enumerate(zip(self.asked, sources, strict=True)):
            self.by_passage[asked.gold[0]].append(index)
            weights[asked.gold[0]] = SOURCES.get(source, 1.0)
        self.drawn = sorted(weights.items())
        for trick in self.unanswerable:
            if trick.passage in number:
                self.trick[number[trick.passage]].append(trick.text)
        if not self.drawn:
            raise ConfigError(
                f"none of {len(self.questions)} questions has a passage among the {len(self.passages)} and "
                f"an answer of at most {self.answer_tokens} tokens; training needs some"
            )

    def _usable(self, question: Question, gold: tuple[int, ...]) -> Asked | None:
        """The question with its short answers, those the passages spell out first; None without any."""
        fitting = [
            answer.strip()
            for answer in question.answers
            if answer.strip() and len(self.prompt.tokenizer.encode(answer)) <= self.answer_tokens
        ]
        spelt = [a for a in fitting if any(places(self.passages[n].text, a) for n in gold)]
        if spelt and len(gold) == 1:
            return Asked(question.text, gold, tuple(spelt), True)
        if not fitting or sum(len(self.offsets(n)) for n in gold) > WHOLE_TOKENS[len(gold) > 1]:
            return None
        return Asked(question.text, gold, tuple(spelt or fitting), False)

    def offsets(self, number: int) -> list[tuple[int, int]]:
        """Characters of a passage's tokens."""
        if number not in self._offsets:
            self._offsets[number] = self.prompt.tokenizer.encode_with_offsets(self.passages[number].text)[1]
        return self._offsets[number]

    def similar(self, index: int) -> list[int]:
        """Passages that a word search finds for a question, its own left out, best first."""
        if index not in self._ranked:
            asked = self.asked[index]
            found = self._search.best(asked.text, RANKED + len(asked.gold))
            self._ranked[index] = [number for number in found if number not in asked.gold]
        return self._ranked[index]


def places(text: str, answer: str) -> list[tuple[int, int]]:
    """Where an answer stands in a text as whole words, in any case."""
    pattern = rf"(?<!\w){re.escape(answer)}(?!\w)"
    return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]
