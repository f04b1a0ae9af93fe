"""Several questions in one forward pass: whoever is ready takes part, and nobody waits for anybody.

A running question says what it wants fed next and yields. Whoever comes back first for a result that is not
there yet runs one pass over everything of its kind asked for so far, so that a round of N questions costs
one pass, not N. Long prompts are fed in pieces between the others' tokens. Used on one thread; knows no
sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Literal, ParamSpec, Protocol, TypeVar

from torch import Tensor

from msa_memory.engine.context import Feed, advance, route
from msa_memory.engine.context import Sequence as Row
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.generation import Ahead, Generation

__all__ = ["Batch", "Stepping", "at_once"]

PROMPT_TOKENS = 512
"""Of all prompts together in one pass: what a decoding row waits for at most."""
P = ParamSpec("P")
T = TypeVar("T")
Way = Literal["advance", "route", "step"]
"""How to feed: through the decoder, through its routers only, or through the stepper."""


class Stepping(Protocol):
    """What answers are decoded with, instead of the decoder itself: ``Stepper`` or ``DeviceStepper``."""

    rows_alike: bool
    """Whether tokens fed together give the same bits as one by one, so that some may be guessed."""

    def step(self, feeds: Sequence[Feed]) -> Sequence[Tensor]:
        """Feed tokens to several sequences; the logits after each, ``[N, V]`` by sequence."""

    def leave(self, row: Row) -> None:
        """A sequence is not stepped any more; its cache is complete afterwards."""


@dataclass(eq=False, slots=True)
class _Ticket:
    """What one question wants fed; ``logits`` once that is done, ``[V]`` or after every token ``[N, V]``."""

    feed: Feed
    way: Way
    fed: int = 0
    done: bool = False
    logits: Tensor | None = None
    error: Exception | None = None

    @property
    def prompt(self) -> bool:
        return self.way != "step" and len(self.feed.ids) > 1

    def piece(self, room: int) -> Feed | None:
        """What to feed next within so many tokens; tokens that route or see each other stay together."""
        left = len(self.feed.ids) - self.fed
        if not self.prompt or left <= room:
            return replace(self.feed, ids=self.feed.ids[self.fed :])
        whole = self.way == "route" or self.feed.routes is not None or self.feed.bidirectional
        if whole or room <= 0:
            return None
        return replace(self.feed, ids=self.feed.ids[self.fed : self.fed + room])

    def take(self, fed: int, logits: Tensor | None) -> None:
        self.fed += fed
        if self.fed == len(self.feed.ids):
            self.logits, self.done = logits, True


@dataclass(eq=False)
class Batch:
    """The questions of one decoder that advance together.

    Answers are decoded with ``stepper``, or with what ``prepare`` makes when the first answer is; with the
    decoder itself where there is neither. Without ``shares_prompts`` only decoding is shared, and answers are
    the same bits as alone also where products of other sizes are rounded otherwise.
    """

    decoder: Decoder
    stepper: Stepping | None = None
    prompt_tokens: int = PROMPT_TOKENS
    prepare: Callable[[], Stepping | None] | None = None
    shares_prompts: bool = True
    passes: int = 0
    """Forward passes so far."""
    _waiting: list[_Ticket] = field(default_factory=list)

    def feed(self, feed: Feed) -> Generator[None, None, Tensor]:
        """Feed tokens along with the others; the logits ``[V]`` at the last one."""
        logits = yield from self._served(_Ticket(feed, "advance"))
        assert logits is not None
        return logits

    def route(self, feed: Feed) -> Generator[None, None, None]:
        """Choose memory along with the others, without attending to it (see ``context.route``)."""
        yield from self._served(_Ticket(feed, "route"))

    def decode(self, generation: Generation) -> Iterator[str]:
        """Run a generation to its end; yields once per token the text it made showable (may be empty)."""
        if self.prepare is not None:
            self.stepper, self.prepare = self.prepare(), None
        stepper = self.stepper
        ahead = Ahead(generation, guesses=stepper.rows_alike) if stepper is not None else None
        try:
            yield from self._decoded(generation, ahead)
        finally:
            if stepper is not None:
                stepper.leave(generation.sequence)

    def _decoded(self, generation: Generation, ahead: Ahead | None) -> Iterator[str]:
        texts = [generation.take()]
        while generation.finish_reason is None:
            yield from texts[:-1]
            ids = ahead.feed() if ahead is not None else generation.ids[-1:]
            ticket = _Ticket(Feed(generation.sequence, ids), "step" if ahead is not None else "advance")
            with closing(self._served(ticket)) as steps:
                text = texts[-1]
                while (logits := _result(steps)) is None:
                    yield text
                    text = ""
            if ahead is not None:
                texts = ahead.take(logits)
            else:
                generation.accept(logits)
                texts = [generation.take()]
        yield from texts

    def _served(self, ticket: _Ticket) -> Generator[None, None, Tensor | None]:
        """Wait for a ticket's turn; it leaves the batch wherever the caller stops."""
        self._waiting.append(ticket)
        try:
            while not ticket.done:
                yield
                if not ticket.done:
                    self._pass(ticket)
        finally:
            self._waiting.remove(ticket)
        if ticket.error is not None:
            raise ticket.error
        return ticket.logits

    def _pass(self, asking: _Ticket) -> None:
        """One forward pass over all of the asking ticket's kind that fit, whoever asked first before others.

        A prompt that nobody is waiting beside is fed as a whole.
        """
        apart = asking.way != "step" and not self.shares_prompts
        kin = [asking] if apart else [t for t in self._waiting if t.way == asking.way and not t.done]
        alone = apart or all(ticket is asking or ticket.done for ticket in self._waiting)
        room = len(asking.feed.ids) if alone else self.prompt_tokens
        chosen: list[tuple[_Ticket, Feed]] = []
        for ticket in kin:
            piece = ticket.piece(room)
            if piece is None and ticket is kin[0]:
                piece = ticket.feed  # it stays together, however long it is
            if piece is not None:
                chosen.append((ticket, piece))
                room -= len(piece.ids) if ticket.prompt else 0
        self._run(chosen, asking.way)

    def _run(self, chosen: Sequence[tuple[_Ticket, Feed]], way: Way) -> None:
        """Run a pass; where it fails, each ticket alone, so that only the culprit fails."""
        feeds = [feed for _, feed in chosen]
        before = [_Mark(feed) for feed in feeds]
        self.passes += 1
        try:
            rows = self._forward(feeds, way)
        except Exception as error:
            for mark in before:
                mark.restore()
            if len(chosen) == 1:
                chosen[0][0].error, chosen[0][0].done = error, True
                return
            for one in chosen:
                self._run([one], way)
            return
        for (ticket, feed), logits in zip(chosen, rows, strict=True):
            ticket.take(len(feed.ids), logits)

    def _forward(self, feeds: Sequence[Feed], way: Way) -> Sequence[Tensor | None]:
        if way == "route":
            route(self.decoder, feeds)
            return [None] * len(feeds)
        if way == "advance" or self.stepper is None:
            return list(advance(self.decoder, feeds))
        return self.stepper.step(feeds)


def at_once(steps: Callable[P, Generator[None, None, T]]) -> Callable[P, T]:
    """The function that runs such a generator to its end: for who has nothing else to run in turn."""

    @wraps(steps)
    def run(*args: P.args, **options: P.kwargs) -> T:
        running = steps(*args, **options)
        while True:
            try:
                next(running)
            except StopIteration as stop:
                result: T = stop.value
                return result

    return run


def _result(steps: Generator[None, None, Tensor | None]) -> Tensor | None:
    """What a generator that ended returned; None where it goes on."""
    try:
        next(steps)
    except StopIteration as stop:
        logits: Tensor = stop.value
        return logits
    return None


class _Mark:
    """Where a sequence stood before a pass."""

    def __init__(self, feed: Feed) -> None:
        self.row = feed.sequence
        self.length, self.position, self.fed = self.row.cache.length, self.row.position, self.row.fed_tokens

    def restore(self) -> None:
        self.row.cache.truncate(self.length)
        self.row.position, self.row.fed_tokens = self.position, self.fed
