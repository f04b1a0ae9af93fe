"""Routing time against the size of a memory, from 10 thousand to 10 million tokens, on keys of real text.

Keys and questions are the default model's: those of ``--keys`` (made from ``--passages`` and ``--questions``
where the file is missing, which takes a while). Beyond the real passages the memory is filled with copies of
them whose keys are perturbed by noise of ``--noise`` of their length: filler, not text. Compared are exact
scores, the 8-bit first look and the skim, each up to the best 16 passages by the mean over all router layers,
and FAISS over one vector per passage (the mean of its keys on one layer): flat, and HNSW with 32 links. Its
recall is of the same exact best 16: it says what one vector per passage loses, not how well FAISS searches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, report
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.bank_view import BankView
from msa_memory.engine.config import MSAConfig

BEST, CHUNK, VECTOR_LAYER = 16, 16, 13
Ranking = NDArray[np.int64]


def encode(passages: Path, questions: Path, target: Path) -> None:
    """Router keys of all passages and router queries of 60 questions, by the default model."""
    from msa_memory.engine.engine import load_engine
    from msa_memory.engine.models import DEFAULT_MODEL, resolve
    from msa_memory.engine.train.data import read_passages, read_questions

    engine = load_engine(resolve(DEFAULT_MODEL), name=DEFAULT_MODEL)
    keys = [engine.encode(0, "", passage.text).router_keys for passage in read_passages([passages])]
    bank = engine.new_bank(_never)
    bank.add(0, keys[0])
    asked = [engine.route(q.text, bank.view()).queries for q in read_questions([questions])[::30]]
    queries = [torch.stack([one[layer] for layer in engine.msa.router_layers]) for one in asked]
    save_file(
        {
            "keys": torch.cat(keys, 1).bfloat16(),
            "lengths": torch.tensor([k.shape[1] for k in keys]),
            "queries": torch.cat(queries, 1).float(),
            "query_lengths": torch.tensor([q.shape[1] for q in queries]),
        },
        target,
    )


def _never(number: int) -> Any:
    raise AssertionError(f"passage {number} was fetched")


class Memories:
    """A growing memory: the real passages first, then perturbed copies of them."""

    def __init__(self, file: Path, noise: float) -> None:
        held = load_file(file)
        self.keys, self.noise = held["keys"], noise
        self.lengths = held["lengths"].tolist()
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.questions = held["queries"].split(held["query_lengths"].tolist(), 1)
        layers = self.keys.shape[0]
        msa = MSAConfig(router_layers=tuple(range(layers)), top_k=BEST, router_chunk=CHUNK)
        self.bank = MemoryBank(msa, _never)
        self.random = torch.Generator().manual_seed(11)
        self.vectors: list[NDArray[np.float32]] = []
        self.chunks = 0

    def grow(self, chunks: int) -> None:
        """Add passages up to so many chunks."""
        while True:
            number = len(self.bank)
            place = number % len(self.lengths)
            length = self.lengths[place]
            if self.chunks + length > chunks:
                break
            rows = self.keys[:, self.starts[place] : self.starts[place] + length]
            if number >= len(self.lengths):
                scale = self.noise / rows.shape[-1] ** 0.5
                moved = rows.float() + scale * torch.randn(rows.shape, generator=self.random)
                rows = ops.normalize_heads(moved).bfloat16()
            self.bank.add(number, rows)
            self.vectors.append(rows[VECTOR_LAYER].float().mean(0).flatten().numpy())
            self.chunks += length
        self.bank.quantize()


def exact(view: BankView, queries: Tensor) -> Ranking:
    return _best(np.stack([view.score(slot, query) for slot, query in enumerate(queries)]))


def quantized(view: BankView, queries: Tensor) -> Ranking:
    rough = np.stack([view.score(slot, query, best=BEST) for slot, query in enumerate(queries)])
    return _best(view.settle(rough, list(queries)))


def skimmed(view: BankView, queries: Tensor) -> Ranking:
    return _best(view.skim(list(queries)))


def _best(scores: NDArray[np.float32]) -> Ranking:
    mean = scores.mean(0)
    count = min(BEST, len(mean))
    chosen = np.argpartition(-mean, count - 1)[:count]
    return chosen[np.argsort(-mean[chosen], kind="stable")]


def indexes(memories: Memories) -> dict[str, tuple[Callable[[Tensor], Ranking], float]]:
    """FAISS over one vector per passage: how to ask, and seconds to build."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    vectors = np.stack(memories.vectors)
    groups = memories.keys.shape[2]
    found = {}
    for name, index in (
        ("faiss_flat", faiss.IndexFlatIP(vectors.shape[1])),
        ("faiss_hnsw32", faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)),
    ):
        started = time.perf_counter()
        index.add(vectors)
        built = time.perf_counter() - started

        def search(queries: Tensor, index: Any = index) -> Ranking:
            vector = ops.fold_queries(queries[VECTOR_LAYER], groups).mean(0, keepdim=True).numpy()
            ranking: Ranking = index.search(vector, BEST)[1][0]
            return ranking

        found[name] = (search, built)
    return found


