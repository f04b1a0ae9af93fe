"""Fast router training: only the projections, on cached hidden states, with a contrastive loss.

Loss: the paper's eq. 5 (arXiv 2603.23516) over document scores, on every layer's own score and on the
mean over layers that the default model retrieves with. In-batch passages are the negatives; once the
routers know something, each question also brings passages they confuse with its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from msa_memory.engine.train.hidden import HiddenStates

Numbers = NDArray[np.int64]

__all__ = ["RouterHeads", "RouterTraining", "recall", "save_router", "score_documents", "train_router"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterTraining:
    """Recipe of one run. ``hard_negatives`` are drawn per question from the current top of its ranking."""

    steps: int = 900
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    temperature: float = 0.03
    hard_negatives: int = 1
    mine_from_step: int = 300
    mine_every: int = 200
    dropout: float = 0.1
    seed: int = 0


class RouterHeads(nn.Module):
    """Query and key projections of all router layers: ``[L, E, H*D]`` and ``[L, E, G*D]``."""

    def __init__(self, layers: int, hidden: int, heads: int, kv_heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        scale = hidden**-0.5
        self.query = nn.Parameter(torch.randn(layers, hidden, heads * dim) * scale)
        key = torch.randn(layers, hidden, kv_heads, dim) * scale
        self.key = nn.Parameter(key.flatten(2))
        # Start every query head as its KV head's twin: scores begin as a random-projection similarity.
        with torch.no_grad():
            group = heads // kv_heads
            self.query.copy_(key.repeat_interleave(group, dim=2).flatten(2))

    def queries(self, layer: int, rows: Tensor) -> Tensor:
        """Folded cosine queries ``[..., G*D]`` of layer inputs ``[..., E]`` (ops.fold_queries)."""
        split = _project(rows, self.query[layer]).unflatten(
            -1, (self.kv_heads, self.heads // self.kv_heads, self.dim)
        )
        return (F.normalize(split, dim=-1).sum(-2) / self.heads).flatten(-2)

    def keys(self, layer: int, rows: Tensor) -> Tensor:
        """Unit-length keys ``[..., G*D]`` of chunk means ``[..., E]``."""
        split = _project(rows, self.key[layer]).unflatten(-1, (self.kv_heads, self.dim))
        return F.normalize(split, dim=-1).flatten(-2)


def _project(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight``, multiplied in bfloat16 (the cached rows are no finer) and returned in float32."""
    return (rows.bfloat16() @ weight.bfloat16()).float()


def _drop(rows: Tensor, share: float) -> Tensor:
    """Dropout of whole features: the same ones for all rows of a batch, which costs next to nothing."""
    kept = torch.rand(rows.shape[-1]) >= share
    return rows * (kept / (1 - share)).to(rows.dtype)


def _scores(queries: Tensor, keys: Tensor, tokens: Tensor, chunks: Tensor) -> Tensor:
    """Document scores ``[B, P]``: max over each question's tokens and each document's chunks.

    ``queries`` ``[sum(tokens), F]`` and ``keys`` ``[sum(chunks), F]`` lie flat. All pairs are scored
    without gradients; only the winning pair of each (question, document) is computed again with them,
    which is the same gradient as through the max at a fraction of the work.
    """
    with torch.no_grad():
        dots = (queries.bfloat16() @ keys.bfloat16().T).float().numpy()
        token, chunk = _winners(dots, tokens.numpy(), chunks.numpy())
    return (queries[token] * keys[chunk]).sum(-1)


