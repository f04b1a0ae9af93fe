"""Forms of answers, without any framework: schemas keep their meaning, answers are read as was meant."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_memory.errors import ConfigError
from msa_memory.integrations.forms import BrokenCall, ToolCall, answer_form

pytest.importorskip("llguidance")

INNER = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def schema_in(grammar: str) -> dict[str, Any]:
    """The one JSON Schema of a grammar."""
    schema: dict[str, Any]
    schema, _ = json.JSONDecoder().raw_decode(grammar[grammar.index("%json ") + 6 :])
    return schema


def accepts(grammar: str, text: str) -> bool:
    """Whether llguidance takes a whole text, byte by byte."""
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(grammar))
    return bool(matcher.consume_tokens(list(text.encode()))) and bool(matcher.is_accepting())


@pytest.mark.parametrize("name", ["properties", "$defs", "items", "enum", "default", "const"])
def test_a_property_may_be_called_like_a_word_of_the_schema(name: str) -> None:
    parameters = {"type": "object", "properties": {name: INNER}, "required": [name]}
    form = answer_form([tool("note", parameters)], "any")
    assert form is not None
    closed = schema_in(form.grammar)
    assert closed["properties"] == {name: {**INNER, "additionalProperties": False}}
    assert closed["additionalProperties"] is False
    assert accepts(form.grammar, json.dumps({"name": "note", "arguments": {name: {"a": "x"}}}))
    assert not accepts(form.grammar, json.dumps({"name": "note", "arguments": {"other": {"a": "x"}}}))


def test_what_says_that_it_takes_more_is_left_open() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": True}
    form = answer_form([tool("note", parameters)], "note")
    assert form is not None
    assert schema_in(form.grammar)["additionalProperties"] is True


def test_without_arguments_a_tool_takes_none() -> None:
    form = answer_form([tool("now")], {"type": "function", "function": {"name": "now"}})
    assert form is not None
    assert form.read('{"name": "now", "arguments": {}}') == ToolCall("now", {})
    assert accepts(form.grammar, '{"name": "now", "arguments": {}}')
    assert not accepts(form.grammar, '{"name": "now", "arguments": {"a": 1}}')


@given(st.text(min_size=1).filter(lambda text: text == text.strip()))
def test_text_behind_the_mark_is_read_back(text: str) -> None:
    form = answer_form([tool("now")], None)
    assert form is not None
    assert form.read(f"Answer: {text}") == text
    assert form.shown(f"Answer: {text}") == text
    assert form.shown('{"name": "now"') == ""


def test_a_call_that_was_cut_off_is_said_to_be() -> None:
    form = answer_form([tool("now")], "required")
    assert form is not None
    read = form.read('{"name": "now", "argu')
    assert isinstance(read, BrokenCall)
    assert "cut off" in read.problem


def test_no_tools_no_form_and_unknown_choices_are_refused() -> None:
    assert answer_form([], None) is None
    assert answer_form([tool("now")], "none") is None
    with pytest.raises(ConfigError, match="tool_choice is 'cook'"):
        answer_form([tool("now")], "cook")
