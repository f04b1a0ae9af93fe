"""Small tables from the host to a device, without the host waiting for the device. Knows tensors only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["sent", "sent_numbers"]


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device; it goes to a CUDA device by way of pinned memory, in the stream's order."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def sent_numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers as int64 ``[N]`` on a device."""
    return sent(torch.tensor(values, dtype=torch.int64), device)
