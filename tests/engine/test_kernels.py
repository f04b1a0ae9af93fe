"""The Triton kernels against plain torch: one table of cases, interpreted on the CPU and compiled on a GPU.

The interpreter replaces Triton's language for a whole process, so it runs in a process of its own and no
other test sees it. Every output starts as whatever memory held; a NaN among the expected numbers fails.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from msa_memory.engine import kernels, ops
from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.device_bank import DeviceBank, SharedRouting
from msa_memory.engine.kernels import decoding, documents, pooling, ranking, routing
from msa_memory.engine.states import PassageStates
from msa_memory.errors import EngineError

F32, F16, BF16, I8, F8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn
TOLERANCES = {F32: 2e-6, F16: 2e-3, BF16: 1.6e-2}
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process whose Triton interprets kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"
    yield pool
    pool.shutdown()


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """Calls a kernel's public function where kernels run; arguments and results are on the CPU."""
    if request.param == "interpreted":
        pool = request.getfixturevalue("interpreter")
        return lambda function, *args, **options: pool.submit(function, *args, **options).result()
    return lambda function, *args, **options: on_cpu(function(*on_gpu(args), **on_gpu(options)))


def on_gpu(x: Any) -> Any:
    match x:
        case Tensor():
            return x.cuda()
        case list() | tuple():
            return type(x)(on_gpu(item) for item in x)
        case dict():
            return {name: on_gpu(item) for name, item in x.items()}
        case decoding.Context() | pooling.ChunkTable() | routing.KeyBlock():
            return replace(x, **{name: on_gpu(getattr(x, name)) for name in x.__slots__})
        case routing.RoutingPlan():
            return routing.plan_routing(on_gpu(x.blocks))
    return x


def on_cpu(x: Any) -> Any:
    match x:
        case Tensor():
            return x.cpu()
        case tuple():
            return tuple(on_cpu(item) for item in x)
        case pooling.PooledLayer() | routing.Routed():
            return replace(x, **{name: on_cpu(getattr(x, name)) for name in x.__slots__})
    return x


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the whole tensor, as rounding is; unwritten memory and NaN fail."""
    assert found.shape == expected.shape
    assert found.isfinite().all()
    norm = expected.double().norm().clamp(min=1.0)
    assert float((found.double() - expected.double()).norm() / norm) <= tolerance


# Pooling


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("lengths", "chunk", "router_chunk"),
    [
        pytest.param([1], 64, 16, id="one token"),
        pytest.param([64], 64, 64, id="one whole chunk"),
        pytest.param([63, 1, 65, 128], 64, 16, id="ragged"),
        pytest.param([7, 5], 3, 1, id="small chunks"),
        pytest.param([1000], 200, 1000, id="long chunks"),
        pytest.param([], 64, 16, id="no passages"),
    ],
)
def test_pool_states(run: Run, dtype: torch.dtype, lengths: list[int], chunk: int, router_chunk: int) -> None:
    tokens = sum(lengths)
    packed = draw(tokens, 3, 2, 16, dtype=dtype)
    keys, values = packed[:, 0], packed[:, 2]  # rows apart, as slices of one projection are
    hidden = draw(tokens, 150, seed=1, dtype=dtype)
    tables = [pooling.chunk_table(lengths, size, "cpu") for size in (chunk, router_chunk)]
    found = run(pooling.pool_states, keys, values, hidden, *tables)
    expected = pooling.pool_states_reference(keys, values, hidden, *tables)
    assert len(expected.keys) == sum(-(-length // chunk) for length in lengths)
    for name in expected.__slots__:
        close(getattr(found, name), getattr(expected, name), TOLERANCES[dtype])


def test_a_passage_is_pooled_alike_in_any_batch(run: Run) -> None:
    keys, hidden = draw(90, 2, 16, dtype=BF16), draw(90, 40, dtype=BF16)

    def pool(part: slice, lengths: list[int]) -> pooling.PooledLayer:
        tables = [pooling.chunk_table(lengths, size, "cpu") for size in (64, 16)]
        return run(pooling.pool_states, keys[part], keys[part], hidden[part], *tables)

    together, alone = pool(slice(0, 90), [20, 70]), pool(slice(20, 90), [70])
    assert torch.equal(together.keys[1:], alone.keys)
    assert torch.equal(together.routing[2:], alone.routing)


# Merging


@pytest.mark.parametrize(
    ("rows", "count", "top_k"),
    [(1, 1, 1), (3, 40, 5), (2, 9000, 16), (1, 5, 16), (0, 4, 2), (2, 0, 3)],
)
def test_merge_top(run: Run, rows: int, count: int, top_k: int) -> None:
    """Against a sort by (-score, number), which is what the bank's own ranking does."""
    scores = draw(rows, count).mul(4).round().div(4)  # many ties
    scores[torch.rand(rows, count, generator=torch.Generator().manual_seed(1)) < 0.2] = -torch.inf
    numbers = torch.stack(
        [torch.randperm(count, generator=torch.Generator().manual_seed(i)) for i in range(rows)]
        or [torch.empty(count, dtype=torch.long)]
    )[:rows]
    ranks = ranking.pack_scores(scores, numbers)
    found = run(ranking.merge_top, ranks, top_k)
    for row in range(rows):
        pairs = zip((-scores[row]).tolist(), numbers[row].tolist(), strict=True)
        best = sorted(pair for pair in pairs if pair[0] < np.inf)[:top_k]
        best += [(np.inf, -1)] * (top_k - len(best))
        assert found[0][row].tolist() == [number for _, number in best]
        assert found[1][row].tolist() == [-score for score, _ in best]
    reference = ranking.merge_top_reference(ranks, top_k)
    assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))


