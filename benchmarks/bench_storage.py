"""The storage alone, without a model: adding, forgetting, opening, looking and verifying 10,000 passages.

Each document is one passage with the states of 50 tokens of the default model, about 13 kB. Times are medians
in seconds. ``--catalog-url`` measures PostgreSQL; its schema should be empty.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common import arguments, report

from msa_memory.persistence import NewDocument, NewPassage, Store, disk
from msa_memory.persistence.writer import Writer
from msa_memory.types import TensorBytes

STATE_BYTES = 13_500
MODEL = {"model": "bench", "fingerprint": "0" * 64, "info": {}}


def document(store: Store, i: int, number: int) -> NewDocument:
    text = f"Message {i}: the ferry to island {i % 97} leaves at {i % 24} from pier {i % 11}. " * 3
    states = {"states": TensorBytes("U8", (STATE_BYTES,), os.urandom(STATE_BYTES))}
    passage = NewPassage(start=0, end=len(text), tokens=50, number=number, states=states)
    metadata = {"i": i, "group": i % 10, "speaker": f"speaker {i % 5}"}
    return NewDocument(id=f"d{i:06d}", namespace="bench", text=text, metadata=metadata, passages=[passage])


def fill(store: Store, start: int, count: int, batch: int = 64) -> None:
    for first in range(start, start + count, batch):
        ids = range(first, min(first + batch, start + count))
        numbers = store.reserve_numbers(len(ids))
        store.add([document(store, i, number) for i, number in zip(ids, numbers, strict=True)])


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def masked(store: Store, forget: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a forget until it is committed, and until its bytes are gone."""
    moments: list[float] = []
    erase = Writer.erase

    def noted(self: Writer, **options: bool) -> object:
        moments.append(time.perf_counter())
        return erase(self, **options)

    Writer.erase = noted  # type: ignore[method-assign, assignment]
    try:
        started = time.perf_counter()
        forget()
        return moments[-1] - started, time.perf_counter() - started
    finally:
        Writer.erase = erase  # type: ignore[method-assign]


def flush_time(folder: Path) -> float:
    """Seconds of one fsync of a small file here, the floor of every write."""
    probe = folder / "probe"
    times = []
    with disk.opened(probe, os.O_RDWR | os.O_CREAT) as descriptor:
        for i in range(20):
            disk.write_at(descriptor, b"x" * 4096, i * 4096)
            times.append(timed(lambda: disk.sync(descriptor)))
    probe.unlink()
    return statistics.median(times)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    path, url, count = folder / "bank", options.catalog_url, options.passages
    figures: dict[str, object] = {"passages": count, "flush_s": flush_time(folder)}
    with Store.open(path, catalog_url=url) as store:
        store.bind_model(**MODEL)
        figures["fill_s"] = timed(lambda: fill(store, 0, count))
        figures["add_p50_s"] = middle([timed(lambda i=i: fill(store, count + i, 1)) for i in range(20)])
        looks = (None, {"group": 3})
        figures["first_look_s"] = [timed(lambda w=where: store.visible("bench", w)) for where in looks]
        figures["same_look_s"] = [timed(lambda w=where: store.visible("bench", w)) for where in looks]
        fill(store, count + 20, 1)
        figures["look_after_add_s"] = [timed(lambda w=where: store.visible("bench", w)) for where in looks]
        records = store.changes(0).added[:500]
        figures["read_states_p50_s"] = middle([timed(lambda r=r: store.states(r)) for r in records])
    figures["open_closed_s"] = middle(opened(path, url, options.runs))
    with Store.open(path, catalog_url=url) as other:
        fill(other, count + 21, 1)
        figures["open_beside_another_s"] = middle(opened(path, url, options.runs))
        figures["verify_s"] = timed(other.verify)
        one = [masked(other, lambda i=i: other.forget("bench", ids=[f"d{i:06d}"])) for i in range(10)]
        figures["forget_one_masked_p50_s"] = middle([until for until, _ in one])
        figures["forget_one_erased_p50_s"] = middle([until for _, until in one])
        until, erased = masked(other, lambda: other.forget("bench", where={"group": 3}))
        figures["forget_1000_by_filter_masked_s"] = until
        figures["forget_1000_by_filter_erased_s"] = erased
        figures["compact_s"] = timed(other.compact)
        stats = other.stats("bench")
        figures |= {"catalog_bytes": stats.catalog_bytes, "state_bytes": stats.state_bytes}
    return figures


def opened(path: Path, url: str | None, runs: int) -> list[float]:
    """Seconds to open and load every record and state, as a memory does before its first answer."""

    def load() -> None:
        with Store.open(path, catalog_url=url) as store:
            for record in store.changes(0).added:
                store.states(record)
            store.visible("bench")

    return [timed(load) for _ in range(runs)]


def middle(times: Sequence[float]) -> float:
    return statistics.median(times)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--catalog-url", help="a PostgreSQL URL instead of SQLite")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(Path(scratch), options)
    catalog = "postgresql" if options.catalog_url else "sqlite"
    name = "storage" if catalog == "sqlite" else f"storage_{catalog}"
    report(name, options, {"catalog": catalog, **figures})


if __name__ == "__main__":
    main()
