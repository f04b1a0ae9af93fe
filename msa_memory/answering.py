"""Asking a memory: route, read the evidence, answer. One ``Asking`` is one question.

Each public method is a generator that the worker thread advances step by step. Knows the order of
things; scoring belongs to the engine, choosing text to ``recall``, rows to the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from msa_memory.config import MemoryConfig
from msa_memory.engine.bank import BankView
from msa_memory.engine.engine import Engine, Routing
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.errors import ConfigError, LimitError
from msa_memory.living_bank import LivingBank
from msa_memory.persistence import PassageText, Store
from msa_memory.recall import Excerpt, Hit, best_documents, cite, evidence_text, fit_evidence, to_source
from msa_memory.types import (
    Answer,
    AnswerChunk,
    Context,
    Explanation,
    LayerExplanation,
    Round,
    Source,
    Timings,
    Usage,
)

__all__ = ["AnswerOptions", "Asking", "NOTHING_FOUND"]

NOTHING_FOUND = "I don't know: nothing in this memory answers that."
EXPLAINED_PASSAGES = 20
Scores = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """One question and how to answer it; None takes the memory's or the model's default."""

    question: str
    top_k: int | None = None
    k: int | None = None
    where: Mapping[str, Any] | None = None
    max_rounds: int | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    stop: str | Sequence[str] | None = None
    evidence: Literal["auto", "router"] = "auto"
    max_evidence_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "k", "max_rounds", "max_new_tokens", "max_evidence_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.evidence not in ("auto", "router"):
            raise ConfigError(f"evidence is {self.evidence!r}; expected 'auto' or 'router'")

    def sampling(self, config: MemoryConfig) -> SamplingOptions:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingOptions(
            max_new_tokens=self.max_new_tokens or config.max_new_tokens,
            temperature=self.temperature,
            stop=stop,
        )


@dataclass(slots=True)
class _Recalled:
    """What the rounds of retrieval brought: hits best first per round, and every passage's score."""

    hits: list[Hit] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    excerpts: list[Excerpt] = field(default_factory=list)
    dropped: list[Excerpt] = field(default_factory=list)


