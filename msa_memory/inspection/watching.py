"""A question that is watched while it is answered: what every router layer thought of every chunk.

``Watching`` is the memory's own way of answering with an eye on it; it changes no score and no choice. Chunk
scores are computed again from the router queries and the stored routing keys, as the bank computes them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.answering import AnswerOptions, Asking
from msa_memory.documents import check_question
from msa_memory.engine import ops
from msa_memory.engine.bank_view import BankView, Selection
from msa_memory.engine.engine import Routing
from msa_memory.engine.interleave import Interleave
from msa_memory.errors import NotFoundError, StateDamagedError
from msa_memory.persistence import PassageText
from msa_memory.types import Answer, AnswerChunk

if TYPE_CHECKING:
    from msa_memory.memory import MemoryModel

__all__ = ["Candidate", "RoutingPicture", "Watched", "Watching"]

SHOWN_PASSAGES = 12
Scores = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A passage the routers ranked high, or whose text was read. L router layers, R router chunks."""

    passage: int
    document_id: str
    header: str
    text: str
    starts: tuple[int, ...]
    """Where each chunk begins in ``text``; those of the header begin at 0."""
    chunks: Scores
    """``[L, R]``."""
    layers: tuple[float, ...]
    """The passage's score on each layer."""
    chosen: tuple[bool, ...]
    """Whether it was among the layer's ``top_k``, whose states are attended to."""
    mean: float
    words: float | None
    """The lexical score; None where the model does not use one here."""
    relevance: float


@dataclass(frozen=True, slots=True)
class RoutingPicture:
    """One routing: the layers, the best passages, and how many each layer chose besides those shown."""

    layers: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    unseen: tuple[int, ...]
    passages: int
    """Passages that could have been chosen."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A question, its answer, and the routings on the way, one per round."""

    question: str
    answer: Answer
    evidence: str
    """``router`` or ``generative``: who named the documents that were read."""
    min_score: float
    """Relevance below which nothing counts as found."""
    lexical_weight: float
    routings: tuple[RoutingPicture, ...]
    resident_bytes: int

    @property
    def document_ids(self) -> tuple[str, ...]:
        """Documents that were read, dropped or shown as candidates, without repetition."""
        read = [source.id for source in (*self.answer.sources, *self.answer.dropped)]
        ranked = [candidate.document_id for one in self.routings for candidate in one.candidates]
        return tuple(dict.fromkeys([*read, *ranked]))


@dataclass(frozen=True, slots=True)
class _Seen:
    """One routing as it happened; scores ``[L, P]`` follow ``view.numbers``."""

    view: BankView
    scores: Scores
    selections: dict[int, Selection]
    queries: dict[int, Tensor]
    words: Scores | None
    relevance: Scores


