"""Which passages a namespace shows through a filter, kept up to date by what changed since the last look.

Knows the tables and the filter language; holds passage numbers only. The work of a look follows the number
of documents that changed or expired since, not the number there are.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from sqlalchemy import ColumnElement, Connection, Select, and_, func, select

from msa_memory.persistence import bank_rows, document_rows, passage_rows
from msa_memory.persistence.document_rows import matches, visible
from msa_memory.persistence.filters import Filter, apart_from_ids
from msa_memory.persistence.statements import chunks
from msa_memory.persistence.tables import documents, passages, tombstones

__all__ = ["Numbers", "Visibility"]

Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]

_KEPT = 64


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a namespace showed through a filter at a generation and a time."""

    generation: int
    time: datetime
    numbers: Numbers
    expiring: datetime | None
    """The next moment at which a document of the namespace expires."""


class Visibility:
    """The looks taken last, for any thread of a store."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, str], _Seen] = OrderedDict()
        self._lock = threading.Lock()

    def numbers(
        self,
        connection: Connection,
        namespace: str,
        tree: Filter | None,
        now: datetime,
    ) -> Numbers:
        """Sorted passage numbers, read-only, of the documents that match and have not expired by ``now``.

        Ids that a filter leaves out are taken off a look without them: the turns of a conversation, each of
        which leaves out what was just said, share one.
        """
        base, ids = apart_from_ids(tree)
        numbers = self._kept(connection, namespace, base, now)
        if ids:
            numbers = np.setdiff1d(numbers, _of_documents(connection, namespace, ids), assume_unique=True)
            numbers.flags.writeable = False
        return numbers

    def _kept(self, connection: Connection, namespace: str, tree: Filter | None, now: datetime) -> Numbers:
        name = (namespace, repr(tree))
        with self._lock:
            before = self._seen.get(name)
        generation = bank_rows.generation(connection)
        if before is None or before.generation > generation or before.time > now:
            seen = _look(connection, namespace, tree, now, generation)
        elif before.generation == generation and not _expires(before, now):
            return before.numbers
        elif before.generation < passage_rows.oldest_followed(connection):
            seen = _look(connection, namespace, tree, now, generation)  # removals since left no tombstones
        else:
            seen = _look_again(connection, namespace, tree, now, generation, before)
        seen.numbers.flags.writeable = False
        with self._lock:
            self._seen[name] = seen
            self._seen.move_to_end(name)
            while len(self._seen) > _KEPT:
                self._seen.popitem(last=False)
        return seen.numbers


def _expires(seen: _Seen, now: datetime) -> bool:
    return seen.expiring is not None and seen.expiring <= now


def _look(
    connection: Connection, namespace: str, tree: Filter | None, now: datetime, generation: int
) -> _Seen:
    chosen = and_(passages.c.namespace == namespace, visible(namespace, tree, now))
    numbers = _array(connection, _numbers(namespace, chosen))
    return _Seen(generation, now, numbers, _next_expiry(connection, namespace, now))


def _look_again(
    connection: Connection,
    namespace: str,
    tree: Filter | None,
    now: datetime,
    generation: int,
    before: _Seen,
) -> _Seen:
    gone = _array(connection, select(tombstones.c.number).where(tombstones.c.removed > before.generation))
    changed = documents.c.changed > before.generation
    touched = _array(connection, _numbers(namespace, changed))
    shown = _array(connection, _numbers(namespace, and_(changed, matches(tree, now))))
    numbers = before.numbers
    if _expires(before, now):
        lapsed = and_(documents.c.expires_at > before.time, documents.c.expires_at <= now)
        gone = np.concatenate([gone, _array(connection, _numbers(namespace, lapsed))])
    if len(gone) or len(touched):
        kept = np.setdiff1d(numbers, np.concatenate([gone, touched]))
        numbers = np.union1d(kept, shown)
    return _Seen(generation, now, numbers, _next_expiry(connection, namespace, now))


def _numbers(namespace: str, condition: ColumnElement[bool]) -> Select[tuple[int]]:
    """Passages of chosen documents; the namespace is compared in a form that no index serves.

    Else the planner walks the whole namespace where a few documents are chosen by what changed or expired.
    """
    inside = [table.c.namespace.concat("") == namespace for table in (passages, documents)]
    return (
        select(passages.c.number)
        .join(documents, passages.c.document == documents.c.key)
        .where(*inside, condition)
    )


def _of_documents(connection: Connection, namespace: str, ids: Iterable[str]) -> Numbers:
    found = [
        _array(connection, select(passages.c.number).where(passages.c.document.in_(keys)))
        for keys in chunks(document_rows.keys(connection, namespace, ids).values())
    ]
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _next_expiry(connection: Connection, namespace: str, now: datetime) -> datetime | None:
    later = and_(documents.c.namespace == namespace, documents.c.expires_at > now)
    found: datetime | None = connection.scalar(select(func.min(documents.c.expires_at)).where(later))
    return found


def _array(connection: Connection, query: Select[tuple[int]]) -> Numbers:
    numbers = np.fromiter(connection.scalars(query), dtype=np.int64)
    numbers.sort()
    return numbers
