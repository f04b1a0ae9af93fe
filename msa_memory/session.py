"""``Session``: one conversation, stored message by message and remembered as it goes.

Knows the order of a turn: store what was said, answer from the recent turns and the memory, store the answer.
Every message but the system's is a document of the memory too. Rows are the store's, answers the memory's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from msa_memory.documents import DocumentInput, check_name, read_item
from msa_memory.errors import InvalidDocumentError
from msa_memory.moving.encoding import Holding
from msa_memory.persistence import NewMessage
from msa_memory.persistence.filters import parse_filter
from msa_memory.types import Answer, AnswerChunk, ForgetReceipt, Message

if TYPE_CHECKING:
    from msa_memory.memory import MemoryModel

__all__ = ["ROLES", "Session"]

ROLES = ("system", "user", "assistant", "tool")
TURN_TOKENS = 8
"""What a chat template puts around one message, about."""
RECENT_PART = 4
"""Recent turns take at most one part of so many of the model's window: evidence needs room too."""


class Session:
    """A conversation in one namespace of a memory; get it with ``MemoryModel.session``.

    Nothing is kept here: another process, or this one after a crash, goes on with the same id. Messages
    have consecutive positions whoever appends them; a forgotten one leaves a gap.
    """

    def __init__(self, memory: MemoryModel, id: str) -> None:
        self._memory = memory
        self._id = check_name("session", id)

    @property
    def id(self) -> str:
        """The session's name, unique in its namespace."""
        return self._id

    @property
    def namespace_name(self) -> str:
        """The namespace the session belongs to."""
        return self._memory.namespace_name

    def append(
        self,
        role: str,
        content: str,
        *,
        name: str | None = None,
        key: str | None = None,
        timestamp: object = None,
    ) -> Message:
        """Store a message as the session's newest and, unless it is the system's, as a document, at once.

        Args:
            role: ``system``, ``user``, ``assistant`` or ``tool``.
            name: who spoke; the model reads it, or else the role, with the text.
            key: unique in the session: a second append with it returns the stored message, writes nothing.
            timestamp: when it was said (datetime or ISO 8601, UTC if without zone); now when None.

        Raises:
            InvalidDocumentError: an unknown role, empty or non-string content, an unusable name or date.
            LimitError: the content is larger than ``MemoryConfig.max_document_chars``.
        """
        return self._memory._run(self._append(role, content, name, key, timestamp))

    async def aappend(
        self,
        role: str,
        content: str,
        *,
        name: str | None = None,
        key: str | None = None,
        timestamp: object = None,
    ) -> Message:
        """Async twin of ``append``."""
        return await self._memory._arun(self._append(role, content, name, key, timestamp))

    def messages(self) -> list[Message]:
        """Every message that was acknowledged and not forgotten, in order; none for an unknown session."""
        return self._memory._store.messages(self.namespace_name, self._id)

    async def amessages(self) -> list[Message]:
        """Async twin of ``messages``."""
        return await asyncio.to_thread(self.messages)

    def chat(self, text: str, **options: Any) -> Answer:
        """Say something as the user and get the answer; both are stored.

        The model reads the system messages, as many of the newest turns as fit
        ``MemoryConfig.max_recent_tokens``, and what it recalls of everything else in the namespace. What the
        user said is stored first and stays if no answer comes; the answer is stored before it is returned.

        Args:
            options: those of ``MemoryModel.chat``.
        """
        return self._memory._run(self._turn(text, options))

    async def achat(self, text: str, **options: Any) -> Answer:
        """Async twin of ``chat``."""
        return await self._memory._arun(self._turn(text, options))

    def stream(self, text: str, **options: Any) -> Iterator[AnswerChunk]:
        """``chat``, piece by piece; the last chunk carries the whole Answer, stored by then.

        What the user said is stored when the first chunk is asked for. Of an answer whose stream is closed
        before its last chunk nothing is stored: ``append`` what was shown, if it should count.
        """
        return self._memory._stream(self._turn(text, options))

    def astream(self, text: str, **options: Any) -> AsyncIterator[AnswerChunk]:
        """Async twin of ``stream``."""
        return self._memory._astream(self._turn(text, options))

    def forget(self) -> ForgetReceipt:
        """Erase the session: its messages and their documents. Raises NotFoundError if it has none."""
        return self._memory.forget(session=self._id)

    async def aforget(self) -> ForgetReceipt:
        """Async twin of ``forget``."""
        return await self._memory.aforget(session=self._id)

    # inside: generators, each step of which the worker thread runs

    def _append(
        self, role: object, content: object, name: object, key: object, timestamp: object
    ) -> Generator[None, None, Message]:
        memory = self._memory
        memory._check_open(write=True)
        said, message = self._read(role, content, name, key, timestamp)
        store = memory._shared.store
        if message.key is not None:
            stored = store.message(self.namespace_name, self._id, message.key)
            if stored is not None:
                return stored
        with Holding(store) as holding:
            document = None if message.role == "system" else (yield from memory._encode(said, holding))
            return store.append_message(message, document)

    def _read(
        self, role: object, content: object, name: object, key: object, timestamp: object
    ) -> tuple[DocumentInput, NewMessage]:
        """The checked message, as a document and as itself."""
        if not isinstance(role, str) or role not in ROLES:
            raise InvalidDocumentError(f"role is {role!r:.60}; expected one of {', '.join(ROLES)}")
        speaker = role if name is None else check_name("name", name)
        said = read_item(
            {"content": content, "timestamp": datetime.now(UTC) if timestamp is None else timestamp},
            self._memory._shared.config,
        )
        assert said.timestamp is not None
        message = NewMessage(
            session=self._id,
            namespace=self.namespace_name,
            role=role,
            content=said.text,
            timestamp=said.timestamp,
            name=None if name is None else speaker,
            key=None if key is None else check_name("key", key),
        )
        return replace(said, metadata={"session": self._id, "role": role, "speaker": speaker}), message

    def _turn(self, text: object, options: Mapping[str, Any]) -> Generator[AnswerChunk | None, None, Answer]:
        """Store what the user says, answer it, store the answer, and only then say that it is whole."""
        memory = self._memory
        memory._chatting([{"role": "user", "content": text}], **options)  # refuses bad options first
        parse_filter(_where_beside([], options.get("where")))
        said = yield from self._append("user", text, None, None, None)
        recent = self._recent(said)
        read = recent if memory._engine().reads_turns else [said]
        beside = _where_beside(read, options.get("where"))
        turns = [{"role": turn.role, "content": turn.content, "name": turn.name} for turn in recent]
        answer = yield from _but_the_last(memory._chatting(turns, **{**options, "where": beside}))
        if answer.text.strip():
            yield from self._append("assistant", answer.text, None, None, None)
        yield AnswerChunk(text="", answer=answer)
        return answer

    def _recent(self, said: Message) -> list[Message]:
        """The system messages and the newest turns up to ``said`` that fit; that one in any case."""
        memory = self._memory
        engine = memory._engine()
        room = min(memory._shared.config.max_recent_tokens, engine.max_positions // RECENT_PART)
        stored = memory._shared.store.messages(
            self.namespace_name, self._id, newest=room // TURN_TOKENS + 1, before=said.position
        )
        recent = [said]
        room -= engine.count_tokens(said.content) + TURN_TOKENS
        for turn in reversed([message for message in stored if message.role != "system"]):
            room -= engine.count_tokens(turn.content) + TURN_TOKENS
            if room < 0:
                break
            recent.append(turn)
        pinned = [message for message in stored if message.role == "system"]
        return [*pinned, *reversed(recent)]


def _where_beside(recent: list[Message], where: object) -> dict[str, Any]:
    """A filter for what is not read anyway: no document of these messages is recalled."""
    ids = [message.document_id for message in recent if message.document_id is not None]
    others = {"$id": {"$nin": ids}}
    return others if where is None or where == {} else {"$and": [where, others]}


def _but_the_last(
    steps: Generator[AnswerChunk | None, None, Answer],
) -> Generator[AnswerChunk | None, None, Answer]:
    """The chunks of an answer without the one that carries it whole; that is returned."""
    try:
        while True:
            chunk = next(steps)
            if chunk is None or chunk.answer is None:
                yield chunk
    except StopIteration as stop:
        answer: Answer = stop.value
        return answer
    finally:
        steps.close()
