"""Low-rank adapters: small matrices that change a decoder's linear layers.

A layer's weight W ``[out, in]`` becomes ``W + alpha/rank * B @ A`` with A ``[rank, in]`` and B
``[out, rank]`` (LoRA, arXiv 2106.09685). On disk an adapter is one safetensors file with the tensor names
of the Hugging Face ``peft`` library after its prefix. Merging adds in float32 and rounds once to the
decoder's dtype; training computes with that very rounded weight, so what was trained is what runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from msa_memory.engine.decoder import Decoder
from msa_memory.errors import CheckpointError, ConfigError

__all__ = [
    "Adapter",
    "LowRankLinear",
    "TARGETS",
    "adapter_of",
    "attach",
    "continue_from",
    "load_adapter",
    "merge",
]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NAME = re.compile(r"(?P<module>model\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """The matrices of one adapter by the linear layer they change, ``model.layers.N.self_attn.q_proj``.

    ``pairs`` are A ``[rank, in]`` and B ``[out, rank]``; they count ``alpha / rank`` times.
    """

    rank: int
    alpha: float
    pairs: dict[str, tuple[Tensor, Tensor]]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def tensors(self) -> dict[str, Tensor]:
        """By their names in the file."""
        named = {}
        for module, (a, b) in self.pairs.items():
            named[f"{module}.lora_A.weight"] = a
            named[f"{module}.lora_B.weight"] = b
        return named

    def metadata(self) -> dict[str, str]:
        """What the file says beside the tensors."""
        return {"format": "pt", "rank": str(self.rank), "alpha": f"{self.alpha:g}"}


def load_adapter(path: Path) -> Adapter:
    """Read an adapter file.

    Raises:
        CheckpointError: it is damaged, or a tensor's name, shape or partner is not an adapter's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"adapter {path} is damaged or incomplete: {error}") from error
    try:
        rank, alpha = int(metadata["rank"]), float(metadata["alpha"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"adapter {path} has the metadata {metadata}; expected a whole 'rank' and a number 'alpha'"
        ) from error
    return Adapter(rank=rank, alpha=alpha, pairs=_pairs(tensors, rank, path))


def _pairs(tensors: dict[str, Tensor], rank: int, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"adapter {path}: tensor {name!r} is not one of an adapter; expected names such as "
                "'model.layers.0.self_attn.q_proj.lora_A.weight'"
            )
        along = 0 if match["side"] == "A" else 1
        if tensor.dim() != 2 or tensor.shape[along] != rank or not tensor.is_floating_point():
            raise CheckpointError(
                f"adapter {path}: tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected "
                f"floats with {rank} {'rows' if along == 0 else 'columns'}, the adapter's rank"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"adapter {path}: tensor {name!r} holds values that are not finite")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    for module, found in sides.items():
        if missing := {"A", "B"} - found.keys():
            raise CheckpointError(f"adapter {path} lacks the tensor '{module}.lora_{min(missing)}.weight'")
    return {module: (found["A"], found["B"]) for module, found in sides.items()}


@torch.no_grad()
def merge(decoder: Decoder, adapter: Adapter) -> None:
    """Add the adapter to the decoder's weights, in place.

    Raises:
        CheckpointError: the decoder has no such layer, or one of another shape; nothing was changed then.
    """
    weights = {}
    for module, (a, b) in adapter.pairs.items():
        layer = _linear(decoder, module)
        if layer is None or layer.weight.shape != (b.shape[0], a.shape[1]):
            there = "has no such layer" if layer is None else f"has {tuple(layer.weight.shape)} there"
            raise CheckpointError(
                f"adapter tensors of '{module}' make a {b.shape[0]} by {a.shape[1]} change, but the model "
                f"{there}; the adapter belongs to another model"
            )
        weights[module] = layer.weight
    for module, (a, b) in adapter.pairs.items():
        weight = weights[module]
        weight.copy_(_merged(weight, a.to(weight.device), b.to(weight.device), adapter.scale))


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``W + scale * B @ A``: added in float32, rounded once to the weight's dtype."""
    change = b.float() @ a.float()
    return change.mul_(scale).add_(weight).to(weight.dtype)


def _linear(decoder: Decoder, module: str) -> nn.Linear | None:
    try:
        found = decoder.get_submodule(module)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Linear) else None


