"""Questions told apart by their passages, with gradients into the layers that routers read.

Routers project what the layers below hand them: on frozen layers they stop where those stop telling
passages apart. Here the routers stay as they are and the layers learn, from the loss routers themselves
learn from (arXiv 2603.23516, eq. 5) over the passages of one batch. Scores are those of the engine: cosines
of pooled keys, the best pair of a question's token and a passage's chunk.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.train.branches import attend_masked, causal_mask
from msa_memory.engine.train.exercises import scouted
from msa_memory.engine.train.mixture import Mixture
from msa_memory.engine.train.router import contrastive_loss, pair_scores
from msa_memory.errors import ConfigError, EngineError

__all__ = ["RoutedQuestions", "RoutingExercises", "routing_loss"]

OWN_SHARE = 0.5
"""What each router layer's own loss counts beside that of their weighted mean."""


@dataclass(frozen=True, slots=True)
class RoutedQuestions:
    """Token ids of some questions and passages, and which passages (by place) answer each question.

    Questions stand behind the template ``head``, from ``position`` on; passages each from 0.
    """

    head: tuple[int, ...]
    position: int
    questions: tuple[tuple[int, ...], ...]
    documents: tuple[tuple[int, ...], ...]
    gold: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.head) + sum(map(len, self.questions)) + sum(map(len, self.documents))


class RoutingExercises:
    """An endless, indexable stream of batches: ``together`` questions about each of a few articles.

    Of articles that scouting routers have not learned (``exercises.scouted``).
    """

    def __init__(self, mixture: Mixture, *, questions: int, together: int = 8) -> None:
        self.mixture, self.questions, self.together = mixture, questions, together
        exercises = mixture.exercises
        self._passages = [n for n, _ in exercises.drawn if not scouted(exercises.passages[n])]
        self._articles: defaultdict[str, list[int]] = defaultdict(list)
        for number in self._passages:
            self._articles[self._article(number)].append(number)
        if len(self._passages) < 2:
            raise ConfigError(
                f"{len(self._passages)} passages with questions are left to learn routing from; it needs more"
            )

    def batch(self, index: int) -> RoutedQuestions:
        """Batch ``index``: a function of the files, the mixture's settings and ``index``."""
        mixture = self.mixture
        rng = random.Random(f"{mixture.options.seed}:routing:{index}")
        asked = [rng.choice(mixture.exercises.by_passage[number]) for number in self._drawn(rng)]
        documents: dict[int, tuple[int, ...]] = {}
        for anchor in asked:
            for number in mixture.exercises.asked[anchor].gold:
                if number not in documents:
                    documents[number] = mixture.cut(number, anchor, rng)
        places = {number: place for place, number in enumerate(documents)}
        return RoutedQuestions(
            head=tuple(mixture.prompt.head),
            position=mixture.prompt.question_position,
            questions=tuple(map(self._question, asked)),
            documents=tuple(documents.values()),
            gold=tuple(tuple(places[n] for n in mixture.exercises.asked[anchor].gold) for anchor in asked),
        )

    def _drawn(self, rng: random.Random) -> list[int]:
        """Passages of one batch, some of each of a few articles."""
        wanted = min(self.questions, len(self._passages))
        chosen: dict[int, None] = {}
        while len(chosen) < wanted:
            siblings = self._articles[self._article(rng.choice(self._passages))]
            chosen.update(dict.fromkeys(rng.sample(siblings, min(self.together, len(siblings)))))
        return list(chosen)[:wanted]

    def _article(self, number: int) -> str:
        return self.mixture.exercises.passages[number].title or f"\0{number}"

    def _question(self, anchor: int) -> tuple[int, ...]:
        ids, routes = self.mixture.prompt.question(self.mixture.exercises.asked[anchor].text)
        return tuple(token for token, routing in zip(ids, routes, strict=True) if routing)