class Asking:
    """One question to one namespace of a memory."""

    def __init__(
        self,
        engine: Callable[[], Engine],
        bank: Callable[[], LivingBank],
        store: Store,
        namespace: str,
        config: MemoryConfig,
        options: AnswerOptions,
    ) -> None:
        self._load_engine, self._load_bank = engine, bank
        self.store, self.namespace = store, namespace
        self.config, self.options = config, options

    def search(self) -> Generator[None, None, list[Source]]:
        """The k best distinct documents, as whole passages."""
        routing = self._route(self._view())
        yield
        scores = routing.mean()
        hits = best_documents(routing.numbers, scores, self.bank.records, self.options.k or 5)
        by_number = dict(zip(routing.numbers.tolist(), scores.tolist(), strict=True))
        texts = self.store.passages([hit.passages[0].number for hit in hits])
        found = [texts[hit.passages[0].number] for hit in hits if hit.passages[0].number in texts]
        return [
            to_source(Excerpt(text, by_number[text.record.number], text.record.start, text.record.end))
            for text in found
        ]

    def context(self) -> Generator[None, None, Context]:
        """The evidence as one citable block."""
        view = self._view()
        recalled = yield from self._recall(view, self._route(view))
        return Context(
            text="\n".join(
                f"[{number}] ({excerpt.passage.timestamp.date().isoformat()}) {excerpt.text.strip()}"
                for number, excerpt in enumerate(recalled.excerpts, 1)
            ),
            sources=tuple(to_source(excerpt) for excerpt in recalled.excerpts),
        )

    def explain(self) -> Generator[None, None, Explanation]:
        """Per router layer: the best passages, their documents and scores."""
        view = self._view()
        routing = self._route(view)
        yield
        layers = [
            self._explain_layer(view, layer, routing.scores[slot])
            for slot, layer in enumerate(self.engine.msa.router_layers)
        ]
        sources = yield from self.search()
        return Explanation(question=self.options.question, layers=tuple(layers), sources=tuple(sources))

    def answer(self) -> Generator[AnswerChunk | None, None, Answer]:
        """Route, read, answer; yields text as it becomes safe to show, at the end the whole Answer."""
        started = time.perf_counter()
        view = self._view()
        routing = self._route(view)
        yield None
        best = float(routing.mean().max(initial=-np.inf))
        if len(view) == 0 or best < self._min_score():
            answer = self._nothing(routing, started)
            yield AnswerChunk(text=answer.text)
            yield AnswerChunk(text="", answer=answer)
            return answer
        recalled = yield from self._recall(view, routing)
        routed = time.perf_counter()
        options = self.options.sampling(self.config)
        evidence = evidence_text(recalled.excerpts)
        generation = self.engine.read(view, routing.selections, evidence, self.options.question, options)
        read = time.perf_counter()
        for text in self.engine.decode(generation):
            yield AnswerChunk(text=text) if text else None
        done = time.perf_counter()
        answer = self._answer(generation.text, recalled).model_copy(
            update={
                "usage": Usage(
                    prompt_tokens=recalled.tokens + generation.sequence.fed_tokens - len(generation.ids) + 1,
                    completion_tokens=len(generation.ids),
                ),
                "timings": Timings(
                    route_s=routed - started,
                    prefill_s=read - routed,
                    decode_s=done - read,
                    total_s=done - started,
                ),
            }
        )
        yield AnswerChunk(text="", answer=answer)
        return answer

    # steps

    @property
    def engine(self) -> Engine:
        return self._load_engine()

    @property
    def bank(self) -> LivingBank:
        return self._load_bank()

    def _view(self) -> BankView:
        self._check_length()
        return self.bank.view(self.namespace, self.options.where)

    def _check_length(self) -> None:
        tokens = self.engine.count_tokens(self.options.question)
        if tokens > self.config.max_question_tokens:
            raise LimitError(
                f"the question has {tokens} tokens; the limit is {self.config.max_question_tokens} "
                "(MemoryConfig.max_question_tokens)"
            )

    def _route(self, view: BankView, evidence: str = "") -> Routing:
        top_k = self.options.top_k or self.config.top_k
        return self.engine.route(self.options.question, view, top_k=top_k, evidence=evidence)

    def _recall(self, view: BankView, routing: Routing) -> Generator[None, None, _Recalled]:
        """Rounds of retrieval, then the evidence that fits the budget."""
        recalled = _Recalled()
        k = self.options.k or self.config.k
        rounds = min(k, self._rounds(routing, k))
        for number in range(rounds):
            share = k // rounds + (1 if number < k % rounds else 0)
            if number:
                newest = evidence_text(self._fit(routing, recalled.hits[-1:], recalled.scores)[0])
                routing = self._route(view, newest)
                yield
            hits = best_documents(
                routing.numbers,
                routing.mean(),
                self.bank.records,
                share,
                [hit.document_id for hit in recalled.hits],
            )
            if not hits:
                break
            recalled.tokens += routing.tokens
            recalled.hits += hits
            recalled.rounds.append(Round(number=number + 1, documents=tuple(hit.document_id for hit in hits)))
            recalled.scores.update(
                {number: score for number, score in zip(routing.numbers.tolist(), routing.mean().tolist(), strict=True)
                 if number not in recalled.scores}
            )  # fmt: skip
        recalled.excerpts, recalled.dropped = self._fit(routing, recalled.hits, recalled.scores)
        return recalled

    def _rounds(self, routing: Routing, k: int) -> int:
        """How many rounds to go: one where the first is confident, or the model was not trained for more."""
        asked = self.options.max_rounds
        most = asked or min(self.config.max_rounds, int(self.engine.calibration.get("max_rounds", 1)))
        margin = self.engine.calibration.get("confident_margin")
        if most == 1 or margin is None or asked is not None:
            return most
        best = np.sort(routing.mean()[np.isfinite(routing.mean())])[::-1]
        confident = len(best) <= k or best[0] - best[k] >= margin
        return 1 if confident else most

    def _fit(
        self, routing: Routing, hits: Sequence[Hit], scores: dict[int, float]
    ) -> tuple[list[Excerpt], list[Excerpt]]:
        texts = self.store.passages([record.number for hit in hits for record in hit.passages])
        kept = [
            Hit(
                hit.document_id, hit.score, tuple(record for record in hit.passages if record.number in texts)
            )
            for hit in hits
        ]
        budget = self.options.max_evidence_tokens or self.config.max_evidence_tokens
        return fit_evidence(
            [hit for hit in kept if hit.passages],
            texts,
            scores,
            budget,
            self.engine.count_tokens,
            lambda passage: self._best_chunk(routing, passage),
        )

    def _best_chunk(self, routing: Routing, passage: PassageText) -> tuple[int, int]:
        """Characters, in the document, of the passage's chunk that the routers score highest."""
        record = passage.record
        first, last = self.engine.best_chunk(routing, record.number, passage.header, passage.text)
        return record.start + first, record.start + last

    def _min_score(self) -> float:
        if self.config.min_score is not None:
            return self.config.min_score
        return float(self.engine.calibration.get("min_score", -np.inf))

    def _explain_layer(self, view: BankView, layer: int, scores: Scores) -> LayerExplanation:
        chosen = view.select(scores, EXPLAINED_PASSAGES)
        documents = tuple(self.bank.records[number].document_id for number in chosen.numbers)
        return LayerExplanation(
            layer=layer, passages=chosen.numbers, documents=documents, scores=chosen.scores
        )

    def _nothing(self, routing: Routing, started: float) -> Answer:
        spent = time.perf_counter() - started
        return Answer(
            text=NOTHING_FOUND,
            found=False,
            usage=Usage(prompt_tokens=routing.tokens),
            timings=Timings(route_s=spent, total_s=spent),
        )

    def _answer(self, text: str, recalled: _Recalled) -> Answer:
        text = text.strip()
        sources = tuple(to_source(excerpt) for excerpt in recalled.excerpts)
        return Answer(
            text=text or NOTHING_FOUND,
            found=bool(text),
            sources=cite(text, self.options.question, sources),
            rounds=tuple(recalled.rounds),
            dropped=tuple(to_source(excerpt) for excerpt in recalled.dropped),
        )
