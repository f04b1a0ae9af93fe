"""The few numbers beside the weights, chosen on training articles that were kept out of training.

Lexical weight and least score come from ranking; how much evidence to read comes from the loss of the
right answer after that evidence; when to refuse comes from questions whose passage is masked. Nothing here
ever sees an evaluation file.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine.bank_view import BankView, Selection
from msa_memory.engine.context import Feed, advance
from msa_memory.engine.context import Sequence as Row
from msa_memory.engine.engine import Engine
from msa_memory.engine.evidence_choice import near_the_best
from msa_memory.engine.layout import document_header, evidence_entry
from msa_memory.engine.train.data import Passage, Question, read_passages, read_questions
from msa_memory.engine.train.exercises import held_out
from msa_memory.engine.train.run import Paused
from msa_memory.errors import ConfigError

__all__ = ["CalibrationOptions", "calibrate", "choose_threshold", "refusal_rule"]

LEXICAL_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)
SHARES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MOST_READ = (1, 2, 3, 5)
MOST_FOUND = 8
MAX_EVIDENCE_TOKENS = 1024
READ_ON = date(2020, 1, 1)
Scores = NDArray[np.float32]
Item = TypeVar("Item")
Doubt = tuple[float, float]
"""Log-probability that an answer begins as a refusal, and the relevance of the best passage."""
LEAST_LOGPROB = -20.0
NEWTON_STEPS, RIDGE = 12, 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationOptions:
    """How many questions and passages to look at, and how many answerable questions may be lost.

    ``ranked`` questions decide about ranking, the first ``read`` of them about evidence and refusals;
    ``distractors`` training passages lie in the memory beside the held-out ones. ``lost_to_score`` and
    ``lost_to_refusal`` are shares of answerable questions. ``weigh_relevance``: how relevant the best
    passage is counts beside how likely a refusal is, which suits memories of texts like these alone: what is
    relevant among short notes scores less than what is not among articles.
    """

    ranked: int = 600
    read: int = 120
    distractors: int = 1000
    lost_to_score: float = 0.02
    lost_to_refusal: float = 0.10
    weigh_relevance: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ranked < 1 or self.read < 1 or self.distractors < 0:
            raise ConfigError(
                f"calibration over {self.ranked} ranked and {self.read} read questions with "
                f"{self.distractors} distractors makes no sense; expected at least 1, 1 and 0"
            )


@dataclass(frozen=True, slots=True)
class _Ranked:
    """One question over the whole bank: scores by passage number, and the passages that answer it."""

    asked: Question
    gold: tuple[int, ...]
    routers: Scores
    words: Scores
    selections: dict[int, Selection]

    def relevance(self, weight: float) -> Scores:
        joined: Scores = ((self.routers + weight * self.words) / (1 + weight)).astype(np.float32)
        return joined

    def without_gold(self, weight: float) -> Scores:
        scores = self.relevance(weight).copy()
        scores[list(self.gold)] = -np.inf
        return scores


def calibrate(
    engine: Engine,
    passages: Sequence[Path],
    questions: Sequence[Path],
    options: CalibrationOptions,
    *,
    deadline: float | None = None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Choose lexical_weight, min_score, evidence_share, evidence_documents and the rule for refusals.

    Returns:
        ``calibration``, to be merged into the model's own, and ``curves`` that say why.

    Raises:
        ConfigError: the files have no held-out article with questions.
        Paused: the ``deadline`` (monotonic) is over; calibration starts anew at the next call.
    """
    texts, asked = _choose(passages, questions, options)
    told = _Reports(report, deadline)
    read = engine.encode_many(
        (number, _header(passage), passage.text) for number, passage in enumerate(texts)
    )
    states = [next(read) for _ in told.over("Encoding passages", texts)]
    bank = engine.new_bank(states.__getitem__)
    for number, state in enumerate(states):
        bank.add(number, state.router_keys, state.terms)
    view, number_of = bank.view(), {passage.id: n for n, passage in enumerate(texts)}
    ranked = [
        _rank(engine, view, one, tuple(number_of[id] for id in one.gold))
        for _, one in told.over("Routing questions", asked)
    ]
    weights = {weight: _mrr(ranked, weight) for weight in LEXICAL_WEIGHTS}
    weight = max(weights, key=lambda w: (round(weights[w], 4), -w))
    least = choose_threshold([float(one.relevance(weight).max()) for one in ranked], options.lost_to_score)
    reader = _Reader(engine, view, texts)
    some = ranked[: options.read]
    losses = _evidence_losses(reader, some, weight, told)
    share, most = min(losses, key=lambda choice: (round(losses[choice], 4), -choice[0], choice[1]))
    refusals = _refusals(reader, some, weight, share, most, told)
    rule, rates = refusal_rule(
        refusals["present"], refusals["absent"], options.lost_to_refusal, weigh=options.weigh_relevance
    )
    calibration = {
        "lexical_weight": weight,
        "min_score": round(least, 4),
        "evidence_share": share,
        "evidence_documents": most,
        **{name: round(value, 4) for name, value in rule.items()},
    }
    curves = {
        "mrr@10 by lexical_weight": weights,
        "answer loss by evidence_share and evidence_documents": {
            f"{share:g} {most}": round(loss, 4) for (share, most), loss in losses.items()
        },
        "refusals": rates,
        "questions": len(ranked),
        "questions read": len(some),
        "passages": len(texts),
    }
    return {"calibration": calibration, "curves": curves}


