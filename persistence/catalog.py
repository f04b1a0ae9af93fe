"""Every statement on a bank's catalog. A method takes the connection of the transaction it belongs to.

Knows the tables; knows no file, no lock and no transaction boundary: those are the store's. Rows read back
are checked against their hash, so a changed text or metadata is an error, never an answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Table,
    and_,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)

from msa_memory.errors import CatalogDamagedError, ConfigError
from msa_memory.persistence.attributes import attributes as flatten
from msa_memory.persistence.attributes import canonical
from msa_memory.persistence.filters import Filter, compile_filter
from msa_memory.persistence.records import (
    BankIdentity,
    Changes,
    NewDocument,
    NewPassage,
    PassageRecord,
    PassageText,
)
from msa_memory.persistence.segments import Placed, Span
from msa_memory.persistence.tables import (
    attributes,
    bank,
    documents,
    erasures,
    passages,
    segments,
    tombstones,
    versions,
)
from msa_memory.types import Document, DocumentVersion

__all__ = ["Catalog", "FORMAT_VERSION", "Removed"]

T = TypeVar("T")

FORMAT_VERSION = 1
_CHUNK = 500  # values of one IN list; SQLite allows 32,766 parameters, plans stay small with few

_RECORD = (
    passages.c.number,
    passages.c.namespace,
    documents.c.id,
    passages.c.ordinal,
    passages.c.start,
    passages.c.end,
    passages.c.tokens,
    passages.c.segment,
    passages.c.offset,
    passages.c.length,
    passages.c.checksum,
)
_RECORDS = select(*_RECORD).join_from(passages, documents, passages.c.document == documents.c.key)


class Removed(NamedTuple):
    """Rows a removal deletes, and the bytes of states it leaves to erase."""

    documents: int = 0
    versions: int = 0
    passages: int = 0
    state_bytes: int = 0


class Catalog:
    """Statements, grouped by what they are about: the bank, documents, passages, state bytes."""

    # the bank

    def create_bank(self, connection: Connection, bank_id: str) -> None:
        connection.execute(
            insert(bank).values(
                id=1,
                bank_id=bank_id,
                format_version=FORMAT_VERSION,
                model_info="{}",
                generation=0,
                next_number=0,
                next_document=0,
            )
        )

    def identity(self, connection: Connection) -> BankIdentity | None:
        """None while the bank's row is not written yet."""
        row = connection.execute(
            select(bank.c.bank_id, bank.c.format_version, bank.c.model, bank.c.fingerprint, bank.c.model_info)
        ).one_or_none()
        if row is None:
            return None
        return BankIdentity(
            row.bank_id, row.format_version, row.model, row.fingerprint, json.loads(row.model_info)
        )

    def bind_model(
        self, connection: Connection, model: str, fingerprint: str, info: Mapping[str, Any]
    ) -> None:
        connection.execute(
            update(bank).values(model=model, fingerprint=fingerprint, model_info=canonical(info))
        )

    def generation(self, connection: Connection) -> int:
        found = connection.scalar(select(bank.c.generation).where(bank.c.id == 1))
        if found is None:
            raise CatalogDamagedError("the catalog has lost its bank row; restore it from a backup")
        return int(found)

    def advance(self, connection: Connection) -> int:
        """Count one more commit; the new generation."""
        connection.execute(update(bank).values(generation=bank.c.generation + 1))
        return self.generation(connection)

    def take_numbers(self, connection: Connection, count: int) -> range:
        """Passage numbers that were never given out."""
        connection.execute(update(bank).values(next_number=bank.c.next_number + count))
        end = self.next_number(connection)
        return range(end - count, end)

    def next_number(self, connection: Connection) -> int:
        return int(connection.execute(select(bank.c.next_number)).scalar_one())

    def _take_keys(self, connection: Connection, count: int) -> range:
        connection.execute(update(bank).values(next_document=bank.c.next_document + count))
        end = int(connection.execute(select(bank.c.next_document)).scalar_one())
        return range(end - count, end)

    # documents, read

    def keys(self, connection: Connection, namespace: str, ids: Iterable[str]) -> dict[str, int]:
        """Row keys of those ids that exist, expired ones included."""
        found: dict[str, int] = {}
        for chunk in _chunks(dict.fromkeys(ids)):
            query = select(documents.c.id, documents.c.key).where(
                documents.c.namespace == namespace, documents.c.id.in_(chunk)
            )
            found.update((row.id, row.key) for row in connection.execute(query))
        return found

    def matching(
        self,
        connection: Connection,
        namespace: str | None,
        tree: Filter | None,
        expired_at: datetime | None = None,
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

    def document(self, connection: Connection, key: int) -> Document:
        return _document(connection.execute(select(documents).where(documents.c.key == key)).one())

    def documents(self, connection: Connection, keys: Iterable[int]) -> dict[int, Document]:
        found: dict[int, Document] = {}
        for chunk in _chunks(keys):
            rows = connection.execute(select(documents).where(documents.c.key.in_(chunk)))
            found.update((row.key, _document(row)) for row in rows)
        return found

    def page(
        self,
        connection: Connection,
        namespace: str,
        tree: Filter | None,
        now: datetime,
        before: int | None,
        limit: int,
    ) -> list[tuple[int, Document]]:
        """Keys and documents, newest first, below key ``before``."""
        query = select(documents).where(_visible(namespace, tree, now))
        if before is not None:
            query = query.where(documents.c.key < before)
        rows = connection.execute(query.order_by(documents.c.key.desc()).limit(limit))
        return [(row.key, _document(row)) for row in rows]

    def count(self, connection: Connection, namespace: str, tree: Filter | None, now: datetime) -> int:
        query = select(func.count()).select_from(documents).where(_visible(namespace, tree, now))
        return int(connection.execute(query).scalar_one())

    def sums(self, connection: Connection, namespace: str, now: datetime) -> tuple[int, int, int]:
        """Documents, passages and tokens a namespace shows."""
        query = select(
            func.count(),
            func.coalesce(func.sum(documents.c.passages), 0),
            func.coalesce(func.sum(documents.c.tokens), 0),
        ).where(_visible(namespace, None, now))
        count, passage_count, tokens = connection.execute(query).one()
        return int(count), int(passage_count), int(tokens)

    def namespaces(self, connection: Connection) -> tuple[str, ...]:
        query = select(documents.c.namespace).distinct().order_by(documents.c.namespace)
        return tuple(connection.scalars(query))

    def history(self, connection: Connection, key: int) -> tuple[DocumentVersion, ...]:
        """Oldest first, the current version last."""
        current = self.document(connection, key)
        query = select(versions).where(versions.c.document == key).order_by(versions.c.version)
        earlier = [_version(row, current) for row in connection.execute(query)]
        return (*earlier, _current_version(current))

    # documents, written

    def insert(
        self,
        connection: Connection,
        news: Sequence[NewDocument],
        placed: Mapping[int, Placed],
        generation: int,
        now: datetime,
    ) -> list[int]:
        """Insert documents whose ids are free; ``placed`` says where each passage number's states lie."""
        keys = self._take_keys(connection, len(news))
        rows = [
            {"key": key, "created_at": now, **_columns(new, 1, now)}
            for key, new in zip(keys, news, strict=True)
        ]
        _insert_many(connection, documents, rows)
        self._insert_parts(connection, dict(zip(keys, news, strict=True)), placed, generation)
        return list(keys)

    def replace(
        self,
        connection: Connection,
        key: int,
        new: NewDocument,
        placed: Mapping[int, Placed],
        generation: int,
        now: datetime,
    ) -> None:
        """Give a document its next version: the old text goes to ``versions``, the old passages go."""
        version = self._archive(connection, key)
        self._bury(connection, [key], generation)
        connection.execute(delete(passages).where(passages.c.document == key))
        connection.execute(delete(attributes).where(attributes.c.document == key))
        connection.execute(
            update(documents).where(documents.c.key == key).values(_columns(new, version, now))
        )
        self._insert_parts(connection, {key: new}, placed, generation)

    def replace_metadata(
        self, connection: Connection, key: int, metadata: Mapping[str, Any], now: datetime
    ) -> None:
        """Give a document its next version with other metadata; text and passages stay."""
        old = self.document(connection, key)
        version = self._archive(connection, key)
        changed = old.model_copy(update={"version": version, "metadata": json.loads(canonical(metadata))})
        connection.execute(delete(attributes).where(attributes.c.document == key))
        connection.execute(
            update(documents)
            .where(documents.c.key == key)
            .values(version=version, metadata=canonical(metadata), updated_at=now, hash=_hash(changed))
        )
        _insert_many(connection, attributes, list(_attribute_rows(key, metadata)))

    def removal(self, connection: Connection, keys: Iterable[int]) -> Removed:
        """What removing these documents would delete."""
        total = Removed()
        for chunk in _chunks(keys):
            of = passages.c.document.in_(chunk)
            texts = select(func.count()).select_from(versions).where(versions.c.document.in_(chunk))
            states = select(func.count(), func.coalesce(func.sum(passages.c.length), 0)).where(of)
            count, size = connection.execute(states).one()
            part = Removed(len(chunk), int(connection.execute(texts).scalar_one()), int(count), int(size))
            total = Removed(*map(sum, zip(total, part, strict=True)))
        return total

    def remove(self, connection: Connection, keys: Iterable[int], generation: int) -> None:
        """Delete documents with all their rows, leaving tombstones and the erasures to do."""
        connection.execute(insert(erasures).values(segment=None, offset=0, length=0))
        for chunk in _chunks(keys):
            self._bury(connection, chunk, generation)
            for table in (attributes, versions, passages):
                connection.execute(delete(table).where(table.c.document.in_(chunk)))
            connection.execute(delete(documents).where(documents.c.key.in_(chunk)))

    def _archive(self, connection: Connection, key: int) -> int:
        """Copy the current version to ``versions``; the number of the next one."""
        names = ("version", "text", "metadata", "timestamp", "expires_at", "source", "trust", "hash")
        current = select(documents.c.key, documents.c.updated_at, *(documents.c[name] for name in names))
        connection.execute(
            insert(versions).from_select(
                ("document", "created_at", *names), current.where(documents.c.key == key)
            )
        )
        version = connection.execute(select(documents.c.version).where(documents.c.key == key)).scalar_one()
        return int(version) + 1

    def _bury(self, connection: Connection, keys: Sequence[int], generation: int) -> None:
        of = passages.c.document.in_(keys)
        connection.execute(
            insert(tombstones).from_select(
                ("number", "removed"), select(passages.c.number, literal(generation)).where(of)
            )
        )
        spans = select(passages.c.segment, passages.c.offset, passages.c.length).where(of)
        connection.execute(insert(erasures).from_select(("segment", "offset", "length"), spans))

    def _insert_parts(
        self,
        connection: Connection,
        news: Mapping[int, NewDocument],
        placed: Mapping[int, Placed],
        generation: int,
    ) -> None:
        rows = [
            _passage_row(key, new.namespace, ordinal, passage, placed[passage.number], generation)
            for key, new in news.items()
            for ordinal, passage in enumerate(new.passages)
        ]
        limit = self.next_number(connection)
        if unknown := [row["number"] for row in rows if not 0 <= row["number"] < limit]:
            raise ConfigError(f"passage numbers {unknown[:5]} were never reserved; use reserve_numbers")
        _insert_many(connection, passages, rows)
        values = [row for key, new in news.items() for row in _attribute_rows(key, new.metadata)]
        _insert_many(connection, attributes, values)

    # passages

    def changes(self, connection: Connection, since: int) -> Changes:
        generation = self.generation(connection)
        if generation < since:
            raise CatalogDamagedError(
                f"the catalog is at generation {generation}, but generation {since} was seen before: commits "
                "are lost or an older copy was put in place; open the memory anew on a good copy"
            )
        query = _RECORDS.where(passages.c.added > since).order_by(passages.c.number)
        added = tuple(PassageRecord(*row) for row in connection.execute(query))
        gone = select(tombstones.c.number).where(tombstones.c.removed > since).order_by(tombstones.c.number)
        return Changes(generation, added, tuple(connection.scalars(gone)) if since else ())

    def records(self, connection: Connection, after: int, limit: int) -> list[PassageRecord]:
        """Passages by number, from the first above ``after``."""
        query = _RECORDS.where(passages.c.number > after).order_by(passages.c.number).limit(limit)
        return [PassageRecord(*row) for row in connection.execute(query)]

    def record(self, connection: Connection, number: int) -> PassageRecord | None:
        row = connection.execute(_RECORDS.where(passages.c.number == number)).one_or_none()
        return None if row is None else PassageRecord(*row)

    def visible(
        self, connection: Connection, namespace: str, tree: Filter | None, now: datetime
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Sorted passage numbers of a namespace's documents that match and have not expired."""
        query = (
            select(passages.c.number)
            .join(documents, passages.c.document == documents.c.key)
            .where(passages.c.namespace == namespace, _visible(namespace, tree, now))
            .order_by(passages.c.number)
        )
        if tree is None and not connection.scalar(select(_any_expiring(namespace))):
            query = (
                select(passages.c.number).where(passages.c.namespace == namespace).order_by(passages.c.number)
            )
        return np.fromiter(connection.scalars(query), dtype=np.int64)

    def texts(self, connection: Connection, numbers: Iterable[int]) -> dict[int, PassageText]:
        """Those of the passages that exist, with their documents' text."""
        found: dict[int, PassageText] = {}
        loaded: dict[int, Document] = {}
        for chunk in _chunks(numbers):
            query = select(*_RECORD, passages.c.header, passages.c.document).join_from(
                passages, documents, passages.c.document == documents.c.key
            )
            rows = connection.execute(query.where(passages.c.number.in_(chunk))).all()
            missing = {row.document for row in rows} - loaded.keys()
            loaded.update(self.documents(connection, missing))
            for row in rows:
                record = PassageRecord(*row[: len(_RECORD)])
                found[record.number] = _passage_text(record, row.header, loaded[row.document])
        return found

    # state bytes

    def segment_sizes(self, connection: Connection) -> dict[str, int]:
        """Committed bytes of every segment."""
        return {row.name: row.size for row in connection.execute(select(segments))}

    def grow_segments(
        self, connection: Connection, sizes: Mapping[str, int], placed: Iterable[Placed]
    ) -> None:
        """Commit appended blocks."""
        ends: dict[str, int] = {}
        for place in placed:
            ends[place.segment] = max(ends.get(place.segment, 0), place.offset + place.length)
        for name, end in ends.items():
            if name in sizes:
                connection.execute(update(segments).where(segments.c.name == name).values(size=end))
            else:
                connection.execute(insert(segments).values(name=name, size=end))

    def live_bytes(self, connection: Connection) -> dict[str, int]:
        """Bytes of blocks that passages refer to, by segment."""
        query = select(passages.c.segment, func.sum(passages.c.length)).group_by(passages.c.segment)
        return {name: int(size) for name, size in connection.execute(query)}

    def records_in(self, connection: Connection, names: Sequence[str]) -> list[PassageRecord]:
        query = _RECORDS.where(passages.c.segment.in_(names)).order_by(passages.c.segment, passages.c.offset)
        return [PassageRecord(*row) for row in connection.execute(query)]

    def move(self, connection: Connection, number: int, place: Placed) -> None:
        connection.execute(
            update(passages)
            .where(passages.c.number == number)
            .values(segment=place.segment, offset=place.offset, length=place.length, checksum=place.checksum)
        )

    def add_segment(self, connection: Connection, name: str) -> None:
        connection.execute(insert(segments).values(name=name, size=0))

    def drop_segments(self, connection: Connection, names: Sequence[str]) -> None:
        connection.execute(delete(segments).where(segments.c.name.in_(names)))

    def pending_erasures(self, connection: Connection) -> list[tuple[int, Span | None]]:
        """Erasures a removal left to do: their keys and, where there are states, their bytes."""
        return [
            (row.key, Span(row.segment, row.offset, row.length) if row.segment else None)
            for row in connection.execute(select(erasures).order_by(erasures.c.key))
        ]

    def has_erasures(self, connection: Connection) -> bool:
        return connection.scalar(select(erasures.c.key).limit(1)) is not None

    def finish_erasures(self, connection: Connection, last_key: int) -> None:
        connection.execute(delete(erasures).where(erasures.c.key <= last_key))

    # checks

    def damaged_documents(self, connection: Connection) -> Iterator[str]:
        """Sentences about documents whose rows contradict their hash or each other."""
        after = -1
        while rows := connection.execute(
            select(documents).where(documents.c.key > after).order_by(documents.c.key).limit(_CHUNK)
        ).all():
            yield from self._problems_of(connection, rows)
            after = rows[-1].key

    def _problems_of(self, connection: Connection, rows: Sequence[Row[Any]]) -> Iterator[str]:
        keys = [row.key for row in rows]
        count = select(passages.c.document, func.count()).group_by(passages.c.document)
        counted = connection.execute(count.where(passages.c.document.in_(keys)))
        counts = {int(key): int(number) for key, number in counted}
        stored = _by_document(connection, attributes, keys)
        earlier = _by_document(connection, versions, keys)
        for row in rows:
            try:
                document = _document(row)
                for version in earlier.get(row.key, ()):
                    _version(version, document)
            except CatalogDamagedError as error:
                yield str(error)
                continue
            found = {(each.path, each.kind, each.value) for each in stored.get(row.key, ())}
            if found != set(flatten(document.metadata)):
                yield f"{_name(row)}: its filter attributes differ from its metadata; update its metadata"
            if (rest := counts.get(row.key, 0)) != document.passages:
                yield f"{_name(row)}: {rest} passages recorded, expected {document.passages}; update it"


def _by_document(connection: Connection, table: Table, keys: Sequence[int]) -> dict[int, list[Row[Any]]]:
    found: dict[int, list[Row[Any]]] = {}
    for row in connection.execute(select(table).where(table.c.document.in_(keys))):
        found.setdefault(row.document, []).append(row)
    return found


def _visible(namespace: str, tree: Filter | None, now: datetime) -> ColumnElement[bool]:
    alive = or_(documents.c.expires_at.is_(None), documents.c.expires_at > now)
    return and_(documents.c.namespace == namespace, alive, compile_filter(tree))


def _any_expiring(namespace: str) -> ColumnElement[bool]:
    return exists().where(documents.c.expires_at.is_not(None), documents.c.namespace == namespace)


def _columns(new: NewDocument, version: int, now: datetime) -> dict[str, Any]:
    """A document's columns but for its key and ``created_at``."""
    values: dict[str, Any] = {
        "namespace": new.namespace,
        "id": new.id,
        "version": version,
        "text": new.text,
        "metadata": canonical(new.metadata),
        "timestamp": new.timestamp or now,
        "updated_at": now,
        "expires_at": new.expires_at,
        "source": new.source,
        "trust": new.trust,
        "passages": len(new.passages),
        "tokens": sum(passage.tokens for passage in new.passages),
    }
    return {
        **values,
        "hash": _digest(values["namespace"], values["id"], version, values["text"], values["metadata"]),
    }


def _passage_row(
    key: int, namespace: str, ordinal: int, passage: NewPassage, place: Placed, generation: int
) -> dict[str, Any]:
    return {
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


def _attribute_rows(key: int, metadata: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for path, kind, value in flatten(json.loads(canonical(metadata))):
        yield {"document": key, "path": path, "kind": kind, "value": value}


def _digest(namespace: str, id: str, version: int, text: str, metadata: str) -> str:
    hashed = hashlib.sha256()
    for part in (namespace, id, str(version), text, metadata):
        data = part.encode()
        hashed.update(len(data).to_bytes(8, "little"))
        hashed.update(data)
    return hashed.hexdigest()


def _hash(document: Document) -> str:
    return _digest(
        document.namespace, document.id, document.version, document.text, canonical(document.metadata)
    )


def _checked(row: Row[Any], namespace: str, id: str) -> dict[str, Any]:
    """The metadata of a row of ``documents`` or ``versions``, once its hash agrees."""
    try:
        found = _digest(namespace, id, row.version, row.text, row.metadata)
    except (AttributeError, TypeError, UnicodeEncodeError) as error:
        raise CatalogDamagedError(_damage(namespace, id, row)) from error
    if found != row.hash:
        raise CatalogDamagedError(_damage(namespace, id, row))
    metadata: dict[str, Any] = json.loads(row.metadata)
    return metadata


def _damage(namespace: str, id: str, row: Row[Any]) -> str:
    return (
        f"document {id!r} in namespace {namespace!r} is damaged: version {row.version} does not match its "
        "SHA-256; forget it and add it again, or restore the catalog from a backup"
    )


def _name(row: Row[Any]) -> str:
    return f"document {row.id!r} in namespace {row.namespace!r}"


def _document(row: Row[Any]) -> Document:
    return Document(
        id=row.id,
        namespace=row.namespace,
        text=row.text,
        metadata=_checked(row, row.namespace, row.id),
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


def _version(row: Row[Any], current: Document) -> DocumentVersion:
    return DocumentVersion(
        id=current.id,
        version=row.version,
        text=row.text,
        metadata=_checked(row, current.namespace, current.id),
        created_at=row.created_at,
        current=False,
    )


def _current_version(document: Document) -> DocumentVersion:
    return DocumentVersion(
        id=document.id,
        version=document.version,
        text=document.text,
        metadata=document.metadata,
        created_at=document.updated_at,
        current=True,
    )


def _passage_text(record: PassageRecord, header: str, document: Document) -> PassageText:
    return PassageText(
        record=record,
        text=document.text[record.start : record.end],
        header=header,
        document_text=document.text,
        metadata=document.metadata,
        timestamp=document.timestamp,
        version=document.version,
        expires_at=document.expires_at,
        source=document.source,
        trust=document.trust,
    )


def _insert_many(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(insert(table), rows)


def _chunks(values: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
