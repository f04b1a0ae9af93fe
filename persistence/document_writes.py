"""What is written of documents: added, given a next version, removed with everything that holds them.

Every function takes the ``Commit`` it is part of and tells it the stamps of the rows it writes and deletes.
Knows no file and no lock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, delete, func, insert, literal, select, update

from msa_memory.errors import ConfigError
from msa_memory.persistence import bank_rows, segment_rows, sessions
from msa_memory.persistence.attributes import attributes as flatten
from msa_memory.persistence.attributes import canonical
from msa_memory.persistence.document_rows import DOCUMENT, VERSION, read_document
from msa_memory.persistence.ledger import Commit
from msa_memory.persistence.passage_rows import PASSAGE
from msa_memory.persistence.records import NewDocument, NewPassage
from msa_memory.persistence.segments import Placed, Span
from msa_memory.persistence.stamps import make_stamp
from msa_memory.persistence.statements import chunks, insert_many
from msa_memory.persistence.tables import (
    attributes,
    documents,
    messages,
    passages,
    reencoded,
    tombstones,
    versions,
)

__all__ = [
    "Removed",
    "attribute_rows",
    "bury",
    "insert_documents",
    "passage_row",
    "place_anew",
    "removal",
    "remove",
    "replace",
    "replace_metadata",
    "set_expiry",
]


class Removed(NamedTuple):
    """Rows a removal deletes, and the bytes of states it leaves to erase."""

    documents: int = 0
    versions: int = 0
    passages: int = 0
    messages: int = 0
    state_bytes: int = 0


def insert_documents(commit: Commit, news: Sequence[NewDocument], placed: Mapping[int, Placed]) -> list[int]:
    """Insert documents whose ids are free; ``placed`` says where each passage number's states lie."""
    taken = bank_rows.take_keys(commit.connection, len(news))
    rows = [_row(key, new, 1, commit.time, commit) for key, new in zip(taken, news, strict=True)]
    insert_many(commit.connection, documents, rows)
    commit.wrote(row["hash"] for row in rows)
    _insert_parts(commit, dict(zip(taken, news, strict=True)), placed)
    by_namespace: dict[str, list[int]] = {}
    for key, new in zip(taken, news, strict=True):
        by_namespace.setdefault(new.namespace, []).append(key)
    for namespace, of in by_namespace.items():
        commit.note("add", namespace, of[0], len(of))
    return list(taken)


def replace(commit: Commit, key: int, new: NewDocument, placed: Mapping[int, Placed]) -> None:
    """Give a document its next version: the old text goes to ``versions``, the old passages go."""
    old = _archive(commit, key)
    bury(commit, [key])
    commit.connection.execute(delete(attributes).where(attributes.c.document == key))
    row = _row(key, new, old["version"] + 1, old["created_at"], commit)
    commit.connection.execute(update(documents).where(documents.c.key == key).values(row))
    commit.wrote([row["hash"]])
    _insert_parts(commit, {key: new}, placed)
    commit.note("replace", new.namespace, key)


def replace_metadata(commit: Commit, key: int, metadata: Mapping[str, Any]) -> None:
    """Give a document its next version with other metadata; text and passages stay."""
    row = _archive(commit, key)
    row |= {
        "version": row["version"] + 1,
        "metadata": canonical(metadata),
        "updated_at": commit.time,
        "changed": commit.generation,
    }
    row["hash"] = make_stamp("document", *(row[name] for name in DOCUMENT))
    connection = commit.connection
    connection.execute(delete(attributes).where(attributes.c.document == key))
    connection.execute(update(documents).where(documents.c.key == key).values(row))
    commit.wrote([row["hash"]])
    insert_many(connection, attributes, list(attribute_rows(key, metadata)))
    commit.note("metadata", row["namespace"], key)


def set_expiry(commit: Commit, key: int, expires_at: datetime | None) -> None:
    """Change when a document stops being visible; its version, text and passages stay."""
    found = commit.connection.execute(select(documents).where(documents.c.key == key)).one()
    read_document(found)  # a damaged one must not get a stamp that fits
    row: dict[str, Any] = found._asdict() | {"expires_at": expires_at, "changed": commit.generation}
    row["hash"] = make_stamp("document", *(row[name] for name in DOCUMENT))
    commit.connection.execute(update(documents).where(documents.c.key == key).values(row))
    commit.deleted([str(found.hash)])
    commit.wrote([row["hash"]])
    commit.note("expiry", row["namespace"], key)


def removal(connection: Connection, keys: Iterable[int]) -> Removed:
    """What removing these documents would delete."""
    total = Removed()
    for chunk in chunks(keys):
        of = passages.c.document.in_(chunk)
        states = select(func.count(), func.coalesce(func.sum(passages.c.length), 0)).where(of)
        count, size = connection.execute(states).one()
        texts, held = (
            int(
                connection.execute(
                    select(func.count()).select_from(table).where(table.c.document.in_(chunk))
                ).scalar_one()
            )
            for table in (versions, messages)
        )
        part = Removed(len(chunk), texts, int(count), held, int(size))
        total = Removed(*map(sum, zip(total, part, strict=True)))
    return total


