"""Which texts name which titles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_memory.naming import names

TEXT = "It was directed by Xawery \u017bu\u0142awski in 2009, not by Mary (Annie) Lee; see C++, Get Low."


@pytest.mark.parametrize(
    ("title", "named"),
    [
        ("Xawery \u017bu\u0142awski", True),
        ("Xawery", True),
        ("\u017bu\u0142aw", False),
        ("xawery \u017bu\u0142awski", False),
        ("Get Low (Dillon Francis song)", True),
        ("Get Low (song) (1999)", False),
        ("C++", True),
        ("Annie", True),
        ("(Annie)", False),
        ("It", False),
        ("", False),
        ("2009", True),
        ("200", False),
    ],
)
def test_titles_count_as_they_are_spelled(title: str, named: bool) -> None:
    assert names(TEXT, title) is named


def test_what_the_question_says_is_known_already() -> None:
    assert names(TEXT, "Get Low", "Who sang it?")
    assert not names(TEXT, "Get Low (song)", "who sang get low?")


@given(st.text(), st.text(min_size=3), st.text())
def test_any_title_between_spaces_is_found(before: str, title: str, after: str) -> None:
    said = f"{before} {title.strip()} {after}"
    if len(title.strip()) >= 3 and not title.strip().endswith(")"):
        assert names(said, title)
    names(said, title, after)
