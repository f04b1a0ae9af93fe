"""Training a memory model end to end in the paper's phases (arXiv 2603.23516, section 3.3).

First the routers (0.1 of the language model's loss and all of the routers' own), then the language model
(its loss and 0.1 of the routers'), then answering questions over a memory that grows, with reading
exercises in between. What is trained is everything, the upper layers, or low-rank adapters on them; the
routers always are. Rows are a function of their number: a run that was killed goes on at the exact step.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from msa_memory.engine.adapter import TARGETS, LowRankLinear, attach
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.train.adapter import evaluate, read_and_learn
from msa_memory.engine.train.branches import BranchedRow
from msa_memory.engine.train.forward import PackedOutput, forward_packed
from msa_memory.engine.train.losses import IGNORED, training_loss
from msa_memory.engine.train.packing import Example
from msa_memory.engine.train.run import Metrics, Paused, Saving, TrainingRun
from msa_memory.errors import ConfigError

__all__ = ["FullTraining", "Phase", "TrainingRows", "phases", "train_full"]

Trainables = Literal["all", "upper", "low-rank"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One stretch of steps with its own rate, losses and data.

    ``lm`` and ``aux`` weigh the losses of language and routers; ``documents`` says whether the language
    model also learns from the memory's own tokens. ``memory_tokens`` is the size of a row's memory,
    ``reading`` the share of rows that are reading exercises instead.
    """

    name: str
    steps: int
    learning_rate: float
    lm: float = 1.0
    aux: float = 0.1
    memory_tokens: int = 4096
    documents: bool = False
    reading: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.memory_tokens < 1 or self.learning_rate <= 0:
            raise ConfigError(
                f"phase {self.name!r} has {self.steps} steps, {self.memory_tokens} memory tokens, the rate "
                f"{self.learning_rate}; expected at least 0, at least 1 and above 0"
            )

    def rate(self, step: int, warmup: float) -> float:
        """Learning rate of the phase's step 1, 2, ...: linear warm-up, then a cosine to a tenth."""
        rising = max(1, round(warmup * self.steps))
        if step <= rising:
            return self.learning_rate * step / rising
        part = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * part)))


