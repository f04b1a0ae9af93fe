"""Tools for a model too small to handle them: its routers choose one, and it reads the results as evidence.

A small model writes a call or a text as it happens, whatever is asked; its routers tell the two apart. The
tools' descriptions stand against texts for what needs no tool. A human message calls each tool once at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

from msa_memory.engine.choice import rank_texts
from msa_memory.engine.engine import Engine
from msa_memory.integrations.langchain.messages import message_text

__all__ = ["NEEDS_NO_TOOL", "choose_tool", "with_results_to_read"]

NEEDS_NO_TOOL = (
    "Hello! Thank you. Goodbye.",
    "Write a poem, a story or a joke.",
    "General knowledge: facts about the world.",
    "What somebody said about themselves, their life, work and plans.",
)


def choose_tool(
    engine: Engine, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]]
) -> str | None:
    """The name of the tool (in OpenAI's format) that the newest human message asks for; None for text."""
    asked = _newest_question(messages)
    if asked is None:
        return None
    called = {
        call["name"]
        for message in messages[asked:]
        if isinstance(message, AIMessage)
        for call in message.tool_calls
    }
    functions = [tool["function"] for tool in tools if tool["function"]["name"] not in called]
    described = [f"{function['name']}: {function.get('description') or ''}" for function in functions]
    scores = rank_texts(engine, message_text(messages[asked]), [*described, *NEEDS_NO_TOOL])
    best = max(range(len(scores)), key=scores.__getitem__)
    return str(functions[best]["name"]) if best < len(functions) else None


def with_results_to_read(engine: Engine, messages: Sequence[BaseMessage]) -> list[BaseMessage] | None:
    """The messages with the newest question put as the model was trained to read one with evidence.

    The evidence are the results of the tools that were called for it; None where there are none.
    """
    asked = _newest_question(messages)
    results = [message for message in messages[asked or 0 :] if isinstance(message, ToolMessage)]
    if asked is None or not results:
        return None
    layout = engine.prompt.layout
    evidence = "\n".join(f"[{result.name or 'tool'}] {message_text(result)}" for result in results)
    question = layout.evidence_before + evidence + layout.evidence_after + message_text(messages[asked])
    return [*messages[:asked], HumanMessage(question)]


def _newest_question(messages: Sequence[BaseMessage]) -> int | None:
    """Where the newest human message stands; None where there is none or it says nothing."""
    asked = max((at for at, said in enumerate(messages) if isinstance(said, HumanMessage)), default=None)
    return None if asked is None or not message_text(messages[asked]).strip() else asked
