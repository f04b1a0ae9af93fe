"""Training questions over a bank of passages, routed and read as the engine does it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine.bank_view import Selection
from msa_memory.engine.context import Feed, advance
from msa_memory.engine.context import Sequence as Row
from msa_memory.engine.engine import Engine
from msa_memory.engine.evidence_choice import near_the_best
from msa_memory.engine.layout import document_header, evidence_entry
from msa_memory.engine.train.data import Passage, Question

__all__ = ["Ranked", "Reader"]

MOST_FOUND = 8
MAX_EVIDENCE_TOKENS = 1024
READ_ON = date(2020, 1, 1)
Scores = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Ranked:
    """One question over the whole bank: scores by passage number, and the passages that answer it."""

    asked: Question
    gold: tuple[int, ...]
    routers: Scores
    words: Scores
    selections: dict[int, Selection]

    def relevance(self, weight: float) -> Scores:
        joined: Scores = ((self.routers + weight * self.words) / (1 + weight)).astype(np.float32)
        return joined

    def without_gold(self) -> Ranked:
        """The same question over a bank that lacks its passages."""
        routers = self.routers.copy()
        routers[list(self.gold)] = -np.inf
        return replace(self, routers=routers, selections=dict(map(self._masked, self.selections.items())))

    def _masked(self, chosen: tuple[int, Selection]) -> tuple[int, Selection]:
        layer, selection = chosen
        ranked = zip(selection.numbers, selection.scores, strict=True)
        kept = [(number, score) for number, score in ranked if number not in self.gold]
        return layer, Selection(tuple(n for n, _ in kept), tuple(score for _, score in kept))


def _header(passage: Passage) -> str:
    """What a passage is headed by in memory and in the evidence."""
    return document_header(title=passage.title, when=None, speaker=None)


class Reader:
    """What the model says after some evidence, with the routers' choice in memory as in the engine."""

    def __init__(self, engine: Engine, texts: Sequence[Passage], told: Iterable[object]) -> None:
        """Encode the passages into a bank; ``told`` is gone through once per passage, to tell or to stop."""
        read = engine.encode_many((n, _header(passage), passage.text) for n, passage in enumerate(texts))
        states = [next(read) for _ in told]
        bank = engine.new_bank(states.__getitem__)
        for number, state in enumerate(states):
            bank.add(number, state.router_keys, state.terms)
        self.engine, self.view, self.texts = engine, bank.view(), texts
        self.numbers = {passage.id: number for number, passage in enumerate(texts)}
        self.slots = {layer: slot for slot, layer in enumerate(engine.msa.router_layers)}
        self.tokens = [engine.count_tokens(_header(passage) + passage.text) for passage in texts]

    def rank(self, asked: Question) -> Ranked:
        """Route a question about these passages."""
        routing = self.engine.route(
            asked.text, self.view, lexical_weight=1.0
        )  # any: the parts are what counts
        order = np.argsort(routing.numbers)
        gold = tuple(self.numbers[id] for id in asked.gold)
        return Ranked(asked, gold, routing.mean()[order], routing.words[order], routing.selections)

    def start(self, one: Ranked, numbers: Sequence[int], noted: Sequence[int] = ()) -> tuple[Row, Tensor]:
        """A sequence that has read the evidence, and the logits ``[V]`` of its answer's first token."""
        evidence = self._evidence(numbers)
        ids = self.engine.prompt.reading(evidence, one.asked.text)
        row = self.engine.start(self.view, capacity=len(ids) + 32)
        row.attend_to(one.selections, self.slots)
        return row, advance(self.engine.decoder, [Feed(row, ids, noted=noted)])[0]

    def _evidence(self, numbers: Sequence[int]) -> str:
        entries: list[str] = []
        left = MAX_EVIDENCE_TOKENS
        for number in numbers:
            passage = self.texts[number]
            entry = evidence_entry(_header(passage), READ_ON, passage.text)
            left -= self.engine.count_tokens(entry)
            if entries and left < 0:
                break
            entries.append(entry)
        return "\n".join(reversed(entries))  # of one day: the best stands last, as the engine shows them

    def choose(self, scores: Scores, share: float, most: int) -> list[int]:
        """Passages that would be read, best first, as the engine chooses them."""
        best = [int(number) for number in np.argsort(-scores, kind="stable")[:MOST_FOUND]]
        found = [number for number in best if np.isfinite(scores[number])]
        rule = {**self.engine.calibration, "evidence_share": share, "evidence_documents": most}
        near = near_the_best([float(scores[n]) for n in found], [self.tokens[n] for n in found], rule)
        return [found[place] for place in near]

    @torch.inference_mode()
    def answer_loss(self, one: Ranked, numbers: Sequence[int]) -> float:
        """Mean loss of the right answer's tokens, its end included."""
        row, logits = self.start(one, numbers)
        answer = [*self.engine.tokenizer.encode(one.asked.answers[0]), self.engine.prompt.tail[0]]
        losses = []
        for token in answer:
            losses.append(-float(logits.float().log_softmax(-1)[token]))
            logits = advance(self.engine.decoder, [Feed(row, [token])])[0]
        return sum(losses) / len(losses)

    @torch.inference_mode()
    def refusal(self, one: Ranked, numbers: Sequence[int]) -> float:
        """Log-probability that the answer begins as a refusal."""
        _, logits = self.start(one, numbers)
        return float(logits.float().log_softmax(-1)[self.engine.prompt.refusal[0]])
