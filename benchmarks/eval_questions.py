"""How good a memory is on question/passage files: recall@k, answers, refusals. JSON out, per-question log.

Files are JSON lines (plain or gzip): passages with passage_id, text, title; questions with question,
passage_ids, answers; unanswerable ones with question. Exact match and F1 follow SQuAD's normalisation.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import string
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import arguments, report

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.engine.models import DEFAULT_MODEL
from msa_memory.engine.train.data import Question, read_passages, read_questions

KS = (1, 5, 10)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--name", default="dev", help="what the result is called")
    parser.add_argument("--passages", type=Path, nargs="+", required=True)
    parser.add_argument("--questions", type=Path, nargs="+", required=True)
    parser.add_argument("--unanswerable", type=Path, help="questions whose answer is in no passage")
    parser.add_argument("--absent", action="store_true", help="ask again with the gold passages filtered out")
    parser.add_argument(
        "--answers", type=int, default=200, help="questions to answer in full; recall uses all"
    )
    parser.add_argument(
        "--refusals", type=int, default=300, help="questions of each kind to look at refusals"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--bank", type=Path, help="folder to keep the bank in; reused when it exists")
    parser.add_argument("--untitled", action="store_true", help="leave the passages' titles out")
    parser.add_argument("--log", type=Path, help="per-question JSON lines")
    options = parser.parse_args()
    config = MemoryConfig(min_score=-2.0)
    with MemoryModel.open(options.bank, model=options.model, device=options.device, config=config) as memory:
        fill(memory, options)
        questions = read_questions(options.questions)
        figures: dict[str, Any] = {"passages": memory.count(), "questions": len(questions)}
        figures |= recall(memory, questions)
        log = [answer(memory, question) for question in every(questions, options.answers)]
        figures |= summary(log)
        if options.unanswerable or options.absent:
            figures |= refusals(memory, questions, options)
    if options.log:
        options.log.write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
    report(f"questions_{options.name}", options, figures)


def fill(memory: MemoryModel, options: argparse.Namespace) -> None:
    """Add the passages that are not there yet."""
    items = [
        {
            "id": passage.id,
            "content": passage.text,
            "metadata": {"title": passage.title} if passage.title and not options.untitled else {},
        }
        for passage in read_passages(options.passages)
    ]
    memory.add_many(items, on_conflict="skip", progress=True)


def recall(memory: MemoryModel, questions: Sequence[Question]) -> dict[str, float]:
    """Share of questions with a gold passage among the k best, over all questions."""
    found, started = Counter[int](), time.perf_counter()
    for question in questions:
        ids = [source.id for source in memory.search(question.text, k=max(KS))]
        for k in KS:
            found[k] += bool(set(ids[:k]) & set(question.gold))
    seconds = (time.perf_counter() - started) / len(questions)
    return {f"recall@{k}": found[k] / len(questions) for k in KS} | {"search_s": seconds}


def answer(memory: MemoryModel, question: Question) -> dict[str, Any]:
    """One question answered in full."""
    given = memory.query(question.text)
    return {
        "id": question.id,
        "question": question.text,
        "gold": question.answers,
        "answer": given.text,
        "retrieved": bool({source.id for source in given.sources} & set(question.gold)),
        "exact": max(exact(given.text, right) for right in question.answers),
        "f1": max(f1(given.text, right) for right in question.answers),
        "contains": any(normal(right) in normal(given.text) for right in question.answers),
        "seconds": given.timings.total_s,
    }


def summary(log: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means of the per-question figures, in percent."""
    if not log:
        return {}
    share = {
        key: 100 * sum(row[key] for row in log) / len(log) for key in ("exact", "f1", "contains", "retrieved")
    }
    return {"answered": len(log), **share, "answer_p50_s": statistics.median(row["seconds"] for row in log)}


def refusals(
    memory: MemoryModel, questions: Sequence[Question], options: argparse.Namespace
) -> dict[str, Any]:
    """How well the best score separates answerable questions from others, and what the default refuses."""
    some = every(questions, options.refusals)
    present = [best(memory, question.text) for question in some]
    threshold = memory._engine().calibration.get("min_score", -1.0)
    figures: dict[str, Any] = {"min_score": threshold, "false_refusals": below(present, threshold)}
    if options.absent:
        absent = [best(memory, q.text, {"$id": {"$nin": list(q.gold)}}) for q in some]
        figures |= {"absent_refused": below(absent, threshold), "absent_auroc": auroc(present, absent)}
        figures["absent_refused_at_10_percent_false_refusals"] = below(
            absent, sorted(present)[len(present) // 10]
        )
    if options.unanswerable:
        asked = [q.text for q in every(read_unanswerable(options.unanswerable), options.refusals)]
        adversarial = [best(memory, text) for text in asked]
        figures |= {
            "unanswerable_refused": below(adversarial, threshold),
            "unanswerable_auroc": auroc(present, adversarial),
        }
    return figures


def read_unanswerable(path: Path) -> list[Question]:
    """Questions of a file whose only passage is a distractor that lies in the dev passages."""
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        Question(row["id"], row["question"], (row["distractor_passage_id"],), (), path.name)
        for row in rows
        if row.get("split") == "dev"
    ]


def best(memory: MemoryModel, question: str, where: dict[str, Any] | None = None) -> float:
    found = memory.search(question, k=1, where=where)
    return found[0].score if found else -1.0


def below(scores: Sequence[float], threshold: float) -> float:
    return sum(score < threshold for score in scores) / len(scores)


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Chance that an answerable question's score beats an unanswerable one's."""
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def every(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` items evenly spread over a list."""
    step = max(1, len(items) // count) if count else 1
    return list(items[::step][:count])


def normal(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(given: str, right: str) -> bool:
    return normal(given) == normal(right)


def f1(given: str, right: str) -> float:
    said, wanted = normal(given).split(), normal(right).split()
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


if __name__ == "__main__":
    main()
