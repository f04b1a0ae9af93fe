"""What is read of documents and their versions. A function takes the connection of its transaction.

Rows are checked against their stamp, so what was changed below SQL is an error that names the document,
never an answer. Knows no passage, no file and no lock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, func, or_, select

from msa_memory.errors import CatalogDamagedError, NotFoundError
from msa_memory.persistence.filters import Filter, compile_filter
from msa_memory.persistence.records import OldVersion
from msa_memory.persistence.stamps import fits
from msa_memory.persistence.statements import chunks
from msa_memory.persistence.tables import documents, sessions, versions
from msa_memory.types import Document, DocumentVersion

__all__ = [
    "DOCUMENT",
    "VERSION",
    "count",
    "document",
    "find",
    "find_all",
    "history",
    "is_sound",
    "keys",
    "keys_of",
    "matches",
    "matching",
    "namespaces",
    "old_version",
    "page",
    "read_document",
    "read_version",
    "sums",
    "visible",
]

DOCUMENT = (
    "key",
    "namespace",
    "id",
    "version",
    "text",
    "metadata",
    "timestamp",
    "created_at",
    "updated_at",
    "expires_at",
    "source",
    "trust",
    "passages",
    "tokens",
)
"""The columns of a document that its stamp covers, in the stamp's order."""

VERSION = (
    "document",
    "version",
    "text",
    "metadata",
    "timestamp",
    "created_at",
    "expires_at",
    "source",
    "trust",
)
"""The columns of an old version that its stamp covers, in the stamp's order."""


def keys(
    connection: Connection, namespace: str, ids: Iterable[str], alive_at: datetime | None = None
) -> dict[str, int]:
    """Row keys of those ids that exist; with ``alive_at`` only of those that have not expired by then.

    CatalogDamagedError where an index leads to a row that spells its id otherwise.
    """
    alive = None if alive_at is None else _alive(alive_at)
    found: dict[str, int] = {}
    for chunk in chunks(dict.fromkeys(ids)):
        asked = set(chunk)
        query = select(documents.c.id, documents.c.key, documents.c.version).where(
            documents.c.namespace == namespace, documents.c.id.in_(chunk)
        )
        for row in connection.execute(query if alive is None else query.where(alive)):
            if row.id not in asked:
                raise _damaged(namespace, row.id, row.version)
            found[row.id] = row.key
    return found


def keys_of(
    connection: Connection, names: Iterable[tuple[str, str]], alive_at: datetime | None = None
) -> dict[tuple[str, str], int]:
    """``keys`` for namespaces and ids of several namespaces."""
    by_namespace: dict[str, list[str]] = {}
    for namespace, id in names:
        by_namespace.setdefault(namespace, []).append(id)
    return {
        (namespace, id): key
        for namespace, ids in by_namespace.items()
        for id, key in keys(connection, namespace, ids, alive_at).items()
    }


def matching(
    connection: Connection, namespace: str | None, tree: Filter | None, expired_at: datetime | None = None
) -> dict[int, str]:
    """Keys and ids, oldest first, of a namespace's documents that match, expired ones included.

    None means every namespace. With ``expired_at`` only those that have expired by then.
    """
    query = select(documents.c.key, documents.c.id).where(compile_filter(tree)).order_by(documents.c.key)
    if namespace is not None:
        query = query.where(documents.c.namespace == namespace)
    if expired_at is not None:
        query = query.where(documents.c.expires_at <= expired_at)
    return {row.key: row.id for row in connection.execute(query)}


def document(connection: Connection, key: int) -> Document:
    """One document that exists."""
    return find(connection, [key])[key]


def find_all(connection: Connection, wanted: Sequence[int]) -> list[Document]:
    """Documents that exist, by row key, in the order given; one may be asked for twice."""
    found = find(connection, dict.fromkeys(wanted))
    return [found[key] for key in wanted]


def find(connection: Connection, wanted: Iterable[int]) -> dict[int, Document]:
    """Documents by row key; those that do not exist are left out."""
    found: dict[int, Document] = {}
    for chunk in chunks(wanted):
        rows = connection.execute(select(documents).where(documents.c.key.in_(chunk)))
        found.update((row.key, read_document(row)) for row in rows)
    return found


def page(
    connection: Connection,
    namespace: str,
    tree: Filter | None,
    now: datetime,
    before: int | None,
    limit: int,
) -> list[tuple[int, Document]]:
    """Keys and documents, newest first, below key ``before``."""
    query = select(documents).where(visible(namespace, tree, now))
    if before is not None:
        query = query.where(documents.c.key < before)
    rows = connection.execute(query.order_by(documents.c.key.desc()).limit(limit))
    return [(row.key, read_document(row)) for row in rows]


