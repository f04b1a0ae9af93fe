"""Low-rank training of a memory model's upper layers on reading exercises.

The loop is deterministic and resumes at the exact step: rows are a function of their number, nothing is
drawn at run time, and a checkpoint holds adapter, optimizer and step. On one CPU thread, in one dtype, a
run that was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msa_memory.engine.adapter import (
    TARGETS,
    Adapter,
    LowRankLinear,
    adapter_of,
    attach,
    continue_from,
)
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.train.branches import BranchedRow, answer_losses, forward_branches
from msa_memory.engine.train.contrast import RoutedQuestions, routing_loss
from msa_memory.engine.train.run import Metrics, Paused, Saving, TrainingRun, write_tensors
from msa_memory.errors import ConfigError

__all__ = ["AdapterTraining", "evaluate", "read_and_learn", "save_adapter", "train_adapter"]

Rows = Callable[[int], BranchedRow]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTraining:
    """Recipe of one run. ``last_layer`` None means the decoder's last; sizes are rows and tokens.

    Layers from ``attention_from`` to below ``first_layer`` adapt their attention alone: what memory needs of
    them, at a third of the size. ``routed_questions`` per step teach the layers to tell their passages apart
    (``contrast``), which counts ``routing_share``.

    A run that is resumed has to have the same recipe and data, but for where and how often it reports.
    """

    steps: int = 400
    rows_per_step: int = 12
    micro_batch_tokens: int = 1500
    rank: int = 32
    alpha: float = 64.0
    first_layer: int = 8
    attention_from: int | None = None
    last_layer: int | None = None
    targets: tuple[str, ...] = TARGETS
    learning_rate: float = 4e-4
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    routed_questions: int = 0
    routing_share: float = 0.5
    routing_temperature: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows_per_step", "micro_batch_tokens", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if unknown := set(self.targets) - set(TARGETS):
            raise ConfigError(f"targets name {sorted(unknown)}; expected some of {', '.join(TARGETS)}")
        if not 0.0 <= self.warmup < 1.0:
            raise ConfigError(f"warmup is {self.warmup}; it must be a share of the steps from 0 to below 1")

    def layers(self, last: int) -> dict[int, tuple[str, ...]]:
        """What is adapted of every layer, up to layer ``last`` of the model."""
        until = last if self.last_layer is None else self.last_layer
        lower = () if self.attention_from is None else range(self.attention_from, self.first_layer)
        attention = tuple(target for target in self.targets if target in TARGETS[:4])
        return {
            **dict.fromkeys(lower, attention),
            **dict.fromkeys(range(self.first_layer, until + 1), self.targets),
        }

    def rate(self, step: int) -> float:
        """Learning rate of step 1, 2, ...: linear warm-up, then a cosine to zero."""
        rising = max(1, round(self.warmup * self.steps))
        if step <= rising:
            return self.learning_rate * step / rising
        part = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * part))


def train_adapter(
    decoder: Decoder,
    rows: Rows,
    recipe: AdapterTraining,
    out: Path,
    *,
    start: Adapter | None = None,
    routing: Callable[[int], RoutedQuestions] | None = None,
    data: str = "",
    held_out: dict[str, list[BranchedRow]] | None = None,
    evaluate_every: int = 100,
    save_every_s: float = 300.0,
    deadline: float | None = None,
    report: Callable[[int, dict[str, Any]], None] = lambda step, figures: None,
) -> Adapter:
    """Train, or go on with the run in ``out``; the decoder keeps the training modules.

    Writes ``metrics.jsonl``, ``state.safetensors`` (to resume from) and, at every checkpoint and at the
    end, ``adapter.safetensors``.

    Args:
        rows: row number to row; step s uses the rows from ``(s - 1) * rows_per_step`` on.
        start: an earlier adapter to go on from; None: one that changes nothing yet.
        routing: step to its questions and passages, for recipes with ``routed_questions``.
        data: what stands for the data files in the check that a resumed run is the same run.
        held_out: rows per kind for the losses reported every ``evaluate_every`` steps.
        deadline: monotonic time from which no further step begins.
        report: called with the step and its figures.

    Raises:
        Paused: the deadline is over; the next call goes on.
        ConfigError: ``out`` holds a run with another recipe or other data.
        CheckpointError: its state is damaged.
    """
    if recipe.routed_questions and routing is None:
        raise ConfigError("the recipe has routed_questions; name the batches to learn routing from")
    out.mkdir(parents=True, exist_ok=True)
    last = decoder.config.num_layers - 1
    modules = attach(decoder, recipe.layers(last), rank=recipe.rank, alpha=recipe.alpha, seed=recipe.seed)
    if not modules:
        raise ConfigError(
            f"the recipe adapts layers {recipe.first_layer} to {recipe.last_layer or last}, which are none; "
            f"the model has 0 to {last}"
        )
    if start is not None:
        continue_from(modules, start)
    run = _Run(modules, recipe, out, hashlib.sha256(f"{asdict(recipe)}\n{data}".encode()).hexdigest())
    done = run.resume()
    saving = Saving(save_every_s, deadline)
    with Metrics(out / "metrics.jsonl", done) as metrics:
        for step in range(done + 1, recipe.steps + 1):
            started = time.monotonic()
            first = (step - 1) * recipe.rows_per_step
            batch = [rows(number) for number in range(first, first + recipe.rows_per_step)]
            routed = routing(step) if routing is not None and recipe.routed_questions else None
            figures = run.step(decoder, batch, routed, step)
            figures["seconds"] = time.monotonic() - started
            if held_out and (step % evaluate_every == 0 or step == recipe.steps):
                figures["held_out"] = evaluate(decoder, held_out, recipe.micro_batch_tokens)
            metrics.write(step, figures)
            report(step, figures)
            if saving.due() or step == recipe.steps:
                run.save(step)
            if saving.over and step < recipe.steps:
                raise Paused(f"tuning stopped after step {step} of {recipe.steps}")
    return run.adapter()


class _Run:
    """The adapters of a decoder, trained together and checkpointed."""

    def __init__(
        self, modules: dict[str, LowRankLinear], recipe: AdapterTraining, out: Path, identity: str
    ) -> None:
        self.modules, self.recipe, self.out = modules, recipe, out
        parameters = {
            f"{name}.{side}": getattr(module, side)
            for name, module in modules.items()
            for side in ("lora_a", "lora_b")
        }
        self.state = TrainingRun(parameters, out, identity, betas=recipe.betas)

    def step(
        self, decoder: Decoder, batch: Sequence[BranchedRow], routed: RoutedQuestions | None, step: int
    ) -> dict[str, Any]:
        """One update; returns the losses by kind and what was done."""
        by_kind = read_and_learn(decoder, batch, self.recipe.micro_batch_tokens)
        if routed is not None:
            loss = routing_loss(decoder, routed, self.recipe.routing_temperature)
            (loss * self.recipe.routing_share).backward()
            by_kind["routing"] = [float(loss.detach())]
        norm = self.state.step(self.recipe.rate(step), self.recipe.clip)
        self._refresh()
        return {
            "loss": _mean([loss for kind, ls in by_kind.items() if kind != "routing" for loss in ls]),
            "losses": {kind: _mean(losses) for kind, losses in sorted(by_kind.items())},
            "questions": sum(len(row.branches) for row in batch),
            "tokens": sum(map(len, batch)) + (0 if routed is None else len(routed)),
            "gradient_norm": norm,
            "learning_rate": self.recipe.rate(step),
        }

    def adapter(self) -> Adapter:
        return adapter_of(self.modules, self.recipe.rank, self.recipe.alpha)

    def save(self, step: int) -> None:
        """Write the checkpoint; each of its two files appears whole or not at all."""
        self.state.save(step)
        save_adapter(self.adapter(), self.out / "adapter.safetensors", {"step": str(step)})

    def resume(self) -> int:
        """Load the checkpoint if there is one; returns the steps done."""
        step = self.state.resume()
        self._refresh()
        return step

    def _refresh(self) -> None:
        for module in self.modules.values():
            module.refresh()


def read_and_learn(
    decoder: Decoder,
    batch: Sequence[BranchedRow],
    micro_batch_tokens: int,
    *,
    scale: float = 1.0,
    collect: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Add the gradients of a batch's answer losses, ``scale`` times; returns the losses by kind.

    ``collect`` is called after every micro-batch of at most so many tokens.
    """
    total = sum(_weight(b.answer_tokens) * b.answer_tokens for row in batch for b in row.branches)
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for part in _micro_batches(batch, micro_batch_tokens):
        losses = answer_losses(decoder, forward_branches(decoder, part), part)
        weighted = torch.stack([loss.sum() * _weight(len(loss)) for loss in losses]).sum() / total
        (weighted * scale).backward()
        collect()
        _collect(by_kind, part, losses)
    return by_kind


