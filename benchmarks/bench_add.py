"""Adding one message of 50 tokens against the bare forward pass of its tokens, on the default model.

The opponent is ``engine.encode`` of the same text on the same thread: the decoder up to its last router layer
and the pooling of the states, without a byte stored. What is ours beyond that, until the message is on the
medium and acknowledged, is the ``fixed_ms``. Real fsyncs; ``flush_ms`` is one of them. Times are medians of
pairs measured in turn; ``--catalog-url`` measures PostgreSQL.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

from common import arguments, report, texts

from msa_memory import MemoryModel
from msa_memory.engine.engine import Engine
from msa_memory.persistence import disk

WARM_UP = 5
WORDS = 60  # more than any message's tokens need


def messages(engine: Engine, count: int, tokens: int) -> list[str]:
    """Different texts of exactly so many tokens, cut at word ends; a text without such an end is left out."""
    found = []
    for text in texts(4 * count, WORDS):
        words = text.split(" ")
        starts = (" ".join(words[:length]) for length in range(1, len(words)))
        found += [cut for cut in starts if engine.count_tokens(cut) == tokens][:1]
    if len(found) < count:
        raise SystemExit(
            f"only {len(found)} of {count} texts can be cut to {tokens} tokens; try fewer --runs"
        )
    return found[:count]


def pairs(
    memory: MemoryModel, engine: Engine, pool: list[str], store: Callable[[str], object]
) -> list[tuple[float, float]]:
    """Milliseconds of ``store`` and of the bare pass, in turn for every message."""

    def bare(text: str) -> Generator[None, None, float]:
        started = time.perf_counter()
        engine.encode(0, "", text)
        yield
        return (time.perf_counter() - started) * 1e3

    found = []
    for i, text in enumerate(pool):
        opponent = memory._run(bare(text)) if i % 2 else None
        started = time.perf_counter()
        store(text)
        ours = (time.perf_counter() - started) * 1e3
        found.append((ours, memory._run(bare(text)) if opponent is None else opponent))
    return found[WARM_UP:]


def summary(found: list[tuple[float, float]]) -> dict[str, float]:
    ours, opponent = zip(*found, strict=True)
    return {
        "ours_p50_ms": round(statistics.median(ours), 3),
        "ours_p95_ms": round(statistics.quantiles(ours, n=20)[-1], 3),
        "opponent_p50_ms": round(statistics.median(opponent), 3),
        "ratio": round(statistics.median(a / b for a, b in found), 3),
        "fixed_ms": round(statistics.median(a - b for a, b in found), 3),
    }


def flush_ms(folder: Path) -> float:
    """Milliseconds of one fsync of a small file that grows, as most files of a write do."""
    times = []
    with disk.opened(folder / "probe", os.O_RDWR | os.O_CREAT) as descriptor:
        for i in range(20):
            disk.write_at(descriptor, b"x" * 4096, i * 4096)
            started = time.perf_counter()
            disk.sync(descriptor)
            times.append((time.perf_counter() - started) * 1e3)
    return round(statistics.median(times), 3)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    figures: dict[str, object] = {"tokens": options.tokens, "flush_ms": flush_ms(folder)}
    with MemoryModel.open(folder / "bank", device=options.device, catalog_url=options.catalog_url) as memory:
        memory.add("The first message loads the model.")
        engine = memory._shared.runtime.engine(allow_download=False)
        pool = messages(engine, options.runs + WARM_UP, options.tokens)
        session = memory.session("bench")
        figures["add"] = summary(pairs(memory, engine, pool, memory.add))
        figures["append"] = summary(pairs(memory, engine, pool, lambda text: session.append("tool", text)))
    return figures


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(runs=100)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--catalog-url", help="a PostgreSQL URL instead of SQLite")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(Path(scratch), options)
    catalog = "postgresql" if options.catalog_url else "sqlite"
    report("add" if catalog == "sqlite" else f"add_{catalog}", options, {"catalog": catalog, **figures})


if __name__ == "__main__":
    main()
