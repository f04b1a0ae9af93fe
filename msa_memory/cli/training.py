"""The commands that train: ``train router``, ``adapter``, ``full``, ``questions``, ``calibrate``, ``default``
and ``fidelity``. They open no memory.

All of them go on where an interrupted call with the same options stopped. With ``--minutes`` a command ends
by itself with exit code 3 while something is left to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from msa_memory.cli.call import Call, Command, add_command

__all__ = ["training"]

UNFINISHED = 3
_EVERY_S = 20.0  # between two lines of progress where there is no terminal

Tell = Callable[[str, int, int, str], None]


def _files(help: str) -> Any:
    return typer.Option(exists=True, dir_okay=False, metavar="FILE", help=help)


Passages = Annotated[list[Path], _files("Passages: JSON lines with passage_id, text, title. Repeatable.")]
Questions = Annotated[
    list[Path], _files("Questions: JSON lines with question, passage_ids, answers. Repeatable.")
]
MaybeQuestions = Annotated[
    list[Path] | None, _files("Questions, as above; without any they are made from the passages.")
]
Unanswerable = Annotated[
    list[Path] | None, _files("Questions without an answer: question, distractor_passage_id. Repeatable.")
]
DevPassages = Annotated[list[Path] | None, _files("Passages to evaluate on at the end.")]
DevQuestions = Annotated[list[Path] | None, _files("Questions to evaluate on at the end.")]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the run lives and its files end up.")]
Work = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where hidden states are cached; else OUT/work.")
]
ModelName = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Registered name, folder or hub id.")
]
AdapterFile = Annotated[
    str,
    typer.Option("--adapter", metavar="FILE", help="Adapter to work with, or 'none'; else the model's own."),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda:0.")]
Minutes = Annotated[
    float | None, typer.Option(metavar="M", help="Stop after so long; the same command then goes on.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of everything random.")]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Steps of the training.")]
LearningRate = Annotated[float | None, typer.Option(help="The highest learning rate.")]
RowsPerStep = Annotated[int | None, typer.Option(help="Rows of data per step.")]
MicroBatch = Annotated[int | None, typer.Option(help="Tokens computed at a time; gradients are added up.")]
OtherRouters = Annotated[
    Path | None,
    typer.Option(
        exists=True, file_okay=False, metavar="FOLDER", help="Routers to use instead of the model's."
    ),
]
TheirAdapter = Annotated[
    Path | None, typer.Option(exists=True, metavar="FILE", help="The adapter that belongs to them.")
]
Rank = Annotated[int | None, typer.Option(help="Rank of the adapter.")]
Alpha = Annotated[float | None, typer.Option(help="The adapter counts alpha / rank times.")]
FirstLayer = Annotated[int | None, typer.Option(help="Lowest layer to adapt.")]
EvaluateEvery = Annotated[int, typer.Option(metavar="STEPS", help="How often to look at held-out rows.")]
SaveEvery = Annotated[float, typer.Option(metavar="SECONDS", help="How often to save.")]


def train_router(
    call: Call,
    passages: Passages,
    out: Out,
    questions: MaybeQuestions = None,
    work: Work = None,
    model: ModelName = None,
    adapter: AdapterFile = "own",
    layers: Annotated[
        str | None, typer.Option(metavar="N,N", help="Router layers; else the model's own.")
    ] = None,
    router_chunk: Annotated[int | None, typer.Option(help="Tokens per routing key.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens per pooled key and value.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Passages each router layer chooses.")] = None,
    lexical: Annotated[
        bool, typer.Option("--lexical", help="Learn beside the words' score, and learn its weight.")
    ] = False,
    teacher: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, metavar="FOLDER", help="A text embedder (MiniLM) to learn from."
        ),
    ] = None,
    teacher_share: Annotated[float | None, typer.Option(help="What the teacher's order counts.")] = None,
    scouts: Annotated[
        bool,
        typer.Option(
            "--scouts", help="Learn half of the articles, for `train adapter --routers` to learn from."
        ),
    ] = False,
    steps: Steps = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions per step.")] = None,
    learning_rate: LearningRate = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the scores in the loss.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Share of features left out.")] = None,
    together: Annotated[
        int | None, typer.Option(help="Most questions about one article that a batch has side by side.")
    ] = None,
    hard_negatives: Annotated[
        int | None, typer.Option(help="Passages per question that were confused with its own.")
    ] = None,
    dev_passages: DevPassages = None,
    dev_questions: DevQuestions = None,
    device: Device = "auto",
    seed: Seed = 0,
    minutes: Minutes = None,
) -> None:
    """Train routers on a frozen model: minutes on a CPU, after one pass over the passages."""
    from msa_memory.engine.models import DEFAULT_MODEL
    from msa_memory.engine.train.jobs import RouterJob, train_router_files
    from msa_memory.engine.train.router import RouterTraining

    deadline = _deadline(minutes)
    with _watched(call) as tell:
        questions = questions or _made_questions(passages, out, model, device, seed, deadline, tell)
        job = RouterJob(
            passages=passages,
            questions=questions,
            out=out,
            work=work or out / "work",
            model=model or DEFAULT_MODEL,
            adapter=_adapter(adapter),
            layers=None if layers is None else tuple(int(layer) for layer in layers.split(",")),
            router_chunk=router_chunk,
            chunk=chunk,
            top_k=top_k,
            lexical=lexical,
            teacher=teacher,
            scouts=scouts,
            dev_passages=dev_passages or (),
            dev_questions=dev_questions or (),
            device=device,
            recipe=RouterTraining(
                **_given(
                    steps=steps,
                    batch_size=batch_size,
                    learning_rate=learning_rate,
                    temperature=temperature,
                    dropout=dropout,
                    together=together,
                    hard_negatives=hard_negatives,
                    teacher_share=teacher_share,
                    seed=seed,
                )
            ),
            deadline=deadline,
        )
        record = train_router_files(job, tell)
    _result(call, {"out": str(out), **record["dev"]}, f"{out / 'router.safetensors'}")


def train_adapter(
    call: Call,
    passages: Passages,
    out: Out,
    questions: MaybeQuestions = None,
    unanswerable: Unanswerable = None,
    model: ModelName = None,
    start: Annotated[
        Path | None,
        typer.Option(exists=True, metavar="FILE", help="Adapter of an earlier phase to go on from."),
    ] = None,
    steps: Steps = None,
    rows_per_step: RowsPerStep = None,
    micro_batch_tokens: MicroBatch = None,
    rank: Rank = None,
    alpha: Alpha = None,
    first_layer: FirstLayer = None,
    attention_from: Annotated[
        int | None, typer.Option(help="Layers from here to the first adapt their attention alone.")
    ] = None,
    targets: Annotated[str | None, typer.Option(metavar="NAME,NAME", help="Linear layers to adapt.")] = None,
    learning_rate: LearningRate = None,
    routers: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            metavar="FOLDER",
            help="Routers to learn routing under, of `train router --scouts`; else the model's own.",
        ),
    ] = None,
    routed_questions: Annotated[
        int | None, typer.Option(help="Questions per step whose passages the layers learn to tell apart.")
    ] = None,
    routing_share: Annotated[float | None, typer.Option(help="What their loss counts.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens per pooled key and value.")] = None,
    chats: Annotated[int, typer.Option(help="Plain conversations to keep; 0 for none.")] = 240,
    window: Annotated[int | None, typer.Option(help="Longest cut of a passage, in tokens.")] = None,
    row_tokens: Annotated[
        int | None, typer.Option(help="A row of this length takes no more questions.")
    ] = None,
    absent_rows: Annotated[
        float | None, typer.Option(help="Share of evidence rows without their passage.")
    ] = None,
    alone_rows: Annotated[
        float | None, typer.Option(help="Share of memory rows with nothing else in memory.")
    ] = None,
    recall_rows: Annotated[
        float | None, typer.Option(help="Share of rows that answer from memory or repeat it.")
    ] = None,
    evaluate_every: EvaluateEvery = 60,
    save_every_s: SaveEvery = 300.0,
    peft_out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also write the adapter as the peft library stores one."),
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    minutes: Minutes = None,
) -> None:
    """Tune the upper layers with low rank to read evidence, to use memory and to say what is not known."""
    from msa_memory.engine.models import DEFAULT_MODEL
    from msa_memory.engine.train.adapter import AdapterTraining
    from msa_memory.engine.train.jobs import AdapterJob, train_adapter_files
    from msa_memory.engine.train.mixture import MixtureOptions
    from msa_memory.engine.train.peft_files import export_peft

    recipe = AdapterTraining(
        **_given(
            steps=steps,
            rows_per_step=rows_per_step,
            micro_batch_tokens=micro_batch_tokens,
            rank=rank,
            alpha=alpha,
            first_layer=first_layer,
            attention_from=attention_from,
            targets=None if targets is None else tuple(targets.split(",")),
            learning_rate=learning_rate,
            routed_questions=routed_questions,
            routing_share=routing_share,
            seed=seed,
        )
    )
    mixture = MixtureOptions(
        **_given(
            window=window,
            row_tokens=row_tokens,
            absent_rows=absent_rows,
            alone_rows=alone_rows,
            recall_rows=recall_rows,
            seed=seed,
        )
    )
    deadline = _deadline(minutes)
    with _watched(call) as tell:
        job = AdapterJob(
            passages=passages,
            questions=questions or _made_questions(passages, out, model, device, seed, deadline, tell),
            out=out,
            model=model or DEFAULT_MODEL,
            unanswerable=unanswerable or (),
            start=start,
            routers=routers,
            chunk=chunk,
            chats=chats,
            device=device,
            evaluate_every=evaluate_every,
            save_every_s=save_every_s,
            recipe=recipe,
            mixture=mixture,
            deadline=deadline,
        )
        written = train_adapter_files(job, tell)
    if peft_out is not None:
        export_peft(written, peft_out, base_model=job.model)
    _result(call, {"adapter": str(written)}, str(written))


def train_full(
    call: Call,
    passages: Passages,
    out: Out,
    questions: MaybeQuestions = None,
    unanswerable: Unanswerable = None,
    model: ModelName = None,
    trainables: Annotated[str, typer.Option(help="all, upper (layers) or low-rank.")] = "all",
    router_steps: Annotated[int, typer.Option(help="Steps of the routers' phase.")] = 500,
    joint_steps: Annotated[int, typer.Option(help="Steps of the joint phase.")] = 1000,
    tuning_steps: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKENS:STEPS", help="Tuning over so much memory; else 8192:500 and 65536:100."),
    ] = None,
    memory_tokens: Annotated[int, typer.Option(help="Memory of a row in the first two phases.")] = 4096,
    rows_per_step: RowsPerStep = None,
    micro_batch_tokens: MicroBatch = None,
    rank: Rank = None,
    alpha: Alpha = None,
    recompute: Annotated[
        bool, typer.Option(help="Compute activations again on the way back, to save memory.")
    ] = True,
    evaluate_every: EvaluateEvery = 100,
    save_every_s: SaveEvery = 600.0,
    device: Device = "auto",
    seed: Seed = 0,
    minutes: Minutes = None,
) -> None:
    """Train a Llama, Qwen2 or Qwen3 checkpoint end to end into a memory model, in the paper's phases."""
    from msa_memory.engine.models import DEFAULT_MODEL
    from msa_memory.engine.train.full import FullTraining, phases
    from msa_memory.engine.train.jobs import FullJob, train_full_files

    deadline = _deadline(minutes)
    recipe = FullTraining(
        phases=phases(router_steps, joint_steps, _tuning(tuning_steps), memory_tokens=memory_tokens),
        **_given(
            trainables=trainables,
            rows_per_step=rows_per_step,
            micro_batch_tokens=micro_batch_tokens,
            rank=rank,
            alpha=alpha,
            recompute=recompute,
            seed=seed,
        ),
    )
    with _watched(call) as tell:
        job = FullJob(
            passages=passages,
            questions=questions or _made_questions(passages, out, model, device, seed, deadline, tell),
            out=out,
            model=model or DEFAULT_MODEL,
            unanswerable=unanswerable or (),
            device=device,
            evaluate_every=evaluate_every,
            save_every_s=save_every_s,
            recipe=recipe,
            deadline=deadline,
        )
        folder = train_full_files(job, tell)
    _result(call, {"model": str(folder)}, str(folder))


