"""What the training commands do, from files to files: routers, adapters, full training, questions.

Each job is deterministic given its files and settings, goes on where an interrupted one stopped, and tells
its progress through one callback: (label, done, total, note).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from msa_memory.engine.adapter import adapter_of, load_adapter
from msa_memory.engine.answerability import HEAD_FILE, save_head
from msa_memory.engine.checkpoint import Checkpoint, open_checkpoint
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.convert import convert
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.fingerprint import fingerprint_files
from msa_memory.engine.layout import Layout
from msa_memory.engine.models import DEFAULT_MODEL, resolve
from msa_memory.engine.train.adapter import AdapterTraining, train_adapter
from msa_memory.engine.train.answerability import (
    AnswerabilityTraining,
    article_lessons,
    collect,
    fit,
    note_lesson,
)
from msa_memory.engine.train.branches import BranchedRow
from msa_memory.engine.train.calibrate import CalibrationOptions, calibrate
from msa_memory.engine.train.chat import own_answers, plain_prompts
from msa_memory.engine.train.contrast import RoutingExercises
from msa_memory.engine.train.data import read_passages, read_questions
from msa_memory.engine.train.exercises import Exercises, held_out, read_unanswerable, scouted
from msa_memory.engine.train.fidelity import CHUNKS, REMEMBERING, TUNING, fidelity
from msa_memory.engine.train.full import FullTraining, TrainingRows, train_full
from msa_memory.engine.train.layer_weights import LEAST_QUESTIONS, fit_layer_weights, score_layers
from msa_memory.engine.train.mixture import HELD_OUT_INJECTIONS, Chat, Mixture, MixtureOptions
from msa_memory.engine.train.packing import Examples
from msa_memory.engine.train.router import (
    RouterHeads,
    RouterTask,
    RouterTraining,
    recall,
    save_router,
    score_documents,
    train_router,
)
from msa_memory.engine.train.routing_data import RoutingData, RoutingReader, header
from msa_memory.engine.train.saving import decoder_tensors, save_model, save_with_routers, write_json
from msa_memory.engine.train.teacher import Teacher, cached_embeddings
from msa_memory.engine.train.words import word_scores
from msa_memory.errors import ConfigError

__all__ = [
    "AdapterJob",
    "AnswerabilityJob",
    "CalibrateJob",
    "FidelityJob",
    "FullJob",
    "RouterJob",
    "Tell",
    "calibrate_files",
    "examination",
    "measure_fidelity",
    "open_engine",
    "quiet",
    "reading_exercises",
    "router_settings",
    "train_adapter_files",
    "train_answerability_files",
    "train_full_files",
    "train_router_files",
]

Tell = Callable[[str, int, int, str], None]
MOST_WEIGHED = 1000
"""Held-out questions that the layers are weighed on."""


def quiet(label: str, done: int, total: int, note: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterJob:
    """Files and settings of one router training; None means as the model has it.

    ``adapter`` is a file to encode with, True for the model's own, False for none. ``lexical`` lets the
    words join the score that is judged, ``teacher`` is the folder of a text embedder to learn from;
    ``scouts`` learn from half of the articles (``exercises.scouted``).
    """

    passages: Sequence[Path]
    questions: Sequence[Path]
    out: Path
    work: Path
    model: str = DEFAULT_MODEL
    adapter: Path | bool = True
    layers: tuple[int, ...] | None = None
    router_chunk: int | None = None
    chunk: int | None = None
    top_k: int | None = None
    lexical: bool = False
    teacher: Path | None = None
    scouts: bool = False
    dev_passages: Sequence[Path] = ()
    dev_questions: Sequence[Path] = ()
    device: str = "auto"
    recipe: RouterTraining = field(default_factory=RouterTraining)
    deadline: float | None = None
    """Monotonic time from which nothing further is begun; the job then goes on at the next call."""

    def __post_init__(self) -> None:
        if bool(self.dev_passages) != bool(self.dev_questions):
            raise ConfigError("an evaluation needs both passages and questions; one of them is missing")

    def settings(self, own: MSAConfig) -> MSAConfig:
        """The model's settings with what the job changes, scored as the quick path trains."""
        changes = {
            "router_layers": self.layers,
            "router_chunk": self.router_chunk,
            "chunk": self.chunk,
            "top_k": self.top_k,
        }
        return own.with_options(
            **{name: value for name, value in changes.items() if value is not None},
            decouple_router=True,
            router_normalize=True,
            head_reduce="mean",
            query_reduce="max",
            chunk_reduce="max",
            aux_loss_method="INFONCE_DECOUPLE",
            infonce_temperature=self.recipe.temperature,
        )


