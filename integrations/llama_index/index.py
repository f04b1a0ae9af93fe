"""``MSAIndex``: putting LlamaIndex documents and nodes into a memory, and taking them out again.

Adding a node whose id is there replaces it; adding it unchanged encodes nothing.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from llama_index.core.bridge.pydantic import ConfigDict, Field
from llama_index.core.llms.llm import LLM
from llama_index.core.schema import BaseNode, TransformComponent

from msa_memory.integrations.llama_index.nodes import REF_DOC_ID, from_document, ref_doc_id, to_item
from msa_memory.integrations.llama_index.query_engine import MSAQueryEngine
from msa_memory.integrations.llama_index.retriever import MSARetriever
from msa_memory.memory import MemoryModel
from msa_memory.types import Document as MemoryDocument
from msa_memory.types import ForgetReceipt

__all__ = ["MSAIndex", "MSAMemoryWriter", "stable_node_id"]

IDS_PER_FILTER = 1000
MOST_PER_PAGE = 1000


class MSAIndex:
    """A memory seen as a LlamaIndex index; it holds nothing of its own, so any number may share a memory."""

    def __init__(self, memory: MemoryModel) -> None:
        self.memory = memory

    @classmethod
    def from_documents(
        cls, documents: Sequence[BaseNode], memory: MemoryModel, *, show_progress: bool = False
    ) -> Self:
        """The index of a memory that holds these documents too; see ``refresh_ref_docs``."""
        index = cls(memory)
        index.refresh_ref_docs(documents, show_progress=show_progress)
        return index

    # adding

    def upsert(self, nodes: Sequence[BaseNode], *, show_progress: bool = False) -> list[MemoryDocument]:
        """Add nodes or documents; those whose id is there are replaced, unchanged ones are not encoded again.

        Raises:
            InvalidDocumentError: a node without text, or with metadata that is not JSON; nothing was added.
        """
        return self.memory.add_many(_items(nodes), on_conflict="replace", progress=show_progress)

    async def aupsert(
        self, nodes: Sequence[BaseNode], *, show_progress: bool = False
    ) -> list[MemoryDocument]:
        """Async twin of ``upsert``."""
        items = await asyncio.to_thread(_items, nodes)
        return await self.memory.aadd_many(items, on_conflict="replace", progress=show_progress)

    def refresh_ref_docs(
        self, nodes: Sequence[BaseNode], *, show_progress: bool = False
    ) -> list[MemoryDocument]:
        """``upsert``, then forget older nodes of the same ref docs: ``nodes`` are all there is of each.

        A stop between the two leaves the older nodes beside the new ones; calling it again removes them.
        """
        written = self.upsert(nodes, show_progress=show_progress)
        for where in _older(self.memory, nodes):
            self.memory.forget(where=where)
        return written

    async def arefresh_ref_docs(
        self, nodes: Sequence[BaseNode], *, show_progress: bool = False
    ) -> list[MemoryDocument]:
        """Async twin of ``refresh_ref_docs``."""
        written = await self.aupsert(nodes, show_progress=show_progress)
        for where in await asyncio.to_thread(_older, self.memory, nodes):
            await self.memory.aforget(where=where)
        return written

    # removing

    def delete_ref_doc(self, ref_doc_id: str) -> ForgetReceipt:
        """Forget a document and every node cut from it; the receipt lists them, none if there were none."""
        return self.memory.forget(where=_of([ref_doc_id]))

    async def adelete_ref_doc(self, ref_doc_id: str) -> ForgetReceipt:
        """Async twin of ``delete_ref_doc``."""
        return await self.memory.aforget(where=_of([ref_doc_id]))

    def delete_nodes(self, node_ids: Sequence[str]) -> ForgetReceipt:
        """Forget nodes by their ids. NotFoundError for an unknown one; nothing was forgotten then."""
        return self.memory.forget(node_ids)

    async def adelete_nodes(self, node_ids: Sequence[str]) -> ForgetReceipt:
        """Async twin of ``delete_nodes``."""
        return await self.memory.aforget(node_ids)

    # reading

    def get_nodes(self, node_ids: Sequence[str]) -> list[BaseNode]:
        """Nodes as they were added (without embeddings). NotFoundError for an unknown id."""
        return [from_document(self.memory.get(id)) for id in node_ids]

    async def aget_nodes(self, node_ids: Sequence[str]) -> list[BaseNode]:
        """Async twin of ``get_nodes``."""
        return [from_document(await self.memory.aget(id)) for id in node_ids]

    def as_retriever(self, **options: Any) -> MSARetriever:
        """A retriever over this memory; takes ``MSARetriever``'s options."""
        return MSARetriever(self.memory, **options)

    def as_query_engine(self, llm: LLM | None = None, **options: Any) -> MSAQueryEngine:
        """A query engine over this memory; takes ``MSAQueryEngine``'s options."""
        return MSAQueryEngine(self.memory, llm=llm, **options)


