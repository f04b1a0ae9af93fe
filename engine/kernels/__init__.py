"""Triton kernels for CUDA devices: pooling, routing, ranking, gathering, decoding and document attention.

One file per kernel holds its plain torch reference, the kernel and one public function that checks its
arguments and launches. This file imports no triton, so that ``usable`` may be asked anywhere; the engine
imports a kernel's file only after the answer was yes.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["usable"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST_HEAD_DIM, LARGEST_HEAD_DIM = 16, 256


def usable(x: Tensor, head_dim: int) -> bool:
    """Whether the kernels can take over work on ``x``, whose heads are ``head_dim`` wide.

    They run on NVIDIA devices, and on the CPU where TRITON_INTERPRET=1 has Triton interpret them. They have
    no backward pass: training goes through ``engine.ops``.
    """
    on_device = x.is_cuda and torch.version.cuda is not None
    return (
        (on_device or os.environ.get("TRITON_INTERPRET") == "1")
        and x.dtype in FLOATS
        and not (torch.is_grad_enabled() and x.requires_grad)
        and head_dim & (head_dim - 1) == 0
        and SMALLEST_HEAD_DIM <= head_dim <= LARGEST_HEAD_DIM
        and find_spec("triton") is not None
    )
