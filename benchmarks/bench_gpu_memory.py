"""A real memory of 100 million tokens of the default model on one GPU: made, routed, read and answered.

Texts are drawn from a seed, each unlike the others, with needles among them whose codes are asked for
afterwards. Routing keys stay on the device, K/V in pinned host memory. With --work every finished shard is
kept there, so that a run that --minutes cut short goes on where it stopped; one command stays under ten
minutes. `--device cpu --tiny` proves this script on the testing model: its figures mean nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, report
from safetensors.torch import load_file, save_file
from torch import Tensor

from msa_memory.engine import kernels
from msa_memory.engine.device_bank import DeviceBank
from msa_memory.engine.device_rows import DeviceMemory, DeviceRows, Prompt
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.graphs import Replay
from msa_memory.engine.lexical import passage_terms
from msa_memory.engine.models import DEFAULT_MODEL, resolve
from msa_memory.engine.packed_encoding import PackedStates, encode_packed
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.engine.states import PassageStates
from msa_memory.engine.tiers import tier_bytes
from msa_memory.errors import NotFoundError

UNFINISHED = 3
"""Exit status of a run that --minutes cut short and that another one continues."""
NAMES = (
    "Ada Bruno Chloe Dmitri Elif Farid Greta Hugo Ines Jonas Kaito Lena Marco Nadia Oskar Priya Quinn Rosa "
    "Stefan Tariq Ursula Viktor Wanda Xenia Yusuf Zofia"
).split()
THINGS = "harbour archive workshop vault garden observatory mill library stable chapel depot tower".split()


@dataclass(frozen=True)
class Needle:
    number: int
    text: str
    question: str
    code: str


@dataclass
class Stages:
    """Seconds and bytes of what was done so far."""

    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def book(self, stage: str, started: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


class Corpus:
    """Unique texts by passage number: the same from every run with the same seed."""

    def __init__(self, engine: Engine, seed: int, passages: int, tokens: int, needles: int) -> None:
        import pydoc_data.topics

        self.engine, self.seed, self.tokens = engine, seed, tokens
        words = {word for text in pydoc_data.topics.topics.values() for word in text.split()}
        self.words = np.array(sorted(word for word in words if word.isalpha()))
        places = np.linspace(0, passages - 1, needles).astype(int)
        self.needles = {int(number): self._needle(index, int(number)) for index, number in enumerate(places)}

    def _needle(self, index: int, number: int) -> Needle:
        name, thing = NAMES[index % len(NAMES)], THINGS[index % len(THINGS)]
        code = str(np.random.default_rng([self.seed, index]).integers(10_000, 100_000))
        return Needle(
            number,
            f"{name} keeps the key of the {thing} safe. The code that {name} uses for the {thing} is {code}.",
            f"What is the code that {name} uses for the {thing}?",
            code,
        )

    def ids(self, number: int) -> list[int]:
        """Token ids of one passage, of exactly the length every filler has."""
        if number in self.needles:
            return self.engine.prompt.document(number, "", self.needles[number].text)
        random = np.random.default_rng([self.seed, 1 << 20, number])
        words = " ".join(self.words[random.integers(len(self.words), size=self.tokens)])
        return self.engine.prompt.document(number, "", f"Record {number}. {words}.")[: self.tokens]


class Memory:
    """Routing keys on the device, K/V in a tier on the host."""

    def __init__(self, engine: Engine, passages: int, tokens: int) -> None:
        self.engine, msa, config = engine, engine.msa, engine.decoder.config
        self.shape = (len(msa.router_layers), config.num_kv_heads, config.head_dim)
        chunks = passages * -(-tokens // msa.chunk)
        self.bank = DeviceBank(msa, lacking, device=engine.decoder.device, room=chunks)

    def take(self, first: int, states: PackedStates, terms: Callable[[int], Tensor | None]) -> None:
        self.bank.add_packed(range(first, first + len(states.chunks)), states, terms)


def lacking(number: int) -> PassageStates:
    raise NotFoundError(f"passage {number} is not in the tier")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tiny", action="store_true", help="the testing model and toy sizes, for a CPU")
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--passage-tokens", type=int, default=256)
    parser.add_argument("--shard-passages", type=int, default=2_048, help="kept and resumed as one")
    parser.add_argument("--batch-passages", type=int, default=128, help="encoded in one pass")
    parser.add_argument("--needles", type=int, default=16)
    parser.add_argument("--work", type=Path, help="folder for finished shards, so that a run can go on")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop encoding after so long")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.tiny:
        options.tokens, options.passage_tokens, options.needles = 24 * 40, 40, 2
        options.shard_passages, options.batch_passages = 8, 4
    elif not options.device.startswith("cuda"):
        print("bench_gpu_memory: measured on a CUDA device; --tiny proves this script on a CPU")
        return
    started, stages = time.perf_counter(), Stages()
    engine = loaded(options, stages)
    passages = options.tokens // options.passage_tokens
    corpus = Corpus(engine, options.seed, passages, options.passage_tokens, options.needles)
    memory = Memory(engine, passages, options.passage_tokens)
    with torch.inference_mode():
        done = build(options, memory, corpus, passages, stages, started)
        if done < passages:
            print(json.dumps({"unfinished": done, "of": passages, "seconds": stages.seconds}))
            sys.exit(UNFINISHED)
        figures = {
            "tokens": passages * options.passage_tokens,
            "passages": passages,
            "seed": options.seed,
            "needles": ask(memory, corpus, stages),
            "device_rows": run_rows(memory, corpus),
            "encoding": compare_encoding(options, engine, corpus),
            "memory": arithmetic(options, memory, passages),
            "seconds": stages.seconds,
            "bytes": stages.bytes,
        }
    figures["total_s"] = time.perf_counter() - started
    report("gpu_memory", options, figures)


def loaded(options: Any, stages: Stages) -> Engine:
    started = time.perf_counter()
    if options.tiny:
        from msa_memory.testing import tiny_model

        engine = load_engine(tiny_model(), device=options.device)
    else:
        engine = load_engine(resolve(DEFAULT_MODEL), name=DEFAULT_MODEL, device=options.device)
    stages.book("load_model", started)
    return engine


# encoding


def build(options: Any, memory: Memory, corpus: Corpus, passages: int, stages: Stages, started: float) -> int:
    """Encode or read back shard by shard; how many passages the memory holds at the end."""
    shards = [
        range(at, min(at + options.shard_passages, passages))
        for at in range(0, passages, options.shard_passages)
    ]
    with ThreadPoolExecutor(1) as ahead:
        texts = None
        for index, shard in enumerate(shards):
            kept = options.work / f"{shard.start}-{shard.stop}.safetensors" if options.work else None
            if kept is not None and kept.exists():
                at = time.perf_counter()
                memory.take(shard.start, read_shard(kept), terms_of(corpus))
                stages.book("read_shards", at)
                continue
            if time.perf_counter() - started > 60 * options.minutes:
                return shard.start
            tokens = (texts or ahead.submit(tokenised, corpus, shard)).result()
            following = shards[index + 1] if index + 1 < len(shards) else None
            texts = ahead.submit(tokenised, corpus, following) if following else None
            states = encode_shard(options, memory.engine, tokens, stages)
            at = time.perf_counter()
            memory.take(shard.start, states, terms_of(corpus))
            stages.book("take_in", at)
            if kept is not None:
                at = time.perf_counter()
                write_shard(kept, states)
                stages.book("write_shards", at)
    stages.bytes["routing_keys_on_device"] = memory.bank.nbytes()
    stages.bytes["kv_on_host"] = memory.bank.host_bytes()
    return passages


def terms_of(corpus: Corpus) -> Callable[[int], Tensor | None]:
    """Words of the needles only: routing is measured, and filler has no words of its own."""
    return lambda number: passage_terms(corpus.needles[number].text) if number in corpus.needles else None


def tokenised(corpus: Corpus, shard: range) -> tuple[list[list[int]], float]:
    started = time.perf_counter()
    with ThreadPoolExecutor() as threads:
        ids = list(threads.map(corpus.ids, shard, chunksize=256))
    return ids, time.perf_counter() - started


def encode_shard(
    options: Any, engine: Engine, tokens: tuple[list[list[int]], float], stages: Stages
) -> PackedStates:
    passages, took = tokens
    stages.seconds["make_texts_in_background"] = stages.seconds.get("make_texts_in_background", 0.0) + took
    started = time.perf_counter()
    parts = [
        encode_packed(engine.decoder, passages[at : at + options.batch_passages])
        for at in range(0, len(passages), options.batch_passages)
    ]
    joined = PackedStates(
        *(
            torch.cat([getattr(part, name) for part in parts], 1)
            for name in ("keys", "values", "router_keys")
        ),
        sum((part.chunks for part in parts), ()),
        sum((part.router_chunks for part in parts), ()),
    )
    if engine.decoder.device.type == "cuda":
        torch.cuda.synchronize()
    stages.book("encode", started)
    return joined


def write_shard(file: Path, states: PackedStates) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    counts = {"chunks": states.chunks, "router_chunks": states.router_chunks}
    tensors = {name: torch.tensor(value) for name, value in counts.items()}
    tensors |= {name: getattr(states, name).cpu() for name in ("keys", "values", "router_keys")}
    partial = file.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(file)


def read_shard(file: Path) -> PackedStates:
    tensors = load_file(file)
    counts = [tuple(tensors[name].tolist()) for name in ("chunks", "router_chunks")]
    return PackedStates(tensors["keys"], tensors["values"], tensors["router_keys"], *counts)


# asking


def ask(memory: Memory, corpus: Corpus, stages: Stages) -> dict[str, Any]:
    """Every needle's question through the engine's own verbs: found among the best, and answered."""
    engine, view = memory.engine, memory.bank.view()
    told: list[dict[str, Any]] = []
    for needle in corpus.needles.values():
        started = time.perf_counter()
        routing = engine.route(needle.question, view, lexical_weight=0.0)
        routed = time.perf_counter() - started
        best = view.select(routing.relevance(), 8).numbers
        evidence = "".join(f"{corpus.needles[n].text}\n" for n in best if n in corpus.needles)
        started = time.perf_counter()
        ids = engine.prompt.reading(evidence, needle.question)
        generation = engine.read(view, routing.selections, ids, SamplingOptions(max_new_tokens=16))
        for _ in engine.decode(generation):
            pass
        told.append(
            {
                "rank": best.index(needle.number) if needle.number in best else None,
                "answered": needle.code in generation.text,
                "route_ms": 1e3 * routed,
                "answer_ms": 1e3 * (time.perf_counter() - started),
            }
        )
    stages.seconds["route_and_answer"] = sum(one["route_ms"] + one["answer_ms"] for one in told) / 1e3
    later = told[1:] or told  # the first question plans and compiles
    return {
        "asked": len(told),
        "found_first": sum(one["rank"] == 0 for one in told),
        "found_in_8": sum(one["rank"] is not None for one in told),
        "answered": sum(one["answered"] for one in told),
        "route_ms": statistics.median(one["route_ms"] for one in later),
        "answer_ms": statistics.median(one["answer_ms"] for one in later),
        "first_route_ms": told[0]["route_ms"],
    }


def run_rows(memory: Memory, corpus: Corpus) -> dict[str, Any]:
    """Questions that attend to what they choose, without the host, and decode steps as one graph."""
    engine, state = memory.engine, memory.bank.view().state
    assert state.plan is not None
    assert state.tier is not None
    asked = [engine.prompt.question(needle.question) for needle in list(corpus.needles.values())[:8]]
    rows = DeviceRows(
        engine.decoder, engine.head, DeviceMemory(state.plan, state.tier), rows=len(asked), capacity=512,
        position=engine.prompt.question_position, top_k=engine.msa.top_k,
    )  # fmt: skip
    prompts = [Prompt(row, *one) for row, one in enumerate(asked)]
    took = []
    for _ in range(3):
        for row in range(len(asked)):
            rows.clear(row)
        started = time.perf_counter()
        logits = rows.feed(prompts)
        synchronise(engine)
        took.append(time.perf_counter() - started)
    step, steps = Replay(rows.step, [rows.lengths]), 4 if len(asked) < 8 else 64
    for timed in (False, True):
        started = time.perf_counter()
        for _ in range(steps if timed else 1):
            rows.stepped()
            logits = step(logits.argmax(-1))
        synchronise(engine)
    return {
        "questions": len(asked),
        "prefill_with_memory_ms": 1e3 * min(took),
        "decode_tokens_per_s": steps * len(asked) / (time.perf_counter() - started),
        "kernels": kernels.usable(logits, engine.decoder.config.head_dim),
        "cache_bytes": rows.nbytes(),
    }


def compare_encoding(options: Any, engine: Engine, corpus: Corpus) -> dict[str, Any] | str:
    """Tokens/s of documents beside transformers with SDPA over a batch of equal lengths, its best case."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return "transformers is not installed: no opponent"
    if options.tiny:
        return "the testing model has no opponent"
    theirs = AutoModelForCausalLM.from_pretrained(
        resolve(DEFAULT_MODEL), dtype=engine.decoder.dtype, attn_implementation="sdpa"
    )
    model = theirs.to(options.device).eval().model
    passages = [corpus.ids(number) for number in range(1, 1 + options.batch_passages)]
    batch = torch.tensor(
        [ids[: options.passage_tokens] for ids in passages if len(ids) == options.passage_tokens]
    )
    batch = batch.to(options.device)
    ours = rate(lambda: encode_packed(engine.decoder, batch.tolist()), batch.numel(), engine)
    opponent = rate(lambda: model(batch, use_cache=False), batch.numel(), engine)
    return {"tokens_per_s": ours, "opponent_tokens_per_s": opponent, "ratio": ours / opponent}


