"""Choosing the next token, and stopping at strings that may span token boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from msa_memory.errors import ConfigError, EngineError

__all__ = ["Constraint", "Sampler", "SamplingOptions", "StopScanner", "decided", "without_doubtful"]

COLDEST = 1e-6
"""Below this temperature sampling is greedy but for ties, and a division by it would overflow."""


class Constraint(Protocol):
    """What an answer may look like, token by token: a grammar, a JSON schema, a list of choices."""

    @property
    def finished(self) -> bool:
        """The answer is complete: generation ends here."""
        ...

    def allowed(self) -> Tensor | None:
        """Tokens that may come next, bool ``[V]`` (shorter: the rest may not); None allows all."""
        ...

    def accept(self, token_id: int) -> None:
        """Take note of the token that was chosen."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """``temperature`` 0 is greedy; otherwise nucleus sampling with ``top_p``, seeded if ``seed`` is given."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 0.9
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens!r}; it must be a whole number of at least 1"
            )
        if not _is_number(self.temperature) or not 0.0 <= self.temperature <= 100.0:
            raise ConfigError(
                f"temperature is {self.temperature!r}; it must be a number between 0 (greedy) and 100"
            )
        if not _is_number(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p!r}; it must be a number above 0 and at most 1")
        for stop in self.stop:
            if not isinstance(stop, str) or not stop:
                raise ConfigError(f"a stop string is {stop!r}; give the text to stop at, or leave it out")


def _is_number(value: object, kinds: Any = (int, float)) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


class Sampler:
    """Draws token ids from logits ``[V]``."""

    def __init__(self, options: SamplingOptions, device: torch.device) -> None:
        self.options = options
        self.random: torch.Generator | None = None
        if options.temperature > 0 and options.seed is not None:
            self.random = torch.Generator(device).manual_seed(options.seed)

    def __call__(self, logits: Tensor, allowed: Tensor | None = None) -> int:
        if allowed is not None:
            logits = _masked(logits, allowed)
        if self.options.temperature == 0:
            return int(logits.argmax())
        scaled = (logits.float() - logits.max()) / max(self.options.temperature, COLDEST)
        ranked, order = scaled.softmax(-1).sort(descending=True)
        beyond = ranked.cumsum(0) - ranked >= self.options.top_p
        kept = ranked.masked_fill(beyond, 0.0)
        return int(order[torch.multinomial(kept, 1, generator=self.random)])


def without_doubtful(logits: Tensor, token: int, logprob: float) -> Tensor:
    """The logits ``[V]`` without ``token`` if it ranks first and its log-probability is below ``logprob``."""
    if int(logits.argmax()) != token or float(logits.float().log_softmax(-1)[token]) >= logprob:
        return logits
    kept = logits.clone()
    kept[token] = -torch.inf
    return kept


def decided(logits: Tensor, token: int, chosen: bool) -> Tensor:
    """The logits ``[V]`` with nothing but ``token`` where it is ``chosen``, and without it elsewhere."""
    if not chosen:
        kept = logits.clone()
        kept[token] = -torch.inf
        return kept
    alone = torch.full_like(logits, -torch.inf)
    alone[token] = logits[token]
    return alone


def _masked(logits: Tensor, allowed: Tensor) -> Tensor:
    """The logits with every token that is not allowed at -inf."""
    allowed = allowed.to(logits.device)[: len(logits)]
    if not allowed.any():
        raise EngineError("the constraint allows no token at all; check that its grammar can be completed")
    masked = torch.full_like(logits, -torch.inf)
    masked[: len(allowed)] = logits[: len(allowed)].masked_fill(~allowed, -torch.inf)
    return masked


class StopScanner:
    """Passes text through until a stop string is complete; holds back what might be the start of one.

    Where several stop strings overlap the one that is complete first counts, however the text was cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is safe to show; nothing more once a stop string was seen."""
        if self.stopped:
            return ""
        self.held += text
        found = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            safe, self.held = self.held[: min(found)[1]], ""
            return safe
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        safe, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return safe

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        rest, self.held = self.held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        for size in range(min(len(stop) - 1, len(self.held)), 0, -1):
            if self.held.endswith(stop[:size]):
                return size
        return 0
