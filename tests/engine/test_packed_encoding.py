"""Many passages read at once have the states that each has alone."""

import pytest
import torch

pytest.importorskip("triton")

from msa_memory.engine.encoding import encode_passage
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.packed_encoding import encode_packed
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
