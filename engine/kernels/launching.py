"""What every launcher asks of its tensors and of the device. Knows no kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from msa_memory.engine.kernels import FLOATS, LARGEST_HEAD_DIM, SMALLEST_HEAD_DIM
from msa_memory.errors import EngineError

__all__ = [
    "capability",
    "check_floats",
    "check_head_dim",
    "check_together",
    "jit",
    "multiprocessors",
    "next_power",
]

# Whether CPU tensors may pass; the compile tests set it, for they run the launchers and launch nothing.
INTERPRETED: bool = triton.knobs.runtime.interpret


def jit(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit``; one build serves all values of the ``varying`` integer arguments.

    For other integers Triton builds anew where they are 1 or divisible by 16, in the midst of a question.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        return triton.jit(function, do_not_specialize=varying)

    return compiled


def check_head_dim(head_dim: int) -> None:
    """Raise EngineError for a head width the kernels do not compile for."""
    if head_dim & (head_dim - 1) or not SMALLEST_HEAD_DIM <= head_dim <= LARGEST_HEAD_DIM:
        raise EngineError(
            f"the kernels need a head width that is a power of two from {SMALLEST_HEAD_DIM} to "
            f"{LARGEST_HEAD_DIM}, not {head_dim}; use the plain torch functions of engine.ops for this model"
        )


def capability() -> int:
    """What kernels are compiled for, 80 for sm_80; 0 where they are interpreted."""
    if triton.knobs.runtime.interpret:
        return 0
    return int(triton.runtime.driver.active.get_current_target().arch)


def check_floats(name: str, *tensors: Tensor) -> None:
    """Raise EngineError unless all tensors share one of float32, float16 and bfloat16."""
    found = {tensor.dtype for tensor in tensors}
    if len(found) != 1 or not found <= set(FLOATS):
        seen = ", ".join(sorted(str(dtype) for dtype in found))
        raise EngineError(f"{name} has dtypes {seen}; expected one of {FLOATS}, the same for all")


def check_together(name: str, *tensors: Tensor) -> None:
    """Raise EngineError unless all tensors are on one device the kernels run on.

    That is a CUDA device, or the CPU where TRITON_INTERPRET was set before triton was first imported.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise EngineError(f"{name} spreads over {sorted(map(str, devices))}; move its tensors to one device")
    [device] = devices
    if device.type != "cuda" and not INTERPRETED:
        raise EngineError(
            f"{name} got tensors on {device}; its kernel runs on CUDA devices. Use the function of "
            "engine.ops, or set TRITON_INTERPRET=1 to interpret kernels on the CPU"
        )


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 where kernels are interpreted, one program after another."""
    if device.type != "cuda":
        return 2
    return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())


def next_power(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _mend_interpreter() -> None:
    """Faults of Triton's interpreter, met in 3.6 and 3.7.

    Under NumPy 2.4 its scalars, arrays of one element, are no index for ``range`` (3.6 only). It takes the
    bits of a bfloat16 number for the number in a dot, and an integer for such bits when it casts.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch, dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.create_si_to_fp

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widen(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), *rest)

    def cast_number(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return cast(self, source, target)
        wide = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
        return self.create_fp_trunc(wide, target)

    interpreter._patch_lang_tensor = patch_and_mend
    builder.create_dot, builder.create_si_to_fp = dot_of_numbers, cast_number


if INTERPRETED:
    _mend_interpreter()
