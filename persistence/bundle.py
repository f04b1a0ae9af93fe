"""Whole documents and messages out of a bank and into another: with versions, dates and places kept.

``Bundles`` reads a namespace as it was at one moment and writes a part of one in one commit each.
Knows rows and states; not the file they travel in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from msa_memory.errors import ConflictError
from msa_memory.persistence import document_rows, document_writes, passage_rows, segment_rows
from msa_memory.persistence import sessions as session_rows
from msa_memory.persistence.attributes import canonical
from msa_memory.persistence.document_rows import DOCUMENT, VERSION
from msa_memory.persistence.ledger import Commit
from msa_memory.persistence.records import NewDocument, OldVersion, PassageRecord
from msa_memory.persistence.segments import Placed
from msa_memory.persistence.stamps import make_stamp
from msa_memory.persistence.statements import chunks
from msa_memory.persistence.store import Store
from msa_memory.persistence.tables import documents, messages, passages, sessions, versions
from msa_memory.types import Document

__all__ = ["Arrival", "Bundles", "Snapshot", "StoredDocument", "StoredMessage"]


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document as its bank holds it: earlier versions oldest first, passages with their headings."""

    document: Document
    versions: tuple[OldVersion, ...]
    passages: tuple[tuple[PassageRecord, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMessage:
    """A session's message at its place."""

    namespace: str
    session: str
    position: int
    role: str
    name: str | None
    content: str
    timestamp: datetime
    created_at: datetime
    key: str | None
    document_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A document that comes with a past; the past is left out where it replaces another one."""

    new: NewDocument
    version: int
    created_at: datetime
    updated_at: datetime
    versions: tuple[OldVersion, ...] = ()
    replaces: int | None = None
    """The version of the document whose next one it becomes; None where the id is free."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A namespace inside one transaction."""

    connection: Connection
    namespace: str
    time: datetime

    def documents(self, after: int, *, limit: int, most_bytes: int) -> list[tuple[int, StoredDocument]]:
        """Row keys and documents above ``after``, oldest first, that have not expired.

        At most ``limit``, and no more than ``most_bytes`` of text and states unless the first has more.
        """
        keys = _next_keys(self.connection, self.namespace, self.time, after, limit, most_bytes)
        found = document_rows.find(self.connection, keys)
        held = _passages(self.connection, keys)
        return [
            (key, StoredDocument(found[key], _earlier(self.connection, key, found[key]), held.get(key, ())))
            for key in keys
        ]

    def messages(self, after: int, limit: int) -> list[tuple[int, str, StoredMessage]]:
        """Row keys, stamps and messages above ``after``, in the order they were stored."""
        query = (
            select(messages, sessions.c.id, sessions.c.namespace, documents.c.id.label("document_id"))
            .join(sessions)
            .join(documents, messages.c.document == documents.c.key, isouter=True)
            .where(sessions.c.namespace == self.namespace, messages.c.key > after)
            .order_by(messages.c.key)
            .limit(limit)
        )
        return [(row.key, row.hash, _stored(row)) for row in self.connection.execute(query)]


class Bundles:
    """What moving needs of an open store beyond its own verbs."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @contextmanager
    def snapshot(self, namespace: str) -> Iterator[Snapshot]:
        """A namespace as it is at one moment; keep the block short, because erasure waits for its end."""
        with self._store._reading() as connection:
            yield Snapshot(connection, namespace, datetime.now(UTC))

    def records(self, keys: Sequence[int]) -> dict[int, dict[int, PassageRecord]]:
        """Those documents that exist now, by row key, with their passages by number."""
        found: dict[int, dict[int, PassageRecord]] = {}
        with self._store._reading() as connection:
            for chunk in chunks(keys):
                there = select(documents.c.key).where(documents.c.key.in_(chunk))
                found.update((key, {}) for key in connection.scalars(there))
            for key, held in _passages(connection, list(found)).items():
                found[key] = {record.number: record for record, _ in held}
        return found

    def messages_left(self, stamps: Mapping[int, str]) -> set[int]:
        """Those of the messages, by row key, that exist now; a key may have been given to another one."""
        found: set[int] = set()
        with self._store._reading() as connection:
            for chunk in chunks(stamps):
                rows = connection.execute(
                    select(messages.c.key, messages.c.hash).where(messages.c.key.in_(chunk))
                )
                found.update(row.key for row in rows if row.hash == stamps[row.key])
        return found

    def bring(self, arrivals: Sequence[Arrival]) -> None:
        """Store all of them in one commit, in place of expired ones with their ids.

        ConflictError, and nothing is stored, where an id was taken or its document changed meanwhile.
        """
        if not arrivals:
            return
        store = self._store
        with store._writing() as sizes:
            names = [(arrival.new.namespace, arrival.new.id) for arrival in arrivals]
            taken, alive = store._keys(names), store._keys(names, datetime.now(UTC))
            self._refuse_changed(arrivals, alive)
            placed = store._writer.append([arrival.new for arrival in arrivals], sizes, store._model())
            with store._writer.commit() as commit:
                segment_rows.grow(commit.connection, sizes, placed.values())
                store._make_room(commit, {name: key for name, key in taken.items() if name not in alive})
                _insert(commit, [arrival for arrival in arrivals if arrival.replaces is None], placed)
                for name, arrival in zip(names, arrivals, strict=True):
                    if arrival.replaces is not None:
                        document_writes.replace(commit, alive[name], arrival.new, placed)
            if taken:
                store._writer.erase()

    def _refuse_changed(self, arrivals: Sequence[Arrival], alive: Mapping[tuple[str, str], int]) -> None:
        with self._store._reading() as connection:
            found = document_rows.find(connection, alive.values())
        for arrival in arrivals:
            key = alive.get((arrival.new.namespace, arrival.new.id))
            if arrival.replaces != (None if key is None else found[key].version):
                raise ConflictError(
                    f"document {arrival.new.id!r} in namespace {arrival.new.namespace!r} changed while the "
                    "bundle was read; import it again to go on"
                )

    def bring_messages(self, arrived: Sequence[StoredMessage]) -> None:
        """Store messages at their places in one commit, in place of what is there."""
        if not arrived:
            return
        store = self._store
        with store._writing():
            with store._writer.commit() as commit:
                replaced = _write_messages(commit, arrived)
                if replaced:
                    segment_rows.leave(commit.connection, (), rows=True)
                commit.note("import", arrived[0].namespace, None, len(arrived))
            if replaced:
                store._writer.erase()


def _next_keys(
    connection: Connection, namespace: str, now: datetime, after: int, limit: int, most_bytes: int
) -> list[int]:
    states = (
        select(func.coalesce(func.sum(passages.c.length), 0))
        .where(passages.c.document == documents.c.key)
        .scalar_subquery()
    )
    query = (
        select(documents.c.key, (func.length(documents.c.text) + states).label("bytes"))
        .where(document_rows.visible(namespace, None, now), documents.c.key > after)
        .order_by(documents.c.key)
        .limit(limit)
    )
    keys: list[int] = []
    total = 0
    for row in connection.execute(query):
        total += int(row.bytes)
        if keys and total > most_bytes:
            break
        keys.append(int(row.key))
    return keys


def _passages(
    connection: Connection, keys: Sequence[int]
) -> dict[int, tuple[tuple[PassageRecord, str], ...]]:
    """Records and headings of documents' passages in reading order, by the document's key."""
    names = PassageRecord.__dataclass_fields__
    found: dict[int, list[tuple[PassageRecord, str]]] = {}
    for chunk in chunks(keys):
        query = select(passages, documents.c.id.label("document_id")).join(documents)
        rows = connection.execute(
            query.where(passages.c.document.in_(chunk)).order_by(passages.c.document, passages.c.ordinal)
        )
        for row in rows:
            if passage_rows.is_sound(row):
                record = PassageRecord(**{name: getattr(row, name) for name in names})
                found.setdefault(row.document, []).append((record, row.header))
    return {key: tuple(of) for key, of in found.items()}


def _earlier(connection: Connection, key: int, current: Document) -> tuple[OldVersion, ...]:
    if current.version == 1:
        return ()
    query = select(versions).where(versions.c.document == key).order_by(versions.c.version)
    return tuple(document_rows.read_version(row, current) for row in connection.execute(query))


def _stored(row: Any) -> StoredMessage:
    message = session_rows.read_message(row)
    return StoredMessage(
        namespace=message.namespace,
        session=message.session,
        position=message.position,
        role=message.role,
        name=message.name,
        content=message.content,
        timestamp=message.timestamp,
        created_at=row.created_at,
        key=message.key,
        document_id=message.document_id,
    )


def _insert(commit: Commit, arrivals: Sequence[Arrival], placed: Mapping[int, Placed]) -> None:
    """Insert documents as new ones, then give them their own version, dates and past."""
    if not arrivals:
        return
    keys = document_writes.insert_documents(commit, [arrival.new for arrival in arrivals], placed)
    for key, arrival in zip(keys, arrivals, strict=True):
        chosen = documents.c.key == key
        row = dict(commit.connection.execute(select(documents).where(chosen)).mappings().one())
        commit.deleted([row["hash"]])
        row |= {
            "version": arrival.version,
            "created_at": arrival.created_at,
            "updated_at": arrival.updated_at,
        }
        row["hash"] = make_stamp("document", *(row[name] for name in DOCUMENT))
        commit.connection.execute(update(documents).where(chosen).values(row))
        commit.wrote([row["hash"]])
        for version in arrival.versions:
            _insert_version(commit, key, version)


def _insert_version(commit: Commit, key: int, version: OldVersion) -> None:
    row: dict[str, Any] = {
        "document": key,
        "version": version.version,
        "text": version.text,
        "metadata": canonical(version.metadata),
        "timestamp": version.timestamp,
        "created_at": version.created_at,
        "expires_at": version.expires_at,
        "source": version.source,
        "trust": version.trust,
    }
    row["hash"] = make_stamp("version", *(row[name] for name in VERSION))
    commit.connection.execute(insert(versions).values(row))
    commit.wrote([row["hash"]])


def _write_messages(commit: Commit, arrived: Sequence[StoredMessage]) -> int:
    """Insert messages, deleting those at the same places or under the same keys; how many were deleted."""
    connection, replaced = commit.connection, 0
    for message in arrived:
        session = _session(commit, message)
        same_place = messages.c.position == message.position
        if message.key is not None:
            same_place |= messages.c.idempotency_key == message.key
        same_place &= messages.c.session == session
        old = connection.scalars(select(messages.c.hash).where(same_place)).all()
        if old:
            commit.deleted(old)
            connection.execute(delete(messages).where(same_place))
            replaced += len(old)
        row: dict[str, Any] = {
            "session": session,
            "position": message.position,
            "role": message.role,
            "name": message.name,
            "content": message.content,
            "timestamp": message.timestamp,
            "created_at": message.created_at,
            "idempotency_key": message.key,
            "document": _document_key(connection, message),
        }
        stamp = make_stamp("message", *(row[name] for name in session_rows.MESSAGE))
        connection.execute(insert(messages).values(**row, hash=stamp))
        commit.wrote([stamp])
    return replaced


def _session(commit: Commit, message: StoredMessage) -> int:
    """The row key of a message's session, begun if need be; its next position lies behind the message."""
    connection = commit.connection
    chosen = (sessions.c.namespace == message.namespace) & (sessions.c.id == message.session)
    found = connection.execute(select(sessions).where(chosen)).mappings().one_or_none()
    row: dict[str, Any] = {
        "namespace": message.namespace,
        "id": message.session,
        "created_at": message.created_at if found is None else found["created_at"],
        "next_position": message.position + 1,
    }
    if found is not None:
        if found["next_position"] > message.position:
            return int(found["key"])
        commit.deleted([found["hash"]])
    row["hash"] = make_stamp("session", *(row[name] for name in session_rows.SESSION))
    commit.wrote([row["hash"]])
    if found is None:
        done = connection.execute(insert(sessions).values(row))
        assert done.inserted_primary_key is not None
        return int(done.inserted_primary_key[0])
    connection.execute(update(sessions).where(chosen).values(row))
    return int(found["key"])


def _document_key(connection: Connection, message: StoredMessage) -> int | None:
    if message.document_id is None:
        return None
    keys = document_rows.keys(connection, message.namespace, [message.document_id])
    return keys.get(message.document_id)
