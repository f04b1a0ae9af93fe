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
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from msa_memory.engine.engine import Engine
from msa_memory.engine.train.asking import Ranked, Reader
from msa_memory.engine.train.data import Passage, Question, read_passages, read_questions
from msa_memory.engine.train.exercises import held_out
from msa_memory.engine.train.run import Paused
from msa_memory.errors import ConfigError

__all__ = ["CalibrationOptions", "calibrate", "choose_threshold", "refusal_rule"]

LEXICAL_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)
SHARES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MOST_READ = (1, 2, 3, 5)
Scores = NDArray[np.float32]
Item = TypeVar("Item")
LEAST_DOUBT = -20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationOptions:
    """How many questions and passages to look at, and how many answerable questions may be lost.

    ``ranked`` questions decide about ranking, the first ``read`` of them about evidence and refusals;
    ``distractors`` training passages lie in the memory beside the held-out ones. ``lost_to_score`` and
    ``lost_to_refusal`` are shares of answerable questions.
    """

    ranked: int = 600
    read: int = 120
    distractors: int = 1000
    lost_to_score: float = 0.02
    lost_to_refusal: float = 0.10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ranked < 1 or self.read < 1 or self.distractors < 0:
            raise ConfigError(
                f"calibration over {self.ranked} ranked and {self.read} read questions with "
                f"{self.distractors} distractors makes no sense; expected at least 1, 1 and 0"
            )


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
    reader = Reader(engine, texts, told.over("Encoding passages", texts))
    ranked = [reader.rank(one) for _, one in told.over("Routing questions", asked)]
    weights = {weight: _mrr(ranked, weight) for weight in LEXICAL_WEIGHTS}
    weight = max(weights, key=lambda w: (round(weights[w], 4), -w))
    least = choose_threshold([float(one.relevance(weight).max()) for one in ranked], options.lost_to_score)
    some = ranked[: options.read]
    losses = _evidence_losses(reader, some, weight, told)
    share, most = min(losses, key=lambda choice: (round(losses[choice], 4), -choice[0], choice[1]))
    refusals = _refusals(reader, some, weight, share, most, told)
    logprob, rates = refusal_rule(refusals["present"], refusals["absent"], options.lost_to_refusal)
    calibration = {
        "lexical_weight": weight,
        "min_score": round(least, 4),
        "evidence_share": share,
        "evidence_documents": most,
        "refusal_logprob": min(logprob, 0.0),
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


def _mrr(ranked: Sequence[Ranked], weight: float) -> float:
    """Mean of 1 / rank of the best right passage, 0 beyond the tenth."""
    total = 0.0
    for one in ranked:
        scores = one.relevance(weight)
        rank = 1 + int((scores > scores[list(one.gold)].max()).sum())
        total += 1 / rank if rank <= 10 else 0.0
    return total / len(ranked)


def _evidence_losses(
    reader: Reader, ranked: Sequence[Ranked], weight: float, told: _Reports
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
    reader: Reader, ranked: Sequence[Ranked], weight: float, share: float, most: int, told: _Reports
) -> dict[str, list[float]]:
    """How likely refusals are where a question's passage is read, and where it is masked."""
    found: dict[str, list[float]] = {"present": [], "absent": []}
    for _, one in told.over("Refusing", ranked):
        scores = one.relevance(weight)
        numbers = reader.choose(scores, share, most)
        if set(numbers) & set(one.gold):
            found["present"].append(reader.refusal(one, numbers))
        masked = one.without_gold()
        without = reader.choose(masked.relevance(weight), share, most)
        found["absent"].append(reader.refusal(masked, without))
    return found


def refusal_rule(
    present: Sequence[float], absent: Sequence[float], lost: float
) -> tuple[float, dict[str, float]]:
    """From which doubt on to refuse, so that at most a share ``lost`` of the answerable questions is.

    Returns:
        The least doubt with four decimals, and the shares of both kinds that it refuses.
    """
    doubts = sorted(present, reverse=True)
    allowed = int(lost * len(doubts))
    least = doubts[allowed] if allowed < len(doubts) else LEAST_DOUBT if doubts else 0.0
    least = round(round(max(least, LEAST_DOUBT), 4) + 0.0001, 4)
    rates = {
        side: sum(doubt >= least for doubt in doubts) / max(1, len(doubts))
        for side, doubts in (("present", present), ("absent", absent))
    }
    return least, rates
