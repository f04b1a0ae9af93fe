"""A conversation as the model is asked to continue it: checked, merged, cut to what fits.

Chat templates are picky and callers are not: system messages are gathered in front, neighbours of one role
become one turn, speakers' names become part of the text. Knows no tokens beside their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from msa_memory.errors import InvalidDocumentError
from msa_memory.types import ChatMessage

__all__ = ["Conversation", "read_conversation"]

ROUTING_CHARS = 400
"""How much of the turns before a question is read, at most, before it routes."""
BETWEEN = "\n\n"


@dataclass(frozen=True, slots=True)
class Conversation:
    """``turns`` are (role, content) without system messages, no two of one role in a row."""

    system: str
    turns: tuple[tuple[str, str], ...]

    @property
    def asked(self) -> int | None:
        """Which turn is the newest of the user's; None where there is none."""
        users = [number for number, (role, _) in enumerate(self.turns) if role == "user"]
        return users[-1] if users else None

    @property
    def question(self) -> str:
        """What the newest user turn says; empty where there is none."""
        return "" if self.asked is None else self.turns[self.asked][1]

    @property
    def said_before(self) -> str:
        """The end of what was said before the question."""
        said = "\n".join(content for _, content in self.turns[: self.asked])
        return said[-ROUTING_CHARS:].strip()

    @property
    def all_turns(self) -> tuple[tuple[str, str], ...]:
        """The turns with the system's in front."""
        return ((("system", self.system),) if self.system else ()) + self.turns

    def fitting(self, room: int, cost: Callable[[Conversation], int]) -> Conversation:
        """Without its oldest turns, until it costs at most ``room`` tokens or only the newest are left.

        The system message and everything from the newest user turn on always stay.
        """
        newest = self.newest()
        for first in range(len(self.turns) - len(newest.turns)):
            if first and self.turns[first][0] != "user":
                continue  # many templates insist that the user speaks first
            shorter = replace(self, turns=self.turns[first:])
            if cost(shorter) <= room:
                return shorter
        return newest

    def newest(self) -> Conversation:
        """The system message and what was said from the newest user turn on."""
        return replace(self, turns=self.turns[-1 if self.asked is None else self.asked :])


def read_conversation(messages: object) -> Conversation:
    """Check messages (``ChatMessage`` or mappings with its fields) and bring them into the usual form.

    Raises:
        InvalidDocumentError: no messages, an unknown role or field, content that is no text, or nothing said.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidDocumentError(
            f"messages is {messages!r:.60}; expected a list of messages with role and content"
        )
    read = [_message(number, message) for number, message in enumerate(messages)]
    system = BETWEEN.join(message.content for message in read if message.role == "system")
    turns: list[tuple[str, str]] = []
    for message in read:
        if message.role == "system":
            continue
        content = f"{message.name}: {message.content}" if message.name else message.content
        if turns and turns[-1][0] == message.role:
            content = BETWEEN.join(filter(None, (turns.pop()[1], content)))
        turns.append((message.role, content))
    if not any(content.strip() for _, content in turns) and not system.strip():
        raise InvalidDocumentError("the conversation says nothing; give at least one message with text")
    return Conversation(system, tuple(turns))


def _message(number: int, message: Any) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    if not isinstance(message, Mapping):
        raise InvalidDocumentError(
            f"message {number} is {message!r:.60}; expected a ChatMessage or a mapping with role and content"
        )
    try:
        return ChatMessage(**message)
    except (ValidationError, TypeError) as error:
        problem: Any = error.errors()[0] if isinstance(error, ValidationError) else {}
        where = ".".join(map(str, problem.get("loc", ()))) or "keys"
        raise InvalidDocumentError(
            f"message {number} has {where} {str(problem.get('input', error))!r:.60}; expected role (system, "
            "user, assistant or tool), content (text) and optionally name"
        ) from error
