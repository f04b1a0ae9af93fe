"""Training the head that tells whether what was read answers the question.

Training questions are asked twice over a bank, with and without their passage in it, and read as the engine
reads them: over whole articles, and over short notes, since memories hold both. On the hidden states at the
prompts' last tokens, and on how relevant what was found is, a logistic regression is fitted. What it tells of
articles that it was not fitted on says how well it does and when to refuse. Source of the idea: see
``engine.answerability``.
"""

from __future__ import annotations

import random
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from msa_memory.engine.answerability import SIGNALS, AnswerabilityHead, told_signals
from msa_memory.engine.engine import Engine
from msa_memory.engine.train.asking import Ranked, Reader
from msa_memory.engine.train.calibrate import refusal_rule
from msa_memory.engine.train.conflicts import facts
from msa_memory.engine.train.data import Passage, Question
from msa_memory.engine.train.run import Paused
from msa_memory.errors import ConfigError

__all__ = ["AnswerabilityTraining", "Lesson", "article_lessons", "collect", "fit", "note_lesson"]

PER_PASSAGE = 3
"""Questions about one passage, at most."""
NOTE_PASSAGES, NOTE_QUESTIONS = 400, 600
"""How many passages are cut into notes, and how many questions are asked about these."""
LEAST_NOTE_WORDS = 4
DEPTHS = (0.44, 0.54, 0.64, 0.7, 0.77)
"""Where the layers lie that tell most of it: beyond them a model turns to the words of its answer."""
KEPT_EVERY = 100
"""Questions, after which what was collected is kept in case of a kill."""
FOLDS = 4
SIGNALS_LESS = 16
"""How many times less a signal's weight is penalised than those of the many inputs."""
_SENTENCES = re.compile(r"(?<=[.!?])\s+")
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerabilityTraining:
    """How the head is made.

    ``parts`` banks of about ``passages`` passages each, ``questions`` asked over each of them; ``layers``
    whose inputs the head reads, upper ones where none are named; ``penalty`` on squared weights. At most a
    share ``lost`` of the questions whose passage is there is to be refused.
    """

    parts: int = 2
    passages: int = 1500
    questions: int = 1000
    layers: tuple[int, ...] = ()
    penalty: float = 0.1
    lost: float = 0.1
    seed: int = 17

    def __post_init__(self) -> None:
        if min(self.parts, self.passages, self.questions) < 1:
            raise ConfigError(
                f"{self.parts} parts of {self.passages} passages and {self.questions} questions make no "
                "training; each has to be at least 1"
            )
        if not 0 <= self.lost < 1:
            raise ConfigError(f"lost is {self.lost}; expected a share from 0 to below 1")

    @property
    def asking(self) -> tuple[int, ...]:
        """What decides which questions are asked over what; the rest is fitted on the answers to them."""
        return self.parts, self.passages, self.questions, self.seed

    def layers_of(self, engine: Engine) -> tuple[int, ...]:
        """The layers to read. Raises ConfigError where the model lacks one."""
        count = engine.decoder.config.num_layers
        chosen = self.layers or tuple(sorted({int(depth * count) for depth in DEPTHS}))
        if unknown := [layer for layer in chosen if not 0 <= layer < count]:
            raise ConfigError(f"layers {unknown} are none of the model's {count}")
        return chosen


@dataclass(frozen=True, slots=True)
class Lesson:
    """Passages of one bank, the questions asked over it, and of which article each of those is."""

    name: str
    passages: list[Passage]
    asked: list[Question]
    articles: list[str]


def article_lessons(
    passages: Sequence[Passage], questions: Sequence[Question], recipe: AnswerabilityTraining
) -> list[Lesson]:
    """Whole articles, so that what is found instead of an answer is close to it."""
    articles: dict[str, list[Passage]] = {}
    for passage in passages:
        articles.setdefault(passage.title or passage.id, []).append(passage)
    rng = random.Random(recipe.seed)
    names, order = sorted(articles), list(questions)
    rng.shuffle(names)
    rng.shuffle(order)
    state, lessons = rng.getstate(), []
    for part in range(recipe.parts):
        texts: list[Passage] = []
        for name in names[part :: recipe.parts]:
            if len(texts) >= recipe.passages:
                break
            texts += articles[name]
        asked = _ask(order, {passage.id for passage in texts})
        rng.setstate(state)  # a part does not depend on how many there are before it
        rng.shuffle(asked)
        asked = asked[: recipe.questions]
        article = {passage.id: passage.title or passage.id for passage in texts}
        lessons.append(Lesson(f"articles-{part}", texts, asked, [article[one.gold[0]] for one in asked]))
    return lessons


