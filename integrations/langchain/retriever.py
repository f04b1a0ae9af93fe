"""``MSARetriever``: the memory's own routers as a LangChain retriever."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

from msa_memory.integrations.opening import MemoryHandle
from msa_memory.types import Source

__all__ = ["MSARetriever"]


class MSARetriever(BaseRetriever):
    """The ``k`` documents that the routers rank highest, best first; all of them if there are fewer.

    ``k`` and ``where`` may be given per call too: ``retriever.invoke("violins", k=2)``. A document's
    content is its best passage; its metadata is a copy of the memory's with ``score``, ``passage``,
    ``start``, ``end`` and ``timestamp`` (ISO 8601) added.
    """

    memory: Any = Field(exclude=True, repr=False)
    """A ``MemoryModel``, or the folder of one, opened at first use."""
    namespace: str | None = None
    k: int = 4
    where: dict[str, Any] | None = None
    """Only documents that match this filter are visible to the routers."""
    score_threshold: float | None = None
    """Router score (-1..1) below which a document is left out; there may then be fewer than ``k``."""

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        self._handle  # noqa: B018 - an unusable memory is refused here, not at the first call

    @cached_property
    def _handle(self) -> MemoryHandle:
        return MemoryHandle(self.memory, namespace=self.namespace)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        where: dict[str, Any] | None = None,
    ) -> list[Document]:
        k, where = self._asked(k, where)
        return self._documents(self._handle.get().search(query, k=k, where=where))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        where: dict[str, Any] | None = None,
    ) -> list[Document]:
        k, where = self._asked(k, where)
        return self._documents(await (await self._handle.aget()).asearch(query, k=k, where=where))

    def _asked(self, k: int | None, where: dict[str, Any] | None) -> tuple[int, dict[str, Any] | None]:
        return self.k if k is None else k, self.where if where is None else where

    def _documents(self, sources: list[Source]) -> list[Document]:
        lowest = -1.0 if self.score_threshold is None else self.score_threshold
        return [_document(source) for source in sources if source.score >= lowest]


def _document(source: Source) -> Document:
    found = {
        "score": source.score,
        "passage": source.passage,
        "start": source.start,
        "end": source.end,
        "timestamp": source.timestamp.isoformat(),
    }
    return Document(id=source.id, page_content=source.text, metadata={**source.metadata, **found})
