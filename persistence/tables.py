"""The tables of a bank's catalog, the same on SQLite and PostgreSQL.

No statements here: those are in ``catalog``. The schema is created and changed by ``migrations`` only; a
test holds both against each other. Text that is compared or sorted collates by code point everywhere.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import (
    BigInteger,
    Column,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

__all__ = [
    "attributes",
    "bank",
    "documents",
    "erasures",
    "metadata",
    "passages",
    "segments",
    "tombstones",
    "versions",
]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Moment(TypeDecorator[datetime]):
    """A point in time as whole microseconds since 1970 UTC: exact, sortable, the same in every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        if value is None:
            return None
        return ((value if value.tzinfo else value.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        return None if value is None else _EPOCH + value * _MICROSECOND


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
    UniqueConstraint("namespace", "id", name="documents_namespace_id"),
    Index("documents_namespace_key", "namespace", "key"),
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
)

erasures = Table(  # bytes of removed passages still to be overwritten; empty unless a forget was interrupted
    "erasures",
    metadata,
    Column("key", Key, primary_key=True),
    Column("segment", Text),  # NULL: only the database's own leftovers
    Column("offset", BigInteger, nullable=False),
    Column("length", BigInteger, nullable=False),
)