def train_questions(
    call: Call,
    passages: Passages,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The question file to write.")],
    model: ModelName = None,
    per_passage: Annotated[int, typer.Option(min=1, help="Questions per passage, at most.")] = 2,
    device: Device = "auto",
    seed: Seed = 0,
    minutes: Minutes = None,
) -> None:
    """Make questions with answers from passages alone, with the model itself."""
    with _watched(call) as tell:
        count = _make(passages, out, model, per_passage, device, seed, _deadline(minutes), tell)
    _result(call, {"questions": count, "path": str(out)}, f"{count:,} questions in {out}")


def train_calibration(
    call: Call,
    passages: Passages,
    questions: Questions,
    out: Out,
    model: ModelName = None,
    routers: OtherRouters = None,
    adapter: TheirAdapter = None,
    ranked: Annotated[int | None, typer.Option(help="Questions to rank passages for.")] = None,
    read: Annotated[int | None, typer.Option(help="Questions to read evidence for.")] = None,
    distractors: Annotated[int | None, typer.Option(help="Training passages to rank beside.")] = None,
    lost_to_score: Annotated[
        float | None, typer.Option(help="Share of questions the least score may lose.")
    ] = None,
    lost_to_refusal: Annotated[
        float | None, typer.Option(help="Share of answerable questions that may be refused.")
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    minutes: Minutes = None,
) -> None:
    """Choose the numbers beside the weights on articles kept out of training: evidence, words, refusals."""
    from msa_memory.engine.models import DEFAULT_MODEL
    from msa_memory.engine.train.calibrate import CalibrationOptions
    from msa_memory.engine.train.jobs import CalibrateJob, calibrate_files

    options = CalibrationOptions(
        **_given(
            ranked=ranked,
            read=read,
            distractors=distractors,
            lost_to_score=lost_to_score,
            lost_to_refusal=lost_to_refusal,
            seed=seed,
        )
    )
    job = CalibrateJob(
        passages=passages,
        questions=questions,
        out=out,
        model=model or DEFAULT_MODEL,
        routers=routers,
        adapter=adapter,
        device=device,
        options=options,
        deadline=_deadline(minutes),
    )
    with _watched(call) as tell:
        found = calibrate_files(job, tell)
    chosen = ", ".join(f"{name} {value:g}" for name, value in found["calibration"].items())
    _result(call, found, chosen)


def train_answerability(
    call: Call,
    passages: Passages,
    questions: Questions,
    out: Out,
    model: ModelName = None,
    routers: OtherRouters = None,
    adapter: TheirAdapter = None,
    parts: Annotated[int | None, typer.Option(help="Banks of whole articles to ask over.")] = None,
    bank_passages: Annotated[int | None, typer.Option(help="Passages in each, about.")] = None,
    asked: Annotated[int | None, typer.Option(help="Questions over each.")] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="A layer to read; several times for more, else upper ones.")
    ] = None,
    lost: Annotated[float | None, typer.Option(help="Share of answerable questions to refuse.")] = None,
    device: Device = "auto",
    seed: Seed = 17,
    minutes: Minutes = None,
) -> None:
    """Train the head that tells from hidden states whether the evidence holds an answer."""
    from msa_memory.engine.models import DEFAULT_MODEL
    from msa_memory.engine.train.answerability import AnswerabilityTraining
    from msa_memory.engine.train.jobs import AnswerabilityJob, train_answerability_files

    recipe = AnswerabilityTraining(
        **_given(
            parts=parts,
            passages=bank_passages,
            questions=asked,
            layers=tuple(layer) if layer else None,
            lost=lost,
            seed=seed,
        )
    )
    job = AnswerabilityJob(
        passages=passages,
        questions=questions,
        out=out,
        model=model or DEFAULT_MODEL,
        routers=routers,
        adapter=adapter,
        device=device,
        recipe=recipe,
        deadline=_deadline(minutes),
    )
    with _watched(call) as tell:
        found = train_answerability_files(job, tell)
    refused = found["refused"]
    shown = f"refuses {refused['absent']:.0%} without an answer, {refused['present']:.0%} with one"
    _result(call, found, f"{shown} ({found['questions']:,} questions)")


