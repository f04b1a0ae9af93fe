"""MSALLM: chat and completion in every way LlamaIndex asks, tools and structured prediction."""

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.errors import ConfigError, InvalidDocumentError
from msa_memory.integrations.llama_index import MSALLM
from msa_memory.integrations.llama_index.llm import said
from msa_memory.testing import open_memory, tiny_model

ASKED = [
    ChatMessage(role="system", content="Be brief."),
    ChatMessage(role="user", content="Who repairs violins?"),
]
PLAIN = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who repairs violins?"}]


class Place(BaseModel):
    """Where somebody is."""

    city: Literal["Oslo", "Bergen"]
    floor: Literal[1, 2]


def weather(city: Literal["Oslo", "Bergen"], when: Literal["now", "later"] = "now") -> str:
    """How the weather is in a city."""
    return f"rain in {city} {when}"


def clock() -> str:
    """What time it is."""
    return "noon"


WEATHER, CLOCK = FunctionTool.from_defaults(weather), FunctionTool.from_defaults(clock)


@pytest.fixture(scope="module")
def memory() -> Iterator[MemoryModel]:
    with open_memory(config=MemoryConfig(max_new_tokens=12)) as memory:
        memory.add("Bob lives in Oslo and repairs violins.", id="bob", metadata={"year": 2024})
        memory.add("Ann paints lighthouses in Bergen.", id="ann", metadata={"year": 2025})
        yield memory


@pytest.fixture
def llm(memory: MemoryModel) -> MSALLM:
    return MSALLM(memory)


def comparable(response: ChatResponse) -> tuple[Any, ...]:
    """A response without the ids made up for its tool calls and without its delta."""
    blocks = [
        (block.tool_name, block.tool_kwargs) if isinstance(block, ToolCallBlock) else block
        for block in response.message.blocks
    ]
    return response.message.role, blocks, response.raw, response.additional_kwargs


# what it says of itself


def test_it_reports_the_model_truly(memory: MemoryModel, llm: MSALLM) -> None:
    engine = memory._engine()
    assert llm.metadata.context_window == engine.max_positions == 8192
    assert llm.metadata.num_output == 12
    assert MSALLM(memory, max_tokens=5).metadata.num_output == 5
    assert llm.metadata.is_chat_model
    assert llm.metadata.is_function_calling_model
    assert llm.metadata.model_name == engine.name
    text = "Bob lives in Oslo. Ünïcode 🎻"
    assert llm.tokenize(text) == engine.tokenizer.encode(text)
    assert len(llm.tokenize(text)) == engine.count_tokens(text)


async def test_nothing_is_loaded_on_the_loop(tmp_path: Path) -> None:
    async with open_memory(model=tiny_model(tmp_path)) as memory:
        runtime = memory._shared.runtime
        llm = MSALLM(memory, max_tokens=3)
        assert llm.to_payload()["max_tokens"] == 3
        asking = asyncio.create_task(llm.achat(ASKED))
        await asyncio.sleep(0)  # up to its first wait
        assert not runtime.loaded
        await asking
        assert runtime.loaded


def test_it_keeps_the_memory_out_of_what_is_traced(llm: MSALLM) -> None:
    assert "memory" not in llm.to_dict()
    assert "MemoryModel" not in repr(llm)
    assert llm.to_payload()["class_name"] == "MSALLM"


def test_unknown_options_are_refused(memory: MemoryModel, llm: MSALLM) -> None:
    with pytest.raises(ValueError, match="max_token"):
        MSALLM(memory, max_token=3)
    with pytest.raises(ConfigError, match=r"unknown options \['max_token'\]"):
        llm.chat(ASKED, max_token=3)


# chat and completion


def test_it_chats_as_the_memory_does(memory: MemoryModel, llm: MSALLM) -> None:
    answer = memory.chat(PLAIN)
    response = llm.chat(ASKED)
    assert response.message.role == MessageRole.ASSISTANT
    assert response.message.content == answer.text
    assert response.raw["found"] is answer.found is True
    assert response.raw["finish_reason"] == answer.finish_reason == "length"
    assert response.raw["usage"]["prompt_tokens"] == answer.usage.prompt_tokens
    assert [c["id"] for c in response.raw["citations"]] == [source.id for source in answer.sources]
    assert response.additional_kwargs == response.raw["usage"]


async def test_every_way_to_chat_says_the_same(llm: MSALLM) -> None:
    whole = comparable(llm.chat(ASKED))
    assert comparable(await llm.achat(ASKED)) == whole
    streamed = list(llm.stream_chat(ASKED))
    astreamed = [response async for response in await llm.astream_chat(ASKED)]
    for responses in (streamed, astreamed):
        assert len(responses) > 2
        assert comparable(responses[-1]) == whole
        told = ""
        for response in responses:
            told += response.delta or ""
            assert response.message.content == told, "each carries all text so far"
        assert [response.raw is None for response in responses[:-1]] == [True] * (len(responses) - 1)


