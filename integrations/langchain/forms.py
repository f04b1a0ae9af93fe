"""LangChain's tools as forms describe them, and answers of a form as LangChain's tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import InvalidToolCall, ToolCall
from langchain_core.messages.tool import invalid_tool_call, tool_call
from langchain_core.utils.function_calling import convert_to_openai_tool

from msa_memory.integrations.forms import BrokenCall, Form

__all__ = ["Reading", "read_answer", "tool_descriptions"]


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer taken apart."""

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()


def read_answer(form: Form | None, text: str, call_id: str) -> Reading:
    """A finished answer; a call that was cut off is an invalid one."""
    read = text if form is None else form.read(text)
    if isinstance(read, str):
        return Reading(read)
    if isinstance(read, BrokenCall):
        broken = invalid_tool_call(name=None, args=read.text, id=call_id, error=read.problem)
        return Reading("", (), (broken,))
    return Reading("", (tool_call(name=read.name, args=read.arguments, id=call_id),))


def tool_descriptions(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Tools of any kind LangChain knows in OpenAI's format."""
    return [convert_to_openai_tool(tool) for tool in tools]
