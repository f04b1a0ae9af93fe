"""Tools and structured output: whatever a model would like to write, calls and JSON match their schemas."""

import enum
import json
from collections.abc import Generator, Iterator
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field

from msa_memory import MemoryModel
from msa_memory.engine.choice import rank_texts
from msa_memory.engine.json_grammar import GrammarConstraint, check_grammar, json_rule
from msa_memory.engine.tokenizer import Tokenizer
from msa_memory.errors import ConfigError, EngineError
from msa_memory.integrations.langchain import ChatMSA
from msa_memory.integrations.langchain.call import Call
from msa_memory.integrations.langchain.forms import tool_descriptions
from msa_memory.integrations.langchain.tool_choice import NEEDS_NO_TOOL
from msa_memory.testing import open_memory


class Colour(enum.Enum):
    RED = "red"
    SEA_GREEN = "sea green"


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int = Field(ge=0, le=150)
    colours: list[Colour] = Field(max_length=3)
    nickname: str | None = None
    kind: Literal["friend", "colleague"]


class Schema(BaseModel):
    """Something whose fields are called as parts of a JSON Schema are."""

    properties: Person
    default: dict[str, int] = {"properties": 1}


class Family(BaseModel):
    """People who belong together."""

    members: list[Person] = Field(min_length=1, max_length=2)
    height_m: float
    verified: bool
    notes: dict[str, str]


