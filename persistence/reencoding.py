"""Passages encoded for another model, kept beside the bank's own until all of them change places at once.

Until then they are invisible and the bank works as before. They go with their document: what removes or
replaces a document's passages takes these along. Knows rows and blocks, no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, bindparam, delete, func, select, update

from msa_memory.errors import ConflictError
from msa_memory.persistence import bank_rows, document_rows, document_writes, segment_rows
from msa_memory.persistence.document_rows import DOCUMENT
from msa_memory.persistence.ledger import Commit
from msa_memory.persistence.records import NewDocument, NewPassage
from msa_memory.persistence.segments import Placed
from msa_memory.persistence.stamps import make_stamp
from msa_memory.persistence.statements import chunks, insert_many
from msa_memory.persistence.store import Store
from msa_memory.persistence.tables import documents, passages, reencoded
from msa_memory.types import Document

__all__ = ["Reencoding", "Waiting"]

_CHANGED = ("passages", "tokens", "hash")


class Waiting(NamedTuple):
    """A document that the new model has not read yet, and the heading it was first read with."""

    key: int
    document: Document
    header: str


class Reencoding:
    """Moves an open store's bank to the model with ``fingerprint``."""

    def __init__(self, store: Store, fingerprint: str) -> None:
        self._store, self._fingerprint = store, fingerprint

    def start(self) -> int:
        """Drop what was made for another model; how many documents there are."""
        other = reencoded.c.fingerprint != self._fingerprint
        store = self._store
        with store._reading() as connection:
            total = int(connection.execute(select(func.count()).select_from(documents)).scalar_one())
            stale = connection.scalar(select(reencoded.c.number).where(other).limit(1)) is not None
        if stale:
            with store._writing():
                with store._writer.commit() as commit:
                    segment_rows.drop_reencoded(commit.connection, other)
                store._writer.erase()
        return total

    def waiting(self, limit: int) -> list[Waiting]:
        """The oldest documents that are still to be read, in every namespace; expired ones too."""
        query = select(documents.c.key).where(self._unread()).order_by(documents.c.key).limit(limit)
        with self._store._reading() as connection:
            found = document_rows.find(connection, connection.scalars(query).all())
            headers = {
                row.document: row.header
                for row in connection.execute(
                    select(passages.c.document, passages.c.header).where(
                        passages.c.document.in_(found), passages.c.ordinal == 0
                    )
                )
            }
        return [Waiting(key, found[key], headers.get(key, "")) for key in sorted(found)]

    def count_waiting(self) -> int:
        """How many documents are still to be read."""
        query = select(func.count()).select_from(documents).where(self._unread())
        with self._store._reading() as connection:
            return int(connection.execute(query).scalar_one())

    def put(self, done: Sequence[tuple[Waiting, Sequence[NewPassage]]]) -> None:
        """Keep the new passages of documents; those of a document that changed meanwhile are let go."""
        store = self._store
        with store._writing() as sizes:
            with store._reading() as connection:
                self._refuse_other(connection)
                keys = [waiting.key for waiting, _ in done]
                query = select(documents.c.key, documents.c.version).where(documents.c.key.in_(keys))
                now = {row.key: row.version for row in connection.execute(query)}
            kept = [(old, new) for old, new in done if now.get(old.key) == old.document.version]
            placed = store._writer.append([_bare(*each) for each in kept], sizes, self._fingerprint)
            with store._writer.commit() as commit:
                segment_rows.grow(commit.connection, sizes, placed.values())
                segment_rows.drop_reencoded(
                    commit.connection, reencoded.c.document.in_([old.key for old, _ in kept])
                )
                rows = [row for old, new in kept for row in self._rows(old, new, placed)]
                insert_many(commit.connection, reencoded, rows)

    def finish(self, model: str, info: Mapping[str, Any]) -> bool:
        """Make the new passages the bank's and the new model its model, in one commit.

        False, and nothing is changed, while documents are waiting.
        """
        store = self._store
        with store._writing():
            if self.count_waiting():
                return False
            store._model()  # still the one it was
            with store._writer.commit() as commit:
                keys = commit.connection.scalars(select(documents.c.key)).all()
                for chunk in chunks(keys):
                    _swap(commit, chunk)
                bank_rows.bind_model(commit.connection, model, self._fingerprint, info)
                commit.note("reencode", None, None, len(keys))
            with store._reading() as connection:
                store._identity = bank_rows.identity(connection) or store._identity
            store._writer.erase()
            return True

    def _refuse_other(self, connection: Connection) -> None:
        """ConflictError once another process began to move the bank to a third model."""
        other = select(reencoded.c.number).where(reencoded.c.fingerprint != self._fingerprint).limit(1)
        if connection.scalar(other) is not None:
            raise ConflictError(
                "the bank is being moved to another model by somebody else; this move has stopped, start it "
                "again when that one is through"
            )

    def _unread(self) -> ColumnElement[bool]:
        read = select(reencoded.c.number).where(
            reencoded.c.document == documents.c.key,
            reencoded.c.version == documents.c.version,
            reencoded.c.fingerprint == self._fingerprint,
        )
        return ~read.exists()

    def _rows(
        self, old: Waiting, new: Sequence[NewPassage], placed: Mapping[int, Placed]
    ) -> list[dict[str, Any]]:
        return [
            {
                "number": passage.number,
                "document": old.key,
                "version": old.document.version,
                "fingerprint": self._fingerprint,
                "ordinal": ordinal,
                "start": passage.start,
                "end": passage.end,
                "tokens": passage.tokens,
                "header": passage.header,
                **placed[passage.number]._asdict(),
            }
            for ordinal, passage in enumerate(new)
        ]


def _bare(waiting: Waiting, new: Sequence[NewPassage]) -> NewDocument:
    document = waiting.document
    return NewDocument(id=document.id, namespace=document.namespace, text=document.text, passages=new)


def _swap(commit: Commit, keys: Sequence[int]) -> None:
    """Bury the passages of documents and put the new ones in their places."""
    connection, of = commit.connection, reencoded.c.document.in_(keys)
    rows = connection.execute(select(reencoded).where(of).order_by(reencoded.c.document, reencoded.c.ordinal))
    fresh: dict[int, list[Any]] = {}
    for row in rows.all():
        fresh.setdefault(row.document, []).append(row)
    connection.execute(delete(reencoded).where(of))  # before burying, which would erase their bytes
    document_writes.bury(commit, keys)
    changed, added = [], []
    for found in connection.execute(select(documents).where(documents.c.key.in_(keys))).mappings().all():
        new = fresh[found["key"]]
        commit.deleted([found["hash"]])
        values = {**found, "passages": len(new), "tokens": sum(row.tokens for row in new)}
        values["hash"] = make_stamp("document", *(values[name] for name in DOCUMENT))
        commit.wrote([values["hash"]])
        changed.append({"of": found["key"], **{name: values[name] for name in _CHANGED}})
        for row in new:
            place = Placed(row.segment, row.offset, row.length, row.checksum)
            added.append(
                document_writes.passage_row(
                    found["key"], found["namespace"], row.ordinal, row, place, commit.generation
                )
            )
    statement = update(documents).where(documents.c.key == bindparam("of"))
    values = {name: bindparam(name) for name in _CHANGED}
    connection.execute(statement.values(changed=commit.generation, **values), changed)
    insert_many(connection, passages, added)
    commit.wrote(row["hash"] for row in added)
