"""Constrained decoding: answers that match a grammar, whatever the model would rather write.

Knows grammars and tokens. The mask of every step comes from llguidance, an optional dependency.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from msa_memory.engine.tokenizer import Tokenizer
from msa_memory.errors import ConfigError, EngineError, MissingExtraError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["GrammarConstraint", "check_grammar", "json_rule"]

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
"""Spaced as most JSON a model has seen; ``lenient``: what a grammar cannot express is not enforced."""
_CLOSING = (('"', '"}] '), ("}]", "}] "), (",", ', "'))
"""How tokens begin, and what else they consist of, that end a string, a list or object, a number."""


def json_rule(schema: Mapping[str, Any] | None) -> str:
    """A JSON Schema as a term of a Lark grammar; None is any JSON object."""
    return "%json " + json.dumps({**(schema or {"type": "object"}), "x-guidance": _SPACING})


def check_grammar(grammar: str) -> str:
    """The grammar (Lark, with ``json_rule`` terms) if it can be used.

    Raises:
        ConfigError: it has an error, or a schema in it cannot be turned into a grammar.
        MissingExtraError: llguidance is not installed.
    """
    matcher = _llguidance().LLMatcher
    failed, messages = matcher.validate_grammar_with_warnings(matcher.grammar_from_lark(grammar))
    if failed:
        raise ConfigError(f"this grammar or JSON schema cannot constrain an answer: {' '.join(messages)}")
    return grammar


class GrammarConstraint:
    """One answer in the making under a grammar.

    An open string or list could outlast ``max_new_tokens``. In the second half of them an answer that is not
    complete may therefore only close what is open, wherever the grammar lets it, so that it ends in time.

    Args:
        tokenizer: gives the model's tokenizer when the first mask is asked for.
        grammar: a Lark grammar that ``check_grammar`` passed.
        max_new_tokens: how long the answer may become.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer], grammar: str, max_new_tokens: int) -> None:
        self._load_tokenizer = tokenizer
        self._grammar = grammar
        self._max_new_tokens = max_new_tokens
        self._taken = 0
        self._matcher: LLMatcher | None = None
        self._vocabulary: _Vocabulary | None = None

    @property
    def finished(self) -> bool:
        """The answer is complete and nothing may follow."""
        return self._matcher is not None and self._matcher.is_stopped()

    def allowed(self) -> Tensor:
        """Tokens that may come next, bool ``[V]``."""
        matcher, vocabulary = self._start()
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise EngineError(f"the grammar failed after {self._taken} tokens: {matcher.get_error()}")
        mask = torch.from_numpy(np.unpackbits(bits, bitorder="little", count=vocabulary.size)).bool()
        if self._taken >= self._max_new_tokens // 2 and not matcher.is_accepting():
            for closing in vocabulary.closing:
                if (fitting := mask & closing).any():
                    return fitting
        return mask

    def accept(self, token_id: int) -> None:
        """Take one allowed token."""
        matcher, _ = self._start()
        self._taken += 1
        if not matcher.consume_token(token_id):
            raise EngineError(f"token {token_id} does not fit the grammar: {matcher.get_error()}")

    def _start(self) -> tuple[LLMatcher, _Vocabulary]:
        if self._matcher is None or self._vocabulary is None:
            llguidance = _llguidance()
            self._vocabulary = _vocabulary(self._load_tokenizer())
            grammar = llguidance.LLMatcher.grammar_from_lark(self._grammar)
            self._matcher = llguidance.LLMatcher(self._vocabulary.tokens, grammar)
        return self._matcher, self._vocabulary


class _Vocabulary:
    """A tokenizer as the grammar library needs it; costs a quarter of a second for 49,152 tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.size = tokenizer.vocab_size
        self.tokens: LLTokenizer = _llguidance().LLTokenizer(
            tokenizer.files()["tokenizer.json"].decode(),
            n_vocab=self.size,
            eos_token=sorted(tokenizer.stop_ids),
        )
        texts = [tokenizer.decode([token]).strip() for token in range(self.size)]
        self.closing = [torch.tensor([_starts(text, *ends) for text in texts]) for ends in _CLOSING]
        """Tokens that bring an answer to its end, the quickest first, bool ``[V]`` each."""


def _starts(text: str, first: str, rest: str) -> bool:
    return text[:1] in tuple(first) and set(text) <= set(rest)


_vocabularies: weakref.WeakKeyDictionary[Tokenizer, _Vocabulary] = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    found = _vocabularies.get(tokenizer)
    if found is None:
        found = _vocabularies[tokenizer] = _Vocabulary(tokenizer)
    return found


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtraError(
            "tools and structured output need llguidance: pip install llguidance; the extras langchain and "
            "llama-index bring it along"
        ) from error
    return llguidance
