"""What is wrong with a catalog's rows, in sentences, and what of it can be put right without a backup.

Reads every row once. Knows no file: states are checked by the store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Table, delete, insert, literal, not_, select

from msa_memory.errors import CatalogDamagedError
from msa_memory.persistence import passage_rows, segment_rows, sessions
from msa_memory.persistence.attributes import attributes as flatten
from msa_memory.persistence.document_rows import is_sound, read_document, read_version
from msa_memory.persistence.document_writes import attribute_rows
from msa_memory.persistence.ledger import Commit, accept, chain_problems
from msa_memory.persistence.statements import CHUNK, insert_many
from msa_memory.persistence.tables import attributes, documents, erasures, passages, tombstones, versions

__all__ = ["damaged_documents", "lost_or_inconsistent", "mend"]


def damaged_documents(connection: Connection) -> Iterator[str]:
    """Documents with their parts, sessions and messages that do not fit their stamp or lack a part."""
    yield from sessions.problems(connection)
    for rows in _all_documents(connection):
        earlier = _of(connection, versions, rows)
        parts = _of(connection, passages, rows)
        for row in rows:
            try:
                document = read_document(row)
                for version in earlier.get(row.key, ()):
                    read_version(version, document)
            except CatalogDamagedError as error:
                yield str(error)
                continue
            ordinals = sorted(part.ordinal for part in parts.get(row.key, ()))
            if ordinals != list(range(document.passages)):
                yield (
                    f"{_name(row)}: {len(ordinals)} passages recorded, expected {document.passages}; update "
                    "the document with its own text to make them anew"
                )
            for part in parts.get(row.key, ()):
                if not passage_rows.is_sound(part) or part.namespace != row.namespace:
                    yield (
                        f"{_name(row)}: passage {part.number} is damaged in the catalog; update the document "
                        "with its own text to make its passages anew"
                    )


def lost_or_inconsistent(connection: Connection) -> Iterator[str]:
    """What reading would not notice: rows that are gone or back, and filters that match other documents."""
    yield from chain_problems(connection)
    for rows in _all_documents(connection):
        stored = _of(connection, attributes, rows)
        for row in rows:
            if not is_sound(row):
                continue
            if not _agree(stored.get(row.key, ()), row):
                yield f"{_name(row)}: its filter attributes differ from its metadata; run verify with repair"
    for number, key in connection.execute(select(passages.c.number, passages.c.document).where(_orphaned())):
        yield f"passage {number} belongs to document number {key}, which is missing; run verify with repair"
    for read in (segment_rows.sizes, segment_rows.pending):
        try:
            read(connection)
        except CatalogDamagedError as error:
            yield str(error)


def mend(commit: Commit, on_disk: dict[str, int]) -> None:
    """Derive again what can be derived, drop what belongs to nothing, and accept the rows that are left.

    ``on_disk``: bytes of every segment file. Damaged documents stay damaged.
    """
    connection = commit.connection
    known = passages.c.number.in_(select(tombstones.c.number))
    lost = select(passages.c.number, literal(commit.generation)).where(_orphaned(), not_(known))
    connection.execute(insert(tombstones).from_select(("number", "removed"), lost))
    connection.execute(delete(passages).where(_orphaned()))
    for rows in _all_documents(connection):
        stored = _of(connection, attributes, rows)
        for row in rows:
            _mend_attributes(connection, row, stored.get(row.key, ()))
    connection.execute(delete(attributes).where(not_(attributes.c.document.in_(select(documents.c.key)))))
    try:
        segment_rows.sizes(connection)
    except CatalogDamagedError:
        segment_rows.reset_sizes(connection, on_disk)
    try:
        segment_rows.pending(connection)
    except CatalogDamagedError:  # compact erases these bytes with their segments
        connection.execute(delete(erasures))
    accept(commit)


def _mend_attributes(connection: Connection, row: Row[Any], stored: Sequence[Row[Any]]) -> None:
    if is_sound(row) and not _agree(stored, row):
        connection.execute(delete(attributes).where(attributes.c.document == row.key))
        insert_many(connection, attributes, list(attribute_rows(row.key, json.loads(row.metadata))))


def _agree(stored: Sequence[Row[Any]], row: Row[Any]) -> bool:
    """Whether these attributes follow from a sound document's metadata."""
    found = sorted((each.path, each.kind, each.value) for each in stored)
    return found == sorted(flatten(json.loads(row.metadata)))


def _all_documents(connection: Connection) -> Iterator[Sequence[Row[Any]]]:
    after = -(1 << 62)
    query = select(documents).order_by(documents.c.key).limit(CHUNK)
    while rows := connection.execute(query.where(documents.c.key > after)).all():
        yield rows
        after = rows[-1].key


def _of(connection: Connection, table: Table, rows: Sequence[Row[Any]]) -> dict[int, list[Row[Any]]]:
    """The rows of another table that belong to these documents, by document."""
    found: dict[int, list[Row[Any]]] = {}
    keys = [row.key for row in rows]
    for each in connection.execute(select(table).where(table.c.document.in_(keys))):
        found.setdefault(each.document, []).append(each)
    return found


def _orphaned() -> Any:
    return not_(passages.c.document.in_(select(documents.c.key)))


def _name(row: Row[Any]) -> str:
    return f"document {row.id!r} in namespace {row.namespace!r}"
