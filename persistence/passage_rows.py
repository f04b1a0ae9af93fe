"""What is read of passages: where their states lie, what changed, and their text as evidence.

A function takes the connection of its transaction. What becomes evidence is checked against its stamp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, func, select

from msa_memory.errors import CatalogDamagedError
from msa_memory.persistence import bank_rows, document_rows
from msa_memory.persistence.records import Changes, PassageRecord, PassageText
from msa_memory.persistence.stamps import fits
from msa_memory.persistence.statements import chunks
from msa_memory.persistence.tables import commits, documents, passages, tombstones
from msa_memory.types import Document

__all__ = [
    "PASSAGE",
    "PassageRecords",
    "all_rows",
    "changes",
    "drop_tombstones",
    "is_sound",
    "oldest_followed",
    "record",
    "records",
    "records_in",
    "rows",
    "texts",
]

PASSAGE = (
    "number",
    "document",
    "namespace",
    "ordinal",
    "start",
    "end",
    "tokens",
    "header",
    "length",
    "checksum",
    "added",
)
"""The columns of a passage that its stamp covers, in the stamp's order."""

_RECORDS: Select[Any] = select(*passages.c, documents.c.id).join_from(
    passages, documents, passages.c.document == documents.c.key
)
_NO_CHECKSUM = -1


def changes(connection: Connection, since: int) -> Changes:
    """What happened after generation ``since``; 0, or one before the tombstones kept, for all there is."""
    generation = bank_rows.generation(connection)
    if generation < since:
        raise CatalogDamagedError(
            f"the catalog is at generation {generation}, but generation {since} was seen before: commits "
            "are lost or an older copy was put in place; open the memory anew on a good copy"
        )
    complete = since < oldest_followed(connection)
    query = _RECORDS.order_by(passages.c.number)
    rows = connection.execute(query if complete else query.where(passages.c.added > since))
    added = tuple(map(_record, rows))
    gone = select(tombstones.c.number).where(tombstones.c.removed > since).order_by(tombstones.c.number)
    removed = () if complete else tuple(connection.scalars(gone))
    additions = select(func.count(passages.c.added.distinct())).where(passages.c.added > since)
    grew = not complete and not removed and connection.scalar(additions) == generation - since
    return Changes(generation, added, removed, complete, grew)


class PassageRecords(MutableMapping[int, PassageRecord]):
    """Records by passage number; those of rows are made, and their stamps checked, when asked for."""

    def __init__(self, found: Iterable[Row[Any]] = ()) -> None:
        self._known: dict[int, PassageRecord | Row[Any]] = {row.number: row for row in found}

    def __getitem__(self, number: int) -> PassageRecord:
        known = self._known[number]
        if not isinstance(known, PassageRecord):
            known = self._known[number] = _record(known)
        return known

    def __setitem__(self, number: int, record: PassageRecord) -> None:
        self._known[number] = record

    def __delitem__(self, number: int) -> None:
        del self._known[number]

    def __contains__(self, number: object) -> bool:
        return number in self._known

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def all_rows(connection: Connection) -> tuple[int, list[Row[Any]]]:
    """The generation and the rows of all passages, by number; nothing is checked yet."""
    return bank_rows.generation(connection), list(connection.execute(_RECORDS.order_by(passages.c.number)))


def rows(connection: Connection, numbers: Iterable[int]) -> dict[int, Row[Any]]:
    """The rows of those of the passages that exist."""
    return {
        row.number: row
        for chunk in chunks(numbers)
        for row in connection.execute(_RECORDS.where(passages.c.number.in_(chunk)))
    }


def oldest_followed(connection: Connection) -> int:
    """The first generation after which every removal has left a tombstone: that of the oldest link kept."""
    return int(connection.scalar(select(func.min(commits.c.generation))) or 1)


def drop_tombstones(connection: Connection) -> None:
    """Delete those that say nothing to whoever follows from ``oldest_followed`` on.

    The one of the highest number stays: numbers are never given out twice, whatever happens to the counter.
    """
    newest = connection.scalar(select(func.max(tombstones.c.number)))
    old = tombstones.c.removed <= oldest_followed(connection)
    connection.execute(delete(tombstones).where(old, tombstones.c.number != newest))


def records(connection: Connection, after: int, limit: int) -> list[PassageRecord]:
    """Passages by number, from the first above ``after``."""
    query = _RECORDS.where(passages.c.number > after).order_by(passages.c.number).limit(limit)
    return list(map(_record, connection.execute(query)))


def record(connection: Connection, number: int) -> PassageRecord | None:
    """One passage, None if there is none of that number."""
    row = connection.execute(_RECORDS.where(passages.c.number == number)).one_or_none()
    return None if row is None else _record(row)


def records_in(connection: Connection, names: Sequence[str]) -> list[PassageRecord]:
    """Passages whose states lie in these segments, in the order of their bytes."""
    query = _RECORDS.where(passages.c.segment.in_(names)).order_by(passages.c.segment, passages.c.offset)
    return list(map(_record, connection.execute(query)))


def texts(connection: Connection, numbers: Iterable[int]) -> dict[int, PassageText]:
    """Those of the passages that exist, with their documents' text."""
    found: dict[int, PassageText] = {}
    loaded: dict[int, Document] = {}
    for chunk in chunks(numbers):
        rows = connection.execute(select(passages).where(passages.c.number.in_(chunk))).all()
        missing = {row.document for row in rows} - loaded.keys()
        loaded.update(document_rows.find(connection, missing))
        for row in rows:
            if (document := loaded.get(row.document)) is not None:
                found[row.number] = _text(row, document)
    return found


def is_sound(row: Row[Any]) -> bool:
    """Whether a row of ``passages`` fits its stamp."""
    return fits(row.hash, "passage", *(getattr(row, name) for name in PASSAGE))


def _record(row: Row[Any], document_id: str | None = None) -> PassageRecord:
    """Where a passage's states lie. A row that is damaged gets a checksum that no block has."""
    return PassageRecord(
        row.number,
        row.namespace,
        row.id if document_id is None else document_id,
        row.ordinal,
        row.start,
        row.end,
        row.tokens,
        row.segment,
        row.offset,
        row.length,
        row.checksum if is_sound(row) else _NO_CHECKSUM,
    )


def _text(row: Row[Any], document: Document) -> PassageText:
    if not is_sound(row) or row.namespace != document.namespace:
        raise CatalogDamagedError(
            f"passage {row.number} of document {document.id!r} in namespace {document.namespace!r} is "
            "damaged in the catalog; update the document with its own text to make its passages anew"
        )
    record = _record(row, document.id)
    return PassageText(
        record=record,
        text=document.text[record.start : record.end],
        header=row.header,
        document_text=document.text,
        metadata=document.metadata,
        timestamp=document.timestamp,
        version=document.version,
        expires_at=document.expires_at,
        source=document.source,
        trust=document.trust,
    )
