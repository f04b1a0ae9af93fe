"""``Subject``: the memory under examination, with the parts of it that can be switched off.

The only module here that looks inside a memory: rankings by each signal alone, and answers of the same
model from given texts, with or without attention to the memory's states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from msa_memory.engine.context import Feed, advance
from msa_memory.engine.engine import Engine, Routing
from msa_memory.engine.layout import document_header, evidence_entry
from msa_memory.engine.lexical import question_terms
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.memory import MemoryModel
from msa_memory.recall import best_documents
from msa_memory.types import Answer, Document, Source

__all__ = ["MEMORY", "ROUTERS", "Ranking", "Reading", "Subject", "Text", "WORDS"]

MEMORY, ROUTERS, WORDS = "memory", "routers_alone", "words_alone"
EVERYTHING = 1_000_000
"""As many documents as ``MemoryModel.list`` gives at once."""
Where = Mapping[str, Any]
Scores = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Text:
    """Something to read: a document or a part of one, with what its evidence entry says about it."""

    id: str
    text: str
    metadata: Mapping[str, Any]
    timestamp: datetime

    @classmethod
    def of(cls, one: Source | Document) -> Text:
        return cls(one.id, one.text, one.metadata, one.timestamp)

    def entry(self) -> str:
        """The text as the model reads it among evidence."""
        title, speaker = self.metadata.get("title"), self.metadata.get("speaker")
        header = document_header(
            title=title if isinstance(title, str) else None,
            when=None,
            speaker=speaker if isinstance(speaker, str) else None,
        )
        return evidence_entry(header, self.timestamp.date(), self.text)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Documents by id, best first, per signal (``memory`` is all of them together), and the best score."""

    ids: dict[str, list[str]]
    best_score: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model made of texts; ``tokens`` is the prompt's length."""

    text: str
    refused: bool
    tokens: int
    seconds: float


