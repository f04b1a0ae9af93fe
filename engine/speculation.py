"""Guessing the next tokens of an answer: what followed its newest tokens where they occurred before.

Knows token ids only. A wrong guess costs time, never correctness: whoever guesses checks.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["PromptLookup"]

LENGTHS = (3, 2)
"""Runs of tokens that are looked up, the longest first."""
PAUSE = 2
"""Tokens without a guess after a wrong one."""


class PromptLookup:
    """Remembers what followed every run of two or three tokens, the newest occurrence first."""

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        self._paused = 0
        for token in ids:
            self._append(token)

    def guess(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may come next; none where the newest tokens are new together."""
        if self._paused:
            self._paused -= 1
            return []
        for length in LENGTHS:
            place = self._places.get(tuple(self.ids[-length:]))
            if place is not None:
                return self.ids[place : place + max(0, most)]
        return []

    def extend(self, ids: Iterable[int], *, hit: bool = True) -> None:
        """Take note of the tokens that came; ``hit`` False if the last guess was wrong from its start."""
        for token in ids:
            self._append(token)
        if not hit:
            self._paused = PAUSE

    def _append(self, token: int) -> None:
        # A run is noted when its successor is known: the newest tokens never find themselves.
        for length in LENGTHS:
            if len(self.ids) >= length:
                self._places[tuple(self.ids[-length:])] = len(self.ids)
        self.ids.append(token)
