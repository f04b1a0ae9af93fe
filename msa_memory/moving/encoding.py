"""Texts as encoded passages, step by step, for what is added, imported or moved to another model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from msa_memory.engine.engine import Engine
from msa_memory.engine.passages import Span
from msa_memory.errors import InvalidDocumentError
from msa_memory.persistence import NewPassage, StagedStates, Store
from msa_memory.types import TensorBytes

__all__ = ["HELD_BYTES", "Holding", "Text", "encode_text", "encode_texts"]

HELD_BYTES = 16 * 1024 * 1024
"""States that wait in memory for one commit; what comes on top of them waits on disk."""

States = Mapping[str, TensorBytes]


class Holding:
    """The states of passages from their encoding to their commit, whatever the length of the texts.

    A ``with`` block around both: what was set aside and not stored by its end is let go of. ``fingerprint``
    is that of the model that made them, None for the bank's own.
    """

    def __init__(self, store: Store, *, fingerprint: str | None = None) -> None:
        self._store, self._fingerprint = store, fingerprint
        self._held_bytes = 0
        self._staged: list[StagedStates] = []

    def hold(self, number: int, states: States) -> States | StagedStates:
        """The states of passage ``number`` to store it with: themselves, or where they wait."""
        size_bytes = sum(len(tensor.data) for tensor in states.values())
        if self._held_bytes + size_bytes <= HELD_BYTES:
            self._held_bytes += size_bytes
            return states
        staged = self._store.stage(number, states, fingerprint=self._fingerprint)
        if isinstance(staged, StagedStates):
            self._staged.append(staged)
        return staged

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.unstage(self._staged)


@dataclass(frozen=True, slots=True)
class Text:
    """A text to encode; ``header`` stands before each of its passages, ``what`` names it in errors."""

    text: str
    header: str
    what: str


def encode_text(
    engine: Engine,
    text: str,
    header: str,
    *,
    passage_tokens: int,
    reserve: Callable[[int], range],
    what: str,
    hold: Callable[[int, States], States | StagedStates] | None = None,
) -> Generator[None, None, list[NewPassage]]:
    """Passages of one text, as of ``encode_texts``."""
    [passages] = yield from encode_texts(
        engine, [Text(text, header, what)], passage_tokens=passage_tokens, reserve=reserve, hold=hold
    )
    return passages


def encode_texts(
    engine: Engine,
    texts: Sequence[Text],
    *,
    passage_tokens: int,
    reserve: Callable[[int], range],
    hold: Callable[[int, States], States | StagedStates] | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> Generator[None, None, list[list[NewPassage]]]:
    """Passages of each text with fresh numbers from ``reserve``; yields after each passage.

    ``hold`` says where the states of a passage wait (``Holding.hold``); in memory when None. ``report`` is
    told how many texts are done, after each.

    Raises:
        InvalidDocumentError: the model can read no character of a text; ``what`` names it.
    """
    cut = [_cut(engine, text, passage_tokens, reserve) for text in texts]
    states_of = engine.encode_many(
        (number, text.header, text.text[span.start : span.end])
        for text, parts in zip(texts, cut, strict=True)
        for number, span in parts
    )
    encoded: list[list[NewPassage]] = []
    for text, parts in zip(texts, cut, strict=True):
        encoded.append([])
        for number, span in parts:
            states = next(states_of).to_bytes()
            encoded[-1].append(
                NewPassage(
                    start=span.start,
                    end=span.end,
                    tokens=span.tokens,
                    number=number,
                    header=text.header,
                    states=states if hold is None else hold(number, states),
                )
            )
            yield
        report(len(encoded))
    return encoded


def _cut(
    engine: Engine, text: Text, passage_tokens: int, reserve: Callable[[int], range]
) -> list[tuple[int, Span]]:
    """Where the passages of a text lie, and their numbers."""
    spans = [span for span in engine.split(text.text, passage_tokens) if span.tokens]
    if not spans:
        raise InvalidDocumentError(f"{text.what} has no character this model can read")
    return list(zip(reserve(len(spans)), spans, strict=True))
