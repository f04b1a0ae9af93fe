"""Decoding with prepared weights: the decoder's own maths, packed weights, guessed tokens."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msa_memory.engine.config import BackboneConfig, RopeConfig
from msa_memory.engine.context import Feed, advance
from msa_memory.engine.context import Sequence as Row
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.encoding import encode_head
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.generation import Generation, decode_ahead
from msa_memory.engine.packing import pack, pack_rows
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.engine.speculation import PromptLookup
from msa_memory.engine.stepper import Stepper, packed_stepper, plain_stepper
from msa_memory.errors import ConfigError
from msa_memory.testing import tiny_model

few = settings(max_examples=25)
VOCAB = 96
HEAD = [3, 1, 4]


def decoder_of(family: str = "llama", dtype: torch.dtype = torch.float32, rope: str = "default") -> Decoder:
    """A small random decoder whose norms and biases are random too."""
    config = BackboneConfig(
        model_type=family,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        max_positions=64,
        rope=RopeConfig(kind=rope, factor=4.0, original_max_positions=16),
        tie_word_embeddings=family == "llama",
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        output_bias=family == "qwen3",
        mlp_bias=family == "llama",
    )
    torch.manual_seed(5)
    decoder = Decoder(config).requires_grad_(False).eval()
    for name, parameter in decoder.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if "weight" in name else 1.0))
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return decoder.to(dtype)


def row_of(decoder: Decoder) -> Row:
    """A sequence behind a head, with memory in front of one layer."""
    row = Row.start(
        decoder, encode_head(decoder, HEAD), position=len(HEAD) + 5, view=None, top_k=0, capacity=4
    )
    memory = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(decoder.dtype)
    row.cache.layers[1].set_memory(memory, -memory)
    return row


def fed(stepper: Stepper, row: Row, ids: Sequence[int]) -> Tensor:
    logits = stepper.feed(ids, row.position, row.cache)
    row.position += len(ids)
    return logits


class TestTheSameMaths:
    @pytest.mark.parametrize("rope", ["default", "yarn", "dynamic"])
    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
    def test_a_step_is_the_decoders_forward(self, family: str, rope: str) -> None:
        plain, stepped = decoder_of(family, rope=rope), decoder_of(family, rope=rope)
        stepper = plain_stepper(stepped)
        row, other = row_of(plain), row_of(stepped)
        for ids in ([7, 8], [9], [10, 11, 12], [13]):
            expected = torch.stack([advance(plain, [Feed(row, [token])])[0] for token in ids])
            torch.testing.assert_close(fed(stepper, other, ids), expected, atol=2e-4, rtol=1e-4)
        for mine, theirs in zip(other.cache.layers, row.cache.layers, strict=True):
            for kept, expected in zip(mine.view(), theirs.view(), strict=True):
                torch.testing.assert_close(kept, expected, atol=1e-4, rtol=1e-4)

    def test_joined_weights_are_moved_and_change_nothing_else(self) -> None:
        decoder = decoder_of()
        before = {name: tensor.clone() for name, tensor in decoder.named_parameters()}
        logits = advance(decoder, [Feed(row_of(decoder), [1, 2, 3])])
        stepper = plain_stepper(decoder)
        assert torch.equal(advance(decoder, [Feed(row_of(decoder), [1, 2, 3])]), logits)
        assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.named_parameters())
        joined = stepper.layers[0].qkv.weight.untyped_storage().data_ptr()
        assert decoder.attention(0).v_proj.weight.untyped_storage().data_ptr() == joined

    def test_several_sequences_step_together(self) -> None:
        stepper = packed_stepper(decoder_of(dtype=torch.bfloat16), {}, {})
        assert stepper is not None
        rows = [row_of(stepper.decoder) for _ in range(3)]
        alone = [fed(stepper, row_of(stepper.decoder), ids) for ids in ([5], [6, 7], [8])]
        hidden = stepper(
            [5, 6, 7, 8],
            [rows[0].position, rows[1].position, rows[1].position + 1, rows[2].position],
            [(rows[0].cache, 1), (rows[1].cache, 2), (rows[2].cache, 1)],
        )
        assert torch.equal(stepper.logits(hidden), torch.cat(alone))


def four_bits(rows: int, columns: int, seed: int) -> Tensor:
    """A matrix as a Q4_1 file holds it, in bfloat16."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    drawn[0, :32] = 0.25  # a group of one value
    kind = gguf.GGMLQuantizationType.Q4_1
    return torch.from_numpy(gguf.dequantize(gguf.quantize(drawn.numpy(), kind), kind)).to(torch.bfloat16)


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def error(seen: Tensor, expected: Tensor) -> float:
    """Largest difference, in the expected values' largest."""
    return float((seen.double() - expected).abs().max() / expected.abs().max())


