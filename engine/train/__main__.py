"""`python -m msa_memory.engine.train`: train routers and adapters on question/passage files."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress, TextColumn

from msa_memory.engine.adapter import TARGETS, load_adapter
from msa_memory.engine.checkpoint import open_checkpoint
from msa_memory.engine.config import MSAConfig, read_backbone
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.encoding import encode_head
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.fingerprint import fingerprint_files
from msa_memory.engine.layout import Layout, PromptLayout, document_header
from msa_memory.engine.models import DEFAULT_MODEL, resolve
from msa_memory.engine.tokenizer import Tokenizer
from msa_memory.engine.train.adapter import AdapterTraining, train_adapter
from msa_memory.engine.train.branches import BranchedRow
from msa_memory.engine.train.chat import own_answers, plain_prompts
from msa_memory.engine.train.data import Passage, Question, read_passages, read_questions
from msa_memory.engine.train.exercises import Exercises, held_out, read_unanswerable
from msa_memory.engine.train.hidden import HiddenStates, cache_documents, cache_questions
from msa_memory.engine.train.mixture import (
    HELD_OUT_INJECTIONS,
    Chat,
    Mixture,
    MixtureOptions,
)
from msa_memory.engine.train.router import (
    RouterHeads,
    RouterTraining,
    recall,
    save_router,
    score_documents,
    train_router,
)

__all__ = ["app"]

MAX_QUESTION_TOKENS = 64
MAX_PASSAGE_TOKENS = 512

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Files = Annotated[list[Path], typer.Option(exists=True, dir_okay=False)]


@app.callback()
def _main() -> None:
    """Train the parts of a memory model."""


@app.command()
def router(
    passages: Files,
    questions: Files,
    out: Annotated[Path, typer.Option(help="folder for router.safetensors and router.json")],
    work: Annotated[Path, typer.Option(help="folder for cached hidden states; reused when it exists")],
    model: Annotated[str, typer.Option(help="registered name or checkpoint folder")] = DEFAULT_MODEL,
    layers: Annotated[str, typer.Option(help="router layers, comma-separated")] = ",".join(
        str(layer) for layer in range(0, 30, 2)
    ),
    router_chunk: int = 16,
    chunk: int = 64,
    top_k: int = 16,
    steps: int = RouterTraining().steps,
    batch_size: int = RouterTraining().batch_size,
    learning_rate: float = RouterTraining().learning_rate,
    temperature: float = RouterTraining().temperature,
    dropout: float = RouterTraining().dropout,
    hard_negatives: int = RouterTraining().hard_negatives,
    seed: int = 0,
    dev_passages: Files = [],  # noqa: B006 - typer reads it, nothing changes it
    dev_questions: Files = [],  # noqa: B006
) -> None:
    """Train router projections on a frozen backbone: minutes on a CPU after one pass over the passages.

    Both kinds of files are JSON lines, plain or gzipped: passages with passage_id, text and an optional
    title; questions with question and passage_ids. An interrupted run reuses what it cached.
    """
    msa = MSAConfig(
        router_layers=tuple(int(layer) for layer in layers.split(",")),
        top_k=top_k,
        chunk=chunk,
        router_chunk=router_chunk,
        aux_loss_method="INFONCE_DECOUPLE",
        infonce_temperature=temperature,
    )
    recipe = RouterTraining(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        temperature=temperature,
        dropout=dropout,
        hard_negatives=hard_negatives,
        seed=seed,
    )
    trainer = _Trainer(model, msa, work)
    train = trainer.load("train", passages, questions)
    heads = RouterHeads(len(msa.router_layers), *trainer.shape)
    torch.manual_seed(seed)
    log = train_router(heads, train.questions, train.documents, train.gold, recipe)
    out.mkdir(parents=True, exist_ok=True)
    save_router(heads, msa.router_layers, out / "router.safetensors", recipe)
    figures = {}
    if dev_passages:
        dev = trainer.load("dev", dev_passages, dev_questions)
        figures = recall(score_documents(heads, dev.questions, dev.documents, range(len(dev.gold))), dev.gold)
        typer.echo(json.dumps(figures))
    (out / "router.json").write_text(json.dumps(_router_json(msa), indent=2) + "\n", encoding="utf-8")
    record = {"recipe": asdict(recipe), "dev": figures, "log": log}
    (out / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


@app.command()
def adapter(
    passages: Files,
    questions: Files,
    out: Annotated[Path, typer.Option(help="folder of the run; one that was interrupted goes on")],
    model: Annotated[str, typer.Option(help="registered name or folder of a memory model")] = DEFAULT_MODEL,
    unanswerable: Files = [],  # noqa: B006 - typer reads it, nothing changes it
    steps: int = AdapterTraining().steps,
    rows_per_step: int = AdapterTraining().rows_per_step,
    micro_batch_tokens: int = AdapterTraining().micro_batch_tokens,
    rank: int = AdapterTraining().rank,
    alpha: float = AdapterTraining().alpha,
    first_layer: int = AdapterTraining().first_layer,
    targets: Annotated[str, typer.Option(help="linear layers, comma-separated")] = ",".join(TARGETS),
    learning_rate: float = AdapterTraining().learning_rate,
    chats: Annotated[int, typer.Option(help="plain conversations to keep; 0 for none")] = 240,
    start: Annotated[Path | None, typer.Option(help="adapter file of an earlier phase to go on from")] = None,
    window: Annotated[
        int, typer.Option(help="longest cut of a passage, in tokens")
    ] = MixtureOptions().window,
    row_tokens: Annotated[int, typer.Option(help="a row of this length takes no more questions")] = (
        MixtureOptions().row_tokens
    ),
    absent_rows: Annotated[float, typer.Option(help="share of evidence rows without their passage")] = (
        MixtureOptions().absent_rows
    ),
    alone_rows: Annotated[float, typer.Option(help="share of memory rows with nothing else in memory")] = (
        MixtureOptions().alone_rows
    ),
    evaluate_every: int = 60,
    save_every_s: float = 300.0,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Tune the upper layers with low rank to read evidence, to use memory and to say what is not known.

    Files as for `router`; unanswerable ones have question, distractor_passage_id and optionally split.
    One article in sixteen is kept out of training for the losses reported on the way.
    """
    recipe = AdapterTraining(
        steps=steps,
        rows_per_step=rows_per_step,
        micro_batch_tokens=micro_batch_tokens,
        rank=rank,
        alpha=alpha,
        first_layer=first_layer,
        targets=tuple(targets.split(",")),
        learning_rate=learning_rate,
        seed=seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    engine = load_engine(resolve(model), name=model, device=device, adapter=False)
    options = MixtureOptions(
        window=window, row_tokens=row_tokens, absent_rows=absent_rows, alone_rows=alone_rows, seed=seed
    )
    files = [*passages, *questions, *unanswerable, *([] if start is None else [start])]
    train, kept = _exercises(engine, passages, questions, unanswerable)
    plain = _plain_chats(engine, train, chats, seed, out / "chat.jsonl")
    end = engine.tokenizer.encode_prompt(engine.prompt.layout.tail)[0]
    kept_chats = len(plain) // 6
    stream = Mixture(train, plain[kept_chats:], end, options)
    examined = _examination(kept, plain[:kept_chats], end, options)
    with _progress("Tuning", steps) as show:
        train_adapter(
            engine.decoder,
            stream.row,
            recipe,
            out,
            start=None if start is None else load_adapter(start),
            data=f"{fingerprint_files(files)} {asdict(options)} {len(plain)} {engine.fingerprint}",
            held_out=examined,
            evaluate_every=evaluate_every,
            save_every_s=save_every_s,
            report=show,
        )
    typer.echo(f"{out / 'adapter.safetensors'}")


def _exercises(
    engine: Engine, passages: list[Path], questions: list[Path], unanswerable: list[Path]
) -> tuple[Exercises, Exercises]:
    """What to train on and what is kept for evaluation, apart by article."""
    texts, asked = read_passages(passages), read_questions(questions)
    tricks = read_unanswerable(unanswerable)

    def side(kept: bool) -> Exercises:
        return Exercises([p for p in texts if held_out(p) == kept], asked, tricks, engine.prompt)

    return side(False), side(True)


def _plain_chats(engine: Engine, exercises: Exercises, count: int, seed: int, cache: Path) -> list[Chat]:
    titles = [passage.title for passage in exercises.passages if passage.title]
    asked = [question.text for question in exercises.asked]
    return own_answers(engine, plain_prompts(titles, asked, count, seed), cache) if count else []


def _examination(
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


class _Loaded:
    def __init__(self, documents: HiddenStates, questions: HiddenStates, gold: list[list[int]]) -> None:
        self.documents, self.questions, self.gold = documents, questions, gold


class _Trainer:
    """The frozen backbone and what it makes of data files."""

    def __init__(self, model: str, msa: MSAConfig, work: Path) -> None:
        checkpoint = open_checkpoint(resolve(model))
        backbone = read_backbone(checkpoint.config)
        self.shape = (backbone.hidden_size, backbone.num_heads, backbone.num_kv_heads, backbone.head_dim)
        self.decoder = Decoder(backbone).bfloat16().requires_grad_(False).eval()
        self.decoder.load(checkpoint.tensors())
        self.tokenizer: Tokenizer = checkpoint.tokenizer()
        self.prompt = PromptLayout(Layout(), self.tokenizer, msa)
        self.msa, self.work = msa, work

    def load(self, name: str, passages: list[Path], questions: list[Path]) -> _Loaded:
        """Hidden states of a data set's passages and questions, cached under ``work / name``."""
        texts = read_passages(passages)
        index = {passage.id: place for place, passage in enumerate(texts)}
        asked = [question for question in read_questions(questions) if set(question.gold) <= index.keys()]
        documents = cache_documents(
            self.decoder,
            [self._document(passage, always_titled=name != "train") for passage in texts],
            self.msa.router_layers,
            self.msa.router_chunk,
            self.work / name,
        )
        head = encode_head(self.decoder, self.prompt.head)
        hidden = cache_questions(
            self.decoder,
            head,
            [self._question(question) for question in asked],
            self.msa.router_layers,
            self.prompt.question_position,
            self.work / name,
        )
        return _Loaded(documents, hidden, [[index[id] for id in question.gold] for question in asked])

    def _document(self, passage: Passage, *, always_titled: bool) -> list[int]:
        """Two of three training passages show their title, so that routers learn to do with and without."""
        titled = always_titled or zlib.crc32(passage.id.encode()) % 3 != 0
        header = document_header(title=passage.title if titled else None, when=None, speaker=None)
        return self.prompt.document(0, header, passage.text)[:MAX_PASSAGE_TOKENS]

    def _question(self, question: Question) -> list[int]:
        return self.prompt.question(question.text)[0][:MAX_QUESTION_TOKENS]


@contextmanager
def _progress(label: str, steps: int) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """A bar with the running losses; without a terminal, one line per 10 steps and evaluation."""
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}")) as bar:
        task = bar.add_task(label, total=steps, note="")

        def show(step: int, figures: dict[str, Any]) -> None:
            note = f"loss {figures['loss']:.2f}, {figures['tokens'] / figures['seconds']:.0f} tokens/s"
            bar.update(task, completed=step, note=note)
            if "held_out" in figures or (step % 10 == 0 and not bar.console.is_terminal):
                losses = figures.get("held_out", figures["losses"])
                shown = ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items())
                which = "held out" if "held_out" in figures else note
                bar.console.print(f"step {step}: {which}: {shown}", soft_wrap=True)

        yield show


def _router_json(msa: MSAConfig) -> dict[str, object]:
    return {
        "router_layer_idx": ",".join(map(str, msa.router_layers)),
        "top_k_docs": msa.top_k,
        "pooling_kernel_size": msa.chunk,
        "router_chunk": msa.router_chunk,
        "decouple_router": True,
        "router_normalize": True,
        "head_reduce_method": "mean",
        "query_reduce_method": "max",
        "chunk_reduce_method": "max",
        "aux_loss_method": msa.aux_loss_method,
        "infonce_loss_temp": msa.infonce_temperature,
        "positions": "head",
        "evidence": "router",
    }


if __name__ == "__main__":
    app()
