"""Fast router training: only the projections, on cached hidden states, with a contrastive loss.

Loss: the paper's eq. 5 (arXiv 2603.23516) over document scores, on every layer's own score and on the
mean over layers that the default model retrieves with. In-batch passages are the negatives; once the
routers know something, each question also brings passages they confuse with its own. Two options: the
lexical signal joins the sum that is judged, so that routers learn what words do not give; and a text
embedder's order of the batch's passages is learned along with the right answers.

Every batch is a function of its step, so a run that was killed goes on with the very next one.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from msa_memory.engine.config import BackboneConfig
from msa_memory.engine.train.hidden import HiddenStates
from msa_memory.engine.train.run import Metrics, Paused, Saving, TrainingRun, write_tensors
from msa_memory.errors import ConfigError

Numbers = NDArray[np.int64]

__all__ = [
    "RouterHeads",
    "RouterTask",
    "RouterTraining",
    "contrastive_loss",
    "pair_scores",
    "recall",
    "save_router",
    "score_documents",
    "train_router",
]

RANKED = 30
MINED = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterTraining:
    """Recipe of one run.

    ``together`` questions about one article come into a batch side by side, so that its passages are told
    apart from each other and not from strangers alone. ``hard_negatives`` are drawn per question from the
    current top of its ranking; ``own_share`` is what each layer's own loss counts beside their mean's.
    ``lexical_weight`` is where the weight of the words starts if the task has them, ``teacher_share`` what
    the teacher's order counts if it has one, and ``teacher_temperature`` divides its cosines.
    """

    steps: int = 400
    batch_size: int = 128
    together: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    temperature: float = 0.03
    hard_negatives: int = 0
    mine_from_step: int = 300
    mine_every: int = 200
    dropout: float = 0.1
    own_share: float = 0.5
    lexical_weight: float = 2.0
    teacher_share: float = 0.67
    teacher_temperature: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "together",
            "learning_rate",
            "temperature",
            "teacher_temperature",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.lexical_weight <= 0:
            raise ConfigError(f"lexical_weight is {self.lexical_weight}; it must start above 0")

    def rate(self, step: int) -> float:
        """Learning rate of step 1, 2, ...: a tenth of the steps up, then a cosine down."""
        rising = max(1, round(0.1 * self.steps))
        if step <= rising:
            return self.learning_rate * (0.04 + 0.96 * step / rising)
        part = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * part))


class RouterHeads(nn.Module):
    """Query and key projections of all router layers: ``[L, E, H*D]`` and ``[L, E, G*D]``."""

    def __init__(
        self, layers: int, hidden: int, heads: int, kv_heads: int, dim: int, *, lexical_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        scale = hidden**-0.5
        self.query = nn.Parameter(torch.randn(layers, hidden, heads * dim) * scale)
        key = torch.randn(layers, hidden, kv_heads, dim) * scale
        self.key = nn.Parameter(key.flatten(2))
        self.log_lexical_weight = nn.Parameter(torch.tensor(math.log(lexical_weight)))
        # Start every query head as its KV head's twin: scores begin as a random-projection similarity.
        with torch.no_grad():
            group = heads // kv_heads
            self.query.copy_(key.repeat_interleave(group, dim=2).flatten(2))

    @classmethod
    def like(cls, config: BackboneConfig, layers: int, *, lexical_weight: float = 1.0) -> RouterHeads:
        """Heads for so many layers of a model."""
        shape = (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
        return cls(layers, *shape, lexical_weight=lexical_weight)

    @property
    def lexical_weight(self) -> float:
        """What the lexical score counts beside the routers' mean, as the engine's calibration has it."""
        return math.exp(float(self.log_lexical_weight.detach()))

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


@dataclass(frozen=True, slots=True)
class RouterTask:
    """What to learn: hidden states, and per question the places of the passages that answer it.

    ``words`` ``[Q, P]`` are lexical scores that join the routers' (``words.word_scores``); ``teacher`` the
    embedder's unit vectors of questions ``[Q, W]`` and passages ``[P, W]``; ``articles`` what each question's
    passage belongs to.
    """

    questions: HiddenStates
    documents: HiddenStates
    gold: Sequence[Sequence[int]]
    words: Tensor | None = None
    teacher: tuple[Tensor, Tensor] | None = None
    articles: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not self.gold:
            raise ConfigError("no question has its passages among the files; router training needs some")


def train_router(
    heads: RouterHeads,
    task: RouterTask,
    recipe: RouterTraining,
    out: Path,
    *,
    data: str = "",
    examine: Callable[[], dict[str, Any]] | None = None,
    evaluate_every: int = 200,
    save_every_s: float = 300.0,
    deadline: float | None = None,
    report: Callable[[int, dict[str, Any]], None] = lambda step, figures: None,
) -> None:
    """Train ``heads`` in place, or go on with the run in ``out``; writes ``metrics.jsonl`` there.

    ``examine`` gives the figures on held-out data, every ``evaluate_every`` steps and at the end.

    Raises:
        Paused: the ``deadline`` (monotonic) is over; the next call goes on.
        ConfigError: ``out`` holds a run with another recipe or other data.
        CheckpointError: its state is damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    identity = json.dumps([asdict(recipe), data, task.words is not None, task.teacher is not None])
    named = dict(heads.named_parameters())
    if task.words is None:
        named.pop("log_lexical_weight")
    run = TrainingRun(named, out, identity, betas=(0.9, 0.999), weight_decay=recipe.weight_decay)
    batches = _Batches(task, recipe)
    done = run.resume()
    batches.hard = run.extra.get("hard", batches.hard)
    saving = Saving(save_every_s, deadline)
    with Metrics(out / "metrics.jsonl", done) as metrics:
        for step in range(done + 1, recipe.steps + 1):
            started = time.monotonic()
            since = step - recipe.mine_from_step
            if recipe.hard_negatives and since >= 0 and since % recipe.mine_every == 0:
                _mine(heads, task, batches, step)
            figures = _step(heads, task, batches.draw(step), recipe)
            run.step(recipe.rate(step))
            figures["lexical_weight"] = heads.lexical_weight if task.words is not None else 0.0
            figures["seconds"] = time.monotonic() - started
            if examine is not None and (step % evaluate_every == 0 or step == recipe.steps):
                figures["held_out"] = examine()
            metrics.write(step, figures)
            report(step, figures)
            if saving.due() or step == recipe.steps:
                run.extra["hard"] = batches.hard
                run.save(step)
            if saving.over and step < recipe.steps:
                raise Paused(f"router training stopped after step {step} of {recipe.steps}")


