"""What each router layer's scores count in a passage's relevance, learned on questions kept from training.

Routers learn their training passages by heart, layer by layer and not alike: weights learned along with them
would trust the layer that remembers best. On questions of other articles they are a convex fit of a few
numbers: the paper's contrastive loss (arXiv 2603.23516, eq. 5) over the weighted sum of the layers' scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msa_memory.engine.train.hidden import HiddenStates
from msa_memory.engine.train.router import RouterHeads, score_documents
from msa_memory.errors import ConfigError

__all__ = ["LEAST_QUESTIONS", "fit_layer_weights", "score_layers"]

LEAST_QUESTIONS = 100
"""With fewer, chance decides more than the layers do: all count alike."""
STEPS = 300
START_TEMPERATURE = 0.03


def score_layers(
    heads: RouterHeads, questions: HiddenStates, documents: HiddenStates, items: Sequence[int]
) -> Tensor:
    """Scores ``[L, len(items), documents]`` of every router layer."""
    layers = range(heads.query.shape[0])
    return torch.stack([score_documents(heads, questions, documents, items, [layer]) for layer in layers])


def fit_layer_weights(scores: Tensor, gold: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Weights ``[L]`` of at least 0, in sum 1, under which right passages stand out most.

    Args:
        scores: ``[L, Q, P]``.
        gold: places of the passages that answer each question.

    Raises:
        ConfigError: a question has no right passage, or the sizes differ.
    """
    if len(gold) != scores.shape[1] or not all(gold):
        raise ConfigError(
            f"layer weights need a right passage for each of {scores.shape[1]} questions; got {len(gold)} "
            f"questions, {sum(not right for right in gold)} of them without one"
        )
    wrong = torch.ones(scores.shape[1:], dtype=torch.bool)
    for row, right in enumerate(gold):
        wrong[row, list(right)] = False
    choice = torch.zeros(len(scores), requires_grad=True)
    sharpness = torch.tensor(1 / START_TEMPERATURE).log().requires_grad_()
    optimizer = torch.optim.Adam([choice, sharpness], lr=0.05)
    with torch.enable_grad():
        for _ in range(STEPS):
            mean = torch.tensordot(choice.softmax(0), scores, 1) * sharpness.exp()
            right_mass = mean.masked_fill(wrong, -torch.inf).logsumexp(1)
            loss = (mean.logsumexp(1) - right_mass).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    rounded = [round(weight, 3) for weight in choice.detach().softmax(0).tolist()]
    rounded[rounded.index(max(rounded))] += 1.0 - sum(rounded)  # in sum 1 after rounding as well
    return tuple(round(weight, 3) for weight in rounded)