def test_ranks_order_and_return_every_score() -> None:
    scores = torch.tensor([-torch.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, torch.inf])
    ranks = ranking.pack_scores(scores, torch.full((10,), 7))
    assert ranks[4] == ranks[5]
    assert (ranks.diff() >= 0).all()
    assert (ranks.diff() == 0).sum() == 1
    numbers, back = ranking.unpack_scores(ranks)
    assert torch.equal(back, scores)
    assert numbers.tolist() == [-1, *[7] * 9]
    ends = ranking.pack_scores(torch.ones(2), torch.tensor([0, ranking.LARGEST_NUMBER]))
    assert ends[0] > ends[1]
    assert ranking.unpack_scores(ends)[0].tolist() == [0, ranking.LARGEST_NUMBER]


# Routing


def key_blocks(*lengths: list[int], dtype: torch.dtype = F32, spare: int = 5) -> list[routing.KeyBlock]:
    """Blocks of two layers and 2 heads of 16; rows behind the last passage are NaN."""
    blocks, number = [], 0
    for seed, block in enumerate(lengths):
        keys = ops.normalize_heads(draw(2, sum(block) + spare, 2, 16, seed=seed))
        scales = None
        if dtype in routing.QUANTIZED:
            keys, scales = routing.quantize_keys(keys, dtype)
        else:
            keys = keys.to(dtype)
            keys[:, sum(block) :] = torch.nan
        blocks.append(routing.KeyBlock(keys, block, np.arange(number, number + len(block)), scales))
        number += len(block)
    return blocks


def questions(*tokens: int, heads: int = 4) -> list[Tensor]:
    return [ops.normalize_heads(draw(count, heads, 16, seed=10 + i)) for i, count in enumerate(tokens)]


def route_and_check(
    run: Run, blocks: list[routing.KeyBlock], asked: list[Tensor], **options: Any
) -> routing.Routed:
    options = {"top_k": 4, "scale": 0.7, **options}
    plan = routing.plan_routing(blocks)
    found = run(routing.route_questions, plan, 1, asked, **options)
    expected = routing.route_questions_reference(plan, 1, asked, **options)
    hidden = expected.scores == -torch.inf
    assert torch.equal(found.scores == -torch.inf, hidden)
    error = (found.scores - expected.scores)[~hidden].abs()
    exact = blocks[0].keys.dtype == F32
    assert error.numel() == 0 or float(error.max()) <= (2e-6 if exact else 4e-3)
    assert torch.equal(found.numbers == -1, expected.numbers == -1)
    if exact:
        assert torch.equal(found.numbers, expected.numbers)
    ranked = ranking.merge_top_reference(
        ranking.pack_scores(found.scores, plan.numbers),
        options["top_k"],
    )
    assert torch.equal(found.numbers, ranked[0])
    assert torch.equal(found.best, ranked[1])
    return found