def routing_loss(decoder: Decoder, batch: RoutedQuestions, temperature: float) -> Tensor:
    """The contrastive loss of a batch under the decoder's routers, a scalar with gradients.

    Raises:
        EngineError: the routers do not score by cosines of decoupled keys, with the mean over heads and the
            best token and chunk; or the batch lacks questions or passages.
    """
    msa = decoder.msa
    if msa is None or not (msa.decouple_router and msa.router_normalize):
        raise EngineError(
            "layers learn to route under decoupled routers with cosine scores; this model's differ"
        )
    if (msa.head_reduce, msa.query_reduce, msa.chunk_reduce) != ("mean", "max", "max"):
        raise EngineError(
            "layers learn to route by the mean over heads and the best token and chunk; this model takes "
            f"{msa.head_reduce}, {msa.query_reduce} and {msa.chunk_reduce}"
        )
    if not batch.questions or not batch.documents:
        raise EngineError("a batch to learn routing from needs questions and passages")
    attention = _Routing(decoder, batch)
    device = decoder.device
    runs = [*batch.documents, batch.head, *batch.questions]
    starts = [0] * (len(batch.documents) + 1) + [batch.position] * len(batch.questions)
    ids = torch.tensor([token for run in runs for token in run], device=device)
    positions = [torch.arange(at, at + len(run), device=device) for at, run in zip(starts, runs, strict=True)]
    decoder(ids, torch.cat(positions), attention)
    positive = torch.zeros(len(batch.questions), len(batch.documents), dtype=torch.bool, device=device)
    for row, places in enumerate(batch.gold):
        positive[row, list(places)] = True
    per_layer = torch.stack(attention.scores)
    weights = torch.tensor(msa.layer_weights or [1 / len(per_layer)] * len(per_layer), device=device)
    joined = contrastive_loss(torch.tensordot(weights, per_layer, 1), positive, temperature)
    own = torch.stack([contrastive_loss(scores, positive, temperature) for scores in per_layer])
    return joined + OWN_SHARE * (weights * own).sum()


class _Routing:
    """Passages and the head each alone, questions behind the head; keeps every router layer's scores."""

    def __init__(self, decoder: Decoder, batch: RoutedQuestions) -> None:
        assert decoder.msa is not None
        self.decoder, self.msa = decoder, decoder.msa
        self.layers = frozenset(decoder.msa.router_layers)
        self.scale = decoder.config.head_dim**-0.5
        self.scores: list[Tensor] = []
        self.documents, end = _spans(batch.documents, 0)
        (self.head,), self.asked = _spans([batch.head], end)
        self.questions, _ = _spans(batch.questions, self.asked)
        self.tokens = torch.tensor([len(run) for run in batch.questions])
        self.chunks = torch.tensor([-(-len(run) // self.msa.router_chunk) for run in batch.documents])

    def __call__(self, layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if layer in self.layers:
            self.scores.append(self._score(layer, h))
        if layer == max(self.layers):
            return None
        q = q * self.scale
        alone = [*self.documents, self.head]
        outputs = [attend_masked(q[s], k[s], v[s], causal_mask(s.stop - s.start, q)) for s in alone]
        for span in self.questions:
            size, behind = span.stop - span.start, self.head.stop - self.head.start
            mask = torch.cat((q.new_zeros(size, behind), causal_mask(size, q)), dim=1)
            keys, values = torch.cat((k[self.head], k[span])), torch.cat((v[self.head], v[span]))
            outputs.append(attend_masked(q[span], keys, values, mask))
        return torch.cat(outputs)

    def _score(self, layer: int, h: Tensor) -> Tensor:
        """Scores ``[questions, documents]`` float32."""
        routers, size = self.decoder.attention(layer), self.msa.router_chunk
        asked = ops.normalize_heads(routers.router_query(h[self.asked :])).float()
        pooled = torch.cat([ops.pool_chunks(h[span], size) for span in self.documents])
        keys = ops.normalize_heads(routers.router_key(pooled)).float()
        queries = ops.fold_queries(asked, keys.shape[1])
        return pair_scores(queries, keys.flatten(1), self.tokens, self.chunks)


def _spans(runs: Sequence[Sequence[int]], start: int) -> tuple[list[slice], int]:
    """Where runs of tokens lie one after another from ``start``, and where they end."""
    spans = []
    for run in runs:
        spans.append(slice(start, start + len(run)))
        start += len(run)
    return spans, start
