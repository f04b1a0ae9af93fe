"""Every statement on sessions and their messages.

A message that is a document of the memory refers to it and goes with it; the text is kept as it was said,
whatever the document becomes. A session begins with its first message and ends with its last. Readings take
the connection of their transaction, writings the ``Commit``, whose chain covers both tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, delete, func, insert, select, update

from msa_memory.errors import CatalogDamagedError
from msa_memory.persistence.ledger import Commit
from msa_memory.persistence.stamps import fits, make_stamp
from msa_memory.persistence.statements import chunks
from msa_memory.persistence.tables import documents, messages, sessions
from msa_memory.types import Message

__all__ = [
    "MESSAGE",
    "NewMessage",
    "SESSION",
    "append",
    "count",
    "document_keys",
    "names",
    "next_position",
    "of_session",
    "problems",
    "read_message",
    "remove",
    "remove_with",
    "with_key",
]

_FIX = "forget the session, or restore the catalog from a backup"
SESSION = ("namespace", "id", "created_at", "next_position")
MESSAGE = tuple("session position role name content timestamp created_at idempotency_key document".split())
_MESSAGES: Select[Any] = select(
    *messages.c, sessions.c.id, sessions.c.namespace, documents.c.id.label("document_id")
).select_from(messages.join(sessions).outerjoin(documents, messages.c.document == documents.c.key))


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMessage:
    """A checked message on its way in; the store gives it its position."""

    session: str
    namespace: str
    role: str
    content: str
    timestamp: datetime
    name: str | None = None
    key: str | None = None
    """Unique in the session."""


def names(connection: Connection, namespace: str) -> list[str]:
    """Ids of a namespace's sessions, in the order they began."""
    query = select(sessions).where(sessions.c.namespace == namespace).order_by(sessions.c.key)
    return [str(_checked_session(row).id) for row in connection.execute(query)]


def of_session(
    connection: Connection,
    namespace: str,
    session: str,
    newest: int | None = None,
    before: int | None = None,
) -> list[Message]:
    """A session's messages in order, all or those below position ``before``.

    With ``newest`` only that many of the last and all the system's.
    """
    query = _MESSAGES.where(_of(namespace, session)).order_by(messages.c.position.desc())
    if before is not None:
        query = query.where(messages.c.position < before)
    system = messages.c.role == "system"
    queries = [query] if newest is None else [query.where(~system).limit(newest), query.where(system)]
    found = [read_message(row) for each in queries for row in connection.execute(each)]
    return sorted(found, key=lambda message: message.position)


def with_key(connection: Connection, namespace: str, session: str, key: str) -> Message | None:
    """The message that was appended under an idempotency key, if there is one."""
    query = _MESSAGES.where(_of(namespace, session), messages.c.idempotency_key == key)
    row = connection.execute(query).one_or_none()
    return None if row is None else read_message(row)


def next_position(connection: Connection, namespace: str, session: str) -> int:
    """The position of the next message, 0 in a session that has not begun."""
    row = _session(connection, namespace, session)
    return 0 if row is None else int(row.next_position)


def document_keys(connection: Connection, namespace: str, session: str) -> dict[int, str] | None:
    """Row keys and ids of the documents that hold a session's messages; None for an unknown session."""
    known = (sessions.c.namespace == namespace) & (sessions.c.id == session)
    if connection.scalar(select(sessions.c.key).where(known)) is None:  # a damaged one can be forgotten too
        return None
    held = documents.join(messages, messages.c.document == documents.c.key).join(sessions)
    query = select(documents.c.key, documents.c.id).select_from(held)
    rows = connection.execute(query.where(_of(namespace, session)).order_by(documents.c.key))
    return {row.key: row.id for row in rows}


def count(connection: Connection, namespace: str, session: str) -> int:
    """How many messages a session holds."""
    query = select(func.count()).select_from(messages.join(sessions)).where(_of(namespace, session))
    return int(connection.execute(query).scalar_one())


def append(commit: Commit, new: NewMessage, document: int | None) -> int:
    """Give a message the next position and store it; ``document`` is the row key of what holds it."""
    session, position = _take_position(commit, new.namespace, new.session)
    values: dict[str, Any] = {
        "session": session,
        "position": position,
        "role": new.role,
        "name": new.name,
        "content": new.content,
        "timestamp": new.timestamp,
        "created_at": commit.time,
        "idempotency_key": new.key,
        "document": document,
    }
    stamp = make_stamp("message", *(values[column] for column in MESSAGE))
    commit.connection.execute(insert(messages).values(**values, hash=stamp))
    commit.wrote([stamp])
    return position


