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
        window = text[start : start + WINDOW_CHARS]
        ids, offsets = encode(window)
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
