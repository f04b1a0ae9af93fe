"""The form of an answer that may call tools: what the model is told, the grammar it keeps to, how it is read.

Knows tools in OpenAI's format and nothing of LlamaIndex's classes. A call is the JSON object
``{"name": ..., "arguments": {...}}``; text that is no call stands behind a mark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msa_memory.engine.json_grammar import check_grammar, json_rule
from msa_memory.errors import ConfigError

__all__ = ["ToolCall", "ToolForm", "tool_form"]

MARK = "Answer: "


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model wants to be made."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How an answer must look."""

    instructions: str
    grammar: str

    def shown(self, text: str) -> str:
        """The part of an unfinished answer that is text for the user."""
        return text.removeprefix(MARK) if text.startswith(MARK) else ""

    def read(self, text: str) -> str | ToolCall:
        """A finished answer; one that was cut off within a call is given as it stands."""
        if not text.startswith("{"):
            return text.removeprefix(MARK.rstrip()).strip()
        try:
            call = json.loads(text)
        except ValueError:
            return text
        return ToolCall(call["name"], call["arguments"])


def tool_form(tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] | None) -> ToolForm | None:
    """The form of an answer with ``tools`` at hand; None where none may be called.

    Args:
        tools: in OpenAI's format.
        choice: None or ``"auto"`` leaves calling to the model, ``"required"`` or ``"any"`` demands a call, a
            tool's name (or OpenAI's mapping that holds it) demands that one, ``"none"`` forbids calls.

    Raises:
        ConfigError: an unknown choice, or a schema that no grammar can express.
        MissingExtraError: llguidance is not installed.
    """
    functions = [tool["function"] for tool in tools]
    names = [function["name"] for function in functions]
    if isinstance(choice, Mapping):
        choice = choice.get("function", choice).get("name")
    if choice not in (None, "auto", "required", "any", "none", *names):
        raise ConfigError(
            f"tool_choice is {choice!r}; expected 'auto', 'required', 'none' or one of the tools {names}"
        )
    if choice in names:
        functions = [function for function in functions if function["name"] == choice]
    if not functions or choice == "none":
        return None
    free = choice in (None, "auto")
    ways = [_call(function) for function in functions] + ([f"{json.dumps(MARK)} /(.|\\n)+/"] if free else [])
    return ToolForm(_instructions(functions, free), check_grammar(f"start: {' | '.join(ways)}"))


def _call(function: Mapping[str, Any]) -> str:
    opening = f'{{"name": {json.dumps(function["name"])}, "arguments": '
    return f'{json.dumps(opening)} ({json_rule(_parameters(function))}) "}}"'


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    closed: dict[str, Any] = _closed(function.get("parameters") or {"type": "object", "properties": {}})
    return closed


def _closed(schema: Any) -> Any:
    """The schema with objects that take the properties it names and no others, unless it says otherwise."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def _instructions(functions: Sequence[Mapping[str, Any]], free: bool) -> str:
    lines = ["You can use these tools:"]
    for function in functions:
        arguments = json.dumps(_parameters(function).get("properties", {}), ensure_ascii=False)
        lines.append(f"- {function['name']}: {function.get('description') or ''} Arguments: {arguments}")
    lines.append('To use one, reply with {"name": "...", "arguments": {...}} and nothing else.')
    if free:
        lines.append(f"When no tool is needed, reply with {MARK}followed by your answer.")
    return "\n".join(lines)
