"""Stored text as HTML that shows every character and obeys none.

Control codes, bidirectional overrides and other invisible characters become visible marks; everything else is
escaped. Knows HTML's rules for text and attributes, nothing of pages.
"""

from __future__ import annotations

import re
import unicodedata

from markupsafe import Markup, escape

__all__ = ["as_html", "as_text"]

_UNUSUAL = re.compile(r"[^ -~\n\t]")
_JOINERS = frozenset("\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}\N{SOFT HYPHEN}")
"""Invisible, but part of how words and emojis are written."""
_PICTURES = 0x2400
"""Where Unicode has its pictures of the control characters 0 to 31."""


def as_html(text: str) -> Markup:
    """Text for the content of an element; marks stand in ``<i>``."""

    def marked(found: re.Match[str]) -> str:
        mark = _mark(found[0])
        return found[0] if mark is None else f"<i>{mark}</i>"  # a mark has no character to escape

    return Markup(_UNUSUAL.sub(marked, str(escape(text.replace("\r\n", "\n")))))


def as_text(text: str) -> str:
    """The same for places that take plain text only, such as an attribute; still to be escaped."""
    return _UNUSUAL.sub(lambda found: _mark(found[0]) or found[0], text.replace("\r\n", "\n"))


def _mark(character: str) -> str | None:
    """What is shown for a character that shows nothing by itself; None for all others."""
    code = ord(character)
    if code < 0x20:
        return chr(_PICTURES + code)
    if character not in _JOINERS and unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs"):
        return f"U+{code:04X}"
    return None
