"""Ingestion: upsert, deletion by ref doc, pipelines; nothing encoded twice, nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, Document, NodeRelationship, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore

from msa_memory import MemoryModel
from msa_memory.engine.engine import Engine
from msa_memory.errors import NotFoundError
from msa_memory.integrations.llama_index import MSAIndex, MSAMemoryWriter, stable_node_id
from msa_memory.testing import open_memory

SENTENCES = "The {word} sleeps at noon. Nobody wakes the {word}. At night the {word} walks to Oslo. "


@pytest.fixture
def memory() -> Iterator[MemoryModel]:
    with open_memory() as memory:
        yield memory


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of every passage encoded from here on."""
    texts: list[str] = []
    encode = Engine.encode

    def spy(engine: Engine, number: int, header: str, text: str, **options: Any) -> Any:
        texts.append(text)
        return encode(engine, number, header, text, **options)

    monkeypatch.setattr(Engine, "encode", spy)
    return texts


def documents(count: int, words: str = "cat dog owl") -> list[Document]:
    names = words.split()
    return [
        Document(text=SENTENCES.format(word=names[n % len(names)]) * 3, id_=f"doc-{n}", metadata={"n": n})
        for n in range(count)
    ]


def part(of: Document, number: int, text: str) -> TextNode:
    source = {NodeRelationship.SOURCE: of.as_related_node_info()}
    return TextNode(text=text, id_=f"{of.node_id}#{number}", relationships=source)


def ids(memory: MemoryModel) -> set[str]:
    return {document.id for document in memory.list(limit=10_000)}


def test_upserting_a_thousand_documents_again_encodes_nothing(
    memory: MemoryModel, encoded: list[str]
) -> None:
    many = [Document(text=f"Fact {n} about the owl.", id_=f"d{n}", metadata={"n": n}) for n in range(1000)]
    first = MSAIndex(memory).upsert(many)
    assert len(encoded) == 1000
    again = MSAIndex(memory).upsert([Document.model_validate(one.model_dump()) for one in many])
    assert len(encoded) == 1000
    assert again == first
    assert memory.count() == 1000


def test_only_what_changed_is_encoded(memory: MemoryModel, encoded: list[str]) -> None:
    index = MSAIndex.from_documents(documents(5), memory)
    before = len(encoded)
    changed = documents(5)
    changed[3].set_content("The fox sleeps.")
    index.upsert(changed)
    assert encoded[before:] == ["The fox sleeps."]
    assert memory.get("doc-3").version == 2
    assert [memory.get(f"doc-{n}").version for n in (0, 1, 2, 4)] == [1, 1, 1, 1]


def test_changed_metadata_is_stored(memory: MemoryModel) -> None:
    index = MSAIndex.from_documents(documents(1), memory)
    changed = documents(1)
    changed[0].metadata = {"other": True}
    index.upsert(changed)
    assert index.get_nodes(["doc-0"])[0].metadata == {"other": True}
    assert memory.count({"n": 0}) == 0


def test_delete_ref_doc_takes_the_document_and_its_parts(memory: MemoryModel) -> None:
    index = MSAIndex(memory)
    one, other = documents(2)
    index.upsert([one, part(one, 0, "A cat."), part(one, 1, "A cat again."), part(other, 0, "A dog.")])
    memory.add("Not LlamaIndex's.", id="own")
    receipt = index.delete_ref_doc("doc-0")
    assert set(receipt.ids) == {"doc-0", "doc-0#0", "doc-0#1"}
    assert ids(memory) == {"doc-1#0", "own"}
    assert index.delete_ref_doc("doc-0").ids == ()
    assert index.delete_ref_doc("own").ids == ("own",)
    assert not any("cat" in source.text for source in memory.search("cat", k=10))


def test_delete_nodes_and_unknown_ids(memory: MemoryModel) -> None:
    index = MSAIndex.from_documents(documents(3), memory)
    with pytest.raises(NotFoundError, match="nobody"):
        index.delete_nodes(["doc-0", "nobody"])
    assert memory.count() == 3
    index.delete_nodes(["doc-0", "doc-2"])
    assert ids(memory) == {"doc-1"}
    with pytest.raises(NotFoundError, match="doc-0"):
        index.get_nodes(["doc-0"])