class Watching(Asking):
    """``Asking`` that remembers every routing of its answer."""

    _interleaving: Interleave | None = None
    _latest: object = None

    @classmethod
    def ask(
        cls, memory: MemoryModel, question: str, *, where: Mapping[str, Any] | None, k: int | None
    ) -> Watched:
        """Answer a question of a memory as ``query`` does, and say how."""
        options = AnswerOptions(check_question(question), where=where, k=k)
        shared = memory._shared
        asking = cls(
            memory._engine, memory._bank, shared.store, memory.namespace_name, shared.config, options
        )
        return memory._run(asking.watched())

    def watched(self) -> Generator[AnswerChunk | None, None, Watched]:
        """``answer``, and what was seen meanwhile."""
        self._seen: list[_Seen] = []
        steps = self.answer()
        while True:
            try:
                chunk = next(steps)
            except StopIteration as stop:
                answer: Answer = stop.value
                break
            self._note_interleaving()
            yield chunk
        pictures = []
        for seen in self._seen:
            pictures.append(self._picture(seen, (source.passage for source in answer.sources)))
            yield None
        weight = self.config.lexical_weight
        if weight is None:
            weight = self.engine.calibration.get("lexical_weight", 0.0)
        return Watched(
            question=self.options.question,
            answer=answer,
            evidence="router" if self._interleaving is None else "generative",
            min_score=self._min_score(),
            lexical_weight=weight,
            routings=tuple(pictures),
            resident_bytes=self.bank.bank.nbytes(),
        )

    def _route(self, view: BankView, evidence: str = "") -> Generator[None, None, Routing]:
        routing = yield from super()._route(view, evidence)
        if not evidence:  # the first round, or the first again after a change of the memory
            self._seen.clear()
        words = routing.words if routing.lexical_weight else None
        self._seen.append(
            _Seen(view, routing.scores, routing.selections, routing.queries, words, routing.relevance())
        )
        return routing

    def _interleave(self, view: BankView, read: dict[int, PassageText]) -> Interleave:
        self._seen.clear()
        self._interleaving = super()._interleave(view, read)
        return self._interleaving

    def _note_interleaving(self) -> None:
        """Remember the model's newest routing if it is one that was not there at the last step."""
        if self._interleaving is None or not self._interleaving.row.scores:
            return
        row = self._interleaving.row
        newest = row.scores[self.engine.msa.router_layers[-1]]
        if newest is self._latest:
            return
        self._latest = newest
        scores = np.stack([row.scores[layer] for layer in self.engine.msa.router_layers])
        view = self._interleaving.view
        self._seen.append(
            _Seen(
                view,
                scores,
                dict(row.selections),
                dict(row.queries),
                None,
                self.engine.msa.mean_of_layers(scores),
            )
        )

    def _picture(self, seen: _Seen, read: Iterable[int]) -> RoutingPicture:
        layers = self.engine.msa.router_layers
        best = seen.view.select(seen.relevance, SHOWN_PASSAGES).numbers
        texts = self.store.passages(dict.fromkeys([*best, *read]))
        at = {int(number): place for place, number in enumerate(seen.view.numbers)}
        found = [self._candidate(seen, at[number], texts[number]) for number in texts if number in at]
        candidates = sorted(
            (one for one in found if one is not None), key=lambda one: (-one.relevance, one.passage)
        )
        shown = {candidate.passage for candidate in candidates}
        chosen = [seen.selections.get(layer, Selection((), ())).numbers for layer in layers]
        return RoutingPicture(
            layers=tuple(layers),
            candidates=tuple(candidates),
            unseen=tuple(len(set(numbers) - shown) for numbers in chosen),
            passages=len(seen.view),
        )

    def _candidate(self, seen: _Seen, place: int, text: PassageText) -> Candidate | None:
        """One passage in detail; None where it was forgotten meanwhile or its states are damaged."""
        number, layers = text.record.number, self.engine.msa.router_layers
        try:
            chunks = self._chunk_scores(seen, number)
        except (NotFoundError, StateDamagedError):
            return None
        return Candidate(
            passage=number,
            document_id=text.record.document_id,
            header=text.header,
            text=text.text,
            starts=tuple(
                self.engine._characters(chunk, number, text.header, text.text)[0]
                for chunk in range(chunks.shape[1])
            ),
            chunks=chunks,
            layers=tuple(float(score) for score in seen.scores[:, place]),
            chosen=tuple(
                layer in seen.selections and number in seen.selections[layer].numbers for layer in layers
            ),
            mean=float(self.engine.msa.mean_of_layers(seen.scores[:, place])),
            words=None if seen.words is None else float(seen.words[place]),
            relevance=float(seen.relevance[place]),
        )

    def _chunk_scores(self, seen: _Seen, number: int) -> Scores:
        """Scores of a passage's router chunks ``[L, R]``; their reduction is the passage's score."""
        msa = self.engine.msa
        keys = seen.view.fetch(number).router_keys
        rows = []
        for slot, layer in enumerate(msa.router_layers):
            query = seen.queries[layer].float()
            rows.append(
                ops.score_chunks(
                    query,
                    keys[slot].float().to(query.device),
                    head_reduce=msa.head_reduce,
                    query_reduce=msa.query_reduce,
                    scale=msa.score_scale(query.shape[-1]),
                )
                .cpu()
                .numpy()
            )
        return np.stack(rows)
