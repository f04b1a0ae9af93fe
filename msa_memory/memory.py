"""``MemoryModel``: the memory people open, fill, ask and forget from.

A thin facade: it checks arguments, orders calls to the engine (through its one worker thread) and to the
store, and turns their values into public ones. It holds no SQL and no tensor maths.
"""

from __future__ import annotations

import asyncio
import builtins
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from msa_memory.answering import AnswerOptions, Asking
from msa_memory.config import MemoryConfig, default_model
from msa_memory.documents import DocumentInput, check_name, check_question, read_item, read_metadata
from msa_memory.engine.engine import Engine
from msa_memory.engine.layout import document_header
from msa_memory.errors import (
    ConfigError,
    ConflictError,
    ForkedMemoryError,
    InvalidDocumentError,
    NotFoundError,
    ReadOnlyError,
)
from msa_memory.living_bank import LivingBank
from msa_memory.persistence import NewDocument, NewPassage, Store
from msa_memory.progress import Progress, progress_reporter
from msa_memory.runtime import Runtime, RuntimeKey, acquire, model_name, release
from msa_memory.types import (
    Answer,
    AnswerChunk,
    Context,
    Document,
    DocumentVersion,
    Explanation,
    ForgetReceipt,
    Page,
    Source,
    Stats,
)

__all__ = ["MemoryModel"]

Where = Mapping[str, Any]
OnConflict = Literal["error", "replace", "skip"]
T = TypeVar("T")
COMMIT_DOCUMENTS = 64
MOST_PER_PAGE = 1_000_000


@dataclass
class _Shared:
    """What all namespace views of one opened memory have in common."""

    store: Store
    runtime: Runtime
    config: MemoryConfig
    model_named: bool
    read_only: bool
    pid: int = field(default_factory=os.getpid)
    bank: LivingBank | None = None
    closed: bool = False
    closing: threading.Lock = field(default_factory=threading.Lock)


