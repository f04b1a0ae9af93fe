"""``MSAMemoryBlock``: the long-term part of a LlamaIndex ``Memory``.

Messages that leave the short-term memory become messages of a session; what the memory knows about the newest
user message comes back as a citable block. Reading never writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.bridge.pydantic import Field
from llama_index.core.memory import BaseMemoryBlock
from llama_index.core.utils import get_tokenizer

from msa_memory.integrations.llama_index.llm import said
from msa_memory.memory import MemoryModel

__all__ = ["MSAMemoryBlock"]

QUESTION_CHARS = 2000
"""How much of a long message is asked about: its end."""


class MSAMemoryBlock(BaseMemoryBlock[str]):
    """Long-term memory for ``Memory.from_defaults(memory_blocks=[MSAMemoryBlock(memory)])``.

    Everything in the memory's namespace may be recalled, unless ``this_session_only``; use one namespace per
    user. System messages are not stored: they are the application's, not the conversation's.
    """

    name: str = "msa_memory"
    memory: MemoryModel = Field(exclude=True, repr=False)
    max_tokens: int = 512
    """Of what is recalled, in the memory's own tokens."""
    where: dict[str, Any] | None = None
    """Only documents that match this filter are recalled."""
    this_session_only: bool = False
    session_id: str = "default"
    """Where messages go that come without a session, as when the block is used by itself."""
    tokenizer_fn: Callable[[str], list[Any]] = Field(default_factory=get_tokenizer, exclude=True, repr=False)
    """What ``Memory`` counts with when it asks for less; its own default when left out."""

    def __init__(self, memory: MemoryModel, **options: Any) -> None:
        super().__init__(**{"memory": memory, **options})

    async def _aget(
        self, messages: list[ChatMessage] | None = None, session_id: str | None = None, **block_kwargs: Any
    ) -> str:
        question = _newest_question(messages or [])
        if not question:
            return ""
        where = self._where(session_id or self.session_id)
        return (await self.memory.acontext(question, max_tokens=self.max_tokens, where=where)).text

    async def _aput(self, messages: list[ChatMessage]) -> None:
        for message in messages:
            told = said(message)
            if told.role != "system" and told.content.strip():
                session = self.memory.session(message.additional_kwargs.get("session_id") or self.session_id)
                await session.aappend(told.role, told.content, name=told.name)

    async def atruncate(self, content: str, tokens_to_truncate: int) -> str | None:
        """Without as many of its last lines as it takes: the best evidence stands first."""
        lines, size = content.splitlines(), len(self.tokenizer_fn(content))
        room = size - tokens_to_truncate
        while lines and len(self.tokenizer_fn("\n".join(lines))) > room:
            lines.pop()
        return "\n".join(lines) or None

    def _where(self, session_id: str) -> dict[str, Any] | None:
        own = {"session": session_id} if self.this_session_only else None
        if own and self.where:
            return {"$and": [own, self.where]}
        return own or self.where


def _newest_question(messages: list[ChatMessage]) -> str:
    asked = next((message for message in reversed(messages) if message.role == MessageRole.USER), None)
    return "" if asked is None else said(asked).content[-QUESTION_CHARS:].strip()
