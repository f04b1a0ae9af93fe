"""Packed training examples from question and passage files: a memory of passages, a question, its answer.

``Examples.example(i, tokens)`` is a pure function of the files, the seed, ``i`` and the memory's size. A
question that needs several passages is one retrieval step of its chain: those found so far are read as
evidence before it, as in a later round of the engine, and those still to be found lie in memory.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache

from msa_memory.engine.layout import document_header, evidence_entry
from msa_memory.engine.train.exercises import Asked, Exercises, places
from msa_memory.engine.train.forward import PackedRow, pack
from msa_memory.engine.train.losses import IGNORED
from msa_memory.errors import ConfigError

__all__ = ["Example", "Examples"]

MAX_PASSAGE_TOKENS = 512
READ_ON = date(2020, 1, 1)


@dataclass(frozen=True, slots=True)
class Example:
    """A packed row with its labels: answer tokens, all tokens of documents but their first, and relevance."""

    row: PackedRow
    answer: tuple[int, ...]
    documents: tuple[int, ...]
    relevant: tuple[int, ...]


class Examples:
    """An endless, indexable stream of packed examples.

    Raises:
        ConfigError: the model names its documents by generating; its packed answers would be other ones.
    """

    def __init__(self, exercises: Exercises, end_of_turn: int, *, seed: int = 0) -> None:
        if exercises.prompt.layout.documents != "bare":
            raise ConfigError(
                "this model generates the numbers of its documents (numbered layout); full training knows "
                "models whose routers name the evidence"
            )
        self.exercises, self.prompt, self.end, self.seed = exercises, exercises.prompt, end_of_turn, seed
        self._anchors = lru_cache(maxsize=2)(self._epoch)

    def example(self, index: int, memory_tokens: int) -> Example:
        """Example ``index`` with documents of about ``memory_tokens`` tokens together, at least the gold."""
        rng = random.Random(f"{self.seed}:packed:{index}:{memory_tokens}")
        epoch, place = divmod(index, len(self._anchors(0)))
        number = rng.choice(self.exercises.by_passage[self._anchors(epoch)[place]])
        asked = self.exercises.asked[number]
        hop = rng.randrange(len(asked.gold))
        wanted = asked.gold[hop:]
        numbers = [*wanted, *self._distractors(number, memory_tokens, rng)]
        rng.shuffle(numbers)
        question = self._question(asked, hop)
        answer = [*self.prompt.tokenizer.encode(asked.answers[0]), self.end]
        documents = [self._document(n, rng) for n in numbers]
        row = pack(
            self.prompt.head,
            documents,
            question,
            [*self.prompt.tail, *self.prompt.response],
            answer,
            question_position=self.prompt.question_position,
        )
        return Example(
            row,
            (IGNORED,) * (len(row) - len(answer)) + tuple(answer),
            self._document_labels(documents, len(row)),
            tuple(int(n in wanted) for n in numbers),
        )

    def _epoch(self, epoch: int) -> list[int]:
        """Passages that have questions, in the order of one epoch."""
        order = [number for number, _ in self.exercises.drawn]
        random.Random(f"{self.seed}:packed:epoch:{epoch}").shuffle(order)
        return order

    def _distractors(self, question: int, memory_tokens: int, rng: random.Random) -> list[int]:
        """Look-alikes and others in turn until the memory is full; none that holds a short answer."""
        exercises = self.exercises
        asked = exercises.asked[question]
        alike = exercises.similar(question)[:]
        left = memory_tokens - sum(self._size(n) for n in asked.gold)
        chosen: list[int] = []
        taken = set(asked.gold)
        while left > 0 and len(taken) < len(exercises.passages):
            hard = alike and len(chosen) % 2 == 0
            number = alike.pop(0) if hard else rng.randrange(len(exercises.passages))
            if number in taken:
                continue
            taken.add(number)
            if asked.extractive and any(places(exercises.passages[number].text, a) for a in asked.answers):
                continue
            left -= self._size(number)
            if left >= 0:
                chosen.append(number)
        return chosen

    def _size(self, number: int) -> int:
        return min(MAX_PASSAGE_TOKENS, len(self.exercises.offsets(number)))

    def _document(self, number: int, rng: random.Random) -> list[int]:
        passage = self.exercises.passages[number]
        title = passage.title if rng.random() < 0.67 else None
        header = document_header(title=title, when=None, speaker=None)
        return self.prompt.document(number, header, passage.text)[:MAX_PASSAGE_TOKENS]

    def _question(self, asked: Asked, hop: int) -> list[int]:
        if hop == 0:
            return self.prompt.question(asked.text)[0]
        entries = [self._entry(number) for number in asked.gold[:hop]]
        return self.prompt.follow_up("\n".join(entries), asked.text)[0]

    def _entry(self, number: int) -> str:
        passage = self.exercises.passages[number]
        header = document_header(title=passage.title, when=None, speaker=None)
        return evidence_entry(header, READ_ON, passage.text)

    def _document_labels(self, documents: Sequence[Sequence[int]], length: int) -> tuple[int, ...]:
        labels = [IGNORED] * len(self.prompt.head)
        for document in documents:
            labels += [IGNORED, *document[1:]]
        return (*labels, *[IGNORED] * (length - len(labels)))