class MSAMemoryWriter(TransformComponent):
    """The last stage of an ``IngestionPipeline``: writes the nodes into a memory and passes them on.

    A run brings all nodes of each of its documents, so older nodes of the same document are forgotten; with
    ``replace_ref_docs=False`` they stay. Splitters number their nodes at random unless told otherwise: give
    them ``id_func=stable_node_id``, so that what did not change is not encoded again. Runs in the process
    that opened the memory: not with ``num_workers``.
    """

    memory: MemoryModel = Field(exclude=True, repr=False)
    replace_ref_docs: bool = True
    show_progress: bool = False

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    def __init__(
        self, memory: MemoryModel, *, replace_ref_docs: bool = True, show_progress: bool = False
    ) -> None:
        given = {"memory": memory, "replace_ref_docs": replace_ref_docs, "show_progress": show_progress}
        super().__init__(**given)

    @classmethod
    def class_name(cls) -> str:
        """The name LlamaIndex knows this stage by."""
        return "MSAMemoryWriter"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Never twice the same: a pipeline would take a stage of the same dict from its cache, unwritten."""
        return {**super().to_dict(**kwargs), "run": uuid.uuid4().hex}

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        index = MSAIndex(self.memory)
        write = index.refresh_ref_docs if self.replace_ref_docs else index.upsert
        write(nodes, show_progress=self.show_progress)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        index = MSAIndex(self.memory)
        write = index.arefresh_ref_docs if self.replace_ref_docs else index.aupsert
        await write(nodes, show_progress=self.show_progress)
        return nodes


def stable_node_id(number: int, document: BaseNode) -> str:
    """An id for a splitter's ``id_func``: the document's id and the node's place in it."""
    return f"{document.node_id}#{number}"


def _items(nodes: Sequence[BaseNode]) -> list[Mapping[str, Any]]:
    return [to_item(node) for node in nodes]


def _of(ref_doc_ids: list[str]) -> dict[str, Any]:
    return {"$or": [{"$id": {"$in": ref_doc_ids}}, {REF_DOC_ID: {"$in": ref_doc_ids}}]}


def _older(memory: MemoryModel, nodes: Sequence[BaseNode]) -> list[dict[str, Any]]:
    """Filters that name every node of the same ref docs as ``nodes`` that is not among them."""
    kept = {node.node_id for node in nodes}
    refs = sorted({ref_doc_id(node) for node in nodes})
    stale = [
        document.id
        for some in _in_parts(refs)
        for document in _all(memory, _of(some))
        if document.id not in kept
    ]
    return [{"$id": {"$in": some}} for some in _in_parts(stale)]


def _all(memory: MemoryModel, where: Mapping[str, Any]) -> Iterator[MemoryDocument]:
    cursor = None
    while True:
        page = memory.list(where, limit=MOST_PER_PAGE, cursor=cursor)
        yield from page
        if (cursor := page.next_cursor) is None:
            return


def _in_parts(ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), IDS_PER_FILTER):
        yield ids[start : start + IDS_PER_FILTER]
