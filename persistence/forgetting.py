"""What a forget selects, what it would remove, and its receipt.

Reads rows to plan and deletes them in a ``Commit``; the erasure of bytes is the writer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from msa_memory.errors import ConfigError, NotFoundError
from msa_memory.persistence import document_rows, document_writes, ledger, sessions
from msa_memory.persistence.filters import parse_filter
from msa_memory.persistence.ledger import Commit
from msa_memory.types import ForgetReceipt

__all__ = [
    "COPIES",
    "SERVER_COPIES",
    "Selection",
    "not_found",
    "select_by",
    "select_expired",
    "select_namespace",
    "select_session",
]

COPIES = "copies made before: exports, forks, backups, snapshots, and what an open reader has in memory"
SERVER_COPIES = "PostgreSQL's write-ahead log and its archives, planner statistics, replicas and dumps"


@dataclass(frozen=True, slots=True)
class Selection:
    """Documents to remove, by row key, and the sessions that go whole."""

    namespace: str
    documents: Mapping[int, str]
    session: str | None = None
    """A session that goes with all its messages."""
    everything: bool = False
    """The whole namespace, with all sessions and its name in the events."""
    extra_messages: int = 0
    """Messages that no selected document holds."""

    def is_empty(self) -> bool:
        """Whether there is nothing to remove."""
        return not self.documents and not self.extra_messages and self.session is None

    def plan(self, connection: Connection) -> ForgetReceipt:
        """The receipt of a dry run."""
        removed = document_writes.removal(connection, self.documents)
        return ForgetReceipt(
            ids=tuple(self.documents.values()),
            counts={
                "documents": removed.documents,
                "versions": removed.versions,
                "passages": removed.passages,
                "messages": removed.messages + self.extra_messages,
            },
            bytes_erased=removed.state_bytes,
            masked_at=None,
            erased_at=None,
            dry_run=True,
        )

    def remove(self, commit: Commit) -> None:
        """Delete the rows."""
        document_writes.remove(commit, self.documents)
        if self.everything:
            sessions.remove(commit, self.namespace)
            ledger.forget_name(commit.connection, self.namespace)
        elif self.session is not None:
            sessions.remove(commit, self.namespace, self.session)
        only = next(iter(self.documents)) if len(self.documents) == 1 else None
        commit.note("forget", None if self.everything else self.namespace, only, len(self.documents))


def select_by(
    connection: Connection, namespace: str, ids: Iterable[str] | None, where: Mapping[str, Any] | None
) -> Selection:
    """By ids or by filter, expired documents included; NotFoundError for an unknown id.

    ConfigError unless exactly one of them is given and not empty.
    """
    wanted = None if ids is None else [ids] if isinstance(ids, str) else list(dict.fromkeys(ids))
    if (wanted is None) == (where is None) or not (wanted or where):
        raise ConfigError(
            "forget needs exactly one of ids (not empty) and where (not empty); "
            "to remove everything use forget_namespace"
        )
    if wanted is None:
        return Selection(namespace, document_rows.matching(connection, namespace, parse_filter(where)))
    keys = document_rows.keys(connection, namespace, wanted)
    if missing := [id for id in wanted if id not in keys]:
        raise not_found(namespace, missing)
    return Selection(namespace, {keys[id]: id for id in wanted})


def select_expired(connection: Connection, namespace: str, now: datetime) -> Selection:
    """The documents of a namespace that have expired by ``now``."""
    return Selection(namespace, document_rows.matching(connection, namespace, None, expired_at=now))


def select_session(connection: Connection, namespace: str, session: str) -> Selection:
    """A session and the documents that hold its messages; NotFoundError if there is none."""
    held = sessions.document_keys(connection, namespace, session)
    if held is None:
        raise NotFoundError(f"no session {session!r:.200} in namespace {namespace!r}; see sessions()")
    return Selection(
        namespace, held, session, False, sessions.count(connection, namespace, session) - len(held)
    )


def select_namespace(connection: Connection, namespace: str) -> Selection:
    """Everything in a namespace; NotFoundError if there is nothing."""
    selected = document_rows.matching(connection, namespace, None)
    held = document_writes.removal(connection, selected).messages
    names = sessions.names(connection, namespace)
    messages = sum(sessions.count(connection, namespace, name) for name in names)
    if not selected and not names:
        raise NotFoundError(f"namespace {namespace!r} holds no documents; see namespaces()")
    return Selection(namespace, selected, None, True, messages - held)


def not_found(namespace: str, ids: list[str]) -> NotFoundError:
    """The error for ids that are not there."""
    shown = ", ".join(f"{id!r:.200}" for id in ids[:5]) + (
        f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    )
    return NotFoundError(f"no document {shown} in namespace {namespace!r}; see list()")