def open_engine(
    model: str, work: Path, *, device: str = "auto", adapter: Path | bool = True
) -> tuple[Engine, Checkpoint]:
    """A model and the checkpoint it is in; one without routers gets random ones, in a copy under ``work``."""
    checkpoint = open_checkpoint(resolve(model))
    if model == DEFAULT_MODEL:
        return load_engine(checkpoint.path, name=model, device=device, adapter=adapter), checkpoint
    if checkpoint.config.get("msa_config") is None:
        target = work / "converted"
        if not (target / "config.json").is_file():
            convert(checkpoint.path, target)
        checkpoint = open_checkpoint(target)
    return load_engine(checkpoint.path, device=device, adapter=adapter), checkpoint


def router_settings(
    msa: MSAConfig, layout: Layout, calibration: dict[str, float] | None = None
) -> dict[str, Any]:
    """``msa_config`` as a checkpoint or router.json states it."""
    own = Layout().as_dict()
    strings = {name: text for name, text in layout.as_dict().items() if text != own[name]}
    return {
        "router_layer_idx": ",".join(map(str, msa.router_layers)),
        "top_k_docs": msa.top_k,
        "pooling_kernel_size": msa.chunk,
        "router_chunk": msa.router_chunk,
        "decouple_router": msa.decouple_router,
        "router_normalize": msa.router_normalize,
        "head_reduce_method": msa.head_reduce,
        "query_reduce_method": msa.query_reduce,
        "chunk_reduce_method": msa.chunk_reduce,
        "aux_loss_method": msa.aux_loss_method,
        "infonce_loss_temp": msa.infonce_temperature,
        "positions": msa.positions,
        "evidence": msa.evidence,
        **({"router_layer_weights": list(msa.layer_weights)} if msa.layer_weights else {}),
        **({"calibration": calibration} if calibration else {}),
        **({"layout": strings} if strings else {}),
    }


def train_router_files(job: RouterJob, tell: Tell = quiet) -> dict[str, Any]:
    """Train routers; writes router.safetensors, router.json, metrics.jsonl and training.json to ``out``.

    Returns:
        What training.json says: recipe, settings and the figures on the evaluation files.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    engine, source = open_engine(job.model, job.work, device=job.device, adapter=job.adapter)
    msa = job.settings(engine.msa)
    reader = RoutingReader(
        engine,
        msa,
        job.work,
        lambda what, done, total: tell(f"Encoding {what}", done, total, ""),
        job.deadline,
    )
    train, kept = _keep_some(reader.read(job.passages, job.questions), job.scouts)
    dev = reader.read(job.dev_passages, job.dev_questions, always_titled=True) if job.dev_passages else None
    task = _router_task(job, train, tell)
    torch.manual_seed(job.recipe.seed)
    heads = RouterHeads.like(
        engine.decoder.config, len(msa.router_layers), lexical_weight=job.recipe.lexical_weight
    ).to(engine.decoder.device)
    files = [*job.passages, *job.questions]
    if job.teacher is not None:
        files.append(job.teacher / "model.safetensors")
    train_router(
        heads,
        task,
        job.recipe,
        job.out,
        data=f"{fingerprint_files(files)} {reader.cache.weights} {msa} {len(train.asked)}",
        examine=None if dev is None else lambda: _router_recall(heads, dev),
        deadline=job.deadline,
        report=lambda step, figures: tell("Training routers", step, job.recipe.steps, _router_note(figures)),
    )
    save_router(heads, msa.router_layers, job.out / "router.safetensors", job.recipe)
    msa = msa.with_options(layer_weights=_weigh_layers(heads, kept))
    figures = {} if dev is None else _evaluate(heads, dev, msa.layer_weights)
    calibration = {name: value for name, value in engine.calibration.items() if name != "min_score"}
    if job.lexical:
        calibration["lexical_weight"] = round(heads.lexical_weight, 3)
    settings = router_settings(msa, engine.prompt.layout, calibration)
    write_json(job.out / "router.json", settings)
    record = {"recipe": asdict(job.recipe), "settings": settings, "dev": figures}
    write_json(job.out / "training.json", record)
    if job.model != DEFAULT_MODEL:
        own = job.adapter if isinstance(job.adapter, Path) else _beside(source.path) if job.adapter else None
        save_with_routers(job.out / "model", source, job.out / "router.safetensors", settings, own)
    return record


def _beside(checkpoint: Path) -> Path | None:
    """The adapter in a checkpoint's folder."""
    found = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "adapter.safetensors"
    return found if found.is_file() else None