def remove(commit: Commit, namespace: str, session: str | None = None) -> None:
    """Delete a session with its messages, or every session of a namespace."""
    chosen = sessions.c.namespace == namespace
    if session is not None:
        chosen &= sessions.c.id == session
    keys = list(commit.connection.scalars(select(sessions.c.key).where(chosen)))
    for chunk in chunks(keys):
        _delete(commit, messages, messages.c.session.in_(chunk))
        _delete(commit, sessions, sessions.c.key.in_(chunk))


def remove_with(commit: Commit, keys: Iterable[int]) -> None:
    """Delete the messages that these documents hold, and the sessions that have none left."""
    for chunk in chunks(keys):
        held = messages.c.document.in_(chunk)
        touched = list(commit.connection.scalars(select(messages.c.session).where(held).distinct()))
        _delete(commit, messages, held)
        left = select(messages.c.key).where(messages.c.session == sessions.c.key).exists()
        for part in chunks(touched):
            _delete(commit, sessions, sessions.c.key.in_(part) & ~left)


def problems(connection: Connection) -> Iterator[str]:
    """Sentences about sessions and messages that are not what was written."""
    for row in connection.execute(select(sessions).order_by(sessions.c.key)):
        yield from _problem(_checked_session, row)
    for row in connection.execute(_MESSAGES.order_by(messages.c.key)):
        yield from _problem(read_message, row)


def _problem(check: Callable[[Row[Any]], object], row: Row[Any]) -> Iterator[str]:
    try:
        check(row)
    except CatalogDamagedError as error:
        yield str(error)


def _session(connection: Connection, namespace: str, session: str) -> Row[Any] | None:
    chosen = (sessions.c.namespace == namespace) & (sessions.c.id == session)
    row = connection.execute(select(sessions).where(chosen)).one_or_none()
    return None if row is None else _checked_session(row)


def _checked_session(row: Row[Any]) -> Row[Any]:
    if not fits(row.hash, "session", *(getattr(row, column) for column in SESSION)):
        raise CatalogDamagedError(
            f"session {row.id!r} in namespace {row.namespace!r} is damaged: its stamp differs; {_FIX}"
        )
    return row


def _take_position(commit: Commit, namespace: str, session: str) -> tuple[int, int]:
    """The session's row key, begun if need be, and its next position, taken."""
    row = _session(commit.connection, namespace, session)
    if row is None:
        stamp = make_stamp("session", namespace, session, commit.time, 1)
        values = {"namespace": namespace, "id": session, "created_at": commit.time, "next_position": 1}
        done = commit.connection.execute(insert(sessions).values(**values, hash=stamp))
        assert done.inserted_primary_key is not None
        key, position = int(done.inserted_primary_key[0]), 0
    else:
        key, position = int(row.key), int(row.next_position)
        stamp = make_stamp("session", namespace, session, row.created_at, position + 1)
        changed = {"next_position": position + 1, "hash": stamp}
        commit.connection.execute(update(sessions).where(sessions.c.key == key).values(changed))
        commit.deleted([row.hash])
    commit.wrote([stamp])
    return key, position


def _delete(commit: Commit, table: Table, chosen: ColumnElement[bool]) -> None:
    commit.deleted(list(commit.connection.scalars(select(table.c.hash).where(chosen))))
    commit.connection.execute(delete(table).where(chosen))


def _of(namespace: str, session: str) -> ColumnElement[bool]:
    return (sessions.c.namespace == namespace) & (sessions.c.id == session)


def read_message(row: Row[Any]) -> Message:
    """A row of ``messages`` with its session's and document's names; CatalogDamagedError if it is damaged."""
    if not fits(row.hash, "message", *(getattr(row, column) for column in MESSAGE)):
        raise CatalogDamagedError(
            f"message {row.position} of session {row.id!r} in namespace {row.namespace!r} is damaged: it "
            f"does not match its stamp; {_FIX}"
        )
    return Message(
        session=row.id,
        namespace=row.namespace,
        position=row.position,
        role=row.role,
        name=row.name,
        content=row.content,
        timestamp=row.timestamp,
        key=row.idempotency_key,
        document_id=row.document_id,
    )
