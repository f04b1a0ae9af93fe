"""Sampling and stop strings."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msa_memory.engine.sampling import Sampler, SamplingOptions, StopScanner
from msa_memory.errors import ConfigError

CPU = torch.device("cpu")
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def first_stop(text: str, stops: list[str]) -> int | None:
    """Where the stop string begins that is complete first; the longest of those that end there."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return min(begins)
    return None


@given(pieces=st.lists(st.text("abc", max_size=5)), stops=STOPS)
def test_stop_scanner_equals_cutting_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    scanner, whole = StopScanner(stops), "".join(pieces)
    shown = "".join([scanner.push(piece) for piece in pieces] + [scanner.flush()])
    cut = first_stop(whole, stops)
    assert shown == (whole if cut is None else whole[:cut])
    assert scanner.stopped == (cut is not None)


@given(text=st.text("abc", max_size=30), stops=STOPS, sizes=st.lists(st.integers(1, 5), min_size=1))
def test_what_was_shown_is_never_taken_back(text: str, stops: list[str], sizes: list[int]) -> None:
    scanner, at, shown = StopScanner(stops), 0, ""
    for size in sizes * len(text):
        shown += scanner.push(text[at : at + size])
        at += size
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["Hel", "lo\n", "\nworld"], ["\n\n"], "Hello"),
        (["a", "b", "a", "b", "c"], ["abc"], "ab"),
        (["one", " END", "ING", " two"], ["END."], "one ENDING two"),
        (["xyz"], ["y", "z"], "x"),
        (["xyz"], [], "xyz"),
        (["日", "本", "語"], ["本語"], "日"),
        (["abc"], ["b", "abc"], "a"),
    ],
)
def test_stop_scanner_by_example(pieces: list[str], stops: list[str], shown: str) -> None:
    scanner = StopScanner(stops)
    assert "".join([scanner.push(piece) for piece in pieces] + [scanner.flush()]) == shown


def test_nothing_is_shown_after_a_stop() -> None:
    scanner = StopScanner(["."])
    assert scanner.push("Oslo. And more") == "Oslo"
    assert scanner.push("Bergen.") == ""
    assert scanner.flush() == ""


def test_greedy_takes_the_highest_logit() -> None:
    sampler = Sampler(SamplingOptions(), CPU)
    assert sampler(torch.tensor([0.1, 3.0, -1.0, 2.9])) == 1


def test_a_seed_makes_sampling_repeatable() -> None:
    logits = torch.zeros(100)
    draws = [
        [sampler(logits) for _ in range(20)]
        for sampler in (Sampler(SamplingOptions(temperature=1.0, seed=5), CPU) for _ in range(2))
    ]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 5


def test_sampling_follows_the_distribution() -> None:
    sampler = Sampler(SamplingOptions(temperature=1.0, top_p=1.0, seed=0), CPU)
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1]))
    drawn = torch.bincount(torch.tensor([sampler(logits) for _ in range(4000)]), minlength=3) / 4000
    torch.testing.assert_close(drawn, torch.tensor([0.7, 0.2, 0.1]), atol=0.03, rtol=0)


def test_temperature_flattens() -> None:
    logits = torch.tensor([2.0, 0.0])
    shares = []
    for temperature in (0.5, 1.0, 4.0):
        sampler = Sampler(SamplingOptions(temperature=temperature, top_p=1.0, seed=1), CPU)
        shares.append(sum(sampler(logits) == 0 for _ in range(2000)) / 2000)
    expected = [1 / (1 + math.exp(-2 / temperature)) for temperature in (0.5, 1.0, 4.0)]
    assert shares == pytest.approx(expected, abs=0.04)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=20), st.floats(0.05, 0.95))
def test_top_p_draws_from_the_nucleus_only(values: list[float], top_p: float) -> None:
    logits = torch.tensor(values)
    sampler = Sampler(SamplingOptions(temperature=1.0, top_p=top_p, seed=0), CPU)
    probabilities = logits.softmax(-1)
    for _ in range(5):
        drawn = probabilities[sampler(logits)]
        assert float(probabilities[probabilities > drawn].sum()) < top_p + 1e-5


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_the_lowest_temperatures_are_greedy(temperature: float) -> None:
    sampler = Sampler(SamplingOptions(temperature=temperature), CPU)
    assert {sampler(torch.tensor([1.0, 5.0, 4.0, -80.0])) for _ in range(10)} == {1}


def test_sampling_works_on_bfloat16_logits() -> None:
    sampler = Sampler(SamplingOptions(temperature=0.7, seed=0), CPU)
    assert sampler(torch.tensor([0.0, 30.0], dtype=torch.bfloat16)) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("max_new_tokens", "many"),
        ("temperature", -1),
        ("temperature", 101),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", None),
        ("stop", ("",)),
        ("stop", ("ok", 5)),
    ],
)
def test_unusable_options_are_named(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match="stop string" if option == "stop" else option):
        SamplingOptions(**{option: value})
