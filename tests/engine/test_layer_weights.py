"""What router layers count in a passage's relevance: learning it, storing it, using it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from msa_memory.engine.config import MSAConfig, read_msa
from msa_memory.engine.engine import load_engine
from msa_memory.engine.train.layer_weights import fit_layer_weights
from msa_memory.errors import CheckpointError, ConfigError
from msa_memory.testing import tiny_model


def _scores(
    quality: list[float], questions: int = 60, passages: int = 30
) -> tuple[torch.Tensor, list[list[int]]]:
    """Layers that raise the right passage by so much over noise."""
    made = torch.Generator().manual_seed(0)
    gold = [[question % passages] for question in range(questions)]
    scores = 0.05 * torch.randn(len(quality), questions, passages, generator=made)
    for question, (right,) in enumerate(gold):
        scores[:, question, right] += torch.tensor(quality)
    return scores, gold


def test_a_layer_that_finds_more_counts_more() -> None:
    scores, gold = _scores([0.0, 0.05, 0.15])
    weights = fit_layer_weights(scores, gold)
    assert weights[0] < weights[1] < weights[2]
    assert weights[0] < 0.1
    assert sum(weights) == pytest.approx(1, abs=1e-6)


def test_the_fit_beats_equal_weights_on_other_questions() -> None:
    scores, gold = _scores([0.0, 0.0, 0.0, 0.08], questions=400)
    weights = torch.tensor(fit_layer_weights(scores[:, :200], gold[:200]))
    right = torch.tensor(gold[200:])[:, 0]

    def found(mean: torch.Tensor) -> int:
        return int((mean[200:].argmax(1) == right).sum())

    assert found(torch.tensordot(weights, scores, 1)) > 1.5 * found(scores.mean(0))


def test_fitting_needs_a_right_passage_for_every_question() -> None:
    scores, gold = _scores([0.1])
    with pytest.raises(ConfigError, match="1 of them without one"):
        fit_layer_weights(scores, [*gold[:-1], []])
    with pytest.raises(ConfigError, match="got 59 questions"):
        fit_layer_weights(scores, gold[:-1])


def test_the_weighted_mean_is_the_plain_sum_and_keeps_masked_passages_masked() -> None:
    msa = MSAConfig(router_layers=(0, 2, 4), layer_weights=(0.25, 0.75, 0.0))
    scores = np.array([[0.2, -np.inf], [0.4, -np.inf], [9.0, -np.inf]], dtype=np.float32)
    assert msa.mean_of_layers(scores)[0] == pytest.approx(0.25 * 0.2 + 0.75 * 0.4)
    assert msa.mean_of_layers(scores)[1] == -np.inf
    alike = msa.with_options(layer_weights=())
    assert np.array_equal(alike.mean_of_layers(scores), scores.mean(axis=0))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], "one number of at least 0 for each of the 3 router layers"),
        ([0.5, 0.9, -0.4], "at least 0"),
        ([0.5, 0.9, 0.4], "in sum 1"),
        (["a lot", 0, 0], "is not a list of numbers"),
        (7, "is not a list of numbers"),
    ],
)
def test_a_checkpoint_with_wrong_layer_weights_is_refused(weights: Any, message: str) -> None:
    settings = {"router_layer_idx": "0,2,4", "router_layer_weights": weights}
    config = {"num_hidden_layers": 6, "msa_config": settings}
    with pytest.raises(CheckpointError, match=message):
        read_msa(config)


def test_relevance_follows_the_weights_and_the_states_stay_the_same() -> None:
    engine = load_engine(tiny_model())
    states = [engine.encode(number, "", f"A note about subject {number}.") for number in range(6)]
    bank = engine.new_bank(states.__getitem__)
    for number, one in enumerate(states):
        bank.add(number, one.router_keys, one.terms)
    layers = len(engine.msa.router_layers)
    plain = engine.route("Which subject?", bank.view(), lexical_weight=0.0)
    first_only = (1.0, *(0.0,) * (layers - 1))
    bank.msa = bank.msa.with_options(layer_weights=first_only)
    weighed = engine.route("Which subject?", bank.view(), lexical_weight=0.0)
    assert np.array_equal(weighed.scores, plain.scores)
    assert np.array_equal(weighed.relevance(), plain.scores[0])
    assert not np.array_equal(plain.relevance(), plain.scores[0])
