"""The form an answer must take: a tool call, text, or JSON of a schema.

A form is three things that belong together: what the model is told, the grammar that its answer cannot leave,
and how the answer is read back. A call is the JSON object ``{"name": ..., "arguments": {...}}``; where text
may stand instead, it stands behind a mark. Knows tools in OpenAI's format and no framework.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msa_memory.engine.json_grammar import check_grammar, json_rule
from msa_memory.errors import ConfigError

__all__ = ["BrokenCall", "Form", "ToolCall", "answer_form", "read_tool_choice"]

_ANSWER = "Answer: "
_NAMED_PARTS = ("$defs", "definitions", "patternProperties", "properties")
"""What holds schemas by name in a JSON Schema."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model wants to be made."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BrokenCall:
    """A call that was cut off, as it stands, and what is wrong with it."""

    text: str
    problem: str


@dataclass(frozen=True, slots=True)
class Form:
    """How an answer must look."""

    instructions: str
    grammar: str
    tools: tuple[str, ...] = ()
    """Names of the tools that may be called."""
    marked: bool = False
    """Text stands behind a mark that tells it from a call."""
    whole: bool = False
    """The text is JSON, of no use before it is complete."""

    def shown(self, text: str) -> str:
        """The part of an unfinished answer that is text to show."""
        if self.whole or not self.marked:
            return ""
        return text.removeprefix(_ANSWER).lstrip() if text.startswith(_ANSWER) else ""

    def read(self, text: str) -> str | ToolCall | BrokenCall:
        """A finished answer."""
        if self.marked and not text.startswith("{"):
            return text.removeprefix(_ANSWER.rstrip()).strip()
        if not self.tools:
            return text
        try:
            call = json.loads(text)
        except ValueError as error:
            return BrokenCall(text, f"the call was cut off ({error}); allow more max_tokens")
        return ToolCall(call["name"], call["arguments"])


def read_tool_choice(choice: Any, names: Sequence[str]) -> str | None:
    """``"any"``, ``"none"``, a tool's name, or None where the model may choose between text and a call.

    Raises:
        ConfigError: something else.
    """
    if isinstance(choice, Mapping):
        choice = choice.get("function", choice).get("name")
    match choice:
        case None | False | "auto":
            return None
        case True | "any" | "required":
            return "any"
        case str() if choice == "none" or choice in names:
            return choice
    raise ConfigError(
        f"tool_choice is {choice!r}; expected 'auto', 'any', 'none' or one of the tools {list(names)}"
    )


def answer_form(
    tools: Sequence[Mapping[str, Any]], tool_choice: Any, response_format: Any = None
) -> Form | None:
    """The form that tools (in OpenAI's format) and a response format ask for; None where text will do.

    A ``tool_choice`` of None or ``"auto"`` leaves calling to the model, ``"any"`` or ``"required"`` demands a
    call, a tool's name (or OpenAI's mapping that holds it) demands that one, ``"none"`` forbids calls.

    Raises:
        ConfigError: an unknown tool choice or response format, or a schema that no grammar can express.
        MissingExtraError: llguidance is not installed.
    """
    schema = None if response_format is None else _response_schema(response_format)
    functions = [tool["function"] for tool in tools]
    choice = read_tool_choice(tool_choice, [function["name"] for function in functions])
    if choice == "none":
        functions = []
    elif choice not in (None, "any"):
        functions = [function for function in functions if function["name"] == choice]
    if functions:
        return _tool_form(functions, forced=choice is not None, schema=schema)
    return None if schema is None else _json_form(schema)


def _tool_form(functions: Sequence[Mapping[str, Any]], *, forced: bool, schema: Any) -> Form:
    calls = [
        f'{json.dumps(_call_start(function))} {json_rule(_parameters(function))} "}}"'
        for function in functions
    ]
    rules = [f"call_{number}: {call}" for number, call in enumerate(calls)]
    ways = [f"call_{number}" for number in range(len(calls))]
    if not forced:
        text = r"/(.|\n)+/" if schema is None else json_rule(schema)
        rules.append(f"answer: {json.dumps(_ANSWER)} {text}")
        ways.append("answer")
    grammar = "\n".join([f"start: {' | '.join(ways)}", *rules])
    return Form(
        _tool_instructions(functions, forced, schema),
        check_grammar(grammar),
        tuple(function["name"] for function in functions),
        marked=not forced,
        whole=schema is not None,
    )


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    return _closed(function.get("parameters") or {"type": "object", "properties": {}})


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema whose objects take the properties it names and no others, unless it says otherwise."""
    closed = {key: _closed_part(key, part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def _closed_part(key: str, part: Any) -> Any:
    if key in _NAMED_PARTS and isinstance(part, dict):
        return {name: _closed_part("", inner) for name, inner in part.items()}
    if isinstance(part, list) and key != "enum":
        return [_closed_part("", inner) for inner in part]
    return _closed(part) if isinstance(part, dict) and key not in ("const", "default") else part


def _call_start(function: Mapping[str, Any]) -> str:
    return f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '


def _tool_instructions(functions: Sequence[Mapping[str, Any]], forced: bool, schema: Any) -> str:
    lines = ["You can use these tools:"]
    for function in functions:
        parameters = json.dumps(_parameters(function).get("properties", {}), ensure_ascii=False)
        lines.append(f"- {function['name']}: {function.get('description') or ''} Arguments: {parameters}")
    lines.append('To use one, reply with {"name": "...", "arguments": {...}} and nothing else.')
    if not forced:
        like = "" if schema is None else f" as JSON of this schema: {json.dumps(schema, ensure_ascii=False)}"
        lines.append(f"When no tool is needed, reply with {_ANSWER}followed by your answer{like}.")
    return "\n".join(lines)


def _json_form(schema: Mapping[str, Any]) -> Form:
    told = json.dumps(schema, ensure_ascii=False) if schema else "an object"
    return Form(
        f"Reply with JSON only, of this schema: {told}",
        check_grammar(f"start: {json_rule(schema or None)}"),
        whole=True,
    )


def _response_schema(response_format: Any) -> dict[str, Any]:
    """The JSON Schema of OpenAI's ``response_format``, or one given as it is; empty for any object."""
    match response_format:
        case {"type": "json_object"}:
            return {}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return _closed(schema)
        case {"type": "object"} | {"properties": dict()} | {"$ref": str()} | {"anyOf": list()}:
            return _closed(response_format)
    raise ConfigError(
        f"response_format is {response_format!r:.80}; expected {{'type': 'json_schema', ...}}, "
        "{'type': 'json_object'} or a JSON Schema"
    )
