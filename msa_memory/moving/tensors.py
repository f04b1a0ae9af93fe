"""Many tensors as one safetensors file in memory, written and strictly read; knows no passage.

Done here because the safetensors package has no bfloat16 without torch; the tests read every file back with
the package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from msa_memory.types import TensorBytes

__all__ = ["ITEM_BYTES", "TensorFileError", "read_tensors", "tensor_file"]

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F64": 8, "I32": 4, "I64": 8}
"""Bytes of one number, by dtype; the dtypes a file may hold."""

_MOST_HEADER_BYTES = 100_000_000  # as in the safetensors package


class TensorFileError(Exception):
    """The bytes are no sound safetensors file; the message says why."""


def tensor_file(tensors: Mapping[str, TensorBytes]) -> Iterator[bytes | memoryview]:
    """The parts of the file, widest dtype first so that every tensor is aligned to its own items."""
    names = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    header, end = {}, 0
    for name in names:
        start, end = end, end + memoryview(tensors[name].data).nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": tensors[name].dtype, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for name in names:
        yield memoryview(tensors[name].data).cast("B")


def read_tensors(data: bytes) -> dict[str, TensorBytes]:
    """Every tensor as a view of ``data``; TensorFileError unless they fill it, one after the other."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, _MOST_HEADER_BYTES):
        raise TensorFileError("its header is longer than the file")
    try:
        header = json.loads(data[8 : 8 + size], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise TensorFileError("its header is not JSON") from error
    if not isinstance(header, dict):
        raise TensorFileError("its header is no JSON object")
    header.pop("__metadata__", None)
    body, found, end = memoryview(data)[8 + size :], {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _start(item[1])):
        tensor = _tensor(name, entry, body, end)
        found[name], end = tensor, end + memoryview(tensor.data).nbytes
    if end != len(body):
        raise TensorFileError(f"its tensors have {end} bytes, the file has {len(body)}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _start(entry: Any) -> int:
    match entry:
        case {"data_offsets": [int() as start, int()]}:
            return start
    raise TensorFileError("a tensor has no data_offsets")


def _tensor(name: str, entry: Any, body: memoryview, expected_start: int) -> TensorBytes:
    match entry:
        case {"dtype": str() as dtype, "shape": list() as shape, "data_offsets": [start, end]}:
            sizes = [
                size for size in shape if isinstance(size, int) and not isinstance(size, bool) and size >= 0
            ]
            if dtype not in ITEM_BYTES or len(sizes) < len(shape) or len(shape) > 8:
                raise TensorFileError(f"tensor {name[:60]!a} has dtype {dtype[:20]!a} and {len(shape)} axes")
            if (
                start != expected_start
                or end - start != math.prod(sizes) * ITEM_BYTES[dtype]
                or end > len(body)
            ):
                raise TensorFileError(f"tensor {name[:60]!a} does not lie where its shape needs it")
            return TensorBytes(dtype, tuple(sizes), body[start:end])
    raise TensorFileError(f"tensor {name[:60]!a} is not described as safetensors does")