def train_default(
    call: Call,
    data: Annotated[
        Path, typer.Option(exists=True, file_okay=False, metavar="FOLDER", help="Where train_*.jsonl.gz are.")
    ],
    work: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the work and its result go.")],
    teacher: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, metavar="FOLDER", help="A text embedder to learn from."),
    ] = None,
    device: Device = "auto",
    minutes: Minutes = None,
) -> None:
    """Make the default model's files from its data; call again until it exits with 0."""
    from msa_memory.engine.train.default import DefaultModel, train_default_model

    job = DefaultModel(data=data, work=work, teacher=teacher, device=device, deadline=_deadline(minutes))
    with _watched(call) as tell:
        folder = train_default_model(job, tell)
    _result(call, {"folder": str(folder)}, str(folder))


def train_fidelity(
    call: Call,
    passages: Passages,
    questions: Questions,
    out: Out,
    model: ModelName = None,
    chunks: Annotated[str, typer.Option(metavar="N,N", help="Chunk sizes.")] = "16,32,64,128",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the tuning for each size.")] = 80,
    probes: Annotated[int, typer.Option(min=1, help="Held-out questions asked four ways.")] = 200,
    rows_per_step: RowsPerStep = None,
    first_layer: FirstLayer = None,
    device: Device = "auto",
    seed: Seed = 0,
    minutes: Minutes = None,
) -> None:
    """Measure what pooled memory is worth by chunk size, after a short tuning for each."""
    from msa_memory.engine.models import DEFAULT_MODEL
    from msa_memory.engine.train.fidelity import TUNING
    from msa_memory.engine.train.jobs import FidelityJob, measure_fidelity

    job = FidelityJob(
        passages=passages,
        questions=questions,
        out=out,
        model=model or DEFAULT_MODEL,
        chunks=tuple(int(chunk) for chunk in chunks.split(",")),
        probes=probes,
        recipe=replace(
            TUNING,
            **_given(steps=steps, rows_per_step=rows_per_step, first_layer=first_layer, seed=seed),
        ),
        device=device,
        deadline=_deadline(minutes),
    )
    with _watched(call) as tell:
        found = measure_fidelity(job, tell)
    rows = [
        [size, *(f"{each['after'][way]:.3f}" for way in ("closed", "memory", "text", "both"))]
        for size, each in found["chunks"].items()
    ]
    if call.out.json:
        call.out.document(found)
    else:
        call.out.table(["chunk", "closed book", "memory", "text", "text and memory"], rows)