def choose_threshold(scores: Sequence[float], lost: float) -> float:
    """The highest threshold below which at most a share ``lost`` of these scores lies."""
    ordered = sorted(scores)
    return ordered[min(len(ordered) - 1, int(lost * len(ordered)))]


class _Reports:
    """Tells progress item by item and ends when the time is over."""

    def __init__(self, report: Callable[[str, int, int], None], deadline: float | None) -> None:
        self.report, self.deadline = report, deadline

    def over(self, what: str, items: Sequence[Item]) -> Iterator[tuple[int, Item]]:
        for number, item in enumerate(items):
            if self.deadline is not None and time.monotonic() >= self.deadline:
                raise Paused(f"{what.lower()} stopped at {number} of {len(items)}")
            yield number, item
            self.report(what, number + 1, len(items))


def _choose(
    passages: Sequence[Path], questions: Sequence[Path], options: CalibrationOptions
) -> tuple[list[Passage], list[Question]]:
    """Held-out passages with some distractors, and held-out questions with answers, shuffled."""
    texts = read_passages(list(passages))
    kept = [passage for passage in texts if held_out(passage)]
    ids = {passage.id for passage in kept}
    asked = [one for one in read_questions(list(questions)) if one.answers and set(one.gold) <= ids]
    if not asked:
        raise ConfigError(
            f"none of {len(kept)} held-out passages (one article in sixteen) has a question with an answer; "
            "calibration needs some"
        )
    rng = random.Random(f"{options.seed}:calibration")
    others = [passage for passage in texts if not held_out(passage)]
    rng.shuffle(others)
    rng.shuffle(asked)
    return kept + others[: options.distractors], asked[: options.ranked]


def _header(passage: Passage) -> str:
    return document_header(title=passage.title, when=None, speaker=None)


def _rank(engine: Engine, view: BankView, asked: Question, gold: tuple[int, ...]) -> _Ranked:
    routing = engine.route(asked.text, view, lexical_weight=1.0)  # any weight: the parts are what counts
    order = np.argsort(routing.numbers)
    return _Ranked(asked, gold, routing.mean()[order], routing.words[order], routing.selections)


def _mrr(ranked: Sequence[_Ranked], weight: float) -> float:
    """Mean of 1 / rank of the best right passage, 0 beyond the tenth."""
    total = 0.0
    for one in ranked:
        scores = one.relevance(weight)
        rank = 1 + int((scores > scores[list(one.gold)].max()).sum())
        total += 1 / rank if rank <= 10 else 0.0
    return total / len(ranked)


class _Reader:
    """What the model says after some evidence, with the routers' choice in memory as in the engine."""

    def __init__(self, engine: Engine, view: BankView, texts: Sequence[Passage]) -> None:
        self.engine, self.view, self.texts = engine, view, texts
        self.slots = {layer: slot for slot, layer in enumerate(engine.msa.router_layers)}
        self.tokens = [engine.count_tokens(_header(passage) + passage.text) for passage in texts]

    def start(self, one: _Ranked, numbers: Sequence[int]) -> tuple[Row, Tensor]:
        """A sequence that has read the evidence, and the logits ``[V]`` of its answer's first token."""
        evidence = self._evidence(numbers)
        ids = self.engine.prompt.reading(evidence, one.asked.text)
        row = self.engine.start(self.view, capacity=len(ids) + 32)
        row.attend_to(one.selections, self.slots)
        return row, advance(self.engine.decoder, [Feed(row, ids)])[0]

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
        return "\n".join(entries)

    def choose(self, scores: Scores, share: float, most: int) -> list[int]:
        """Passages that would be read, best first, as the engine chooses them."""
        best = [int(number) for number in np.argsort(-scores, kind="stable")[:MOST_FOUND]]
        found = [number for number in best if np.isfinite(scores[number])]
        rule = {**self.engine.calibration, "evidence_share": share, "evidence_documents": most}
        near = near_the_best([float(scores[n]) for n in found], [self.tokens[n] for n in found], rule)
        return [found[place] for place in near]

    @torch.inference_mode()
    def answer_loss(self, one: _Ranked, numbers: Sequence[int]) -> float:
        """Mean loss of the right answer's tokens, its end included."""
        row, logits = self.start(one, numbers)
        answer = [*self.engine.tokenizer.encode(one.asked.answers[0]), self.engine.prompt.tail[0]]
        losses = []
        for token in answer:
            losses.append(-float(logits.float().log_softmax(-1)[token]))
            logits = advance(self.engine.decoder, [Feed(row, [token])])[0]
        return sum(losses) / len(losses)

    @torch.inference_mode()
    def refusal(self, one: _Ranked, numbers: Sequence[int]) -> float:
        """Log-probability that the answer begins as a refusal."""
        _, logits = self.start(one, numbers)
        first = self.engine.tokenizer.encode(self.engine.prompt.layout.refusal)[0]
        return float(logits.float().log_softmax(-1)[first])


