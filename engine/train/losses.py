"""Losses over a packed forward: the routers' auxiliary loss and the three token cross-entropies.

The default auxiliary loss is the paper's eq. 5 (arXiv 2603.23516), ``INFONCE_DECOUPLE``. The focal
exponent is a parameter (the published trainer passes the number of positives there), probabilities come
from stable log-sum-exps without a constant inside the logarithm, and labels are never written to. Source:
msa-spec section 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from msa_memory.engine.config import AUX_LOSSES, MSAConfig
from msa_memory.engine.train.forward import PackedOutput
from msa_memory.errors import ConfigError, EngineError

__all__ = ["IGNORED", "Losses", "next_token_loss", "router_loss", "training_loss"]

IGNORED = -100
TEMPERATURE_RANGE = (0.001, 0.5)
BCE_BIAS = -20.0

Labels = Sequence[Sequence[int]]
"""Per row, one label per token (or per document); token labels of -100 are ignored."""


@dataclass(frozen=True, slots=True)
class Losses:
    """The weighted ``total`` to differentiate and its unweighted parts; a part without labels is None."""

    total: Tensor
    lm: Tensor | None
    router: Tensor | None
    reconstruction: Tensor | None
    answer: Tensor | None


def next_token_loss(output: PackedOutput, labels: Labels) -> Tensor:
    """Mean cross-entropy of predicting each labelled token from the one before it in its row.

    Logits are computed at the predicting tokens only. A label on a row's first token has nothing before
    it and is ignored; without any labels left the loss is a constant 0.
    """
    sources, targets, start = [], [], 0
    _check_rows("labels", labels, output.lengths)
    for row in labels:
        for at, label in enumerate(row):
            if at and label != IGNORED:
                sources.append(start + at - 1)
                targets.append(label)
        start += len(row)
    if not sources:
        return output.hidden.new_zeros((), dtype=torch.float32)
    device = output.hidden.device
    logits = output.logits(torch.tensor(sources, device=device))
    return F.cross_entropy(logits, torch.tensor(targets, device=device))


def router_loss(
    doc_scores: Mapping[int, Tensor],
    relevant: Sequence[Sequence[int] | None],
    *,
    method: str = "INFONCE_DECOUPLE",
    temperature: float | Tensor = 0.1,
    first_layer: int = 0,
    gamma: float = 2.0,
    bias: float | Tensor = BCE_BIAS,
) -> Tensor:
    """Auxiliary loss averaged over all pairs of a router layer from ``first_layer`` on and a labelled row.

    Args:
        doc_scores: per router layer ``[R, max document code + 1]``, as ``PackedOutput.doc_scores``.
        relevant: per row 0 or 1 for each of its documents, in order. Rows of None, rows without a relevant
            document and rows that scored nothing are left out; with no pairs left the loss is a constant 0.
        temperature: divides the scores, clamped to 0.001 .. 0.5; unused by BCE.
        gamma: exponent of the FOCAL methods.
        bias: added to the scores by BCE.

    Raises:
        ConfigError: unknown method or negative gamma.
        EngineError: a row has more or fewer labels than documents.
    """
    if method not in AUX_LOSSES:
        raise ConfigError(f"aux_loss_method is {method!r}; expected one of {', '.join(AUX_LOSSES)}")
    if gamma < 0:
        raise ConfigError(f"gamma is {gamma}; it must be at least 0")
    losses = []
    for layer, table in doc_scores.items():
        for row, labels in zip(table, relevant, strict=True):
            scores = row[row > -torch.inf]
            if layer < first_layer or labels is None or not any(labels) or not len(scores):
                continue
            if len(labels) != len(scores):
                raise EngineError(f"a row has {len(scores)} documents but {len(labels)} relevance labels")
            positive = torch.tensor([bool(label) for label in labels], device=row.device)
            losses.append(_row_loss(scores, positive, method, temperature, gamma, bias))
    return torch.stack(losses).mean() if losses else torch.zeros(())


def training_loss(
    output: PackedOutput,
    msa: MSAConfig,
    *,
    num_layers: int,
    first_layer: int | None = None,
    labels: Labels | None = None,
    relevant: Sequence[Sequence[int] | None] | None = None,
    reconstruction: Labels | None = None,
    answer: Labels | None = None,
    weights: Mapping[str, float] | None = None,
    temperature: float | Tensor | None = None,
    bias: float | Tensor = BCE_BIAS,
    gamma: float = 2.0,
) -> Losses:
    """All losses of one batch and their weighted sum; parts whose labels are None are left out.

    Args:
        first_layer: lowest layer whose router takes part in the auxiliary loss; None means half of the
            decoder's depth (msa-spec 10).
        labels, reconstruction, answer: next-token labels at their own index, -100 ignored.
        relevant: as in ``router_loss``.
        weights: by ``lm``, ``aux``, ``rec`` and ``ans``; ``msa.loss_weights`` when None.
        temperature: ``msa.infonce_temperature`` when None.
    """
    scale = {**msa.loss_weights, **(weights or {})}
    lm, rec, ans = (
        None if given is None else next_token_loss(output, given)
        for given in (labels, reconstruction, answer)
    )
    router = None
    if relevant is not None:
        router = router_loss(
            output.doc_scores,
            relevant,
            method=msa.aux_loss_method,
            temperature=msa.infonce_temperature if temperature is None else temperature,
            first_layer=(num_layers + 1) // 2 if first_layer is None else first_layer,
            gamma=gamma,
            bias=bias,
        )
    parts = {"lm": lm, "aux": router, "rec": rec, "ans": ans}
    total = output.hidden.new_zeros((), dtype=torch.float32)
    for name, part in parts.items():
        if part is not None:
            total = total + scale[name] * part
    return Losses(total, lm, router, rec, ans)


def _row_loss(
    scores: Tensor,
    positive: Tensor,
    method: str,
    temperature: float | Tensor,
    gamma: float,
    bias: float | Tensor,
) -> Tensor:
    """Loss of one row on one layer from ``scores`` ``[P]`` and ``positive`` ``[P]`` bool."""
    if method == "BCE":
        sign = torch.where(positive, 1.0, -1.0)
        return F.softplus(-(scores + bias) * sign).mean()
    logits = scores / _clamped(temperature)
    if "DECOUPLE" in method:
        negatives = logits.masked_fill(positive, -torch.inf).logsumexp(0)
        terms = F.softplus(negatives - logits[positive])
    else:
        terms = logits.logsumexp(0) - logits[positive]
    if method.endswith("FOCAL"):
        terms = terms * (-torch.expm1(-terms)).clamp_min(1e-12) ** gamma
    return terms.mean()


def _clamped(temperature: float | Tensor) -> float | Tensor:
    low, high = TEMPERATURE_RANGE
    if isinstance(temperature, Tensor):
        return temperature.clamp(low, high)
    return min(max(temperature, low), high)


def _check_rows(name: str, rows: Labels, lengths: Sequence[int]) -> None:
    if [len(row) for row in rows] != list(lengths):
        raise EngineError(
            f"{name} have rows of {[len(row) for row in rows]} entries; the batch has {list(lengths)} tokens"
        )
