"""What other retrievers find on question/passage files: BM25 and a dense embedder (all-MiniLM-L6-v2).

The same two as in ``msa-memory eval``, without a memory beside them. JSON out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import arguments, report

from msa_memory.engine.train.data import Question, read_passages, read_questions
from msa_memory.evaluation import statistics
from msa_memory.evaluation.baselines import DenseSearch, Retriever, WordSearch
from msa_memory.evaluation.minilm import MiniLM, find_minilm
from msa_memory.evaluation.questions import KS
from msa_memory.progress import progress_reporter


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--name", default="dev", help="what the result is called")
    parser.add_argument("--passages", type=Path, nargs="+", required=True)
    parser.add_argument("--distractors", type=Path, nargs="*", default=[], help="more passages, no questions")
    parser.add_argument("--questions", type=Path, nargs="+", required=True)
    parser.add_argument("--dense", action="store_true", help="MiniLM too, from its installed wheel")
    parser.add_argument("--minilm", type=Path, help="MiniLM too, from this folder")
    parser.add_argument("--embeddings", type=Path, help="file that keeps embeddings; a run goes on from it")
    options = parser.parse_args()
    passages = read_passages([*options.passages, *options.distractors])
    texts = {p.id: f"{p.title}\n{p.text}" if p.title else p.text for p in passages}
    questions = read_questions(options.questions)
    retrievers: dict[str, Retriever] = {"bm25": WordSearch()}
    if options.dense or options.minilm:
        embedder = MiniLM(options.minilm or find_minilm())
        retrievers["minilm"] = DenseSearch(lambda some: embedder.embed(some).numpy(), options.embeddings)
    figures: dict[str, object] = {"passages": len(texts), "questions": len(questions)}
    for name, retriever in retrievers.items():
        retriever.add(texts)
        figures[name] = recall(retriever, questions)
    report(f"baselines_{options.name}", options, figures)


def recall(retriever: Retriever, questions: Sequence[Question]) -> dict[str, object]:
    """Share of questions with a gold passage among the k best, with its interval."""
    found = []
    with progress_reporter(None, len(questions), "Asking") as asked:
        for done, question in enumerate(questions, 1):
            found.append(retriever.best(question.text, max(KS)))
            asked(done)
    return {
        f"recall@{k}": statistics.mean(
            [bool(set(ids[:k]).intersection(q.gold)) for ids, q in zip(found, questions, strict=True)]
        )
        for k in KS
    }


if __name__ == "__main__":
    main()