def count(connection: Connection, namespace: str, tree: Filter | None, now: datetime) -> int:
    """How many documents a namespace shows through a filter."""
    query = select(func.count()).select_from(documents).where(visible(namespace, tree, now))
    return int(connection.execute(query).scalar_one())


def sums(connection: Connection, namespace: str, now: datetime) -> tuple[int, int, int]:
    """Documents, passages and tokens a namespace shows."""
    query = select(
        func.count(),
        func.coalesce(func.sum(documents.c.passages), 0),
        func.coalesce(func.sum(documents.c.tokens), 0),
    ).where(visible(namespace, None, now))
    shown, passage_count, tokens = connection.execute(query).one()
    return int(shown), int(passage_count), int(tokens)


def namespaces(connection: Connection) -> tuple[str, ...]:
    """Namespaces that hold a document or a session, sorted."""
    of = [set(connection.scalars(select(table.c.namespace).distinct())) for table in (documents, sessions)]
    return tuple(sorted(set.union(*of)))


def history(connection: Connection, key: int) -> tuple[DocumentVersion, ...]:
    """Oldest first, the current version last."""
    current = document(connection, key)
    query = select(versions).where(versions.c.document == key).order_by(versions.c.version)
    earlier = [_shown(read_version(row, current), False) for row in connection.execute(query)]
    return (*earlier, _shown(_current(current), True))


def old_version(connection: Connection, key: int, version: int) -> OldVersion:
    """One version of a document; NotFoundError if it has none of that number."""
    current = document(connection, key)
    if version == current.version:
        return _current(current)
    query = select(versions).where(versions.c.document == key, versions.c.version == version)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(
            f"document {current.id!r} in namespace {current.namespace!r} has no version {version!r:.20}; "
            f"its versions are 1 to {current.version}"
        )
    return read_version(row, current)


def visible(namespace: str, tree: Filter | None, now: datetime) -> ColumnElement[bool]:
    """The condition that a document is in the namespace, matches and has not expired."""
    return and_(documents.c.namespace == namespace, matches(tree, now))


def matches(tree: Filter | None, now: datetime) -> ColumnElement[bool]:
    """The condition that a document, of whatever namespace, matches and has not expired."""
    return and_(_alive(now), compile_filter(tree))


def is_sound(row: Row[Any]) -> bool:
    """Whether a row of ``documents`` fits its stamp."""
    return fits(row.hash, "document", *(getattr(row, name) for name in DOCUMENT))


def read_document(row: Row[Any]) -> Document:
    """A row of ``documents``; CatalogDamagedError unless it fits its stamp."""
    if not is_sound(row):
        raise _damaged(row.namespace, row.id, row.version)
    return Document(
        id=row.id,
        namespace=row.namespace,
        text=row.text,
        metadata=json.loads(row.metadata),
        version=row.version,
        timestamp=row.timestamp,
        created_at=row.created_at,
        updated_at=row.updated_at,
        expires_at=row.expires_at,
        source=row.source,
        trust=row.trust,
        passages=row.passages,
        tokens=row.tokens,
    )


def read_version(row: Row[Any], current: Document) -> OldVersion:
    """A row of ``versions``; CatalogDamagedError unless it fits its stamp."""
    if not fits(row.hash, "version", *(getattr(row, name) for name in VERSION)):
        raise _damaged(current.namespace, current.id, row.version)
    return OldVersion(
        namespace=current.namespace,
        id=current.id,
        version=row.version,
        text=row.text,
        metadata=json.loads(row.metadata),
        timestamp=row.timestamp,
        created_at=row.created_at,
        expires_at=row.expires_at,
        source=row.source,
        trust=row.trust,
    )


def _current(document: Document) -> OldVersion:
    return OldVersion(
        namespace=document.namespace,
        id=document.id,
        version=document.version,
        text=document.text,
        metadata=document.metadata,
        timestamp=document.timestamp,
        created_at=document.updated_at,
        expires_at=document.expires_at,
        source=document.source,
        trust=document.trust,
    )


def _shown(version: OldVersion, current: bool) -> DocumentVersion:
    return DocumentVersion(
        id=version.id,
        version=version.version,
        text=version.text,
        metadata=version.metadata,
        created_at=version.created_at,
        current=current,
    )


def _alive(now: datetime) -> ColumnElement[bool]:
    return or_(documents.c.expires_at.is_(None), documents.c.expires_at > now)


def _damaged(namespace: object, id: object, version: object) -> CatalogDamagedError:
    return CatalogDamagedError(
        f"document {id!r:.200} in namespace {namespace!r:.200} is damaged: version {version!r:.20} does not "
        "match its SHA-256; forget it and add it again, or restore the catalog from a backup"
    )
