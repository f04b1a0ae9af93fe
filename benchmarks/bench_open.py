"""Opening a saved memory, adding one message, and the memory's resident size.

Without ``--tokens``: 1,000 passages that the default model reads. Time to open counts everything until the
first search may route, beside loading the model itself. The resident size is the process's growth between a
loaded model and a loaded memory that answered once.

With ``--tokens N``: a memory of N tokens of the default model's shape, written through the store. Its states
are perturbed copies of real ones (``--keys``, see bench_routing_scale.py) or random. Opening it is timed in
processes of their own: first where its sheets are still to be made, then with them. Resident bytes are those
of the whole process beside what it had with the model alone: its own, and those of mapped files, which the
system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import arguments, report, texts
from safetensors.torch import load_file
from torch import Tensor

from msa_memory import MemoryModel
from msa_memory.engine import ops
from msa_memory.engine.engine import Engine
from msa_memory.engine.lexical import passage_terms
from msa_memory.engine.models import DEFAULT_MODEL
from msa_memory.engine.states import PassageStates
from msa_memory.persistence import NewDocument, NewPassage, Store

TOKENS_PER_PASSAGE = (64, 320)
WORDS_PER_TOKEN = 0.75
POOL_CHUNKS = 32_768
BATCH = 250
QUESTIONS = (
    "When does the ferry leave?",
    "How are classes defined?",
    "What does the import statement do?",
    "Which operators compare objects?",
    "How is an exception raised?",
    "What is a generator?",
)


def resident_bytes(kind: str = "VmRSS") -> int:
    """This process's resident set now; ``RssAnon`` and ``RssFile`` are its parts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def small(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of a memory that the model has read."""
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
    return {
        "passages": stats.passages,
        "tokens": stats.tokens,
        "state_bytes": stats.state_bytes,
        "open_s": opened,
        "resident_growth_bytes": growth,
        "resident_per_state_byte": growth / stats.state_bytes,
        "add_p50_s": statistics.median(adds),
        "encode_p50_s": statistics.median(encodes),
        "add_fixed_cost_p50_s": statistics.median(adds) - statistics.median(encodes),
    }


