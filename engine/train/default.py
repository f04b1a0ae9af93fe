"""How the default model is made, from the data files to the files that ship, stage by stage.

One call does as much as its time allows and the next goes on: tuning to read and to refuse, routers on half
of the articles that scout for a third tuning, in which layers learn to route, the final routers on the tuned
model, a folder that opens, calibration, and the head that tells whether there is an answer. Stages that are
done, with the same recipe and data, are skipped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from msa_memory.engine.answerability import HEAD_FILE
from msa_memory.engine.fingerprint import fingerprint_files
from msa_memory.engine.models import DEFAULT_MODEL
from msa_memory.engine.train.adapter import AdapterTraining
from msa_memory.engine.train.answerability import AnswerabilityTraining
from msa_memory.engine.train.calibrate import CalibrationOptions
from msa_memory.engine.train.jobs import (
    AdapterJob,
    AnswerabilityJob,
    CalibrateJob,
    RouterJob,
    Tell,
    calibrate_files,
    quiet,
    train_adapter_files,
    train_answerability_files,
    train_router_files,
)
from msa_memory.engine.train.mixture import MixtureOptions
from msa_memory.engine.train.router import RouterTraining
from msa_memory.errors import ConfigError

__all__ = ["DefaultModel", "Recipe", "train_default_model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides about the default model beside its data."""

    read: AdapterTraining = field(default_factory=lambda: AdapterTraining(steps=360))
    read_rows: MixtureOptions = field(default_factory=MixtureOptions)
    recall: AdapterTraining = field(
        default_factory=lambda: AdapterTraining(
            steps=200, rows_per_step=8, micro_batch_tokens=1800, learning_rate=2.5e-4, seed=1
        )
    )
    recall_rows: MixtureOptions = field(
        default_factory=lambda: MixtureOptions(
            window=220, row_tokens=900, absent_rows=0.45, alone_rows=0.5, seed=1
        )
    )
    scouts: RouterTraining = field(default_factory=lambda: RouterTraining(steps=300))
    route: AdapterTraining = field(
        default_factory=lambda: AdapterTraining(
            steps=180,
            rows_per_step=5,
            micro_batch_tokens=1800,
            attention_from=0,
            learning_rate=5e-4,
            routed_questions=32,
            routing_share=1.0,
            seed=2,
        )
    )
    route_rows: MixtureOptions = field(
        default_factory=lambda: MixtureOptions(
            window=160, row_tokens=640, absent_rows=0.45, alone_rows=0.5, seed=2
        )
    )
    chats: int = 240
    route_chats: int = 60
    routers: RouterTraining = field(default_factory=RouterTraining)
    lexical: bool = False
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    answerability: AnswerabilityTraining = field(default_factory=AnswerabilityTraining)


@dataclass(frozen=True, kw_only=True, slots=True)
class DefaultModel:
    """Where the data is and where the work goes; ``teacher`` is the folder of a text embedder or None."""

    data: Path
    work: Path
    recipe: Recipe = field(default_factory=Recipe)
    model: str = DEFAULT_MODEL
    teacher: Path | None = None
    device: str = "auto"
    deadline: float | None = None

    def files(self, *names: str) -> list[Path]:
        """Data files by the first part of their names. Raises ConfigError if one is missing."""
        found = []
        for name in names:
            path = next(
                (p for p in (self.data / f"{name}.jsonl.gz", self.data / f"{name}.jsonl") if p.is_file()),
                None,
            )
            if path is None:
                raise ConfigError(
                    f"{self.data} has no {name}.jsonl.gz; it is needed to train the default model"
                )
            found.append(path)
        return found


def train_default_model(job: DefaultModel, tell: Tell = quiet) -> Path:
    """Do what is left to do; returns the folder with the files that ship.

    Raises:
        Paused: the job's deadline is over; the next call goes on.
        ConfigError: a data file is missing.
    """
    passages, questions, unanswerable = (
        job.files(name) for name in ("train_passages", "train_qa", "unanswerable_qa")
    )
    given = fingerprint_files([*passages, *questions, *unanswerable])
    recipe, work = job.recipe, job.work
    common: dict[str, Any] = {
        "passages": passages,
        "questions": questions,
        "model": job.model,
        "device": job.device,
        "deadline": job.deadline,
    }

    def tune(name: str, rows: MixtureOptions, training: AdapterTraining, given: str, **more: Any) -> str:
        adapter = AdapterJob(
            **common, **more, unanswerable=unanswerable, out=work / name, recipe=training, mixture=rows
        )
        about = [given, asdict(training), asdict(rows), adapter.chats, adapter.chunk]
        return _stage(adapter.out, about, partial(train_adapter_files, adapter, tell))

    def teach(name: str, training: RouterTraining, given: str, **more: Any) -> str:
        routers = RouterJob(
            **common, **more, out=work / name, lexical=recipe.lexical, teacher=job.teacher, recipe=training
        )
        about = [given, asdict(training), recipe.lexical, str(job.teacher is not None)]
        return _stage(routers.out, about, partial(train_router_files, routers, tell))

    read, recall, route = (work / name / "adapter.safetensors" for name in ("read", "recall", "route"))
    given = tune("read", recipe.read_rows, recipe.read, given, chats=recipe.chats)
    given = tune("recall", recipe.recall_rows, recipe.recall, given, chats=recipe.chats, start=read)
    given = teach("scouts", recipe.scouts, given, scouts=True, adapter=recall, work=work / "scouts-hidden")
    given = tune(
        "route",
        recipe.route_rows,
        recipe.route,
        given,
        chats=recipe.route_chats,
        start=recall,
        routers=work / "scouts",
    )
    given = teach("routers", recipe.routers, given, adapter=route, work=work / "hidden")
    routed = {**common, "routers": work / "routers", "adapter": route}
    calibration = CalibrateJob(**routed, out=work / "calibrated", options=recipe.calibration)
    about = [given, asdict(recipe.calibration)]
    given = _stage(calibration.out, about, partial(calibrate_files, calibration, tell))
    judge = AnswerabilityJob(**routed, out=work / "answerability", recipe=recipe.answerability)
    about = [given, asdict(recipe.answerability)]
    _stage(judge.out, about, partial(train_answerability_files, judge, tell))
    return _result(job, route)


def _stage(folder: Path, about: list[Any], do: Callable[[], Any]) -> str:
    """Do a stage unless it was done the same way; returns a digest of all that led here."""
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    mark = folder / "done"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != digest:
        folder.mkdir(parents=True, exist_ok=True)
        do()
        mark.write_text(digest, encoding="utf-8")
    return digest


def _result(job: DefaultModel, tuned: Path) -> Path:
    """The files that ship, side by side; written anew at every call, which takes no time."""
    folder = job.work / job.model.rsplit("/", 1)[-1]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("router.json", "router.safetensors", HEAD_FILE):
        shutil.copyfile(job.work / "routers" / name, folder / name)
    shutil.copyfile(tuned, folder / "adapter.safetensors")
    return folder
