"""Many passages read at once have the states that each has alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from msa_memory.engine.decoder import Decoder
from msa_memory.engine.encoding import encode_passage, encode_passages, rows_apart, token_batches
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.models import DEFAULT_MODEL, resolve
from msa_memory.engine.packed_encoding import encode_packed
from msa_memory.engine.states import PassageStates
from msa_memory.errors import EngineError
from msa_memory.testing import tiny_model

TOLERANCES = {"cpu": 2e-5, "cuda": 1e-3}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def engine(request: pytest.FixtureRequest) -> Engine:
    return load_engine(tiny_model(), device=request.param)


@pytest.mark.parametrize("lengths", [[1], [16, 1, 17], [40, 3, 64, 8]], ids=str)
def test_packed_passages_have_the_states_of_each_alone(engine: Engine, lengths: list[int]) -> None:
    random = torch.Generator().manual_seed(sum(lengths))
    passages = [torch.randint(10, 400, (length,), generator=random).tolist() for length in lengths]
    packed = encode_packed(engine.decoder, passages)
    tolerance = TOLERANCES[engine.decoder.device.type]
    starts = [sum(packed.chunks[:i]) for i in range(len(lengths))]
    router_starts = [sum(packed.router_chunks[:i]) for i in range(len(lengths))]
    for index, ids in enumerate(passages):
        alone = encode_passage(engine.decoder, ids)
        rows = slice(starts[index], starts[index] + packed.chunks[index])
        router_rows = slice(router_starts[index], router_starts[index] + packed.router_chunks[index])
        for found, expected in (
            (packed.keys[:, rows], alone.keys.transpose(1, 2)),
            (packed.values[:, rows], alone.values.transpose(1, 2)),
            (packed.router_keys[:, router_rows], alone.router_keys),
        ):
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert packed.keys.shape[1] == sum(packed.chunks)
    assert packed.router_keys.shape[1] == sum(packed.router_chunks)


def test_batches_without_tokens_are_refused(engine: Engine) -> None:
    for passages in ([], [[1], []]):
        with pytest.raises(EngineError, match="at least one"):
            encode_packed(engine.decoder, passages)


def test_many_passages_are_encoded_as_each_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device's way in batches by tokens, on the CPU's one by one or together without a difference."""
    passages = [(n, "A title. " * (n % 2), f"Ann keeps boat {n} in Oslo. " * (1 + n % 3)) for n in range(7)]
    alone = [engine.encode(*passage) for passage in passages]
    monkeypatch.setattr(Engine, "uses_kernels", False)
    for found, expected in zip(engine.encode_many(passages), alone, strict=True):
        assert found.to_bytes() == expected.to_bytes()
    monkeypatch.setattr(Engine, "uses_kernels", True)
    monkeypatch.setattr("msa_memory.engine.engine.ENCODED_TOKENS", 60)
    together = list(engine.encode_many(passages))
    tolerance = TOLERANCES[engine.decoder.device.type]
    for found, expected in zip(together, alone, strict=True):
        for name in ("keys", "values", "router_keys"):
            one, other = getattr(found, name), getattr(expected, name)
            assert one.device.type == "cpu"
            torch.testing.assert_close(one, other.cpu(), atol=tolerance, rtol=0)
        assert torch.equal(found.terms, expected.terms)
    assert list(engine.encode_many([])) == []


class TestOnACpu:
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return load_engine(tiny_model(), device="cpu", dtype="bfloat16")

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(0, 9))
    def test_passages_read_together_have_the_bits_of_each_alone(
        self, engine: Engine, lengths: list[int], seed: int
    ) -> None:
        if not rows_apart(engine.decoder):
            pytest.skip("this CPU's bfloat16 products depend on what stands beside a row")
        random = torch.Generator().manual_seed(seed)
        passages = [torch.randint(10, 400, (length,), generator=random).tolist() for length in lengths]
        for found, ids in zip(encode_passages(engine.decoder, passages), passages, strict=True):
            assert found.to_bytes() == encode_passage(engine.decoder, ids).to_bytes()

    def test_where_rows_depend_on_others_each_is_read_alone(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[int] = []
        whole = encode_passages

        def counted(decoder: Decoder, passages: list[list[int]]) -> list[PassageStates]:
            read.append(len(passages))
            return whole(decoder, passages)

        monkeypatch.setattr("msa_memory.engine.engine.encode_passages", counted)
        texts = [(n, "", f"Ann keeps boat {n}.") for n in range(3)]
        for apart, expected in ((False, []), (True, [3])):
            monkeypatch.setattr("msa_memory.engine.engine.rows_apart", lambda decoder, apart=apart: apart)
            read.clear()
            assert len(list(engine.encode_many(texts))) == 3
            assert read == expected

    def test_a_trial_sees_products_that_depend_on_their_rows(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = torch.nn.Linear.forward

        def depends(self: torch.nn.Linear, rows: torch.Tensor) -> torch.Tensor:
            return plain(self, rows) * (1 + (len(rows) == 17))

        decoder = load_engine(tiny_model(), device="cpu", dtype="bfloat16").decoder
        monkeypatch.setattr(torch.nn.Linear, "forward", depends)
        assert not rows_apart(decoder)


@pytest.mark.slow
def test_the_default_model_reads_together_what_it_reads_alone() -> None:
    engine = load_engine(resolve(DEFAULT_MODEL), name=DEFAULT_MODEL, device="cpu")
    if not rows_apart(engine.decoder):
        pytest.skip("this CPU's products depend on what stands beside a row")
    texts = [
        (n, "", " ".join(f"The river {n} carries {m} stones." for m in range(n * n))) for n in range(1, 7)
    ]
    for found, passage in zip(engine.encode_many(texts), texts, strict=True):
        assert found.to_bytes() == engine.encode(*passage).to_bytes()


@settings(max_examples=50)
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 12))
def test_batches_hold_all_passages_in_order(lengths: list[int], most: int) -> None:
    passages = [([0] * length, place) for place, length in enumerate(lengths)]
    batches = list(token_batches(passages, most))
    assert [passage for batch in batches for passage in batch] == passages
    sizes = [sum(len(ids) for ids, _ in batch) for batch in batches]
    assert all(size <= most or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    for size, following in zip(sizes, batches[1:], strict=False):
        assert size + len(following[0][0]) > most