def _tuning(given: Sequence[str] | None) -> list[tuple[int, int]]:
    """Memory sizes and steps of the tuning phases."""
    found = []
    for one in given or ("8192:500", "65536:100"):
        tokens, colon, steps = one.partition(":")
        if not (colon and tokens.isdigit() and steps.isdigit()):
            raise typer.BadParameter(f"{one!r} is not TOKENS:STEPS, as 8192:500", param_hint="--tuning-steps")
        found.append((int(tokens), int(steps)))
    return found


def _made_questions(
    passages: Sequence[Path],
    out: Path,
    model: str | None,
    device: str,
    seed: int,
    deadline: float | None,
    tell: Tell,
) -> list[Path]:
    """A file of questions that the model makes from the passages."""
    file = out / "questions.jsonl"
    _make(passages, file, model, 2, device, seed, deadline, tell)
    return [file]


def _make(
    passages: Sequence[Path],
    file: Path,
    model: str | None,
    per_passage: int,
    device: str,
    seed: int,
    deadline: float | None,
    tell: Tell,
) -> int:
    from msa_memory.engine.models import DEFAULT_MODEL
    from msa_memory.engine.train.jobs import open_engine
    from msa_memory.engine.train.questions import QuestionMaking, make_questions

    engine, _ = open_engine(model or DEFAULT_MODEL, file.parent, device=device, adapter=False)
    return make_questions(
        engine,
        passages,
        file,
        QuestionMaking(per_passage=per_passage, seed=seed),
        deadline=deadline,
        report=lambda done, total: tell("Making questions", done, total, ""),
    )


