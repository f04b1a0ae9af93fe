"""Cutting documents into passages."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_memory.engine import passages
from msa_memory.engine.passages import Span, split_passages
from msa_memory.engine.tokenizer import Tokenizer
from msa_memory.testing import tiny_model

Offsets = Callable[[str], tuple[list[int], list[tuple[int, int]]]]
TOKENIZER = Tokenizer.from_folder(tiny_model())


def characters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """One token per character."""
    return [ord(c) for c in text], [(i, i + 1) for i in range(len(text))]


def check(text: str, spans: list[Span], encode: Offsets, max_tokens: int) -> None:
    assert "".join(text[span.start : span.end] for span in spans) == text
    assert all(span.start < span.end for span in spans)
    for span in spans:
        assert span.tokens == len(encode(text[span.start : span.end])[0]) <= max_tokens


@given(text=st.text(max_size=400), max_tokens=st.integers(16, 64))
def test_any_text_is_covered_within_the_limit(text: str, max_tokens: int) -> None:
    encode = TOKENIZER.encode_with_offsets
    check(text, split_passages(text, encode, max_tokens), encode, max_tokens)


@given(text=st.text(st.sampled_from("a. \n!日😀é\u0301\x00"), max_size=300), max_tokens=st.integers(16, 40))
def test_text_of_ends_and_odd_characters_is_covered(text: str, max_tokens: int) -> None:
    encode = TOKENIZER.encode_with_offsets
    check(text, split_passages(text, encode, max_tokens), encode, max_tokens)


@settings(max_examples=20)
@given(text=st.text(min_size=1, max_size=20), repeats=st.integers(100, 2000))
def test_windows_do_not_matter(text: str, repeats: int) -> None:
    """A text much longer than the first window looked at."""
    long = text * repeats
    encode = TOKENIZER.encode_with_offsets
    check(long, split_passages(long, encode, 64), encode, 64)


def test_a_short_text_is_one_passage() -> None:
    assert split_passages("Bob.\n\nOslo.", characters, 64) == [Span(0, 11, 11)]
    assert split_passages("", characters, 64) == []


@pytest.mark.parametrize(
    ("text", "limit", "cut"),
    [
        ("A b. C d.\n\nE f. G h.", 18, "A b. C d.\n\n"),
        ("Aa bb ccc. Dd ee ff gg hh.", 18, "Aa bb ccc. "),
        ("aa bb cc dd ee ff gg", 18, "aa bb cc dd ee ff "),
        ("a" * 30, 18, "a" * 18),
        ("日本語の文。 次の文。" * 2, 18, "日本語の文。 次の文。日本語の文。 "),
    ],
    ids=["paragraph", "sentence", "word", "token", "full stop of another script"],
)
def test_cuts_prefer_natural_ends(text: str, limit: int, cut: str) -> None:
    first = split_passages(text, characters, limit)[0]
    assert text[: first.end] == cut


def test_a_paragraph_end_that_leaves_little_is_passed_over() -> None:
    text = "Hi.\n\n" + "Some words that go on. " * 3
    assert split_passages(text, characters, 40)[0].end > 20


def test_a_cut_that_makes_more_tokens_is_made_again() -> None:
    """A tokenizer whose tokens span spaces, so that cutting at a space splits a token in two."""

    def spanning(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        offsets = [match.span() for match in re.finditer("x y|.", text)]
        return [1] * len(offsets), offsets

    text = "x y" * 100
    check(text, split_passages(text, spanning, 16), spanning, 16)


def test_a_sparse_text_is_cut_at_the_window() -> None:
    """A tokenizer that makes next to nothing of a text: the window bounds a passage, not its tokens."""

    def sparse(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return [1] * (len(text) // 50_000), [
            (i * 50_000, (i + 1) * 50_000) for i in range(len(text) // 50_000)
        ]

    text = "x" * (3 * passages.WINDOW_CHARS)
    spans = split_passages(text, sparse, 16)
    assert [span.end - span.start for span in spans] == [passages.WINDOW_CHARS] * 3


def test_the_work_grows_with_the_text_only() -> None:
    """Characters tokenised per character of text: a window of any fixed size would make it dozens."""
    tokenised = 0

    def counting(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        nonlocal tokenised
        tokenised += len(text)
        return TOKENIZER.encode_with_offsets(text)

    text = ("The wizard went to the emerald city and met a lion. " * 20 + "\n\n") * 100
    spans = split_passages(text, counting, 512)
    check(text, spans, TOKENIZER.encode_with_offsets, 512)
    assert tokenised < 6 * len(text)