class TestPackedWeights:
    @pytest.mark.parametrize("shape", [(32, 64), (96, 32), (160, 192)])
    def test_four_bits_stay_four_bits(self, shape: tuple[int, int]) -> None:
        weight, x = four_bits(*shape, seed=1), drawn(3, shape[1])
        packed = pack([weight], [weight], [None])
        assert packed.bits == 4
        assert error(packed(x), x.double() @ weight.double().T) < 0.01

    def test_every_level_is_kept(self) -> None:
        weight = four_bits(64, 64, seed=2)
        seen = pack([weight], [weight], [None])(torch.eye(64).to(torch.bfloat16)).double().T
        groups = weight.double().unflatten(1, (-1, 32))
        step = (groups.amax(-1) - groups.amin(-1)).max() / 15
        assert (seen - weight.double()).abs().max() < step / 8, "far less than one level to the next"

    @pytest.mark.parametrize("spoilt", [0.6, 1e-1, 3e-2])
    def test_one_weight_between_two_levels_takes_eight_bits(self, spoilt: float) -> None:
        weight = four_bits(64, 64, seed=2)
        weight[40, 40] += spoilt * (weight[40, 32:64].max() - weight[40, 32:64].min())
        packed = pack([weight], [weight], [None])
        assert packed.bits == 8
        x = drawn(2, 64)
        assert error(packed(x), x.double() @ weight.double().T) < 0.02

    @pytest.mark.parametrize("rank", [1, 8, 32, 40])
    def test_a_low_rank_change_stays_beside_its_matrix(self, rank: int) -> None:
        base = [four_bits(rows, 64, seed=rows) for rows in (64, 32, 32)]
        changes = [(drawn(rank, 64) * 0.1, drawn(rows, rank, seed=rows) * 0.1) for rows in (64, 32, 32)]
        held = [changes[0], None, changes[2]]
        x, bias = drawn(5, 64), drawn(128)
        packed = pack(base, base, held, bias)
        wide = [(w.double() + b.double() @ a.double()) for w, (a, b) in zip(base, changes, strict=True)]
        wide[1] = base[1].double()
        assert packed.bits == 4
        assert error(packed(x), x.double() @ torch.cat(wide).T + bias.double()) < 0.02

    def test_where_the_base_takes_more_bits_the_merged_weights_are_packed(self) -> None:
        base, merged = drawn(32, 64), drawn(32, 64, seed=8)
        packed = pack([base], [merged], [(drawn(4, 64), drawn(32, 4))])
        x = drawn(1, 64)
        assert packed.bits == 8
        assert error(packed(x), x.double() @ merged.double().T) < 0.02

    @pytest.mark.parametrize("rows", [1, 31, 33, 100])
    def test_any_number_of_rows_can_be_packed(self, rows: int) -> None:
        weight, x = drawn(rows, 64), drawn(4, 64, seed=9)
        expected = x.double() @ weight.double().T
        codes = x.double().abs().sum(1, keepdim=True) * weight.double().abs().amax(1) / 254
        rounding = expected.abs() * 2.0**-7  # of the scale and of the result
        assert ((pack_rows(weight)(x).double() - expected).abs() <= codes * 1.01 + rounding).all()

    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_row_is_the_same_bits_whatever_it_is_computed_with(self, bits: int) -> None:
        weight = four_bits(160, 96, seed=4) if bits == 4 else drawn(160, 96)
        packed = pack([weight], [weight], [(drawn(8, 96), drawn(160, 8))])
        assert packed.bits == bits
        x = drawn(70, 96)
        for size in (*range(1, 10), 16, 17, 33, 70):
            assert torch.equal(packed(x[:size]), torch.cat([packed(row[None]) for row in x[:size]]))

    def test_frequencies_that_follow_the_last_position_part_the_rows(self) -> None:
        stepper = packed_stepper(decoder_of(dtype=torch.bfloat16, rope="dynamic"), {}, {})
        assert stepper is not None
        assert not stepper.rows_alike

    def test_shapes_and_types_that_do_not_fit_are_left_alone(self) -> None:
        assert packed_stepper(decoder_of(), {}, {}) is None, "float32"

    def test_a_packed_step_is_the_decoders_forward_but_for_rounding(self) -> None:
        wide, half = decoder_of("qwen3"), decoder_of("qwen3", torch.bfloat16)
        stepper = packed_stepper(half, {}, {})
        assert stepper is not None
        assert stepper.bits == (8,)
        expected = torch.cat([advance(wide, [Feed(row_of(wide), [n])]) for n in range(20)])
        packed = torch.cat([fed(stepper, row_of(half), [n]) for n in range(20)])
        rounded = torch.cat([advance(half, [Feed(row_of(half), [n])]) for n in range(20)])
        assert (packed - expected).norm() < 3 * (rounded - expected).norm()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(tiny_model(), device="cpu", dtype="bfloat16", decode_weights="packed")