def _evidence_losses(
    reader: _Reader, ranked: Sequence[_Ranked], weight: float, told: _Reports
) -> dict[tuple[float, int], float]:
    """Mean answer loss by share and number of documents; equal evidence is read once."""
    sums: dict[tuple[float, int], float] = {(share, most): 0.0 for share in SHARES for most in MOST_READ}
    for _, one in told.over("Reading evidence", ranked):
        known: dict[tuple[int, ...], float] = {}
        for share, most in sums:
            numbers = tuple(reader.choose(one.relevance(weight), share, most))
            if numbers not in known:
                known[numbers] = reader.answer_loss(one, numbers)
            sums[share, most] += known[numbers]
    return {choice: total / len(ranked) for choice, total in sums.items()}


def _refusals(
    reader: _Reader, ranked: Sequence[_Ranked], weight: float, share: float, most: int, told: _Reports
) -> dict[str, list[Doubt]]:
    """Doubts about questions whose passage is read, and about those whose passage is masked."""
    found: dict[str, list[Doubt]] = {"present": [], "absent": []}
    for _, one in told.over("Refusing", ranked):
        scores = one.relevance(weight)
        numbers = reader.choose(scores, share, most)
        if set(numbers) & set(one.gold):
            found["present"].append((reader.refusal(one, numbers), float(scores.max())))
        masked, scores = _masked(one), one.without_gold(weight)
        without = reader.choose(scores, share, most)
        found["absent"].append((reader.refusal(masked, without), float(scores.max())))
    return found


def _masked(one: _Ranked) -> _Ranked:
    """The same question with its passages taken out of the routers' choice."""
    selections = {}
    for layer, selection in one.selections.items():
        kept = [
            (n, score)
            for n, score in zip(selection.numbers, selection.scores, strict=True)
            if n not in one.gold
        ]
        selections[layer] = Selection(tuple(n for n, _ in kept), tuple(score for _, score in kept))
    return _Ranked(one.asked, one.gold, one.routers, one.words, selections)


def refusal_rule(
    present: Sequence[Doubt], absent: Sequence[Doubt], lost: float, *, weigh: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """When to refuse: how likely a refusal has to be, with ``weigh`` by the relevance of the best passage.

    The two are weighed by logistic regression, and the line is moved to where at most a share ``lost`` of
    the answerable questions is refused. Without two kinds of questions only the likelihood counts.

    Returns:
        The calibration, and the shares that it refuses.
    """
    slope = _slope(present, absent) if weigh and len(present) > 1 and len(absent) > 1 else 0.0
    middle = float(np.median([relevance for _, relevance in [*present, *absent]]))

    def surplus(doubt: Doubt) -> float:
        logprob, relevance = doubt
        return logprob - slope * (relevance - middle)

    likely = sorted(map(surplus, present), reverse=True)
    allowed = int(lost * len(likely))
    least = likely[allowed] if allowed < len(likely) else LEAST_LOGPROB if likely else 0.0
    least = round(max(least, LEAST_LOGPROB), 4) + 0.0001  # what is written has four decimals
    rates = {
        side: sum(surplus(doubt) >= least for doubt in doubts) / max(1, len(doubts))
        for side, doubts in (("present", present), ("absent", absent))
    }
    if not weigh:
        return {"refusal_logprob": min(least, 0.0)}, rates
    return {"refusal_logprob": least, "refusal_slope": slope, "refusal_relevance": middle}, rates


def _slope(present: Sequence[Doubt], absent: Sequence[Doubt]) -> float:
    """Nats that one unit of relevance makes up for; at least 0."""
    rows = torch.tensor([*present, *absent], dtype=torch.float64).clamp(min=LEAST_LOGPROB)
    labels = torch.tensor([0.0] * len(present) + [1.0] * len(absent), dtype=torch.float64)
    weights = torch.where(labels > 0, 0.5 / len(absent), 0.5 / len(present))  # both kinds count alike
    mean, spread = rows.mean(0), rows.std(0).clamp(min=1e-6)
    normed = torch.cat(((rows - mean) / spread, torch.ones(len(rows), 1, dtype=torch.float64)), 1)
    chosen = torch.zeros(3, dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        said = (normed @ chosen).sigmoid()
        gradient = normed.T @ (weights * (said - labels)) + RIDGE * chosen
        curvature = (normed.T * (weights * said * (1 - said))) @ normed + RIDGE * torch.eye(3).double()
        chosen = chosen - torch.linalg.solve(curvature, gradient)
    likelihood, relevance = (chosen[:2] / spread).tolist()
    return round(max(0.0, -relevance / likelihood), 4) if likelihood > 0 else 0.0
