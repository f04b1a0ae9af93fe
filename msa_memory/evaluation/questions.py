"""Question answering over passages: recall@k, answers, refusals, with ablations and baselines.

Recall uses every question, answers and refusals a number of them evenly spread over the file. One routing
per question gives the rankings of all signals. All systems answer with the same model; ``gold`` reads the
right passage alone and is the ceiling of any retrieval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msa_memory.engine.train.data import Passage, Question
from msa_memory.evaluation import statistics
from msa_memory.evaluation.baselines import Retriever
from msa_memory.evaluation.grading import grade
from msa_memory.evaluation.journal import Journal, Row
from msa_memory.evaluation.subject import MEMORY, Subject, Text
from msa_memory.progress import progress_reporter

__all__ = ["KS", "QuestionOptions", "evaluate_questions", "fill_passages"]

KS = (1, 5, 10)
FALSE_REFUSALS = 0.1
MEASURES = ("exact", "f1", "contains")
WITHOUT_ATTENTION, WITHOUT_TEXT = "without_memory_attention", "without_original_text"
GOLD, WHOLE = "gold", "whole_context"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionOptions:
    """How many questions to rank (None: all), to answer in full and to look at refusals.

    ``ablations`` also answers without memory attention and without original text; ``layers`` ranks by each
    router layer alone; ``documents`` is how many documents each baseline's reader gets. ``whole_context``
    also reads all passages at once where they fit the model's window, which takes long.
    """

    ranked: int | None = None
    answers: int = 100
    refusals: int = 100
    ablations: bool = True
    layers: bool = True
    documents: Sequence[int] = (1, 4)
    whole_context: bool = False


def fill_passages(subject: Subject, passages: Iterable[Passage], *, titled: bool = True) -> dict[str, str]:
    """Add the passages that are not there yet; the text by id that a baseline may index."""
    texts, items = {}, []
    for passage in passages:
        title = passage.title if titled and passage.title else ""
        metadata = {"title": title} if title else {}
        items.append({"id": passage.id, "content": passage.text, "metadata": metadata})
        texts[passage.id] = f"{title}\n{passage.text}" if title else passage.text
    subject.fill(items)
    return texts


def evaluate_questions(
    subject: Subject,
    questions: Sequence[Question],
    options: QuestionOptions,
    journal: Journal,
    baselines: Mapping[str, Retriever] | None = None,
    unanswerable: Sequence[Question] = (),
) -> dict[str, Any]:
    """All figures; ``unanswerable`` questions resemble a passage of the memory that does not answer them."""
    exam = _Exam(subject, options, journal, dict(baselines or {}))
    ranks = exam.every("rank", statistics.spread(questions, options.ranked), exam.rank)
    answers = exam.every("answer", statistics.spread(questions, options.answers), exam.answer)
    some = statistics.spread(questions, options.refusals)
    present = exam.every("present", some, exam.refuse)
    absent = exam.every("absent", some, lambda q: exam.refuse(q, {"$id": {"$nin": list(q.gold)}}))
    tricks = exam.every("trick", statistics.spread(unanswerable, options.refusals), exam.refuse)
    return {
        "passages": subject.memory.count(),
        "recall": _recall(ranks),
        "rank_s": statistics.percentiles([row["rank_s"] for row in ranks]) if ranks else None,
        "answers": _answers(answers),
        "refusals": _refusals(present, {"absent": absent, "unanswerable": tricks}),
    }


class _Exam:
    """One memory and its baselines, question by question."""

    def __init__(
        self,
        subject: Subject,
        options: QuestionOptions,
        journal: Journal,
        baselines: dict[str, Retriever],
    ) -> None:
        self.subject, self.options, self.journal, self.baselines = subject, options, journal, baselines

    def every(self, part: str, questions: Sequence[Question], work: Callable[[Question], Row]) -> list[Row]:
        """The result of every question, done or kept."""
        rows = []
        with progress_reporter(None, len(questions), part) as report:
            for done, question in enumerate(questions, 1):
                rows.append(self.journal.once(f"{part}/{question.id}", work, question))
                report(done)
        return rows

    def rank(self, question: Question) -> Row:
        """Where the first gold passage stands in every ranking, from 1; None below the last k."""
        ranking = self.subject.rank(question.text, max(KS), layers=self.options.layers)
        ids = {**ranking.ids}
        for name, retriever in self.baselines.items():
            ids[name] = retriever.best(question.text, max(KS))
        ranks = {name: _rank(found, question.gold) for name, found in ids.items()}
        return {"question": question.text, "ranks": ranks, "rank_s": ranking.seconds}

    def answer(self, question: Question) -> Row:
        """The question answered by every system."""
        subject, text = self.subject, question.text
        answer = subject.ask(text)
        read = [Text.of(source) for source in answer.sources]
        given: dict[str, tuple[str, float]] = {MEMORY: (answer.text, answer.timings.total_s)}
        if self.options.ablations:
            for name, texts, attend in ((WITHOUT_ATTENTION, read, False), (WITHOUT_TEXT, [], True)):
                reading = subject.read(text, texts, attend=attend)
                given[name] = (reading.text, reading.seconds)
        for name, texts, seconds in self._by_baselines(question):
            reading = subject.read(text, texts)
            given[name] = (reading.text, seconds + reading.seconds)
        whole = subject.read_everything(text) if self.options.whole_context else None
        if whole is not None:
            given[WHOLE] = (whole.text, whole.seconds)
        results = {
            name: {"answer": said, "seconds": seconds, **grade(said, question.answers)}
            for name, (said, seconds) in given.items()
        }
        results[MEMORY]["read"] = float(any(one.id in question.gold for one in read))
        return {"question": text, "gold": list(question.answers), "results": results}

    def _by_baselines(self, question: Question) -> Iterable[tuple[str, list[Text], float]]:
        """What each baseline gives the reader and how long it took to find."""
        yield GOLD, self._texts(question.gold), 0.0
        for name, retriever in self.baselines.items():
            for count in self.options.documents:
                started = time.perf_counter()
                found = retriever.best(question.text, count)
                yield f"{name}@{count}", self._texts(found), time.perf_counter() - started

    def _texts(self, ids: Sequence[str]) -> list[Text]:
        return [Text.of(self.subject.memory.get(id)) for id in ids]

    def refuse(self, question: Question, where: Mapping[str, Any] | None = None) -> Row:
        """Whether the memory finds an answer, its best score and how much the model doubts that it can."""
        answer = self.subject.ask(question.text, where=where)
        best = max((source.score for source in answer.sources), default=None)
        if best is None:
            best = self.subject.rank(question.text, 1, where=where).best_score
        texts = [Text.of(source) for source in answer.sources]
        return {
            "question": question.text,
            "answer": answer.text,
            "refused": not answer.found,
            "score": best,
            "doubt": self.subject.doubt(question.text, texts, where=where),
        }


def _rank(found: Sequence[str], gold: Sequence[str]) -> int | None:
    return next((place for place, id in enumerate(found, 1) if id in gold), None)


def _recall(rows: Sequence[Row]) -> dict[str, Any]:
    """Share of questions with a gold passage among the k best, per ranking."""
    return {
        name: {
            f"recall@{k}": statistics.mean([(row["ranks"][name] or k + 1) <= k for row in rows]) for k in KS
        }
        for name in (rows[0]["ranks"] if rows else ())
    }


def _answers(rows: Sequence[Row]) -> dict[str, Any]:
    """Shares per system, latency, and the memory's share of the ceiling."""
    figures: dict[str, Any] = {}
    for name in rows[0]["results"] if rows else ():
        results = [row["results"][name] for row in rows]
        keys = [key for key in (*MEASURES, "read") if key in results[0]]
        figures[name] = {key: statistics.mean([one[key] for one in results]) for key in keys}
        figures[name]["seconds"] = statistics.percentiles([one["seconds"] for one in results])
    if rows:
        ours, ceiling = ([row["results"][name]["f1"] for row in rows] for name in (MEMORY, GOLD))
        figures["f1_of_the_ceiling"] = statistics.ratio(ours, ceiling)
    return figures


def _refusals(present: Sequence[Row], others: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """What is refused as shipped, and how well scores and the model's own doubt separate the questions.

    ``doubt`` is negated, so that high is sure as with the scores.
    """
    figures: dict[str, Any] = {"false_refusals": statistics.mean([row["refused"] for row in present])}
    signals: dict[str, Callable[[Row], float]] = {
        "score": lambda row: row["score"],
        "doubt": lambda row: -row["doubt"],
    }
    for name, rows in others.items():
        if not rows:
            continue
        figures[name] = {"refused": statistics.mean([row["refused"] for row in rows])}
        for signal, of in signals.items():
            sure, unsure = list(map(of, present)), list(map(of, rows))
            figures[name][signal] = {
                "auroc": statistics.auroc(sure, unsure),
                "at_10_percent_false_refusals": statistics.refused_at(sure, unsure, FALSE_REFUSALS),
            }
    return figures