@tool
def get_weather(location: str) -> str:
    """Get the weather at a location."""
    return f"It is sunny in {location}."


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers."""
    return a * b


@pytest.fixture(scope="module")
def memory() -> Iterator[MemoryModel]:
    with open_memory() as memory:
        memory.add("Bob repairs violins.")
        yield memory


@pytest.fixture
def model(memory: MemoryModel) -> ChatMSA:
    return ChatMSA(memory=memory, max_tokens=160)


def tokenizer_of(memory: MemoryModel) -> Tokenizer:
    def steps() -> Generator[None, None, Tokenizer]:
        yield
        return memory._engine().tokenizer

    return memory._run(steps())


def call_of(message: Any) -> dict[str, Any]:
    assert isinstance(message, AIMessage)
    assert message.content == ""
    [call] = message.tool_calls
    return call


# calls always match


@pytest.mark.parametrize("schema", [Person, Family, Schema, get_weather, multiply])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_forced_call_matches_its_schema(model: ChatMSA, schema: Any, temperature: float) -> None:
    bound = model.bind_tools([schema], tool_choice="any", temperature=temperature)
    call = call_of(bound.invoke("Who is Bob?", max_tokens=300))
    if isinstance(schema, type):
        schema.model_validate(call["args"])
    else:
        schema.args_schema.model_validate(call["args"])
        assert set(call["args"]) == set(schema.args)


def test_streams_carry_the_same_call(model: ChatMSA) -> None:
    bound = model.bind_tools([multiply], tool_choice="multiply")
    whole = call_of(bound.invoke("3 by 4"))
    chunks = list(bound.stream("3 by 4"))
    assert [len(chunk.tool_call_chunks) for chunk in chunks] == [0] * (len(chunks) - 1) + [1]
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    streamed = call_of(total)
    assert (streamed["name"], streamed["args"]) == (whole["name"], whole["args"])
    assert total.response_metadata["finish_reason"] == "tool_calls"
    assert streamed["id"] != whole["id"]


def test_tool_choice(model: ChatMSA) -> None:
    tools = [get_weather, multiply]
    for choice in ("multiply", {"type": "function", "function": {"name": "multiply"}}):
        assert call_of(model.bind_tools(tools, tool_choice=choice).invoke("Hi"))["name"] == "multiply"
    for choice in ("any", "required", True):
        assert call_of(model.bind_tools(tools, tool_choice=choice).invoke("Hi"))
    message = model.bind_tools(tools, tool_choice="none").invoke("Hi")
    assert message.content
    assert not message.tool_calls
    with pytest.raises(
        ConfigError, match=r"tool_choice is 'divide'; expected .* \['get_weather', 'multiply'\]"
    ):
        model.bind_tools(tools, tool_choice="divide")


def test_a_call_that_was_cut_off_is_an_invalid_one(model: ChatMSA) -> None:
    bound = model.bind_tools([Person], tool_choice="any", max_tokens=12)
    whole = bound.invoke("Who is Bob?")
    chunks = list(bound.stream("Who is Bob?"))
    for message in (whole, chunks[-1]):
        assert message.tool_calls == []
        [invalid] = message.invalid_tool_calls
        assert "cut off" in invalid["error"]
        assert "max_tokens" in invalid["error"]
        assert message.response_metadata["finish_reason"] == "length"


def test_the_model_may_choose_itself(memory: MemoryModel) -> None:
    model = ChatMSA(memory=memory, max_tokens=80, tools_chosen_by="model")
    bound = model.bind_tools([multiply])
    message = bound.invoke("What is 3 by 4?")
    assert bool(message.tool_calls) != bool(message.content)
    chunks = list(bound.stream("What is 3 by 4?"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.content == message.content
    assert not str(total.content).startswith("Answer:")


# who needs a tool


def test_routers_tell_what_a_message_asks_for(memory: MemoryModel) -> None:
    texts = ["cats sleep", "violins", "repairs violins"]

    def steps() -> Generator[None, None, list[float]]:
        yield
        return rank_texts(memory._engine(), "Who repairs violins?", texts)

    scores = memory._run(steps())
    assert len(scores) == 3
    assert max(scores) == scores[2]
    assert scores == memory._run(steps())


def test_a_tool_is_called_where_it_fits_and_once(model: ChatMSA) -> None:
    bound = model.bind_tools([get_weather, multiply], max_tokens=60)
    asked = HumanMessage("Get the weather at this location")
    called = bound.invoke([asked])
    assert call_of(called)["name"] == "get_weather"
    result = get_weather.invoke(called.tool_calls[0])
    answer = bound.invoke([asked, called, result])
    assert "get_weather" not in [call["name"] for call in answer.tool_calls], "it was called already"
    again = bound.invoke([asked, called, result, AIMessage("Sunny."), asked])
    assert call_of(again)["name"] == "get_weather", "but may be called for the next message"
    for text in NEEDS_NO_TOOL:
        message = bound.invoke(text)
        assert message.content
        assert not message.tool_calls


def test_what_tools_said_is_read_as_evidence(memory: MemoryModel) -> None:
    def begun(routers_choose: bool) -> Call:
        call = Call(memory, messages, {}, tool_descriptions([get_weather]), routers_choose=routers_choose)
        call.begin()
        return call

    question = "What is the weather in Oslo?"
    called = AIMessage("", tool_calls=[{"name": "get_weather", "args": {"location": "Oslo"}, "id": "1"}])
    result = ToolMessage("It is sunny.", name="get_weather", tool_call_id="1")
    messages = [HumanMessage("Hello."), AIMessage("Hi."), HumanMessage(question), called, result]
    call = begun(True)
    *before, asked = [message.content for message in call.conversation()]
    assert before == ["Hello.", "Hi."]
    assert "[get_weather] It is sunny." in asked.split(question)[0]
    assert asked.endswith(question)
    assert call.chat_options()["recall"] is False
    assert [message.role for message in begun(False).conversation()][1:] == [
        *["user", "assistant", "user", "assistant", "tool"]
    ]


def test_an_agent_runs_a_tool(model: ChatMSA) -> None:
    agent = create_agent(model, tools=[get_weather])
    messages = agent.invoke({"messages": [("user", "Get the weather at this location")]})["messages"]
    kinds = [type(message) for message in messages]
    assert kinds == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    location = messages[1].tool_calls[0]["args"]["location"]
    assert messages[2].content == f"It is sunny in {location}."
    assert messages[3].content


async def test_an_agent_runs_a_tool_async(model: ChatMSA) -> None:
    agent = create_agent(model, tools=[get_weather])
    messages = (await agent.ainvoke({"messages": [("user", "Get the weather at this location")]}))["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]


# structured output


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
def test_structured_output(model: ChatMSA, method: str) -> None:
    person = model.with_structured_output(Person, method=method).invoke("Who is Bob?")
    assert isinstance(person, Person)
    as_dict = model.with_structured_output(Person.model_json_schema(), method=method).invoke("Who is Bob?")
    Person.model_validate(as_dict)
    both = model.with_structured_output(Person, method=method, include_raw=True).invoke("Who is Bob?")
    assert isinstance(both["raw"], AIMessage)
    assert both["parsed"] == person
    assert both["parsing_error"] is None


async def test_structured_output_streams_whole_values(model: ChatMSA) -> None:
    structured = model.with_structured_output(Person, method="json_mode")
    assert [value async for value in structured.astream("Who is Bob?")] == [
        await structured.ainvoke("Who is Bob?")
    ]


def test_structured_output_refuses_what_it_does_not_know(model: ChatMSA) -> None:
    with pytest.raises(ConfigError, match="method is 'yaml'"):
        model.with_structured_output(Person, method="yaml")
    with pytest.raises(ConfigError, match="response_format is"):
        model.invoke("Hi", response_format={"type": "xml"})


def test_any_json_object(model: ChatMSA) -> None:
    message = model.invoke("Who is Bob?", response_format={"type": "json_object"})
    assert isinstance(json.loads(message.text), dict)


def test_an_agents_response_format(model: ChatMSA) -> None:
    for response_format in (Person, ProviderStrategy(Person)):
        agent = create_agent(model, tools=[], response_format=response_format)
        state = agent.invoke({"messages": [("user", "Who is Bob?")]})
        assert isinstance(state["structured_response"], Person)


# the grammar itself

schemas = st.recursive(
    st.sampled_from(
        [
            {"type": "string"},
            {"type": "integer"},
            {"type": "number"},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["red", 'a "quoted" one', 3, None]},
            {"type": "string", "maxLength": 5},
            {"type": "integer", "minimum": -3, "maximum": 12},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 3}, inner),
        st.builds(
            lambda first, second: {
                "type": "object",
                "properties": {"first": first, "größe": second},
                "required": ["first"],
                "additionalProperties": False,
            },
            inner,
            inner,
        ),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=4,
)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """A plain reading of the part of JSON Schema that ``schemas`` uses."""
    if "anyOf" in schema:
        return any(fits(value, part) for part in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"] and not isinstance(value, bool)
    match schema["type"]:
        case "object":
            properties = schema["properties"]
            return (
                isinstance(value, dict)
                and "first" in value
                and all(key in properties and fits(inner, properties[key]) for key, inner in value.items())
            )
        case "array":
            return (
                isinstance(value, list)
                and 1 <= len(value) <= 3
                and all(fits(v, schema["items"]) for v in value)
            )
        case "string":
            return isinstance(value, str) and len(value) <= schema.get("maxLength", 10**9)
        case "integer":
            whole = isinstance(value, int) and not isinstance(value, bool)
            return whole and schema.get("minimum", value) <= value <= schema.get("maximum", value)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
        case _:
            return value is None


@settings(max_examples=15)
@given(schema=schemas, seed=st.integers(0, 9))
def test_whatever_is_drawn_ends_as_json_of_the_schema(
    memory: MemoryModel, schema: dict[str, Any], seed: int
) -> None:
    """Tokens drawn evenly among the allowed ones: as unwilling as a model can be."""
    tokenizer = tokenizer_of(memory)
    random, most = torch.Generator().manual_seed(seed), 400
    constraint = GrammarConstraint(lambda: tokenizer, check_grammar(f"start: {json_rule(schema)}"), most)
    ids: list[int] = []
    while not constraint.finished and len(ids) < most:
        allowed = constraint.allowed()
        assert allowed.shape == (tokenizer.vocab_size,)
        token = int(torch.multinomial(allowed.float(), 1, generator=random))
        if token in tokenizer.stop_ids:
            break
        constraint.accept(token)
        ids.append(token)
    text = tokenizer.decode(ids)
    assert fits(json.loads(text), schema), text


def test_tokens_that_do_not_fit_are_refused(memory: MemoryModel) -> None:
    tokenizer = tokenizer_of(memory)
    constraint = GrammarConstraint(lambda: tokenizer, check_grammar('start: "yes" | "no"'), 10)
    assert not constraint.finished
    assert {tokenizer.decode([int(i)])[0] for i in constraint.allowed().nonzero()} == {"y", "n"}
    with pytest.raises(EngineError, match="does not fit the grammar"):
        constraint.accept(tokenizer.encode("maybe")[0])
    for wrong in ("start: nothing", "start: %json {"):
        with pytest.raises(ConfigError, match="cannot constrain an answer"):
            check_grammar(wrong)


def test_a_constraint_of_ones_own(memory: MemoryModel) -> None:
    """The same hook, without LangChain."""
    tokenizer = tokenizer_of(memory)
    constraint = GrammarConstraint(lambda: tokenizer, check_grammar('start: "yes" | "no"'), 10)
    answer = memory.chat([{"role": "user", "content": "Is it?"}], constraint=constraint)
    assert answer.text in ("yes", "no")
    assert answer.finish_reason == "stop"
