"""What of a conversation a session holds already, when all of it is sent again.

LangChain sends the whole history with every call. A message with an id is that message; one without is known
by its text, and the answer to a message by the message it answers, whoever wrote it down how.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import BaseMessage

from msa_memory.integrations.langchain.messages import message_text, role_and_name
from msa_memory.session import Session
from msa_memory.types import Message

__all__ = ["Keyed", "keyed", "unstored", "where_beside"]

MOST_EXCLUDED = 4000
"""Documents that one filter can name; of a longer history only the newest messages are kept from recall."""


@dataclass(frozen=True, slots=True)
class Keyed:
    """What a message says, without its tool calls, and the key under which a session stores it once."""

    key: str
    role: str
    text: str
    name: str | None

    def append_to(self, session: Session) -> None:
        """Store it; nothing happens where the session holds it already."""
        session.append(self.role, self.text, name=self.name, key=self.key)

    async def aappend_to(self, session: Session) -> None:
        """Async twin of ``append_to``."""
        await session.aappend(self.role, self.text, name=self.name, key=self.key)


def keyed(messages: Sequence[BaseMessage]) -> list[Keyed]:
    """All messages but the system's, with the keys under which they are stored."""
    found: list[Keyed] = []
    seen: Counter[tuple[str, ...]] = Counter()
    for message in messages:
        role, name = role_and_name(message)
        if role == "system":
            continue
        text = message_text(message)
        content = (role, name or "", text)
        if role == "assistant" and found:
            key = f"reply:{_digest(found[-1].key)}"
        elif role != "assistant" and message.id is not None:
            key = f"id:{message.id}"
        else:
            key = f"text:{seen[content]}:{_digest(*content)}"
        seen[content] += 1
        found.append(Keyed(key, role, text, name))
    return found


def unstored(messages: Sequence[BaseMessage], stored: Sequence[Message]) -> list[Keyed]:
    """Those of the messages with text that are not among the stored ones."""
    known = {message.key for message in stored}
    return [item for item in keyed(messages) if item.key not in known and item.text.strip()]


def where_beside(
    where: Mapping[str, Any] | None, messages: Sequence[BaseMessage], stored: Sequence[Message]
) -> Mapping[str, Any] | None:
    """The filter, narrowed to what is not in the messages anyway: no document of theirs is recalled."""
    if not stored:
        return where
    present = {item.key for item in keyed(messages)}
    read = [m.document_id for m in stored if m.key in present and m.document_id is not None]
    if not read:
        return where
    others = {"$id": {"$nin": read[-MOST_EXCLUDED:]}}
    return {"$and": [where, others]} if where else others


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:32]