def test_refreshing_forgets_parts_that_are_gone(memory: MemoryModel, encoded: list[str]) -> None:
    index = MSAIndex(memory)
    one, other = documents(2)
    index.upsert([part(one, 0, "Stays."), part(one, 1, "Goes."), part(other, 0, "Untouched.")])
    before = len(encoded)
    index.refresh_ref_docs([part(one, 0, "Stays."), part(one, 2, "Comes.")])
    assert encoded[before:] == ["Comes."]
    assert ids(memory) == {"doc-0#0", "doc-0#2", "doc-1#0"}


def test_a_whole_document_replaces_its_parts_and_back(memory: MemoryModel) -> None:
    index, one = MSAIndex(memory), documents(1)[0]
    index.upsert([part(one, 0, "Half."), part(one, 1, "Other half.")])
    index.refresh_ref_docs([one])
    assert ids(memory) == {"doc-0"}
    index.refresh_ref_docs([part(one, 0, "Half.")])
    assert ids(memory) == {"doc-0#0"}


def test_more_parts_than_one_filter_can_name(memory: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from msa_memory.integrations.llama_index import index as module

    monkeypatch.setattr(module, "IDS_PER_FILTER", 3)
    monkeypatch.setattr(module, "MOST_PER_PAGE", 2)
    index, some = MSAIndex(memory), documents(7)
    index.upsert([part(one, number, f"Old {number}.") for one in some for number in range(3)])
    index.refresh_ref_docs([part(one, 9, "New.") for one in some])
    assert ids(memory) == {f"doc-{n}#9" for n in range(7)}


def test_no_nodes_change_nothing(memory: MemoryModel) -> None:
    index = MSAIndex.from_documents(documents(2), memory)
    assert index.upsert([]) == index.refresh_ref_docs([]) == []
    assert memory.count() == 2


def test_progress(
    memory: MemoryModel, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as far as rich is concerned
    MSAIndex(memory).upsert(documents(3))
    assert capfd.readouterr().err == ""
    MSAIndex(memory).upsert(documents(4), show_progress=True)
    assert "Remembering" in capfd.readouterr().err


def test_namespaces_keep_apart(memory: MemoryModel) -> None:
    MSAIndex.from_documents(documents(2), memory.namespace("ann"))
    bob = MSAIndex.from_documents(documents(2), memory.namespace("bob"))
    bob.delete_ref_doc("doc-0")
    assert ids(memory.namespace("ann")) == {"doc-0", "doc-1"}
    assert ids(memory.namespace("bob")) == {"doc-1"}
    assert memory.count() == 0


async def test_twins_do_the_same(memory: MemoryModel) -> None:
    index = MSAIndex(memory)
    one, other = documents(2)
    await index.aupsert([part(one, 0, "Stays."), part(one, 1, "Goes.")])
    await index.arefresh_ref_docs([part(one, 0, "Stays."), other])
    assert ids(memory) == {"doc-0#0", "doc-1"}
    assert await index.aget_nodes(["doc-1"]) == [other]
    await index.adelete_ref_doc("doc-1")
    await index.adelete_nodes(["doc-0#0"])
    assert memory.count() == 0


class Mirror(RuleBasedStateMachine):
    """The index beside a plain dictionary of what it should hold."""

    REFS = ("a", "b")

    def __init__(self) -> None:
        super().__init__()
        self.memory = open_memory()
        self.index = MSAIndex(self.memory)
        self.held: dict[str, BaseNode] = {}

    nodes = st.lists(
        st.one_of(
            st.builds(
                lambda ref, n, word: part(Document(text="w", id_=ref), n, f"A {word}."),
                st.sampled_from(REFS), st.integers(0, 3), st.sampled_from(["cat", "dog"]),
            ),
            st.builds(lambda ref, word: Document(text=f"The {word}.", id_=ref),
                      st.sampled_from(REFS), st.sampled_from(["cat", "dog"])),
        ),
        max_size=4, unique_by=lambda node: node.node_id,
    )  # fmt: skip

    @rule(nodes=nodes)
    def upsert(self, nodes: list[BaseNode]) -> None:
        self.index.upsert(nodes)
        self.held |= {node.node_id: node for node in nodes}

    @rule(nodes=nodes)
    def refresh(self, nodes: list[BaseNode]) -> None:
        self.index.refresh_ref_docs(nodes)
        refs = {node.ref_doc_id or node.node_id for node in nodes}
        self.held = {
            id: node for id, node in self.held.items() if (node.ref_doc_id or node.node_id) not in refs
        }
        self.held |= {node.node_id: node for node in nodes}

    @rule(ref=st.sampled_from(REFS))
    def delete(self, ref: str) -> None:
        gone = {id for id, node in self.held.items() if (node.ref_doc_id or node.node_id) == ref}
        assert set(self.index.delete_ref_doc(ref).ids) == gone
        self.held = {id: node for id, node in self.held.items() if id not in gone}

    @invariant()
    def holds_what_it_should(self) -> None:
        assert ids(self.memory) == set(self.held)
        assert self.index.get_nodes(list(self.held)) == list(self.held.values())

    def teardown(self) -> None:
        self.memory.close()


TestMirror = Mirror.TestCase
TestMirror.settings = settings(max_examples=10, stateful_step_count=10, deadline=None)


# the last stage of a pipeline


def splitter(**options: Any) -> SentenceSplitter:
    return SentenceSplitter(chunk_size=40, chunk_overlap=0, **options)


def test_a_pipeline_writes_into_the_memory(memory: MemoryModel) -> None:
    pipeline = IngestionPipeline(transformations=[splitter(), MSAMemoryWriter(memory)])
    written = pipeline.run(documents=documents(3))
    assert len(written) > 3
    assert MSAIndex(memory).get_nodes([node.node_id for node in written]) == list(written)
    assert memory.count() == len(written)
    found = MSAIndex(memory).as_retriever(similarity_top_k=1).retrieve("owl")[0]
    assert found.node.ref_doc_id == "doc-2"


def test_a_stage_is_never_taken_from_the_pipelines_cache(memory: MemoryModel) -> None:
    """What was forgotten is written again, though the pipeline has seen these very nodes."""
    pipeline = IngestionPipeline(transformations=[splitter(), MSAMemoryWriter(memory)])
    first = pipeline.run(documents=documents(2))
    MSAIndex(memory).delete_ref_doc("doc-0")
    again = pipeline.run(documents=documents(2))
    assert ids(memory) == {node.node_id for node in again} == {node.node_id for node in first}


def test_stable_ids_make_a_second_run_free(memory: MemoryModel, encoded: list[str]) -> None:
    def run(texts: list[Document]) -> None:
        stages = [splitter(id_func=stable_node_id), MSAMemoryWriter(memory)]
        IngestionPipeline(transformations=stages).run(documents=texts)

    run(documents(4))
    before = len(encoded)
    assert before == memory.count()
    run(documents(4))
    assert len(encoded) == before
    shorter = documents(4)
    shorter[1].set_content("The dog sleeps.")
    run(shorter)
    assert encoded[before:] == ["The dog sleeps."]
    assert {id for id in ids(memory) if id.startswith("doc-1")} == {"doc-1#0"}


def test_random_ids_leave_no_old_nodes(memory: MemoryModel) -> None:
    sizes = []
    for _ in range(2):
        IngestionPipeline(transformations=[splitter(), MSAMemoryWriter(memory)]).run(documents=documents(3))
        sizes.append(memory.count())
    assert sizes[0] == sizes[1]


def test_keeping_old_nodes_is_possible(memory: MemoryModel) -> None:
    for text in ("One.", "Two."):
        writer = MSAMemoryWriter(memory, replace_ref_docs=False)
        IngestionPipeline(transformations=[splitter(), writer]).run(documents=[Document(text=text, id_="d")])
    assert memory.count() == 2


def test_with_a_document_store(memory: MemoryModel, encoded: list[str]) -> None:
    store = SimpleDocumentStore()
    for _ in range(2):
        IngestionPipeline(
            transformations=[splitter(), MSAMemoryWriter(memory)],
            docstore=store,
            docstore_strategy="duplicates_only",
        ).run(documents=documents(2))
    assert len(encoded) == memory.count()


async def test_an_async_pipeline_leaves_the_loop_free(memory: MemoryModel) -> None:
    ticks = 0

    async def heartbeat() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    heart = asyncio.create_task(heartbeat())
    pipeline = IngestionPipeline(transformations=[splitter(), MSAMemoryWriter(memory)])
    nodes = await pipeline.arun(documents=documents(12))
    heart.cancel()
    assert ids(memory) == {node.node_id for node in nodes}
    assert ticks > 100


def test_the_writer_refuses_what_it_does_not_know(memory: MemoryModel) -> None:
    with pytest.raises(TypeError, match="replace_ref_doc"):
        MSAMemoryWriter(memory, replace_ref_doc=True)
    assert "memory" not in MSAMemoryWriter(memory).to_dict()