@torch.no_grad()
def evaluate(
    decoder: Decoder, held_out: dict[str, list[BranchedRow]], micro_batch_tokens: int
) -> dict[str, float]:
    """Mean loss per branch of every kind that occurs in these rows."""
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for rows in held_out.values():
        for part in _micro_batches(rows, micro_batch_tokens):
            _collect(by_kind, part, answer_losses(decoder, forward_branches(decoder, part), part))
    return {kind: _mean(losses) for kind, losses in sorted(by_kind.items())}


def save_adapter(adapter: Adapter, path: Path, about: dict[str, str] | None = None) -> None:
    """Write an adapter file in bfloat16, whole or not at all; ``about`` joins its metadata."""
    tensors = {name: tensor.bfloat16() for name, tensor in adapter.tensors().items()}
    write_tensors(path, tensors, {**adapter.metadata(), **(about or {})})


def _micro_batches(rows: Sequence[BranchedRow], tokens: int) -> Iterator[list[BranchedRow]]:
    """Consecutive rows of at most ``tokens`` tokens together; a longer row comes alone."""
    part: list[BranchedRow] = []
    size = 0
    for row in rows:
        if part and size + len(row) > tokens:
            yield part
            part, size = [], 0
        part.append(row)
        size += len(row)
    if part:
        yield part


def _weight(answer_tokens: int) -> float:
    """What a token of an answer counts: between one vote per token and one per answer."""
    return 1.0 / math.sqrt(answer_tokens)


def _collect(by_kind: dict[str, list[float]], rows: Sequence[BranchedRow], losses: Sequence[Tensor]) -> None:
    kinds = [branch.kind for row in rows for branch in row.branches]
    for kind, loss in zip(kinds, losses, strict=True):
        by_kind[kind].append(float(loss.detach().mean()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