class MemoryModel:
    """A language model with a living memory; open one with ``MemoryModel.open``.

    Safe to use from many threads and from asyncio. Every verb has an async twin with prefix ``a``.
    """

    def __init__(self, shared: _Shared, namespace: str) -> None:
        self._shared = shared
        self._namespace = namespace

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        *,
        model: str | Path | None = None,
        namespace: str = "default",
        device: str = "auto",
        dtype: str = "auto",
        catalog_url: str | None = None,
        state_url: str | None = None,
        config: MemoryConfig | None = None,
        read_only: bool = False,
    ) -> Self:
        """Open the memory in a folder, creating it if there is none; ``None`` keeps it in RAM until closed.

        Args:
            model: registered name, local folder or hub id; None means the bank's recorded model, else
                ``MSA_MEMORY_MODEL``, else the default. Weights load at first use.
            namespace: the view to start in; nothing crosses namespaces.
            device: ``auto``, ``cpu`` or ``cuda:0`` and so on. dtype: ``auto``, ``float32``, ``bfloat16``.
            catalog_url: a PostgreSQL URL instead of the folder's SQLite catalog.
            state_url: another folder for the state files.

        Raises:
            StorageError: the folder is something else, cannot be used or is damaged.
            InvalidDocumentError: the namespace's name is not usable.
        """
        config = _settings(config)
        namespace = check_name("namespace", namespace)
        store = Store.open(
            _folder(path),
            catalog_url=catalog_url,
            state_url=state_url,
            read_only=read_only,
            lock_timeout_s=config.lock_timeout_s,
        )
        try:
            name = model_name(model, store.identity.model, default_model())
            runtime = acquire(RuntimeKey(name, device, dtype, config.router_normalize))
        except BaseException:
            store.close()
            raise
        named = model is not None or store.identity.model is None
        return cls(_Shared(store, runtime, config, named, read_only), namespace)

    # adding and changing

    def add(
        self,
        content: str,
        *,
        id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_conflict: OnConflict = "error",
        timestamp: object = None,
        expires_at: object = None,
        source: str | None = None,
        trust: str | None = None,
    ) -> Document:
        """Remember a text; it can be asked about when this returns, and survives a crash from then on.

        Args:
            id: unique in the namespace; generated when None.
            metadata: JSON object; ``title`` and ``speaker`` are also read by the model.
            on_conflict: what to do if the id is taken.
            timestamp: when it was said or happened (datetime or ISO 8601, UTC if without zone).
            expires_at: when it stops being visible.
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
    ) -> builtins.list[Document]:
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
    ) -> builtins.list[Document]:
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

    def forget(
        self, ids: str | Sequence[str] | None = None, *, where: Where | None = None, dry_run: bool = False
    ) -> ForgetReceipt:
        """Forget documents by id or by filter: text, versions and states are masked and erased.

        Raises:
            ConfigError: no selector, or both.
            NotFoundError: an unknown id; nothing was forgotten.
        """
        return self._run(self._forget(ids, where, dry_run))

    async def aforget(
        self, ids: str | Sequence[str] | None = None, *, where: Where | None = None, dry_run: bool = False
    ) -> ForgetReceipt:
        """Async twin of ``forget``."""
        return await self._arun(self._forget(ids, where, dry_run))

    def forget_namespace(self, name: str, *, confirm: str) -> ForgetReceipt:
        """Forget everything in a namespace; ``confirm`` must repeat its name."""
        self._check_open(write=True)
        return self._shared.store.forget_namespace(name, confirm=confirm)

    async def aforget_namespace(self, name: str, *, confirm: str) -> ForgetReceipt:
        """Async twin of ``forget_namespace``."""
        return await asyncio.to_thread(self.forget_namespace, name, confirm=confirm)

    # looking things up

    def get(self, id: str) -> Document:
        """The document with this id. Raises NotFoundError if there is none or it has expired."""
        return self._current(check_name("id", id))

    async def aget(self, id: str) -> Document:
        """Async twin of ``get``."""
        return await asyncio.to_thread(self.get, id)

    def list(
        self, where: Where | None = None, *, limit: int = 100, cursor: str | None = None
    ) -> Page[Document]:
        """Documents, newest first, a page at a time; pass ``next_cursor`` back for the next page."""
        if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MOST_PER_PAGE:
            raise ConfigError(f"limit is {limit!r}; it must be a whole number from 1 to {MOST_PER_PAGE}")
        return self._store.list(self._namespace, where, limit=limit, cursor=cursor)

    async def alist(
        self, where: Where | None = None, *, limit: int = 100, cursor: str | None = None
    ) -> Page[Document]:
        """Async twin of ``list``."""
        return await asyncio.to_thread(self.list, where, limit=limit, cursor=cursor)

    def count(self, where: Where | None = None) -> int:
        """How many documents there are."""
        return self._store.count(self._namespace, where)

    async def acount(self, where: Where | None = None) -> int:
        """Async twin of ``count``."""
        return await asyncio.to_thread(self.count, where)

    def history(self, id: str) -> tuple[DocumentVersion, ...]:
        """All versions of a document, oldest first. Raises NotFoundError."""
        self._current(check_name("id", id))
        return self._store.history(self._namespace, id)

    async def ahistory(self, id: str) -> tuple[DocumentVersion, ...]:
        """Async twin of ``history``."""
        return await asyncio.to_thread(self.history, id)

    @property
    def stats(self) -> Stats:
        """Sizes of this memory."""
        return self._store.stats(self._namespace)

    # asking

    def query(
        self,
        question: str,
        *,
        top_k: int | None = None,
        k: int | None = None,
        where: Where | None = None,
        max_rounds: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        stop: str | Sequence[str] | None = None,
        evidence: Literal["auto", "router", "generative"] = "auto",
    ) -> Answer:
        """Answer a question from the memory, with its sources.

        Args:
            top_k: passages each router layer attends to; the model's own number when None.
            k: documents whose original text is read. max_rounds: retrieval rounds at most.
            where: only documents that match this filter are visible to the routers.
            temperature: 0 is greedy. stop: text at which the answer ends, not included.
            evidence: how documents are named; ``auto`` is what the model was trained for.
        """
        return self._run(self._asking(_asked(locals())).answer())

    async def aquery(
        self,
        question: str,
        *,
        top_k: int | None = None,
        k: int | None = None,
        where: Where | None = None,
        max_rounds: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        stop: str | Sequence[str] | None = None,
        evidence: Literal["auto", "router", "generative"] = "auto",
    ) -> Answer:
        """Async twin of ``query``."""
        return await self._arun(self._asking(_asked(locals())).answer())

    def stream(
        self,
        question: str,
        *,
        top_k: int | None = None,
        k: int | None = None,
        where: Where | None = None,
        max_rounds: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        stop: str | Sequence[str] | None = None,
        evidence: Literal["auto", "router", "generative"] = "auto",
    ) -> Iterator[AnswerChunk]:
        """``query``, piece by piece; the last chunk carries the whole Answer. Closing it stops the model."""
        steps = self._asking(_asked(locals())).answer()
        self._check_open()
        return self._shared.runtime.worker.stream(steps)

    def astream(
        self,
        question: str,
        *,
        top_k: int | None = None,
        k: int | None = None,
        where: Where | None = None,
        max_rounds: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        stop: str | Sequence[str] | None = None,
        evidence: Literal["auto", "router", "generative"] = "auto",
    ) -> AsyncIterator[AnswerChunk]:
        """Async twin of ``stream``."""
        steps = self._asking(_asked(locals())).answer()
        self._check_open()
        return self._shared.runtime.worker.astream(steps)

    def query_many(self, questions: Sequence[str], **options: Any) -> builtins.list[Answer]:
        """Answer several questions, advancing together; takes ``query``'s options."""
        return self._run_all([self._asking(asked).answer() for asked in _all_asked(questions, options)])

    async def aquery_many(self, questions: Sequence[str], **options: Any) -> builtins.list[Answer]:
        """Async twin of ``query_many``."""
        return await self._arun_all(
            [self._asking(asked).answer() for asked in _all_asked(questions, options)]
        )

    def search(self, query: str, *, k: int = 5, where: Where | None = None) -> builtins.list[Source]:
        """The k distinct documents the routers rank highest, best first; all of them if fewer are visible."""
        return self._run(self._asking(AnswerOptions(check_question(query), k=k, where=where)).search())

    async def asearch(self, query: str, *, k: int = 5, where: Where | None = None) -> builtins.list[Source]:
        """Async twin of ``search``."""
        return await self._arun(self._asking(AnswerOptions(check_question(query), k=k, where=where)).search())

    def search_many(
        self, queries: Sequence[str], *, k: int = 5, where: Where | None = None
    ) -> builtins.list[builtins.list[Source]]:
        """``search`` for several queries."""
        options = {"k": k, "where": where}
        return self._run_all([self._asking(asked).search() for asked in _all_asked(queries, options)])

    async def asearch_many(
        self, queries: Sequence[str], *, k: int = 5, where: Where | None = None
    ) -> builtins.list[builtins.list[Source]]:
        """Async twin of ``search_many``."""
        options = {"k": k, "where": where}
        return await self._arun_all([self._asking(asked).search() for asked in _all_asked(queries, options)])

    def context(self, question: str, *, max_tokens: int = 1024, where: Where | None = None) -> Context:
        """The evidence for a question as one citable block for any other language model."""
        options = AnswerOptions(check_question(question), where=where, max_tokens=max_tokens)
        return self._run(self._asking(options).context())

    async def acontext(self, question: str, *, max_tokens: int = 1024, where: Where | None = None) -> Context:
        """Async twin of ``context``."""
        options = AnswerOptions(check_question(question), where=where, max_tokens=max_tokens)
        return await self._arun(self._asking(options).context())

    def explain(self, question: str, *, where: Where | None = None) -> Explanation:
        """Scores and choices of every router layer for a question."""
        return self._run(self._asking(AnswerOptions(check_question(question), where=where)).explain())

    async def aexplain(self, question: str, *, where: Where | None = None) -> Explanation:
        """Async twin of ``explain``."""
        return await self._arun(self._asking(AnswerOptions(check_question(question), where=where)).explain())

    # the memory itself

    @property
    def namespace_name(self) -> str:
        """The namespace this view shows."""
        return self._namespace

    def namespace(self, name: str) -> MemoryModel:
        """A view with its own documents, sharing this one's model and files."""
        return MemoryModel(self._shared, check_name("namespace", name))

    def verify(self) -> tuple[str, ...]:
        """Check every checksum, row hash and commit; returns what is wrong, in words (empty if nothing)."""
        return self._store.verify()

    async def averify(self) -> tuple[str, ...]:
        """Async twin of ``verify``."""
        return await asyncio.to_thread(self.verify)

    def compact(self) -> int:
        """Erase expired documents and rewrite state files without gaps; returns the bytes freed."""
        self._check_open(write=True)
        return self._store.compact()

    async def acompact(self) -> int:
        """Async twin of ``compact``."""
        return await asyncio.to_thread(self.compact)

    def close(self) -> None:
        """Close the memory for all its namespace views; a second call does nothing."""
        shared = self._shared
        if shared.pid != os.getpid():
            return  # the parent's to close
        with shared.closing:
            closed, shared.closed = shared.closed, True
        if not closed:
            release(shared.runtime)
            shared.store.close()
            shared.bank = None

    async def aclose(self) -> None:
        """Async twin of ``close``."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # inside

    @property
    def _store(self) -> Store:
        self._check_open()
        return self._shared.store

    def _check_open(self, *, write: bool = False) -> None:
        shared = self._shared
        if shared.pid != os.getpid():
            raise ForkedMemoryError(
                f"this memory was opened in process {shared.pid} and is used in its child {os.getpid()}; "
                "open the memory again after the fork"
            )
        if shared.closed:
            raise ConfigError("this memory is closed; open it again with MemoryModel.open")
        if write and shared.read_only:
            raise ReadOnlyError("this memory was opened with read_only=True; open it without to change it")

    def _run(self, steps: Generator[Any, None, T]) -> T:
        self._check_open()
        return self._shared.runtime.worker.run(steps)

    async def _arun(self, steps: Generator[Any, None, T]) -> T:
        self._check_open()
        return await self._shared.runtime.worker.arun(steps)

    def _run_all(self, jobs: Sequence[Generator[Any, None, T]]) -> builtins.list[T]:
        self._check_open()
        return self._shared.runtime.worker.run_all(jobs)

    async def _arun_all(self, jobs: Sequence[Generator[Any, None, T]]) -> builtins.list[T]:
        self._check_open()
        return await self._shared.runtime.worker.arun_all(jobs)

    def _engine(self) -> Engine:
        shared = self._shared
        engine = shared.runtime.engine(allow_download=shared.model_named)
        if shared.bank is None:
            shared.store.bind_model(
                model=shared.runtime.key.name, fingerprint=engine.fingerprint, info={"name": engine.name}
            )
            shared.bank = LivingBank(shared.store, engine)
        return engine

    def _bank(self) -> LivingBank:
        self._engine()
        assert self._shared.bank is not None
        return self._shared.bank

    def _asking(self, options: AnswerOptions) -> Asking:
        return Asking(
            self._engine, self._bank, self._shared.store, self._namespace, self._shared.config, options
        )

    def _add_one(self, item: Mapping[str, Any], on_conflict: OnConflict) -> Generator[None, None, Document]:
        documents = yield from self._add_checked([item], on_conflict, False)
        return documents[0]

    def _add_checked(
        self,
        items: Iterable[str | Mapping[str, Any]],
        on_conflict: OnConflict,
        progress: bool | Callable[[int, int], None] | None,
    ) -> Generator[None, None, builtins.list[Document]]:
        self._check_open(write=True)
        if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
            raise ConfigError(
                f"add_many was given one {type(items).__name__}; give a list of items, or use add"
            )
        inputs = [read_item(item, self._shared.config) for item in items]
        self._refuse_taken(inputs, on_conflict)
        documents: builtins.list[Document] = []
        with progress_reporter(progress, len(inputs)) as report:
            for start in range(0, len(inputs), COMMIT_DOCUMENTS):
                part = inputs[start : start + COMMIT_DOCUMENTS]
                documents += yield from self._add_batch(part, on_conflict, report, start)
        return documents

    def _refuse_taken(self, inputs: Sequence[DocumentInput], on_conflict: OnConflict) -> None:
        if on_conflict not in ("error", "replace", "skip"):
            raise ConfigError(f"on_conflict is {on_conflict!r}; expected 'error', 'replace' or 'skip'")
        if on_conflict == "error":
            ids = [document.id for document in inputs]
            taken = {id for id, count in Counter(ids).items() if count > 1} | self._taken(ids)[0].keys()
            if taken:
                raise ConflictError(
                    f"id {min(taken)!r} is taken in namespace {self._namespace!r} or given twice; use "
                    "update, on_conflict='replace' or 'skip', or another id"
                )

    def _add_batch(
        self, inputs: Sequence[DocumentInput], on_conflict: OnConflict, report: Progress, done: int
    ) -> Generator[None, None, builtins.list[Document]]:
        kept = self._unchanged(inputs, on_conflict)
        fresh = []
        for document in inputs:
            if document.id not in kept:
                fresh.append((yield from self._encode(document)))
            done += 1
            report(done)
        self._make_room(fresh, on_conflict)
        stored = {doc.id: doc for doc in self._shared.store.add(fresh, on_conflict=on_conflict)}
        return [kept.get(document.id) or stored[document.id] for document in inputs]

    def _unchanged(self, inputs: Sequence[DocumentInput], on_conflict: OnConflict) -> dict[str, Document]:
        """Documents that need no encoding: to be skipped, or replaced by what they already are."""
        if on_conflict == "error":
            return {}
        by_id = {document.id: document for document in inputs}
        visible, _ = self._taken(by_id)
        return {id: old for id, old in visible.items() if on_conflict == "skip" or _same(old, by_id[id])}

    def _taken(self, ids: Iterable[str]) -> tuple[dict[str, Document], builtins.list[str]]:
        """The visible documents with these ids, and those of the ids whose documents have expired."""
        visible, expired = {}, []
        for id in self._shared.store.exists(self._namespace, ids):
            with suppress(NotFoundError):  # forgotten meanwhile
                document = self._shared.store.get(self._namespace, id)
                if _expired(document):
                    expired.append(id)
                else:
                    visible[id] = document
        return visible, expired

    def _make_room(self, documents: Sequence[NewDocument], on_conflict: OnConflict) -> None:
        """Forget expired documents whose ids are given out anew; a replaced one keeps its history."""
        expired = [] if on_conflict == "replace" else self._taken(doc.id for doc in documents)[1]
        if expired:
            with suppress(NotFoundError):
                self._shared.store.forget(self._namespace, ids=expired)

    def _current(self, id: str) -> Document:
        document = self._store.get(self._namespace, id)
        if _expired(document):
            raise NotFoundError(
                f"document {id!r} in namespace {self._namespace!r} expired at {document.expires_at}; "
                "add it again if it is needed"
            )
        return document

    def _encode(self, document: DocumentInput) -> Generator[None, None, NewDocument]:
        engine = self._engine()
        title, speaker = document.metadata.get("title"), document.metadata.get("speaker")
        header = document_header(
            title=title if isinstance(title, str) else None,
            when=document.timestamp.date() if document.timestamp else None,
            speaker=speaker if isinstance(speaker, str) else None,
        )
        spans = [
            span for span in engine.split(document.text, self._shared.config.passage_tokens) if span.tokens
        ]
        if not spans:
            raise InvalidDocumentError(f"content {document.text[:40]!a} has no character this model can read")
        passages = []
        for span, number in zip(spans, self._shared.store.reserve_numbers(len(spans)), strict=True):
            states = engine.encode(number, header, document.text[span.start : span.end])
            passages.append(
                NewPassage(
                    start=span.start,
                    end=span.end,
                    tokens=span.tokens,
                    number=number,
                    header=header,
                    states=states.to_bytes(),
                )
            )
            yield
        return NewDocument(
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

    def _update(
        self, id: str, content: str | None, metadata: Mapping[str, Any] | None
    ) -> Generator[None, None, Document]:
        self._check_open(write=True)
        if content is None and metadata is None:
            raise ConfigError("update needs content or metadata; both are missing")
        old = self._current(check_name("id", id))
        merged = read_metadata(
            {**old.metadata, **read_metadata(metadata, self._shared.config)}, self._shared.config
        )
        read_by_model = {"title", "speaker"}
        if content is None and all(old.metadata.get(key) == merged.get(key) for key in read_by_model):
            return self._shared.store.update_metadata(
                self._namespace, id, merged, expected_version=old.version
            )
        versions = self._shared.store.history(self._namespace, id)
        dated = old.timestamp not in {version.created_at for version in versions}
        item = {
            "content": old.text if content is None else content, "id": id, "metadata": merged,
            "timestamp": old.timestamp if dated and content is None else None,
            "expires_at": old.expires_at, "source": old.source, "trust": old.trust,
        }  # fmt: skip
        fresh = yield from self._encode(read_item(item, self._shared.config))
        if content is None:  # it was not said again, and is as old as before
            fresh = replace(fresh, timestamp=old.timestamp)
        return self._shared.store.replace(fresh, expected_version=old.version)

    def _forget(
        self, ids: str | Sequence[str] | None, where: Where | None, dry_run: bool
    ) -> Generator[None, None, ForgetReceipt]:
        self._check_open(write=not dry_run)
        selected = None if ids is None else _ids(ids)
        receipt = self._shared.store.forget(self._namespace, ids=selected, where=where, dry_run=dry_run)
        if self._shared.bank is not None:
            self._shared.bank.refresh()
        yield from ()  # a generator like every other verb, in one step
        return receipt


def _folder(path: object) -> Path | None:
    if path is None:
        return None
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise ConfigError(f"path is {path!r:.60}; expected a folder, or None for a memory in RAM")
    return Path(path).expanduser()


def _settings(config: object) -> MemoryConfig:
    if config is None:
        return MemoryConfig()
    if not isinstance(config, MemoryConfig):
        raise ConfigError(f"config is {config!r:.60}; expected a MemoryConfig")
    return config


def _ids(ids: object) -> builtins.list[str]:
    if isinstance(ids, str):
        return [check_name("id", ids)]
    if isinstance(ids, Mapping) or not isinstance(ids, Iterable):
        raise ConfigError(f"ids is {ids!r:.60}; expected an id or a list of them")
    return [check_name("id", id) for id in ids]


def _item(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in ("self", "on_conflict")}


def _asked(arguments: Mapping[str, Any]) -> AnswerOptions:
    given = {key: value for key, value in arguments.items() if key != "self"}
    known = AnswerOptions.__dataclass_fields__.keys() - {"max_tokens"}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"unknown options {unknown}; query takes {', '.join(sorted(known - {'question'}))}")
    return AnswerOptions(check_question(given.pop("question")), **given)


def _all_asked(questions: Sequence[str], options: Mapping[str, Any]) -> builtins.list[AnswerOptions]:
    if isinstance(questions, str) or not isinstance(questions, Iterable):
        raise ConfigError(f"the questions are {questions!r:.60}; give a list of strings")
    return [_asked({"question": question, **options}) for question in questions]


def _expired(document: Document) -> bool:
    return document.expires_at is not None and document.expires_at <= datetime.now(UTC)


def _same(old: Document, new: DocumentInput) -> bool:
    return (
        (old.text, old.metadata, old.source, old.trust, old.expires_at)
        == (new.text, new.metadata, new.source, new.trust, new.expires_at)
    ) and new.timestamp in (None, old.timestamp)
