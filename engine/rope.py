"""Rotary position embedding: frequencies per rope type and the half-split rotation.

Follows the definitions that Llama, Qwen2 and Qwen3 checkpoints are trained with (RoFormer, arXiv
2104.09864; YaRN, arXiv 2309.00071; the NTK and llama3 scalings as published with their checkpoints).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msa_memory.engine.config import RopeConfig

__all__ = ["Rope", "apply_rope"]


class Rope:
    """Cosine and sine tables for given positions; frequencies are float32 on the module's device."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        self.config = config
        self.head_dim = head_dim
        self.inv_freq, self.attention_scale = _frequencies(config, head_dim)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each ``[N, D]`` in ``dtype``, for integer ``positions`` ``[N]``."""
        inv_freq = self.inv_freq.to(positions.device)
        if self.config.kind == "dynamic":
            inv_freq = self._dynamic(positions)
        angles = positions.float()[:, None] * inv_freq[None, :]  # [N, D/2]
        angles = torch.cat((angles, angles), dim=-1)  # [N, D]
        return (
            (angles.cos() * self.attention_scale).to(dtype),
            (angles.sin() * self.attention_scale).to(dtype),
        )

    def _dynamic(self, positions: Tensor) -> Tensor:
        limit, factor = self.config.original_max_positions, self.config.factor
        length = max(int(positions.max()) + 1, limit)
        growth = factor * length / limit - (factor - 1)
        theta = self.config.theta * growth ** (self.head_dim / (self.head_dim - 2))
        return _base_frequencies(theta, self.head_dim).to(positions.device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` ``[N, H, D]`` by ``cos``, ``sin`` ``[N, D]`` (first half paired with second half)."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None, :] + rotated * sin[:, None, :]


def _base_frequencies(theta: float, dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim)


def _frequencies(config: RopeConfig, dim: int) -> tuple[Tensor, float]:
    base = _base_frequencies(config.theta, dim)
    if config.kind == "linear":
        return base / config.factor, 1.0
    if config.kind == "yarn":
        return _yarn(config, dim), _yarn_scale(config)
    if config.kind == "llama3":
        return _llama3(config, base), 1.0
    return base, 1.0


def _yarn(config: RopeConfig, dim: int) -> Tensor:
    """Blend interpolated and original frequencies by how often each turns within the trained context."""

    def dim_of(rotations: float) -> float:
        turns = config.original_max_positions / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dim_of(config.beta_fast), dim_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
    base = _base_frequencies(config.theta, dim)
    return base / config.factor * ramp + base * (1 - ramp)


def _yarn_scale(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor

    def scale(mscale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * mscale * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)


def _llama3(config: RopeConfig, base: Tensor) -> Tensor:
    wavelength = 2 * math.pi / base
    long = config.original_max_positions / config.low_freq_factor
    short = config.original_max_positions / config.high_freq_factor
    smooth = (config.original_max_positions / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - smooth) * base / config.factor + smooth * base
    scaled = torch.where(wavelength > long, base / config.factor, base)
    middle = (wavelength <= long) & (wavelength >= short)
    return torch.where(middle, blended, scaled)
