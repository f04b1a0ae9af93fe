"""The states of one passage: what the engine keeps of a text after reading it once.

Knows the shapes and how they travel as plain bytes; not where they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msa_memory.errors import StateDamagedError
from msa_memory.types import TensorBytes

__all__ = ["HeadStates", "PassageStates"]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
_TENSORS = ("keys", "values", "router_keys", "terms")
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class HeadStates:
    """Unpooled keys and values of the template head in every layer: each ``[layers, G, h, D]``."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def first(self, tokens: int) -> HeadStates:
        """The states of the first so many tokens."""
        return HeadStates(self.keys[:, :, :tokens], self.values[:, :, :tokens])


@dataclass(frozen=True, slots=True)
class PassageStates:
    """Pooled states of one passage on its L router layers.

    ``keys`` and ``values`` ``[L, G, C, D]``: chunk means of post-RoPE keys and of values.
    ``router_keys`` ``[L, R, G, D]``: chunk means of routing keys, unit length per head where the model
    scores with cosines; R differs from C when ``router_chunk`` differs from ``chunk``. ``terms``
    ``[terms, 2]`` are hashed words and their counts (``lexical``).
    """

    keys: Tensor
    values: Tensor
    router_keys: Tensor
    terms: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))

    @property
    def chunks(self) -> int:
        return self.keys.shape[2]

    def to_bytes(self) -> dict[str, TensorBytes]:
        """All tensors as safetensors-style bytes."""
        return {name: _to_bytes(getattr(self, name)) for name in _TENSORS}

    @classmethod
    def from_bytes(cls, tensors: Mapping[str, TensorBytes]) -> PassageStates:
        """Rebuild from ``to_bytes``; raises StateDamagedError for missing or misshapen tensors."""
        return cls(*(tensor_from_bytes(tensors, name) for name in _TENSORS))


def tensor_from_bytes(tensors: Mapping[str, TensorBytes], name: str) -> Tensor:
    """One named tensor as an own copy in its stored dtype."""
    found = tensors.get(name)
    if found is None:
        raise StateDamagedError(f"the state block holds {sorted(tensors)}, expected a tensor {name!r}")
    dtype = _DTYPES.get(found.dtype)
    if dtype is None:
        raise StateDamagedError(
            f"state tensor {name!r} has dtype {found.dtype}; expected {', '.join(_DTYPES)}"
        )
    try:
        if not len(found.data):  # which frombuffer refuses
            return torch.empty(0, dtype=dtype).view(found.shape)
        return torch.frombuffer(bytearray(found.data), dtype=dtype).view(found.shape)
    except (RuntimeError, ValueError) as error:
        raise StateDamagedError(f"state tensor {name!r} does not fill its shape {found.shape}") from error


def _to_bytes(tensor: Tensor) -> TensorBytes:
    flat = tensor.detach().cpu().contiguous()
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return TensorBytes(_NAMES[flat.dtype], tuple(flat.shape), data)
