"""The folder of one training run: what is trained, its optimizer, its checkpoint and its metrics.

Trained in float32 whatever the model computes in: weights of another dtype get a float32 master, gradients
are added up in it and the weight is its rounding. A checkpoint holds masters, both moments of the
optimizer and the step; with batches that are a function of their step, a run that was killed and resumed
ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from msa_memory.errors import CheckpointError, ConfigError

__all__ = ["Metrics", "Paused", "Saving", "TrainingRun", "write_tensors"]


class Paused(Exception):
    """The time that was given is over; everything done so far is saved, and the next call goes on."""


class Saving:
    """When to save: every ``every_s`` seconds, at the end and when the ``deadline`` (monotonic) is over."""

    def __init__(self, every_s: float, deadline: float | None) -> None:
        self.every_s, self.deadline = every_s, deadline
        self._last = time.monotonic()

    @property
    def over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def due(self) -> bool:
        """Whether to save now; asked once per step."""
        now = time.monotonic()
        if now - self._last < self.every_s and not self.over:
            return False
        self._last = now
        return True


class TrainingRun:
    """Named parameters under AdamW, resumable from ``out / state.safetensors``.

    ``identity`` stands for recipe and data: a folder with another one is not continued.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        out: Path,
        identity: str,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters, self.out, self.identity = dict(parameters), out, identity
        self.masters = {name: _master(parameter) for name, parameter in self.parameters.items()}
        self.extra: dict[str, Tensor] = {}
        """Tensors of the run's own that travel with the checkpoint; what ``resume`` found."""
        self.optimizer = torch.optim.AdamW(
            self.masters.values(), lr=0.0, betas=betas, weight_decay=weight_decay
        )

    @property
    def state_file(self) -> Path:
        return self.out / "state.safetensors"

    def collect(self) -> None:
        """Add the gradients of a micro-batch to the masters'; those of float32 weights are there already."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float, clip: float | None = None) -> float:
        """Update with what was collected; returns the norm of the gradient before clipping."""
        for master in self.masters.values():
            if master.grad is None:  # so that every parameter has an optimizer state to save
                master.grad = torch.zeros_like(master)
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), float("inf") if clip is None else clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._publish()
        return float(norm)

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def save(self, step: int) -> None:
        """Write the checkpoint, whole or not at all."""
        tensors = {f"extra.{name}": tensor for name, tensor in self.extra.items()}
        for name, master in self.masters.items():
            state = self.optimizer.state[master]
            tensors[name] = master.detach()
            tensors[f"{name}.exp_avg"] = state["exp_avg"]
            tensors[f"{name}.exp_avg_sq"] = state["exp_avg_sq"]
        write_tensors(self.state_file, tensors, {"step": str(step), "run": self.identity})

    def resume(self) -> int:
        """Load the checkpoint if there is one; returns the steps done.

        Raises:
            ConfigError: the folder holds a run with another recipe or other data.
            CheckpointError: its state is damaged.
        """
        if not self.state_file.exists():
            return 0
        try:
            with safe_open(self.state_file, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("run") != self.identity:
                    raise ConfigError(
                        f"{self.out} holds a run with another recipe or other data; name another folder, or "
                        "remove it to start anew"
                    )
                step = int(metadata["step"])
                for name in self.masters:
                    self._load(file, name, step)
                kept = [name for name in file.keys() if name.startswith("extra.")]  # noqa: SIM118 - no mapping
                self.extra = {name.removeprefix("extra."): file.get_tensor(name) for name in kept}
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.state_file} is damaged: {error}; remove it to start anew"
            ) from error
        self._publish()
        return step

    def _load(self, file: Any, name: str, step: int) -> None:
        master = self.masters[name]
        with torch.no_grad():
            master.copy_(file.get_tensor(name))
        self.optimizer.state[master] = {
            "step": torch.tensor(float(step)),
            "exp_avg": file.get_tensor(f"{name}.exp_avg").to(master.device),
            "exp_avg_sq": file.get_tensor(f"{name}.exp_avg_sq").to(master.device),
        }


class Metrics:
    """One JSON line per step; lines of steps that a resumed run takes again are dropped."""

    def __init__(self, path: Path, done: int) -> None:
        kept = []
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= done]
        scratch = path.with_suffix(".partial")
        scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        scratch.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, flushed to disk, whole or not at all."""
    scratch = path.with_suffix(".partial")
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, scratch, metadata=metadata
    )
    scratch.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself where it is float32, else a float32 copy to train in its place."""
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float().clone())
