"""Which documents a text names by their titles, as an article names what a question leads to next."""

from __future__ import annotations

import re

__all__ = ["names"]

LEAST_CHARACTERS = 3
_EPITHET = re.compile(r"\s*\([^()]*\)\s*$")
"""What tells two of one name apart, which a text leaves out: ``Get Low (song)``."""


def names(text: str, title: str, question: str = "") -> bool:
    """Whether a text holds this title, spelled as it is and as whole words, and the question does not."""
    said = _EPITHET.sub("", title).strip()
    if len(said) < LEAST_CHARACTERS or said.casefold() in question.casefold():
        return False
    return re.search(rf"(?<!\w){re.escape(said)}(?!\w)", text) is not None