@pytest.mark.parametrize("dtype", [F32, BF16, F16, I8, F8])
@pytest.mark.parametrize("chunk_reduce", ["max", "mean"])
def test_routing_in_every_key_type(run: Run, dtype: torch.dtype, chunk_reduce: str) -> None:
    if dtype == F8 and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8_e4m3fn")
    blocks = key_blocks([3, 1, 150, 2], [1, 4], dtype=dtype)
    route_and_check(run, blocks, questions(3, 1), chunk_reduce=chunk_reduce)


ROUTING_CASES = {
    "one chunk": ([[1]], [1], {}),
    "one passage longer than a tile and a range": ([[300]], [2], {}),
    "passages across tiles": ([[100, 60, 90, 40]], [5], {}),
    "one chunk each": ([[1] * 140], [2], {}),
    "several blocks": ([[2, 2], [5], [1, 1, 1]], [3, 7], {}),
    "top_k larger than visible": ([[2, 3, 1]], [2], {"top_k": 20}),
    "top_k of one": ([[2, 3, 1]], [2], {"top_k": 1}),
    "a question longer than a product": ([[2, 3]], [70], {}),
    "more questions than a product holds": ([[2, 3]], [1] * 40, {"top_k": 1}),
    "mean over tokens": ([[2, 3, 4]], [4, 9], {"query_reduce": "mean"}),
    "last token": ([[2, 3, 4]], [4, 9], {"query_reduce": "last"}),
    "an empty block": ([[], [3]], [2], {}),
    "no passage": ([[]], [2], {}),
}


@pytest.mark.parametrize("case", ROUTING_CASES)
def test_routing(run: Run, case: str) -> None:
    lengths, tokens, options = ROUTING_CASES[case]
    route_and_check(run, key_blocks(*lengths), questions(*tokens), **options)


@pytest.mark.parametrize(
    "mask", ["nothing", "one", "one of a hidden tile", "half, by question", "nothing for one question"]
)
def test_masked_passages_are_never_chosen_or_read(run: Run, mask: str) -> None:
    blocks = key_blocks([2] * 70, [1, 1, 130])
    visible = torch.zeros(2, 73, dtype=torch.bool)
    match mask:
        case "one":
            visible[:, 71] = True
        case "one of a hidden tile":
            visible[:, 69] = True
        case "half, by question":
            visible[0, ::2] = visible[1, 1::2] = True
        case "nothing for one question":
            visible[0] = True
    one_mask = mask in ("nothing", "one", "one of a hidden tile")
    hidden = ~visible.any(0)
    at = 0
    for block in blocks:  # what nobody may see is poison
        gone = torch.repeat_interleave(hidden[at : at + len(block.lengths)], torch.tensor(block.lengths))
        block.keys[:, : len(gone)][:, gone] = 1e4
        at += len(block.lengths)
    found = route_and_check(
        run, blocks, questions(2, 3), visible=visible[0] if one_mask else visible, top_k=3
    )
    for row, numbers in zip(visible, found.numbers, strict=True):
        assert set(numbers.tolist()) <= {-1, *row.nonzero().flatten().tolist()}


def test_ties_go_to_the_lower_number_wherever_it_lies(run: Run) -> None:
    keys = ops.normalize_heads(draw(1, 1, 2, 16)).expand(2, 9, 2, 16).contiguous()
    blocks = [
        routing.KeyBlock(keys, [1, 2, 1], np.array([50, 7, 30])),
        routing.KeyBlock(keys.clone(), [3, 1], np.array([6, 2**31 - 1])),
    ]
    found = run(routing.route_questions, routing.plan_routing(blocks), 0, questions(2), top_k=5, scale=1.0)
    assert found.numbers.tolist() == [[6, 7, 30, 50, 2**31 - 1]]
    assert found.best.unique().numel() == 1