def _router_task(job: RouterJob, data: RoutingData, tell: Tell) -> RouterTask:
    texts = [header(passage, False) + passage.text for passage in data.passages]
    asked = [question.text for question in data.asked]
    words = teacher = None
    if job.lexical:
        words = word_scores(texts, asked, lambda done: tell("Scoring words", done, len(asked), ""))
    if job.teacher is not None:
        master = Teacher.open(job.teacher)
        teacher = (
            cached_embeddings(master, asked, job.work, lambda n: tell("Teacher", n, len(asked), "questions")),
            cached_embeddings(master, texts, job.work, lambda n: tell("Teacher", n, len(texts), "passages")),
        )
    titles = [data.passages[places[0]].title for places in data.gold]
    articles = [title or f"\0{item}" for item, title in enumerate(titles)]
    return RouterTask(data.questions, data.documents, data.gold, words, teacher, articles)


def _keep_some(data: RoutingData, scouts: bool) -> tuple[RoutingData, RoutingData | None]:
    """The questions to learn from, and those about held-out articles to weigh the layers on.

    The latter with their articles' passages alone; None where they are too few and all are learned from.
    """
    if scouts:
        known = {place for place, passage in enumerate(data.passages) if scouted(passage)}
        data = data.of_questions([item for item, right in enumerate(data.gold) if known >= set(right)])
    places = [place for place, passage in enumerate(data.passages) if held_out(passage)]
    kept = data.of_passages(places)
    if len(kept.asked) < LEAST_QUESTIONS:
        return data, None
    out = set(places)
    learned = [item for item, right in enumerate(data.gold) if not out & set(right)]
    return data.of_questions(learned), kept