class LowRankLinear(nn.Module):
    """A frozen linear layer with a trainable adapter, for training.

    The base stays in its own dtype; A and B are float32. ``refresh`` has to follow every change of them:
    forward and backward use the merged weight, exactly as it is after loading.
    """

    weight: Tensor
    merged: Tensor

    def __init__(self, base: nn.Linear, rank: int, alpha: float, random: torch.Generator) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.register_buffer("weight", base.weight.detach(), persistent=False)
        self.bias = base.bias
        out_size, in_size = base.weight.shape
        bound = in_size**-0.5
        start = torch.empty(rank, in_size).uniform_(-bound, bound, generator=random)
        self.lora_a = nn.Parameter(start.to(base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(out_size, rank, device=base.weight.device))
        self.register_buffer("merged", self.weight.clone(), persistent=False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge the adapter as it is now."""
        self.merged = _merged(self.weight, self.lora_a, self.lora_b, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.merged, self.bias)
        out: Tensor = _LowRank.apply(x, self.merged, self.bias, self.lora_a, self.lora_b, self.scale)  # type: ignore[no-untyped-call]
        return out


class _LowRank(torch.autograd.Function):
    """``x @ merged.T + bias`` whose gradients reach A and B without ever forming a whole weight's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, merged: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, merged, a, b)
        ctx.scale = scale
        return F.linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, merged, a, b = ctx.saved_tensors
        to_x = grad @ merged if ctx.needs_input_grad[0] else None
        to_a = (grad @ b.to(grad.dtype)).T @ x
        to_b = grad.T @ (x @ a.to(x.dtype).T)
        return to_x, None, None, to_a.float() * ctx.scale, to_b.float() * ctx.scale, None


def attach(
    decoder: Decoder, targets: Mapping[int, Sequence[str]], *, rank: int, alpha: float, seed: int
) -> dict[str, LowRankLinear]:
    """Freeze the decoder and put trainable adapters on some linear layers, by module name.

    Args:
        targets: of every layer to adapt, which of its linear layers (``TARGETS``).

    Raises:
        ConfigError: a layer or target the model does not have, or a rank below 1.
    """
    random = torch.Generator().manual_seed(seed)
    decoder.requires_grad_(False)
    if rank < 1:
        raise ConfigError(f"rank is {rank}; it must be at least 1")
    attached = {}
    for layer, names in targets.items():
        for target in names:
            block = "self_attn" if target in TARGETS[:4] else "mlp"
            name = f"model.layers.{layer}.{block}.{target}"
            base = _linear(decoder, name)
            if base is None:
                raise ConfigError(
                    f"the model has no linear layer {name!r} to adapt; it has layers 0 to "
                    f"{decoder.config.num_layers - 1}, each with {', '.join(TARGETS)}"
                )
            attached[name] = LowRankLinear(base, rank, alpha, random)
            setattr(decoder.get_submodule(f"model.layers.{layer}.{block}"), target, attached[name])
    return attached


@torch.no_grad()
def continue_from(modules: dict[str, LowRankLinear], adapter: Adapter) -> None:
    """Let attached modules start as an adapter that was trained before; those it lacks start anew.

    Raises:
        ConfigError: it covers further layers, or has another rank or scale; nothing was changed then.
    """
    for name in sorted(adapter.pairs.keys() - modules.keys()):
        raise ConfigError(f"the recipe lacks {name!r}; go on with at least the layers it was trained with")
    for name, (a, b) in adapter.pairs.items():
        module = modules[name]
        if (a.shape, b.shape, adapter.scale) != (module.lora_a.shape, module.lora_b.shape, module.scale):
            raise ConfigError(
                f"the adapter's {name!r} has rank {adapter.rank} and scale {adapter.scale:g}, the recipe "
                f"asks for rank {len(module.lora_a)} and scale {module.scale:g}; they have to be the same"
            )
    for name, (a, b) in adapter.pairs.items():
        module = modules[name]
        module.lora_a.copy_(a)
        module.lora_b.copy_(b)
        module.refresh()


def adapter_of(modules: dict[str, LowRankLinear], rank: int, alpha: float) -> Adapter:
    """What was trained so far, as float32 copies."""
    pairs = {
        name: (module.lora_a.detach().clone(), module.lora_b.detach().clone())
        for name, module in modules.items()
    }
    return Adapter(rank=rank, alpha=alpha, pairs=pairs)
