"""Cutting a document into passages the model can encode: at paragraph ends, else sentence ends.

Knows text and a token counter. Every character of the document lies in exactly one passage.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Span", "split_passages"]

Offsets = Callable[[str], tuple[list[int], list[tuple[int, int]]]]

_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"[.!?。！？][\"'”’)\]]*\s+|\n")
_SPACE = re.compile(r"\s+")
WINDOW_CHARS = 65_536
"""Most characters looked at for one passage."""
CHARS_PER_TOKEN = 6
"""Of ordinary text, at most; a window is doubled where it has fewer tokens."""


@dataclass(frozen=True, slots=True)
class Span:
    """Characters ``start`` to ``end`` of a document and how many tokens they take alone."""

    start: int
    end: int
    tokens: int


def split_passages(text: str, encode: Offsets, max_tokens: int) -> list[Span]:
    """Cut ``text`` into consecutive spans of at most ``max_tokens`` tokens.

    A span ends at the last paragraph end that leaves it at least half full, else at the last sentence
    end, else between words, else between tokens.

    Args:
        encode: gives token ids and their character offsets.
        max_tokens: longest span, in tokens.
    """
    spans: list[Span] = []
    start = 0
    while start < len(text):
        window, ids, offsets = _window(text, start, encode, max_tokens)
        if len(ids) <= max_tokens and start + len(window) == len(text):
            spans.append(Span(start, len(text), len(ids)))
            break
        room = _room(offsets, min(max_tokens, len(ids)), len(window))
        size = _cut(window[:room], room // 2)
        count = len(encode(window[:size])[0])
        while count > max_tokens and size > 1:  # a cut between tokens can re-tokenise to more
            size = _cut(window[: size - 1], size // 2)
            count = len(encode(window[:size])[0])
        spans.append(Span(start, start + size, count))
        start += size
    return spans


def _window(
    text: str, start: int, encode: Offsets, max_tokens: int
) -> tuple[str, list[int], list[tuple[int, int]]]:
    """Text from ``start`` on, more than ``max_tokens`` tokens of it if so much is left, and its tokens."""
    chars = min(WINDOW_CHARS, CHARS_PER_TOKEN * max_tokens)
    while True:
        window = text[start : start + chars]
        ids, offsets = encode(window)
        if len(ids) > max_tokens or chars >= WINDOW_CHARS or start + chars >= len(text):
            return window, ids, offsets
        chars = min(WINDOW_CHARS, 2 * chars)


def _room(offsets: list[tuple[int, int]], max_tokens: int, size: int) -> int:
    """Characters that surely fit: up to the first token that is one too many."""
    return max(1, offsets[max_tokens][0] if max_tokens < len(offsets) else size)


def _cut(window: str, least: int) -> int:
    """Where to cut a window, preferring paragraph over sentence over word ends past ``least``."""
    for pattern in (_PARAGRAPH, _SENTENCE, _SPACE):
        ends = [match.end() for match in pattern.finditer(window, least)]
        if ends:
            return ends[-1]
    return len(window)
