"""Question and passage files as the engine reads them: token ids, hidden states, right answers.

Ids are those of ``Engine.encode`` and ``Engine.route``, and hidden states those of the engine's own
weights with its adapter merged: what routers learn on is what they will see.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from msa_memory.engine.config import MSAConfig
from msa_memory.engine.encoding import encode_head
from msa_memory.engine.engine import Engine
from msa_memory.engine.layout import PromptLayout, document_header
from msa_memory.engine.train.data import Passage, Question, read_passages, read_questions
from msa_memory.engine.train.hidden import HiddenCache, HiddenStates

__all__ = ["RoutingData", "RoutingReader", "header"]

MAX_QUESTION_TOKENS = 64
MAX_PASSAGE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class RoutingData:
    """What routers train on: item i of ``gold`` are the passages (by place) that answer question i."""

    passages: list[Passage]
    asked: list[Question]
    documents: HiddenStates
    questions: HiddenStates
    gold: list[list[int]]

    def of_questions(self, items: Sequence[int]) -> RoutingData:
        """Some of the questions over the same passages."""
        return RoutingData(
            self.passages,
            [self.asked[item] for item in items],
            self.documents,
            self.questions.pick(items),
            [self.gold[item] for item in items],
        )

    def of_passages(self, places: Sequence[int]) -> RoutingData:
        """The questions that some passages answer, over these passages alone."""
        at = {place: number for number, place in enumerate(places)}
        asked = [item for item, right in enumerate(self.gold) if at.keys() & set(right)]
        return RoutingData(
            [self.passages[place] for place in places],
            [self.asked[item] for item in asked],
            self.documents.pick(places),
            self.questions.pick(asked),
            [[at[place] for place in self.gold[item] if place in at] for item in asked],
        )


class RoutingReader:
    """Reads data files for routers with the settings ``msa`` on the layers of an engine's decoder."""

    def __init__(
        self,
        engine: Engine,
        msa: MSAConfig,
        work: Path,
        report: Callable[[str, int, int], None] = lambda what, done, total: None,
        deadline: float | None = None,
    ) -> None:
        self.msa = msa
        self.prompt = PromptLayout(engine.prompt.layout, engine.tokenizer, msa)
        self.head = encode_head(engine.decoder, self.prompt.head)
        self.cache = HiddenCache(engine.decoder, msa.router_layers, work, report, deadline)

    def read(
        self, passages: Sequence[Path], questions: Sequence[Path], *, always_titled: bool = False
    ) -> RoutingData:
        """Hidden states of the passages and of the questions whose passages are all there."""
        texts = read_passages(list(passages))
        index = {passage.id: place for place, passage in enumerate(texts)}
        asked = [one for one in read_questions(list(questions)) if set(one.gold) <= index.keys()]
        documents = self.cache.documents(
            [self.document_ids(passage, always_titled=always_titled) for passage in texts],
            self.msa.router_chunk,
        )
        hidden = self.cache.questions(
            [self.question_ids(question) for question in asked], self.head, self.prompt.question_position
        )
        gold = [[index[id] for id in question.gold] for question in asked]
        return RoutingData(texts, asked, documents, hidden, gold)

    def document_ids(self, passage: Passage, *, always_titled: bool) -> list[int]:
        """Two of three training passages show their title, so that routers learn to do with and without."""
        return self.prompt.document(1, header(passage, always_titled), passage.text)[:MAX_PASSAGE_TOKENS]

    def question_ids(self, question: Question) -> list[int]:
        """The tokens that route; what a layout puts behind them cannot reach them."""
        ids, routes = self.prompt.question(question.text)
        return [token for token, routing in zip(ids, routes, strict=True) if routing][:MAX_QUESTION_TOKENS]


def header(passage: Passage, always_titled: bool) -> str:
    """What a training passage is headed by."""
    titled = always_titled or zlib.crc32(passage.id.encode()) % 3 != 0
    return document_header(title=passage.title if titled else None, when=None, speaker=None)