def _winners(dots: NDArray[np.float32], tokens: Numbers, chunks: Numbers) -> tuple[Tensor, Tensor]:
    """Row and column of the largest score of every (question, document) pair, each ``[B, P]``."""
    token_starts, chunk_starts = np.cumsum(tokens) - tokens, np.cumsum(chunks) - chunks
    by_document = np.maximum.reduceat(dots, chunk_starts, axis=1)  # [tokens, P]
    rows = np.stack(
        [
            start + by_document[start : start + length].argmax(0)
            for start, length in zip(token_starts, tokens, strict=True)
        ]
    )  # [B, P]
    steps = np.minimum(np.arange(chunks.max())[None], chunks[:, None] - 1)
    columns = chunk_starts[:, None] + steps  # [P, C]
    best = dots[rows[:, :, None], columns[None]].argmax(2)  # [B, P]
    return torch.from_numpy(rows), torch.from_numpy(
        np.take_along_axis(columns[None], best[:, :, None], 2)[:, :, 0]
    )


def _contrastive(scores: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Eq. 5: mean over positives of -log(e^s / (e^s + sum of negatives)); ``positive`` ``[B, P]`` bool."""
    logits = scores / temperature
    negatives = logits.masked_fill(positive, -torch.inf).logsumexp(1, keepdim=True)
    losses = F.softplus(negatives - logits)
    return losses[positive].mean()


@torch.inference_mode()
def score_documents(
    heads: RouterHeads,
    questions: HiddenStates,
    documents: HiddenStates,
    items: Sequence[int],
    layers: Sequence[int] | None = None,
    *,
    batch_tokens: int = 256,
) -> Tensor:
    """Mean scores over ``layers`` (all when None) ``[len(items), documents]`` of some questions."""
    slots = range(heads.query.shape[0]) if layers is None else layers
    total = torch.zeros(len(items), len(documents.starts) - 1)
    chunk_starts = documents.starts[:-1].numpy()
    for layer in slots:
        keys = heads.keys(layer, documents.rows[layer].float()).bfloat16()
        for part in _parts(questions.lengths()[list(items)].tolist(), batch_tokens):
            some = torch.tensor(items[part])
            queries = heads.queries(layer, questions.rows[layer][questions.flat(some)].float())
            dots = (queries.bfloat16() @ keys.T).float().numpy()  # [tokens, all chunks]
            lengths = questions.lengths()[some].numpy()
            by_document = np.maximum.reduceat(dots, chunk_starts, axis=1)
            best = np.maximum.reduceat(by_document, np.cumsum(lengths) - lengths, axis=0)
            total[part] += torch.from_numpy(best)
    return total / len(slots)


def recall(scores: Tensor, gold: Sequence[Sequence[int]], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of questions with a gold document among the k best, for scores ``[questions, documents]``."""
    ranked = scores.topk(min(max(ks), scores.shape[1]), dim=1).indices.tolist()
    return {
        f"recall@{k}": sum(bool(set(row[:k]) & set(right)) for row, right in zip(ranked, gold, strict=True))
        / len(gold)
        for k in ks
    }


def _parts(lengths: list[int], budget: int) -> Iterator[slice]:
    start, size = 0, 0
    for index, length in enumerate(lengths):
        if size and size + length > budget:
            yield slice(start, index)
            start, size = index, 0
        size += length
    yield slice(start, len(lengths))


class _Batches:
    """Draws questions and the passages to tell apart."""

    def __init__(self, gold: Sequence[Sequence[int]], recipe: RouterTraining) -> None:
        self.gold = gold
        self.recipe = recipe
        self.random = torch.Generator().manual_seed(recipe.seed)
        self.hard: dict[int, list[int]] = {}
        self.order: list[int] = []

    def draw(self) -> tuple[list[int], list[int], Tensor]:
        """Question items, passage items and which passage answers which question ``[B, P]``."""
        if len(self.order) < self.recipe.batch_size:
            self.order = torch.randperm(len(self.gold), generator=self.random).tolist()
        questions = [self.order.pop() for _ in range(self.recipe.batch_size)]
        passages: dict[int, int] = {}
        for question in questions:
            for passage in (self._one(self.gold[question]), *self._hard(question)):
                passages.setdefault(passage, len(passages))
        positive = torch.zeros(len(questions), len(passages), dtype=torch.bool)
        for row, question in enumerate(questions):
            for passage in self.gold[question]:
                if passage in passages:
                    positive[row, passages[passage]] = True
        return questions, list(passages), positive

    def _one(self, choices: Sequence[int]) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=self.random))]

    def _hard(self, question: int) -> list[int]:
        found = self.hard.get(question, [])
        return [self._one(found) for _ in range(self.recipe.hard_negatives)] if found else []


