"""One commit and the chain of all of them: which rows each wrote and deleted, by whom and when.

A commit's digest covers the digest before it and the sums of the stamps of the rows it wrote and deleted.
What all commits wrote, less what they deleted, is what the tables must hold: a commit that was dropped,
altered or undone below SQL does not add up. Knows no document; holds no text and no id.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy import Connection, Table, delete, func, insert, select, update

from msa_memory.errors import CatalogDamagedError
from msa_memory.persistence import bank_rows
from msa_memory.persistence.records import Event
from msa_memory.persistence.stamps import MODULUS, add_up
from msa_memory.persistence.tables import commits, documents, events, messages, passages, sessions, versions

__all__ = [
    "CHAINED",
    "Commit",
    "accept",
    "chain_problems",
    "digest_at",
    "fold",
    "forget_name",
    "read_events",
]

CHAINED: tuple[Table, ...] = (documents, versions, passages, sessions, messages)
"""Tables whose rows add up to what the chain says; every write to them goes through a ``Commit``."""

_SUM_BYTES = 32


@dataclass(slots=True)
class Commit:
    """A transaction under the writer lock, with the number and the time of the commit it becomes."""

    connection: Connection
    generation: int
    time: datetime
    digest: bytes = b""
    """What the chain ends with, once ``close`` was called."""
    _added: int = 0
    _removed: int = 0
    _events: list[Event] = field(default_factory=list)

    @classmethod
    def begin(cls, connection: Connection) -> Commit:
        """Count one more commit."""
        return cls(connection, bank_rows.advance(connection), datetime.now(UTC))

    def wrote(self, stamps: Iterable[str]) -> None:
        """Stamps of rows that were inserted, or that updated rows have now."""
        self._added = (self._added + add_up(stamps)) % MODULUS

    def deleted(self, stamps: Iterable[str]) -> None:
        """Stamps of rows that were deleted, or that updated rows had before."""
        self._removed = (self._removed + add_up(stamps)) % MODULUS

    def note(self, kind: str, namespace: str | None, document: int | None = None, count: int = 1) -> None:
        """An event of this commit; ``document`` is a row key, never an id."""
        event = Event(self.generation, self.time, _actor(), namespace, kind, document, count)
        self._events.append(event)

    def close(self) -> None:
        """Write the link of the chain and the events; the last thing before SQL's own commit."""
        sums = tuple(value.to_bytes(_SUM_BYTES, "big") for value in (self._added, self._removed))
        before = digest_at(self.connection, self.generation - 1) or _start(self.connection)
        self.digest = _link(before, self.generation, *sums)
        self.connection.execute(
            insert(commits).values(
                generation=self.generation, added=sums[0], removed=sums[1], digest=self.digest
            )
        )
        if self._events:
            names = ("generation", "time", "actor", "namespace", "kind", "document", "count")
            rows = [{name: getattr(event, name) for name in names} for event in self._events]
            self.connection.execute(insert(events), rows)


def digest_at(connection: Connection, generation: int) -> bytes | None:
    """The chain's digest at a commit; None before the first one that is kept."""
    found: bytes | None = connection.scalar(
        select(commits.c.digest).where(commits.c.generation == generation)
    )
    return found


def chain_problems(connection: Connection) -> Iterator[str]:
    """Sentences about links that do not follow from the one before, and about rows that do not add up."""
    rows = connection.execute(select(commits).order_by(commits.c.generation)).all()
    generation = bank_rows.generation(connection)
    digest, last, total = None, None, 0
    for row in rows:
        if last is not None and row.generation != last + 1:
            yield f"the chain of commits misses commits {last + 1} to {row.generation - 1}; {_RESTORE}"
        elif digest is not None and row.digest != _link(digest, row.generation, row.added, row.removed):
            yield f"commit {row.generation} is not what was acknowledged; {_RESTORE}"
        digest, last = row.digest, row.generation
        total += int.from_bytes(row.added, "big") - int.from_bytes(row.removed, "big")
    if (last or 0) != generation:
        yield f"the chain ends at commit {last or 0}, the catalog counts {generation}; {_RESTORE}"
    if total % MODULUS != _live_sum(connection):
        yield (
            "the rows of documents, versions, passages and messages are not those the commits left: some "
            f"were lost, altered or brought back; {_RESTORE}"
        )


def _live_sum(connection: Connection) -> int:
    """The sum of the stamps that the chained tables hold now."""
    return sum(add_up(connection.scalars(select(table.c.hash))) for table in CHAINED) % MODULUS


def fold(commit: Commit) -> None:
    """Replace all earlier links by one that stands for them, so that the chain does not grow for ever."""
    connection, last = commit.connection, commit.generation - 1
    kept = select(func.count()).select_from(commits).where(commits.c.generation <= last)
    if int(connection.execute(kept).scalar_one()) < 2:
        return
    _replace_links(connection, last, _total(connection), digest_at(connection, last) or b"")


def accept(commit: Commit) -> None:
    """Start the chain anew from the rows as they are, after a damage that nothing can repair."""
    connection, last = commit.connection, commit.generation - 1
    total = _live_sum(connection) - commit._added + commit._removed
    _replace_links(connection, last, total % MODULUS, digest_at(connection, last) or _start(connection))


def read_events(connection: Connection, namespace: str | None, limit: int) -> tuple[Event, ...]:
    """The newest events, newest first; of one namespace, or of the whole bank."""
    query = select(
        events.c.generation,
        events.c.time,
        events.c.actor,
        events.c.namespace,
        events.c.kind,
        events.c.document,
        events.c.count,
    )
    if namespace is not None:
        query = query.where(events.c.namespace == namespace)
    rows = connection.execute(query.order_by(events.c.sequence.desc()).limit(limit))
    return tuple(Event(*row) for row in rows)


def forget_name(connection: Connection, namespace: str) -> None:
    """Take a namespace's name out of its events."""
    connection.execute(update(events).where(events.c.namespace == namespace).values(namespace=None))


def _total(connection: Connection) -> int:
    rows = connection.execute(select(commits.c.added, commits.c.removed))
    return sum(int.from_bytes(row.added, "big") - int.from_bytes(row.removed, "big") for row in rows)


def _replace_links(connection: Connection, generation: int, total: int, digest: bytes) -> None:
    connection.execute(delete(commits))
    added, removed = (value.to_bytes(_SUM_BYTES, "big") for value in (total % MODULUS, 0))
    connection.execute(
        insert(commits).values(generation=generation, added=added, removed=removed, digest=digest)
    )


def _start(connection: Connection) -> bytes:
    identity = bank_rows.identity(connection)
    if identity is None:
        raise CatalogDamagedError("the catalog has lost its bank row; restore it from a backup")
    return hashlib.sha256(identity.bank_id.encode()).digest()


def _link(before: bytes, generation: int, added: bytes, removed: bytes) -> bytes:
    return hashlib.sha256(before + generation.to_bytes(8, "big") + added + removed).digest()


def _actor() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


_RESTORE = "restore the bank's folder from a backup, or accept what is there with verify and repair"
