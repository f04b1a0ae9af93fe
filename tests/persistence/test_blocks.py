"""Blocks: what is written is a safetensors file that the safetensors package itself reads."""

import numpy as np
import pytest
import safetensors.numpy

from msa_memory.persistence.blocks import BlockError, check_stamp, pack, unpack
from msa_memory.types import TensorBytes

STAMP = {"bank_id": "b" * 32, "number": 7, "fingerprint": "f" * 64}


def test_the_safetensors_package_reads_a_block():
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5, dtype=np.int8),
        "long": np.arange(3, dtype=np.int64),
        "none": np.zeros((0, 4), dtype=np.float16),
    }
    names = {"float32": "F32", "int8": "I8", "int64": "I64", "float16": "F16"}
    states = {
        name: TensorBytes(names[str(array.dtype)], array.shape, array.tobytes())
        for name, array in arrays.items()
    }
    block = pack(states, **STAMP)
    read = safetensors.numpy.load(block)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
    stamp, tensors = unpack(memoryview(block))
    check_stamp(stamp, **STAMP)
    for name, array in arrays.items():
        tensor = tensors[name]
        assert (tensor.shape, bytes(tensor.data)) == (array.shape, array.tobytes())
        np.frombuffer(tensor.data, dtype=array.dtype)


@pytest.mark.parametrize("wrong", [{"bank_id": "c" * 32}, {"number": 8}, {"fingerprint": "0" * 64}])
def test_a_block_of_another_bank_passage_or_model_is_refused(wrong):
    stamp, _ = unpack(memoryview(pack({}, **STAMP)))
    with pytest.raises(BlockError, match="stamped"):
        check_stamp(stamp, **{**STAMP, **wrong})


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 64, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{}"]
)
def test_what_is_not_a_block_is_a_block_error(data):
    with pytest.raises(BlockError, match="header"):
        unpack(memoryview(data))
