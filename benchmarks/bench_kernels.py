"""The kernels against the device's own limits, measured in the same run, and against plain torch.

Routing reads the keys of 100 million tokens of MSA-4B's shape (18 layers, 8 KV heads of 128, chunks of 64
tokens) and finds a planted passage for every question. On a CPU, `--tiny` interprets every kernel once at
a toy size: that proves this script, its figures mean nothing.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import torch
from common import arguments, report
from torch import Tensor

PARSER = arguments(__doc__ or "")
PARSER.add_argument("--tiny", action="store_true", help="toy sizes, for a CPU")
PARSER.add_argument("--tune", action="store_true", help="also time other tilings of the routing product")
OPTIONS = PARSER.parse_args()
CUDA = OPTIONS.device.startswith("cuda")
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from msa_memory.engine import ops  # noqa: E402
from msa_memory.engine.kernels import decoding, documents, gathering, pooling, routing  # noqa: E402

DEVICE = torch.device(OPTIONS.device)
DTYPE = torch.bfloat16
TINY: bool = OPTIONS.tiny
LAYERS, GROUPS, HEADS, DIM, HIDDEN = (1, 2, 4, 16, 48) if TINY else (18, 8, 32, 128, 2560)
TOKENS = 64 * 20 if TINY else 100_000_000
CHUNK, PASSAGE_CHUNKS, TOP_K = 64, 8, 2 if TINY else 16
QUESTIONS = 2 if TINY else 64
MEMORY_BOUND = [(1, 12)] if TINY else [(1, 1), (1, 12), (2, 12), (4, 12), (6, 16), (8, 12)]
MATRIX_BOUND = [(2, 16)] if TINY else [(16, 12), (32, 16), (64, 16)]
COMPARED = (1, 2) if TINY else (1, 8)  # questions of 12 tokens, against the reference
Work = Callable[[], object]


def seconds(works: Sequence[Work]) -> float:
    """Median time of one of these works, taken in turn so that none finds its data in a cache."""
    if not CUDA:
        started = time.perf_counter()
        works[0]()
        return time.perf_counter() - started
    turn = cycle(works)
    for _ in range(2):
        next(turn)()
    rounds = max(len(works), OPTIONS.runs)
    ticks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    ticks[0].record()
    for tick in ticks[1:]:
        next(turn)()
        tick.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(ticks)) / 1000


def ceilings() -> dict[str, float]:
    """What the device does at most: bytes/s of a copy, reads plus writes, and bf16 operations/s."""
    size, edge = (1 << 16, 64) if TINY else (1 << 32, 8192)
    source = torch.randint(-9, 9, (size,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copy = seconds([lambda: target.copy_(source)])
    a, b = (torch.randn(edge, edge, device=DEVICE).to(DTYPE) for _ in range(2))
    product = seconds([lambda: a @ b])
    return {"bytes_per_s": 2 * size / copy, "flop_per_s": 2 * edge**3 / product}


class Memory:
    """Random unit routing keys of all layers, with one planted passage for each question."""

    def __init__(self, quantised: bool) -> None:
        self.chunks = TOKENS // CHUNK
        shape = (LAYERS, self.chunks, GROUPS, DIM)
        self.keys = torch.empty(shape, dtype=torch.int8 if quantised else DTYPE, device=DEVICE)
        self.scales = torch.empty(shape[:2], device=DEVICE) if quantised else None
        self.queries = [
            ops.normalize_heads(torch.randn(16, HEADS, DIM, device=DEVICE)) for _ in range(2 if TINY else 64)
        ]
        for layer in range(LAYERS):
            for start in range(0, self.chunks, 100_000):
                part = slice(start, min(start + 100_000, self.chunks))
                size = (part.stop - start, GROUPS, DIM)
                self._store(layer, part, ops.normalize_heads(torch.randn(size, device=DEVICE)))
        passages = -(-self.chunks // PASSAGE_CHUNKS)
        self.planted = np.linspace(0, passages - 1, len(self.queries)).astype(int).tolist()
        for index, (query, passage) in enumerate(zip(self.queries, self.planted, strict=True)):
            row = min(passage * PASSAGE_CHUNKS + index % PASSAGE_CHUNKS, self.chunks - 1)
            key = ops.normalize_heads(ops.fold_queries(query[:1], GROUPS).view(1, GROUPS, DIM))
            for layer in range(LAYERS):
                self._store(layer, slice(row, row + 1), key)
        lengths = np.full(passages, PASSAGE_CHUNKS)
        lengths[-1] = self.chunks - PASSAGE_CHUNKS * (passages - 1)
        self.lengths = lengths.tolist()
        block = routing.KeyBlock(self.keys, self.lengths, np.arange(passages), self.scales)
        self.plan = routing.plan_routing([block])

    def _store(self, layer: int, part: slice, keys: Tensor) -> None:
        if self.scales is None:
            self.keys[layer, part] = keys
        else:
            self.keys[layer, part], self.scales[layer, part] = routing.quantize_keys(keys, torch.int8)

    def asked(self, questions: int, tokens: int) -> list[Tensor]:
        return [query[:tokens] for query in self.queries[:questions]]

    def route(
        self, slot: int, questions: int, tokens: int, tiling: routing.Tiling | None = None
    ) -> routing.Routed:
        asked = self.asked(questions, tokens)
        return routing.route_questions(self.plan, slot, asked, top_k=TOP_K, scale=1.0, tiling=tiling)

    def layer_bytes(self) -> int:
        return (self.keys.nbytes + (self.scales.nbytes if self.scales is not None else 0)) // LAYERS


def measure_routing(memory: Memory, limits: dict[str, float]) -> dict[str, Any]:
    """Time per layer, and how near the faster of the two limits lets it come, by questions x tokens."""
    figures = {}
    for questions, tokens in MEMORY_BOUND + MATRIX_BOUND:
        found = memory.route(LAYERS - 1, questions, tokens).numbers[:, 0].tolist()
        if found != memory.planted[:questions]:
            sys.exit(
                f"routing {questions} questions found {found}, planted were {memory.planted[:questions]}"
            )

        def layer(slot: int, questions: int = questions, tokens: int = tokens) -> Work:
            return lambda: memory.route(slot, questions, tokens)

        took = seconds([layer(slot) for slot in range(LAYERS)])
        flop = 2 * memory.chunks * GROUPS * DIM * questions * tokens
        figures[f"{questions}x{tokens}"] = {
            "columns": questions * tokens,
            "ms_per_layer": 1e3 * took,
            "of_bandwidth": memory.layer_bytes() / took / limits["bytes_per_s"],
            "of_matrix_rate": flop / took / limits["flop_per_s"],
        }
    return figures


def tune(memory: Memory) -> dict[str, Any]:
    """Milliseconds per layer of every tiling that runs."""
    depth = 64 if memory.scales is None else 128
    tilings = [
        routing.Tiling(rows, depth // halves, warps, stages)
        for rows in (64, 128, 256)
        for halves in (1, 2)
        for warps in (4, 8)
        for stages in (2, 3, 4)
    ]
    figures: dict[str, Any] = {}
    for questions, tokens in [MEMORY_BOUND[0], MEMORY_BOUND[-1], MATRIX_BOUND[-1]]:
        for tiling in tilings[:1] if TINY else tilings:
            name = f"{questions}x{tokens} {tiling.rows}x{tiling.depth} w{tiling.warps} s{tiling.stages}"
            try:
                took = seconds([lambda a=questions, b=tokens, c=tiling: memory.route(0, a, b, c)])
            except Exception as error:  # too much shared memory: that tiling is out
                figures[name] = type(error).__name__
            else:
                figures[name] = round(1e3 * took, 3)
    return figures


def reference_routing(memory: Memory, slot: int, query: Tensor) -> Tensor:
    """The reference's algorithm in plain torch: every head scored, then heads, tokens and chunks reduced."""
    grouped = query.to(DTYPE).view(len(query), GROUPS, HEADS // GROUPS, DIM).permute(1, 0, 2, 3)
    parts = []
    for keys in memory.keys[slot].split(1 << 17):
        scores = grouped.reshape(GROUPS, -1, DIM) @ keys.permute(1, 2, 0)  # [G, T*H/G, C]
        heads = scores.view(GROUPS, len(query), HEADS // GROUPS, -1).permute(1, 0, 2, 3).flatten(1, 2)
        parts.append(heads.float().mean(1).amax(0))
    lengths = torch.tensor(memory.lengths, device=DEVICE)
    return torch.segment_reduce(torch.cat(parts), "max", lengths=lengths).topk(TOP_K).indices


def measure_reference(memory: Memory) -> dict[str, float]:
    """Questions of 12 tokens, which the reference scores one by one."""
    figures = {}
    for questions in COMPARED:
        asked = memory.asked(questions, 12)
        theirs = seconds([lambda a=asked: [reference_routing(memory, 0, query) for query in a]])
        ours = seconds([lambda q=questions, s=s: memory.route(s, q, 12) for s in range(LAYERS)])
        figures[f"{questions}x12"] = {"ms_per_layer": 1e3 * theirs, "times_slower": theirs / ours}
    return figures


def measure_pooling(limits: dict[str, float]) -> dict[str, float]:
    """K, V and hidden rows of one layer, against one read of them; opponent: the reference's running sums."""
    passage, count = (100, 3) if TINY else (512, 256)
    tokens = passage * count
    keys, values = (torch.randn(tokens, GROUPS, DIM, device=DEVICE).to(DTYPE) for _ in range(2))
    hidden = torch.randn(tokens, HIDDEN, device=DEVICE).to(DTYPE)
    table = pooling.chunk_table([passage] * count, CHUNK, DEVICE)

    def pool() -> pooling.PooledLayer:
        return pooling.pool_states(keys, values, hidden, table, table)

    def running_sums() -> list[Tensor]:
        bounds = table.bounds.long()
        counts = bounds.diff()[:, None]
        means = []
        for x in (keys.flatten(1), values.flatten(1), hidden):
            sums = torch.cat((x.new_zeros(1, x.shape[1], dtype=torch.float32), x.float().cumsum(0)))
            means.append(((sums[bounds[1:]] - sums[bounds[:-1]]) / counts).to(DTYPE))
        return means

    pooled = pool()
    moved = sum(x.nbytes for x in (keys, values, hidden, pooled.keys, pooled.values, pooled.routing))
    return against(pool, running_sums, moved, limits)


def measure_decode(limits: dict[str, float]) -> dict[str, float]:
    """One token of many sequences over head, 16 passages and 4,096 own tokens; opponent: cat and SDPA."""
    sequences, own, chosen = (2, 40, 20) if TINY else (64, 4096, TOP_K * PASSAGE_CHUNKS)
    rows = 100 if TINY else 1 << 18

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, GROUPS, DIM, device=DEVICE).to(DTYPE)

    caches = [draw(sequences, own).transpose(1, 2) for _ in range(2)]
    table = torch.randint(0, rows, (sequences, chosen), device=DEVICE, dtype=torch.int32)
    lengths = [torch.full((sequences,), n, dtype=torch.int32, device=DEVICE) for n in (chosen, own)]
    context = decoding.Context(
        draw(3).transpose(0, 1), draw(3).transpose(0, 1), draw(rows), draw(rows),
        table, lengths[0], *caches, lengths[1],
    )  # fmt: skip
    query = torch.randn(sequences, HEADS, DIM, device=DEVICE).to(DTYPE)

    def theirs() -> None:
        for one in range(sequences):
            picked = [
                memory[table[one]].transpose(0, 1) for memory in (context.memory_keys, context.memory_values)
            ]
            keys = torch.cat((context.head_keys, picked[0], caches[0][one]), 1)
            values = torch.cat((context.head_values, picked[1], caches[1][one]), 1)
            ops.attend(query[one : one + 1], keys, values, DIM**-0.5)

    moved = 2 * sequences * (3 + chosen + own) * GROUPS * DIM * 2
    return against(lambda: decoding.attend_decode(query, context, DIM**-0.5), theirs, moved, limits)


def measure_gathering() -> dict[str, float]:
    """K/V of the chosen passages from pinned host memory; opponent: the host collects them and sends."""
    questions, rows = (2, 40) if TINY else (64, 1 << 18)
    keys, values = (torch.randn(rows, GROUPS, DIM).to(DTYPE) for _ in range(2))
    if CUDA:
        keys, values = keys.pin_memory(), values.pin_memory()
    passages, room = rows // PASSAGE_CHUNKS, TOP_K * PASSAGE_CHUNKS
    firsts = torch.arange(passages, dtype=torch.int32) * PASSAGE_CHUNKS
    places = torch.stack((firsts, torch.full_like(firsts, PASSAGE_CHUNKS)), 1).to(DEVICE)
    chosen = torch.randint(passages, (questions, TOP_K)).to(DEVICE)

    def by_host() -> list[Tensor]:
        at = chosen.cpu()[..., None] * PASSAGE_CHUNKS + torch.arange(PASSAGE_CHUNKS)
        return [pool[at.flatten()].to(DEVICE) for pool in (keys, values)]

    ours = seconds([lambda: gathering.gather_chunks(keys, values, places, chosen, room)])
    opponent = seconds([by_host])
    moved = 2 * questions * room * GROUPS * DIM * DTYPE.itemsize
    return {
        "gigabytes": moved / 1e9,
        "ms": 1e3 * ours,
        "gigabytes_per_s": moved / 1e9 / ours,
        "opponent_ms": 1e3 * opponent,
        "times_slower": opponent / ours,
    }


def against(ours: Work, theirs: Work, moved: int, limits: dict[str, float]) -> dict[str, float]:
    took, opponent = seconds([ours]), seconds([theirs])
    floor = moved / limits["bytes_per_s"]
    return {
        "gigabytes": moved / 1e9,
        "ms": 1e3 * took,
        "of_byte_floor": floor / took,
        "opponent_ms": 1e3 * opponent,
        "times_slower": opponent / took,
    }


def measure_documents() -> dict[str, float]:
    """Causal attention of 512-token passages; opponents: SDPA over the batch, and passage by passage."""
    count, length = (2, 20) if TINY else (64, 512)
    query = torch.randn(count * length, HEADS, DIM, device=DEVICE).to(DTYPE)
    keys, values = (torch.randn(count * length, GROUPS, DIM, device=DEVICE).to(DTYPE) for _ in range(2))
    lengths = [length] * count

    def batched() -> Tensor:
        shaped = [x.view(count, length, -1, DIM).transpose(1, 2) for x in (query, keys, values)]
        return torch.nn.functional.scaled_dot_product_attention(*shaped, is_causal=True, enable_gqa=True)

    ours = seconds([lambda: documents.attend_documents(query, keys, values, lengths, DIM**-0.5)])
    alone = seconds([lambda: ops.attend_documents(query, keys, values, lengths, DIM**-0.5)])
    together = seconds([batched])
    tokens = count * length
    return {
        "tokens_per_s": tokens / ours,
        "times_slower_sdpa_equal_lengths": together / ours,
        "times_slower_passage_by_passage": alone / ours,
    }


@torch.inference_mode()
def main() -> None:
    if not CUDA and not TINY:
        print("bench_kernels: kernels are measured on a CUDA device; --tiny proves this script on a CPU")
        return
    torch.manual_seed(0)
    limits = ceilings()
    figures: dict[str, Any] = {"limits": limits, "tokens": TOKENS, "layers": LAYERS, "seed": 0}
    figures["pooling"] = measure_pooling(limits)
    figures["decode"] = measure_decode(limits)
    figures["documents"] = measure_documents()
    figures["gathering"] = measure_gathering()
    for name, quantised in (("bf16", False), ("int8", True)):
        memory = Memory(quantised)
        figures[f"routing_{name}"] = measure_routing(memory, limits)
        if not quantised:
            figures["reference_routing"] = measure_reference(memory)
        if OPTIONS.tune:
            figures[f"tilings_{name}"] = tune(memory)
        del memory  # makes room for the next
    if CUDA:
        figures["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    report("kernels", OPTIONS, figures)


if __name__ == "__main__":
    main()
