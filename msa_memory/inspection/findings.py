"""What there is to see in one namespace of a memory, and for a question what happened to it.

Reads through the memory; knows no HTML. Texts are cut here, so that a memory of any size can be looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from msa_memory.errors import ConfigError, NotFoundError
from msa_memory.inspection.watching import Watched, Watching
from msa_memory.types import Document, DocumentVersion, Message, Stats

if TYPE_CHECKING:
    from msa_memory.memory import MemoryModel

__all__ = ["Excerpted", "Findings", "SeenDocument", "SeenSession", "look"]

PAGE_DOCUMENTS = 200
LEAST_CHARS, MOST_CHARS = 600, 20_000
VERSION_CHARS = 300
MOST_VERSIONS, MOST_SESSIONS, MOST_MESSAGES = 10, 50, 40


@dataclass(frozen=True, slots=True)
class Excerpted:
    """The beginning of a text, and how many characters it has in all."""

    text: str
    chars: int

    @classmethod
    def of(cls, text: str, most: int) -> Excerpted:
        return cls(text[:most], len(text))

    @property
    def left_out(self) -> int:
        return self.chars - len(self.text)


@dataclass(frozen=True, slots=True)
class SeenDocument:
    """A document; ``document.text`` is empty, its beginning is in ``excerpt``. Versions newest first."""

    document: Document
    excerpt: Excerpted
    versions: tuple[tuple[DocumentVersion, Excerpted], ...] = ()
    versions_left_out: int = 0


@dataclass(frozen=True, slots=True)
class SeenSession:
    """A session's newest messages, and how many were left out."""

    id: str
    messages: tuple[tuple[Message, Excerpted], ...]
    left_out: int


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything one page shows."""

    made_at: datetime
    stats: Stats
    where: Mapping[str, Any] | None
    documents: tuple[SeenDocument, ...]
    """Newest first; behind them those that only the question brought in."""
    documents_left_out: int
    sessions: tuple[SeenSession, ...]
    sessions_left_out: int
    asked: Watched | None

    @property
    def resident_bytes(self) -> int | None:
        """Of routing keys in memory; None where no question loaded the model."""
        return None if self.asked is None else self.asked.resident_bytes


def look(
    memory: MemoryModel,
    question: str | None = None,
    *,
    where: Mapping[str, Any] | None = None,
    k: int | None = None,
    limit: int = 2000,
) -> Findings:
    """Read what a memory holds; with a question, answer it and keep what the routers saw on the way.

    Without a question the model is not loaded. Nothing is written either way.

    Args:
        where: only documents that match, also for the question.
        k: documents whose text is read for the answer, as in ``query``.
        limit: documents on the page; those that the question touches come on top of it.

    Raises:
        ConfigError: ``limit`` is below 1.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ConfigError(f"limit is {limit!r:.60}; it must be a whole number of at least 1")
    asked = None if question is None else Watching.ask(memory, question, where=where, k=k)
    touched = {} if asked is None else dict.fromkeys(asked.document_ids)
    documents = [
        _seen(memory, document, MOST_CHARS if document.id in touched else LEAST_CHARS)
        for document in islice(_all(memory, where), limit)
    ]
    shown = {seen.document.id for seen in documents}
    documents += _further(memory, (id for id in touched if id not in shown))
    names = memory.sessions()
    return Findings(
        made_at=datetime.now(UTC),
        stats=memory.stats,
        where=where,
        documents=tuple(documents),
        documents_left_out=max(0, memory.count(where) - len(documents)),
        sessions=tuple(_session(memory, name) for name in names[-MOST_SESSIONS:][::-1]),
        sessions_left_out=max(0, len(names) - MOST_SESSIONS),
        asked=asked,
    )


def _all(memory: MemoryModel, where: Mapping[str, Any] | None) -> Iterator[Document]:
    """Every document, newest first."""
    cursor = None
    while True:
        page = memory.list(where, limit=PAGE_DOCUMENTS, cursor=cursor)
        yield from page
        if (cursor := page.next_cursor) is None:
            return


def _further(memory: MemoryModel, ids: Iterable[str]) -> Iterator[SeenDocument]:
    for id in ids:
        try:
            yield _seen(memory, memory.get(id), MOST_CHARS)
        except NotFoundError:  # forgotten since the question was asked
            continue


def _seen(memory: MemoryModel, document: Document, most: int) -> SeenDocument:
    excerpt = Excerpted.of(document.text, most)
    slim = document.model_copy(update={"text": ""})
    if document.version == 1:
        return SeenDocument(slim, excerpt)
    try:
        earlier = [version for version in memory.history(document.id) if not version.current][::-1]
    except NotFoundError:  # forgotten since it was listed
        earlier = []
    versions = [
        (version.model_copy(update={"text": ""}), Excerpted.of(version.text, VERSION_CHARS))
        for version in earlier[:MOST_VERSIONS]
    ]
    return SeenDocument(slim, excerpt, tuple(versions), max(0, len(earlier) - MOST_VERSIONS))


def _session(memory: MemoryModel, id: str) -> SeenSession:
    messages = memory.session(id).messages()
    newest = messages[-MOST_MESSAGES:]
    seen = [
        (message.model_copy(update={"content": ""}), Excerpted.of(message.content, LEAST_CHARS))
        for message in newest
    ]
    return SeenSession(id, tuple(seen), len(messages) - len(newest))