def timed(ways: dict[str, Callable[[Tensor], Ranking]], asked: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
    """Median seconds per question, taken in turn, and recall of the exact best passages."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    recalls: dict[str, list[float]] = {name: [] for name in ways}
    for index, queries in enumerate([asked[0], *asked]):  # the first is a warm-up
        expected: set[int] = set()
        for name, way in ways.items():
            started = time.perf_counter()
            ranking = way(queries)
            took = time.perf_counter() - started
            expected = expected or set(ranking.tolist())  # of the exact scores, which come first
            if index:
                seconds[name].append(took)
                recalls[name].append(len(expected & set(ranking.tolist())) / len(expected))
    return {
        name: {"seconds": statistics.median(seconds[name]), "recall": statistics.mean(recalls[name])}
        for name in ways
    }


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--keys", type=Path, default=Path("routing-keys.safetensors"))
    parser.add_argument("--passages", type=Path, help="JSON lines to encode where --keys is missing")
    parser.add_argument("--questions", type=Path, help="JSON lines of questions on them")
    parser.add_argument("--noise", type=float, default=0.6, help="length of the noise on filler keys")
    parser.add_argument("--asked", type=int, default=10, help="questions timed at every size")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 leaves its own choice")
    parser.add_argument("--without-faiss", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", help="tokens",
                        default=[10_000, 100_000, 1_000_000, 2_500_000, 10_000_000])  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.keys.exists():
        encode(options.passages, options.questions, options.keys)
    memories, curve = Memories(options.keys, options.noise), []
    asked = memories.questions[:: max(1, len(memories.questions) // options.asked)][: options.asked]
    for tokens in sorted(options.sizes):
        memories.grow(tokens // CHUNK)
        view = memories.bank.view()
        ways: dict[str, Callable[[Tensor], Ranking]] = {
            "exact": lambda queries, view=view: exact(view, queries),  # type: ignore[misc]
            "quantized": lambda queries, view=view: quantized(view, queries),  # type: ignore[misc]
            "skim": lambda queries, view=view: skimmed(view, queries),  # type: ignore[misc]
        }
        others = {} if options.without_faiss else indexes(memories)
        ways |= {name: search for name, (search, _) in others.items()}
        figures = timed(ways, asked)
        for name, (_, built) in others.items():
            figures[name]["build_s"] = built
        curve.append(
            {
                "tokens": memories.chunks * CHUNK,
                "passages": len(view),
                "filler_passages": max(0, len(view) - len(memories.lengths)),
                "resident_bytes": memories.bank.nbytes(),
                **figures,
            }
        )
    report("routing_scale", options, {"questions": len(asked), "curve": curve})


if __name__ == "__main__":
    main()
