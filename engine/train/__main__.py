"""`python -m msa_memory.engine.train`: train routers for a checkpoint on question/passage files."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from msa_memory.engine.checkpoint import open_checkpoint
from msa_memory.engine.config import MSAConfig, read_backbone
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.encoding import encode_head
from msa_memory.engine.layout import Layout, PromptLayout, document_header
from msa_memory.engine.models import DEFAULT_MODEL, resolve
from msa_memory.engine.tokenizer import Tokenizer
from msa_memory.engine.train.data import Passage, Question, read_passages, read_questions
from msa_memory.engine.train.hidden import HiddenStates, cache_documents, cache_questions
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
