"""The bank with 8-bit keys chooses what its exact keys choose, whatever is masked, added or removed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msa_memory.engine import bank as bank_module
from msa_memory.engine import bank_view as view_module
from msa_memory.engine import ops
from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.bank_view import BankView
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.quantized import QuantizedKeys, QuantizedQuery, usable
from msa_memory.testing import open_memory

COLOURS = ("red", "blue", "green")
LAYERS, HEADS, GROUPS, DIM, BLOCK = 2, 6, 2, 32, 128
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31 - 1)
needs_integers = pytest.mark.skipif(
    not usable(), reason="this CPU has no lossless products of 8-bit integers"
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks and numbers of settled passages small enough that most passages lie beyond both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(bank_module, "BLOCK_CHUNKS", BLOCK)
    monkeypatch.setattr(view_module, "LEAST_SETTLED", 1)
    monkeypatch.setattr(view_module, "SETTLED", 8)
    yield
    torch.set_num_threads(threads)


def some_keys(seed: int, count: int = 150, dtype: torch.dtype = torch.bfloat16) -> dict[int, Tensor]:
    """Passages of 1 to 9 chunks, a fifth of them copies of another, so that there are ties."""
    random = torch.Generator().manual_seed(seed)
    keys: dict[int, Tensor] = {}
    for number in range(count):
        if number % 5 == 4:
            keys[number] = keys[number - 3].clone()
        else:
            length = int(torch.randint(1, 10, (), generator=random))
            rows = torch.randn(LAYERS, length, GROUPS, DIM, generator=random)
            keys[number] = ops.normalize_heads(rows).to(dtype)
    return keys


def some_query(seed: int, tokens: int) -> Tensor:
    random = torch.Generator().manual_seed(seed + 1)
    return ops.normalize_heads(torch.randn(tokens, HEADS, DIM, generator=random))


def bank_of(keys: dict[int, Tensor], exact: bool = False, **options: Any) -> MemoryBank:
    msa = MSAConfig(router_layers=tuple(range(LAYERS)), **options)
    bank = MemoryBank(msa, lambda number: pytest.fail(f"passage {number} was fetched"), exact=exact)
    for number, rows in keys.items():
        bank.add(number, rows)
    bank.quantize()
    return bank


def plain_scores(bank: MemoryBank, keys: dict[int, Tensor], slot: int, query: Tensor) -> dict[int, float]:
    """Every head of every token against every chunk, in float64, straight from the definition."""
    msa, scores = bank.msa, {}
    for number, rows in keys.items():
        expanded = rows[slot].double().repeat_interleave(HEADS // GROUPS, dim=1)  # [C, H, D]
        products = torch.einsum("thd,chd->htc", query.double(), expanded).mean(0)
        tokens = {"max": products.amax(0), "mean": products.mean(0), "last": products[-1]}[msa.query_reduce]
        passage = tokens.amax() if msa.chunk_reduce == "max" else tokens.mean()
        scores[number] = float(passage) * msa.score_scale(DIM)
    return scores


def agree(view: BankView, exact: BankView, slot: int, query: Tensor, k: int) -> None:
    """The same choice with the same scores, bit for bit."""
    found = view.select(view.score(slot, query, best=k), k)
    assert found == exact.select(exact.score(slot, query), k)


MODES: Sequence[dict[str, Any]] = (
    {},
    {"query_reduce": "mean", "chunk_reduce": "mean"},
    {"query_reduce": "last", "decouple_router": False},
)


@needs_integers
class TestQuantized:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("mode", range(len(MODES)))
    @few
    @given(seed=seeds, tokens=st.integers(1, 40), k=st.integers(1, 12))
    def test_it_chooses_what_exact_scores_choose(
        self, mode: int, dtype: torch.dtype, seed: int, tokens: int, k: int
    ) -> None:
        keys, query = some_keys(seed, dtype=dtype), some_query(seed, tokens)
        bank = bank_of(keys, **MODES[mode])
        assert sum(len(block.quantized) for block in bank._blocks) >= 2 * LAYERS
        for block in bank._blocks:  # making copies leaves the keys alone
            rows = torch.cat([keys[number] for number in block.numbers], 1)
            assert torch.equal(block.keys[:, : block.used], rows)
        exact = bank_of(keys, exact=True, **MODES[mode]).view()
        for slot in range(LAYERS):
            agree(bank.view(), exact, slot, query, k)
            scores = exact.score(slot, query)
            expected = plain_scores(bank, keys, slot, query)
            np.testing.assert_allclose(scores, [expected[n] for n in exact.numbers.tolist()], atol=2e-6)

    @few
    @given(seed=seeds, data=st.data())
    def test_masks_and_removals_hold(self, seed: int, data: st.DataObject) -> None:
        keys, query = some_keys(seed), some_query(seed, 7)
        numbers = st.sets(st.sampled_from(sorted(keys)))
        gone, hidden, masked = data.draw(numbers), data.draw(numbers), data.draw(numbers)
        bank = bank_of(keys)
        bank.remove(gone)
        left = {number: rows for number, rows in keys.items() if number not in gone}
        visible = np.array(sorted(set(keys) - hidden), dtype=np.int64)
        view, exact = bank.view(visible), bank_of(left, exact=True).view(visible)
        assert not set(view.numbers[view.visible].tolist()) & (gone | hidden)
        for one, other in ((view, exact), (view.without(masked), exact.without(masked))):
            agree(one, other, 1, query, 5)
            scores = one.score(1, query, best=5)
            assert np.isneginf(scores[~one.visible]).all()
            assert np.isfinite(scores[one.visible]).all()

    def test_scores_of_the_others_are_near(self) -> None:
        keys, query = some_keys(3), some_query(3, 24)
        found = bank_of(keys).view().score(0, query, best=1)
        exact = bank_of(keys, exact=True).view().score(0, query)
        packed = QuantizedKeys.of(torch.cat(list(keys.values()), 1)[0])
        error = packed.error(QuantizedQuery.of(query, GROUPS, "max"))
        assert 0 < np.abs(found - exact).max() < error < 0.02
        assert (found != exact).mean() > 0.5, "most are not settled"

    def test_the_most_relevant_are_settled_on_all_layers(self) -> None:
        keys = some_keys(4)
        queries = [some_query(seed, 9) for seed in range(LAYERS)]
        view, exact = bank_of(keys).view(), bank_of(keys, exact=True).view()
        bonus = np.random.default_rng(4).random(len(keys), dtype=np.float32)
        rough = np.stack([view.score(slot, query, best=1) for slot, query in enumerate(queries)])
        sharp = np.stack([exact.score(slot, query) for slot, query in enumerate(queries)])
        settled = view.settle(rough, queries, bonus)
        best = np.argsort(-(sharp.mean(0) + bonus))[:8]
        assert (settled[:, best] == sharp[:, best]).all()
        assert (rough[:, best] != sharp[:, best]).any()
        assert (exact.settle(sharp, queries, bonus) == sharp).all()

    def test_a_question_waits_for_one_copy_and_chooses_the_same_before_and_after(self) -> None:
        keys, query = some_keys(5), some_query(5, 9)
        bank = bank_of({})
        for number, rows in keys.items():
            bank.add(number, rows)
        exact, counts = bank_of(keys, exact=True).view(), []
        for _ in range(len(bank._blocks) + 2):
            agree(bank.view(), exact, 0, query, 5)
            counts.append(sum(0 in block.quantized for block in bank._blocks))
        full = len(bank._blocks) - 1
        assert counts == [min(asked + 1, full) for asked in range(len(counts))]

    def test_a_removed_passage_leaves_no_copy(self) -> None:
        keys, query = some_keys(6), some_query(6, 9)
        bank = bank_of(keys)
        before = bank.nbytes()
        view = bank.view()
        expected = view.score(0, query, best=5)
        home = bank._home[0]
        bank.remove([0])
        assert not home.quantized
        assert bank.nbytes() < before
        assert (view.score(0, query, best=5) == expected).all(), "a snapshot stays as it was"
        bank.quantize()
        rows = {number: keys[number] for number in home.numbers}
        fresh = torch.zeros(LAYERS, BLOCK, GROUPS, DIM, dtype=torch.bfloat16)
        torch.cat(list(rows.values()), 1, out=(kept := torch.empty(0, dtype=torch.bfloat16)))
        fresh[:, : kept.shape[1]] = kept
        for slot, copy in home.quantized.items():
            other = QuantizedKeys.of(fresh[slot])
            assert torch.equal(copy.levels.to_dense(), other.pack().levels.to_dense())
            assert torch.equal(copy.scales, other.scales)

    def test_a_block_that_takes_passages_again_has_no_copy_without_them(self) -> None:
        keys, query = some_keys(10), some_query(10, 9)
        bank = bank_of(keys)
        first = bank._blocks[0]
        bank.remove(set(keys) - set(first.numbers))
        assert first.quantized
        assert first.used < BLOCK, "there is room for one chunk more"
        left = {number: keys[number] for number in first.numbers}
        near = ops.fold_queries(query[:1], GROUPS).view(1, 1, GROUPS, DIM).expand(LAYERS, -1, -1, -1)
        left[200] = ops.normalize_heads(near).bfloat16()
        left |= {300 + number: rows for number, rows in some_keys(11, 60).items()}
        for number in list(left)[len(first.numbers) :]:
            bank.add(number, left[number])
        bank.quantize()
        assert 200 in first.numbers
        assert first.quantized
        agree(bank.view(), bank_of(left, exact=True).view(), 0, query, 5)

    def test_an_exact_bank_has_no_copies(self) -> None:
        bank = bank_of(some_keys(7), exact=True)
        view, query = bank.view(), some_query(7, 9)
        assert (view.score(0, query, best=3) == view.score(0, query)).all()
        assert not any(block.quantized for block in bank._blocks)

    def test_no_head_maximum_is_taken_of_copies(self) -> None:
        keys, query = some_keys(8), some_query(8, 9)
        bank = bank_of(keys, head_reduce="max")
        assert (bank.view().score(0, query, best=3) == bank.view().score(0, query)).all()
        assert not any(block.quantized for block in bank._blocks)


class TestExact:
    @few
    @given(seed=seeds, tokens=st.integers(1, 40))
    def test_a_score_is_the_same_alone_and_among_others(self, seed: int, tokens: int) -> None:
        """Bit for bit, in whatever tile and block it lies."""
        keys, query = some_keys(seed, 60), some_query(seed, tokens)
        scores = bank_of(keys, exact=True).view().score(0, query)
        for number in (0, 7, 31, 59):
            alone = bank_of({number: keys[number]}, exact=True).view()
            assert alone.score(0, query)[0] == scores[number]

    def test_tiles_make_no_difference(self) -> None:
        query = some_query(9, 5)
        keys = torch.randn(1100, GROUPS, DIM, generator=torch.Generator().manual_seed(9))
        for options in (("mean", "max"), ("max", "mean"), ("mean", "last")):
            how = {"head_reduce": options[0], "query_reduce": options[1], "scale": 0.5}
            whole = ops.score_chunks(query, keys, **how)  # type: ignore[arg-type]
            tiles = ops.score_tiles(query, keys.split(512), 512, **how)  # type: ignore[arg-type]
            torch.testing.assert_close(tiles, whole, atol=2e-6, rtol=0)


@needs_integers
class TestSkim:
    @few
    @given(seed=seeds, data=st.data())
    def test_what_it_keeps_has_exact_scores_and_comes_first(self, seed: int, data: st.DataObject) -> None:
        keys, queries = some_keys(seed), [some_query(seed + slot, 9) for slot in range(LAYERS)]
        numbers = st.sets(st.sampled_from(sorted(keys)))
        gone, hidden = data.draw(numbers), data.draw(numbers)
        bank = bank_of(keys)
        bank.remove(gone)
        visible = np.array(sorted(set(keys) - hidden), dtype=np.int64)
        left = {number: rows for number, rows in keys.items() if number not in gone}
        view, exact = bank.view(visible), bank_of(left, exact=True).view(visible)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(view_module, "SKIM_CUTS", (20, 20))
            found = view.skim(queries)
        assert (np.isneginf(found) == ~view.visible).all()
        kept, rest = found.mean(0) > -1, view.visible & (found.mean(0) <= -1)
        assert kept.sum() >= min(view_module.SETTLED, len(view))
        assert kept.sum() < 40, "more than 20 by ties only"
        places = {number: place for place, number in enumerate(exact.numbers.tolist())}
        order = [places[number] for number in view.numbers[kept].tolist()]
        for slot, query in enumerate(queries):
            assert (found[slot, kept] == exact.score(slot, query)[order]).all()
        assert not rest.any() or found[:, rest].max() < -1

    @few
    @given(seed=seeds, best=st.integers(0, 40), weighted=st.booleans())
    def test_cut_by_cut_it_keeps_what_the_layers_so_far_prefer(
        self, seed: int, best: int, weighted: bool
    ) -> None:
        """Against a plain implementation, where the first pass is exact as well."""
        random, layers = np.random.default_rng(seed), 12
        weights = random.dirichlet(np.ones(layers)) if weighted else np.full(layers, 1 / layers)
        msa = MSAConfig(
            router_layers=tuple(range(layers)), layer_weights=tuple(weights.tolist()) if weighted else ()
        )
        bank = MemoryBank(msa, lambda number: pytest.fail(f"passage {number} was fetched"), exact=True)
        keys = torch.randn(layers, 200, GROUPS, DIM, generator=torch.Generator().manual_seed(seed))
        for number in range(100):
            bank.add(number, ops.normalize_heads(keys[:, 2 * number : 2 * number + 2]).bfloat16())
        view, queries = bank.view(), [some_query(seed + slot, 9) for slot in range(layers)]
        bonus = random.random(100).astype(np.float32) * 0.2
        sharp = np.stack([view.score(slot, query) for slot, query in enumerate(queries)])
        kept, seen = np.arange(100), []
        for slots, cut in zip(view.skim_order, (40, 20, 8), strict=True):
            seen += slots
            so_far = np.average(sharp[seen], axis=0, weights=weights[seen]) + bonus
            kept = kept[np.argsort(-so_far[kept])[: max(cut, best)]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(view_module, "SKIM_CUTS", (40, 20))
            found = view.skim(queries, bonus, best=best)
        assert set(np.flatnonzero((found > -1).all(0)).tolist()) == set(kept.tolist())
        assert (found[:, kept] == sharp[:, kept]).all()
        others = np.setdiff1d(np.arange(100), kept)
        first = list(view.skim_order[0])
        rough = np.average(sharp[first], axis=0, weights=weights[first]) - 2
        np.testing.assert_allclose(found[:, others], np.tile(rough[others], (layers, 1)), atol=1e-6)

    def test_layers_come_by_what_they_count(self) -> None:
        def order(count: int, *named: int, **options: Any) -> Any:
            bank = MemoryBank(MSAConfig(router_layers=tuple(range(count)), **options), lambda number: None)
            bank.skim_layers = named
            return bank.view().skim_order

        assert order(18) == ((3, 8, 13), (5, 10, 15), (0, 11, 16))
        assert order(15, layer_weights=tuple(slot / 105 for slot in range(15))) == (
            (12, 13, 14), (10, 11), (8, 9),
        )  # fmt: skip
        assert order(6, 5, 1, 4, 2) == ((1, 2, 4, 5), (), ())
        assert order(4) == ((3,), (), (0,))
        assert order(1) == ((0,), (), ())

    def test_it_finds_what_lies_near_a_question(self) -> None:
        keys, queries = some_keys(1, 600), [some_query(slot, 9) for slot in range(LAYERS)]
        planted = (13, 222, 511)
        for number in planted:
            for slot, query in enumerate(queries):
                near = ops.fold_queries(query[:1], GROUPS).view(GROUPS, DIM)
                keys[number][slot, 0] = ops.normalize_heads(near).bfloat16()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(view_module, "SKIM_CUTS", (20, 20))
            scores = bank_of(keys).view().skim(queries).mean(0)
        assert sorted(np.argsort(-scores)[:3].tolist()) == list(planted)

    def test_an_empty_view_has_nothing_to_skim(self) -> None:
        view = bank_of({}).view()
        assert view.skim([some_query(0, 3)] * LAYERS).shape == (LAYERS, 0)

    def test_the_engine_skims_when_told_to(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """End to end on the tiny model: the same documents with the same scores as without."""
        monkeypatch.setattr(bank_module, "SKIM_LEAST_LAYERS", 2)
        monkeypatch.setattr(bank_module, "SKIM_SHARES", (1, 1, 1))
        monkeypatch.setattr(view_module, "SKIM_CUTS", (9, 9))
        with open_memory(tmp_path / "m") as memory:
            memory.add_many([f"The {colour} bird number {n} sings." for n in range(9) for colour in COLOURS])
            plain = memory.search("Which blue bird sings?", k=5)
            skims: list[int] = []
            skim = BankView.skim

            def counted(view: BankView, *given: Any, **options: Any) -> Any:
                skims.append(len(view))
                return skim(view, *given, **options)

            monkeypatch.setattr(BankView, "skim", counted)
            memory._bank().bank.skim_from = 1
            assert memory.search("Which blue bird sings?", k=5) == plain
            assert skims == [27]
