"""``MemoryModel``: the memory people open, fill, ask and forget from.

A thin facade: it checks arguments, orders calls to the engine (through its one worker thread) and to the
store, and turns their values into public ones. It holds no SQL and no tensor maths.
"""

from __future__ import annotations

import asyncio
import builtins
import os
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from msa_memory.answering import AnswerOptions, Asking
from msa_memory.config import MemoryConfig, default_model
from msa_memory.conversation import read_conversation
from msa_memory.documents import check_name, check_question, limited
from msa_memory.errors import ConfigError
from msa_memory.moving.verbs import MovingVerbs
from msa_memory.opened import Shared
from msa_memory.persistence import PassageText, Store
from msa_memory.runtime import RuntimeKey, acquire, model_name, release
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
from msa_memory.writing import WritingVerbs, checked_ids

__all__ = ["MemoryModel"]

Where = Mapping[str, Any]
QUERY_OPTIONS = frozenset(
    ("top_k", "k", "where", "max_rounds", "max_new_tokens", "temperature", "stop", "evidence")
)
MOST_PER_PAGE = 1_000_000


class MemoryModel(WritingVerbs, MovingVerbs):
    """A language model with a living memory; open one with ``MemoryModel.open``.

    Safe to use from many threads and from asyncio. Every verb has an async twin with prefix ``a``.
    """

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
            runtime = acquire(RuntimeKey(name, device, dtype, config.router_normalize, config.decode_weights))
        except BaseException:
            store.close()
            raise
        named = model is not None or store.identity.model is None
        return cls(Shared(store, runtime, config, named, read_only), namespace)

    # forgetting

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

    def _repair(self) -> Generator[None, None, tuple[str, ...]]:
        self._check_open(write=True)
        engine = self._engine()

        def encode(passage: PassageText) -> dict[str, TensorBytes]:
            return engine.encode(passage.record.number, passage.header, passage.text).to_bytes()

        yield
        return self._shared.store.repair(encode).remaining

    def _forget(
        self, ids: str | Sequence[str] | None, where: Where | None, session: str | None, dry_run: bool
    ) -> Generator[None, None, ForgetReceipt]:
        self._check_open(write=not dry_run)
        if session is None:
            selected = None if ids is None else checked_ids(ids)
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
