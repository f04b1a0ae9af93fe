"""ChatMSA beyond LangChain's suites: streams, threads, loops, sessions, metadata and what is refused."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from msa_memory import MemoryModel
from msa_memory.errors import ConfigError, InvalidDocumentError, ModelNotFoundError, MSAError
from msa_memory.integrations.langchain import ChatMSA
from msa_memory.integrations.langchain.call import Call
from msa_memory.integrations.langchain.messages import said
from msa_memory.testing import open_memory, tiny_model
from msa_memory.types import Answer, Source, Usage

FACTS = {
    "bob": "Bob lives in Oslo and repairs violins.",
    "ann": "Ann paints lighthouses in Bergen.",
    "cat": "The cat sleeps under the kitchen table.",
}
QUESTION = "Who repairs violins?"


@pytest.fixture(scope="module")
def shared() -> Iterator[MemoryModel]:
    with open_memory() as memory:
        memory.add_many([{"id": id, "content": text} for id, text in FACTS.items()])
        yield memory


@pytest.fixture
def memory(shared: MemoryModel, request: pytest.FixtureRequest) -> MemoryModel:
    """A namespace of its own with the facts in it."""
    view = shared.namespace(request.node.name)
    view.add_many([{"id": id, "content": text} for id, text in FACTS.items()])
    return view


@pytest.fixture
def model(shared: MemoryModel) -> ChatMSA:
    return ChatMSA(memory=shared, max_tokens=12)


def added_up(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


def same(message: BaseMessage) -> tuple[Any, ...]:
    """What must not depend on the way a message came."""
    assert isinstance(message, AIMessage)
    return (message.content, message.usage_metadata, message.response_metadata, message.tool_calls)


# answers, whichever way


async def test_four_ways_to_one_answer(model: ChatMSA) -> None:
    expected = same(model.invoke(QUESTION))
    assert same(await model.ainvoke(QUESTION)) == expected
    assert same(added_up(list(model.stream(QUESTION)))) == expected
    assert same(added_up([chunk async for chunk in model.astream(QUESTION)])) == expected


def test_it_answers_with_what_it_recalls(model: ChatMSA, shared: MemoryModel) -> None:
    answer = shared.chat([{"role": "user", "content": QUESTION}], max_new_tokens=12)
    message = model.invoke(QUESTION)
    assert message.content == answer.text
    assert message.usage_metadata == {
        "input_tokens": answer.usage.prompt_tokens,
        "output_tokens": 12,
        "total_tokens": answer.usage.prompt_tokens + 12,
    }
    metadata = message.response_metadata
    assert metadata["finish_reason"] == "length"
    assert metadata["model_name"] == str(tiny_model())
    assert [source["id"] for source in metadata["memory_citations"]] == [s.id for s in answer.sources]
    assert metadata["memory_citations"][0]["text"] == FACTS["bob"]
    assert json.loads(json.dumps(metadata)) == metadata


def test_without_a_memory_it_is_plain_chat(shared: MemoryModel) -> None:
    messages = [SystemMessage("Be brief."), HumanMessage(QUESTION)]
    plain = ChatMSA(model=str(tiny_model()), max_tokens=12)
    expected = shared.chat([said(message) for message in messages], recall=False, max_new_tokens=12)
    assert plain.invoke(messages).content == expected.text
    assert plain.invoke(messages).response_metadata["memory_citations"] == []
    plain.close()
    assert plain.invoke(messages).content == expected.text, "it opens again"
    plain.close()


def test_filter_and_k_hold_for_the_model_and_for_a_call(shared: MemoryModel) -> None:
    def cited(model: ChatMSA, **options: Any) -> set[str]:
        message = model.invoke(QUESTION, max_tokens=4, **options)
        return {source["id"] for source in message.response_metadata["memory_citations"]}

    not_bob = {"$id": {"$ne": "bob"}}
    assert cited(ChatMSA(memory=shared, k=3)) == set(FACTS)
    assert cited(ChatMSA(memory=shared, k=1)) == {"bob"}
    assert cited(ChatMSA(memory=shared, k=3, where=not_bob)) == {"ann", "cat"}
    assert cited(ChatMSA(memory=shared, k=3), k=1) == {"bob"}
    assert cited(ChatMSA(memory=shared, k=3), where=not_bob) == {"ann", "cat"}
    assert cited(ChatMSA(memory=shared, namespace="empty")) == set()


def test_metadata_and_usage_come_once_in_the_last_chunk(model: ChatMSA) -> None:
    chunks = list(model.stream(QUESTION))
    assert len(chunks) > 3
    for chunk in chunks[:-1]:
        assert not chunk.response_metadata
        assert chunk.usage_metadata is None
        assert chunk.content
    assert chunks[-1].chunk_position == "last"
    assert set(chunks[-1].response_metadata) >= {"model_name", "finish_reason", "memory_citations"}
    assert added_up(chunks).response_metadata["model_name"] == str(tiny_model())


async def test_a_stop_string_across_tokens(shared: MemoryModel) -> None:
    model = ChatMSA(memory=shared, max_tokens=16)
    pieces = [str(chunk.content) for chunk in model.stream(QUESTION)][:-1]
    whole = "".join(pieces)
    stop = pieces[4][-2:] + pieces[5][:2]
    expected = whole[: whole.index(stop)].rstrip()
    assert model.invoke(QUESTION, stop=[stop]).content == expected
    assert model.invoke(QUESTION, stop=[stop]).response_metadata["finish_reason"] == "stop"
    assert (await model.ainvoke(QUESTION, stop=[stop])).content == expected
    assert added_up(list(model.stream(QUESTION, stop=[stop]))).content == expected
    assert added_up([chunk async for chunk in model.astream(QUESTION, stop=[stop])]).content == expected
    for own in (
        ChatMSA(memory=shared, max_tokens=16, stop=[stop]),
        ChatMSA(memory=shared, stop_sequences=[stop]),
    ):
        assert own.invoke(QUESTION, max_tokens=16).content == expected
        assert own.invoke(QUESTION, max_tokens=16, stop=[]).content == whole.strip()


# threads and loops


def test_a_parallel_batch_equals_a_serial_one(model: ChatMSA) -> None:
    questions = [f"{QUESTION} {number}" for number in range(8)]
    assert [same(m) for m in model.batch(questions)] == [
        same(model.invoke(question)) for question in questions
    ]


async def test_concurrent_streams_do_not_mix(model: ChatMSA) -> None:
    async def answer(question: str) -> tuple[Any, ...]:
        return same(added_up([chunk async for chunk in model.astream(question)]))

    questions = [f"{number}? {QUESTION}" for number in range(6)]
    answers = await asyncio.gather(*map(answer, questions))
    assert answers == [same(await model.ainvoke(question)) for question in questions]
    assert len(set(map(repr, answers))) > 1


async def test_the_callers_modes_are_its_own(model: ChatMSA) -> None:
    def modes() -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert {modes() for _ in model.stream(QUESTION)} == {(True, False)}
    assert {modes() async for _ in model.astream(QUESTION)} == {(True, False)}
    with torch.no_grad():
        assert {modes() for _ in model.stream(QUESTION)} == {(False, False)}


async def test_the_loop_ticks_during_answers(shared: MemoryModel) -> None:
    model, ticks = ChatMSA(memory=shared, max_tokens=60), 0

    async def heartbeat() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    heart = asyncio.create_task(heartbeat())
    seen = {ticks async for _ in model.astream(QUESTION)}
    before = ticks
    await model.ainvoke(QUESTION)
    heart.cancel()
    assert len(seen) > 3, "a step brings one token, or a few that were guessed"
    assert ticks > before + 10


def test_closing_a_stream_stops_the_model(shared: MemoryModel, decoded: list[int]) -> None:
    stream = ChatMSA(memory=shared, max_tokens=4000).stream(QUESTION)
    next(stream)
    stream.close()
    shared.query(QUESTION, max_new_tokens=5)
    stopped_at = decoded.count(4000)
    shared.query(QUESTION, max_new_tokens=30)
    assert decoded.count(4000) == stopped_at < 4000


async def test_leaving_or_cancelling_async_calls_stops_the_model(
    shared: MemoryModel, decoded: list[int]
) -> None:
    model = ChatMSA(memory=shared)
    stream = model.astream(QUESTION, max_tokens=4001)
    await anext(stream)
    await stream.aclose()
    task = asyncio.create_task(model.ainvoke(QUESTION, max_tokens=4002))
    while 4002 not in decoded:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await shared.aquery(QUESTION, max_new_tokens=5)
    stopped_at = decoded.count(4001), decoded.count(4002)
    await shared.aquery(QUESTION, max_new_tokens=30)
    assert (decoded.count(4001), decoded.count(4002)) == stopped_at


# sessions: a message is stored once, however often it is sent


def stored(memory: MemoryModel, session: str = "ann") -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in memory.session(session).messages()]


def conversation_model(memory: MemoryModel) -> ChatMSA:
    return ChatMSA(memory=memory, session_id="ann", max_tokens=6)


def test_a_conversation_is_stored_once_turn_by_turn(memory: MemoryModel) -> None:
    model = conversation_model(memory)
    history: list[BaseMessage] = [SystemMessage("Be brief.")]
    expected = []
    for text in ("Hello, I am Ann.", "Hello, I am Ann.", "Goodbye."):
        history.append(HumanMessage(text))
        history.append(model.invoke(history))
        expected += [("user", text), ("assistant", history[-1].content)]
        assert stored(memory) == expected
    assert memory.count() == len(FACTS) + 6, "every message is a document of the memory"


async def test_every_way_of_asking_stores_the_same(memory: MemoryModel) -> None:
    model = conversation_model(memory)
    for number, session in enumerate(("invoke", "ainvoke", "stream", "astream")):
        messages = [HumanMessage("Hello, I am Ann.", id=f"m{number}")]
        for _ in range(2):  # the second one is a retry
            match session:
                case "invoke":
                    model.invoke(messages, session_id=session)
                case "ainvoke":
                    await model.ainvoke(messages, session_id=session)
                case "stream":
                    list(model.stream(messages, session_id=session))
                case "astream":
                    [chunk async for chunk in model.astream(messages, session_id=session)]
        assert [role for role, _ in stored(memory, session)] == ["user", "assistant"]


def test_retries_and_batches_write_nothing_twice(memory: MemoryModel) -> None:
    model = conversation_model(memory)
    messages = [HumanMessage("Hello, I am Ann.")]
    model.batch([messages] * 6)
    model.invoke(messages, temperature=1.5)
    assert [role for role, _ in stored(memory)] == ["user", "assistant"]


def test_a_history_written_anew_without_ids_is_known(memory: MemoryModel) -> None:
    model = conversation_model(memory)
    first = model.invoke([HumanMessage("Hello.")])
    rebuilt = [("user", "Hello."), ("assistant", first.text), ("user", "I moved to Rome.")]
    second = model.invoke(rebuilt)
    trimmed = [*rebuilt[2:], ("assistant", second.text), ("user", "Thank you.")]
    third = model.invoke(trimmed)
    assert stored(memory) == [
        *[("user", "Hello."), ("assistant", first.text), ("user", "I moved to Rome.")],
        *[("assistant", second.text), ("user", "Thank you."), ("assistant", third.text)],
    ]


def test_a_message_with_an_id_of_its_own_is_a_message_of_its_own(memory: MemoryModel) -> None:
    model = conversation_model(memory)
    for number in range(2):
        model.invoke([HumanMessage("Yes.", id=f"id-{number}")])
    assert [role for role, _ in stored(memory)] == ["user", "assistant"] * 2


def test_tools_and_names_in_a_session(memory: MemoryModel) -> None:
    call = {"name": "weather", "args": {"city": "Oslo"}, "id": "1"}
    messages = [
        HumanMessage("Is it raining?", name="Ann"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("It rains.", tool_call_id="1", name="weather"),
        ChatMessage("moderator says so", role="moderator"),
    ]
    answer = conversation_model(memory).invoke(messages)
    found = [(m.role, m.name, m.content) for m in memory.session("ann").messages()]
    assert found == [
        ("user", "Ann", "Is it raining?"),
        ("tool", "weather", "It rains."),
        ("user", "moderator", "moderator says so"),
        ("assistant", None, answer.text),
    ]


def test_what_is_in_the_prompt_is_not_recalled_beside_it(memory: MemoryModel) -> None:
    model = ChatMSA(memory=memory, session_id="ann", max_tokens=4, k=100)
    history: list[BaseMessage] = []
    for text in ("My violin is broken.", QUESTION):
        history += [HumanMessage(text)]
        answer = model.invoke(history)
        history += [answer]
        cited = {source["text"] for source in answer.response_metadata["memory_citations"]}
        assert cited == set(FACTS.values())
    fresh = model.invoke([HumanMessage(QUESTION, id="another day")])
    cited = {source["text"] for source in fresh.response_metadata["memory_citations"]}
    assert "My violin is broken." in cited, "another conversation recalls it"


def test_nothing_is_stored_without_a_session_or_an_answer(memory: MemoryModel) -> None:
    ChatMSA(memory=memory, max_tokens=4).invoke(QUESTION)
    stream = conversation_model(memory).stream(QUESTION)
    next(stream)
    stream.close()
    with pytest.raises(ConfigError, match="temperature"):
        conversation_model(memory).invoke(QUESTION, temperature=-1)
    assert memory.count() == len(FACTS)
    assert memory.sessions() == []


def test_memory_across_restarts(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from msa_memory.integrations.langchain import ChatMSA\n"
        "from msa_memory.testing import tiny_model\n"
        "model = ChatMSA(model=str(tiny_model()), memory=sys.argv[1], session_id='ann', max_tokens=4)\n"
        "model.invoke('Bob repairs violins in Oslo.')\n"
        "model.close()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "memory")], check=True)
    model = ChatMSA(memory=tmp_path / "memory", max_tokens=4)
    cited = model.invoke(QUESTION).response_metadata["memory_citations"]
    assert cited[0]["text"] == "Bob repairs violins in Oslo."
    model.close()


# citations


def answered(text: str, *, cited: bool) -> Answer:
    source = Source(
        id="bob",
        passage=7,
        start=0,
        end=4,
        text="Bob",
        score=0.5,
        timestamp=datetime(2026, 1, 2, tzinfo=UTC),
        metadata={"title": "Letters"},
        cited=cited,
    )
    return Answer(text=text, found=True, sources=(source,), usage=Usage(prompt_tokens=3, completion_tokens=2))


def test_standard_citations_of_what_the_answer_took_up(shared: MemoryModel) -> None:
    call = Call(shared, [HumanMessage(QUESTION)], {}, include_citations=True)
    message = call.result(answered("Bob does.", cited=True)).generations[0].message
    annotation = {
        "type": "citation",
        "title": "Letters",
        "cited_text": "Bob",
        "start_index": 0,
        "end_index": 9,
        "extras": {"memory_id": "bob", "passage": 7, "score": 0.5},
    }
    assert message.content == [{"type": "text", "text": "Bob does.", "annotations": [annotation]}]
    assert message.content_blocks[0]["annotations"] == [annotation]
    assert message.text == "Bob does."

    chunks = [call.chunk("Bob "), call.chunk("does."), call.last_chunk(answered("Bob does.", cited=True))]
    total = added_up([chunk.message for chunk in chunks if chunk])
    assert total.content == [{"type": "text", "text": "Bob does.", "index": 0, "annotations": [annotation]}]

    uncited = call.result(answered("Bob does.", cited=False)).generations[0].message
    assert uncited.content == [{"type": "text", "text": "Bob does."}]


def test_citations_end_to_end(shared: MemoryModel) -> None:
    model = ChatMSA(memory=shared, include_citations=True, max_tokens=6)
    for message in (model.invoke(QUESTION), added_up(list(model.stream(QUESTION)))):
        [block] = message.content
        assert block["type"] == "text"
        assert block["text"] == message.text == ChatMSA(memory=shared, max_tokens=6).invoke(QUESTION).content


# construction, tracing, counting


def test_construction_opens_and_loads_nothing(tmp_path: Path) -> None:
    model = ChatMSA(model="no-such-model", memory=tmp_path / "memory", session_id="ann")
    assert not (tmp_path / "memory").exists()
    with pytest.raises(ModelNotFoundError):
        model.invoke(QUESTION)
    model.close()


def test_a_given_memory_stays_open(tmp_path: Path) -> None:
    with open_memory(tmp_path / "memory") as memory:
        model = ChatMSA(memory=memory, max_tokens=4)
        model.invoke(QUESTION)
        model.close()
        assert memory.count() == 0


def test_parameters(shared: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSA_MEMORY_MODEL", "from-the-environment")
    assert ChatMSA().model_name == "from-the-environment"
    assert ChatMSA(model="a").model_name == ChatMSA(model_name="a").model_name == "a"
    model = ChatMSA(memory=shared, max_tokens=9, temperature=0.5, stop=["x"])
    assert model.invoke(QUESTION).response_metadata["model_name"] == str(tiny_model())
    params = model._get_ls_params()
    assert {**params, "ls_provider": None} == {
        "ls_provider": None,
        "ls_model_name": "from-the-environment",
        "ls_model_type": "chat",
        "ls_temperature": 0.5,
        "ls_max_tokens": 9,
        "ls_stop": ["x"],
    }
    assert model._get_ls_params(model="other", stop=["y"])["ls_model_name"] == "other"
    assert model.profile is not None
    assert model.profile["tool_calling"]
    assert model.profile["structured_output"]
    assert "MemoryModel" not in repr(model) + repr(model.asdict())
    greedy = ChatMSA(memory=shared, max_tokens=9)
    assert greedy.model_copy().invoke(QUESTION).content == greedy.invoke(QUESTION).content


def test_tokens_are_the_models_own(model: ChatMSA, shared: MemoryModel) -> None:
    text = FACTS["bob"]
    assert model.get_num_tokens(text) == len(model.get_token_ids(text)) == shared.get("bob").tokens
    messages = [SystemMessage("Be brief."), HumanMessage(text)]
    plain = ChatMSA(model=str(tiny_model()), max_tokens=1)
    assert (
        plain.get_num_tokens_from_messages(messages) == plain.invoke(messages).usage_metadata["input_tokens"]
    )
    with_tool = plain.get_num_tokens_from_messages(
        messages, tools=[{"title": "t", "type": "object", "properties": {}}]
    )
    assert with_tool > plain.get_num_tokens_from_messages(messages)
    plain.close()


# what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"session_id": "ann"}, ConfigError, "session_id is given, but no memory"),
        ({"memory": 3}, ConfigError, "memory is 3; expected a MemoryModel"),
    ],
)
def test_unusable_settings_are_refused_at_once(
    options: dict[str, Any], error: type[MSAError], message: str
) -> None:
    with pytest.raises(error, match=message):
        ChatMSA(**options)


def test_a_model_beside_an_open_memory_is_refused(shared: MemoryModel) -> None:
    with pytest.raises(ConfigError, match="already open"):
        ChatMSA(memory=shared, model="other")
    with pytest.raises(ConfigError, match="already open"):
        ChatMSA(memory=shared).invoke(QUESTION, model="other")


def test_calls_that_make_no_sense_are_refused(model: ChatMSA) -> None:
    with pytest.raises(ConfigError, match=r"unknown options \['max_token'\]"):
        model.invoke(QUESTION, max_token=3)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(InvalidDocumentError, match="block of type 'image_url'; this model reads text only"):
        model.invoke([HumanMessage([{"type": "text", "text": "What is this?"}, image])])
    with pytest.raises(InvalidDocumentError, match="says nothing"):
        model.invoke([HumanMessage("")])


def test_messages_become_text() -> None:
    call = {"name": "add", "args": {"a": 1, "text": "größer"}, "id": "1"}
    blocks = [
        {"type": "text", "text": "Well: "},
        {"type": "tool_use", "id": "1", "name": "add", "input": {}},
        "so.",
    ]
    cases = {
        ("user", "Hello", "Ann"): HumanMessage("Hello", name="Ann"),
        ("system", "Rules", None): ChatMessage("Rules", role="system"),
        ("user", "Noted", "critic"): ChatMessage("Noted", role="critic"),
        ("assistant", 'Well: so.\n{"name": "add", "arguments": {"a": 1, "text": "größer"}}', None): AIMessage(
            blocks, tool_calls=[call]
        ),
        ("tool", "3", "add"): ToolMessage("3", tool_call_id="1", name="add"),
        ("assistant", "part", None): AIMessageChunk("part"),
    }
    for (role, content, name), message in cases.items():
        read = said(message)
        assert (read.role, read.content, read.name) == (role, content, name)


@pytest.mark.parametrize(
    ("module", "blocked", "name", "extra"),
    [
        ("langchain", "langchain_core", "ChatMSA", "langchain"),
        ("langchain", "langchain_core", "MSARetriever", "langchain"),
        ("langchain", "langchain", "MSAMemoryMiddleware", "agents"),
        ("langgraph", "langgraph", "MSAStore", "langgraph"),
    ],
)
def test_a_missing_package_is_named_with_the_command(
    module: str, blocked: str, name: str, extra: str
) -> None:
    code = (
        "import sys\n"
        f"sys.modules[{blocked!r}] = None\n"
        "from msa_memory.errors import MissingExtraError\n"
        f"import msa_memory.integrations.{module} as adapters\n"
        f"assert {name!r} in dir(adapters)\n"
        "try:\n"
        f"    adapters.{name}\n"
        "except MissingExtraError as error:\n"
        "    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"{name} needs {blocked}" in ran.stdout
    assert f"pip install 'msa-memory[{extra}]'" in ran.stdout
