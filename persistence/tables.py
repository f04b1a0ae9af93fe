"""The tables of a bank's catalog, the same on SQLite and PostgreSQL.

No statements here: those are in ``catalog``. The schema is created and changed by ``migrations`` only; a
test holds both against each other. Text that is compared or sorted collates by code point everywhere.
A ``hash`` is a salted stamp over the other columns of its row: see ``stamps``.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

from msa_memory.persistence.stamps import microseconds

__all__ = [
    "attributes",
    "bank",
    "commits",
    "documents",
    "erasures",
    "events",
    "messages",
    "metadata",
    "passages",
    "reencoded",
    "segments",
    "sessions",
    "tombstones",
    "versions",
]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNREADABLE = datetime.max.replace(tzinfo=UTC)


class Moment(TypeDecorator[datetime]):
    """A point in time as whole microseconds since 1970 UTC: exact, sortable, the same in every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        return None if value is None else microseconds(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        try:
            return _EPOCH + timedelta(microseconds=value)
        except (OverflowError, TypeError):  # a damaged row, which its stamp then shows
            return _UNREADABLE


def _stamp() -> Column[str]:
    return Column("hash", Text, nullable=False, server_default="")


Name = Text().with_variant(Text(collation="C"), "postgresql")
Key = BigInteger().with_variant(Integer(), "sqlite")

metadata = MetaData()

bank = Table(
    "bank",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # always 1: a catalog holds one bank
    Column("bank_id", Text, nullable=False),
    Column("format_version", Integer, nullable=False),
    Column("model", Text),
    Column("fingerprint", Text),
    Column("model_info", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),  # counts committed writes
    Column("next_number", BigInteger, nullable=False),
    Column("next_document", BigInteger, nullable=False),
    _stamp(),  # over the identity, not over the three counters
)

commits = Table(  # the chain of commits: see ledger.py
    "commits",
    metadata,
    Column("generation", Key, primary_key=True, autoincrement=False),
    Column("added", LargeBinary, nullable=False),  # sum of the stamps of the rows it wrote
    Column("removed", LargeBinary, nullable=False),  # sum of the stamps of the rows it deleted
    Column("digest", LargeBinary, nullable=False),  # covers this row and the digest before it
)

events = Table(  # who changed what and when; no text, no id and nothing derived from them
    "events",
    metadata,
    Column("sequence", Key, primary_key=True),
    Column("generation", BigInteger, nullable=False),  # the commit it belongs to
    Column("time", Moment, nullable=False),
    Column("actor", Text, nullable=False),  # host:process id
    Column("namespace", Name),  # NULL: the whole bank, or a namespace that was forgotten
    Column("kind", Text, nullable=False),
    Column("document", BigInteger),  # documents.key of the first of them, NULL for a selection
    Column("count", BigInteger, nullable=False),
    Index("events_namespace", "namespace", "sequence"),
)

documents = Table(
    "documents",
    metadata,
    Column("key", Key, primary_key=True, autoincrement=False),  # grows in the order of adding, never reused
    Column("namespace", Name, nullable=False),
    Column("id", Name, nullable=False),
    Column("version", Integer, nullable=False),
    Column("text", Text, nullable=False),
    Column("metadata", Text, nullable=False),  # canonical JSON
    Column("timestamp", Moment, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
    Column("expires_at", Moment),
    Column("source", Name),
    Column("trust", Name),
    Column("passages", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("hash", Text, nullable=False),
    Column("changed", BigInteger, nullable=False, server_default="0"),  # generation of the last write to it
    UniqueConstraint("namespace", "id", name="documents_namespace_id"),
    Index("documents_namespace_key", "namespace", "key"),
    Index("documents_changed", "changed"),
    Index("documents_expires_at", "expires_at"),
)


def _document() -> ForeignKey:
    return ForeignKey("documents.key", ondelete="CASCADE")


versions = Table(
    "versions",
    metadata,
    Column("document", Key, _document(), primary_key=True, autoincrement=False),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("text", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("timestamp", Moment, nullable=False),
    Column("created_at", Moment, nullable=False),  # when this version was written
    Column("expires_at", Moment),
    Column("source", Name),
    Column("trust", Name),
    Column("hash", Text, nullable=False),
)

passages = Table(
    "passages",
    metadata,
    Column("number", Key, primary_key=True, autoincrement=False),
    Column("document", Key, _document(), nullable=False),
    Column("namespace", Name, nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("start", Integer, nullable=False),
    Column("end", Integer, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("header", Text, nullable=False),
    Column("segment", Text, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("length", BigInteger, nullable=False),
    Column("checksum", BigInteger, nullable=False),
    Column("added", BigInteger, nullable=False),  # generation of the write that brought it
    _stamp(),  # not over the place of its states, which compacting changes
    Index("passages_document", "document", "ordinal"),
    Index("passages_added", "added"),
    Index("passages_namespace", "namespace", "number"),
)

attributes = Table(  # metadata taken apart, for filters: see attributes.py
    "attributes",
    metadata,
    Column("key", Key, primary_key=True),
    Column("document", Key, _document(), nullable=False),
    Column("path", Name, nullable=False),
    Column("kind", Text, nullable=False),
    Column("value", Name, nullable=False),
    Index("attributes_document", "document"),
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("number", Key, primary_key=True, autoincrement=False),
    Column("removed", BigInteger, nullable=False),  # generation of the write that removed it
    Index("tombstones_removed", "removed"),
)

segments = Table(
    "segments",
    metadata,
    Column("name", Text, primary_key=True),
    Column("size", BigInteger, nullable=False),  # committed bytes; what lies beyond is a crashed write
    _stamp(),
)

erasures = Table(  # bytes of removed passages still to be overwritten; empty unless a forget was interrupted
    "erasures",
    metadata,
    Column("key", Key, primary_key=True),
    Column("segment", Text),  # NULL: only the database's own leftovers
    Column("offset", BigInteger, nullable=False),
    Column("length", BigInteger, nullable=False),
    _stamp(),
)

sessions = Table(
    "sessions",
    metadata,
    Column("key", Key, primary_key=True),
    Column("namespace", Name, nullable=False),
    Column("id", Name, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("next_position", Integer, nullable=False),  # positions are never given out twice
    _stamp(),
    UniqueConstraint("namespace", "id", name="sessions_namespace_id"),
)

messages = Table(  # a forgotten document takes the message it holds along; the position stays a gap
    "messages",
    metadata,
    Column("key", Key, primary_key=True),
    Column("session", Key, ForeignKey("sessions.key", ondelete="CASCADE"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("role", Text, nullable=False),
    Column("name", Name),
    Column("content", Text, nullable=False),
    Column("timestamp", Moment, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("idempotency_key", Name),
    Column("document", Key, _document()),  # NULL: not in the memory, as system messages
    _stamp(),
    UniqueConstraint("session", "position", name="messages_session_position"),
    UniqueConstraint("session", "idempotency_key", name="messages_session_idempotency_key"),
    Index("messages_document", "document"),
)

reencoded = Table(  # passages encoded for another model, not yet the bank's: see reencoding.py
    "reencoded",
    metadata,
    Column("number", Key, primary_key=True, autoincrement=False),
    Column("document", Key, _document(), nullable=False),
    Column("version", Integer, nullable=False),  # of the document, when it was encoded
    Column("fingerprint", Text, nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("start", Integer, nullable=False),
    Column("end", Integer, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("header", Text, nullable=False),
    Column("segment", Text, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("length", BigInteger, nullable=False),
    Column("checksum", BigInteger, nullable=False),
    Index("reencoded_document", "document", "ordinal"),
)