def phases(
    router_steps: int = 500,
    joint_steps: int = 1000,
    tuning: Sequence[tuple[int, int]] = ((8192, 500), (65536, 100)),
    *,
    memory_tokens: int = 4096,
) -> tuple[Phase, ...]:
    """The paper's phases with so many steps; ``tuning`` are memory sizes and steps."""
    return (
        Phase(
            name="routers",
            steps=router_steps,
            learning_rate=1e-4,
            lm=0.1,
            aux=1.0,
            memory_tokens=memory_tokens,
            documents=True,
        ),
        Phase(
            name="joint", steps=joint_steps, learning_rate=6e-6, memory_tokens=memory_tokens, documents=True
        ),
        *(
            Phase(
                name=f"tuning over {tokens}",
                steps=steps,
                learning_rate=6e-6,
                memory_tokens=tokens,
                reading=0.5,
            )
            for tokens, steps in tuning
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FullTraining:
    """Recipe of one run; ``rank``, ``alpha`` and ``targets`` count for low-rank training only.

    ``recompute`` keeps no activations but the layers' inputs, which are computed again on the way back.
    """

    phases: tuple[Phase, ...] = field(default_factory=phases)
    trainables: Trainables = "all"
    rows_per_step: int = 8
    micro_batch_tokens: int = 8192
    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = TARGETS
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    recompute: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trainables not in ("all", "upper", "low-rank"):
            raise ConfigError(f"trainables is {self.trainables!r}; expected 'all', 'upper' or 'low-rank'")
        for name in ("rows_per_step", "micro_batch_tokens", "rank", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def steps(self) -> int:
        """Of all phases together."""
        return sum(phase.steps for phase in self.phases)

    def at(self, step: int) -> tuple[Phase, int]:
        """The phase that step 1, 2, ... of the run lies in, and its number there."""
        for phase in self.phases:
            if step <= phase.steps:
                return phase, step
            step -= phase.steps
        raise ConfigError(f"the run has {self.steps} steps; there is no step beyond")


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Where rows come from: examples by number and memory size, and reading exercises by number."""

    example: Callable[[int, int], Example]
    reading: Callable[[int], BranchedRow] | None = None
    held_out: Sequence[Example] = field(default_factory=tuple)
    held_out_reading: dict[str, list[BranchedRow]] = field(default_factory=dict)

    def of_step(self, step: int, phase: Phase, count: int) -> tuple[list[Example], list[BranchedRow]]:
        examples, reading = [], []
        for number in range((step - 1) * count, step * count):
            if self.reading is not None and random.Random(f"reading:{number}").random() < phase.reading:
                reading.append(self.reading(number))
            else:
                examples.append(self.example(number, phase.memory_tokens))
        return examples, reading


def train_full(
    decoder: Decoder,
    rows: TrainingRows,
    recipe: FullTraining,
    out: Path,
    *,
    data: str = "",
    evaluate_every: int = 100,
    save_every_s: float = 600.0,
    deadline: float | None = None,
    report: Callable[[int, dict[str, Any]], None] = lambda step, figures: None,
) -> dict[str, LowRankLinear]:
    """Train the decoder in place, or go on with the run in ``out``; returns its adapters, if it has any.

    Writes ``metrics.jsonl`` and ``state.safetensors`` (to resume from) to ``out``.

    Raises:
        Paused: the ``deadline`` (monotonic) is over; the next call goes on.
        ConfigError: ``out`` holds a run with another recipe or other data, or the decoder has no routers.
        CheckpointError: its state is damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(decoder, recipe, out, hashlib.sha256(f"{asdict(recipe)}\n{data}".encode()).hexdigest())
    done = trainer.resume()
    saving = Saving(save_every_s, deadline)
    with Metrics(out / "metrics.jsonl", done) as metrics:
        for step in range(done + 1, recipe.steps + 1):
            started = time.monotonic()
            figures = trainer.step(rows, step)
            figures["seconds"] = time.monotonic() - started
            if step % evaluate_every == 0 or step == recipe.steps:
                figures["held_out"] = trainer.evaluate(rows)
            metrics.write(step, figures)
            report(step, figures)
            if saving.due() or step == recipe.steps:
                trainer.state.save(step)
            if saving.over and step < recipe.steps:
                raise Paused(f"training stopped after step {step} of {recipe.steps}")
    return trainer.adapters


class _Trainer:
    """The decoder, what of it is trained, and one step."""

    def __init__(self, decoder: Decoder, recipe: FullTraining, out: Path, identity: str) -> None:
        if decoder.msa is None:
            raise ConfigError("this model has no memory routers: convert it with `msa-memory models convert`")
        self.decoder, self.recipe, self.msa = decoder, recipe, decoder.msa
        self.adapters: dict[str, LowRankLinear] = {}
        decoder.recompute = recipe.recompute
        parameters = self._choose()
        for parameter in parameters.values():
            parameter.requires_grad_()
        self.state = TrainingRun(
            parameters, out, identity, betas=recipe.betas, weight_decay=recipe.weight_decay
        )

    def _choose(self) -> dict[str, nn.Parameter]:
        """The parameters to train, by name; everything else is frozen."""
        decoder, recipe = self.decoder, self.recipe
        half = decoder.config.num_layers // 2
        decoder.requires_grad_(False)
        if recipe.trainables == "low-rank":
            adapted = dict.fromkeys(range(half, decoder.config.num_layers), recipe.targets)
            self.adapters = attach(decoder, adapted, rank=recipe.rank, alpha=recipe.alpha, seed=recipe.seed)
        upper = tuple(f"model.layers.{layer}." for layer in range(half, decoder.config.num_layers))
        wanted: dict[str, Callable[[str], bool]] = {
            "all": lambda name: True,
            "upper": lambda name: ".router_" in name or name.startswith((*upper, "model.norm.")),
            "low-rank": lambda name: ".router_" in name or ".lora_" in name,
        }
        return {
            name: parameter
            for name, parameter in decoder.named_parameters()
            if wanted[recipe.trainables](name)
        }

    def resume(self) -> int:
        step = self.state.resume()
        self._refresh()
        return step

    def _refresh(self) -> None:
        for module in self.adapters.values():
            module.refresh()

    def step(self, rows: TrainingRows, step: int) -> dict[str, Any]:
        """One update; returns the losses and what was done."""
        phase, number = self.recipe.at(step)
        examples, reading = rows.of_step(step, phase, self.recipe.rows_per_step)
        figures: dict[str, Any] = {"phase": phase.name}
        tally = _Tally()
        for part in self._parts(examples):
            output, losses = self._run(part, phase)
            (losses.total * len(part) / self.recipe.rows_per_step).backward()
            self.state.collect()
            tally.add(part, output, losses.lm, losses.router)
        if reading:
            by_kind = read_and_learn(
                self.decoder,
                reading,
                self.recipe.micro_batch_tokens,
                scale=phase.lm * len(reading) / self.recipe.rows_per_step,
                collect=self.state.collect,
            )
            figures["reading"] = {kind: sum(each) / len(each) for kind, each in sorted(by_kind.items())}
        rate = phase.rate(number, self.recipe.warmup)
        norm = self.state.step(rate, self.recipe.clip)
        self._refresh()
        tokens = sum(len(example.row) for example in examples) + sum(map(len, reading))
        return {
            **figures,
            **tally.means(),
            "tokens": tokens,
            "gradient_norm": norm,
            "learning_rate": rate,
        }

    def _run(self, part: Sequence[Example], phase: Phase) -> tuple[PackedOutput, Any]:
        output = forward_packed(self.decoder, [example.row for example in part])
        labels = [_labels(example, documents=phase.documents) for example in part]
        losses = training_loss(
            output,
            self.msa,
            num_layers=self.decoder.config.num_layers,
            first_layer=None if self.msa.evidence == "generative" else 0,
            labels=labels,
            relevant=[example.relevant for example in part],
            weights={"lm": phase.lm, "aux": phase.aux},
        )
        return output, losses

    def _parts(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Consecutive examples of at most ``micro_batch_tokens`` together; a longer one comes alone."""
        part: list[Example] = []
        for example in examples:
            if part and sum(len(e.row) for e in part) + len(example.row) > self.recipe.micro_batch_tokens:
                yield part
                part = []
            part.append(example)
        if part:
            yield part

    @torch.no_grad()
    def evaluate(self, rows: TrainingRows) -> dict[str, float]:
        """Losses and recall of the held-out rows, answers only."""
        tally, phase = _Tally(), Phase(name="held out", steps=1, learning_rate=1.0)
        for part in self._parts(rows.held_out):
            output, losses = self._run(part, phase)
            tally.add(part, output, losses.lm, losses.router)
        reading = evaluate(self.decoder, rows.held_out_reading, self.recipe.micro_batch_tokens)
        return {**tally.means(), **{f"reading {kind}": loss for kind, loss in reading.items()}}


class _Tally:
    """Means over the rows of several micro-batches."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.rows = 0

    def add(
        self,
        part: Sequence[Example],
        output: PackedOutput,
        lm: torch.Tensor | None,
        router: torch.Tensor | None,
    ) -> None:
        assert lm is not None
        assert router is not None
        found = {"lm": float(lm.detach()), "aux": float(router.detach()), "recall@1": _recall(part, output)}
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * len(part)
        self.rows += len(part)

    def means(self) -> dict[str, float]:
        return {name: value / self.rows for name, value in self.sums.items()}


def _labels(example: Example, *, documents: bool) -> Sequence[int]:
    if not documents:
        return example.answer
    return [
        said if said != IGNORED else read
        for said, read in zip(example.answer, example.documents, strict=True)
    ]


def _recall(part: Sequence[Example], output: PackedOutput) -> float:
    """Share of rows whose best document, by the mean over the router layers, is a relevant one."""
    mean = torch.stack(list(output.doc_scores.values())).detach().mean(0)  # [R, documents + 1]
    best = mean.argmax(1).tolist()
    right = sum(example.relevant[int(at) - 1] for example, at in zip(part, best, strict=True))
    return right / len(part)
