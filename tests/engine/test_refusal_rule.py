"""When to refuse, from how likely a refusal is and how relevant the best passage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_memory.engine.train.calibrate import refusal_rule

doubts = st.lists(st.tuples(st.floats(-25, 0), st.floats(-1, 1)), min_size=1, max_size=40)


def refused(rule: dict[str, float], doubt: tuple[float, float]) -> bool:
    written = {name: round(value, 4) for name, value in rule.items()}
    logprob, relevance = doubt
    least = written["refusal_logprob"] + written["refusal_slope"] * (relevance - written["refusal_relevance"])
    return logprob >= least


@given(doubts, doubts, st.floats(0, 0.5))
def test_no_more_answerable_questions_are_lost_than_allowed(
    present: list[tuple[float, float]], absent: list[tuple[float, float]], lost: float
) -> None:
    rule, rates = refusal_rule(present, absent, lost, weigh=True)
    assert rates["present"] <= lost
    assert rule["refusal_slope"] >= 0
    assert rule["refusal_logprob"] >= -20


def test_both_signs_together_tell_more_than_one() -> None:
    random = np.random.default_rng(0)

    def some(likely: float, relevant: float) -> list[tuple[float, float]]:
        return list(
            zip(
                random.normal(likely, 1.5, 400).clip(max=0).tolist(),
                random.normal(relevant, 0.1, 400).tolist(),
                strict=True,
            )
        )

    present, absent = some(-5, 0.5), some(-3.5, 0.4)
    rule, rates = refusal_rule(present, absent, 0.1, weigh=True)
    assert np.mean([refused(rule, doubt) for doubt in present]) == pytest.approx(rates["present"], abs=0.01)
    assert np.mean([refused(rule, doubt) for doubt in absent]) == pytest.approx(rates["absent"], abs=0.01)
    alone, by_likelihood = refusal_rule(present, absent, 0.1, weigh=False)
    assert list(alone) == ["refusal_logprob"]
    assert rates["absent"] > by_likelihood["absent"] + 0.1
    assert rule["refusal_slope"] == pytest.approx(1.5**2 / 0.1**2 * 0.1 / 1.5, rel=0.25), "of two normals"


def test_a_sign_that_points_the_wrong_way_does_not_count() -> None:
    random = np.random.default_rng(1)
    present = [(float(p), 0.2) for p in random.normal(-6, 1, 50)]
    absent = [(float(p), 0.8) for p in random.normal(-2, 1, 50).clip(max=0)]
    rule, rates = refusal_rule(present, absent, 0.1, weigh=True)
    assert rule["refusal_slope"] == 0
    assert rates["absent"] > 0.9
    rule, _ = refusal_rule([(-1.0, 0.5)] * 9, [(-9.0, 0.5)] * 9, 0.0, weigh=True)
    assert rule["refusal_logprob"] > -1
