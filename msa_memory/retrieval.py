"""Rounds of retrieval: which documents a question reads, and how much of each.

The first round reads what is most relevant to the question. Each later one goes by what was read before it:
first what that names by its title, then the next best; where it names nothing, what question and evidence
find together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from msa_memory.config import MemoryConfig
from msa_memory.engine.bank_view import BankView
from msa_memory.engine.engine import Engine, Routing
from msa_memory.engine.evidence_choice import near_the_best
from msa_memory.living_bank import LivingBank
from msa_memory.naming import names
from msa_memory.persistence import PassageText, Store
from msa_memory.recall import Excerpt, Hit, best_documents, evidence_entry, evidence_text, fit_evidence
from msa_memory.types import Round

__all__ = ["Recalled", "Retrieval"]

NAMED_AMONG = 128
"""Documents that a later round looks through for those that the evidence names."""
Route = Callable[[BankView, str], Generator[None, None, Routing]]
"""Routes the question over a view, along with some evidence."""


@dataclass(slots=True)
class Recalled:
    """What the rounds of retrieval brought: hits best first per round, and every passage's score."""

    hits: list[Hit] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    excerpts: list[Excerpt] = field(default_factory=list)
    dropped: list[Excerpt] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How one question retrieves.

    ``k`` documents and ``max_rounds`` rounds; None leaves both to the configuration and the model, and then
    no more is read than the model was calibrated to.
    """

    engine: Engine
    bank: LivingBank
    store: Store
    config: MemoryConfig
    question: str
    route: Route
    k: int | None = None
    max_rounds: int | None = None

    def best(self, routing: Routing, k: int, skip: Iterable[str] = ()) -> tuple[Routing, list[Hit]]:
        """The k best documents, by exact scores of all their passages that count."""
        skipped = tuple(skip)
        while True:
            scores = routing.relevance()
            hits = best_documents(routing.numbers, scores, self.bank.records, k, skipped)
            shown = [record.number for hit in hits for record in hit.passages]
            lowest = scores[np.isin(routing.numbers, shown)].min(initial=np.inf)
            needed = int((scores >= lowest).sum())
            if needed <= routing.exact:
                return routing, hits
            routing = routing.settled(2 * needed)

    def recall(
        self, view: BankView, routing: Routing, budget: int, render: Callable[[Excerpt], str]
    ) -> Generator[None, None, Recalled]:
        """Rounds of retrieval, then the evidence that fits the budget."""
        recalled, hits = Recalled(), list[Hit]()
        k = self.k or self.config.k
        rounds = min(k, self._rounds(routing, k))
        asked = routing
        for number in range(rounds):
            share = (k - len(recalled.hits)) // (rounds - number)
            if number == 0:
                asked, best = self.best(asked, share)
                found = [(asked, self._near_the_best(best))]
            else:
                newest = evidence_text(self._fit(routing, hits, recalled.scores, budget, evidence_entry)[0])
                routing = yield from self.route(view, newest)
                found = self._follow(asked, routing, newest, share, recalled.hits)
            hits = [hit for _, some in found for hit in some]
            if not hits:
                break
            recalled.tokens += routing.tokens
            recalled.hits += hits
            recalled.rounds.append(Round(number=number + 1, documents=tuple(hit.document_id for hit in hits)))
            for source, some in found:
                recalled.scores |= _scores_of(source, some)
        recalled.excerpts, recalled.dropped = self._fit(
            routing, recalled.hits, recalled.scores, budget, render
        )
        return recalled

    def _follow(
        self, asked: Routing, routing: Routing, newest: str, share: int, read: Sequence[Hit]
    ) -> list[tuple[Routing, list[Hit]]]:
        """At most ``share`` documents that come next, with the routing that each is scored by.

        First those that the ``newest`` evidence names by titles that nothing read so far has, in the order
        in which it leads to them, then the next best for the question itself. Where it names none, those that
        question and evidence together find.
        """
        skip = [hit.document_id for hit in read]
        routing, near = self.best(routing, NAMED_AMONG, skip)
        titles = self._titles([*read, *near])
        known = {titles[hit.document_id] for hit in read}  # a text names itself
        named = [
            hit
            for hit in near
            if titles[hit.document_id] not in known and names(newest, titles[hit.document_id], self.question)
        ]
        if not named:
            return [(routing, self._near_the_best(near[:share]))]
        if self.k is None:
            share = min(share, int(self.engine.calibration.get("evidence_documents", share)))
        named = named[:share]
        if self.k is None or len(named) == share:
            return [(routing, named)]
        skip += [hit.document_id for hit in named]
        asked, others = self.best(asked, share - len(named), skip)
        return [(routing, named), (asked, others)]

    def _titles(self, hits: Sequence[Hit]) -> dict[str, str]:
        """Titles by document, empty where there is none."""
        texts = self.store.passages([hit.passages[0].number for hit in hits])
        found = {text.record.document_id: str(text.metadata.get("title") or "") for text in texts.values()}
        return {hit.document_id: found.get(hit.document_id, "") for hit in hits}

    def _near_the_best(self, hits: list[Hit]) -> list[Hit]:
        """Without an explicit ``k``: only as many as the model was calibrated to read in one round."""
        if self.k is not None:
            return hits
        tokens = [sum(passage.tokens for passage in hit.passages) for hit in hits]
        near = near_the_best([hit.score for hit in hits], tokens, self.engine.calibration)
        return [hits[place] for place in near]

    def _rounds(self, routing: Routing, k: int) -> int:
        """How many rounds to go: one where the first is confident, or the model was not trained for more."""
        asked = self.max_rounds
        most = asked or min(self.config.max_rounds, int(self.engine.calibration.get("max_rounds", 1)))
        margin = self.engine.calibration.get("confident_margin")
        if most == 1 or margin is None or asked is not None:
            return most
        best = np.sort(routing.relevance()[np.isfinite(routing.relevance())])[::-1]
        confident = len(best) <= k or best[0] - best[k] >= margin
        return 1 if confident else most

    def _fit(
        self,
        routing: Routing,
        hits: Sequence[Hit],
        scores: dict[int, float],
        budget: int,
        render: Callable[[Excerpt], str],
    ) -> tuple[list[Excerpt], list[Excerpt]]:
        texts = self.store.passages([record.number for hit in hits for record in hit.passages])
        kept = [
            Hit(
                hit.document_id, hit.score, tuple(record for record in hit.passages if record.number in texts)
            )
            for hit in hits
        ]
        return fit_evidence(
            [hit for hit in kept if hit.passages],
            texts,
            scores,
            budget,
            lambda excerpt: self.engine.count_tokens(render(excerpt)),
            lambda passage: self._best_chunk(routing, passage),
        )

    def _best_chunk(self, routing: Routing, passage: PassageText) -> tuple[int, int]:
        """Characters, in the document, of the passage's chunk that the routers score highest."""
        record = passage.record
        first, last = self.engine.best_chunk(routing, record.number, passage.header, passage.text)
        return record.start + first, record.start + last


def _scores_of(routing: Routing, hits: Sequence[Hit]) -> dict[int, float]:
    """The relevance of the passages of some documents, by number."""
    wanted = [record.number for hit in hits for record in hit.passages]
    places = np.flatnonzero(np.isin(routing.numbers, wanted))
    relevance = routing.relevance()
    return dict(zip(routing.numbers[places].tolist(), relevance[places].tolist(), strict=True))
