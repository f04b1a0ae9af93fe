"""What every benchmark here shares: arguments, the machine's description, paired timings, JSON out."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msa_memory.evaluation.reporting import machine

__all__ = ["arguments", "compare", "machine", "report"]

RESULTS = Path(__file__).parent / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--runs", type=int, default=5, help="paired runs; the median is reported")
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results")
    return parser


def compare(
    ours: Callable[[], float], theirs: Callable[[], float], runs: int
) -> dict[str, float | list[float]]:
    """Rates of two ways to do one thing, measured in turn after one warm-up each; higher is better."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(runs)]
    return {
        "ours": statistics.median(a for a, _ in pairs),
        "opponent": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "ratios": [round(a / b, 3) for a, b in pairs],
    }


def rate(work: Callable[[], object], amount: float) -> float:
    """``amount`` per second of ``work``."""
    import torch

    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return amount / (time.perf_counter() - started)


def report(name: str, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print a result as JSON and, with --save, keep it under benchmarks/results."""
    script = Path(sys.argv[0])
    result = {
        "benchmark": name,
        "command": " ".join(["python", f"benchmarks/{script.name}", *map(_portable, sys.argv[1:])]),
        "machine": machine(options.device),
        **figures,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        where = "gpu" if options.device.startswith("cuda") else "cpu"
        (RESULTS / f"{name}_{where}.json").write_text(text + "\n", encoding="utf-8")


def _portable(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if os.sep in argument else argument


def texts(count: int, words: int) -> Sequence[str]:
    """Deterministic English-like texts of about ``words`` words, from this Python's own documentation."""
    import pydoc_data.topics

    pool = " ".join(" ".join(pydoc_data.topics.topics.values()).split()).split(" ")
    return [" ".join(pool[(i * words) % (len(pool) - words) :][:words]) for i in range(count)]
