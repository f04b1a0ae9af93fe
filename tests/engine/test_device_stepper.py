"""Answers decoded in a device's slots are those of the plain way, whoever joins, leaves, or finds no room."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from msa_memory.engine import device_stepper
from msa_memory.engine.context import Feed, advance
from msa_memory.engine.device_stepper import DeviceStepper
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.generation import Generation, decode
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.engine.serving import Batch
from msa_memory.engine.states import PassageStates
from msa_memory.testing import open_memory, tiny_model

TEXTS = [
    f"Note {i}: the {thing} is in the {place}. " * (1 + 2 * i)
    for i, (thing, place) in enumerate(
        [("key", "drawer"), ("lamp", "hall"), ("boat", "harbour"), ("cat", "kitchen"), ("bell", "tower")]
    )
]
PROMPTS = ["Where is the key?", "Tell me of boats and bells, and of nothing else.", "cat", "hall lamp?" * 20]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class World:
    """A model and a bank of a few notes."""

    def __init__(self, device: str) -> None:
        self.engine: Engine = load_engine(tiny_model(), device=device)
        states: dict[int, PassageStates] = {}
        bank = self.engine.new_bank(states.__getitem__)
        for number, text in enumerate(TEXTS):
            states[number] = self.engine.encode(number, "", text)
            bank.add(number, states[number].router_keys, states[number].terms)
        self.view = bank.view()

    def generation(self, prompt: str, tokens: int, memory: bool = True) -> Generation:
        """Read to the end of its prompt, over the passages that it chose or over none."""
        engine, options = self.engine, SamplingOptions(max_new_tokens=tokens)
        if not memory:
            return engine.chat(engine.tokenizer.encode(prompt), options)
        routing = engine.route(prompt, self.view, top_k=3)
        return engine.read(self.view, routing.selections, engine.prompt.reading("", prompt), options)


@pytest.fixture(scope="module", params=DEVICES)
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


def together(jobs: Sequence[Iterator[Any]]) -> None:
    """Step by step in turn, as the worker thread does."""
    running = list(jobs)
    while running:
        running = [job for job in running if next(job, StopIteration) is not StopIteration]


def joining(batch: Batch, row: Generation, later: int) -> Iterator[str]:
    yield from [""] * later
    yield from batch.decode(row)


def same(row: Generation, single: Generation) -> None:
    """The same answer, and a sequence that may go on where the plain one stands."""
    assert (row.ids, row.text, row.finish_reason) == (single.ids, single.text, single.finish_reason)
    found, expected = row.sequence, single.sequence
    assert (found.position, found.fed_tokens) == (expected.position, expected.fed_tokens)
    for one, other in zip(found.cache.layers, expected.cache.layers, strict=True):
        assert (one.memory, one.length) == (other.memory, other.length)
        for mine, theirs in zip(one.view(), other.view(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0)


@settings(max_examples=10)
@given(
    asked=st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.integers(1, 7), st.booleans(), st.integers(0, 5)),
        min_size=1,
        max_size=5,
    ),
    sizes=st.sampled_from([(1,), (1, 2), (1, 4, 16)]),
    capacity=st.sampled_from([40, 64, 400]),
    memory_room=st.sampled_from([8, 64]),
)
def test_answers_equal_one_by_one(
    world: World,
    asked: list[tuple[str, int, bool, int]],
    sizes: tuple[int, ...],
    capacity: int,
    memory_room: int,
) -> None:
    """However many slots there are, and whether or not a sequence fits into one."""
    alone = [world.generation(prompt, tokens, memory) for prompt, tokens, memory, _ in asked]
    for one in alone:
        list(decode(world.engine.decoder, one))
    stepper = DeviceStepper(world.engine.decoder, sizes=sizes, capacity=capacity, memory_room=memory_room)
    batch = Batch(world.engine.decoder, stepper)
    rows = [world.generation(prompt, tokens, memory) for prompt, tokens, memory, _ in asked]
    together([joining(batch, row, later) for row, (_, _, _, later) in zip(rows, asked, strict=True)])
    for row, single in zip(rows, alone, strict=True):
        same(row, single)
    assert not any(stepper.taken)
    assert batch._waiting == []


def test_who_finds_no_slot_takes_the_next_one_that_is_free(world: World) -> None:
    stepper = DeviceStepper(world.engine.decoder, sizes=(1,), capacity=300)
    batch = Batch(world.engine.decoder, stepper)
    short, long = world.generation(PROMPTS[0], 3), world.generation(PROMPTS[1], 12)
    expected = world.generation(PROMPTS[1], 12)
    list(decode(world.engine.decoder, expected))
    first, second = batch.decode(short), batch.decode(long)
    next(first)
    together([first, second])
    same(long, expected)
    assert 0 < stepper.plain < 11


def test_a_sequence_that_outgrows_its_slot_goes_on_without(world: World) -> None:
    row, single = world.generation(PROMPTS[0], 9), world.generation(PROMPTS[0], 9)
    list(decode(world.engine.decoder, single))
    stepper = DeviceStepper(world.engine.decoder, capacity=row.sequence.cache.length + 3)
    list(Batch(world.engine.decoder, stepper).decode(row))
    same(row, single)
    assert stepper.plain == 8 - 3


def test_whoever_leaves_frees_the_slot(world: World) -> None:
    stepper = DeviceStepper(world.engine.decoder, sizes=(1,))
    batch = Batch(world.engine.decoder, stepper)
    leaving = batch.decode(world.generation(PROMPTS[1], 9))
    for _ in range(4):
        next(leaving)
    assert stepper.taken[0] is not None
    leaving.close()
    assert stepper.taken == [None]
    row, single = world.generation(PROMPTS[2], 5, False), world.generation(PROMPTS[2], 5, False)
    list(decode(world.engine.decoder, single))
    list(batch.decode(row))
    same(row, single)
    assert stepper.plain == 0


def test_a_step_that_fails_spoils_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails the plain way beside a slot: the pass is run again for each, and no token twice."""
    good, bad = world.generation(PROMPTS[0], 6), world.generation(PROMPTS[1], 6)
    expected = world.generation(PROMPTS[0], 6)
    list(decode(world.engine.decoder, expected))

    def failing(decoder: Any, feeds: Sequence[Feed]) -> Tensor:
        advance(decoder, feeds)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(device_stepper, "advance", failing)
    batch = Batch(world.engine.decoder, DeviceStepper(world.engine.decoder, sizes=(1,)))
    first, second = batch.decode(good), batch.decode(bad)
    next(first), next(second)
    next(first)  # runs the pass for both
    with pytest.raises(RuntimeError, match="out of memory"):
        list(second)
    list(first)
    same(good, expected)


