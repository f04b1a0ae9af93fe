"""Questions that need two passages or more: is interleaved retrieval worth its second round?

Both ways read the same number of documents, so what differs is only how the later ones are found: by the
question alone, or by the question together with what the first round read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msa_memory.engine.train.data import Passage, Question
from msa_memory.engine.train.exercises import held_out
from msa_memory.errors import ConfigError
from msa_memory.evaluation import statistics
from msa_memory.evaluation.grading import grade
from msa_memory.evaluation.journal import Journal, Row
from msa_memory.evaluation.subject import Subject
from msa_memory.progress import progress_reporter

__all__ = ["chains", "evaluate_multihop"]

ROUNDS = {"single_round": 1, "interleaved": 2}


def chains(questions: Sequence[Question], passages: Sequence[Passage], *, unseen: bool) -> list[Question]:
    """The questions with several gold passages.

    Args:
        unseen: only those with a passage that training holds out; answering was never trained on them.

    Raises:
        ConfigError: there are none.
    """
    kept = {passage.id for passage in passages if held_out(passage)}
    found = [q for q in questions if len(set(q.gold)) > 1 and (not unseen or kept.intersection(q.gold))]
    if not found:
        raise ConfigError(
            f"none of {len(questions)} questions has several gold passages"
            f"{' with a held-out one among them' if unseen else ''}"
        )
    return found


def evaluate_multihop(
    subject: Subject, questions: Sequence[Question], documents: Sequence[int], journal: Journal
) -> dict[str, Any]:
    """Per number of documents read: all gold passages among them, answers, and interleaved over single."""
    asked = [(count, question) for count in documents for question in questions]
    rows: dict[int, list[Row]] = {count: [] for count in documents}
    with progress_reporter(None, len(asked), "chains") as report:
        for done, (count, question) in enumerate(asked, 1):
            key = f"{count}/{question.id}"
            rows[count].append(journal.once(key, _examine, subject, question, count))
            report(done)
    return {"questions": len(questions), "documents": {str(n): _summary(some) for n, some in rows.items()}}


def _examine(subject: Subject, question: Question, count: int) -> Row:
    results = {}
    for name, rounds in ROUNDS.items():
        answer = subject.ask(question.text, k=count, max_rounds=rounds)
        read = list(dict.fromkeys(id for round in answer.rounds for id in round.documents))
        shown = {source.id for source in answer.sources}
        results[name] = {
            "documents": read,
            "all_gold": float(set(question.gold) <= shown),
            "share_of_gold": len(shown.intersection(question.gold)) / len(set(question.gold)),
            "answer": answer.text,
            "seconds": answer.timings.total_s,
            **grade(answer.text, question.answers),
        }
    return {"question": question.text, "gold": list(question.gold), "results": results}


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    columns = {name: [row["results"][name] for row in rows] for name in ROUNDS}
    keys = ("all_gold", "share_of_gold", "exact", "f1")
    figures: dict[str, Any] = {
        name: {key: statistics.mean([one[key] for one in results]) for key in keys}
        for name, results in columns.items()
    }
    single, interleaved = ([one["all_gold"] for one in columns[name]] for name in ROUNDS)
    figures["interleaved_over_single"] = statistics.ratio(interleaved, single)
    figures["interleaved_minus_single"] = statistics.difference(interleaved, single)
    return figures