class Every:
    """Allows the tokens of one class after the other; finished after ``most``."""

    def __init__(self, vocabulary: int, classes: int, most: int) -> None:
        self.numbers, self.classes = torch.arange(vocabulary), classes
        self.most, self.taken = most, 0

    @property
    def finished(self) -> bool:
        return self.taken >= self.most

    def allowed(self) -> Tensor | None:
        return self.numbers % self.classes == self.taken % self.classes

    def accept(self, token_id: int) -> None:
        self.taken += 1


def one_by_one(engine: Engine, generation: Generation) -> list[str]:
    """Plain decoding with the same weights, a token at a time."""
    texts = [generation.take()]
    assert engine.stepper is not None
    while generation.finish_reason is None:
        row = generation.sequence
        generation.accept(fed(engine.stepper, row, generation.ids[-1:])[0])
        row.fed_tokens += 1
        texts.append(generation.take())
    return texts


class Oracle(PromptLookup):
    """Guesses that are sometimes right: what comes is known beforehand, and spoilt at random places."""

    def __init__(self, answer: list[int], spoilt: Callable[[], bool]) -> None:
        super().__init__([])
        self.answer, self.spoilt, self.at = answer, spoilt, 1

    def guess(self, most: int) -> list[int]:
        return [abs(token - self.spoilt()) for token in self.answer[self.at : self.at + most]]

    def extend(self, ids: list[int], *, hit: bool = True) -> None:
        self.at += len(ids)