def test_a_failed_step_leaves_the_slots_as_they_were(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = DeviceStepper(world.engine.decoder, sizes=(2,))
    row, single = world.generation(PROMPTS[0], 6), world.generation(PROMPTS[0], 6)
    list(decode(world.engine.decoder, single))
    batch = Batch(world.engine.decoder, stepper)
    answer = batch.decode(row)
    next(answer), next(answer)
    assert stepper._slots is not None
    rows, step = stepper._slots, stepper._slots.step

    def failing(ids: Tensor) -> Tensor:
        step(ids)
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(rows, "step", failing)
        stepper._replays.clear()
        with pytest.raises(RuntimeError, match="lost"):
            stepper.step([Feed(row.sequence, row.ids[-1:])])
        assert rows.lengths.tolist() == rows.held
    stepper._replays.clear()
    list(answer)
    same(row, single)


@pytest.mark.gpu
def test_a_memory_on_a_gpu_decodes_with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All questions of a round in one replay; nothing is fed token by token."""
    with open_memory(device="cuda") as memory:
        memory.add_many(TEXTS)
        alone = [memory.query(prompt, max_new_tokens=5).text for prompt in PROMPTS[:3]]
        together = [answer.text for answer in memory.query_many(PROMPTS[:3], max_new_tokens=5)]
        stepper = memory._engine().batch.stepper
        assert isinstance(stepper, DeviceStepper)
        assert stepper.plain == 0
        assert {1, 4} <= stepper._replays.keys()
        assert all(replay._graph is not None for replay in stepper._replays.values())
    with open_memory(device="cpu") as memory:
        memory.add_many(TEXTS)
        assert [memory.query(prompt, max_new_tokens=5).text for prompt in PROMPTS[:3]] == alone
    assert together == alone


def test_the_next_turn_goes_on_from_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context that was decoded in a slot is kept, and the turn after it reads only what is new."""
    told: list[list[Any]] = []
    for kernels in (True, False):
        monkeypatch.setattr(Engine, "uses_kernels", kernels)
        fed: list[int] = []
        with monkeypatch.context() as patch, open_memory() as memory:
            memory.add_many(TEXTS)
            patch.setattr("msa_memory.engine.serving.advance", _counting(fed))
            session = memory.session("turns")
            texts = [session.chat(prompt, max_new_tokens=6).text for prompt in PROMPTS[:3]]
            assert len(memory._shared.bank.contexts)
        told.append([texts, fed])
    assert told[0] == told[1]


def _counting(fed: list[int]) -> Callable[..., Tensor]:
    def counted(decoder: Any, feeds: Sequence[Feed]) -> Tensor:
        fed.extend(len(feed.ids) for feed in feeds if len(feed.ids) > 1)
        return advance(decoder, feeds)

    return counted
