"""MSAQueryEngine and MSARetriever: the memory's own answers and those of another model from its context."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.base.llms.types import (
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import Document, IndexNode, QueryBundle, TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.answering import NOTHING_FOUND
from msa_memory.engine.engine import Engine
from msa_memory.errors import ConfigError, InvalidFilterError, MSAError
from msa_memory.integrations.llama_index import MSAIndex, MSAQueryEngine, MSARetriever
from msa_memory.testing import open_memory

FACTS = {
    "bob": ("Bob lives in Oslo and repairs violins.", {"year": 2024, "tags": ["work"]}),
    "ann": ("Ann paints lighthouses in Bergen.", {"year": 2025, "tags": ["work", "art"]}),
    "cat": ("The cat sleeps under the kitchen table.", {"year": 2026}),
}
QUESTION = "Who repairs violins?"


@pytest.fixture
def memory() -> Iterator[MemoryModel]:
    with open_memory(config=MemoryConfig(max_new_tokens=12)) as memory:
        MSAIndex(memory).upsert(
            [Document(text=text, id_=id, metadata=metadata) for id, (text, metadata) in FACTS.items()]
        )
        yield memory


class ScriptedLLM(CustomLLM):
    """Says what it is told to say, word by word, and keeps what it was asked."""

    reply: str = "Bob does [1], in Oslo."
    asked: list[str]

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="scripted")

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        self.asked.append(prompt)
        return CompletionResponse(text=self.reply)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return self._words(prompt)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        self.asked.append(prompt)
        return CompletionResponse(text=self.reply)

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        async def words() -> CompletionResponseAsyncGen:
            for response in self._words(prompt):
                yield response

        return words()

    def _words(self, prompt: str) -> CompletionResponseGen:
        self.asked.append(prompt)
        told = ""
        for word in self.reply.split(" "):
            delta = f" {word}" if told else word
            told += delta
            yield CompletionResponse(text=told, delta=delta)


class Events(BaseEventHandler):
    """Every event, in order."""

    seen: list[BaseEvent]

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.seen.append(event)

    @property
    def names(self) -> list[str]:
        return [event.class_name() for event in self.seen]


@pytest.fixture
def events() -> Iterator[Events]:
    handler, dispatcher = Events(seen=[]), get_dispatcher()
    before = list(dispatcher.event_handlers)
    dispatcher.add_event_handler(handler)
    yield handler
    dispatcher.event_handlers = before


@pytest.fixture
def spans() -> Iterator[SimpleSpanHandler]:
    handler, dispatcher = SimpleSpanHandler(), get_dispatcher()
    before = list(dispatcher.span_handlers)
    dispatcher.add_span_handler(handler)
    yield handler
    dispatcher.span_handlers = before


def without_timings(response: Any) -> tuple[Any, ...]:
    metadata = {key: value for key, value in response.metadata.items() if key != "timings"}
    return str(response.response if isinstance(response, Response) else ""), response.source_nodes, metadata


# the memory's own model


def test_it_answers_as_the_memory_does(memory: MemoryModel) -> None:
    answer = memory.query(QUESTION)
    response = MSAQueryEngine(memory).query(QUESTION)
    assert isinstance(response, Response)
    assert response.response == answer.text
    assert [node.node_id for node in response.source_nodes] == [source.id for source in answer.sources]
    assert [node.score for node in response.source_nodes] == [source.score for source in answer.sources]
    assert [node.text for node in response.source_nodes] == [source.text for source in answer.sources]
    for node in response.source_nodes:
        assert node.metadata == FACTS[node.node_id][1]
        assert node.node.ref_doc_id == node.node_id
    assert response.metadata is not None
    assert response.metadata["found"] is True
    assert response.metadata["finish_reason"] == answer.finish_reason == "length"
    assert response.metadata["usage"] == {
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "total_tokens": answer.usage.total_tokens,
    }
    assert [
        (c["id"], c["passage"], c["start"], c["end"], c["cited"]) for c in response.metadata["citations"]
    ] == [(s.id, s.passage, s.start, s.end, s.cited) for s in answer.sources]
    assert response.metadata["rounds"] == [round.model_dump(mode="json") for round in answer.rounds]


async def test_all_four_ways_say_the_same(memory: MemoryModel) -> None:
    plain, streaming = MSAQueryEngine(memory), MSAQueryEngine(memory, streaming=True)
    whole = plain.query(QUESTION)
    assert without_timings(await plain.aquery(QueryBundle(QUESTION))) == without_timings(whole)
    streamed = streaming.query(QUESTION)
    assert isinstance(streamed, StreamingResponse)
    assert streamed.source_nodes == []
    pieces = list(streamed.response_gen)
    assert len(pieces) > 2
    assert "".join(pieces) == whole.response
    assert without_timings(streamed)[1:] == without_timings(whole)[1:]
    astreamed = await streaming.aquery(QUESTION)
    assert isinstance(astreamed, AsyncStreamingResponse)
    assert "".join([piece async for piece in astreamed.async_response_gen()]) == whole.response
    assert without_timings(astreamed)[1:] == without_timings(whole)[1:]
    assert (await astreamed.get_response()).source_nodes == whole.source_nodes


def test_options_reach_the_model(memory: MemoryModel) -> None:
    engine = MSAQueryEngine(memory, max_new_tokens=3, k=1)
    response = engine.query(QUESTION)
    assert response.metadata["usage"]["completion_tokens"] == 3
    assert len(response.source_nodes) == 1
    stop = memory.query(QUESTION).text[2:4]
    assert (
        MSAQueryEngine(memory, stop=stop).query(QUESTION).response == memory.query(QUESTION, stop=stop).text
    )


def test_nothing_found_is_said(memory: MemoryModel) -> None:
    response = MSAQueryEngine(memory, where={"year": 1999}).query(QUESTION)
    assert response.metadata["found"] is False
    assert "nothing in this memory matches the filter" in response.response
    assert response.source_nodes == []


def only(key: str, value: Any, operator: FilterOperator = FilterOperator.EQ) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=operator)])


@pytest.mark.parametrize(
    ("filters", "where", "seen"),
    [
        (only("year", 2025), None, {"ann"}),
        (only("tags", ["work"], FilterOperator.ANY), None, {"bob", "ann"}),
        (only("year", 2025, FilterOperator.GTE), {"year": {"$lt": 2026}}, {"ann"}),
        (None, {"$id": "cat"}, {"cat"}),
    ],
)
async def test_filters_hold_everywhere(
    memory: MemoryModel, filters: MetadataFilters | None, where: dict[str, Any] | None, seen: set[str]
) -> None:
    options: dict[str, Any] = {"filters": filters, "where": where}
    engine = MSAQueryEngine(memory, **options)
    foreign = MSAQueryEngine(memory, llm=ScriptedLLM(asked=[]), **options)
    retriever = MSARetriever(memory, similarity_top_k=9, **options)
    streamed = MSAQueryEngine(memory, streaming=True, **options).query(QUESTION)
    str(streamed)
    found = [
        engine.query(QUESTION).source_nodes,
        (await engine.aquery(QUESTION)).source_nodes,
        streamed.source_nodes,
        foreign.query(QUESTION).source_nodes,
        (await foreign.aquery(QUESTION)).source_nodes,
        engine.retrieve(QueryBundle(QUESTION)),
        await engine.aretrieve(QueryBundle(QUESTION)),
        retriever.retrieve(QUESTION),
        await retriever.aretrieve(QUESTION),
    ]
    assert [{node.node_id for node in nodes} for nodes in found] == [seen] * len(found)


def test_a_filter_that_cannot_be_applied_fails_at_once(memory: MemoryModel) -> None:
    bad = only("year", "x", FilterOperator.TEXT_MATCH_INSENSITIVE)
    with pytest.raises(InvalidFilterError, match="compares exactly"):
        MSAQueryEngine(memory, filters=bad)
    with pytest.raises(InvalidFilterError, match="compares exactly"):
        MSARetriever(memory, filters=bad)


def test_upserts_and_deletes_show_at_once(memory: MemoryModel) -> None:
    index = MSAIndex(memory)
    engine = index.as_query_engine(k=1)
    index.upsert([Document(text="Eve repairs violins and cellos.", id_="bob")])
    [node] = engine.query("repairs cellos").source_nodes
    assert (node.node_id, node.text) == ("bob", "Eve repairs violins and cellos.")
    index.delete_ref_doc("bob")
    assert "bob" not in [node.node_id for node in index.as_query_engine().query(QUESTION).source_nodes]


# concurrency


async def test_the_loop_ticks_while_it_answers(memory: MemoryModel) -> None:
    ticks = 0

    async def heartbeat() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    heart = asyncio.create_task(heartbeat())
    long = {"max_new_tokens": 120}
    await MSAQueryEngine(memory, **long).aquery(QUESTION)
    after_answer = ticks
    response = await MSAQueryEngine(memory, streaming=True, **long).aquery(QUESTION)
    seen = {ticks async for _ in response.async_response_gen()}
    before = ticks
    await MSARetriever(memory).aretrieve(QUESTION)
    heart.cancel()
    assert after_answer > 50
    assert len(seen) > 3, "a step brings one token, or a few that were guessed"
    assert ticks > before


async def test_concurrent_queries_do_not_mix(memory: MemoryModel) -> None:
    engine = MSAQueryEngine(memory, k=1)
    questions = ["violins", "lighthouses", "kitchen table"] * 8
    alone = {question: without_timings(engine.query(question)) for question in set(questions)}
    together = await asyncio.gather(*(engine.aquery(question) for question in questions))
    assert [without_timings(response) for response in together] == [alone[q] for q in questions]


async def test_two_namespaces_asked_together_do_not_mix(memory: MemoryModel) -> None:
    other = memory.namespace("other")
    other.add("Carl repairs violins in Paris.", id="carl")
    engines = [MSAQueryEngine(memory), MSAQueryEngine(other)] * 6
    found = await asyncio.gather(*(engine.aquery(QUESTION) for engine in engines))
    for engine, response in zip(engines, found, strict=True):
        mine = {"carl"} if engine is engines[1] else set(FACTS)
        assert {node.node_id for node in response.source_nodes} <= mine


def test_a_stream_that_is_left_stops_the_model(memory: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    decode = Engine.decode

    def spy(engine: Engine, generation: Any) -> Iterator[str]:
        for text in decode(engine, generation):
            steps.append(generation.options.max_new_tokens)
            yield text

    monkeypatch.setattr(Engine, "decode", spy)
    response = MSAQueryEngine(memory, streaming=True, max_new_tokens=5000).query(QUESTION)
    next(iter(response.response_gen))
    response.response_gen.close()
    del response
    gc.collect()
    memory.query(QUESTION, max_new_tokens=5)
    stopped_at = steps.count(5000)
    memory.query(QUESTION, max_new_tokens=50)
    assert steps.count(5000) == stopped_at < 5000


# events


def test_events_spans_and_callbacks(memory: MemoryModel, events: Events, spans: SimpleSpanHandler) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    response = MSAQueryEngine(memory, callback_manager=CallbackManager([debug])).query(QUESTION)
    assert events.names == ["QueryStartEvent", "SynthesizeStartEvent", "SynthesizeEndEvent", "QueryEndEvent"]
    assert events.seen[-1].response is response
    names = [span.id_.split("-")[0] for span in spans.completed_spans]
    assert names == ["MSAQueryEngine._query", "MSAQueryEngine.query"]
    [(start, end)] = debug.get_event_pairs(CBEventType.QUERY)
    assert start.payload["query_str"] == QUESTION
    assert end.payload["response"] is response


async def test_events_of_a_stream_end_with_it(memory: MemoryModel, events: Events) -> None:
    response = MSAQueryEngine(memory, streaming=True).query(QUESTION)
    assert events.names == ["QueryStartEvent", "SynthesizeStartEvent", "QueryEndEvent"]
    str(response)
    assert events.names[-1] == "SynthesizeEndEvent"
    assert events.seen[-1].response.source_nodes
    events.seen.clear()
    aresponse = await MSAQueryEngine(memory, streaming=True).aquery(QUESTION)
    assert "SynthesizeEndEvent" not in events.names
    await aresponse.get_response()
    assert events.names[-1] == "SynthesizeEndEvent"


def test_a_failed_query_drops_its_span(memory: MemoryModel, events: Events, spans: SimpleSpanHandler) -> None:
    with pytest.raises(MSAError, match="the limit is 2048"):
        MSAQueryEngine(memory).query("violins " * 3000)
    assert "QueryEndEvent" not in events.names
    assert len(spans.dropped_spans) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_true_token_counts_reach_llama_index(memory: MemoryModel, streaming: bool) -> None:
    counter = TokenCountingHandler()
    engine = MSAQueryEngine(memory, streaming=streaming, callback_manager=CallbackManager([counter]))
    response = engine.query(QUESTION)
    str(response)
    usage = response.metadata["usage"]
    assert counter.prompt_llm_token_count == usage["prompt_tokens"]
    assert counter.completion_llm_token_count == usage["completion_tokens"] == 12


def test_retriever_events(memory: MemoryModel, events: Events) -> None:
    nodes = MSARetriever(memory).retrieve(QUESTION)
    assert events.names == ["RetrievalStartEvent", "RetrievalEndEvent"]
    assert events.seen[-1].nodes == nodes


# another model


def test_another_model_answers_from_the_context(memory: MemoryModel, events: Events) -> None:
    llm = ScriptedLLM(asked=[])
    response = MSAQueryEngine(memory, llm=llm).query(QUESTION)
    context = memory.context(QUESTION)
    assert response.response == "Bob does [1], in Oslo."
    [prompt] = llm.asked
    assert context.text in prompt
    assert f"Query: {QUESTION}" in prompt
    assert [node.node_id for node in response.source_nodes] == [source.id for source in context.sources]
    cited = [citation["id"] for citation in response.metadata["citations"] if citation["cited"]]
    assert cited == [context.sources[0].id] == ["bob"]
    assert response.metadata["found"] is True
    wanted = ["QueryStartEvent", "RetrievalStartEvent", "RetrievalEndEvent", "SynthesizeStartEvent",
              "LLMPredictStartEvent", "LLMCompletionStartEvent", "LLMCompletionEndEvent",
              "LLMPredictEndEvent", "SynthesizeEndEvent", "QueryEndEvent"]  # fmt: skip
    assert [name for name in events.names if name in wanted] == wanted


async def test_another_model_in_all_four_ways(memory: MemoryModel) -> None:
    llm = ScriptedLLM(asked=[], reply="Nobody but [2] and [9].")
    plain = MSAQueryEngine(memory, llm=llm)
    whole = plain.query(QUESTION)
    assert [citation["cited"] for citation in whole.metadata["citations"]] == [False, True, False]
    assert without_timings(await plain.aquery(QUESTION)) == without_timings(whole)
    streaming = MSAQueryEngine(memory, llm=llm, streaming=True)
    streamed = streaming.query(QUESTION)
    assert streamed.source_nodes == whole.source_nodes, "known before the first word"
    assert list(streamed.response_gen) == ["Nobody", " but", " [2]", " and", " [9]."]
    assert streamed.metadata == whole.metadata
    astreamed = await streaming.aquery(QUESTION)
    assert astreamed.source_nodes == whole.source_nodes
    assert "".join([piece async for piece in astreamed.async_response_gen()]) == whole.response
    assert astreamed.metadata == whole.metadata


async def test_another_model_is_not_asked_about_nothing(memory: MemoryModel) -> None:
    llm = ScriptedLLM(asked=[])
    empty = memory.namespace("empty")
    plain, streaming = (MSAQueryEngine(empty, llm=llm, streaming=streaming) for streaming in (False, True))
    said = [
        plain.query(QUESTION).response,
        (await plain.aquery(QUESTION)).response,
        str(streaming.query(QUESTION)),
        (await (await streaming.aquery(QUESTION)).get_response()).response,
    ]
    assert said == [NOTHING_FOUND] * 4
    assert llm.asked == []
    assert plain.query(QUESTION).metadata == {"found": False, "citations": []}


def test_the_context_keeps_to_its_budget(memory: MemoryModel) -> None:
    memory.add("A violin has four strings. " * 200, id="long")
    llm = ScriptedLLM(asked=[])
    MSAQueryEngine(memory, llm=llm, max_context_tokens=40).query(QUESTION)
    MSAQueryEngine(memory, llm=llm, max_context_tokens=400).query(QUESTION)
    assert len(llm.asked[0]) < len(llm.asked[1])


def test_prompts_can_be_seen_and_changed(memory: MemoryModel) -> None:
    llm = ScriptedLLM(asked=[])
    engine = MSAQueryEngine(memory, llm=llm)
    assert list(engine.get_prompts()) == ["text_qa_template"]
    mine = PromptTemplate("C={context_str} Q={query_str}")
    engine.update_prompts({"text_qa_template": mine})
    assert engine.get_prompts() == {"text_qa_template": mine}
    engine.query(QUESTION)
    assert llm.asked[0].startswith("C=[1]")
    given = MSAQueryEngine(memory, llm=llm, text_qa_template=mine)
    assert given.get_prompts() == {"text_qa_template": mine}


def test_the_memorys_own_model_has_no_prompt_to_change(memory: MemoryModel) -> None:
    engine = MSAQueryEngine(memory)
    assert engine.get_prompts() == {}
    with pytest.raises(ConfigError, match="no llm to prompt"):
        engine.update_prompts({"text_qa_template": PromptTemplate("x")})


def test_options_of_the_wrong_model_are_refused(memory: MemoryModel) -> None:
    with pytest.raises(ConfigError, match="k, temperature given"):
        MSAQueryEngine(memory, llm=ScriptedLLM(asked=[]), k=3, temperature=0.0)
    with pytest.raises(ConfigError, match=r"max_context_tokens given.*pass llm"):
        MSAQueryEngine(memory, max_context_tokens=100)
    with pytest.raises(TypeError, match="top"):
        MSAQueryEngine(memory, similarity_top=3)


def test_braces_in_memories_are_only_text(memory: MemoryModel) -> None:
    memory.add("The violins of {query_str} cost {0} {{x}} crowns.", id="braces")
    llm = ScriptedLLM(asked=[])
    MSAQueryEngine(memory, llm=llm).query("violins crowns cost")
    assert "{query_str} cost {0} {{x}} crowns" in llm.asked[0]


# the retriever in LlamaIndex's own hands


@pytest.mark.parametrize("k", [1, 2, 3])
async def test_the_retriever_finds_exactly_k(memory: MemoryModel, k: int) -> None:
    retriever = MSARetriever(memory, similarity_top_k=k)
    nodes = retriever.retrieve(QUESTION)
    assert nodes == await retriever.aretrieve(QUESTION)
    assert [(node.node_id, node.score) for node in nodes] == [
        (source.id, source.score) for source in memory.search(QUESTION, k=k)
    ]
    assert len(nodes) == k
    assert nodes[0].node_id == "bob"
    assert nodes == sorted(nodes, key=lambda node: -(node.score or 0))


def test_index_nodes_lead_to_what_they_stand_for(memory: MemoryModel) -> None:
    MSAIndex(memory).upsert([IndexNode(text="Prices of violins.", id_="pointer", index_id="prices")])
    behind = TextNode(text="A violin costs 100 crowns.", id_="behind")
    retriever = MSARetriever(memory, similarity_top_k=1, object_map={"prices": behind})
    assert [node.node_id for node in retriever.retrieve("Prices of violins")] == ["behind"]


async def test_the_stock_query_engine_serves_over_the_retriever(memory: MemoryModel) -> None:
    llm = ScriptedLLM(asked=[])
    engine = RetrieverQueryEngine(MSARetriever(memory, similarity_top_k=1), get_response_synthesizer(llm=llm))
    response = engine.query(QUESTION)
    assert response.response == (await engine.aquery(QUESTION)).response == llm.reply
    assert [node.node_id for node in response.source_nodes] == ["bob"]
    assert FACTS["bob"][0] in llm.asked[0]
