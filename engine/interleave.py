"""Memory Interleave: the model names passages, reads their original texts, and goes on until it can answer.

Source: arXiv 2603.23516 section 3.4 and msa-spec section 9. Numbers come only from tokens chosen here
under a grammar of visible passages; injected text is encoded without control tokens, so nothing a
document says can act as a number, a delimiter or an end marker. The question is injected again before
the answer, causally unless ``bidirectional`` asks for the reference's quirk.

By default the K/V of all earlier rounds are kept and only new tokens are fed; the question's router
queries of the first round are kept too and route again together with the newest texts. ``reprefill``
computes every round afresh instead, as the reference does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from msa_memory.engine.bank_view import BankView
from msa_memory.engine.context import Feed, advance
from msa_memory.engine.context import Sequence as Row
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.generation import Generation, decode
from msa_memory.engine.id_grammar import IdGrammar, RetrievalTokens, RetrievalTurn
from msa_memory.engine.layout import PromptLayout
from msa_memory.engine.sampling import SamplingOptions

__all__ = ["ANSWER_PREFIX", "Interleave", "InterleaveOptions", "Interleaved", "Texts"]

ANSWER_PREFIX = "The answer to the question is:"
Texts = Callable[[Sequence[int]], dict[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleaveOptions:
    """``max_rounds`` caps retrieval rounds, ``k`` the passages named in one round.

    ``max_evidence_tokens`` caps the injected texts of all rounds together; None leaves it to the window.
    """

    max_rounds: int = 4
    k: int = 16
    max_evidence_tokens: int | None = None
    reprefill: bool = False
    bidirectional: bool = False


@dataclass(slots=True)
class Interleaved:
    """What happened: the passages of each round, the tokens fed so far, and the answer's generation.

    ``dropped`` passages were named and found no room.
    """

    rounds: list[tuple[int, ...]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    fed_tokens: int = 0
    evidence_tokens: int = 0
    generation: Generation | None = None


class Interleave:
    """One question answered by interleaving retrieval and generation; ``run`` it once.

    Args:
        start: makes a sequence behind the template head over ``view``.
        texts: original texts by passage number; numbers it leaves out are skipped.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: PromptLayout,
        tokens: RetrievalTokens,
        *,
        start: Callable[[], Row],
        view: BankView,
        texts: Texts,
        question: str,
        options: InterleaveOptions,
    ) -> None:
        self.decoder, self.prompt, self.tokens = decoder, prompt, tokens
        self.start, self.view, self.texts = start, view, texts
        self.question, self.options = question, options
        self.result = Interleaved()
        self.row = start()
        self.ids: list[int] = []
        """All tokens fed behind the template head, in order."""

    def run(self, sampling: SamplingOptions) -> Generator[str | None, None, Interleaved]:
        """Retrieve round by round, then answer; yields the answer's text as it becomes safe to show."""
        logits = self.ask()
        yield None
        seen: set[int] = set()
        for _ in range(self.options.max_rounds):
            visible = [int(n) for n in self.view.numbers[self.view.visible] if int(n) not in seen]
            turn = yield from self._retrieve(visible, logits)
            if turn.ended:
                break
            seen.update(turn.named)
            logits = self.inject(turn.named, self._room(sampling))
            yield None
        logits = self.ask_again()
        generation = self.result.generation = Generation(self.prompt.tokenizer, sampling, self.row, logits)
        for text in decode(self.decoder, generation):
            yield text or None
        return self.result

    def ask(self) -> Tensor:
        """Prefill the question, whose tokens route; logits ``[V]`` at its end."""
        ids, routes = self.prompt.question(self.question)
        logits = self.feed(ids, routes)
        self.row.carried = dict(self.row.queries)
        return logits

    def inject(self, named: Sequence[int], room: int | None = None) -> Tensor:
        """Feed the delimiter and the named passages' texts, ascending; question and texts route anew.

        Passages whose text exceeds what is left of ``room`` tokens are dropped, the last named first.
        """
        texts = self.texts(named)
        numbers = tuple(sorted(self._fitting([n for n in dict.fromkeys(named) if n in texts], texts, room)))
        self.result.rounds.append(numbers)
        block = self.prompt.injection([(number, texts[number]) for number in numbers])
        self.result.evidence_tokens += len(block)
        delimiter = [self.tokens.delimiter]
        routes = [False, *[True] * len(block), False]
        if self.options.reprefill:
            return self._afresh([*delimiter, *block, *delimiter], routes)
        return self.feed([*delimiter, *block, *delimiter], routes)

    def ask_again(self) -> Tensor:
        """Feed the question once more, as what is to be answered now; it does not route."""
        ids = [*self.prompt.reinjection(self.question), self.tokens.delimiter]
        return self.feed(ids, bidirectional=self.options.bidirectional)

    def feed(
        self, ids: Sequence[int], routes: Sequence[bool] | None = None, *, bidirectional: bool = False
    ) -> Tensor:
        """Feed tokens to the running sequence; logits ``[V]`` at the last one."""
        self.ids.extend(ids)
        self.result.fed_tokens += len(ids)
        return advance(self.decoder, [Feed(self.row, ids, routes, bidirectional)])[0]

    def _room(self, sampling: SamplingOptions) -> int:
        """Tokens that may still be injected, so that question and answer keep their place in the window."""
        again = len(self.prompt.reinjection(self.question)) + 1
        delimiters = 2 * (self.options.max_rounds + 1)
        window = self.decoder.config.max_positions - self.row.position
        room = window - again - delimiters - sampling.max_new_tokens
        limit = self.options.max_evidence_tokens
        return room if limit is None else min(room, limit - self.result.evidence_tokens)

    def _fitting(self, named: list[int], texts: dict[int, str], room: int | None) -> list[int]:
        fitting = []
        for number in named:
            size = len(self.prompt.injection([(number, texts[number])]))
            if room is not None and size > room:
                self.result.dropped.append(number)
            else:
                fitting.append(number)
                room = None if room is None else room - size
        return fitting

    def mean_scores(self) -> dict[int, float]:
        """Mean score over the router layers of every visible passage, from the last routing."""
        if not self.row.scores:
            return {}
        mean = self.view.msa.mean_of_layers(np.stack(list(self.row.scores.values())))
        return {int(n): float(s) for n, s in zip(self.view.numbers, mean, strict=True) if np.isfinite(s)}

    def _retrieve(self, visible: list[int], logits: Tensor) -> Generator[None, None, RetrievalTurn]:
        """Let the model name passages, the likeliest allowed token at a time."""
        turn = RetrievalTurn(IdGrammar(self.tokens, visible, self.options.k))
        while True:
            allowed = torch.tensor(turn.allowed(), device=logits.device)
            token = int(allowed[logits[allowed].argmax()])
            turn.accept(token)
            if turn.complete and not turn.ended:
                return turn  # the delimiter is fed together with the texts
            logits = self.feed([token])
            if turn.complete:
                return turn
            yield

    def _afresh(self, ids: Sequence[int], routes: Sequence[bool]) -> Tensor:
        """Start over behind the head with everything so far: only the question and the newest block route."""
        before, question = self.ids, self.prompt.later_question_routes(self.question)
        older = [False] * (len(before) - len(question))
        self.row, self.ids = self.start(), []
        return self.feed([*before, *ids], [*question, *older, *routes])
