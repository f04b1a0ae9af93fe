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
from collections.abc import (
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from msa_memory.answering import AnswerOptions, Asking
from msa_memory.config import MemoryConfig, default_model
from msa_memory.conversation import read_conversation
from msa_memory.documents import (
    DocumentInput,
    check_name,
    check_question,
    limited,
    read_expiry,
    read_item,
    read_metadata,
)
from msa_memory.engine.engine import Engine
from msa_memory.engine.layout import document_header
from msa_memory.engine.worker import Worker
from msa_memory.errors import (
    ConfigError,
    ConflictError,
    EngineError,
    ForkedMemoryError,
    InvalidDocumentError,
    NotFoundError,
    ReadOnlyError,
)
from msa_memory.living_bank import LivingBank
from msa_memory.moving.encoding import encode_text
from msa_memory.moving.verbs import MovingVerbs
from msa_memory.persistence import NewDocument, PassageText, Store
from msa_memory.progress import Progress, progress_reporter
from msa_memory.runtime import Runtime, RuntimeKey, acquire, model_name, release
from msa_memory.session import Session
from msa_memory.types import (
    Answer,
    AnswerChunk,
    ChatMessage,
    Context,
    Document,
    DocumentVersion,
    Explanation,
    ForgetReceipt,
    Page,
    Source,
    Stats,
    TensorBytes,
)

__all__ = ["MemoryModel"]

Where = Mapping[str, Any]
OnConflict = Literal["error", "replace", "skip"]
T = TypeVar("T")
QUERY_OPTIONS = frozenset(
    ("top_k", "k", "where", "max_rounds", "max_new_tokens", "temperature", "stop", "evidence")
)
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
    retired: set[Worker] = field(default_factory=set)
    """Threads of models this memory moved away from."""


class MemoryModel(MovingVerbs):
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

    def forget(
        self,
        ids: str | Sequence[str] | None = None,
        *,
        where: Where | None = None,
        session: str | None = None,
        dry_run: bool = False,
    ) -> ForgetReceipt:
        """Forget documents by id, by filter or by session: text, versions and states are masked and erased.

        A forgotten document takes the session's message that it holds along; a forgotten session all its
        messages and their documents.

        Raises:
            ConfigError: no selector, or more than one.
            NotFoundError: an unknown id or session; nothing was forgotten.
        """
        return self._run(self._forget(ids, where, session, dry_run))

    async def aforget(
        self,
        ids: str | Sequence[str] | None = None,
        *,
        where: Where | None = None,
        session: str | None = None,
        dry_run: bool = False,
    ) -> ForgetReceipt:
        """Async twin of ``forget``."""
        return await self._arun(self._forget(ids, where, session, dry_run))

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
        return self._shared.store.set_expiry(self._namespace, _ids(ids), until)

    async def aset_expiry(
        self,
        ids: str | Sequence[str],
        *,
        expires_at: object = None,
        ttl: float | timedelta | None = None,
    ) -> int:
        """Async twin of ``set_expiry``."""
        return await asyncio.to_thread(self.set_expiry, ids, expires_at=expires_at, ttl=ttl)

    def forget_expired(self) -> ForgetReceipt:
        """Forget what has expired in this namespace, now instead of at the next ``compact``."""
        self._check_open(write=True)
        return self._shared.store.forget_expired(self._namespace)

    async def aforget_expired(self) -> ForgetReceipt:
        """Async twin of ``forget_expired``."""
        return await asyncio.to_thread(self.forget_expired)

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
        return self._store.get(self._namespace, check_name("id", id))

    async def aget(self, id: str) -> Document:
        """Async twin of ``get``."""
        return await asyncio.to_thread(self.get, id)

    def list(
        self, where: Where | None = None, *, limit: int = 100, cursor: str | None = None
    ) -> Page[Document]:
        """Documents, newest first, a page at a time; pass ``next_cursor`` back for the next page."""
        if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MOST_PER_PAGE:
            raise ConfigError(f"limit is {limit!r:.60}; it must be a whole number from 1 to {MOST_PER_PAGE}")
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
        return self._store.history(self._namespace, check_name("id", id))

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
        return self._stream(self._asking(_asked(locals())).answer())

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
        return self._astream(self._asking(_asked(locals())).answer())

    def chat(
        self, messages: Sequence[ChatMessage | Mapping[str, Any]], *, recall: bool = True, **options: Any
    ) -> Answer:
        """Continue a conversation with what the memory knows about its newest user message.

        The newest user message routes, read after the turns before it. Where nothing in the memory is
        relevant the model answers by itself and ``found`` is False.

        Args:
            messages: ``ChatMessage`` or mappings with ``role`` (system, user, assistant, tool), ``content``
                and optionally ``name``; the oldest are left out when they exceed the model's window.
            recall: False leaves the memory out altogether.
            options: ``query``'s, and ``constraint``: what the answer may look like, see
                ``msa_memory.engine.sampling.Constraint``.

        Raises:
            InvalidDocumentError: no messages, an unknown role, or content that is not text.
            LimitError: the newest message does not fit the model's window.
        """
        return self._run(self._chatting(messages, recall, **options))

    async def achat(
        self, messages: Sequence[ChatMessage | Mapping[str, Any]], *, recall: bool = True, **options: Any
    ) -> Answer:
        """Async twin of ``chat``."""
        return await self._arun(self._chatting(messages, recall, **options))

    def stream_chat(
        self, messages: Sequence[ChatMessage | Mapping[str, Any]], *, recall: bool = True, **options: Any
    ) -> Iterator[AnswerChunk]:
        """``chat``, piece by piece; the last chunk carries the whole Answer. Closing it stops the model."""
        return self._stream(self._chatting(messages, recall, **options))

    def astream_chat(
        self, messages: Sequence[ChatMessage | Mapping[str, Any]], *, recall: bool = True, **options: Any
    ) -> AsyncIterator[AnswerChunk]:
        """Async twin of ``stream_chat``."""
        return self._astream(self._chatting(messages, recall, **options))

    def query_many(self, questions: Sequence[str], **options: Any) -> builtins.list[Answer]:
        """Answer several questions, advancing together; takes ``query``'s options."""
        return self._run_all([self._asking(asked).answer() for asked in self._all_asked(questions, options)])

    async def aquery_many(self, questions: Sequence[str], **options: Any) -> builtins.list[Answer]:
        """Async twin of ``query_many``."""
        return await self._arun_all(
            [self._asking(asked).answer() for asked in self._all_asked(questions, options)]
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
        return self._run_all([self._asking(asked).search() for asked in self._all_asked(queries, options)])

    async def asearch_many(
        self, queries: Sequence[str], *, k: int = 5, where: Where | None = None
    ) -> builtins.list[builtins.list[Source]]:
        """Async twin of ``search_many``."""
        options = {"k": k, "where": where}
        return await self._arun_all(
            [self._asking(asked).search() for asked in self._all_asked(queries, options)]
        )

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

    def session(self, id: str) -> Session:
        """The conversation with this id in this namespace; it begins with its first message."""
        return Session(self, id)

    def sessions(self) -> builtins.list[str]:
        """Ids of the namespace's sessions, oldest first."""
        return self._store.sessions(self._namespace)

    async def asessions(self) -> builtins.list[str]:
        """Async twin of ``sessions``."""
        return await asyncio.to_thread(self.sessions)

    def verify(self, repair: bool = False) -> tuple[str, ...]:
        """Check every checksum, row hash and commit; returns what is wrong, in words (empty if nothing).

        Args:
            repair: encode damaged states anew from the kept text, and mend what else follows from it;
                what is returned is then what only a backup can mend.
        """
        return self._run(self._repair()) if repair else self._store.verify()

    async def averify(self, repair: bool = False) -> tuple[str, ...]:
        """Async twin of ``verify``."""
        if repair:
            return await self._arun(self._repair())
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

    def _stream(self, steps: Generator[T | None, None, Any]) -> Iterator[T]:
        self._check_open()
        return self._shared.runtime.worker.stream(steps)

    def _astream(self, steps: Generator[T | None, None, Any]) -> AsyncIterator[T]:
        self._check_open()
        return self._shared.runtime.worker.astream(steps)

    def _run_all(self, jobs: Sequence[Generator[Any, None, T]]) -> builtins.list[T]:
        self._check_open()
        return self._shared.runtime.worker.run_all(jobs)

    async def _arun_all(self, jobs: Sequence[Generator[Any, None, T]]) -> builtins.list[T]:
        self._check_open()
        return await self._shared.runtime.worker.arun_all(jobs)

    def _engine(self) -> Engine:
        shared = self._shared
        if any(worker.is_current() for worker in shared.retired):
            raise EngineError("the memory moved to another model meanwhile; ask again")
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

    def _all_asked(
        self, questions: Sequence[str], options: Mapping[str, Any]
    ) -> builtins.list[AnswerOptions]:
        if isinstance(questions, str) or not isinstance(questions, Iterable):
            raise ConfigError(f"the questions are {questions!r:.60}; give a list of strings")
        asked = limited(questions, self._shared.config)
        return [_asked({"question": question, **options}) for question in asked]

    def _asking(self, options: AnswerOptions) -> Asking:
        return Asking(
            self._engine, self._bank, self._shared.store, self._namespace, self._shared.config, options
        )

    def _chatting(
        self, messages: object, recall: bool = True, **options: Any
    ) -> Generator[AnswerChunk | None, None, Answer]:
        return self._asking(_chatted(messages, recall, options)).answer()

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
        inputs = [read_item(item, self._shared.config) for item in limited(items, self._shared.config)]
        self._refuse_taken(inputs, on_conflict)
        documents: builtins.list[Document] = []
        with progress_reporter(progress, len(inputs)) as report:
            for start in range(0, len(inputs), COMMIT_DOCUMENTS):
                part = inputs[start : start + COMMIT_DOCUMENTS]
                documents += yield from self._add_batch(part, on_conflict, report, start)
        return documents

    def _refuse_taken(self, inputs: Sequence[DocumentInput], on_conflict: OnConflict) -> None:
        if on_conflict not in ("error", "replace", "skip"):
            raise ConfigError(f"on_conflict is {on_conflict!r:.60}; expected 'error', 'replace' or 'skip'")
        if on_conflict == "error":
            ids = [document.id for document in inputs]
            twice = {id for id, count in Counter(ids).items() if count > 1}
            if taken := twice | self._shared.store.exists(self._namespace, ids):
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

    def _encode(self, document: DocumentInput) -> Generator[None, None, NewDocument]:
        engine = self._engine()
        title, speaker = document.metadata.get("title"), document.metadata.get("speaker")
        header = document_header(
            title=title if isinstance(title, str) else None,
            when=document.timestamp.date() if document.timestamp else None,
            speaker=speaker if isinstance(speaker, str) else None,
        )
        passages = yield from encode_text(
            engine,
            document.text,
            header,
            passage_tokens=self._shared.config.passage_tokens,
            reserve=self._shared.store.reserve_numbers,
            what=f"content {document.text[:40]!a}",
        )
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

    def _repair(self) -> Generator[None, None, tuple[str, ...]]:
        self._check_open(write=True)
        engine = self._engine()

        def encode(passage: PassageText) -> dict[str, TensorBytes]:
            return engine.encode(passage.record.number, passage.header, passage.text).to_bytes()

        yield
        return self._shared.store.repair(encode).remaining

    def _next_version(self, old: Document, item: dict[str, Any]) -> Generator[None, None, Document]:
        """Encode a document anew and store that; an item with a timestamp was not said again, but then."""
        said_at = item.get("timestamp")
        if said_at in {version.created_at for version in self._shared.store.history(self._namespace, old.id)}:
            item["timestamp"] = None  # nobody gave it a date, so the model reads none
        fresh = yield from self._encode(
            read_item({**item, "id": old.id, "expires_at": old.expires_at}, self._shared.config)
        )
        if said_at is not None:
            fresh = replace(fresh, timestamp=said_at)
        return self._shared.store.replace(fresh, expected_version=old.version)

    def _forget(
        self, ids: str | Sequence[str] | None, where: Where | None, session: str | None, dry_run: bool
    ) -> Generator[None, None, ForgetReceipt]:
        self._check_open(write=not dry_run)
        if session is None:
            selected = None if ids is None else _ids(ids)
            receipt = self._shared.store.forget(self._namespace, ids=selected, where=where, dry_run=dry_run)
        elif ids is None and where is None:
            name = check_name("session", session)
            receipt = self._shared.store.forget_session(self._namespace, name, dry_run=dry_run)
        else:
            raise ConfigError("forget was given a session and ids or where; give one of them")
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
    _check_options("query", given.keys() - {"question"}, QUERY_OPTIONS)
    return AnswerOptions(check_question(given.pop("question")), **given)


def _chatted(messages: object, recall: bool, options: Mapping[str, Any]) -> AnswerOptions:
    _check_options("chat", options.keys(), QUERY_OPTIONS | {"constraint"})
    if not isinstance(recall, bool):
        raise ConfigError(f"recall is {recall!r:.60}; expected True or False")
    conversation = read_conversation(messages)
    return AnswerOptions(conversation.question, conversation=conversation, recall=recall, **options)


def _check_options(verb: str, given: Set[str], known: Set[str]) -> None:
    if unknown := sorted(given - known):
        raise ConfigError(f"unknown options {unknown}; {verb} takes {', '.join(sorted(known))}")


def _same(old: Document, new: DocumentInput) -> bool:
    return (
        (old.text, old.metadata, old.source, old.trust, old.expires_at)
        == (new.text, new.metadata, new.source, new.trust, new.expires_at)
    ) and new.timestamp in (None, old.timestamp)
