"""Asking a memory: route, read the evidence, answer. One ``Asking`` is one question.

Each public method is a generator that the worker thread advances step by step. Knows the order of
things; scoring belongs to the engine, rounds to ``retrieval``, choosing text to ``recall``, rows to the
store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from msa_memory.config import MemoryConfig
from msa_memory.conversation import Conversation
from msa_memory.engine.bank_view import BankView, Selection
from msa_memory.engine.context import Sequence as Row
from msa_memory.engine.engine import Engine, Routing
from msa_memory.engine.generation import Generation
from msa_memory.engine.grown_contexts import Grown
from msa_memory.engine.interleave import ANSWER_PREFIX, Interleave, InterleaveOptions
from msa_memory.engine.sampling import Constraint, SamplingOptions
from msa_memory.errors import ConfigError, InvalidDocumentError, LimitError, NotFoundError
from msa_memory.living_bank import LivingBank
from msa_memory.persistence import PassageText, Store
from msa_memory.recall import (
    MIN_EXCERPT_TOKENS,
    Excerpt,
    citation,
    cite,
    evidence_entry,
    evidence_text,
    to_source,
)
from msa_memory.retrieval import Recalled, Retrieval
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
NOTHING_STORED = "I don't know: this memory is empty."
NOTHING_MATCHES = "I don't know: nothing in this memory matches the filter."
MOST_CITATIONS = 9999
WINDOW_RESERVE = 32
"""Tokens of the context window left free: joined entries may take some more than each alone."""
FRESH_STARTS = 8
"""How often a question starts over when what it reads is forgotten or replaced meanwhile."""
EXPLAINED_PASSAGES = 20
Scores = NDArray[np.float32]
S = TypeVar("S")
T = TypeVar("T")


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
    evidence: Literal["auto", "router", "generative"] = "auto"
    max_tokens: int | None = None
    """Of evidence."""
    conversation: Conversation | None = None
    """What to continue; ``question`` is its newest user turn."""
    recall: bool = True
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if self.stop is not None and not isinstance(self.stop, str | Sequence):
            raise ConfigError(f"stop is {self.stop!r}; expected a string or a list of strings")
        self.sampling(MemoryConfig())  # checks temperature and stop
        for name in ("top_k", "k", "max_rounds", "max_new_tokens", "max_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if not isinstance(self.evidence, str) or self.evidence not in ("auto", "router", "generative"):
            raise ConfigError(f"evidence is {self.evidence!r:.60}; expected 'auto', 'router' or 'generative'")

    def sampling(self, config: MemoryConfig) -> SamplingOptions:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingOptions(
            max_new_tokens=self.max_new_tokens or config.max_new_tokens,
            temperature=self.temperature,
            stop=stop,
        )


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
        self._recalls = options.recall and bool(options.question.strip())
        self._epoch = 0
        """Of the kept contexts, when the prompt was read."""
        self._before: Grown | None = None
        """What this conversation has read before, where conversations grow."""

    def search(self) -> Generator[None, None, list[Source]]:
        """The k best distinct documents, as whole passages."""
        return (yield from self._undisturbed(self._view(), self._find))

    def _find(self, view: BankView) -> Generator[None, None, list[Source]]:
        """Route and look the texts up. NotFoundError where one was forgotten or replaced in between."""
        routing = yield from self._route(view)
        routing, hits = self._retrieval.best(routing, self.options.k or 5)
        scores = routing.relevance()
        by_number = dict(zip(routing.numbers.tolist(), scores.tolist(), strict=True))
        numbers = [hit.passages[0].number for hit in hits]
        texts = self.store.passages(numbers)
        if gone := [number for number in numbers if number not in texts]:
            raise NotFoundError(f"passages {gone} were forgotten or replaced while they were read; ask again")
        found = [texts[number] for number in numbers]
        return [
            to_source(Excerpt(text, by_number[text.record.number], text.record.start, text.record.end))
            for text in found
        ]

    @property
    def _retrieval(self) -> Retrieval:
        options = self.options
        return Retrieval(
            self.engine,
            self.bank,
            self.store,
            self.config,
            options.question,
            self._route,
            options.k,
            options.max_rounds,
        )

    def context(self) -> Generator[None, None, Context]:
        """The evidence as one citable block."""
        budget = self.options.max_tokens or self.config.max_evidence_tokens
        render = partial(citation, MOST_CITATIONS)

        def recall(view: BankView) -> Generator[None, None, Recalled]:
            routing = yield from self._route(view)
            return (yield from self._retrieval.recall(view, routing, budget, render))

        recalled = yield from self._undisturbed(self._view(), recall)
        return Context(
            text="\n".join(citation(number, excerpt) for number, excerpt in enumerate(recalled.excerpts, 1)),
            sources=tuple(to_source(excerpt) for excerpt in recalled.excerpts),
        )

    def explain(self) -> Generator[None, None, Explanation]:
        """Per router layer: the best passages, their documents and scores."""
        view = self._view()
        routing = yield from self._route(view)
        layers = [
            self._explain_layer(view, layer, routing.scores[slot])
            for slot, layer in enumerate(self.engine.msa.router_layers)
        ]
        sources = yield from self.search()
        return Explanation(question=self.options.question, layers=tuple(layers), sources=tuple(sources))

    def answer(self) -> Generator[AnswerChunk | None, None, Answer]:
        """Retrieve, read, answer; yields text as it becomes safe to show, at the end the whole Answer."""
        clock = _Clock()
        if self._recalls:
            view = self._view()
            generative = self._evidence() == "generative" and not self._continues()
            ways = self._interleaved if generative and len(view) else self._routed
            answer = yield from ways(view, clock)
        else:
            generation = yield from self._chat()
            answer = yield from self._generated(generation, Recalled(), clock)
        yield AnswerChunk(text="", answer=answer)
        return answer

    def _routed(self, view: BankView, clock: _Clock) -> Generator[AnswerChunk | None, None, Answer]:
        """Router evidence: the routers' own scores name the passages that are read."""
        budget = self._budget()
        recalled, generation = yield from self._undisturbed(
            view, lambda view: self._read(view, budget, clock)
        )
        if generation is None:
            text = yield from _shown((), otherwise=self._why_nothing(view))
            return self._answer("", text, recalled, Usage(prompt_tokens=recalled.tokens), clock)
        return (yield from self._generated(generation, recalled, clock))

    def _generated(
        self, generation: Generation, recalled: Recalled, clock: _Clock
    ) -> Generator[AnswerChunk | None, None, Answer]:
        """Decode what was prefilled; keep the prompt for the next one that begins alike."""
        otherwise = "" if self.options.conversation else NOTHING_FOUND
        text = yield from _shown(self.engine.decode(generation), otherwise=otherwise)
        if self._recalls:
            self._keep(generation, recalled.excerpts)
        clock.lap("decode_s")
        prompt_tokens = recalled.tokens + generation.sequence.fed_tokens - len(generation.ids) + 1
        usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=len(generation.ids))
        reason = generation.finish_reason or "stop"
        found = generation.text if recalled.excerpts else ""
        return self._answer(found, text, recalled, usage, clock, reason)

    def _read(
        self, view: BankView, budget: int, clock: _Clock
    ) -> Generator[None, None, tuple[Recalled, Generation | None]]:
        """Retrieve and prefill the evidence; no generation where nothing is relevant."""
        routing = yield from self._route(view)
        best = float(routing.relevance().max(initial=-np.inf))
        if len(view) == 0 or best < self._min_score():
            clock.lap("route_s")
            chat = (yield from self._chat()) if self.options.conversation else None
            return Recalled(tokens=routing.tokens), chat
        recalled = yield from self._retrieval.recall(view, routing, budget, evidence_entry)
        clock.lap("route_s")
        known: Row | None
        going_on = self._going_on(view, routing.selections, recalled.excerpts)
        if going_on is not None:
            ids, known = going_on
        else:
            ids = self._prompt_ids(evidence_text(recalled.excerpts))
            known = self._known(self.engine.prompt.question_position, routing.selections, ids)
        generation = yield from self.engine.read_steps(
            view,
            routing.selections,
            ids,
            self.options.sampling(self.config),
            self.options.constraint,
            known,
            None if self.options.conversation else routing,
        )
        clock.lap("prefill_s")
        return recalled, generation

    def _chat(self) -> Generator[None, None, Generation]:
        """Prefill the conversation alone, as the backbone's own chat."""
        conversation, engine = self.options.conversation, self.engine
        if conversation is None:
            conversation = Conversation("", (("user", self.options.question),))
        sampling = self.options.sampling(self.config)
        room = engine.max_positions - sampling.max_new_tokens
        fitting = conversation.fitting(room, lambda shorter: len(engine.chat_ids(shorter.all_turns)))
        ids = engine.chat_ids(fitting.all_turns)
        self._check_room(len(ids), room)
        known = self._known(0, {}, ids)
        return (yield from engine.chat_steps(ids, sampling, self.options.constraint, known))

    def _known(self, position: int, selections: Mapping[int, Selection], ids: list[int]) -> Row | None:
        """What this namespace has read before that begins like ``ids``, over the same passages.

        Without recall nothing is kept: nobody looks then whether something was forgotten.
        """
        if not self._recalls:
            return None
        contexts = self.bank.contexts
        self._epoch = contexts.epoch
        return contexts.take(self.namespace, position, selections, ids)

    def _going_on(
        self, view: BankView, selections: dict[int, Selection], excerpts: Sequence[Excerpt]
    ) -> tuple[list[int], Row] | None:
        """Where conversations grow: this turn's prompt behind the earlier ones, and the row that read those.

        Evidence that stands in it is not read again. None where nothing is kept, the window is full, or the
        question may not see all that was read.
        """
        conversation = self.options.conversation
        if not self._grows or conversation is None or conversation.asked != len(conversation.turns) - 1:
            return None
        contexts, engine = self.bank.conversations, self.engine
        self._epoch = contexts.epoch
        before = conversation.turns[: conversation.asked]
        grown = contexts.take(self.namespace, conversation.system, before)
        if grown is None or not grown.passages.issubset(view.numbers[view.visible].tolist()):
            return None
        fresh = [excerpt for excerpt in excerpts if _entry(excerpt) not in grown.read]
        next_turn = engine.prompt.next_turn(before[-1][1], evidence_text(fresh), conversation.question)
        ids = [*grown.ids, *next_turn]
        if len(ids) > self._window():
            return None
        row = Row(grown.row.cache, grown.row.position, view, fed_tokens=grown.row.fed_tokens)
        row.attend_to(selections, {layer: slot for slot, layer in enumerate(engine.msa.router_layers)})
        self._before = grown
        return ids, row

    def _keep(self, generation: Generation, excerpts: Sequence[Excerpt]) -> None:
        """Keep the prompt that was read for the next one that goes on from it or begins alike."""
        row, conversation = generation.sequence, self.options.conversation
        if self._grows and conversation is not None and row.selections:
            read = {_entry(excerpt) for excerpt in excerpts}
            passages = {excerpt.passage.record.number for excerpt in excerpts}
            passages.update(number for choice in row.selections.values() for number in choice.numbers)
            if self._before is not None:
                read |= self._before.read
                passages |= self._before.passages
            grown = Grown(
                conversation.system,
                conversation.turns,
                row,
                tuple(generation.prompt),
                frozenset(read),
                frozenset(passages),
            )
            self.bank.conversations.keep(self.namespace, grown, self._epoch)
        else:
            self.bank.contexts.keep(self.namespace, row, generation.prompt, self._epoch)

    @property
    def _grows(self) -> bool:
        return self.config.context == "grow" and self._recalls

    def _prompt_ids(self, evidence: str) -> list[int]:
        conversation, prompt = self.options.conversation, self.engine.prompt
        if conversation is None:
            return prompt.reading(evidence, self.options.question)
        room = self._window() - self.engine.count_tokens(evidence)
        fitting = conversation.fitting(room, lambda shorter: len(self._conversation_ids(shorter, "")))
        return self._conversation_ids(fitting, evidence)

    def _conversation_ids(self, conversation: Conversation, evidence: str) -> list[int]:
        assert conversation.asked is not None
        return self.engine.prompt.conversation(
            conversation.turns, evidence, conversation.asked, conversation.system
        )

    def _continues(self) -> bool:
        """Whether there is more to read than one question, or a form the answer must take."""
        conversation = self.options.conversation
        turns = len(conversation.all_turns) if conversation else 1
        return turns > 1 or self.options.constraint is not None

    def _undisturbed(
        self, view: BankView, attempt: Callable[[BankView], Generator[S, None, T]]
    ) -> Generator[S, None, T]:
        """The attempt's result; it starts over where a passage was forgotten or replaced meanwhile.

        States and texts are fetched before the first word of an answer, so nothing is shown twice.
        """
        for _ in range(FRESH_STARTS):
            try:
                return (yield from attempt(view))
            except NotFoundError:
                view = self._view()
        return (yield from attempt(view))

    def _interleaved(self, view: BankView, clock: _Clock) -> Generator[AnswerChunk | None, None, Answer]:
        """Generative evidence: the model names the passages itself, round by round."""
        read: dict[int, PassageText] = {}

        def ask(view: BankView) -> Generator[AnswerChunk | None, None, tuple[Interleave, str]]:
            asking = self._interleave(view, read)
            shown = yield from _shown(asking.run(self.options.sampling(self.config)), opening=ANSWER_PREFIX)
            return asking, shown

        asking, shown = yield from self._undisturbed(view, ask)
        clock.lap("decode_s")
        result, scores = asking.result, asking.mean_scores()
        generation = result.generation
        assert generation is not None

        def excerpt(number: int) -> Excerpt:
            record = read[number].record
            return Excerpt(read[number], scores.get(number, 0.0), record.start, record.end)

        recalled = Recalled(
            rounds=[
                Round(number=place, documents=tuple(dict.fromkeys(read[n].record.document_id for n in named)))
                for place, named in enumerate(result.rounds, 1)
            ],
            excerpts=[excerpt(number) for named in result.rounds for number in named],
            dropped=[excerpt(number) for number in result.dropped],
        )
        usage = Usage(prompt_tokens=result.fed_tokens, completion_tokens=len(generation.ids))
        text = generation.text.strip().removeprefix(ANSWER_PREFIX)
        return self._answer(text, shown, recalled, usage, clock, generation.finish_reason or "stop")

    def _interleave(self, view: BankView, read: dict[int, PassageText]) -> Interleave:
        """A question whose evidence the model names; ``read`` collects the passages it reads."""

        def texts(numbers: Sequence[int]) -> dict[int, str]:
            found = self.store.passages(numbers)
            read.update(found)
            return {number: passage.text for number, passage in found.items()}

        options = InterleaveOptions(
            max_rounds=self.options.max_rounds or self.config.max_rounds,
            k=self.options.k or self.config.k,
            max_evidence_tokens=self.options.max_tokens or self.config.max_evidence_tokens,
            reprefill=self.config.interleave_reprefill,
            bidirectional=self.config.interleave_bidirectional,
        )
        top_k = self.options.top_k or self.config.top_k
        return self.engine.interleave(view, self.options.question, texts, options, top_k=top_k)

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

    def _evidence(self) -> str:
        asked = self.options.evidence
        return self.engine.msa.evidence if asked == "auto" else asked

    def _check_length(self) -> None:
        tokens = self.engine.count_tokens(self.options.question)
        if not tokens:
            raise InvalidDocumentError(
                f"the question {self.options.question!a} has no character this model can read; ask in words"
            )
        if tokens > self.config.max_question_tokens:
            raise LimitError(
                f"the question has {tokens} tokens; the limit is {self.config.max_question_tokens} "
                "(MemoryConfig.max_question_tokens)"
            )

    def _budget(self) -> int:
        """Tokens of evidence that the options allow and the model's context window has room for."""
        asked = self.options.max_tokens or self.config.max_evidence_tokens
        conversation = self.options.conversation
        if conversation is None:
            fixed = len(self.engine.prompt.reading("", self.options.question))
        else:  # its older turns make room for evidence
            fixed = len(self._conversation_ids(conversation.newest(), ""))
        self._check_room(fixed, self._window() - MIN_EXCERPT_TOKENS)
        return min(asked, self._window() - fixed)

    def _window(self) -> int:
        """Positions for evidence and question, once head, memory and answer have theirs."""
        answer = self.options.sampling(self.config).max_new_tokens
        return self.engine.max_positions - self.engine.prompt.question_position - WINDOW_RESERVE - answer

    def _check_room(self, fixed: int, room: int) -> None:
        if fixed > room:
            answer = self.options.sampling(self.config).max_new_tokens
            raise LimitError(
                f"the question and instructions take {fixed} tokens and max_new_tokens is {answer}; the "
                f"model's window of {self.engine.max_positions} leaves no room for evidence: ask for less"
            )

    def _why_nothing(self, view: BankView) -> str:
        if len(view):
            return NOTHING_FOUND
        if self.options.where:
            return NOTHING_MATCHES
        return NOTHING_FOUND if self.store.count(self.namespace) else NOTHING_STORED

    def _route(self, view: BankView, evidence: str = "") -> Generator[None, None, Routing]:
        top_k, conversation = self.options.top_k or self.config.top_k, self.options.conversation
        before = conversation.said_before if conversation else ""
        return (
            yield from self.engine.route_steps(
                self.options.question,
                view,
                top_k=top_k,
                evidence=evidence,
                turns_before=before,
                lexical_weight=self.config.lexical_weight,
            )
        )

    def _min_score(self) -> float:
        if self.config.min_score is not None:
            return self.config.min_score
        return float(self.engine.calibration.get("min_score", -np.inf))

    def _explain_layer(self, view: BankView, layer: int, scores: Scores) -> LayerExplanation:
        chosen = view.select(scores, EXPLAINED_PASSAGES)
        ranked = zip(chosen.numbers, chosen.scores, strict=True)
        known = [(number, score) for number, score in ranked if number in self.bank.records]
        return LayerExplanation(
            layer=layer,
            passages=tuple(number for number, _ in known),
            documents=tuple(self.bank.records[number].document_id for number, _ in known),
            scores=tuple(score for _, score in known),
        )

    def _answer(
        self,
        generated: str,
        shown: str,
        recalled: Recalled,
        usage: Usage,
        clock: _Clock,
        finish_reason: Literal["stop", "length"] = "stop",
    ) -> Answer:
        sources = tuple(to_source(excerpt) for excerpt in recalled.excerpts)
        return Answer(
            text=shown,
            found=self._says_something(generated),
            finish_reason=finish_reason,
            sources=cite(generated, self.options.question, sources),
            usage=usage,
            rounds=tuple(recalled.rounds),
            timings=clock.timings(),
            dropped=tuple(to_source(excerpt) for excerpt in recalled.dropped),
        )

    def _says_something(self, generated: str) -> bool:
        """Whether an answer is neither empty nor the model's way to say that the evidence lacks it."""
        said = generated.strip().rstrip(".").casefold()
        return bool(said) and said != self.engine.prompt.layout.refusal.strip().rstrip(".").casefold()


def _entry(excerpt: Excerpt) -> Hashable:
    """What tells one excerpt's text from any other."""
    return excerpt.passage.record.number, excerpt.start, excerpt.end


def _shown(
    texts: Iterable[str | None], *, opening: str = "", otherwise: str = NOTHING_FOUND
) -> Generator[AnswerChunk | None, None, str]:
    """Pass on an answer as it grows, without outer whitespace and ``opening``; ``otherwise`` if blank."""
    told, held, started = "", "", False
    for text in texts:
        held += text or ""
        if not told:
            held = held.lstrip()
        if not started and not opening.startswith(held):
            started, held = True, held.removeprefix(opening).lstrip()
        fresh = held.rstrip() if started else ""
        told, held = told + fresh, held[len(fresh) :]
        yield AnswerChunk(text=fresh) if fresh else None
    rest = held.removeprefix(opening).strip() if not started else ""
    if fresh := rest or ("" if told else otherwise):
        yield AnswerChunk(text=fresh)
    return told + fresh


class _Clock:
    """Seconds per stage of one query."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Book the time since the last lap under ``stage``."""
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self.last
        self.last = now

    def timings(self) -> Timings:
        return Timings(**self.laps, total_s=time.perf_counter() - self.started)