def _weigh_layers(heads: RouterHeads, kept: RoutingData | None) -> tuple[float, ...]:
    if kept is None:
        return ()
    items = range(0, len(kept.asked), -(-len(kept.asked) // MOST_WEIGHED))
    scores = score_layers(heads, kept.questions, kept.documents, items)
    return fit_layer_weights(scores.cpu(), [kept.gold[item] for item in items])


def _router_recall(heads: RouterHeads, dev: RoutingData) -> dict[str, float]:
    return recall(score_documents(heads, dev.questions, dev.documents, range(len(dev.gold))), dev.gold)


def _router_note(figures: dict[str, Any]) -> str:
    shown = figures.get("held_out", {"loss": figures["loss"]})
    return ("held out: " if "held_out" in figures else "") + ", ".join(
        f"{k} {v:.3f}" for k, v in shown.items()
    )


def _evaluate(heads: RouterHeads, dev: RoutingData, weights: tuple[float, ...]) -> dict[str, Any]:
    """Recall of the routers alone, of the words alone and of both with the heads' weight."""
    layers = score_layers(heads, dev.questions, dev.documents, range(len(dev.gold)))
    alike = layers.mean(0)
    scores = torch.tensordot(torch.tensor(weights), layers, 1) if weights else alike
    texts = [header(passage, True) + passage.text for passage in dev.passages]
    words = word_scores(texts, [question.text for question in dev.asked]).float()
    return {
        "router": recall(scores, dev.gold),
        "router, layers alike": recall(alike, dev.gold),
        "words": recall(words, dev.gold),
        "both": recall(scores + heads.lexical_weight * words, dev.gold),
        "lexical_weight": heads.lexical_weight,
        "questions": len(dev.gold),
        "passages": len(texts),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterJob:
    """Files and settings of one low-rank tuning.

    ``start`` is the adapter of an earlier phase, ``routers`` a folder of ``train_router_files`` to learn
    routing under and ``chunk`` the content chunk to remember with; None means as the model has them.
    """

    passages: Sequence[Path]
    questions: Sequence[Path]
    out: Path
    model: str = DEFAULT_MODEL
    unanswerable: Sequence[Path] = ()
    start: Path | None = None
    routers: Path | None = None
    chunk: int | None = None
    chats: int = 240
    device: str = "auto"
    evaluate_every: int = 60
    save_every_s: float = 300.0
    recipe: AdapterTraining = field(default_factory=AdapterTraining)
    mixture: MixtureOptions = field(default_factory=MixtureOptions)
    deadline: float | None = None
    """As of a ``RouterJob``."""


def train_adapter_files(job: AdapterJob, tell: Tell = quiet) -> Path:
    """Tune the upper layers on reading exercises; returns the adapter file, in ``out``.

    One article in sixteen is kept out of training for the losses reported on the way.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    if job.routers is None:
        engine, _ = open_engine(job.model, job.out, device=job.device, adapter=False)
    else:
        folder = _with_routers(job.model, job.routers, None, job.out / "model")
        engine = load_engine(folder, device=job.device)
    if job.chunk is not None:
        engine.decoder.msa = engine.msa.with_options(chunk=job.chunk)
    files = [*job.passages, *job.questions, *job.unanswerable, *([] if job.start is None else [job.start])]
    given = fingerprint_files(files)
    train, kept = reading_exercises(engine, job.passages, job.questions, job.unanswerable)
    plain = _plain_chats(engine, train, job.chats, job.mixture.seed, job.out / "chat.jsonl")
    end = engine.tokenizer.encode_prompt(engine.prompt.layout.tail)[0]
    kept_chats = len(plain) // 6
    stream = Mixture(train, plain[kept_chats:], end, job.mixture)
    train_adapter(
        engine.decoder,
        stream.row,
        job.recipe,
        job.out,
        start=None if job.start is None else load_adapter(job.start),
        routing=RoutingExercises(stream, questions=job.recipe.routed_questions).batch
        if job.recipe.routed_questions
        else None,
        data=f"{given} {asdict(job.mixture)} {len(plain)} {engine.fingerprint} {engine.msa.chunk}",
        held_out=examination(kept, plain[:kept_chats], end, job.mixture),
        evaluate_every=job.evaluate_every,
        save_every_s=job.save_every_s,
        deadline=job.deadline,
        report=lambda step, figures: tell("Tuning", step, job.recipe.steps, losses_note(figures)),
    )
    return job.out / "adapter.safetensors"


def losses_note(figures: dict[str, Any]) -> str:
    """The losses of one step on one line; those of an evaluation where there was one."""
    losses = figures.get("held_out", figures["losses"])
    shown = ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items())
    speed = f"{figures['tokens'] / figures['seconds']:.0f} tokens/s"
    return f"held out: {shown}" if "held_out" in figures else f"loss {figures['loss']:.2f}, {speed}: {shown}"


def reading_exercises(
    engine: Engine, passages: Sequence[Path], questions: Sequence[Path], unanswerable: Sequence[Path]
) -> tuple[Exercises, Exercises]:
    """What to train on and what is kept for evaluation, apart by article."""
    texts, asked = read_passages(list(passages)), read_questions(list(questions))
    tricks = read_unanswerable(list(unanswerable))

    def side(kept: bool) -> Exercises:
        return Exercises([p for p in texts if held_out(p) == kept], asked, tricks, engine.prompt)

    return side(False), side(True)


def _plain_chats(engine: Engine, exercises: Exercises, count: int, seed: int, cache: Path) -> list[Chat]:
    titles = [passage.title for passage in exercises.passages if passage.title]
    asked = [question.text for question in exercises.asked]
    return own_answers(engine, plain_prompts(titles, asked, count, seed), cache) if count else []


def examination(
    exercises: Exercises, chats: list[Chat], end: int, options: MixtureOptions
) -> dict[str, list[BranchedRow]]:
    """The same rows at every evaluation, with instructions that training does not contain."""
    plain = Mixture(exercises, chats, end, replace(options, injected_rows=0.0, seed=1))
    injected = Mixture(
        exercises, (), end, replace(options, injected_rows=1.0, absent_rows=0.0, seed=2), HELD_OUT_INJECTIONS
    )
    rows = {
        kind: [plain.make(kind, at, random.Random(f"{kind}:{at}")) for at in range(count)]
        for kind, count in (("text", 20), ("both", 8), ("memory", 12), ("conflict", 12))
    }
    rows["chat"] = [plain.make("chat", at, random.Random(f"chat:{at}")) for at in range(8 if chats else 0)]
    rows["injected"] = [injected.make("text", at, random.Random(f"injected:{at}")) for at in range(8)]
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class FullJob:
    """Files and settings of one training end to end."""

    passages: Sequence[Path]
    questions: Sequence[Path]
    out: Path
    model: str = DEFAULT_MODEL
    unanswerable: Sequence[Path] = ()
    device: str = "auto"
    held_out_rows: int = 32
    evaluate_every: int = 100
    save_every_s: float = 600.0
    recipe: FullTraining = field(default_factory=FullTraining)
    mixture: MixtureOptions = field(default_factory=MixtureOptions)
    deadline: float | None = None
    """As of a ``RouterJob``."""


def train_full_files(job: FullJob, tell: Tell = quiet) -> Path:
    """Train a model end to end; returns the folder of the trained one, ``out / "model"``, which opens."""
    job.out.mkdir(parents=True, exist_ok=True)
    engine, source = open_engine(job.model, job.out, device=job.device)
    train, kept = reading_exercises(engine, job.passages, job.questions, job.unanswerable)
    end, seed = engine.prompt.tail[0], job.recipe.seed
    examined = Examples(kept, end, seed=seed + 1)
    rows = TrainingRows(
        Examples(train, end, seed=seed).example,
        Mixture(train, (), end, job.mixture).row,
        [examined.example(number, job.recipe.phases[0].memory_tokens) for number in range(job.held_out_rows)],
        examination(kept, [], end, job.mixture),
    )
    files = [*job.passages, *job.questions, *job.unanswerable]
    adapters = train_full(
        engine.decoder,
        rows,
        job.recipe,
        job.out,
        data=f"{fingerprint_files(files)} {asdict(job.mixture)} {job.held_out_rows} {engine.fingerprint}",
        evaluate_every=job.evaluate_every,
        save_every_s=job.save_every_s,
        deadline=job.deadline,
        report=lambda step, figures: tell(
            f"Training: {figures['phase']}", step, job.recipe.steps, _full_note(figures)
        ),
    )
    recipe = job.recipe
    save_model(
        job.out / "model",
        source,
        router_settings(engine.msa, engine.prompt.layout),
        decoder_tensors(engine.decoder),
        adapter_of(adapters, recipe.rank, recipe.alpha) if adapters else None,
    )
    return job.out / "model"


def _full_note(figures: dict[str, Any]) -> str:
    shown = figures.get("held_out", figures)
    parts = [f"{name} {shown[name]:.3f}" for name in ("lm", "aux", "recall@1") if name in shown]
    return ("held out: " if "held_out" in figures else "") + ", ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedJob:
    """Files of a job on a model that has routers.

    ``routers`` is a folder of ``train_router_files`` to be used with ``adapter``, in place of what the model
    has.
    """

    passages: Sequence[Path]
    questions: Sequence[Path]
    out: Path
    model: str = DEFAULT_MODEL
    routers: Path | None = None
    adapter: Path | None = None
    device: str = "auto"
    deadline: float | None = None
    """As of a ``RouterJob``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateJob(RoutedJob):
    """One calibration."""

    options: CalibrationOptions = field(default_factory=CalibrationOptions)


def calibrate_files(job: CalibrateJob, tell: Tell = quiet) -> dict[str, Any]:
    """Choose the calibration; writes calibration.json to ``out`` and the choice to the settings it is for.

    Those are the router.json in ``routers``, or the config.json of a model that is a folder of its own; the
    files of an installed model are left alone.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    engine = _routed_engine(job)
    found = calibrate(
        engine,
        job.passages,
        job.questions,
        job.options,
        deadline=job.deadline,
        report=lambda what, done, total: tell(what, done, total, ""),
    )
    write_json(job.out / "calibration.json", found)
    _tell_model(job, found["calibration"])
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerabilityJob(RoutedJob):
    """One training of the head that tells whether there is an answer."""

    recipe: AnswerabilityTraining = field(default_factory=AnswerabilityTraining)


def train_answerability_files(job: AnswerabilityJob, tell: Tell = quiet) -> dict[str, Any]:
    """Train the head; writes its file and answerability.json to ``out``.

    The file also goes beside the ``routers``, or into a model that is a folder of its own, and
    ``refusal_odds`` to the settings there.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    engine = _routed_engine(job)
    texts, asked = read_passages(list(job.passages)), read_questions(list(job.questions))
    layers = job.recipe.layers_of(engine)
    reading = {name: value for name, value in engine.calibration.items() if not name.startswith("refusal")}
    about: list[Any] = [fingerprint_files([*job.passages, *job.questions]), engine.fingerprint, reading]
    about += [job.recipe.asking, layers]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    lessons = [*article_lessons(texts, asked, job.recipe), note_lesson(texts, asked, job.recipe)]
    examples = [
        collect(
            engine,
            lesson,
            layers,
            job.out / f"{lesson.name}-{digest}.safetensors",
            deadline=job.deadline,
            report=lambda what, done, total: tell(what, done, total, ""),
        )
        for lesson in lessons
    ]
    head, figures = fit(examples, layers, job.recipe.penalty, job.recipe.lost)
    write_json(job.out / "answerability.json", figures)
    save_head(head, job.out / HEAD_FILE)
    folder = _tell_model(job, {"refusal_odds": figures["refusal_odds"]})
    if folder is not None:
        save_head(head, folder / HEAD_FILE)
    return figures


def _routed_engine(job: RoutedJob) -> Engine:
    """The job's model, with the routers and the adapter that it names."""
    if job.routers is None:
        adapter = True if job.adapter is None else job.adapter
        return open_engine(job.model, job.out, device=job.device, adapter=adapter)[0]
    return load_engine(
        _with_routers(job.model, job.routers, job.adapter, job.out / "model"), device=job.device
    )


def _tell_model(job: RoutedJob, chosen: dict[str, Any]) -> Path | None:
    """Put chosen numbers where the job's model has them; the folder, None for an installed model."""
    if job.routers is not None:
        _merge_calibration(job.routers / "router.json", chosen)
        return job.routers
    folder = open_checkpoint(resolve(job.model)).path
    if job.model == DEFAULT_MODEL or not folder.is_dir():
        return None
    _merge_calibration(folder / "config.json", chosen)
    return folder


def _with_routers(model: str, routers: Path, adapter: Path | None, folder: Path) -> Path:
    """A folder that opens as the model with these routers and this adapter."""
    settings = json.loads((routers / "router.json").read_text(encoding="utf-8"))
    source = open_checkpoint(resolve(model))
    save_with_routers(folder, source, routers / "router.safetensors", settings, adapter)
    return folder


def _merge_calibration(path: Path, chosen: dict[str, Any]) -> None:
    """Put the chosen numbers into a router.json, or into the ``msa_config`` of a config.json."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    settings = whole.get("msa_config", whole)
    settings["calibration"] = {**(settings.get("calibration") or {}), **chosen}
    write_json(path, whole)


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityJob:
    """Files and settings of one fidelity curve."""

    passages: Sequence[Path]
    questions: Sequence[Path]
    out: Path
    model: str = DEFAULT_MODEL
    chunks: tuple[int, ...] = CHUNKS
    probes: int = 200
    device: str = "auto"
    recipe: AdapterTraining = TUNING
    mixture: MixtureOptions = REMEMBERING
    deadline: float | None = None
    """As of a ``RouterJob``."""


def measure_fidelity(job: FidelityJob, tell: Tell = quiet) -> dict[str, Any]:
    """Answer losses by chunk size; writes fidelity.json to ``out``."""
    job.out.mkdir(parents=True, exist_ok=True)
    found = fidelity(
        lambda: open_engine(job.model, job.out, device=job.device)[0],
        lambda engine: reading_exercises(engine, job.passages, job.questions, ()),
        job.recipe,
        job.mixture,
        job.out,
        chunks=job.chunks,
        probes=job.probes,
        data=fingerprint_files([*job.passages, *job.questions]),
        deadline=job.deadline,
        report=lambda chunk, step, figures: tell(
            f"Tuning with chunks of {chunk}", step, job.recipe.steps, losses_note(figures)
        ),
    )
    write_json(job.out / "fidelity.json", found)
    return found
