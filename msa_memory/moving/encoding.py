"""A text as encoded passages, step by step, for what is added, imported or moved to another model."""

from __future__ import annotations

from collections.abc import Callable, Generator

from msa_memory.engine.engine import Engine
from msa_memory.errors import InvalidDocumentError
from msa_memory.persistence import NewPassage

__all__ = ["encode_text"]


def encode_text(
    engine: Engine,
    text: str,
    header: str,
    *,
    passage_tokens: int,
    reserve: Callable[[int], range],
    what: str,
) -> Generator[None, None, list[NewPassage]]:
    """Passages of ``text`` with fresh numbers from ``reserve``; yields after each.

    Raises:
        InvalidDocumentError: the model can read no character of it; ``what`` names it.
    """
    spans = [span for span in engine.split(text, passage_tokens) if span.tokens]
    if not spans:
        raise InvalidDocumentError(f"{what} has no character this model can read")
    passages = []
    for span, number in zip(spans, reserve(len(spans)), strict=True):
        states = engine.encode(number, header, text[span.start : span.end])
        passages.append(
            NewPassage(
                start=span.start,
                end=span.end,
                tokens=span.tokens,
                number=number,
                header=header,
                states=states.to_bytes(),
            )
        )
        yield
    return passages
