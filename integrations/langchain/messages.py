"""LangChain messages as the memory reads them: text with a role. Everything that is not text is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    SystemMessage,
    ToolMessage,
)

from msa_memory.errors import InvalidDocumentError
from msa_memory.types import ChatMessage as Said

__all__ = ["call_text", "message_text", "role_and_name", "said"]

Role = Literal["system", "user", "assistant", "tool"]
_NAMED_ROLES: dict[str, Role] = {
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "user": "user",
}
_UNREAD_BLOCKS = frozenset(
    "invalid_tool_call reasoning thinking tool_call tool_call_chunk tool_result tool_use".split()
)
"""Content blocks that hold no text to read, or repeat what a message's ``tool_calls`` hold."""


def said(message: BaseMessage) -> Said:
    """A message as text with a role; tool calls are spelled as the model itself would write them.

    Raises:
        InvalidDocumentError: it holds an image, a file or anything else that is not text.
    """
    parts = [message_text(message)]
    if isinstance(message, AIMessage):
        parts += [call_text(call["name"], call["args"]) for call in message.tool_calls]
    role, name = role_and_name(message)
    return Said(role=role, content="\n".join(filter(None, parts)), name=name)


def message_text(message: BaseMessage) -> str:
    """The text of a message. Raises InvalidDocumentError for images, files and the like."""
    if isinstance(message.content, str):
        return message.content
    return "".join(map(_block_text, message.content))


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A tool call as the model writes it."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False, default=str)


def role_and_name(message: BaseMessage) -> tuple[Role, str | None]:
    """Who speaks: the role, and a name where several share it."""
    match message:
        case AIMessage():
            return "assistant", message.name
        case SystemMessage():
            return "system", message.name
        case ToolMessage() | FunctionMessage():
            return "tool", message.name
        case ChatMessage() if message.role not in _NAMED_ROLES:
            return "user", message.name or message.role
        case ChatMessage():
            return _NAMED_ROLES[message.role], message.name
        case _:
            return "user", message.name


def _block_text(block: str | Mapping[str, Any]) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block.get("text"), str):
        return str(block["text"])
    if block.get("type") in _UNREAD_BLOCKS:
        return ""
    raise InvalidDocumentError(
        f"a message holds a block of type {block.get('type')!r}; this model reads text only"
    )