async def test_every_way_to_complete_says_the_same(memory: MemoryModel, llm: MSALLM) -> None:
    prompt = "Who repairs violins?"
    whole = llm.complete(prompt)
    assert whole.text == memory.chat([{"role": "user", "content": prompt}]).text
    assert (await llm.acomplete(prompt)).text == whole.text
    streamed = list(llm.stream_complete(prompt))
    astreamed = [response async for response in await llm.astream_complete(prompt)]
    for responses in (streamed, astreamed):
        assert "".join(response.delta or "" for response in responses) == whole.text
        assert responses[-1].text == whole.text
        assert responses[-1].raw == whole.raw


def test_options_count_per_call_before_the_models_own(memory: MemoryModel) -> None:
    llm = MSALLM(memory, max_tokens=3, recall=False)
    assert llm.chat(ASKED).raw["usage"]["completion_tokens"] == 3
    assert llm.chat(ASKED).raw["citations"] == []
    other = llm.chat(ASKED, max_tokens=5, recall=True, where={"year": 2025}, k=1)
    assert other.raw["usage"]["completion_tokens"] == 5
    assert [citation["id"] for citation in other.raw["citations"]] == ["ann"]
    full = llm.chat(ASKED, max_tokens=12).message.content
    assert (
        llm.chat(ASKED, max_tokens=12, stop=[full[3:5]]).message.content
        == full[: full.index(full[3:5])].strip()
    )


@pytest.mark.parametrize(
    ("role", "ours"),
    [
        ("system", "system"), ("developer", "system"), ("user", "user"), ("assistant", "assistant"),
        ("chatbot", "assistant"), ("model", "assistant"), ("tool", "tool"), ("function", "tool"),
    ],
)  # fmt: skip
def test_every_role_has_a_place(role: str, ours: str) -> None:
    assert said(ChatMessage(role=role, content="x")).role == ours


def test_every_role_is_known() -> None:
    for role in MessageRole:
        said(ChatMessage(role=role, content="x"))


def test_messages_of_several_blocks() -> None:
    blocks = [
        ThinkingBlock(content="hm"),
        TextBlock(text="One."),
        TextBlock(text="Two."),
        ToolCallBlock(tool_call_id="1", tool_name="weather", tool_kwargs={"city": "Malmö"}),
    ]
    message = said(ChatMessage(role="assistant", blocks=blocks, additional_kwargs={"name": "Ann"}))
    assert message.content == 'One.\nTwo.\n{"name": "weather", "arguments": {"city": "Malmö"}}'
    assert message.name == "Ann"
    with pytest.raises(InvalidDocumentError, match="ImageBlock; this model reads text alone"):
        said(ChatMessage(role="user", blocks=[ImageBlock(url="https://example.org/a.png")]))


async def test_the_loop_ticks_while_it_chats(llm: MSALLM) -> None:
    ticks = 0

    async def heartbeat() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    heart = asyncio.create_task(heartbeat())
    marks = [ticks]
    await llm.achat(ASKED, max_tokens=80)
    marks.append(ticks)
    await llm.acomplete("Violins?", max_tokens=80)
    marks.append(ticks)
    seen = {ticks async for _ in await llm.astream_chat(ASKED, max_tokens=80)}
    completed = {ticks async for _ in await llm.astream_complete("Violins?", max_tokens=80)}
    heart.cancel()
    assert all(later - earlier > 30 for earlier, later in pairwise(marks))
    assert len(seen) > 3, "one step may bring several tokens that were guessed, but not all of them"
    assert len(completed) > 3


async def test_concurrent_chats_do_not_mix(llm: MSALLM) -> None:
    def asked(number: int) -> list[ChatMessage]:
        return [ChatMessage(role="user", content=["Violins?", "Lighthouses?", "Oslo?"][number % 3])]

    alone = [comparable(llm.chat(asked(number))) for number in range(3)]
    together = await asyncio.gather(*(llm.achat(asked(number)) for number in range(12)))
    assert [comparable(response) for response in together] == alone * 4


class Names(BaseEventHandler):
    """The names of all events, in order."""

    seen: list[str]

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.seen.append(event.class_name())


