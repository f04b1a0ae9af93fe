"""Decoding: one running answer, token by token, as text that is safe to show.

Knows sampling, stop strings and stop tokens; the forward pass belongs to ``context``.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from typing import Literal

from torch import Tensor

from msa_memory.engine.context import Feed, Sequence, advance
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.sampling import Constraint, Sampler, SamplingOptions, StopScanner
from msa_memory.engine.speculation import PromptLookup
from msa_memory.engine.stepper import Stepper
from msa_memory.engine.tokenizer import TextStream, Tokenizer

__all__ = ["Ahead", "Generation", "decode", "decode_ahead", "decode_batch"]

MOST_GUESSES = 3
"""Tokens guessed ahead, at most: weights packed into 4 bits serve four rows for half more than one."""


class Generation:
    """What one sequence has generated so far.

    ``finish_reason`` is None while it runs, then ``"stop"`` (a stop token or string) or ``"length"``.
    ``prompt`` is what was fed before it, as far as it is worth guessing from.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: SamplingOptions,
        sequence: Sequence,
        logits: Tensor,
        constraint: Constraint | None = None,
        prompt: Rows[int] = (),
    ) -> None:
        self.sequence = sequence
        self.prompt = prompt
        self.options = options
        self.constraint = constraint
        self.ids: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._stop_ids = tokenizer.stop_ids
        self._stream = TextStream(tokenizer, skip_special=True)
        self._scanner = StopScanner(options.stop)
        self._sampler = Sampler(options, logits.device)
        self._text: list[str] = []
        self.accept(logits)

    @property
    def text(self) -> str:
        """All text shown so far."""
        return "".join(self._text)

    def accept(self, logits: Tensor) -> None:
        """Choose the next token from logits ``[V]`` and work out what may be shown."""
        constraint = self.constraint
        token = self._sampler(logits, constraint.allowed() if constraint else None)
        self.ids.append(token)
        if constraint:
            constraint.accept(token)
        if token in self._stop_ids:
            self._finish("stop")
            return
        self._show(self._scanner.push(self._stream.push(token)))
        if self._scanner.stopped:
            self.finish_reason = "stop"
        elif constraint and constraint.finished:
            self._finish("stop")
        elif len(self.ids) >= self.options.max_new_tokens:
            self._finish("length")

    def take(self) -> str:
        """Text that became showable since the last call."""
        fresh, self._pending = self._pending, ""
        return fresh

    _pending: str = ""

    def _show(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._pending += text

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self._show(self._scanner.push(self._stream.flush()))
        self._show(self._scanner.flush())
        self.finish_reason = reason


def decode(decoder: Decoder, generation: Generation) -> Iterator[str]:
    """Run one generation to its end; yields once per token, with the text it made showable (may be empty)."""
    yield generation.take()
    while generation.finish_reason is None:
        logits = advance(decoder, [Feed(generation.sequence, generation.ids[-1:])])
        generation.accept(logits[0])
        yield generation.take()


def decode_ahead(stepper: Stepper, generation: Generation) -> Iterator[str]:
    """``decode`` through a stepper, checking guessed tokens with the one that is due: answers copy evidence.

    Every token is chosen from the same logits, in the same order, as one by one; a stepper whose rows are
    not alike to the bit therefore gets no guesses.
    """
    ahead, row = Ahead(generation, guesses=stepper.rows_alike), generation.sequence
    yield generation.take()
    while generation.finish_reason is None:
        yield from ahead.take(stepper.feed(ahead.feed(), row.position, row.cache))


class Ahead:
    """What a generation feeds at once: the token that is due and guesses of those after it."""

    def __init__(self, generation: Generation, *, guesses: bool) -> None:
        self.generation = generation
        self._lookup = PromptLookup([*generation.prompt, *generation.ids]) if guesses else None
        self._fed: list[int] = []

    def feed(self) -> list[int]:
        """The newest token and guesses of the next."""
        generation = self.generation
        left = generation.options.max_new_tokens - len(generation.ids)
        guesses = self._lookup.guess(min(MOST_GUESSES, left - 1)) if self._lookup else []
        self._fed = [generation.ids[-1], *guesses]
        return self._fed

    def take(self, logits: Tensor) -> list[str]:
        """Keep what was guessed right, by the logits ``[N, V]`` after each token fed. Text per new token."""
        generation, row = self.generation, self.generation.sequence
        guesses, texts = self._fed[1:], []
        for place in range(len(self._fed)):
            generation.accept(logits[place])
            texts.append(generation.take())
            if generation.finish_reason is not None or generation.ids[-1] != (*guesses, None)[place]:
                break
        row.cache.truncate(row.cache.length - len(self._fed) + len(texts))
        row.position += len(texts)
        row.fed_tokens += len(texts)
        if self._lookup:
            fresh = generation.ids[-len(texts) :]
            self._lookup.extend(fresh, hit=not guesses or fresh[0] == guesses[0])
        return texts


def decode_batch(decoder: Decoder, generations: list[Generation]) -> Iterator[None]:
    """Run several generations together; a finished row leaves the batch at once. Yields once per step."""
    while running := [g for g in generations if g.finish_reason is None]:
        logits = advance(decoder, [Feed(g.sequence, g.ids[-1:]) for g in running])
        for generation, row in zip(running, logits, strict=True):
            generation.accept(row)
        yield