class Source:
    """States of as many passages as are asked for, in the shape of an engine's."""

    def __init__(self, engine: Engine, keys: Path | None) -> None:
        self.random = torch.Generator().manual_seed(5)
        backbone, self.msa = engine.decoder.config, engine.msa
        self.shape = len(self.msa.router_layers), backbone.num_kv_heads, backbone.head_dim
        self.pool = self._pool(keys)
        self.values = torch.randn(self.shape[0], self.shape[1], 512, self.shape[2], generator=self.random)
        self.values = self.values.bfloat16()

    def _pool(self, keys: Path | None) -> Tensor:
        """Routing keys ``[L, C, G, D]`` to take passages from."""
        layers, groups, dim = self.shape
        if keys is None:
            size = (layers, POOL_CHUNKS, groups, dim)
            return ops.normalize_heads(torch.randn(size, generator=self.random)).bfloat16()
        found: Tensor = load_file(keys)["keys"]
        return found[:, : 2 * POOL_CHUNKS].clone()

    def states(self, tokens: int, text: str) -> PassageStates:
        """States of a passage of so many tokens; no two alike."""
        chunks = -(-tokens // self.msa.router_chunk)
        first = int(torch.randint(self.pool.shape[1] - chunks, (), generator=self.random))
        rows = self.pool[:, first : first + chunks].float()
        rows += 0.6 / rows.shape[-1] ** 0.5 * torch.randn(rows.shape, generator=self.random)
        pooled = self.values[:, :, : -(-tokens // self.msa.chunk)]
        return PassageStates(pooled, pooled, ops.normalize_heads(rows).bfloat16(), passage_terms(text))


def write(folder: Path, engine: Engine, total: int, keys: Path | None) -> dict[str, Any]:
    """A memory of so many tokens, written through the store."""
    started, source, documents, count = time.perf_counter(), Source(engine, keys), [], 0
    with Store.open(folder) as store:
        store.bind_model(model=DEFAULT_MODEL, fingerprint=engine.fingerprint, info={"name": engine.name})
        for number, (tokens, text) in enumerate(_passages(total)):
            states = source.states(tokens, text).to_bytes()
            passage = NewPassage(
                start=0, end=len(text), tokens=tokens, number=store.reserve_numbers(1)[0], states=states
            )
            documents.append(NewDocument(id=f"d{number}", namespace="default", text=text, passages=[passage]))
            count += 1
            if len(documents) == BATCH:
                store.add(documents)
                documents = []
        store.add(documents)
        stats = store.stats("default")
    return {
        "passages": count,
        "tokens": stats.tokens,
        "state_bytes": stats.state_bytes,
        "catalog_bytes": stats.catalog_bytes,
        "write_s": time.perf_counter() - started,
    }


def _passages(total: int) -> Iterator[tuple[int, str]]:
    """Tokens and text of passages, up to so many tokens."""
    random = torch.Generator().manual_seed(6)
    low, high = TOKENS_PER_PASSAGE
    pool = list(texts(20_000, int(high * WORDS_PER_TOKEN)))
    while total > 0:
        tokens = min(total, int(torch.randint(low, high + 1, (), generator=random)))
        words = pool[int(torch.randint(len(pool), (), generator=random))].split(" ")
        yield tokens, " ".join(words[: max(1, int(tokens * WORDS_PER_TOKEN))])
        total -= tokens


def opening(folder: Path) -> dict[str, Any]:
    """What opening and asking take in this process."""
    figures: dict[str, Any] = {}
    with MemoryModel.open(None, model=DEFAULT_MODEL) as model_only:
        model_only.search("Is anything here?")
        gc.collect()
        before = {kind: resident_bytes(kind) for kind in ("VmRSS", "RssAnon", "RssFile")}

        def look(name: str) -> None:
            gc.collect()
            for kind, part in (("VmRSS", ""), ("RssAnon", "_own"), ("RssFile", "_mapped")):
                figures[f"resident_{name}{part}_bytes"] = resident_bytes(kind) - before[kind]

        figures["resident_model_bytes"] = before["VmRSS"]
        started = time.perf_counter()
        with MemoryModel.open(folder, model=DEFAULT_MODEL) as memory:
            memory._bank().refresh()
            figures["open_s"] = time.perf_counter() - started
            look("opened")
            bank = memory._bank().bank
            figures["chunks"] = sum(block.used for block in bank.view()._blocks)
            for name, skim_from in (("skim", 1), ("exact", None)):
                bank.skim_from = skim_from
                took = [_seconds(memory, QUESTIONS[0])]
                look(f"after_{name}")
                took += [_seconds(memory, question) for question in QUESTIONS[1:]]
                figures[f"{name}_first_question_s"] = took[0]
                figures[f"{name}_question_p50_s"] = statistics.median(took[1:])
            look("in_the_end")
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return figures


def _seconds(memory: MemoryModel, question: str) -> float:
    started = time.perf_counter()
    memory.search(question)
    return time.perf_counter() - started


def _in_a_process(folder: Path) -> dict[str, Any]:
    """``opening`` in a new process."""
    command = [sys.executable, __file__, "--opening", str(folder)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def large(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of a memory of ``--tokens``."""
    folder = options.folder or Path(tempfile.mkdtemp()) / "bank"
    try:
        if folder.exists():
            written: dict[str, Any] = {}
        else:
            with MemoryModel.open(None, model=DEFAULT_MODEL) as memory:
                written = write(folder, memory._engine(), options.tokens, options.keys)
        first = _in_a_process(folder)
        runs = [_in_a_process(folder) for _ in range(options.runs)]
        sheets = sum(file.stat().st_size for file in (folder / "states").glob("*.sheet"))
        later = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        return {**written, "sheet_bytes": sheets, "without_sheets": first, "with_sheets": later}
    finally:
        if options.folder is None:
            shutil.rmtree(folder.parent)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--words", type=int, default=75)
    parser.add_argument("--tokens", type=int, help="size of a synthetic memory")
    parser.add_argument("--keys", type=Path, help="routing keys that its states are copies of")
    parser.add_argument("--folder", type=Path, help="where it is kept, or is already")
    parser.add_argument("--opening", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.opening is not None:
        print(json.dumps(opening(options.opening)))
    elif options.tokens:
        report("open_large", options, large(options))
    else:
        report("open", options, small(options))


if __name__ == "__main__":
    main()