def remove(commit: Commit, keys: Iterable[int]) -> None:
    """Delete documents with all their rows, leaving tombstones and the erasures to do."""
    segment_rows.leave(commit.connection, (), rows=True)
    for chunk in chunks(keys):
        bury(commit, chunk)
        commit.connection.execute(delete(attributes).where(attributes.c.document.in_(chunk)))
        sessions.remove_with(commit, chunk)
        _delete(commit, versions, versions.c.document, chunk)
        _delete(commit, documents, documents.c.key, chunk)


def place_anew(commit: Commit, number: int, place: Placed) -> None:
    """Refer a passage to states that were made anew, and have the old ones erased."""
    query = select(passages).where(passages.c.number == number)
    row: dict[str, Any] = {**commit.connection.execute(query).mappings().one()}
    commit.deleted([row["hash"]])
    segment_rows.leave(commit.connection, [Span(row["segment"], row["offset"], row["length"])])
    row |= place._asdict() | {"added": commit.generation}
    row["hash"] = make_stamp("passage", *(row[name] for name in PASSAGE))
    commit.connection.execute(update(passages).where(passages.c.number == number).values(row))
    commit.wrote([row["hash"]])


def attribute_rows(key: int, metadata: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of ``attributes`` for a document's metadata."""
    for path, kind, value in flatten(json.loads(canonical(metadata))):
        yield {"document": key, "path": path, "kind": kind, "value": value}


def _row(key: int, new: NewDocument, version: int, created_at: datetime, commit: Commit) -> dict[str, Any]:
    values: dict[str, Any] = {
        "key": key,
        "namespace": new.namespace,
        "id": new.id,
        "version": version,
        "text": new.text,
        "metadata": canonical(new.metadata),
        "timestamp": new.timestamp or commit.time,
        "created_at": created_at,
        "updated_at": commit.time,
        "expires_at": new.expires_at,
        "source": new.source,
        "trust": new.trust,
        "passages": len(new.passages),
        "tokens": sum(passage.tokens for passage in new.passages),
    }
    stamp = make_stamp("document", *(values[name] for name in DOCUMENT))
    return {**values, "changed": commit.generation, "hash": stamp}


def _archive(commit: Commit, key: int) -> dict[str, Any]:
    """Copy the current version to ``versions``; the document's row, which the caller writes anew."""
    found = commit.connection.execute(select(documents).where(documents.c.key == key)).one()
    read_document(found)  # a damaged one must not get a stamp that fits
    row: dict[str, Any] = found._asdict()
    old: dict[str, Any] = {name: row.get(name) for name in VERSION}
    old |= {"document": key, "created_at": row["updated_at"]}
    old["hash"] = make_stamp("version", *(old[name] for name in VERSION))
    commit.connection.execute(insert(versions).values(old))
    commit.wrote([old["hash"]])
    commit.deleted([str(found.hash)])
    return row


def bury(commit: Commit, keys: Sequence[int]) -> None:
    """Delete documents' passages, the bank's and the re-encoded, leaving tombstones and bytes to erase."""
    connection, of = commit.connection, passages.c.document.in_(keys)
    connection.execute(
        insert(tombstones).from_select(
            ("number", "removed"), select(passages.c.number, literal(commit.generation)).where(of)
        )
    )
    spans = connection.execute(select(passages.c.segment, passages.c.offset, passages.c.length).where(of))
    segment_rows.leave(connection, [Span(*row) for row in spans])
    segment_rows.drop_reencoded(connection, reencoded.c.document.in_(keys))
    _delete(commit, passages, passages.c.document, keys)


def _delete(commit: Commit, table: Table, column: Any, values: Sequence[int]) -> None:
    stamps = commit.connection.scalars(select(table.c.hash).where(column.in_(values))).all()
    commit.deleted(stamps)
    commit.connection.execute(delete(table).where(column.in_(values)))


def _insert_parts(commit: Commit, news: Mapping[int, NewDocument], placed: Mapping[int, Placed]) -> None:
    rows = [
        passage_row(key, new.namespace, ordinal, passage, placed[passage.number], commit.generation)
        for key, new in news.items()
        for ordinal, passage in enumerate(new.passages)
    ]
    limit = bank_rows.next_number(commit.connection)
    if unknown := [row["number"] for row in rows if not 0 <= row["number"] < limit]:
        raise ConfigError(f"passage numbers {unknown[:5]} were never reserved; use reserve_numbers")
    insert_many(commit.connection, passages, rows)
    commit.wrote(row["hash"] for row in rows)
    values = [row for key, new in news.items() for row in attribute_rows(key, new.metadata)]
    insert_many(commit.connection, attributes, values)


def passage_row(
    key: int, namespace: str, ordinal: int, passage: NewPassage, place: Placed, generation: int
) -> dict[str, Any]:
    """A row of ``passages`` with its stamp."""
    row: dict[str, Any] = {
        "number": passage.number,
        "document": key,
        "namespace": namespace,
        "ordinal": ordinal,
        "start": passage.start,
        "end": passage.end,
        "tokens": passage.tokens,
        "header": passage.header,
        "segment": place.segment,
        "offset": place.offset,
        "length": place.length,
        "checksum": place.checksum,
        "added": generation,
    }
    return row | {"hash": make_stamp("passage", *(row[name] for name in PASSAGE))}
