"""Many passages read at once have the states that each has alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from msa_memory.engine.encoding import encode_passage
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.packed_encoding import encode_packed, token_batches
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
    """On the device's way in batches by tokens, on the CPU's one by one: numbers, headers and terms too."""
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
