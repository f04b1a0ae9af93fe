"""Opening a saved memory of 1,000 passages, adding one message, and the memory's resident size.

Time to open counts everything until the first search may route, beside loading the model itself. The
resident size is the process's growth between a loaded model and a loaded memory that answered once.
"""

from __future__ import annotations

import gc
import resource
import statistics
import tempfile
import time
from pathlib import Path

from common import arguments, report, texts

from msa_memory import MemoryModel
from msa_memory.engine.models import DEFAULT_MODEL


def resident_bytes() -> int:
    """This process's resident set now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--words", type=int, default=75)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bank"
        with MemoryModel.open(folder, model=DEFAULT_MODEL, device=options.device) as memory:
            memory.add_many(texts(options.passages, options.words))
            adds, message = [], "The ferry to the island leaves at nine from the second pier. " * 3
            for _ in range(20):
                started = time.perf_counter()
                memory.add(message)
                adds.append(time.perf_counter() - started)
            engine = memory._engine()
            encodes = []
            for _ in range(20):
                started = time.perf_counter()
                engine.encode(0, "", message)
                encodes.append(time.perf_counter() - started)
            stats = memory.stats
        with MemoryModel.open(None, model=DEFAULT_MODEL, device=options.device) as model_only:
            model_only.query("Is anything here?")
            gc.collect()
            before = resident_bytes()
            started = time.perf_counter()
            with MemoryModel.open(folder, model=DEFAULT_MODEL, device=options.device) as memory:
                memory._bank().refresh()
                opened = time.perf_counter() - started
                memory.search("When does the ferry leave?")
                gc.collect()
                growth = resident_bytes() - before
    report(
        "open",
        options,
        {
            "passages": stats.passages,
            "tokens": stats.tokens,
            "state_bytes": stats.state_bytes,
            "open_s": opened,
            "resident_growth_bytes": growth,
            "resident_per_state_byte": growth / stats.state_bytes,
            "add_p50_s": statistics.median(adds),
            "encode_p50_s": statistics.median(encodes),
            "add_fixed_cost_p50_s": statistics.median(adds) - statistics.median(encodes),
        },
    )


if __name__ == "__main__":
    main()