def _ask(questions: Sequence[Question], ids: set[str]) -> list[Question]:
    """The questions with an answer among these passages, so many of each."""
    by_passage: dict[str, list[Question]] = {}
    for question in questions:
        if question.answers and set(question.gold) <= ids:
            some = by_passage.setdefault(question.gold[0], [])
            if len(some) < PER_PASSAGE:
                some.append(question)
    return [question for some in by_passage.values() for question in some]


def note_lesson(
    passages: Sequence[Passage], questions: Sequence[Question], recipe: AnswerabilityTraining
) -> Lesson:
    """Short texts without titles: sentences of passages, and made-up facts about people."""
    by_id, rng, order = {p.id: p for p in passages}, random.Random(recipe.seed), list(questions)
    rng.shuffle(order)
    notes: dict[str, list[Passage]] = {}
    asked: list[Question] = []
    for question in order:
        passage = by_id.get(question.gold[0])
        if passage is None or not question.answers or len(set(question.gold)) > 1:
            continue
        if passage.id not in notes:
            if len(notes) == NOTE_PASSAGES or len(asked) >= NOTE_QUESTIONS:
                continue
            parts = [part.strip() for part in _SENTENCES.split(passage.text)]
            whole = [part for part in parts if len(part.split()) >= LEAST_NOTE_WORDS]
            notes[passage.id] = [Passage(f"{passage.id}/{n}", part, None) for n, part in enumerate(whole)]
        answer = question.answers[0].casefold()
        telling = [note for note in notes[passage.id] if answer in note.text.casefold()]
        if len(telling) == 1 and len(asked) < NOTE_QUESTIONS:
            asked.append(
                Question(question.id, question.text, (telling[0].id,), question.answers, question.source)
            )
    texts = [note for some in notes.values() for note in some]
    article = {note.id: by_id[id].title or id for id, some in notes.items() for note in some}
    for number, fact in enumerate(facts(rng)):
        texts.append(Passage(f"fact {number}", fact.text, None))
        asked.append(Question(f"fact {number}", fact.question, (f"fact {number}",), (fact.answer,), "facts"))
    rng.shuffle(asked)
    return Lesson("notes", texts, asked, [article.get(one.gold[0], one.id) for one in asked])


def collect(
    engine: Engine,
    lesson: Lesson,
    layers: Sequence[int],
    path: Path,
    *,
    deadline: float | None = None,
    report: Report = lambda what, done, total: None,
) -> dict[str, Tensor]:
    """Hidden states of a lesson's questions; kept in ``path``, also when the time is over.

    Returns:
        ``inputs`` ``[N, L, E]`` of the layers at the prompts' last tokens; ``signals`` ``[N, 8]``; ``absent``
        ``[N]``, whether the question's passages were taken out of the bank; ``found`` ``[N]``, whether one of
        them was read; ``article`` ``[N]``, the same number for one article.

    Raises:
        Paused: the ``deadline`` (monotonic) is over; the next call goes on.
    """
    done = load_file(path) if path.is_file() else _nothing(engine, layers)
    if len(done["absent"]) >= 2 * len(lesson.asked) or not lesson.asked:
        return done
    reader = Reader(engine, lesson.passages, _told(lesson, deadline, report))
    calibration = engine.calibration
    weight = float(calibration.get("lexical_weight", 0.0))
    share, most = float(calibration.get("evidence_share", 0.0)), int(calibration.get("evidence_documents", 5))

    def examine(one: Ranked, absent: bool, article: str) -> dict[str, Tensor]:
        relevance = one.relevance(weight)
        numbers = reader.choose(relevance, share, most)
        row, logits = reader.start(one, numbers, noted=layers)
        return {
            "inputs": torch.stack([row.noted[layer] for layer in layers]).half().cpu(),
            "signals": told_signals(
                relevance, one.routers, one.words, logits.cpu(), engine.prompt.refusal[0]
            ),
            "absent": torch.tensor(absent),
            "found": torch.tensor(not set(one.gold).isdisjoint(numbers)),
            "article": torch.tensor(zlib.crc32(article.encode())),
        }

    rows = {name: list(tensor) for name, tensor in done.items()}
    first, place = len(done["absent"]) // 2, len(done["absent"]) // 2

    def keep() -> dict[str, Tensor]:
        """What whole questions have given, in the file."""
        whole = {name: torch.stack(some[: 2 * place]) if place else done[name] for name, some in rows.items()}
        scratch = path.with_suffix(".partial")
        save_file(whole, scratch)
        scratch.replace(path)
        return whole

    try:
        for place in range(first, len(lesson.asked)):
            _check(deadline, lesson, place)
            if place % KEPT_EVERY == 0:
                keep()
            with torch.inference_mode():
                one = reader.rank(lesson.asked[place])
                for absent, ranked in ((False, one), (True, one.without_gold())):
                    for name, value in examine(ranked, absent, lesson.articles[place]).items():
                        rows[name].append(value)
            report(f"Asking about {lesson.name}", place + 1, len(lesson.asked))
        place = len(lesson.asked)
    finally:
        done = keep()
    return done