def test_routing_agrees_with_the_bank(run: Run) -> None:
    """The kernel over a bank's own blocks chooses what the bank chooses, after removals too."""
    msa = MSAConfig(router_layers=(3, 5), top_k=4)
    bank = MemoryBank(msa, fetch=lambda number: pytest.fail(f"{number} was fetched"))
    for number, chunks in enumerate([3, 1, 40, 2, 7, 1, 1, 90, 4, 2] * 2):
        bank.add(number, ops.normalize_heads(draw(2, chunks, 2, 16, seed=number)))
    bank.remove([4, 15])
    view = bank.view(np.array([0, 1, 2, 7, 9, 10, 11, 13, 17, 19]))
    blocks = [routing.KeyBlock(b.keys, b.lengths.tolist(), b.numbers) for b in view._blocks]
    [query] = questions(6)
    found = run(
        routing.route_questions,
        routing.plan_routing(blocks),
        1,
        [query],
        top_k=msa.top_k,
        scale=msa.score_scale(16),
        visible=torch.from_numpy(view.visible),
    )
    scores = view.score(1, query)
    assert found.numbers[0].tolist() == list(view.select(scores, msa.top_k).numbers)
    np.testing.assert_allclose(found.scores[0].numpy(), scores, atol=2e-6)


def test_the_bank_and_the_torch_functions_hand_over_to_the_kernels(interpreter: ProcessPoolExecutor) -> None:
    """Where Triton interprets kernels they are used, so the engine's own calls reach them without a GPU."""
    msa = MSAConfig(router_layers=(1, 2), top_k=3)
    states: dict[int, PassageStates] = {}
    plain, device = MemoryBank(msa, int), DeviceBank(msa, states.__getitem__, device="cpu")
    for number, chunks in enumerate([3, 1, 5, 2]):
        keys = ops.normalize_heads(draw(2, chunks, 2, 16, seed=number))
        states[number] = PassageStates(keys.transpose(1, 2), keys.transpose(1, 2), keys)
        plain.add(number, keys), device.add(number, keys)
    shown, [query] = np.array([0, 2, 3]), questions(4)
    routing_there = SharedRouting([device.view(shown), device.view(shown[:0])], [3, 3])
    found = interpreter.submit(routing_there, 1, [query, query]).result()
    np.testing.assert_allclose(found.scores[0], plain.view(shown).score(1, query), atol=2e-6)
    assert found.numbers[1].tolist() == [-1, -1, -1]

    packed = draw(30, 4, 16), draw(30, 2, 16, seed=1), draw(30, 2, 16, seed=2)
    arguments = (*packed, [10, 20], 0.3)
    found = interpreter.submit(ops.attend_documents, *arguments).result()
    close(found, ops.attend_documents(*arguments), TOLERANCES[F32])
    # A head width that no kernel knows stays with torch.
    narrow = (*(x[..., :12].contiguous() for x in packed), [10, 20], 0.3)
    found = interpreter.submit(ops.attend_documents, *narrow).result()
    close(found, ops.attend_documents(*narrow), TOLERANCES[F32])


def test_a_plan_cuts_the_work_at_passages_and_loses_none() -> None:
    lengths = [int(n) for n in torch.randint(1, 400, (300,), generator=torch.Generator().manual_seed(0))]
    plan = routing.plan_routing(key_blocks(lengths[:100], lengths[100:], spare=0))
    first, chunks, passage, passages = plan.sizes.long().unbind(1)
    assert len(first) > 20
    assert torch.equal(first, torch.cat((torch.zeros(1, dtype=torch.long), chunks.cumsum(0)[:-1])))
    assert torch.equal(passage, torch.cat((torch.zeros(1, dtype=torch.long), passages.cumsum(0)[:-1])))
    assert (chunks.sum(), passages.sum()) == (sum(lengths), 300)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    assert set(first.tolist()) <= set(starts.tolist())


def test_quantised_keys_are_near_and_zeros_stay() -> None:
    keys = draw(2, 5, 2, 16)
    keys[:, 3] = 0
    for dtype in (I8, F8):
        quantised, scales = routing.quantize_keys(keys, dtype)
        assert quantised.dtype == dtype
        step = scales[..., None, None]
        # Half a step; of a float8 with three bits of mantissa that is a sixteenth of the number at most.
        allowed = step * 0.5001 if dtype == I8 else torch.maximum(keys.abs() / 16, step * 2**-10)
        assert ((quantised.float() * step - keys).abs() <= allowed).all()
        assert torch.equal(quantised[:, 3].float(), keys[:, 3])