def rate(work: Callable[[], object], amount: int, engine: Engine) -> float:
    took = []
    for _ in range(7):
        started = time.perf_counter()
        work()
        synchronise(engine)
        took.append(time.perf_counter() - started)
    return amount / statistics.median(took[2:])


def synchronise(engine: Engine) -> None:
    if engine.decoder.device.type == "cuda":
        torch.cuda.synchronize()


def arithmetic(options: Any, memory: Memory, passages: int) -> dict[str, Any]:
    """What was held against what the shapes say: bytes per token of each tier."""
    engine, (layers, groups, dim) = memory.engine, memory.shape
    size = engine.decoder.dtype.itemsize
    per_passage = -(-options.passage_tokens // engine.msa.router_chunk)
    keys = passages * per_passage * layers * groups * dim * size
    chunks = passages * -(-options.passage_tokens // engine.msa.chunk)
    weights = sum(parameter.nbytes for parameter in engine.decoder.parameters())
    found: dict[str, Any] = {
        "routing_keys_bytes": keys,
        "routing_keys_held_over_arithmetic": memory.bank.nbytes() / keys,
        "kv_bytes": tier_bytes(chunks, layers, groups, dim, engine.decoder.dtype),
        "kv_held_over_arithmetic": memory.bank.host_bytes()
        / tier_bytes(chunks, layers, groups, dim, engine.decoder.dtype),
        "weights_bytes": weights,
    }
    if engine.decoder.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        found |= {"peak_device_bytes": peak, "peak_over_arithmetic": peak / (keys + weights)}
    return found


if __name__ == "__main__":
    main()