def _nothing(engine: Engine, layers: Sequence[int]) -> dict[str, Tensor]:
    size = engine.decoder.config.hidden_size
    return {
        "inputs": torch.empty(0, len(layers), size, dtype=torch.float16),
        "signals": torch.empty(0, SIGNALS),
        "absent": torch.empty(0, dtype=torch.bool),
        "found": torch.empty(0, dtype=torch.bool),
        "article": torch.empty(0, dtype=torch.int64),
    }


def _told(lesson: Lesson, deadline: float | None, report: Report) -> Iterator[None]:
    """Tells of each passage that is encoded."""
    for number in range(len(lesson.passages)):
        _check(deadline, lesson, 0)
        yield
        report(f"Encoding {lesson.name}", number + 1, len(lesson.passages))


def _check(deadline: float | None, lesson: Lesson, place: int) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise Paused(f"asking about {lesson.name} stopped at {place} of {len(lesson.asked)}")


def fit(
    examples: Sequence[dict[str, Tensor]], layers: tuple[int, ...], penalty: float, lost: float
) -> tuple[AnswerabilityHead, dict[str, Any]]:
    """The head, and what it tells of articles that it was not fitted on, by fits on three quarters of them.

    Returns:
        The head, and ``refusal_odds`` from which on to refuse, so that a share ``lost`` of the questions
        with an answer is; the shares that it refuses; ``auroc``.

    Raises:
        ConfigError: there is too little to learn from.
    """
    inputs, signals, absent, found, article = (
        torch.cat([one[name] for one in examples])
        for name in ("inputs", "signals", "absent", "found", "article")
    )
    fold, told = article % FOLDS, absent | found  # where nothing was found nobody knows which it is
    if len(fold.unique()) < FOLDS:
        raise ConfigError(f"{len(article.unique())} articles with questions are too few to fit a head on")
    rows, truth = torch.cat((inputs.float().flatten(1), signals), 1), absent.float()
    penalties = torch.full((rows.shape[1],), penalty)
    penalties[-SIGNALS:] /= SIGNALS_LESS
    odds = torch.empty(len(rows))
    for number in range(FOLDS):
        apart = fold == number
        weight, bias = _regression(rows[told & ~apart], truth[told & ~apart], penalties)
        odds[apart] = rows[apart] @ weight + bias
    weight, bias = _regression(rows[told], truth[told], penalties)
    present, without = odds[~absent], odds[absent]
    least, rates = refusal_rule(present.tolist(), without.tolist(), lost)
    above = (without[:, None] > present).float().mean()
    figures = {"refusal_odds": least, "refused": rates, "auroc": float(above), "questions": len(rows) // 2}
    of_layers, of_signals = weight[:-SIGNALS].view(len(layers), -1), weight[-SIGNALS:]
    return AnswerabilityHead(layers, of_layers, of_signals, bias), figures


def _regression(rows: Tensor, truth: Tensor, penalties: Tensor) -> tuple[Tensor, float]:
    """Weights ``[F]`` and bias of a logistic regression, penalised as on standardised rows ``[N, F]``."""
    mean, spread = rows.mean(0), rows.std(0).clamp(min=1e-6)
    normed = (rows - mean) / spread
    weight = torch.zeros(rows.shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    descent = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        descent.zero_grad()
        off = F.binary_cross_entropy_with_logits(normed @ weight + bias, truth)
        total = off + penalties @ weight.square()
        total.backward()
        return total

    descent.step(loss)
    plain = weight.detach() / spread
    return plain, float(bias.detach()) - float(plain @ mean)
