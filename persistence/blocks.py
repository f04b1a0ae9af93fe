"""One passage's states as bytes: a complete safetensors serialisation, stamped with whose it is.

Knows the format only, no file and no catalog. The format is written and read here rather than through the
safetensors package because its byte-level functions change their signature between versions; the tests
read every block back with the package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from msa_memory.errors import StorageError
from msa_memory.types import TensorBytes

__all__ = ["ALIGNMENT", "BLOCK_FORMAT", "BlockError", "aligned", "check_stamp", "pack", "unpack"]

BLOCK_FORMAT = "1"
ALIGNMENT = 8
"""Bytes: every block starts at a multiple of it, and so does the data inside."""

_ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


class BlockError(Exception):
    """A block cannot be read; the message says why, the store adds which document it belongs to."""


def aligned(size_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def pack(states: Mapping[str, TensorBytes], *, bank_id: str, number: int, fingerprint: str) -> bytes:
    """Serialise the states of passage ``number``; StorageError if a tensor's bytes do not fit its shape."""
    names = sorted(states, key=lambda name: (-_ITEM_BYTES.get(states[name].dtype, 0), name))
    header: dict[str, object] = {"__metadata__": _stamp(bank_id, number, fingerprint)}
    parts: list[bytes | memoryview] = []
    offset = 0
    for name in names:
        tensor = states[name]
        data = memoryview(tensor.data).cast("B")
        _check_size(name, tensor, data.nbytes, number)
        end = offset + data.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        parts.append(data)
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head = head.ljust(aligned(len(head)))
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def unpack(block: memoryview) -> tuple[dict[str, str], dict[str, TensorBytes]]:
    """Stamp and tensors of a block; the tensors' data are views of ``block``. BlockError if malformed."""
    try:
        base = 8 + int.from_bytes(block[:8], "little")
        header = json.loads(bytes(block[8:base]))
        stamp = header.pop("__metadata__")
        tensors = {
            name: TensorBytes(
                entry["dtype"], tuple(entry["shape"]), _slice(block, base, entry["data_offsets"])
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BlockError("its header is not a safetensors header") from error
    return stamp, tensors


def check_stamp(stamp: Mapping[str, str], *, bank_id: str, number: int, fingerprint: str | None) -> None:
    """BlockError unless the block belongs to this bank, passage and model."""
    expected = _stamp(bank_id, number, fingerprint or "")
    for key, value in expected.items():
        if stamp.get(key) != value:
            raise BlockError(f"it is stamped with {key} {str(stamp.get(key))[:64]!r}, expected {value!r}")


def _stamp(bank_id: str, number: int, fingerprint: str) -> dict[str, str]:
    return {"format": BLOCK_FORMAT, "bank": bank_id, "passage": str(number), "fingerprint": fingerprint}


def _slice(block: memoryview, base: int, offsets: list[int]) -> memoryview:
    start, end = offsets
    return block[base + start : base + end]


def _check_size(name: str, tensor: TensorBytes, size_bytes: int, number: int) -> None:
    if tensor.dtype not in _ITEM_BYTES:
        raise StorageError(
            f"tensor {name!r} of passage {number} has dtype {tensor.dtype!r}; "
            f"expected one of {sorted(_ITEM_BYTES)}"
        )
    expected = math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]
    if size_bytes != expected:
        raise StorageError(
            f"tensor {name!r} of passage {number} holds {size_bytes} bytes; "
            f"{tensor.dtype} {list(tensor.shape)} needs {expected}"
        )
