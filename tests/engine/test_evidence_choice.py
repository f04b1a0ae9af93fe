"""How much of what was found is read."""

from __future__ import annotations

import pytest

from msa_memory.engine.evidence_choice import near_the_best

RULE = {"evidence_share": 0.8, "evidence_documents": 2, "note_tokens": 20, "note_share": 0.4}


@pytest.mark.parametrize(
    ("found", "read"),
    [
        ([], []),
        ([(0.5, 300)], [0]),
        ([(0.5, 300), (0.41, 300), (0.39, 300)], [0, 1]),
        ([(0.5, 300), (0.49, 300), (0.48, 300)], [0, 1]),  # no more than two
        ([(0.5, 300), (0.21, 20), (0.21, 21), (0.19, 20)], [0, 1]),  # notes need less
        ([(0.5, 10), (0.49, 300), (0.48, 10), (0.47, 300), (0.46, 300)], [0, 1, 2, 3]),  # and do not count
    ],
)
def test_what_is_read(found: list[tuple[float, int]], read: list[int]) -> None:
    assert near_the_best([score for score, _ in found], [tokens for _, tokens in found], RULE) == read


def test_an_uncalibrated_model_reads_everything() -> None:
    assert near_the_best([0.1, 0.0, -0.9], [5, 5000, 5], {}) == [0, 1, 2]


def test_notes_need_as_much_as_others_where_nothing_else_is_said() -> None:
    assert near_the_best([1.0, 0.7], [5, 5], {"evidence_share": 0.8, "note_tokens": 20}) == [0]
