"""What must hold for any input: independence of documents and rows, snapshots, exact operations.

Operations are compared with plain float64 versions written here from their definitions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msa_memory.engine import context as context_module
from msa_memory.engine import ops
from msa_memory.engine.bank import BLOCK_CHUNKS, MemoryBank
from msa_memory.engine.bank_view import BankView
from msa_memory.engine.cache import LayerCache
from msa_memory.engine.config import BackboneConfig, MSAConfig, RopeConfig, read_msa
from msa_memory.engine.context import Feed, advance, route
from msa_memory.engine.context import Sequence as Row
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.encoding import encode_head, encode_passage
from msa_memory.engine.states import HeadStates, PassageStates

VOCAB = 97
LENGTHS = (1, 3, 7, 8, 9, 63, 64, 65, 111)
HEAD = (5, 6, 7)
few = settings(max_examples=20)

seeds = st.integers(0, 2**31 - 1)


def build(seed: int = 0, **options: Any) -> Decoder:
    """A random three-layer model with routers on layers 0 and 2, grouped heads and odd sizes."""
    backbone = BackboneConfig(
        model_type="qwen3",
        vocab_size=VOCAB,
        hidden_size=40,
        intermediate_size=56,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        max_positions=512,
        rope=RopeConfig(theta=10000.0),
        tie_word_embeddings=True,
        qk_norm=True,
    )
    settings_ = {"router_layers": (0, 2), "top_k": 2, "chunk": 8, "router_chunk": 8, **options}
    torch.manual_seed(seed)
    decoder = Decoder(backbone, MSAConfig(**settings_))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0.0, 0.1) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return decoder.eval()


@dataclass
class World:
    """A model, its template head and passages by number."""

    decoder: Decoder
    head: HeadStates
    states: dict[int, PassageStates]

    @classmethod
    def make(cls, decoder: Decoder, texts: dict[int, list[int]]) -> "World":
        states = {number: encode_passage(decoder, ids) for number, ids in texts.items()}
        return cls(decoder, encode_head(decoder, HEAD), states)

    @property
    def msa(self) -> MSAConfig:
        assert self.decoder.msa is not None
        return self.decoder.msa

    def bank(self, numbers: Sequence[int] | None = None) -> MemoryBank:
        bank = MemoryBank(self.msa, self.states.__getitem__)
        for number in self.states if numbers is None else numbers:
            bank.add(number, self.states[number].router_keys)
        return bank

    def row(self, view: BankView | None, top_k: int | None = None, capacity: int = 4) -> Row:
        k = self.msa.top_k if top_k is None else top_k
        return Row.start(self.decoder, self.head, position=5, view=view, top_k=k, capacity=capacity)

    def ask(self, view: BankView | None, ids: list[int], top_k: int | None = None) -> tuple[Row, Tensor]:
        row = self.row(view, top_k)
        return row, advance(self.decoder, [Feed(row, ids, question_mask(ids))])[0]


def question_mask(ids: Sequence[int]) -> list[bool]:
    """All but the last token route."""
    return [True] * (len(ids) - 1) + [False] if len(ids) > 1 else [True]


def some_ids(random: np.random.Generator, length: int) -> list[int]:
    return [int(token) for token in random.integers(0, VOCAB, length)]


def some_world(seed: int, count: int = 6, **options: Any) -> tuple[World, np.random.Generator]:
    random = np.random.default_rng(seed)
    lengths = random.choice(LENGTHS[:-2], count)
    texts = {int(number): some_ids(random, int(n)) for number, n in enumerate(lengths, start=3)}
    return World.make(build(seed % 7, **options), texts), random


MODES: list[dict[str, Any]] = [
    {},
    {"router_normalize": False, "head_reduce": "max", "query_reduce": "mean", "chunk_reduce": "mean"},
    {"decouple_router": False, "query_reduce": "last"},
    {"router_chunk": 3},
]


class TestDocumentsAreIndependent:
    @few
    @given(seed=seeds, lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3))
    def test_a_passages_states_never_change(self, seed: int, lengths: list[int]) -> None:
        """Whatever was encoded before or between, bit for bit."""
        decoder, random = build(), np.random.default_rng(seed)
        ids = some_ids(random, int(random.choice(LENGTHS)))
        alone = encode_passage(decoder, ids)
        for length in lengths:
            encode_passage(decoder, some_ids(random, length))
        again = encode_passage(decoder, ids)
        assert again.to_bytes() == alone.to_bytes()

    @pytest.mark.parametrize("mode", range(len(MODES)))
    @settings(max_examples=8)
    @given(seed=seeds)
    def test_a_passages_score_does_not_depend_on_the_others(self, mode: int, seed: int) -> None:
        """Bit for bit: wherever it lies in a block, however full that is, whatever is masked or removed."""
        world, random = some_world(seed, **MODES[mode])
        question = some_ids(random, int(random.integers(1, 12)))
        scores = []
        keep = 5
        for numbers in ([keep], [keep, 3, 4], [3, 4, 6, keep, 7, 8], [8, 7, 6, keep]):
            bank = world.bank(numbers)
            scores.append(self.score(world, bank.view(), question, keep))
        scores.append(self.score(world, bank.view(np.array([keep])), question, keep))
        bank.remove([8, 6])
        scores.append(self.score(world, bank.view(), question, keep))
        for slot in range(2):
            assert len({float(found[slot]) for found in scores}) == 1, [found[slot] for found in scores]

    def score(self, world: World, view: BankView, question: list[int], number: int) -> list[np.float32]:
        """On every router layer; ``route`` attends to no memory, so all layers see the same question."""
        row = world.row(view)
        route(world.decoder, [Feed(row, question, question_mask(question))])
        (at,) = np.flatnonzero(view.numbers == number)
        return [row.scores[layer][at] for layer in world.msa.router_layers]

    def test_a_bank_of_several_blocks_scores_and_chooses_like_one(self) -> None:
        msa = MSAConfig(router_layers=(0,), top_k=3, chunk=4, router_chunk=4)
        random = torch.Generator().manual_seed(1)
        keys = {n: torch.randn(1, 1 + n % 7, 2, 8, generator=random) for n in range(2500)}
        query = torch.randn(5, 6, 8, generator=random)
        bank = MemoryBank(msa, lambda number: pytest.fail("nothing is fetched"))
        for number, one in keys.items():
            bank.add(number, one)
        assert len(bank._blocks) == math.ceil(sum(one.shape[1] for one in keys.values()) / BLOCK_CHUNKS)
        view = bank.view()
        scores = view.score(0, query)
        assert view.numbers.tolist() == list(keys)
        best = sorted(keys, key=lambda number: (-scores[number], number))[:3]
        assert view.select(scores, 3).numbers == tuple(best)
        for number in (0, 1, 1100, 2499):
            alone = MemoryBank(msa, bank.fetch)
            alone.add(number, keys[number])
            assert alone.view().score(0, query)[0] == scores[number]


class TestRowsAreIndependent:
    @pytest.mark.parametrize("mode", range(len(MODES)))
    @settings(max_examples=6)
    @given(seed=seeds)
    def test_a_batch_gives_what_single_questions_give(self, mode: int, seed: int) -> None:
        world, random = some_world(seed, **MODES[mode])
        view = world.bank().view()
        questions = [some_ids(random, n) for n in (1, 9, int(random.integers(2, 30)))]
        views = [view, view.without([3, 4]), None]
        rows = [world.row(one) for one in views]
        feeds = [Feed(row, ids, question_mask(ids)) for row, ids in zip(rows, questions, strict=True)]
        batched = advance(world.decoder, feeds)
        following = advance(world.decoder, [Feed(row, [7]) for row in rows])
        for index, (one, ids) in enumerate(zip(views, questions, strict=True)):
            row, logits = world.ask(one, ids)
            assert {n: s.numbers for n, s in row.selections.items()} == {
                n: s.numbers for n, s in rows[index].selections.items()
            }
            assert (logits - batched[index]).abs().max() < 1e-5
            assert (advance(world.decoder, [Feed(row, [7])])[0] - following[index]).abs().max() < 1e-5

    def test_a_view_of_one_row_never_reaches_another(self) -> None:
        world, random = some_world(3)
        view, question = world.bank().view(), some_ids(random, 6)
        secret = view.without([n for n in view.numbers if n != 4])
        rows = [world.row(secret), world.row(view.without([4]))]
        advance(world.decoder, [Feed(row, question, question_mask(question)) for row in rows])
        for layer in world.msa.router_layers:
            assert rows[0].selections[layer].numbers == (4,)
            assert 4 not in rows[1].selections[layer].numbers


class TestMemoryIsASet:
    @few
    @given(seed=seeds)
    def test_the_order_of_chunks_does_not_matter(self, seed: int) -> None:
        world, random = some_world(seed)
        question = some_ids(random, 8)
        view = world.bank().view()
        _, expected = world.ask(view, question)
        gather = BankView.gather

        def shuffled(self: BankView, *args: object) -> tuple[Tensor, Tensor]:
            keys, values = gather(self, *args)  # type: ignore[arg-type]
            order = torch.from_numpy(random.permutation(keys.shape[1]))
            return keys[:, order], values[:, order]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BankView, "gather", shuffled)
            _, found = world.ask(view, question)
        assert (found - expected).abs().max() < 1e-5

    @few
    @given(seed=seeds)
    def test_neither_does_the_order_of_adding_nor_the_numbering(self, seed: int) -> None:
        world, random = some_world(seed)
        question = some_ids(random, 8)
        row, expected = world.ask(world.bank().view(), question)
        new = {old: int(n) for old, n in zip(world.states, random.permutation(100)[:6], strict=True)}
        renamed = World(world.decoder, world.head, {new[n]: states for n, states in world.states.items()})
        shuffled = [int(n) for n in random.permutation(list(renamed.states))]
        other, found = renamed.ask(renamed.bank(shuffled).view(), question)
        assert (found - expected).abs().max() < 1e-5
        for layer in world.msa.router_layers:
            assert [new[n] for n in row.selections[layer].numbers] == list(other.selections[layer].numbers)


class TestDecode:
    @pytest.mark.parametrize("mode", range(len(MODES)))
    @settings(max_examples=5)
    @given(seed=seeds)
    def test_steps_equal_a_full_recomputation(self, mode: int, seed: int) -> None:
        world, random = some_world(seed, **MODES[mode])
        view = world.bank().view()
        question, answer = some_ids(random, int(random.integers(1, 20))), some_ids(random, 70)
        row, _ = world.ask(view, question)
        for token in answer[:-3]:
            advance(world.decoder, [Feed(row, [token])])
        stepped = advance(world.decoder, [Feed(row, answer[-3:])])[0]
        whole = world.row(view)
        mask = question_mask(question) + [False] * len(answer)
        once = advance(world.decoder, [Feed(whole, question + answer, mask)])[0]
        assert row.position == whole.position
        assert (stepped - once).abs().max() < 1e-5

    def test_a_truncated_sequence_goes_on_as_if_it_had_never_been_longer(self) -> None:
        world, random = some_world(5)
        row, _ = world.ask(world.bank().view(), some_ids(random, 9))
        length, position = row.cache.length, row.position
        first = advance(world.decoder, [Feed(row, [1, 2, 3])])[0]
        row.cache.truncate(length)
        row.position = position
        assert torch.equal(advance(world.decoder, [Feed(row, [1, 2, 3])])[0], first)

    def test_tokens_that_do_not_route_keep_the_choice(self) -> None:
        world, random = some_world(6)
        row, _ = world.ask(world.bank().view(), some_ids(random, 9))
        chosen = dict(row.selections)
        advance(world.decoder, [Feed(row, [4, 5], [False, False])])
        assert row.selections == chosen

    def test_given_selections_are_attended_to_like_routed_ones(self) -> None:
        world, random = some_world(8)
        view, question = world.bank().view(), some_ids(random, 9)
        row, expected = world.ask(view, question)
        other = world.row(view)
        other.attend_to(row.selections, {layer: slot for slot, layer in enumerate(world.msa.router_layers)})
        assert torch.equal(advance(world.decoder, [Feed(other, question)])[0], expected)

    @few
    @given(steps=st.lists(st.tuples(st.sampled_from("amt"), st.integers(0, 40)), max_size=12), seed=seeds)
    def test_the_cache_is_a_list_of_memory_and_own_tokens(
        self, steps: list[tuple[str, int]], seed: int
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        cache = LayerCache(2, 4, 3, torch.zeros(1))
        memory, own = torch.zeros(2, 0, 4), torch.zeros(2, 0, 4)
        for kind, size in steps:
            fresh = torch.randn(2, size, 4, generator=random)
            if kind == "a":
                cache.append(fresh.transpose(0, 1), -fresh.transpose(0, 1))
                own = torch.cat((own, fresh), dim=1)
            elif kind == "m":
                cache.set_memory(fresh, -fresh)
                memory = fresh
            else:
                cache.truncate(size)
                own = own[:, :size]
            keys, values = cache.view()
            assert torch.equal(keys, torch.cat((memory, own), dim=1))
            assert torch.equal(values, -keys)


class TestWhatAQuestionMaySee:
    @pytest.mark.parametrize("top_k", [1, 5, 6, 7, 100])
    def test_k_is_clipped_to_what_is_visible(self, top_k: int) -> None:
        world, random = some_world(11)
        row, logits = world.ask(world.bank().view(), some_ids(random, 5), top_k)
        assert logits.isfinite().all()
        for selection in row.selections.values():
            assert len(selection.numbers) == min(top_k, 6)
            assert list(selection.scores) == sorted(selection.scores, reverse=True)

    def test_an_empty_bank_and_one_with_nothing_visible_act_like_no_memory(self) -> None:
        world, random = some_world(12)
        question = some_ids(random, 5)
        _, expected = world.ask(None, question)
        everything = world.bank().view()
        views = [
            world.bank([]).view(),
            world.bank().view(np.array([], dtype=np.int64)),
            world.bank().view(np.array([999])),
            everything.without(everything.numbers),
        ]
        for view in views:
            assert len(view) == 0
            row, logits = world.ask(view, question)
            assert torch.equal(logits, expected)
            assert all(selection.numbers == () for selection in row.selections.values())

    def test_masked_passages_score_minus_infinity_and_cannot_be_chosen(self) -> None:
        world, random = some_world(13)
        view = world.bank().view().without([4, 7])
        row, _ = world.ask(view, some_ids(random, 5), 100)
        for layer in world.msa.router_layers:
            hidden = np.isin(view.numbers, [4, 7])
            assert np.isneginf(row.scores[layer][hidden]).all()
            assert np.isfinite(row.scores[layer][~hidden]).all()
            assert sorted(row.selections[layer].numbers) == [3, 5, 6, 8]

    def test_ties_go_to_the_lower_number(self) -> None:
        world, _ = some_world(14)
        view = world.bank([8, 6, 4, 7, 3, 5]).view()
        assert view.select(np.array([1, 2, 1, 2, 2, 2], dtype=np.float32), 3).numbers == (3, 5, 6)

    @few
    @given(seed=seeds)
    def test_a_view_is_a_snapshot(self, seed: int) -> None:
        world, random = some_world(seed)
        question = some_ids(random, 6)
        bank = world.bank([3, 4, 5])
        view = bank.view()
        _, before = world.ask(view, question)
        for number in random.permutation([3, 4, 5, 6, 7, 8, 99]):
            if int(number) in bank:
                bank.remove([int(number)])
            elif int(number) in world.states:
                bank.add(int(number), world.states[int(number)].router_keys)
            assert view.numbers.tolist() == [3, 4, 5]
            _, now = world.ask(view, question)
            assert torch.equal(now, before)
        assert bank.numbers == (6, 7, 8)

    @few
    @given(data=st.data())
    def test_adding_and_removing_leave_a_bank_like_one_built_afresh(self, data: st.DataObject) -> None:
        world, random = some_world(21)
        bank = MemoryBank(world.msa, world.states.__getitem__)
        for number in data.draw(st.lists(st.sampled_from(sorted(world.states)), max_size=15)):
            bank.remove([number]) if number in bank else bank.add(number, world.states[number].router_keys)
        query = torch.from_numpy(random.standard_normal((4, 6, 8), dtype=np.float32))
        view, fresh = bank.view(), world.bank(bank.numbers).view()
        assert len(bank) == len(view) == len(fresh)
        for slot in range(2):
            found = dict(zip(view.numbers.tolist(), view.score(slot, query), strict=True))
            expected = dict(zip(fresh.numbers.tolist(), fresh.score(slot, query), strict=True))
            assert found == expected
            assert view.select(view.score(slot, query), 2) == fresh.select(fresh.score(slot, query), 2)

    def test_removed_rows_leave_no_trace(self) -> None:
        world, _ = some_world(22)
        bank = world.bank()
        gone = world.states[5].router_keys
        bank.remove([5])
        (block,) = bank._blocks
        rows = {row.numpy().tobytes() for row in block.keys.flatten(2)[0]}
        assert not rows & {row.numpy().tobytes() for row in gone.flatten(2)[0]}
        assert not block.keys[:, block.used :].any()
        bank.remove([3, 4, 6, 7, 8, 5, 12345])
        assert len(bank) == bank.nbytes() == 0


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Softmax by its definition, head by head and token by token, in float64."""
    tokens, heads, _ = query.shape
    group, before = heads // keys.shape[0], keys.shape[1] - tokens
    out = torch.zeros_like(query, dtype=torch.float64)
    for t in range(tokens):
        for head in range(heads):
            seen = slice(0, before + t + 1)
            dots = (keys[head // group, seen].double() @ query[t, head].double()) * scale
            weights = dots.exp() / dots.exp().sum()
            out[t, head] = weights @ values[head // group, seen].double()
    return out


def random_tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestOperations:
    @pytest.mark.parametrize("groups", [1, 2, 6])
    @pytest.mark.parametrize(("tokens", "before"), [(1, 0), (1, 63), (2, 0), (63, 1), (64, 0), (65, 111)])
    def test_attend(self, tokens: int, before: int, groups: int) -> None:
        query = random_tensor(1, tokens, 6, 8)
        keys, values = (
            random_tensor(2, groups, before + tokens, 8),
            random_tensor(3, groups, before + tokens, 8),
        )
        found = ops.attend(query, keys, values, 0.3)
        assert found.shape == query.shape
        assert (found - plain_attention(query, keys, values, 0.3)).abs().max() < 2e-6

    def test_attend_documents_is_attend_on_each(self) -> None:
        lengths = [1, 63, 64, 7]
        total = sum(lengths)
        query, keys, values = (random_tensor(n, total, heads, 8) for n, heads in ((1, 4), (2, 2), (3, 2)))
        parts = zip(*(x.split(lengths) for x in (query, keys, values)), strict=True)
        expected = torch.cat(
            [plain_attention(q, k.transpose(0, 1), v.transpose(0, 1), 0.3) for q, k, v in parts]
        )
        found = ops.attend_documents(query, keys, values, lengths, 0.3)
        assert (found - expected).abs().max() < 2e-6

    @pytest.mark.parametrize("chunk", [1, 4, 64, 100])
    @pytest.mark.parametrize("tokens", LENGTHS)
    def test_pool_chunks(self, tokens: int, chunk: int) -> None:
        x = random_tensor(tokens, tokens, 2, 5)
        expected = torch.stack([x[at : at + chunk].double().mean(0) for at in range(0, tokens, chunk)])
        found = ops.pool_chunks(x, chunk)
        assert found.shape == (math.ceil(tokens / chunk), 2, 5)
        assert (found - expected).abs().max() < 1e-6
        half = ops.pool_chunks(x.bfloat16(), chunk)
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, ops.pool_chunks(x.bfloat16().float(), chunk).bfloat16())

    @few
    @given(
        seed=seeds,
        tokens=st.integers(1, 9),
        chunks=st.integers(1, 20),
        groups=st.sampled_from([1, 2, 6]),
        head_reduce=st.sampled_from(["mean", "max"]),
        query_reduce=st.sampled_from(["max", "mean", "last"]),
    )
    def test_score_chunks(
        self, seed: int, tokens: int, chunks: int, groups: int, head_reduce: str, query_reduce: str
    ) -> None:
        """Against the whole per-head tensor: heads first, then tokens."""
        query, keys = random_tensor(seed, tokens, 6, 8), random_tensor(seed + 1, chunks, groups, 8)
        shared = keys.double().repeat_interleave(6 // groups, dim=1)  # [C, H, D]
        scores = torch.einsum("thd,chd->htc", query.double(), shared) * 0.3
        scores = scores.mean(0) if head_reduce == "mean" else scores.amax(0)
        reduced = {"max": scores.amax(0), "mean": scores.mean(0), "last": scores[-1]}
        found = ops.score_chunks(query, keys, head_reduce=head_reduce, query_reduce=query_reduce, scale=0.3)
        assert found.dtype == torch.float32
        assert (found - reduced[query_reduce]).abs().max() < 1e-5

    @few
    @given(seed=seeds, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8))
    def test_reduce_passages(self, seed: int, lengths: list[int]) -> None:
        scores = random_tensor(seed, sum(lengths))
        parts = scores.split(lengths)
        for kind, plain in (("max", Tensor.amax), ("mean", Tensor.mean)):
            found = ops.reduce_passages(scores, torch.tensor(lengths), kind)
            assert (found - torch.stack([plain(part) for part in parts])).abs().max() < 1e-6

    def test_normalize_heads_gives_unit_vectors_and_leaves_zeros(self) -> None:
        x = random_tensor(1, 5, 2, 8)
        x[3, 1] = 0
        lengths = ops.normalize_heads(x).norm(dim=-1)
        assert lengths[3, 1] == 0
        lengths[3, 1] = 1
        assert (lengths - 1).abs().max() < 1e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rms_norm(self, dtype: torch.dtype) -> None:
        x, weight = random_tensor(1, 5, 40).to(dtype), random_tensor(2, 40).to(dtype)
        wide = x.double()
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        tolerance = 1e-6 if dtype == torch.float32 else 4e-2
        assert (ops.rms_norm(x, weight, 1e-6) - expected).abs().max() < tolerance


class TestRoutersConfiguration:
    def config(self, model_type: str, method: str, **msa: object) -> dict[str, object]:
        settings_ = {"router_layer_idx": "0", "aux_loss_method": method, **msa}
        return {"model_type": model_type, "num_hidden_layers": 2, "msa_config": settings_}

    @pytest.mark.parametrize(
        ("model_type", "method", "expected", "warns"),
        [
            ("msa", "INFONCE", True, False),
            ("msa", "INFONCE_DECOUPLE", False, True),
            ("msa", "INFONCE_FOCAL", False, True),
            ("msa", "BCE", False, False),
            ("llama", "INFONCE_DECOUPLE", True, False),
            ("llama", "BCE", False, False),
        ],
    )
    def test_msa_checkpoints_infer_as_the_reference_does(
        self, model_type: str, method: str, expected: bool, warns: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = self.config(model_type, method)
        msa = read_msa(config)
        assert msa is not None
        assert msa.router_normalize is expected
        assert ("router_normalize=True" in caplog.text) is warns
        caplog.clear()
        for asked in (True, False):
            switched = read_msa(config, router_normalize=asked)
            written = read_msa(self.config(model_type, method, router_normalize=not asked))
            both = read_msa(
                self.config(model_type, method, router_normalize=not asked), router_normalize=asked
            )
            assert switched is not None
            assert written is not None
            assert both is not None
            assert switched.router_normalize is both.router_normalize is asked
            assert written.router_normalize is not asked
        assert not caplog.text

    @pytest.mark.parametrize("decouple", [True, False])
    def test_the_switch_changes_keys_queries_and_scale(self, decouple: bool) -> None:
        texts = {1: some_ids(np.random.default_rng(0), 30)}
        plain, cosine = (
            World.make(build(decouple_router=decouple, router_normalize=on), texts) for on in (False, True)
        )
        assert torch.equal(cosine.states[1].router_keys, ops.normalize_heads(plain.states[1].router_keys))
        assert torch.equal(cosine.states[1].keys, plain.states[1].keys)
        (row, _), (other, _) = (world.ask(world.bank().view(), [1, 2, 3]) for world in (plain, cosine))
        assert torch.allclose(other.queries[0], ops.normalize_heads(row.queries[0]))
        assert plain.msa.score_scale(16) == 0.25
        assert cosine.msa.score_scale(16) == (1.0 if decouple else 0.25)


def test_question_rows_of_a_batch_share_no_python_state() -> None:
    """A sequence's mutable fields are its own."""
    world, _ = some_world(30)
    first, second = world.row(None), world.row(None)
    shared = [
        name
        for name in context_module.Sequence.__dataclass_fields__
        if isinstance(getattr(first, name), dict | list) and getattr(first, name) is getattr(second, name)
    ]
    assert shared == []
