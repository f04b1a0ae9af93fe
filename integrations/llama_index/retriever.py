"""``MSARetriever``: what a memory's routers find, as LlamaIndex nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.schema import IndexNode, NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters

from msa_memory.integrations.llama_index.filters import combine
from msa_memory.integrations.llama_index.nodes import from_sources
from msa_memory.memory import MemoryModel

__all__ = ["MSARetriever"]


class MSARetriever(BaseRetriever):
    """The ``similarity_top_k`` documents that match best, each once, best first.

    Args:
        similarity_top_k: how many documents; all of them if the memory shows fewer.
        filters: LlamaIndex metadata filters. where: a memory's own filter; both together must match.
        object_map: what the ids of IndexNodes stand for.

    Raises:
        InvalidFilterError: a filter that a memory cannot apply.
    """

    def __init__(
        self,
        memory: MemoryModel,
        *,
        similarity_top_k: int = 5,
        filters: MetadataFilters | None = None,
        where: Mapping[str, Any] | None = None,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(callback_manager, object_map, objects, verbose)
        self._memory = memory
        self.similarity_top_k = similarity_top_k
        self._where = combine(filters, where)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._memory.search(query_bundle.query_str, k=self.similarity_top_k, where=self._where)
        return from_sources(found)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = await self._memory.asearch(query_bundle.query_str, k=self.similarity_top_k, where=self._where)
        return from_sources(found)