async def test_events_and_token_counts(memory: MemoryModel) -> None:
    counter, handler, dispatcher = TokenCountingHandler(), Names(seen=[]), get_dispatcher()
    before = list(dispatcher.event_handlers)
    dispatcher.add_event_handler(handler)
    try:
        llm = MSALLM(memory, callback_manager=CallbackManager([counter]))
        usage = llm.chat(ASKED).raw["usage"]
        assert counter.prompt_llm_token_count == usage["prompt_tokens"]
        assert counter.completion_llm_token_count == usage["completion_tokens"]
        assert handler.seen == ["LLMChatStartEvent", "LLMChatEndEvent"]
        handler.seen.clear()
        assert [response async for response in await llm.astream_chat(ASKED)]
        assert handler.seen[0] == "LLMChatStartEvent"
        assert handler.seen[-1] == "LLMChatEndEvent"
        assert set(handler.seen[1:-1]) == {"LLMChatInProgressEvent"}
        assert counter.prompt_llm_token_count == 2 * usage["prompt_tokens"]
        handler.seen.clear()
        llm.complete("Violins?")
        assert handler.seen == ["LLMCompletionStartEvent", "LLMCompletionEndEvent"]
    finally:
        dispatcher.event_handlers = before


# tools


@pytest.mark.parametrize("seed", range(4))
async def test_a_required_call_always_fits_its_tool(memory: MemoryModel, seed: int) -> None:
    llm = MSALLM(memory, max_tokens=60)
    asked = f"What is the weather? {seed}"
    response = llm.chat_with_tools([WEATHER, CLOCK], asked, tool_required=True)
    [call] = llm.get_tool_calls_from_response(response)
    if call.tool_name == "weather":
        assert {"city"} <= call.tool_kwargs.keys() <= {"city", "when"}
        assert call.tool_kwargs["city"] in ("Oslo", "Bergen")
        assert call.tool_kwargs.get("when", "now") in ("now", "later")
    else:
        assert (call.tool_name, call.tool_kwargs) == ("clock", {})
    assert call.tool_id
    assert response.raw["finish_reason"] == "tool_calls"
    assert not response.message.content
    others = [
        await llm.achat_with_tools([WEATHER, CLOCK], asked, tool_required=True),
        list(llm.stream_chat_with_tools([WEATHER, CLOCK], asked, tool_required=True))[-1],
        [r async for r in await llm.astream_chat_with_tools([WEATHER, CLOCK], asked, tool_required=True)][-1],
    ]
    assert [comparable(other) for other in others] == [comparable(response)] * 3


@pytest.mark.parametrize("choice", ["clock", {"type": "function", "function": {"name": "clock"}}])
def test_a_named_tool_is_the_one_called(memory: MemoryModel, choice: Any) -> None:
    llm = MSALLM(memory, max_tokens=60)
    response = llm.chat_with_tools([WEATHER, CLOCK], "Weather?", tool_choice=choice)
    [call] = llm.get_tool_calls_from_response(response)
    assert (call.tool_name, call.tool_kwargs) == ("clock", {})


def test_text_instead_of_a_call(memory: MemoryModel) -> None:
    llm = MSALLM(memory, max_tokens=20)
    response = llm.chat_with_tools([WEATHER], "Hello?", tool_choice="none")
    assert response == llm.chat([ChatMessage(role="user", content="Hello?")])
    free = llm.chat_with_tools([WEATHER], "Hello?")
    streamed = list(llm.stream_chat_with_tools([WEATHER], "Hello?"))
    if not llm.get_tool_calls_from_response(free, error_on_no_tool_call=False):
        assert not (free.message.content or "").startswith("Answer:")
        assert "".join(r.delta or "" for r in streamed) == free.message.content
        with pytest.raises(ValueError, match="expected a tool call"):
            llm.get_tool_calls_from_response(free)


def test_an_unknown_choice_is_refused(llm: MSALLM) -> None:
    with pytest.raises(ConfigError, match=r"tool_choice is 'cook'; .*\['weather'\]"):
        llm.chat_with_tools([WEATHER], "Hello?", tool_choice="cook")


def test_a_call_that_is_cut_off_is_no_call(memory: MemoryModel) -> None:
    llm = MSALLM(memory, max_tokens=4)
    response = llm.chat_with_tools([WEATHER], "Weather?", tool_required=True)
    assert response.raw["finish_reason"] == "length"
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []


async def test_predict_and_call(memory: MemoryModel) -> None:
    llm = MSALLM(memory, max_tokens=60)
    response = llm.predict_and_call([CLOCK], "Time?", tool_required=True)
    assert response.response == "noon"
    assert response.sources[0].tool_name == "clock"
    assert (await llm.apredict_and_call([CLOCK], "Time?", tool_required=True)).response == "noon"


async def test_structured_prediction(memory: MemoryModel) -> None:
    llm = MSALLM(memory, max_tokens=60)
    prompt = PromptTemplate("Where is {name}?")
    found = llm.structured_predict(Place, prompt, name="Bob")
    assert isinstance(found, Place)
    assert await llm.astructured_predict(Place, prompt, name="Bob") == found
    assert list(llm.stream_structured_predict(Place, prompt, name="Bob")) == [found]
    astreamed = await llm.astream_structured_predict(Place, prompt, name="Bob")
    assert [one async for one in astreamed] == [found]
    assert Place.model_validate_json(llm.as_structured_llm(Place).complete("Where is Bob?").text)