# Decode attention


def context(
    heads_first: int,
    counts: list[int],
    own: list[int],
    *,
    groups: int = 2,
    dim: int = 16,
    dtype: torch.dtype = F32,
) -> decoding.Context:
    """Rows and own tokens beyond the stated numbers are NaN, and nobody may read them."""
    sequences = len(counts)
    memory = draw(2, 60, groups, dim, seed=1, dtype=dtype)
    memory[:, 50:] = torch.nan
    rows = torch.randint(0, 50, (sequences, max([*counts, 1])), generator=torch.Generator().manual_seed(2))
    caches = draw(2, sequences, groups, max([*own, 1]), dim, seed=3, dtype=dtype)
    for index in range(sequences):
        rows[index, counts[index] :] = 55
        caches[:, index, :, own[index] :] = torch.nan
    head = draw(2, groups, heads_first, dim, seed=4, dtype=dtype)
    lengths = [torch.tensor(numbers, dtype=torch.int32) for numbers in (counts, own)]
    return decoding.Context(*head, *memory, rows.int(), lengths[0], *caches, lengths[1])


@pytest.mark.parametrize(
    ("head", "counts", "own", "heads", "groups", "dim", "dtype"),
    [
        pytest.param(3, [70, 0, 33], [50, 1, 7], 4, 2, 16, F32, id="ragged"),
        pytest.param(3, [70, 0], [50, 1], 6, 2, 16, BF16, id="bfloat16, three heads a group"),
        pytest.param(3, [70], [5], 4, 2, 16, F16, id="float16"),
        pytest.param(0, [0], [1], 2, 2, 32, F32, id="one key, no grouping"),
        pytest.param(200, [0], [1], 4, 2, 16, F32, id="a long head, nothing chosen"),
        pytest.param(3, [300], [1], 4, 1, 16, F32, id="a long memory, one group"),
        pytest.param(0, [0, 2], [0, 0], 4, 2, 16, F32, id="no key at all"),
        pytest.param(3, [], [], 4, 2, 16, F32, id="no sequence"),
    ],
)
def test_attend_decode(
    run: Run,
    head: int,
    counts: list[int],
    own: list[int],
    heads: int,
    groups: int,
    dim: int,
    dtype: torch.dtype,
) -> None:
    held = context(head, counts, own, groups=groups, dim=dim, dtype=dtype)
    query = draw(len(counts), heads, dim, seed=9, dtype=dtype)
    found = run(decoding.attend_decode, query, held, 0.3)
    close(found, decoding.attend_decode_reference(query, held, 0.3), TOLERANCES[dtype])


def test_large_logits_stay_finite(run: Run) -> None:
    held = context(3, [40], [20])
    query = draw(1, 4, 16) * 1e4
    close(
        run(decoding.attend_decode, query, held, 1.0),
        decoding.attend_decode_reference(query, held, 1.0),
        1e-5,
    )


# Attention inside documents


@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "dim", "dtype"),
    [
        pytest.param([1], 2, 1, 16, F32, id="one token"),
        pytest.param([17, 1, 33], 3, 1, 16, F32, id="ragged"),
        pytest.param([130, 20], 2, 2, 16, BF16, id="bfloat16"),
        pytest.param([40], 2, 1, 32, F16, id="float16"),
        pytest.param([300], 1, 1, 16, F16, id="a long passage"),
        pytest.param([], 2, 1, 16, F32, id="no document"),
    ],
)
def test_attend_documents(
    run: Run, lengths: list[int], heads: int, groups: int, dim: int, dtype: torch.dtype
) -> None:
    tokens = sum(lengths)
    query = draw(tokens, heads, dim, dtype=dtype)
    packed = draw(tokens, 2, groups, dim, seed=1, dtype=dtype)
    keys, values = packed.unbind(1)
    found = run(documents.attend_documents, query, keys, values, lengths, 0.3)
    expected = ops.attend_documents(query, keys, values, lengths, 0.3) if lengths else query
    close(found, expected, TOLERANCES[dtype])