class Subject:
    """A memory to be examined. Every answer is greedy and at most as long as the memory's own."""

    def __init__(self, memory: MemoryModel) -> None:
        self.memory = memory
        self.config = memory._shared.config

    def fill(self, items: Iterable[Mapping[str, Any]], *, progress: bool | None = None) -> None:
        """Add what is not there yet; an interrupted fill goes on."""
        self.memory.add_many(items, on_conflict="skip", progress=progress)

    def ask(self, question: str, **options: Any) -> Answer:
        """The memory as people use it."""
        return self.memory.query(question, **options)

    def rank(self, question: str, k: int, *, where: Where | None = None, layers: bool = False) -> Ranking:
        """The ``k`` best documents by all signals, the routers alone, the words alone and each layer."""
        started = time.perf_counter()
        return self.memory._run(self._rank(question, k, where, layers, started))

    def read(
        self, question: str, texts: Sequence[Text], *, attend: bool = False, where: Where | None = None
    ) -> Reading:
        """The same model's answer from texts, best first, within the memory's evidence budget.

        ``attend`` adds attention to the states the routers choose; without texts it is all there is.
        """
        return self.memory._run(self._read(question, self.fitting(texts), attend, where))

    def read_everything(self, question: str) -> Reading | None:
        """The answer from all documents at once, oldest first; None where they exceed the model's window."""
        if self.memory.stats.tokens > self.window:
            return None
        texts = [Text.of(document) for document in reversed(self.memory.list(limit=EVERYTHING).items)]
        return self.memory._run(self._read_whole(question, texts))

    def doubt(self, question: str, texts: Sequence[Text], *, where: Where | None = None) -> float:
        """How sure the model is that texts and memory hold no answer (``Engine.doubt``)."""
        return self.memory._run(self._doubt(question, self.fitting(texts), where))

    def fitting(self, texts: Sequence[Text]) -> list[Text]:
        """As many of the best texts as the memory would read; the first one is cut if it has to be."""
        return self.memory._run(self._fitting(texts))

    def model(self) -> dict[str, str]:
        """The model's name and fingerprint."""

        def look() -> dict[str, str]:
            engine = self.memory._engine()
            return {"name": engine.name, "fingerprint": engine.fingerprint}

        return self.memory._run(_at_once(look))

    @property
    def window(self) -> int:
        """Tokens the model can read at once."""
        return self.memory._run(_at_once(lambda: self.memory._engine().max_positions))

    def tokens(self, text: str) -> int:
        """Tokens of a text, by the model's own tokenizer."""
        return self.memory._run(_at_once(lambda: self.memory._engine().count_tokens(text)))

    # on the worker thread

    def _rank(
        self, question: str, k: int, where: Where | None, layers: bool, started: float
    ) -> Generator[None, None, Ranking]:
        routing = self._route(question, where)
        seconds = time.perf_counter() - started
        yield
        records = self.memory._bank().records
        signals = self._signals(question, routing, layers)
        ids = {
            name: [hit.document_id for hit in best_documents(routing.numbers, scores, records, k)]
            for name, scores in signals.items()
        }
        best = float(routing.relevance().max(initial=-1.0))
        return Ranking(ids, max(best, -1.0), seconds)

    def _route(self, question: str, where: Where | None) -> Routing:
        view = self.memory._bank().view(self.memory.namespace_name, where)
        return self.memory._engine().route(
            question, view, top_k=self.config.top_k, lexical_weight=self.config.lexical_weight
        )

    def _signals(self, question: str, routing: Routing, layers: bool) -> dict[str, Scores]:
        """Scores per signal ``[P]``, masked passages -inf."""
        words = (
            routing.words if routing.lexical_weight else routing.view.score_words(question_terms(question))
        )
        hidden = ~np.isfinite(routing.mean())
        found = {
            MEMORY: routing.relevance(),
            ROUTERS: routing.mean(),
            WORDS: np.where(hidden, np.float32(-np.inf), words),
        }
        if layers:
            numbers = self.memory._engine().msa.router_layers
            found |= {f"layer_{layer}": routing.scores[slot] for slot, layer in enumerate(numbers)}
        return found

    def _fitting(self, texts: Sequence[Text]) -> Generator[None, None, list[Text]]:
        engine, left = self.memory._engine(), self.config.max_evidence_tokens
        kept: list[Text] = []
        yield
        for text in texts:
            size = engine.count_tokens(text.entry())
            if size > left and not kept:
                text = _cut(text, engine, left)
                size = engine.count_tokens(text.entry())
            if size <= left:
                kept.append(text)
                left -= size
        return kept

    def _read(
        self, question: str, texts: Sequence[Text], attend: bool, where: Where | None
    ) -> Generator[None, None, Reading]:
        started, engine = time.perf_counter(), self.memory._engine()
        view = self.memory._bank().view(self.memory.namespace_name, where)
        selections = self._route(question, where).selections if attend else {}
        yield
        ids = engine.prompt.reading(_evidence(texts), question)
        sampling = SamplingOptions(max_new_tokens=self.config.max_new_tokens)
        generation = engine.read(view, selections, ids, sampling)
        for _ in engine.decode(generation):
            yield
        seconds = time.perf_counter() - started
        text = generation.text.strip()
        return Reading(text, _says_refusal(text, engine), len(ids), seconds)

    def _doubt(
        self, question: str, texts: Sequence[Text], where: Where | None
    ) -> Generator[None, None, float]:
        engine, routing = self.memory._engine(), self._route(question, where)
        yield
        ids = engine.prompt.reading(_evidence(texts), question)
        row = engine.start(routing.view, capacity=len(ids))
        row.attend_to(routing.selections, {layer: at for at, layer in enumerate(engine.msa.router_layers)})
        logits = advance(engine.decoder, [Feed(row, ids, noted=engine.judging_layers)])[0]
        return engine.doubt(row, logits, routing)

    def _read_whole(self, question: str, texts: Sequence[Text]) -> Generator[None, None, Reading | None]:
        engine = self.memory._engine()
        size = len(engine.prompt.reading(_evidence(texts), question))
        room = engine.max_positions - engine.prompt.question_position - self.config.max_new_tokens
        if size > room:
            return None
        return (yield from self._read(question, texts, False, None))


def _at_once(work: Callable[[], T]) -> Generator[None, None, T]:
    """One step that does the work."""
    yield
    return work()


def _evidence(texts: Sequence[Text]) -> str:
    """Texts given best first as the memory would show them: oldest first, of one time the best last."""
    ordered = list(reversed(texts))
    ordered.sort(key=lambda text: text.timestamp)
    return "\n".join(text.entry() for text in ordered)


def _cut(text: Text, engine: Engine, room: int) -> Text:
    """The beginning of a text that takes at most ``room`` tokens."""
    part = text.text
    while part and engine.count_tokens(Text(text.id, part, text.metadata, text.timestamp).entry()) > room:
        part = part[: int(len(part) * 0.9)]
    return Text(text.id, part, text.metadata, text.timestamp)


def _says_refusal(text: str, engine: Engine) -> bool:
    """Whether an answer is empty or the model's way to say that the evidence lacks it."""
    refusal = engine.prompt.layout.refusal.strip().rstrip(".").casefold()
    return not text or text.rstrip(".").casefold() == refusal