def _mine(heads: RouterHeads, questions: HiddenStates, documents: HiddenStates, batches: _Batches) -> None:
    """Rank a random part of the questions and remember confusable passages: ranks 1 to 30, gold excluded."""
    some = torch.randperm(len(batches.gold), generator=batches.random)[:2048].tolist()
    a_third = range(1, heads.query.shape[0], 3)
    ranked = score_documents(heads, questions, documents, some, a_third).topk(30, dim=1).indices
    for item, passages in zip(some, ranked.tolist(), strict=True):
        gold = set(batches.gold[item])
        batches.hard[item] = [passage for passage in passages if passage not in gold]


def train_router(
    heads: RouterHeads,
    questions: HiddenStates,
    documents: HiddenStates,
    gold: Sequence[Sequence[int]],
    recipe: RouterTraining,
) -> list[dict[str, float]]:
    """Train ``heads`` in place; returns the log, one entry per 20 steps (step, loss, seconds)."""
    torch.manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(
        heads.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    batches, log, started = _Batches(gold, recipe), [], time.monotonic()
    for step in range(1, recipe.steps + 1):
        since = step - recipe.mine_from_step
        if recipe.hard_negatives and since >= 0 and since % recipe.mine_every == 0:
            _mine(heads, questions, documents, batches)
        drawn = batches.draw()
        loss = _step(heads, questions, documents, drawn, recipe)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0 or step == recipe.steps:
            entry = {"step": step, "loss": loss, "seconds": time.monotonic() - started}
            log.append(entry)
            print(json.dumps(entry), flush=True)
    return log


def _step(
    heads: RouterHeads,
    questions: HiddenStates,
    documents: HiddenStates,
    drawn: tuple[list[int], list[int], Tensor],
    recipe: RouterTraining,
) -> float:
    """Forward and backward of one batch; returns the loss of the mean over layers."""
    items, passages, positive = torch.tensor(drawn[0]), torch.tensor(drawn[1]), drawn[2]
    tokens, chunks = questions.lengths()[items], documents.lengths()[passages]
    rows, columns = questions.flat(items), documents.flat(passages)
    per_layer = []
    for layer in range(heads.query.shape[0]):
        queries = heads.queries(layer, _drop(questions.rows[layer][rows], recipe.dropout))
        keys = heads.keys(layer, _drop(documents.rows[layer][columns], recipe.dropout))
        per_layer.append(_scores(queries, keys, tokens, chunks))
    mean = torch.stack(per_layer).mean(0)
    loss = _contrastive(mean, positive, recipe.temperature)
    own = torch.stack([_contrastive(scores, positive, recipe.temperature) for scores in per_layer]).mean()
    (loss + 0.5 * own).backward()
    return float(loss.detach())


def save_router(heads: RouterHeads, layers: Sequence[int], path: Path, recipe: RouterTraining) -> None:
    """Write the projections under their checkpoint names in bfloat16."""
    tensors: dict[str, Tensor] = {}
    for slot, layer in enumerate(layers):
        prefix = f"model.layers.{layer}.self_attn"
        tensors[f"{prefix}.router_q_proj.0.weight"] = heads.query[slot].detach().T.contiguous().bfloat16()
        tensors[f"{prefix}.router_k_proj.0.weight"] = heads.key[slot].detach().T.contiguous().bfloat16()
    save_file(tensors, path, metadata={"recipe": json.dumps(asdict(recipe))})