def test_a_document_is_attended_alike_in_any_batch(run: Run) -> None:
    query, keys = draw(70, 2, 16, dtype=BF16), draw(70, 1, 16, seed=1, dtype=BF16)
    together = run(documents.attend_documents, query, keys, keys, [30, 40], 0.3)
    alone = run(documents.attend_documents, query[30:], keys[30:], keys[30:], [40], 0.3)
    assert torch.equal(together[30:], alone)


# What is refused


def test_the_kernels_are_for_cuda_devices_and_known_head_widths() -> None:
    assert not kernels.usable(torch.ones(3), 64)
    pool = [pooling.chunk_table([3], 2, "cpu")] * 2
    with pytest.raises(EngineError, match="CUDA"):
        pooling.pool_states(*[draw(3, 2, 16)] * 3, *pool)
    with pytest.raises(EngineError, match="power of two from 16 to 256, not 24"):
        pooling.pool_states(*[draw(3, 2, 24)] * 3, *pool)
    with pytest.raises(EngineError, match="not 24"):
        documents.attend_documents(*[draw(3, 2, 24)] * 3, [3], 1.0)
    with pytest.raises(EngineError, match="not 8"):
        decoding.attend_decode(draw(1, 2, 8), context(1, [1], [1], dim=8), 1.0)
    with pytest.raises(EngineError, match="not 24"):
        routing.plan_routing([routing.KeyBlock(draw(1, 4, 2, 24), [4], np.array([0]))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"lengths": [2, 0]}, "at least 1", id="a passage without chunks"),
        pytest.param({"lengths": [20, 1]}, "do not fit", id="more rows than there are"),
        pytest.param({"numbers": np.array([1])}, "do not fit", id="a number missing"),
        pytest.param({"numbers": np.array([1, 2**31])}, "2147483648", id="a number too large"),
        pytest.param({"keys": draw(1, 8, 4, 16)[:, :, ::2]}, "packed rows", id="keys with gaps"),
        pytest.param({"keys": torch.zeros(1, 8, 2, 16, dtype=I8)}, "scales", id="int8 without scales"),
        pytest.param({"scales": torch.ones(1, 8)}, "scales", id="floats with scales"),
    ],
)
def test_blocks_that_cannot_be_routed_over_are_refused(change: dict[str, Any], message: str) -> None:
    block = routing.KeyBlock(draw(1, 8, 2, 16), [2, 1], np.array([0, 1]))
    with pytest.raises(EngineError, match=message):
        routing.plan_routing([replace(block, **change)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"queries": []}, "at least one", id="no question"),
        pytest.param({"queries": [torch.ones(0, 4, 16)]}, "at least one token", id="no token"),
        pytest.param({"queries": [torch.ones(2, 3, 16)]}, "multiple of 2 heads", id="heads"),
        pytest.param({"top_k": 0}, "top_k is 0", id="top_k of none"),
        pytest.param({"top_k": 5000}, "1 to 1024", id="top_k too large"),
        pytest.param({"visible": torch.ones(3, dtype=torch.bool)}, "expected bool", id="mask"),
        pytest.param({"chunk_reduce": "last"}, "'last' over chunks", id="reduction"),
        pytest.param({"slot": 2}, "slot 2 is none of the 2", id="layer"),
    ],
)
def test_questions_that_do_not_fit_are_refused(run: Run, change: dict[str, Any], message: str) -> None:
    given = {"queries": questions(2), "slot": 0, "top_k": 2, "scale": 1.0, **change}
    with pytest.raises(EngineError, match=message):
        run(routing.route_questions, routing.plan_routing(key_blocks([2, 1])), **given)


# The benchmark


@pytest.mark.slow
def test_the_benchmark_runs_where_kernels_are_interpreted() -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_kernels.py"
    command = [sys.executable, "-P", script, "--device", "cpu", "--tiny", "--tune"]
    environment = {**os.environ, "PYTHONPATH": str(script.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for part in (
        "pooling",
        "decode",
        "documents",
        "gathering",
        "routing_bf16",
        "routing_int8",
        "reference_routing",
    ):
        assert told[part], part
    assert told["machine"]["torch"] == torch.__version__
