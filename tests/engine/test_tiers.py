"""Pooled K/V in host memory and in mapped files, fetched by the kernel, by the host, and on a GPU."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msa_memory.engine.states import PassageStates
from msa_memory.engine.tiers import Chosen, StateTier, tier_bytes
from msa_memory.errors import EngineError, NotFoundError

LAYERS, GROUPS, DIM = 2, 2, 16


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process whose Triton interprets kernels."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"
    yield pool
    pool.shutdown()


def passage(number: int, chunks: int) -> PassageStates:
    random = torch.Generator().manual_seed(number)
    keys, values = torch.randn(2, LAYERS, GROUPS, chunks, DIM, generator=random)
    return PassageStates(keys, values, torch.zeros(LAYERS, 1, GROUPS, DIM))


def filled(lengths: dict[int, int], folder: Path | None = None, device: str = "cpu") -> StateTier:
    rows = sum(lengths.values())
    tier = StateTier(LAYERS, GROUPS, DIM, rows, dtype=torch.float32, device=device, folder=folder)
    for number, chunks in lengths.items():
        tier.add(number, passage(number, chunks))
    return tier


def check(chosen: Chosen, slot: int, numbers: list[list[int]], lengths: dict[int, int]) -> None:
    """Against each passage's own states, in the order they were chosen."""
    for row, wanted in enumerate(numbers):
        states = [passage(number, lengths[number]) for number in wanted if number in lengths]
        count = sum(one.chunks for one in states)
        assert int(chosen.counts[row]) == count
        for found, name in ((chosen.keys, "keys"), (chosen.values, "values")):
            expected = [getattr(one, name)[slot].transpose(0, 1) for one in states]
            whole = torch.cat(expected) if expected else torch.empty(0, GROUPS, DIM)
            assert torch.equal(found[row, :count].cpu(), whole)
            assert not found[row, count:].any()


def fetched(tier: StateTier, slot: int, numbers: Tensor) -> Chosen:
    return tier.fetch(slot, numbers).wait()


LENGTHS = {3: 5, 0: 1, 2000: 17, 7: 2, 8: 3}
CHOICES = [[2000, 3], [-1, -1], [7, -1], [0, 8], [1 << 20, 3]]


@pytest.mark.parametrize("mapped", [False, True], ids=["memory", "mapped"])
def test_the_chosen_passages_come_in_order(mapped: bool, tmp_path: Path) -> None:
    tier = filled(LENGTHS, tmp_path if mapped else None)
    check(fetched(tier, 1, torch.tensor(CHOICES)), 1, CHOICES, LENGTHS)
    found = tier.read(2000)
    assert torch.equal(found[0], passage(2000, 17).keys)
    assert torch.equal(found[1], passage(2000, 17).values)
    with pytest.raises(NotFoundError, match="no passage 6"):
        tier.read(6)
    assert tier.nbytes() == tier_bytes(sum(LENGTHS.values()), LAYERS, GROUPS, DIM, torch.float32)


def test_the_kernel_fetches_what_the_host_fetches(interpreter: ProcessPoolExecutor) -> None:
    tier = filled(LENGTHS)
    from msa_memory.engine.kernels.gathering import gather_chunks_reference

    numbers = torch.tensor(CHOICES)
    chosen = interpreter.submit(tier.fetch, 0, numbers).result().wait()
    check(chosen, 0, CHOICES, LENGTHS)
    keys, values = (pool[0] for pool in tier._pools)
    reference = gather_chunks_reference(keys, values, tier._table(), numbers, chosen.keys.shape[1])
    for found, expected in zip((chosen.keys, chosen.values, chosen.counts), reference, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mapped", [False, True], ids=["pinned", "mapped"])
def test_a_gpu_fetches_on_a_stream_of_its_own(mapped: bool, tmp_path: Path) -> None:
    tier = filled(LENGTHS, tmp_path if mapped else None, "cuda")
    numbers = torch.tensor(CHOICES, device="cuda")
    check(fetched(tier, 1, numbers), 1, CHOICES, LENGTHS)
    torch.cuda.synchronize()
    if not mapped:
        torch.cuda.set_sync_debug_mode("error")
        try:
            chosen = fetched(tier, 1, numbers)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check(chosen, 1, CHOICES, LENGTHS)


@settings(max_examples=30)
@given(
    st.dictionaries(st.integers(0, 40), st.integers(1, 9), min_size=1, max_size=12),
    st.data(),
)
def test_any_choice_of_any_passages(lengths: dict[int, int], data: st.DataObject) -> None:
    choice = st.lists(st.sampled_from(sorted(lengths)), unique=True, max_size=4)
    chosen = [[*one, *[-1] * (4 - len(one))] for one in data.draw(st.lists(choice, max_size=3))]
    numbers = torch.tensor(chosen, dtype=torch.int64).view(-1, 4)
    check(fetched(filled(lengths), 0, numbers), 0, chosen, lengths)


def test_what_is_removed_leaves_no_trace(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        tier = filled(LENGTHS, folder)
        tier.remove([2000, 3, 5000])
        check(fetched(tier, 0, torch.tensor([[7, 8]])), 0, [[7, 8]], LENGTHS)
        assert fetched(tier, 0, torch.tensor([[2000, 3]])).counts.tolist() == [0]
        gone = slice(0, LENGTHS[3])
        assert not any(pool[:, gone].any() for pool in tier._pools)
    assert not (tmp_path / "keys.bin").read_bytes()[: LENGTHS[3] * GROUPS * DIM * 4].strip(b"\0")


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), min_size=1, max_size=30), st.integers(1, 8))
def test_a_tier_that_makes_room_holds_everything(story: list[tuple[int, int]], rows: int) -> None:
    """Passages come (with so many chunks) and go (with none), in a tier that starts small."""
    tier = StateTier(LAYERS, GROUPS, DIM, rows, dtype=torch.float32, device="cpu")
    held: dict[int, int] = {}
    for number, chunks in story:
        tier.remove([number])
        held.pop(number, None)
        if chunks:
            tier.make_room(chunks)
            tier.add(number, passage(number, chunks))
            held[number] = chunks
        assert [tier.chunks(n) for n in range(13)] == [held.get(n, 0) for n in range(13)]
    wanted = [*held, *[-1] * (13 - len(held))]
    check(fetched(tier, 1, torch.tensor([wanted])), 1, [list(held)], held)


def test_files_do_not_grow(tmp_path: Path) -> None:
    tier = filled({1: 2}, tmp_path)
    tier.make_room(0)
    with pytest.raises(EngineError, match="mapped tier holds 2 of 2 chunks"):
        tier.make_room(1)


def test_a_full_tier_says_so_and_keeps_what_it_has() -> None:
    tier = filled({1: 2})
    with pytest.raises(EngineError, match="holds 2 of 2 chunks and cannot take 1"):
        tier.add(2, passage(2, 1))
    check(fetched(tier, 0, torch.tensor([[1]])), 0, [[1]], {1: 2})