def _adapter(wanted: str) -> Path | bool:
    return wanted == "own" if wanted in ("own", "none") else Path(wanted)


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given a value; the others are as the recipe has them."""
    return {name: value for name, value in options.items() if value is not None}


def _deadline(minutes: float | None) -> float | None:
    return None if minutes is None else time.monotonic() + 60 * minutes


def _result(call: Call, figures: dict[str, Any], line: str) -> None:
    if call.out.json:
        call.out.document(figures)
    else:
        call.out.line(line)


@contextmanager
def _watched(call: Call) -> Iterator[Tell]:
    """Progress on stderr: a bar per task on a terminal, else a line now and then. Ends a paused command."""
    from rich.console import Console
    from rich.progress import Progress, TaskID, TextColumn

    from msa_memory.engine.train.run import Paused

    tasks: dict[tuple[str, int], TaskID] = {}
    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}"), console=console) as bar:
        told = time.monotonic() - _EVERY_S

        def tell(label: str, done: int, total: int, note: str) -> None:
            nonlocal told
            key = (label, total)
            if key not in tasks:
                tasks[key] = bar.add_task(label, total=total, note="")
            bar.update(tasks[key], completed=done, note=note)
            if note.startswith("held out") or (
                not console.is_terminal and (done == total or time.monotonic() - told >= _EVERY_S)
            ):
                told = time.monotonic()
                console.print(f"{label}: {done} of {total} {note}".rstrip(), soft_wrap=True, markup=False)

        try:
            yield tell
        except Paused as pause:
            call.out.note(f"{pause}; run the same command again to go on")
            raise typer.Exit(UNFINISHED) from pause


training = typer.Typer(help="Train a memory model, or parts of it.", no_args_is_help=True)
_COMMANDS: dict[str, Command] = {
    "router": train_router,
    "adapter": train_adapter,
    "full": train_full,
    "questions": train_questions,
    "calibrate": train_calibration,
    "answerability": train_answerability,
    "default": train_default,
    "fidelity": train_fidelity,
}
for _name, _command in _COMMANDS.items():
    add_command(training, _command, _name, opens_memory=False)
