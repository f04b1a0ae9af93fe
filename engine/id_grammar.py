"""What a model may write while it retrieves: numbers of visible passages, a delimiter, or the end marker.

The text of a retrieval turn is ``[12][7]`` and then the round delimiter, or ``<End-of-Retrieve>``. Every
step's tokens are limited to continuations of that, with numbers taken from a digit trie of the passages
the caller may see, so a generated number can never name another namespace's passage.
"""

from __future__ import annotations

from collections.abc import Iterable

from msa_memory.engine.tokenizer import Tokenizer
from msa_memory.errors import ConfigError

__all__ = ["END_MARKER", "IdGrammar", "RetrievalTokens", "RetrievalTurn"]

END_MARKER = "<End-of-Retrieve>"
Trie = dict[str, "Trie"]
_END_OF_NUMBER = "]"


class RetrievalTokens:
    """The tokens of a vocabulary that can occur in a retrieval turn, with their texts.

    Raises:
        ConfigError: the vocabulary has no token for the round delimiter.
    """

    def __init__(self, tokenizer: Tokenizer, delimiter: str) -> None:
        found = tokenizer.token_id(delimiter)
        if found is None:
            raise ConfigError(
                f"this model's vocabulary has no {delimiter!r} token, so it cannot retrieve by generating "
                "numbers; use evidence='router'"
            )
        self.delimiter = found
        self.texts: dict[int, str] = {}
        for token in range(tokenizer.vocab_size):
            text = tokenizer.decode([token])
            if text and (set(text) <= set("[]0123456789") or text in END_MARKER):
                self.texts[token] = text


class IdGrammar:
    """The numbers one question may name, as a trie of digits."""

    def __init__(self, tokens: RetrievalTokens, numbers: Iterable[int], most: int) -> None:
        self.tokens = tokens
        self.most = most
        self.root: Trie = {}
        for number in numbers:
            node = self.root
            for digit in str(number):
                node = node.setdefault(digit, {})
            node[_END_OF_NUMBER] = {}


class RetrievalTurn:
    """One retrieval turn in progress: which tokens may come next, and what has been named so far."""

    def __init__(self, grammar: IdGrammar) -> None:
        self.grammar = grammar
        self.text = ""
        self.named: list[int] = []
        self.ended = False
        """The model said that it has retrieved enough."""
        self.complete = False
        """The turn is over: delimiter or end marker."""

    def allowed(self) -> list[int]:
        """Ids of the tokens that may come next; never empty before the turn is complete."""
        tokens = self.grammar.tokens
        fitting = [token for token, text in tokens.texts.items() if self._fits(self.text + text)]
        if self.named and self.text.endswith("]"):
            fitting.append(tokens.delimiter)
        return fitting

    def accept(self, token: int) -> None:
        """Take one allowed token."""
        if token == self.grammar.tokens.delimiter:
            self.complete = True
            return
        self.text += self.grammar.tokens.texts[token]
        if self.text == END_MARKER:
            self.ended = self.complete = True
        elif self.text.endswith("]"):
            self.named = [int(part) for part in self.text[1:-1].split("][")]

    def _fits(self, text: str) -> bool:
        """Whether a text can be continued to a whole turn."""
        if END_MARKER.startswith(text):
            return True
        return bool(self.grammar.root) and text.startswith("[") and self._names(text[1:].split("["))

    def _names(self, parts: list[str]) -> bool:
        if len(parts) > self.grammar.most:
            return False
        whole, last = parts[:-1], parts[-1]
        if len(set(whole)) < len(whole) or not all(self._walk(part) == {} for part in whole):
            return False
        node = self._walk(last)
        if node is None or last in whole:
            return False
        return node == {} or self._open_end(node, last, whole)

    def _walk(self, part: str) -> Trie | None:
        """The trie node after ``part`` (digits, perhaps the closing bracket); None when it is no path."""
        node: Trie | None = self.grammar.root
        for character in part:
            node = node.get(character) if node is not None else None
        return node

    def _open_end(self, node: Trie, prefix: str, whole: list[str]) -> bool:
        """Whether some number below ``node`` has not been named yet."""
        for character, child in node.items():
            if character == _END_OF_NUMBER:
                if prefix + character not in whole:
                    return True
            elif self._open_end(child, prefix + character, whole):
                return True
        return False