@dataclass(frozen=True, slots=True)
class _Batch:
    """Question items, passage items, which passage answers which question ``[B, P]``, and the luck."""

    questions: Tensor
    passages: Tensor
    positive: Tensor
    random: torch.Generator


class _Batches:
    """Draws questions and the passages to tell apart; a function of the step and of ``hard``.

    ``hard`` ``[Q, RANKED]`` are passages that were confused with a question's own, -1 where none is known.
    """

    def __init__(self, task: RouterTask, recipe: RouterTraining) -> None:
        self.gold, self.recipe = task.gold, recipe
        self.size = min(recipe.batch_size, len(self.gold))
        self.hard = torch.full((len(self.gold), RANKED), -1, dtype=torch.int32)
        named: defaultdict[str, list[int]] = defaultdict(list)
        for item in range(len(self.gold)):
            named[task.articles[item] if task.articles is not None else str(item)].append(item)
        self._articles = list(named.values())
        self._order = lru_cache(maxsize=1)(self._epoch)

    def draw(self, step: int) -> _Batch:
        epoch, place = divmod(step - 1, len(self.gold) // self.size)
        questions = self._order(epoch)[place * self.size : (place + 1) * self.size]
        random = _generator(self.recipe.seed, 2 * step)
        passages: dict[int, int] = {}
        for question in questions:
            for passage in (_one(self.gold[question], random), *self._hard(question, random)):
                passages.setdefault(passage, len(passages))
        positive = torch.zeros(len(questions), len(passages), dtype=torch.bool)
        for row, question in enumerate(questions):
            for passage in self.gold[question]:
                if passage in passages:
                    positive[row, passages[passage]] = True
        return _Batch(torch.tensor(questions), torch.tensor([*passages]), positive, random)

    def _epoch(self, epoch: int) -> list[int]:
        """All questions once, in groups about one article, the groups in random order."""
        random = _generator(self.recipe.seed, 2 * epoch + 1)
        groups: list[list[int]] = []
        for article in self._articles:
            shuffled = [article[i] for i in torch.randperm(len(article), generator=random).tolist()]
            size = self.recipe.together
            groups += [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        order = torch.randperm(len(groups), generator=random).tolist()
        return [item for i in order for item in groups[i]]

    def _hard(self, question: int, random: torch.Generator) -> list[int]:
        found = [passage for passage in self.hard[question].tolist() if passage >= 0]
        return [_one(found, random) for _ in range(self.recipe.hard_negatives)] if found else []


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def _one(choices: Sequence[int], random: torch.Generator) -> int:
    return choices[int(torch.randint(len(choices), (1,), generator=random))]


def _mine(heads: RouterHeads, task: RouterTask, batches: _Batches, step: int) -> None:
    """Rank a random part of the questions and remember confusable passages: the best ones, gold excluded."""
    random = _generator(batches.recipe.seed, 2 * step)
    some = torch.randperm(len(batches.gold), generator=random)[:MINED].tolist()
    layers = heads.query.shape[0]
    scores = score_documents(
        heads, task.questions, task.documents, some, range(min(1, layers - 1), layers, 3)
    )
    if task.words is not None:
        scores = scores + heads.lexical_weight * task.words[some].float()
    ranked = scores.topk(min(RANKED, scores.shape[1]), dim=1).indices.tolist()
    for item, passages in zip(some, ranked, strict=True):
        gold = set(batches.gold[item])
        confused = [passage for passage in passages if passage not in gold]
        batches.hard[item] = torch.tensor(confused + [-1] * (RANKED - len(confused)), dtype=torch.int32)


def _step(heads: RouterHeads, task: RouterTask, batch: _Batch, recipe: RouterTraining) -> dict[str, Any]:
    """Forward and backward of one batch; returns the losses."""
    questions, documents = task.questions, task.documents
    tokens, chunks = questions.lengths()[batch.questions], documents.lengths()[batch.passages]
    rows, columns = questions.flat(batch.questions), documents.flat(batch.passages)
    device = heads.query.device
    per_layer = []
    for layer in range(heads.query.shape[0]):
        asked = _drop(questions.rows[layer][rows], recipe.dropout, batch.random)
        read = _drop(documents.rows[layer][columns], recipe.dropout, batch.random)
        queries, keys = heads.queries(layer, asked.to(device)), heads.keys(layer, read.to(device))
        per_layer.append(pair_scores(queries, keys, tokens, chunks))
    mean = torch.stack(per_layer).mean(0)
    positive = batch.positive.to(device)
    joined = mean
    if task.words is not None:
        words = task.words[batch.questions][:, batch.passages].to(device).float()
        joined = mean + heads.log_lexical_weight.exp() * words
    loss = contrastive_loss(joined, positive, recipe.temperature)
    own = torch.stack([contrastive_loss(scores, positive, recipe.temperature) for scores in per_layer]).mean()
    total = loss + recipe.own_share * own
    figures = {"loss": float(loss.detach()), "own": float(own.detach())}
    if task.teacher is not None:
        taught = _distillation(mean, task.teacher, batch, recipe)
        alone = [_distillation(scores, task.teacher, batch, recipe) for scores in per_layer]
        both = taught + recipe.own_share * torch.stack(alone).mean()
        total = total + recipe.teacher_share * both
        figures["teacher"] = float(taught.detach())
    total.backward()
    return figures


def _distillation(
    scores: Tensor, teacher: tuple[Tensor, Tensor], batch: _Batch, recipe: RouterTraining
) -> Tensor:
    """KL divergence of the routers' distribution over the batch's passages from the teacher's."""
    asked, read = teacher[0][batch.questions], teacher[1][batch.passages]
    wanted = ((asked @ read.T) / recipe.teacher_temperature).log_softmax(1).to(scores.device)
    found = (scores / recipe.temperature).log_softmax(1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def _project(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight``, multiplied in bfloat16 (the cached rows are no finer) and returned in float32."""
    return (rows.bfloat16() @ weight.bfloat16()).float()


def _drop(rows: Tensor, share: float, random: torch.Generator) -> Tensor:
    """Dropout of whole features: the same ones for all rows of a batch, which costs next to nothing."""
    kept = torch.rand(rows.shape[-1], generator=random) >= share
    return rows * (kept / (1 - share)).to(rows.dtype).to(rows.device)


def pair_scores(queries: Tensor, keys: Tensor, tokens: Tensor, chunks: Tensor) -> Tensor:
    """Document scores ``[B, P]``: max over each question's tokens and each document's chunks.

    ``queries`` ``[sum(tokens), F]`` and ``keys`` ``[sum(chunks), F]`` lie flat. All pairs are scored
    without gradients; only the winning pair of each (question, document) is computed again with them,
    which is the same gradient as through the max at a fraction of the work.
    """
    with torch.no_grad():
        dots = (queries.bfloat16() @ keys.bfloat16().T).float()
        winners = _winners if dots.device.type == "cpu" else _winners_padded
        token, chunk = winners(dots, tokens, chunks)
    return (queries[token] * keys[chunk]).sum(-1)


def _winners(dots: Tensor, tokens: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the largest score of every (question, document) pair, each ``[B, P]``."""
    flat, per_question, per_document = dots.numpy(), tokens.numpy(), chunks.numpy()
    token_starts, chunk_starts = _starts(per_question), _starts(per_document)
    by_document = np.maximum.reduceat(flat, chunk_starts, axis=1)  # [tokens, P]
    rows = np.stack(
        [
            start + by_document[start : start + length].argmax(0)
            for start, length in zip(token_starts, per_question, strict=True)
        ]
    )  # [B, P]
    steps = np.minimum(np.arange(per_document.max())[None], per_document[:, None] - 1)
    columns = chunk_starts[:, None] + steps  # [P, C]
    best = flat[rows[:, :, None], columns[None]].argmax(2)  # [B, P]
    return torch.from_numpy(rows), torch.from_numpy(
        np.take_along_axis(columns[None], best[:, :, None], 2)[:, :, 0]
    )


def _winners_padded(dots: Tensor, tokens: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
    """``_winners`` with padded gathers, which a GPU does at once."""
    rows, columns = _padded(tokens).to(dots.device), _padded(chunks).to(dots.device)  # [B, T], [P, C]
    by_document, best = dots[:, columns].max(2)  # [tokens, P]
    token = (
        rows[:, :, None]
        .expand(-1, -1, len(columns))
        .gather(1, by_document[rows].argmax(1, keepdim=True))[:, 0]
    )  # [B, P]
    return token, columns[torch.arange(len(columns), device=dots.device), best.gather(0, token)]


def _padded(lengths: Tensor) -> Tensor:
    """Flat indices of ragged items ``[items, longest]``; short ones repeat their last."""
    starts = lengths.cumsum(0) - lengths
    return starts[:, None] + torch.minimum(torch.arange(int(lengths.max()))[None], lengths[:, None] - 1)


def _starts(lengths: Numbers) -> Numbers:
    found: Numbers = np.cumsum(lengths) - lengths
    return found


def contrastive_loss(scores: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Eq. 5: mean over positives of -log(e^s / (e^s + sum of negatives)); ``positive`` ``[B, P]`` bool."""
    logits = scores / temperature
    negatives = logits.masked_fill(positive, -torch.inf).logsumexp(1, keepdim=True)
    losses = F.softplus(negatives - logits)
    return losses[positive].mean()


@torch.no_grad()
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
    device, chunk_lengths = heads.query.device, documents.lengths()
    for layer in slots:
        keys = heads.keys(layer, documents.rows[layer].to(device)).bfloat16()
        for part in _parts(questions.lengths()[list(items)].tolist(), batch_tokens):
            some = torch.tensor(items[part])
            queries = heads.queries(layer, questions.rows[layer][questions.flat(some)].to(device))
            dots = (queries.bfloat16() @ keys.T).float()  # [tokens, all chunks]
            best = _maxima(_maxima(dots, chunk_lengths, 1), questions.lengths()[some], 0)
            total[part] += best.cpu()
    return total / len(slots)


def _maxima(table: Tensor, lengths: Tensor, axis: int) -> Tensor:
    """Maxima of a table over consecutive runs of rows (axis 0) or columns (1), one per run."""
    if table.device.type == "cpu":
        return torch.from_numpy(np.maximum.reduceat(table.numpy(), _starts(lengths.numpy()), axis=axis))
    runs = table.transpose(0, axis).contiguous()
    best: Tensor = torch.segment_reduce(runs, "max", lengths=lengths.to(table.device), axis=0)
    return best.transpose(0, axis)


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


def save_router(heads: RouterHeads, layers: Sequence[int], path: Path, recipe: RouterTraining) -> None:
    """Write the projections under their checkpoint names in bfloat16."""
    tensors: dict[str, Tensor] = {}
    for slot, layer in enumerate(layers):
        prefix = f"model.layers.{layer}.self_attn"
        tensors[f"{prefix}.router_q_proj.0.weight"] = heads.query[slot].detach().T.bfloat16()
        tensors[f"{prefix}.router_k_proj.0.weight"] = heads.key[slot].detach().T.bfloat16()
    write_tensors(path, tensors, {"format": "pt", "recipe": json.dumps(asdict(recipe))})
