"""MSAMemoryBlock in LlamaIndex's Memory, the stock chat engines, and agents that use a memory as a tool."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    ImageBlock,
    LLMMetadata,
    MessageRole,
    ToolCallBlock,
)
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.memory import InsertMethod, Memory
from llama_index.core.storage.chat_store.sql import MessageStatus
from llama_index.core.tools import FunctionTool, QueryEngineTool

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.errors import InvalidDocumentError
from msa_memory.integrations.llama_index import MSALLM, MSAMemoryBlock, MSAQueryEngine, MSARetriever
from msa_memory.testing import open_memory

USER, ASSISTANT = MessageRole.USER, MessageRole.ASSISTANT


@pytest.fixture
def memory() -> Iterator[MemoryModel]:
    with open_memory(config=MemoryConfig(max_new_tokens=12)) as memory:
        memory.add("Bob lives in Oslo and repairs violins.", id="bob")
        memory.add("Ann paints lighthouses in Bergen.", id="ann")
        yield memory


def user(text: str) -> ChatMessage:
    return ChatMessage(role=USER, content=text)


def assistant(text: str) -> ChatMessage:
    return ChatMessage(role=ASSISTANT, content=text)


# the block by itself


async def test_it_recalls_what_the_newest_user_message_is_about(memory: MemoryModel) -> None:
    block = MSAMemoryBlock(memory, max_tokens=60)
    said = [user("Hello."), assistant("Yes?"), user("Who repairs violins?"), assistant("Let me see.")]
    content = await block.aget(said)
    assert content == memory.context("Who repairs violins?", max_tokens=60).text
    assert content.startswith("[1] ")
    assert "repairs violins" in content.splitlines()[0]


async def test_without_a_question_nothing_is_recalled(memory: MemoryModel) -> None:
    block = MSAMemoryBlock(memory)
    assert await block.aget([]) == await block.aget(None) == ""
    assert await block.aget([assistant("Hello.")]) == await block.aget([user("  ")]) == ""


async def test_a_question_longer_than_the_memory_reads_is_cut(memory: MemoryModel) -> None:
    text = "filler " * 20_000 + "Who repairs violins?"
    assert (
        await MSAMemoryBlock(memory).aget([user(text)]) == memory.context(text[-2000:], max_tokens=512).text
    )


async def test_messages_become_messages_of_the_session(memory: MemoryModel) -> None:
    block = MSAMemoryBlock(memory)
    call = ChatMessage(role=ASSISTANT, blocks=[ToolCallBlock(tool_name="clock", tool_kwargs={})])
    await block.aput(
        [
            ChatMessage(role="system", content="Be brief."),
            user("My boat is called Minerva."),
            assistant(""),
            call,
            ChatMessage(role="tool", content="noon", additional_kwargs={"name": "clock"}),
        ],
        from_short_term_memory=True,
        session_id="ann",
    )
    stored = memory.session("ann").messages()
    assert [(message.role, message.name, message.content) for message in stored] == [
        ("user", None, "My boat is called Minerva."),
        ("assistant", None, '{"name": "clock", "arguments": {}}'),
        ("tool", "clock", "noon"),
    ]
    assert memory.search("Minerva boat", k=1)[0].metadata["session"] == "ann"
    assert "Minerva" in await block.aget([user("What is my boat called?")])


async def test_messages_without_a_session_go_to_the_default_one(memory: MemoryModel) -> None:
    await MSAMemoryBlock(memory).aput([user("One.")])
    await MSAMemoryBlock(memory, session_id="mine").aput([user("Two.")])
    assert [m.content for m in memory.session("default").messages()] == ["One."]
    assert [m.content for m in memory.session("mine").messages()] == ["Two."]


async def test_recall_may_keep_to_the_session_or_a_filter(memory: MemoryModel) -> None:
    for session in ("a", "b"):
        await MSAMemoryBlock(memory).aput([user(f"Violins cost {session}.")], session_id=session)
    asked = [user("What do violins cost?")]
    everything = await MSAMemoryBlock(memory).aget(asked, session_id="a")
    assert "cost a" in everything
    assert "cost b" in everything
    assert "repairs" in everything
    own = await MSAMemoryBlock(memory, this_session_only=True).aget(asked, session_id="a")
    assert [line.split(") ", 1)[1] for line in own.splitlines()] == ["Violins cost a."]
    filtered = MSAMemoryBlock(memory, where={"$id": "bob"})
    assert len((await filtered.aget(asked, session_id="a")).splitlines()) == 1
    both = MSAMemoryBlock(memory, where={"$id": "bob"}, this_session_only=True)
    assert await both.aget(asked, session_id="a") == ""


async def test_namespaces_keep_apart(memory: MemoryModel) -> None:
    await MSAMemoryBlock(memory.namespace("ann")).aput([user("My boat is called Minerva.")], session_id="s")
    assert await MSAMemoryBlock(memory.namespace("bob")).aget([user("Boat?")], session_id="s") == ""


async def test_reading_writes_nothing(memory: MemoryModel) -> None:
    before = memory.count()
    await MSAMemoryBlock(memory).aget([user("Who repairs violins?")], session_id="new")
    assert memory.count() == before
    assert memory.session("new").messages() == []


async def test_truncating_keeps_the_best_lines(memory: MemoryModel) -> None:
    block = MSAMemoryBlock(memory)
    content = await block.aget([user("Who repairs violins?")])
    best = content.splitlines()[0]
    assert len(content.splitlines()) == 2
    assert await block.atruncate(content, 1) == best
    size = len(block.tokenizer_fn(content))
    for less in range(1, size + 5):
        shorter = await block.atruncate(content, less)
        assert shorter is None or len(block.tokenizer_fn(shorter)) <= size - less
    assert await block.atruncate(content, size) is None


async def test_it_stores_text_alone(memory: MemoryModel) -> None:
    picture = ChatMessage(role=USER, blocks=[ImageBlock(url="https://example.org/a.png")])
    with pytest.raises(InvalidDocumentError, match="ImageBlock"):
        await MSAMemoryBlock(memory).aput([picture])


# in LlamaIndex's Memory


def short_memory(memory: MemoryModel, **options: Any) -> Memory:
    """A Memory that keeps about two messages and hands the rest to the block."""
    return Memory.from_defaults(
        session_id="talk",
        token_limit=400,
        chat_history_token_ratio=0.1,
        token_flush_size=10,
        memory_blocks=[MSAMemoryBlock(memory, max_tokens=200)],
        **options,
    )


FACTS = [
    f"Fact {n}: the {word} of Ada is kept in room {n}."
    for n, word in enumerate("cello boat cat key lamp map".split())
]


async def test_what_leaves_the_short_term_memory_is_recalled(memory: MemoryModel) -> None:
    chat = short_memory(memory)
    for fact in FACTS:
        await chat.aput(user(fact))
        await chat.aput(assistant("Noted."))
    kept = [message.content for message in await chat.aget_all(status=MessageStatus.ACTIVE)]
    assert FACTS[0] not in kept
    stored = [message.content for message in memory.session("talk").messages()]
    assert stored + kept == [text for fact in FACTS for text in (fact, "Noted.")], (
        "nothing lost, nothing twice"
    )
    system, *turns = await chat.aget(input="Where is the cello of Ada?")
    assert system.role == MessageRole.SYSTEM
    assert "<msa_memory>" in system.content
    assert FACTS[0] in system.content
    assert [turn.content for turn in turns] == kept


async def test_recall_goes_where_memory_puts_it(memory: MemoryModel) -> None:
    chat = short_memory(memory, insert_method=InsertMethod.USER)
    await chat.aput(user("Who repairs violins?"))
    [message] = await chat.aget()
    assert message.role == USER
    assert "repairs violins" in message.content.split("Who repairs")[0]


async def test_two_chats_at_once_do_not_mix(memory: MemoryModel) -> None:
    async def talk(name: str) -> str:
        chat = Memory.from_defaults(
            session_id=name,
            token_limit=200,
            chat_history_token_ratio=0.1,
            token_flush_size=5,
            memory_blocks=[MSAMemoryBlock(memory.namespace(name))],
        )
        for n in range(4):
            await chat.aput_messages(
                [user(f"The secret number {n} of {name} is {name}{n}."), assistant("Yes.")]
            )
        return str((await chat.aget(input="What is the secret number?"))[0].content)

    names = ["ann", "bob", "eve"]
    for name, recalled in zip(names, await asyncio.gather(*map(talk, names)), strict=True):
        assert f"{name}0" in recalled
        assert not any(f"of {other}" in recalled for other in names if other != name)


# the stock chat engines


@pytest.fixture
def llm(memory: MemoryModel) -> MSALLM:
    return MSALLM(memory)


def engines(memory: MemoryModel, llm: MSALLM) -> dict[str, Any]:
    retriever = MSARetriever(memory, similarity_top_k=1)
    query_engine = MSAQueryEngine(memory, k=1)
    return {
        "simple": SimpleChatEngine.from_defaults(llm=llm),
        "context": ContextChatEngine.from_defaults(retriever=retriever, llm=llm),
        "condense_plus_context": CondensePlusContextChatEngine.from_defaults(retriever=retriever, llm=llm),
        "condense": CondenseQuestionChatEngine.from_defaults(query_engine=query_engine, llm=llm),
    }


@pytest.mark.parametrize("name", ["simple", "context", "condense_plus_context", "condense"])
async def test_the_stock_chat_engines_serve(memory: MemoryModel, llm: MSALLM, name: str) -> None:
    question = "Who repairs violins?"
    first = engines(memory, llm)[name].chat(question)
    assert first.response
    if name != "simple":
        assert [node.node_id for node in first.source_nodes] == ["bob"]
    assert (await engines(memory, llm)[name].achat(question)).response == first.response
    engine = engines(memory, llm)[name]
    if name != "condense":  # that one streams only from a streaming query engine
        assert "".join(engine.stream_chat(question).response_gen) == first.response
        astreamed = await engines(memory, llm)[name].astream_chat(question)
        assert "".join([text async for text in astreamed.async_response_gen()]) == first.response
    talking = engines(memory, llm)[name]
    talking.chat(question)
    talking.chat("And who paints?")
    assert [message.role for message in talking.chat_history] == [USER, ASSISTANT] * 2
    talking.reset()
    assert talking.chat_history == []


async def test_a_chat_engine_with_the_memory_block(memory: MemoryModel) -> None:
    llm = MSALLM(memory, recall=False, max_tokens=4)
    engine = SimpleChatEngine.from_defaults(llm=llm, memory=short_memory(memory))
    for fact in FACTS:
        await engine.achat(fact)
    assert FACTS[0] in [message.content for message in memory.session("talk").messages()]


# agents of another model


class ScriptedAgentLLM(FunctionCallingLLM):
    """Calls the tools it is told to call, then says what it is told to say."""

    script: list[Any]
    seen: list[list[ChatMessage]]

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="scripted", is_chat_model=True, is_function_calling_model=True)

    def _next(self, messages: Any) -> ChatResponse:
        self.seen.append(list(messages))
        step = self.script.pop(0)
        if isinstance(step, str):
            return ChatResponse(message=assistant(step), delta=step)
        call = ToolCallBlock(tool_call_id=f"c{len(self.seen)}", tool_name=step[0], tool_kwargs=step[1])
        return ChatResponse(message=ChatMessage(role=ASSISTANT, blocks=[call]))

    def chat(self, messages: Any, **kwargs: Any) -> ChatResponse:
        return self._next(messages)

    async def achat(self, messages: Any, **kwargs: Any) -> ChatResponse:
        return self._next(messages)

    def stream_chat(self, messages: Any, **kwargs: Any) -> ChatResponseGen:
        yield self._next(messages)

    async def astream_chat(self, messages: Any, **kwargs: Any) -> ChatResponseAsyncGen:
        async def one() -> ChatResponseAsyncGen:
            yield self._next(messages)

        return one()

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        raise AssertionError("agents chat")

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        raise AssertionError("agents chat")

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        raise AssertionError("agents chat")

    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        raise AssertionError("agents chat")

    def _prepare_chat_with_tools(
        self, tools: Any, user_msg: Any = None, chat_history: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {"messages": [*(chat_history or []), *([user_msg] if user_msg else [])]}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        return [
            ToolSelection(
                tool_id=block.tool_call_id, tool_name=block.tool_name, tool_kwargs=block.tool_kwargs
            )
            for block in response.message.blocks
            if isinstance(block, ToolCallBlock)
        ]


def memory_tool(memory: MemoryModel) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(
        MSAQueryEngine(memory, k=1), name="memory", description="What is known."
    )


async def results(handler: Any) -> list[ToolCallResult]:
    return [event async for event in handler.stream_events() if isinstance(event, ToolCallResult)]


@pytest.mark.parametrize("kind", ["agent", "workflow"])
async def test_an_agent_of_another_model_uses_the_memory(memory: MemoryModel, kind: str) -> None:
    llm = ScriptedAgentLLM(script=[("memory", {"input": "Who repairs violins?"}), "It is Bob."], seen=[])
    agent: Any = FunctionAgent(tools=[memory_tool(memory)], llm=llm)
    if kind == "workflow":
        agent = AgentWorkflow(agents=[agent])
    handler = agent.run(user_msg="Who repairs violins, by the way?")
    [result] = await results(handler)
    assert str(await handler) == "It is Bob."
    answer = memory.query("Who repairs violins?", k=1)
    assert result.tool_output.content == answer.text
    assert [node.node_id for node in result.tool_output.raw_output.source_nodes] == ["bob"]
    assert llm.seen[-1][-1].content == answer.text, "the agent read the answer"


async def test_an_agent_remembers_through_the_block(memory: MemoryModel) -> None:
    llm = ScriptedAgentLLM(script=["Noted."] * len(FACTS) + ["In room 0."], seen=[])
    agent, chat = FunctionAgent(llm=llm), short_memory(memory)
    for fact in FACTS:
        await agent.run(user_msg=fact, memory=chat)
    await agent.run(user_msg="Where is the cello of Ada?", memory=chat)
    read = "\n".join(message.content or "" for message in llm.seen[-1])
    assert FACTS[0] in read.split("<msa_memory>")[1].split("</msa_memory>")[0]


# agents on the memory's own model


async def test_a_function_agent_on_the_memorys_model(memory: MemoryModel) -> None:
    """A tiny random model decides little; the first call is forced, the rest has to hold together."""
    asked: list[str] = []

    def notes(topic: str) -> str:
        """Looks a topic up."""
        asked.append(topic)
        return "violins"

    agent = FunctionAgent(
        tools=[FunctionTool.from_defaults(notes)],
        llm=MSALLM(memory, max_tokens=60),
        initial_tool_choice="notes",
        timeout=60,
    )
    handler = agent.run(user_msg="What do you know?", max_iterations=8, early_stopping_method="generate")
    found = await results(handler)
    await handler
    assert asked
    assert [result.tool_output.content for result in found] == ["violins"] * len(found)
    assert [result.tool_kwargs["topic"] for result in found] == asked


class ReActScript(MSALLM):
    """MSALLM whose words come from a script; everything around them is its own."""

    script: list[str]

    async def astream_chat(self, messages: Any, **kwargs: Any) -> ChatResponseAsyncGen:
        *_, last = [response async for response in await super().astream_chat(messages, **kwargs)]
        last.message = assistant(self.script.pop(0))

        async def one() -> ChatResponseAsyncGen:
            yield last

        return one()


async def test_a_react_agent_runs_on_the_memorys_model(memory: MemoryModel) -> None:
    call = json.dumps({"input": "Who repairs violins?"})
    script = [
        f"Thought: I need to use a tool.\nAction: memory\nAction Input: {call}\n",
        "Thought: I can answer without using any more tools.\nAnswer: It is Bob.",
    ]
    agent = ReActAgent(tools=[memory_tool(memory)], llm=ReActScript(memory, script=script, max_tokens=4))
    handler = agent.run(user_msg="Who repairs violins?")
    [result] = await results(handler)
    assert str(await handler) == "It is Bob."
    assert result.tool_output.content == memory.query("Who repairs violins?", k=1).text


async def test_a_react_agent_on_unscripted_words_ends(memory: MemoryModel) -> None:
    agent = ReActAgent(tools=[memory_tool(memory)], llm=MSALLM(memory, max_tokens=8), timeout=60)
    response = await agent.run(user_msg="Who repairs violins?", max_iterations=5)
    assert str(response)
