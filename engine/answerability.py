"""Whether what a model has read answers the question, told from its hidden states.

A small model's hidden states know better than its words whether the evidence holds an answer: a logistic
regression on the inputs of a few layers at the prompt's last token, and on how relevant the best passages
were, says how likely it does not. Source: Slobodkin et al., The Curious Case of Hallucinatory
(Un)answerability, arXiv 2310.11877. Trained by ``train.answerability``; the file lies beside the routers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msa_memory.errors import CheckpointError

__all__ = ["AnswerabilityHead", "HEAD_FILE", "SIGNALS", "load_head", "save_head", "told_signals"]

HEAD_FILE = "answerability.safetensors"
SIGNALS = 8
LEAST_LOGPROB = -20.0


Scores = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class AnswerabilityHead:
    """``weight`` ``[L, E]`` over the normed inputs of ``layers``, ``signals`` ``[8]`` over those of
    ``told_signals``, and ``bias``; float32.
    """

    layers: tuple[int, ...]
    weight: Tensor
    signals: Tensor
    bias: float

    def log_odds(self, inputs: Mapping[int, Tensor], told: Tensor) -> float:
        """Log-odds that there is no answer.

        Args:
            inputs: ``[E]`` by layer, at the prompt's last token.
            told: ``[8]``, of ``told_signals``.
        """
        read = torch.stack([inputs[layer] for layer in self.layers]).float().cpu()
        return float((self.weight * read).sum() + self.signals @ told) + self.bias


def told_signals(relevance: Scores, routers: Scores, words: Scores, logits: Tensor, refusal: int) -> Tensor:
    """What a head goes by beside hidden states, float32 ``[8]``.

    The relevance of the three best passages, and both its parts for the best; the log-probability that the
    answer begins as a refusal, that of its likeliest beginning, and the entropy of it.

    Args:
        relevance: ``[P]`` of the question, as its parts ``routers`` and ``words``; masked passages -inf.
        logits: ``[V]`` of the answer's first token.
        refusal: first token of a refusal.
    """
    finite = relevance[np.isfinite(relevance)]
    best = np.zeros(3, dtype=np.float32)
    count = min(3, len(finite))
    best[:count] = np.sort(np.partition(finite, len(finite) - count)[len(finite) - count :])[::-1]
    first = int(relevance.argmax()) if count else None
    parts = (0.0, 0.0) if first is None else (float(routers[first]), float(words[first]))
    likely = logits.float().log_softmax(-1)
    entropy = -(likely.exp() * likely).nansum()
    said = (float(likely[refusal].clamp(min=LEAST_LOGPROB)), float(likely.max()), float(entropy))
    return torch.tensor([*best.tolist(), *parts, *said])


def save_head(head: AnswerabilityHead, path: Path) -> None:
    """Write a head's file."""
    tensors = {
        "weight": head.weight.contiguous(),
        "signals": head.signals.contiguous(),
        "bias": torch.tensor([head.bias]),
    }
    save_file(tensors, path, metadata={"layers": ",".join(map(str, head.layers))})


def load_head(path: Path, *, layers: int, size: int) -> AnswerabilityHead:
    """Read the head of a model with so many ``layers`` of this hidden ``size``.

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            named = tuple(int(part) for part in (file.metadata() or {})["layers"].split(","))
            weight, signals, bias = (file.get_tensor(name).float() for name in ("weight", "signals", "bias"))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"answerability head {path} is damaged or incomplete: {error}") from error
    shapes = tuple(weight.shape), tuple(signals.shape), tuple(bias.shape)
    if shapes != ((len(named), size), (SIGNALS,), (1,)) or not set(named) <= set(range(layers)):
        raise CheckpointError(
            f"answerability head {path} has weights, signals and bias {shapes} for the layers {list(named)}; "
            f"the model has {layers} layers of size {size}, and there are {SIGNALS} signals"
        )
    if not all(one.isfinite().all() for one in (weight, signals, bias)):
        raise CheckpointError(f"answerability head {path} holds values that are not finite")
    return AnswerabilityHead(named, weight, signals, float(bias))
