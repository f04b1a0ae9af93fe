"""MSARetriever: exactly k, sync and async; scores in a copy of the metadata."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from langchain_core.tools import create_retriever_tool

from msa_memory import MemoryModel
from msa_memory.errors import ConfigError
from msa_memory.integrations.langchain import MSARetriever
from msa_memory.testing import open_memory

QUESTION = "Who repairs violins?"


@pytest.fixture(scope="module")
def memory() -> Iterator[MemoryModel]:
    with open_memory() as memory:
        memory.add(
            "Bob lives in Oslo and repairs violins.", id="bob", metadata={"kind": "man", "score": "high"}
        )
        memory.add("Ann paints lighthouses in Bergen.", id="ann", metadata={"kind": "woman"})
        memory.add("The cat sleeps under the table.", id="cat", metadata={"kind": "cat"})
        memory.add("A violin and a viola. " * 200, id="long", metadata={"kind": "text"})
        yield memory


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
async def test_exactly_k_in_the_constructor_and_in_a_call(memory: MemoryModel, k: int) -> None:
    own, other = MSARetriever(memory=memory, k=k), MSARetriever(memory=memory)
    answers = [
        own.invoke(QUESTION),
        await own.ainvoke(QUESTION),
        other.invoke(QUESTION, k=k),
        await other.ainvoke(QUESTION, k=k),
    ]
    assert len(answers[0]) == min(k, 4)
    assert len({document.id for document in answers[0]}) == min(k, 4), "documents, not passages"
    assert all(answer == answers[0] for answer in answers)


async def test_documents_are_the_memorys_own_best_first(memory: MemoryModel) -> None:
    documents = MSARetriever(memory=memory).invoke(QUESTION)
    hits = memory.search(QUESTION, k=4)
    assert [(d.id, d.page_content, d.metadata["score"]) for d in documents] == [
        (hit.id, hit.text, hit.score) for hit in hits
    ]
    best = documents[0]
    assert best.id == "bob"
    assert best.metadata["kind"] == "man"
    assert datetime.fromisoformat(best.metadata["timestamp"]) == memory.get("bob").timestamp
    text = memory.get(best.id).text
    assert text[best.metadata["start"] : best.metadata["end"]] == best.page_content
    best.metadata["kind"] = "changed"
    assert memory.get("bob").metadata == {"kind": "man", "score": "high"}, "the memory's own stay as they are"


async def test_filters_thresholds_and_namespaces(memory: MemoryModel) -> None:
    where = {"kind": {"$ne": "man"}}
    own, other = MSARetriever(memory=memory, where=where), MSARetriever(memory=memory)
    assert {d.id for d in own.invoke(QUESTION)} == {"ann", "cat", "long"}
    assert {d.id for d in other.invoke(QUESTION, where=where)} == {"ann", "cat", "long"}
    assert {d.id for d in await other.ainvoke(QUESTION, where=where)} == {"ann", "cat", "long"}
    scores = [d.metadata["score"] for d in other.invoke(QUESTION)]
    assert len(MSARetriever(memory=memory, score_threshold=scores[1]).invoke(QUESTION)) == 2
    assert MSARetriever(memory=memory, namespace="empty").invoke(QUESTION) == []


def test_as_a_tool(memory: MemoryModel) -> None:
    found = create_retriever_tool(
        MSARetriever(memory=memory, k=2), "recall", "Recall notes.", response_format="content_and_artifact"
    )
    call: Any = {"name": "recall", "args": {"query": QUESTION}, "id": "1", "type": "tool_call"}
    message = found.invoke(call)
    assert "repairs violins" in message.content
    assert message.artifact[0].id == "bob"


async def test_a_folder_is_opened_at_first_use(tmp_path: Path) -> None:
    with open_memory(tmp_path / "memory") as memory:
        memory.add("Bob repairs violins.", id="bob")
    retriever = MSARetriever(memory=tmp_path / "memory")
    assert [document.id for document in retriever.invoke(QUESTION)] == ["bob"]
    assert "memory" not in retriever.model_dump()
    retriever._handle.close()
    assert [document.id for document in await retriever.ainvoke(QUESTION)] == ["bob"]
    retriever._handle.close()
    MSARetriever(memory=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ConfigError, match="memory is 7; expected a MemoryModel"):
        MSARetriever(memory=7)
