"""From which doubt on to refuse."""

from hypothesis import given
from hypothesis import strategies as st

from msa_memory.engine.train.calibrate import refusal_rule

doubts = st.lists(st.floats(-25, 8), min_size=1, max_size=40)


@given(doubts, doubts, st.floats(0, 0.5))
def test_no_more_answerable_questions_are_lost_than_allowed(
    present: list[float], absent: list[float], lost: float
) -> None:
    least, rates = refusal_rule(present, absent, lost)
    assert rates["present"] <= lost
    assert rates["absent"] == sum(doubt >= least for doubt in absent) / len(absent)
    assert round(least, 4) == least
    assert least >= -20


@given(doubts, st.integers(0, 19))
def test_as_many_are_refused_as_are_allowed(absent: list[float], allowed: int) -> None:
    present = [place / 2 for place in range(20)]
    least, rates = refusal_rule(present, absent, allowed / 20)
    assert rates["present"] == allowed / 20
    assert present[19 - allowed] < least <= present[19 - allowed] + 0.001


def test_without_answerable_questions_likelihood_refuses_nothing() -> None:
    assert refusal_rule([], [-3.0], 0.1)[0] > 0
