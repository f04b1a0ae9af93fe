"""Routing on a CPU: one question over all router layers, against the reference, which scores every head.

The opponent is the published algorithm in plain torch: a ``[heads, tokens, chunks]`` product, then the mean
over heads, the maximum over tokens and over each passage's chunks, in float32 and in bfloat16. Both shapes
hold random unit keys in passages of 8 chunks on average, of which some lie near the questions, as texts that
answer them do: only then the best passages mean anything. Ours is the choice of every layer, from 8-bit keys
settled on the exact ones; beside it stands the skim, which scores all passages on a few layers only and
chooses by the mean over all. The limits are the dense rate of this CPU's 8-bit products and the rate at which
it reads memory, measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import arguments, report
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.bank_view import BankView
from msa_memory.engine.config import MSAConfig

TOKENS, BEST, QUESTIONS = 24, 16, 5


@dataclass(frozen=True)
class Shape:
    """Router shape of a model and how many chunks are held."""

    name: str
    layers: int
    heads: int
    groups: int
    dim: int
    chunks: int


SHAPES = (
    Shape("msa-4b", 18, 32, 8, 128, 50_000),
    Shape("smollm2", 15, 9, 3, 64, 156_250),
)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def limits() -> dict[str, float]:
    """Operations/s of a large 8-bit product and bytes/s of reading memory, the best of several runs."""
    edge, size = 2048, 1 << 28
    a = torch.randint(-127, 128, (edge, edge), dtype=torch.int8)
    memory = torch.zeros(size // 4)
    product = min(seconds(lambda: torch._int_mm(a, a)) for _ in range(7))
    read = min(seconds(memory.sum) for _ in range(7))
    return {"int8_per_s": 2 * edge**3 / product, "bytes_per_s": size / read}


class Memory:
    """A bank of one shape and the questions asked of it: router queries ``[T, H, D]`` per layer."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        random = torch.Generator().manual_seed(7)
        size = (QUESTIONS, shape.layers, TOKENS, shape.heads, shape.dim)
        self.questions = ops.normalize_heads(torch.randn(size, generator=random))
        msa = MSAConfig(router_layers=tuple(range(shape.layers)), top_k=BEST)
        self.bank = MemoryBank(msa, _never)
        lengths = np.random.default_rng(7).integers(1, 16, shape.chunks)
        lengths = lengths[np.cumsum(lengths) <= shape.chunks]
        for number, length in enumerate(lengths.tolist()):
            self.bank.add(number, self._keys(number, length, random).bfloat16())
        self.bank.quantize()
        self.view = self.bank.view()
        self.lengths = torch.from_numpy(lengths)
        self.keys: Tensor | None = None

    def _keys(self, number: int, chunks: int, random: torch.Generator) -> Tensor:
        """Random directions; every 40th passage leans towards one token of one question, more or less."""
        shape = self.shape
        keys = torch.randn(shape.layers, chunks, shape.groups, shape.dim, generator=random)
        if number % 40 == 0:
            question = self.questions[number // 40 % QUESTIONS]
            token = int(torch.randint(TOKENS, (), generator=random))
            folded = ops.fold_queries(question[:, token], shape.groups).view(-1, shape.groups, shape.dim)
            lean = 12 * float(torch.rand((), generator=random))
            keys[:, int(torch.randint(chunks, (), generator=random))] += lean * ops.normalize_heads(folded)
        return ops.normalize_heads(keys)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """One layer's keys ``[G, chunks, D]``, in the opponent's own type and layout."""
        used = [block.keys[0, : block.used] for block in self.view._blocks]
        return torch.cat(used).to(dtype).transpose(0, 1).contiguous()


def _never(number: int) -> Any:
    raise AssertionError(f"passage {number} was fetched")


def ask(view: BankView, question: Tensor, best: int | None) -> list[tuple[int, ...]]:
    """The best passages on every layer."""
    return [
        view.select(view.score(slot, query, best=best), BEST).numbers for slot, query in enumerate(question)
    ]


def skim(view: BankView, question: Tensor) -> set[int]:
    """The best passages by the mean over the layers, from a full pass over a few of them."""
    return set(view.select(view.skim(list(question), best=BEST).mean(0), BEST).numbers)


def reference(keys: Tensor, query: Tensor, lengths: Tensor) -> Tensor:
    """Every head scored: mean over heads, maximum over tokens, maximum over a passage's chunks: ``[P]``."""
    groups, _, _ = keys.shape
    tokens, heads, dim = query.shape
    per_head = query.to(keys.dtype).view(tokens, groups, heads // groups, dim).permute(1, 2, 0, 3)
    scores = (per_head.flatten(1, 2) @ keys.transpose(1, 2)).view(heads, tokens, -1)
    return torch.segment_reduce(scores.mean(0).amax(0).float(), "max", lengths=lengths)


def measure(shape: Shape, runs: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Figures of one shape. The opponent's layers are alike: one is timed and counted for all."""
    memory = Memory(shape)
    view, question = memory.view, memory.questions[0]
    layers = {dtype: memory.expanded(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ours, exact, skimmed = [], [], []
    theirs: dict[torch.dtype, list[float]] = {dtype: [] for dtype in layers}
    for run in range(runs + 1):
        took = [
            seconds(lambda: ask(view, question, BEST)),
            seconds(lambda: ask(view, question, None)),
            seconds(lambda: skim(view, question)),
        ]
        other = {
            dtype: shape.layers * seconds(lambda k=keys: reference(k, question[0], memory.lengths))  # type: ignore[misc]
            for dtype, keys in layers.items()
        }
        if run:
            ours.append(took[0])
            exact.append(took[1])
            skimmed.append(took[2])
            for dtype, value in other.items():
                theirs[dtype].append(value)
    work = 2 * TOKENS * shape.groups * shape.dim * shape.chunks * shape.layers
    size = shape.groups * shape.dim * shape.chunks * shape.layers
    least = max(work / ceilings["int8_per_s"], size / ceilings["bytes_per_s"])
    median = statistics.median
    return {
        "shape": vars(shape),
        "passages": len(view),
        "tokens": TOKENS,
        "ours_s": median(ours),
        "exact_s": median(exact),
        "skim_s": median(skimmed),
        "reference_float32_s": median(theirs[torch.float32]),
        "reference_bfloat16_s": median(theirs[torch.bfloat16]),
        "ratio_float32": median(a / b for a, b in zip(theirs[torch.float32], ours, strict=True)),
        "ratio_bfloat16": median(a / b for a, b in zip(theirs[torch.bfloat16], ours, strict=True)),
        "ratio_skim_float32": median(a / b for a, b in zip(theirs[torch.float32], skimmed, strict=True)),
        "ratio_skim_bfloat16": median(a / b for a, b in zip(theirs[torch.bfloat16], skimmed, strict=True)),
        "ratio_exact": median(a / b for a, b in zip(exact, ours, strict=True)),
        "least_s": least,
        "share_of_limit": least / median(ours),
        "overlap": overlap(memory),
        "overlap_skim": skim_overlap(memory),
        "resident_bytes": memory.bank.nbytes(),
    }


def overlap(memory: Memory) -> float:
    """Share of the exact float32 best passages that are found, over all layers and questions."""
    shares = []
    for question in memory.questions:
        found, expected = ask(memory.view, question, BEST), ask(memory.view, question, None)
        shares += [len(set(a) & set(b)) / BEST for a, b in zip(found, expected, strict=True)]
    return statistics.mean(shares)


def skim_overlap(memory: Memory) -> float:
    """Share of the best passages by the exact float32 mean over the layers that a skim finds."""
    shares = []
    for question in memory.questions:
        exact = np.stack([memory.view.score(slot, query) for slot, query in enumerate(question)]).mean(0)
        expected = set(memory.view.select(exact, BEST).numbers)
        shares.append(len(expected & skim(memory.view, question)) / BEST)
    return statistics.mean(shares)


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 leaves its own choice")
    parser.add_argument("--shape", choices=[shape.name for shape in SHAPES], action="append")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the chunks, for a quick trial")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.threads:
        torch.set_num_threads(options.threads)
    ceilings = limits()
    figures = []
    for shape in SHAPES:
        if options.shape is None or shape.name in options.shape:
            sized = Shape(**{**vars(shape), "chunks": int(shape.chunks * options.scale)})
            figures.append(measure(sized, options.runs, ceilings))
    report("routing", options, {"limits": ceilings, "shapes": figures})


if __name__ == "__main__":
    main()