class TestGuessedTokens:
    def generation(
        self, engine: Engine, prompt: list[int], constrained: bool, **options: object
    ) -> Generation:
        row = engine.start(None, capacity=8)
        logits = advance(engine.decoder, [Feed(row, prompt)])[0]
        form = Every(engine.tokenizer.vocab_size, 7, 20) if constrained else None
        return Generation(engine.tokenizer, SamplingOptions(**options), row, logits, form, prompt)

    @few
    @given(
        prompt=st.lists(st.integers(10, 60), min_size=1, max_size=30),
        temperature=st.sampled_from([0.0, 0.0, 0.7]),
        constrained=st.booleans(),
        stop=st.lists(st.sampled_from(["e", "th", " ", "ing", "\n"]), max_size=2),
        most=st.integers(1, 24),
        seed=st.integers(0, 2**16),
    )
    def test_the_answer_is_the_same_token_for_token(
        self, engine: Engine, prompt: list[int], temperature: float, constrained: bool, stop: list[str],
        most: int, seed: int,
    ) -> None:  # fmt: skip
        options = {"temperature": temperature, "stop": tuple(stop), "max_new_tokens": most, "seed": seed}
        expected = self.generation(engine, prompt, constrained, **options)
        texts = one_by_one(engine, expected)
        chance = torch.Generator().manual_seed(seed)

        def spoilt() -> bool:
            return bool(torch.rand(1, generator=chance) < 0.3)

        for lookup in (None, lambda ids: Oracle(expected.ids, spoilt)):
            seen = self.generation(engine, prompt, constrained, **options)
            with pytest.MonkeyPatch.context() as patch:
                if lookup:
                    patch.setattr("msa_memory.engine.generation.PromptLookup", lookup)
                assert list(decode_ahead(engine.stepper, seen)) == texts
            assert seen.ids == expected.ids
            assert (seen.finish_reason, seen.text) == (expected.finish_reason, expected.text)
            assert seen.sequence.fed_tokens == expected.sequence.fed_tokens == len(prompt) + len(seen.ids) - 1
            assert seen.sequence.position == expected.sequence.position
            for mine, theirs in zip(seen.sequence.cache.layers, expected.sequence.cache.layers, strict=True):
                assert all(map(torch.equal, mine.view(), theirs.view()))

    def test_right_guesses_save_forwards(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        prompt = list(range(20, 30))
        expected = self.generation(engine, prompt, False, max_new_tokens=17)
        one_by_one(engine, expected)
        forwards = []
        feed = Stepper.feed
        monkeypatch.setattr(Stepper, "feed", lambda *given: (forwards.append(given[1]), feed(*given))[1])
        monkeypatch.setattr(
            "msa_memory.engine.generation.PromptLookup", lambda ids: Oracle(expected.ids, lambda: False)
        )
        assert list(decode_ahead(engine.stepper, self.generation(engine, prompt, False, max_new_tokens=17)))
        assert [len(ids) for ids in forwards] == [4, 4, 4, 4]

    def test_weights_whose_rows_differ_get_no_guesses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = load_engine(tiny_model(), device="cpu")
        monkeypatch.setattr(PromptLookup, "guess", lambda *_: pytest.fail("guessed"))
        generation = self.generation(plain, [20, 21, 20, 21, 20, 21], False, max_new_tokens=6)
        assert len(list(decode_ahead(plain.stepper, generation))) == 6


class TestPromptLookup:
    @given(ids=st.lists(st.integers(0, 4), max_size=60), most=st.integers(0, 5))
    def test_a_guess_is_what_followed_the_newest_tokens_last(self, ids: list[int], most: int) -> None:
        expected: list[int] = []
        for length in (2, 3):  # the longer run counts
            ends = range(length, len(ids))
            places = [end for end in ends if ids[end - length : end] == ids[len(ids) - length :]]
            if places:
                expected = ids[places[-1] : places[-1] + most]
        assert PromptLookup(ids).guess(most) == expected

    def test_a_wrong_guess_makes_it_wait(self) -> None:
        lookup = PromptLookup([1, 2, 3, 4, 1, 2])
        assert lookup.guess(3) == [3, 4, 1]
        lookup.extend([1, 2], hit=False)
        assert [lookup.guess(1) for _ in range(4)] == [[], [], *itertools.repeat([1], 2)]


class TestLoading:
    def test_unknown_weights_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="decode_weights is 'int4'"):
            load_engine(tiny_model(), device="cpu", decode_weights="int4")

    def test_packed_weights_need_bfloat16(self) -> None:
        engine = load_engine(tiny_model(), device="cpu", decode_weights="packed")
        with pytest.raises(ConfigError, match=r"needs bfloat16.*torch.float32"):
            engine.stepper  # noqa: B018 - prepared when first read

    @pytest.mark.parametrize(("dtype", "weights", "bits"), [
        ("bfloat16", "auto", (8,)), ("bfloat16", "exact", (16,)), ("float32", "auto", (32,)),
    ])  # fmt: skip
    def test_what_is_decoded_with(self, dtype: str, weights: str, bits: tuple[int, ...]) -> None:
        stepper = load_engine(tiny_model(), device="cpu", dtype=dtype, decode_weights=weights).stepper
        assert stepper is not None
        assert stepper.bits == bits

    def test_states_do_not_depend_on_it(self, tmp_path: Path) -> None:
        engines = [
            load_engine(tiny_model(), device="cpu", dtype="bfloat16", decode_weights=weights)
            for weights in ("exact", "packed")
        ]
        before = engines[0].encode(1, "", "The lion wanted courage.")
        assert all(engine.stepper for engine in engines)
        for engine in engines:
            after = engine.encode(1, "", "The lion wanted courage.")
            assert all(
                torch.equal(getattr(after, name), getattr(before, name))
                for name in ("keys", "values", "router_keys")
            )
        assert engines[0].fingerprint == engines[1].fingerprint
