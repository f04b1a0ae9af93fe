"""The verbs of ``Store`` on sessions: appending messages with the documents that hold them, reading."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Connection

from msa_memory.persistence import document_writes, segment_rows, sessions
from msa_memory.persistence.opened import OpenedStore, check_storable
from msa_memory.persistence.records import NewDocument
from msa_memory.persistence.sessions import NewMessage
from msa_memory.types import Message

__all__ = ["SessionVerbs"]


class SessionVerbs(OpenedStore):
    """What ``Store`` inherits; of no use on its own."""

    def append_message(self, message: NewMessage, document: NewDocument | None) -> Message:
        """Store a message as its session's newest, and the document that holds it, both or neither.

        The document's metadata gets the message's ``position``. A message whose key the session has already
        is not stored: the one that is there comes back.
        """
        if document is not None:
            check_storable(document, postgresql=not self._database.is_sqlite)

        def look(connection: Connection) -> tuple[str | None, Message | None, int]:
            stored = None
            if message.key is not None:
                stored = sessions.with_key(connection, message.namespace, message.session, message.key)
            position = sessions.next_position(connection, message.namespace, message.session)
            return self._check_model(connection), stored, position

        with self._writing_after(look) as (sizes, (fingerprint, stored, position)):
            if stored is not None:
                return stored
            news = [] if document is None else [_at(document, position)]
            placed = self._writer.append(news, sizes, fingerprint)
            with self._writer.commit() as commit:
                segment_rows.grow(commit.connection, sizes, placed.values())
                keys = document_writes.insert_documents(commit, news, placed)
                sessions.append(commit, message, keys[0] if keys else None)
                commit.note("message", message.namespace, keys[0] if keys else None)
            self._writer.drop_staged(news)
            return Message(
                session=message.session,
                namespace=message.namespace,
                position=position,
                role=message.role,
                name=message.name,
                content=message.content,
                timestamp=message.timestamp,
                key=message.key,
                document_id=None if document is None else document.id,
            )

    def message(self, namespace: str, session: str, key: str) -> Message | None:
        """The message that was appended to a session under an idempotency key, if there is one."""
        with self._reading() as connection:
            return sessions.with_key(connection, namespace, session, key)

    def messages(
        self, namespace: str, session: str, *, newest: int | None = None, before: int | None = None
    ) -> list[Message]:
        """A session's messages in order, all or those below position ``before``; none without a session.

        With ``newest`` only that many of the last and all the system's.
        """
        with self._reading() as connection:
            return sessions.of_session(connection, namespace, session, newest, before)

    def sessions(self, namespace: str) -> list[str]:
        """Ids of a namespace's sessions, in the order they began."""
        with self._reading() as connection:
            return sessions.names(connection, namespace)


def _at(document: NewDocument, position: int) -> NewDocument:
    return replace(document, metadata={**document.metadata, "position": position})
