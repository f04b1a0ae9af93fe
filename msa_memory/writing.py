"""The verbs of ``MemoryModel`` that add and change documents, one by one or many at once.

Checks arguments, has the texts encoded on the worker thread and hands whole documents to the store.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

from msa_memory.documents import DocumentInput, check_name, limited, read_expiry, read_item, read_metadata
from msa_memory.engine.layout import document_header
from msa_memory.errors import ConfigError, ConflictError, InvalidDocumentError, NotFoundError
from msa_memory.moving.encoding import Holding, Text, encode_texts
from msa_memory.opened import OpenedMemory
from msa_memory.persistence import NewDocument
from msa_memory.progress import Progress, progress_reporter
from msa_memory.types import Document

__all__ = ["WritingVerbs", "checked_ids"]

OnConflict = Literal["error", "replace", "skip"]
COMMIT_DOCUMENTS = 64


class WritingVerbs(OpenedMemory):
    """What ``MemoryModel`` inherits; of no use on its own."""

    def add(
        self,
        content: str,
        *,
        id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_conflict: OnConflict = "error",
        timestamp: object = None,
        expires_at: object = None,
        ttl: float | timedelta | None = None,
        source: str | None = None,
        trust: str | None = None,
    ) -> Document:
        """Remember a text; it can be asked about when this returns, and survives a crash from then on.

        Args:
            id: unique in the namespace; generated when None.
            metadata: JSON object; ``title`` and ``speaker`` are also read by the model.
            on_conflict: what to do if the id is taken.
            timestamp: when it was said or happened (datetime or ISO 8601, UTC if without zone).
            expires_at: when it stops being visible; ``compact`` then erases it.
            ttl: how long it stays visible instead, in seconds or as a timedelta.
            source, trust: provenance labels to filter by as ``$source`` and ``$trust``.

        Raises:
            InvalidDocumentError: empty or non-string content, or unusable id, metadata or dates.
            ConflictError: the id is taken and ``on_conflict`` is ``"error"``.
            LimitError: larger than the limits in ``MemoryConfig``.
            StorageError: the disk refused; nothing was stored.
        """
        return self._run(self._add_one(_item(locals()), on_conflict))

    async def aadd(
        self,
        content: str,
        *,
        id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_conflict: OnConflict = "error",
        timestamp: object = None,
        expires_at: object = None,
        ttl: float | timedelta | None = None,
        source: str | None = None,
        trust: str | None = None,
    ) -> Document:
        """Async twin of ``add``."""
        return await self._arun(self._add_one(_item(locals()), on_conflict))

    def add_many(
        self,
        items: Iterable[str | Mapping[str, Any]],
        *,
        on_conflict: OnConflict = "error",
        progress: bool | Callable[[int, int], None] | None = None,
    ) -> list[Document]:
        """Remember many texts: strings, or mappings with ``add``'s arguments (``content``, ``id``, ...).

        All items are checked before the first is encoded; then they are committed 64 at a time.

        Args:
            progress: True or False for a bar on the terminal, a function of (done, total), or None for a
                bar when stderr is a terminal.
        """
        return self._run(self._add_checked(items, on_conflict, progress))

    async def aadd_many(
        self,
        items: Iterable[str | Mapping[str, Any]],
        *,
        on_conflict: OnConflict = "error",
        progress: bool | Callable[[int, int], None] | None = None,
    ) -> list[Document]:
        """Async twin of ``add_many``."""
        return await self._arun(self._add_checked(items, on_conflict, progress))

    def update(
        self, id: str, content: str | None = None, *, metadata: Mapping[str, Any] | None = None
    ) -> Document:
        """Change a document: new text replaces all its passages at once, metadata is merged; version + 1.

        Raises:
            NotFoundError: no such document here.
            ConfigError: neither ``content`` nor ``metadata`` given.
            ConflictError: somebody else changed it meanwhile.
        """
        return self._run(self._update(id, content, metadata))

    async def aupdate(
        self, id: str, content: str | None = None, *, metadata: Mapping[str, Any] | None = None
    ) -> Document:
        """Async twin of ``update``."""
        return await self._arun(self._update(id, content, metadata))

    def restore(self, id: str, version: int) -> Document:
        """Bring an earlier version back as the newest: its text, metadata, date and labels, encoded anew.

        Raises:
            NotFoundError: no such document or version here.
            ConflictError: somebody else changed it meanwhile.
        """
        return self._run(self._restore(id, version))

    async def arestore(self, id: str, version: int) -> Document:
        """Async twin of ``restore``."""
        return await self._arun(self._restore(id, version))

    def set_expiry(
        self,
        ids: str | Sequence[str],
        *,
        expires_at: object = None,
        ttl: float | timedelta | None = None,
    ) -> int:
        """Change when documents stop being visible (None: never); how many of them there are.

        Text, version and states stay. Ids without a document, or with one that has expired, are left out.
        """
        self._check_open(write=True)
        until = read_expiry(expires_at, ttl)
        return self._shared.store.set_expiry(self._namespace, checked_ids(ids), until)

    async def aset_expiry(
        self,
        ids: str | Sequence[str],
        *,
        expires_at: object = None,
        ttl: float | timedelta | None = None,
    ) -> int:
        """Async twin of ``set_expiry``."""
        return await asyncio.to_thread(self.set_expiry, ids, expires_at=expires_at, ttl=ttl)

    # inside

    def _add_one(self, item: Mapping[str, Any], on_conflict: OnConflict) -> Generator[None, None, Document]:
        documents = yield from self._add_checked([item], on_conflict, False)
        return documents[0]

    def _add_checked(
        self,
        items: Iterable[str | Mapping[str, Any]],
        on_conflict: OnConflict,
        progress: bool | Callable[[int, int], None] | None,
    ) -> Generator[None, None, list[Document]]:
        self._check_open(write=True)
        if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
            raise ConfigError(
                f"add_many was given one {type(items).__name__}; give a list of items, or use add"
            )
        inputs, named = [], []
        for item in limited(items, self._shared.config):
            inputs.append(read_item(item, self._shared.config))
            if isinstance(item, Mapping) and item.get("id") is not None:
                named.append(inputs[-1].id)
        self._refuse_taken(named, on_conflict)
        documents: list[Document] = []
        with progress_reporter(progress, len(inputs)) as report:
            for start in range(0, len(inputs), COMMIT_DOCUMENTS):
                part = inputs[start : start + COMMIT_DOCUMENTS]
                documents += yield from self._add_batch(part, on_conflict, report, start)
        return documents

    def _refuse_taken(self, ids: Sequence[str], on_conflict: OnConflict) -> None:
        """Refuse ids that callers chose; generated ones are new by making."""
        if on_conflict not in ("error", "replace", "skip"):
            raise ConfigError(f"on_conflict is {on_conflict!r:.60}; expected 'error', 'replace' or 'skip'")
        if on_conflict == "error" and ids:
            twice = {id for id, count in Counter(ids).items() if count > 1}
            if taken := twice | self._shared.store.exists(self._namespace, ids):
                raise ConflictError(
                    f"id {min(taken)!r} is taken in namespace {self._namespace!r} or given twice; use "
                    "update, on_conflict='replace' or 'skip', or another id"
                )

    def _add_batch(
        self, inputs: Sequence[DocumentInput], on_conflict: OnConflict, report: Progress, done: int
    ) -> Generator[None, None, list[Document]]:
        kept = self._unchanged(inputs, on_conflict)
        new = [document for document in inputs if document.id not in kept]
        done += len(inputs) - len(new)
        if kept:
            report(done)
        with Holding(self._shared.store) as holding:
            fresh = yield from self._encode_all(new, holding, lambda encoded: report(done + encoded))
            stored = {doc.id: doc for doc in self._shared.store.add(fresh, on_conflict=on_conflict)}
        return [kept.get(document.id) or stored[document.id] for document in inputs]

    def _unchanged(self, inputs: Sequence[DocumentInput], on_conflict: OnConflict) -> dict[str, Document]:
        """Documents that need no encoding: to be skipped, or replaced by what they already are."""
        if on_conflict == "error":
            return {}
        by_id = {document.id: document for document in inputs}
        taken = self._taken(by_id)
        return {id: old for id, old in taken.items() if on_conflict == "skip" or _same(old, by_id[id])}

    def _taken(self, ids: Iterable[str]) -> dict[str, Document]:
        """The documents that have these ids."""
        found = {}
        for id in self._shared.store.exists(self._namespace, ids):
            with suppress(NotFoundError):  # forgotten or expired meanwhile
                found[id] = self._shared.store.get(self._namespace, id)
        return found

    def _encode(self, document: DocumentInput, holding: Holding) -> Generator[None, None, NewDocument]:
        [encoded] = yield from self._encode_all([document], holding)
        return encoded

    def _encode_all(
        self,
        documents: Sequence[DocumentInput],
        holding: Holding,
        report: Callable[[int], None] = lambda done: None,
    ) -> Generator[None, None, list[NewDocument]]:
        encoded = yield from encode_texts(
            self._engine(),
            [Text(one.text, _header(one), f"content {one.text[:40]!a}") for one in documents],
            passage_tokens=self._shared.config.passage_tokens,
            reserve=self._shared.store.reserve_numbers,
            hold=holding.hold,
            report=report,
        )
        return [
            NewDocument(
                id=document.id,
                namespace=self._namespace,
                text=document.text,
                metadata=document.metadata,
                timestamp=document.timestamp,
                expires_at=document.expires_at,
                source=document.source,
                trust=document.trust,
                passages=passages,
            )
            for document, passages in zip(documents, encoded, strict=True)
        ]

    def _update(
        self, id: str, content: str | None, metadata: Mapping[str, Any] | None
    ) -> Generator[None, None, Document]:
        self._check_open(write=True)
        if content is None and metadata is None:
            raise ConfigError("update needs content or metadata; both are missing")
        old = self._store.get(self._namespace, check_name("id", id))
        merged = read_metadata(
            {**old.metadata, **read_metadata(metadata, self._shared.config)}, self._shared.config
        )
        read_by_model = {"title", "speaker"}
        if content is None and all(old.metadata.get(key) == merged.get(key) for key in read_by_model):
            return self._shared.store.update_metadata(
                self._namespace, id, merged, expected_version=old.version
            )
        item: dict[str, Any] = {"metadata": merged, "source": old.source, "trust": old.trust}
        if content is None:
            item |= {"content": old.text, "timestamp": old.timestamp}
        else:
            item["content"] = content
        return (yield from self._next_version(old, item))

    def _restore(self, id: str, version: int) -> Generator[None, None, Document]:
        self._check_open(write=True)
        current = self._store.get(self._namespace, check_name("id", id))
        if not isinstance(version, int) or isinstance(version, bool):
            raise InvalidDocumentError(f"version is {version!r:.60}; expected a whole number")
        old = self._shared.store.restore_version(self._namespace, id, version)
        item = {
            "content": old.text, "metadata": old.metadata, "timestamp": old.timestamp,
            "source": old.source, "trust": old.trust,
        }  # fmt: skip
        return (yield from self._next_version(current, item))

    def _next_version(self, old: Document, item: dict[str, Any]) -> Generator[None, None, Document]:
        """Encode a document anew and store that; an item with a timestamp was not said again, but then."""
        said_at = item.get("timestamp")
        if said_at in {version.created_at for version in self._shared.store.history(self._namespace, old.id)}:
            item["timestamp"] = None  # nobody gave it a date, so the model reads none
        renewed = read_item({**item, "id": old.id, "expires_at": old.expires_at}, self._shared.config)
        with Holding(self._shared.store) as holding:
            fresh = yield from self._encode(renewed, holding)
            if said_at is not None:
                fresh = replace(fresh, timestamp=said_at)
            return self._shared.store.replace(fresh, expected_version=old.version)


def _header(document: DocumentInput) -> str:
    """What the model reads before each passage of a document."""
    title, speaker = document.metadata.get("title"), document.metadata.get("speaker")
    return document_header(
        title=title if isinstance(title, str) else None,
        when=document.timestamp.date() if document.timestamp else None,
        speaker=speaker if isinstance(speaker, str) else None,
    )


def checked_ids(ids: object) -> list[str]:
    if isinstance(ids, str):
        return [check_name("id", ids)]
    if isinstance(ids, Mapping) or not isinstance(ids, Iterable):
        raise ConfigError(f"ids is {ids!r:.60}; expected an id or a list of them")
    return [check_name("id", id) for id in ids]


def _item(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in ("self", "on_conflict")}


def _same(old: Document, new: DocumentInput) -> bool:
    return (
        (old.text, old.metadata, old.source, old.trust, old.expires_at)
        == (new.text, new.metadata, new.source, new.trust, new.expires_at)
    ) and new.timestamp in (None, old.timestamp)
