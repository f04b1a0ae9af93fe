"""A bank whose passages lie in sheets chooses, scores and forgets as one that holds their keys."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msa_memory.engine import bank as bank_module
from msa_memory.engine import bank_view as view_module
from msa_memory.engine import exact_keys as keys_module
from msa_memory.engine import ops
from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.bank_view import BankView
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.lexical import passage_terms, question_terms
from msa_memory.engine.quantized import usable
from msa_memory.engine.sheets import RamPages, Sheet, make_sections
from msa_memory.engine.states import PassageStates
from msa_memory.errors import NotFoundError, StateDamagedError

LAYERS, HEADS, GROUPS, DIM = 3, 6, 2, 32
SHAPE = LAYERS, GROUPS, DIM
WORDS = "anna bob cello dover fog the".split()
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31 - 1)
pytestmark = pytest.mark.skipif(not usable(), reason="this CPU has no lossless products of 8-bit integers")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(bank_module, "BLOCK_CHUNKS", 64)
    monkeypatch.setattr(view_module, "LEAST_SETTLED", 1)
    monkeypatch.setattr(view_module, "SETTLED", 8)
    yield
    torch.set_num_threads(threads)


class World:
    """Passages, a bank that has most of them in sheets, and one that holds their keys."""

    def __init__(self, seed: int, count: int = 90) -> None:
        random = torch.Generator().manual_seed(seed)
        self.states: dict[int, PassageStates] = {}
        self.damaged: set[int] = set()
        self.fetched: list[int] = []
        for number in range(count):
            length = int(torch.randint(1, 10, (), generator=random))
            rows = torch.randn(LAYERS, length, GROUPS, DIM, generator=random)
            words = " ".join(WORDS[int(torch.randint(6, (), generator=random))] for _ in range(length))
            none = torch.zeros(LAYERS, GROUPS, 1, DIM)
            keys = ops.normalize_heads(rows).bfloat16()
            self.states[number] = PassageStates(none, none, keys, passage_terms(words))
        self.msa = MSAConfig(router_layers=tuple(range(LAYERS)), top_k=4)
        self.pages: list[RamPages] = []
        self.bank, self.exact = self._bank(), self._bank(exact=True)
        for number, states in self.states.items():
            self.exact.add(number, states.router_keys, states.terms)
        self.bank.add(0, self.states[0].router_keys, self.states[0].terms)  # it moves to its sheet
        for start in range(0, count - 30, 30):
            self.shelve(range(start, start + 30))
        for number in range(count - 30, count):
            self.bank.add(number, self.states[number].router_keys, self.states[number].terms)

    def _bank(self, **options: Any) -> MemoryBank:
        return MemoryBank(self.msa, self.fetch, **options)

    def fetch(self, number: int) -> PassageStates:
        self.fetched.append(number)
        if number in self.damaged:
            raise StateDamagedError(f"the states of passage {number} are damaged")
        if number not in self.states:
            raise NotFoundError(f"passage {number} was forgotten")
        return self.states[number]

    def shelve(self, numbers: Any) -> None:
        held = [(n, self.states[n].router_keys, self.states[n].terms) for n in numbers]
        self.pages.append(RamPages(make_sections(held)))
        self.bank.add_sheet(self.pages[-1], SHAPE)

    def forget(self, numbers: set[int]) -> None:
        self.bank.remove(numbers)
        self.exact.remove(numbers)
        for number in numbers:
            self.states.pop(number, None)


def some_queries(seed: int, tokens: int = 7) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed + 1)
    return list(ops.normalize_heads(torch.randn(LAYERS, tokens, HEADS, DIM, generator=random)))


def by_number(view: BankView, scores: Any) -> dict[int, float]:
    return dict(zip(view.numbers[view.visible].tolist(), scores[view.visible].tolist(), strict=True))


def agree(view: BankView, exact: BankView, queries: list[Tensor], k: int) -> None:
    """The same choice with the same scores, bit for bit, on every layer, in the mean and by words."""
    scores = [view.score(slot, query, best=k) for slot, query in enumerate(queries)]
    for slot, query in enumerate(queries):
        assert view.select(scores[slot], k) == exact.select(exact.score(slot, query), k)
        assert by_number(view, view.score(slot, query)) == by_number(exact, exact.score(slot, query))
    sharp = np.stack([exact.score(slot, query) for slot, query in enumerate(queries)])
    settled = view.settle(np.stack(scores), queries).mean(0)
    assert view.select(settled, min(k, 3)) == exact.select(sharp.mean(0), min(k, 3))
    terms = question_terms("the anna fog")
    assert by_number(view, view.score_words(terms)) == by_number(exact, exact.score_words(terms))


@few
@given(seed=seeds, k=st.integers(1, 8), tokens=st.integers(1, 30))
def test_it_chooses_what_exact_keys_choose(seed: int, k: int, tokens: int) -> None:
    world = World(seed)
    assert len(world.bank) == len(world.exact) == 90
    assert world.bank.numbers == world.exact.numbers
    assert sorted(world.bank.loose_numbers) == list(range(60, 90)), "the others lie in sheets"
    agree(world.bank.view(), world.exact.view(), some_queries(seed, tokens), k)


@few
@given(seed=seeds, data=st.data())
def test_masks_and_removals_hold(seed: int, data: st.DataObject) -> None:
    """A sheet in memory goes with the first of its passages; the caller brings the others anew."""
    world, queries = World(seed), some_queries(seed)
    numbers = st.sets(st.integers(0, 99), max_size=8)
    gone, hidden, masked = data.draw(numbers), data.draw(numbers), data.draw(numbers)
    before, same = world.bank.view(), world.exact.view()
    world.forget(gone)
    visible = np.array(sorted(set(range(90)) - hidden), dtype=np.int64)
    for once_more in (False, True):
        view, exact = world.bank.view(visible), world.exact.view(visible)
        assert set(view.numbers[view.visible].tolist()) == set(visible.tolist()) - gone
        agree(view, exact, queries, 5)
        agree(view.without(masked), exact.without(masked), queries, 5)
        if not once_more:
            left, damaged = world.bank.take_spoiled()
            assert damaged == []
            assert set(left) == {
                n for n in range(60) if n not in gone and {n // 30} & {g // 30 for g in gone}
            }
            for number in left:
                world.bank.add(number, world.states[number].router_keys, world.states[number].terms)
            assert world.bank.take_spoiled() == ([], [])
    assert not any(number in world.bank for number in gone)
    agree(before.without(gone), same.without(gone), queries, 5)


@few
@given(seed=seeds)
def test_many_are_settled_when_many_are_asked_for(seed: int) -> None:
    world, queries = World(seed), some_queries(seed)
    view, exact = world.bank.view(), world.exact.view()
    rough = np.stack([view.score(slot, query, best=1) for slot, query in enumerate(queries)])
    sharp = np.stack([exact.score(slot, query) for slot, query in enumerate(queries)])
    bonus = np.random.default_rng(seed).random(90, dtype=np.float32)
    for count in (0, 8, 33, 90, 200):
        settled = view.settle(rough, queries, bonus, count)
        best = np.argsort(-(settled.mean(0) + bonus))[: max(count, 8)]
        assert (settled[:, best] == sharp[:, best]).all()
    assert (rough != sharp).any()


def test_a_passage_whose_states_are_damaged_is_named_and_never_chosen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world, queries = World(3), some_queries(3)
    exact = world.exact.view()
    best = exact.select(exact.score(0, queries[0]), 3).numbers
    inside = next(number for number in best if number < 60)
    world.damaged.add(inside)
    view, other = world.bank.view(), exact.without([inside])
    agree(view, other, queries, 5)
    assert len(view) == 89
    assert f"passage {inside} are damaged" in caplog.text
    world.damaged.clear()
    agree(world.bank.view(), exact, queries, 5)


@pytest.mark.parametrize("broken", ["layer-0", "terms"])
def test_a_sheet_with_a_damaged_section_is_read_passage_by_passage(broken: str) -> None:
    world, queries = World(4), some_queries(4)
    del world.pages[0]._sections[broken]
    agree(world.bank.view(), world.exact.view(), queries, 5)
    assert set(range(30)) <= set(world.fetched)
    assert world.bank.take_spoiled() == ([], list(range(30)))


def test_a_sheet_erased_while_it_is_read_is_not_believed() -> None:
    world, queries = World(5), some_queries(5)
    view = world.bank.view()
    agree(view, world.exact.view(), queries, 5)  # every section was read once
    sections = world.pages[0]._sections
    world.pages[0].close()
    agree(view, world.exact.view(), queries, 5)
    assert world.bank.take_spoiled() == (list(range(30)), [])
    assert sections
    assert len(world.bank) == 60


def test_what_does_not_fit_is_refused() -> None:
    world = World(6)
    held = [(n, world.states[n].router_keys, world.states[n].terms) for n in range(60, 65)]
    sections = make_sections(held)
    with pytest.raises(StateDamagedError, match="4 layers of 2 heads of 32"):
        Sheet(RamPages(sections), (4, 2, 32))
    for name in ("shape", "passages"):
        with pytest.raises(StateDamagedError, match="no section"):
            Sheet(RamPages({key: data for key, data in sections.items() if key != name}), SHAPE)
    with pytest.raises(StateDamagedError, match="table"):
        Sheet(RamPages(sections | {"passages": sections["passages"][:-8]}), SHAPE)
    short = RamPages(sections | {"layer-1": sections["layer-1"][:-4]})
    before = len(world.bank)
    world.bank.add_sheet(short, SHAPE)
    assert len(world.bank) == before, "what is found out later is read passage by passage"
    agree(world.bank.view(), world.exact.view(), some_queries(6), 5)


def test_exact_keys_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    world, queries = World(7), some_queries(7)
    monkeypatch.setattr(keys_module, "EXACT_BYTES", 10 * world.states[1].router_keys.nbytes)
    agree(world.bank.view(), world.exact.view(), queries, 5)
    held = world.bank._exact_keys
    assert 0 < held.nbytes == sum(keys.nbytes for keys in held._held.values()) <= keys_module.EXACT_BYTES
    resident = sum(block.keys.nbytes for block in world.bank._blocks)
    assert world.bank.nbytes() >= resident + held.nbytes + sum(pages.nbytes() for pages in world.pages)
    gone = next(iter(held._held))
    world.bank.remove([gone])
    assert gone not in held._held
    world.bank.remove(range(90))
    assert held.nbytes == 0 == len(held._held)
    assert world.bank.nbytes() == len(world.bank) == 0


def test_a_skim_over_sheets_finds_what_lies_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "SKIM_CUTS", (20, 20))
    world, queries = World(8), some_queries(8)
    view, exact = world.bank.view(), world.exact.view()
    found = view.skim(queries)
    sharp = np.stack([exact.score(slot, query) for slot, query in enumerate(queries)])
    kept = found.mean(0) > -1
    assert view_module.SETTLED <= kept.sum() < 40
    assert (found[:, kept] == sharp[:, kept]).all()
    view.skims = True
    assert (view.settle(found, queries, 0.0, 90) == sharp).all()
