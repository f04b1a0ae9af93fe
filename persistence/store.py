"""One open bank: documents, their passages and their states, safe among threads, processes and crashes.

Says what each verb reads and writes; holds no SQL (the modules named after rows), no file format
(``blocks``, ``segments``) and not the order of a write (``writer``). Knows no model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sqlalchemy import Connection

from msa_memory.errors import (
    CatalogDamagedError,
    ConfigError,
    ConflictError,
    ForkedMemoryError,
    InvalidDocumentError,
    ModelMismatchError,
    NotFoundError,
    ReadOnlyError,
    StorageError,
)
from msa_memory.persistence import (
    bank_rows,
    document_rows,
    document_writes,
    ledger,
    passage_rows,
    segment_rows,
    sessions,
)
from msa_memory.persistence.blocks import pack
from msa_memory.persistence.checkup import Checkup, Encode
from msa_memory.persistence.cursor import read_cursor, write_cursor
from msa_memory.persistence.filters import parse_filter
from msa_memory.persistence.forgetting import (
    COPIES,
    SERVER_COPIES,
    Selection,
    not_found,
    select_by,
    select_expired,
    select_namespace,
    select_session,
)
from msa_memory.persistence.ledger import Commit
from msa_memory.persistence.opening import OpenBank, find_damage, open_folder, open_in_memory
from msa_memory.persistence.records import (
    BankIdentity,
    Changes,
    Event,
    NewDocument,
    OldVersion,
    PassageRecord,
    PassageText,
    Repair,
    StagedStates,
)
from msa_memory.persistence.seal import write_seal
from msa_memory.persistence.sessions import NewMessage
from msa_memory.persistence.spool import Spool
from msa_memory.persistence.state_reader import StateReader
from msa_memory.persistence.visibility import Numbers, Visibility
from msa_memory.persistence.writer import Sizes, Writer
from msa_memory.types import Document, DocumentVersion, ForgetReceipt, Message, Page, Stats, TensorBytes

__all__ = ["Documents", "OnConflict", "Store", "Where"]

Where = Mapping[str, Any]
OnConflict = Literal["error", "replace", "skip"]
Documents = list[Document]  # spelled here, because inside the class ``list`` is a method
Messages = list[Message]
Names = list[str]

_RESERVE = 16  # passage numbers taken at a time: a short message then costs no commit of its own


class Store:
    """A bank, opened by ``Store.open``. Every method may be called from any thread of the opening process."""

    def __init__(self, bank: OpenBank, *, read_only: bool) -> None:
        self._database, self._segments, self._counter = bank.database, bank.segments, bank.counter
        self._identity, self._place = bank.identity, bank.place
        self._folder, self._damage = bank.folder, bank.damage
        self._spool = Spool(bank.folder.states if bank.folder else None)
        self._writer = Writer(bank, self._spool)
        self._visibility = Visibility()
        self._read_only = read_only
        self._process = os.getpid()
        self._closed = False
        self._states = StateReader(self._segments, self._locate, lambda: self._identity)
        self._checkup = Checkup(bank, self._writer, self._states)
        self._spare = range(0)
        self._spare_lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: Path | None,
        *,
        catalog_url: str | None = None,
        state_url: str | None = None,
        read_only: bool = False,
        lock_timeout_s: float = 30.0,
    ) -> Self:
        """Open the bank in the folder ``path``, creating it if there is none; None keeps it in memory.

        Raises StorageError for a folder that is something else, CatalogDamagedError for a catalog that does
        not hold what was acknowledged, LockedError when creation waits longer than ``lock_timeout_s``.
        """
        if path is None:
            _refuse_in_memory(catalog_url, state_url, read_only)
            return cls(open_in_memory(lock_timeout_s), read_only=False)
        bank = open_folder(
            Path(path),
            catalog_url=catalog_url,
            state_url=state_url,
            read_only=read_only,
            timeout_s=lock_timeout_s,
        )
        return cls(bank, read_only=read_only)

    @property
    def identity(self) -> BankIdentity:
        """Which bank this is and which model wrote it."""
        self._use()
        return self._identity

    @property
    def damage(self) -> tuple[str, ...]:
        """What was found lost or inconsistent at opening, in sentences.

        While there is any, what is there can be read by id and by passage; listing, counting and writing
        raise CatalogDamagedError.
        """
        return self._damage

    def bind_model(self, *, model: str, fingerprint: str, info: Mapping[str, Any]) -> None:
        """Record the model at first use; ModelMismatchError if another one wrote the bank.

        An empty bank that is read-only stays unbound.
        """
        self._refresh_identity()
        if self._identity.fingerprint is None and not self._read_only:
            with self._writing():
                self._refresh_identity()
                if self._identity.fingerprint is None:
                    with self._writer.commit() as commit:
                        bank_rows.bind_model(commit.connection, model, fingerprint, info)
                        commit.note("model", None)
            self._refresh_identity()
        recorded = self._identity
        if recorded.fingerprint not in (None, fingerprint):
            raise ModelMismatchError(
                f"the bank at {self._place} was written with model {recorded.model!r} (fingerprint "
                f"{str(recorded.fingerprint)[:16]}), not with {model!r} ({fingerprint[:16]}); open it with "
                f"model={recorded.model!r}, or move it to the new model with reencode"
            )

    def generation(self) -> int:
        """The number of committed writes; it changes with every one of any process."""
        with self._reading() as connection:
            return bank_rows.generation(connection)

    def changes(self, since: int) -> Changes:
        """Passages added and removed after generation ``since``; 0 for everything there is."""
        with self._reading() as connection:
            self._check_model(connection)
            return passage_rows.changes(connection, since)

    def reserve_numbers(self, count: int) -> range:
        """``count`` consecutive passage numbers, unique in the bank and never given out again."""
        self._use(write=True)
        if count < 0:
            raise ConfigError(f"cannot reserve {count} passage numbers; expected 0 or more")
        with self._spare_lock:
            if count > len(self._spare):
                with self._database.writing() as connection:
                    self._spare = bank_rows.take_numbers(connection, max(count, _RESERVE))
            taken, self._spare = self._spare[:count], self._spare[count:]
            return taken

    def namespaces(self) -> tuple[str, ...]:
        """Namespaces that hold at least one document or session, sorted."""
        with self._enumerating() as connection:
            return document_rows.namespaces(connection)

    def stats(self, namespace: str) -> Stats:
        """Sizes of the bank and of what one namespace shows."""
        with self._enumerating() as connection:
            count, passages, tokens = document_rows.sums(connection, namespace, _now())
            namespaces = len(document_rows.namespaces(connection))
        self._refresh_identity()
        return Stats(
            namespace=namespace,
            documents=count,
            passages=passages,
            tokens=tokens,
            namespaces=namespaces,
            catalog_bytes=self._database.size_bytes(),
            state_bytes=sum(self._segments.sizes().values()),
            model=self._identity.model,
            fingerprint=self._identity.fingerprint,
            format_version=self._identity.format_version,
        )

    def add(self, documents: Sequence[NewDocument], *, on_conflict: OnConflict = "error") -> list[Document]:
        """Store all documents or none; the stored ones in the order given.

        An id that is taken, also earlier in the same call, raises ConflictError, or replaces or skips, as
        ``on_conflict`` says. An expired document makes room, or is replaced.
        """
        if on_conflict not in ("error", "replace", "skip"):
            raise ConfigError(f"on_conflict is {on_conflict!r:.60}; expected 'error', 'replace' or 'skip'")
        for document in documents:
            _check_storable(document, postgresql=not self._database.is_sqlite)
        if not documents:
            self._use(write=True)
            return []
        with self._writing() as sizes:
            return self._add(documents, on_conflict, sizes)

    def _add(self, documents: Sequence[NewDocument], on_conflict: OnConflict, sizes: Sizes) -> Documents:
        names = [(document.namespace, document.id) for document in documents]
        keys = self._keys(names)
        alive = keys if on_conflict == "replace" else self._keys(names, _now())
        expired = {name: key for name, key in keys.items() if name not in alive}
        fresh: dict[tuple[str, str], NewDocument] = {}
        later: list[NewDocument] = []
        for name, document in zip(names, documents, strict=True):
            if name in fresh or (name in keys and name not in expired):
                if on_conflict == "error":
                    raise _conflict(document)
                if on_conflict == "replace":
                    later.append(document)
            else:
                fresh[name] = document
        stored = [*fresh.values(), *later]
        if stored:
            placed = self._writer.append(stored, sizes, self._model())
            with self._writer.commit() as commit:
                segment_rows.grow(commit.connection, sizes, placed.values())
                self._make_room(commit, expired)
                new_keys = document_writes.insert_documents(commit, [*fresh.values()], placed)
                keys.update(zip(fresh, new_keys, strict=True))
                for document in later:
                    document_writes.replace(commit, keys[document.namespace, document.id], document, placed)
            self._writer.drop_staged(stored)
        if later or expired:
            self._writer.erase()
        return self._documents([keys[name] for name in names])

    @staticmethod
    def _make_room(commit: Commit, expired: Mapping[tuple[str, str], int]) -> None:
        """Remove expired documents whose ids are given out anew."""
        if expired:
            document_writes.remove(commit, expired.values())
            for (namespace, _), key in expired.items():
                commit.note("expire", namespace, key)

    def stage(self, number: int, states: Mapping[str, TensorBytes]) -> StagedStates:
        """Set the states of a passage aside on disk until its document is added, to save memory.

        Give the result as the passage's ``states``, to this store, once. What is not added goes at close.
        """
        self._use(write=True)
        fingerprint = self._model()
        if fingerprint is None:
            raise ConfigError("the bank has no model recorded yet; call bind_model before staging states")
        block = pack(states, bank_id=self._identity.bank_id, number=number, fingerprint=fingerprint)
        return self._spool.put(number, block)

    def replace(self, document: NewDocument, *, expected_version: int | None = None) -> Document:
        """Give a document new text and passages; its version grows by one, the old text stays in its history.

        The states of its old passages are erased. NotFoundError if there is none, ConflictError if its
        version is not ``expected_version``.
        """
        _check_storable(document, postgresql=not self._database.is_sqlite)
        with self._writing() as sizes:
            key = self._expect(document.namespace, document.id, expected_version)
            placed = self._writer.append([document], sizes, self._model())
            with self._writer.commit() as commit:
                segment_rows.grow(commit.connection, sizes, placed.values())
                document_writes.replace(commit, key, document, placed)
            self._writer.drop_staged([document])
            self._writer.erase()
            return self._documents([key])[0]

    def update_metadata(
        self, namespace: str, id: str, metadata: Mapping[str, Any], *, expected_version: int | None = None
    ) -> Document:
        """Give a document other metadata, whole; its version grows by one, text and passages stay."""
        with self._writing():
            key = self._expect(namespace, id, expected_version)
            with self._writer.commit() as commit:
                document_writes.replace_metadata(commit, key, metadata)
            return self._documents([key])[0]

    def set_expiry(self, namespace: str, ids: Iterable[str], expires_at: datetime | None) -> int:
        """Change when documents stop being visible; how many there were that have not expired."""
        with self._writing():
            keys = self._keys(((namespace, id) for id in ids), _now())
            if keys:
                with self._writer.commit() as commit:
                    for key in keys.values():
                        document_writes.set_expiry(commit, key, expires_at)
        return len(keys)

    def append_message(self, message: NewMessage, document: NewDocument | None) -> Message:
        """Store a message as its session's newest, and the document that holds it, both or neither.

        The document's metadata gets the message's ``position``. A message whose key the session has already
        is not stored: the one that is there comes back.
        """
        if document is not None:
            _check_storable(document, postgresql=not self._database.is_sqlite)
        with self._writing() as sizes:
            with self._reading() as connection:
                if message.key is not None:
                    stored = sessions.with_key(connection, message.namespace, message.session, message.key)
                    if stored is not None:
                        return stored
                position = sessions.next_position(connection, message.namespace, message.session)
            news = [] if document is None else [_at(document, position)]
            placed = self._writer.append(news, sizes, self._model())
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
    ) -> Messages:
        """A session's messages in order, all or those below position ``before``; none without a session.

        With ``newest`` only that many of the last and all the system's.
        """
        with self._reading() as connection:
            return sessions.of_session(connection, namespace, session, newest, before)

    def sessions(self, namespace: str) -> Names:
        """Ids of a namespace's sessions, in the order they began."""
        with self._reading() as connection:
            return sessions.names(connection, namespace)

    def forget(
        self,
        namespace: str,
        *,
        ids: Iterable[str] | None = None,
        where: Where | None = None,
        dry_run: bool = False,
    ) -> ForgetReceipt:
        """Remove documents with their versions, passages, states and messages, and overwrite their bytes.

        Exactly one of ``ids`` and a non-empty ``where`` selects them, expired ones included; anything else is
        a ConfigError, an unknown id a NotFoundError and nothing is removed. ``where`` may match nothing.
        """
        return self._forget(lambda connection: select_by(connection, namespace, ids, where), dry_run)

    def forget_session(self, namespace: str, session: str, *, dry_run: bool = False) -> ForgetReceipt:
        """Forget every message of a session and the documents that hold them; NotFoundError without one."""
        return self._forget(lambda connection: select_session(connection, namespace, session), dry_run)

    def forget_expired(self, namespace: str) -> ForgetReceipt:
        """Forget what has expired in a namespace; ``compact`` does so in all of them."""
        return self._forget(lambda connection: select_expired(connection, namespace, _now()), False)

    def forget_namespace(self, namespace: str, *, confirm: str) -> ForgetReceipt:
        """Forget every document and session of a namespace; ``confirm`` must repeat its name."""
        if confirm != namespace:
            raise ConfigError(
                f"confirm is {confirm!r:.60}; repeat the namespace {namespace!r} to forget all of it"
            )
        return self._forget(lambda connection: select_namespace(connection, namespace), False)

    def _forget(self, select: Callable[[Connection], Selection], dry_run: bool) -> ForgetReceipt:
        self._use(write=not dry_run)
        if dry_run:
            with self._reading() as connection:
                return select(connection).plan(connection)
        with self._writing():
            with self._reading() as connection:
                selection = select(connection)
                receipt = selection.plan(connection).model_copy(update={"dry_run": False})
            if selection.is_empty():
                return receipt
            with self._writer.commit() as commit:
                selection.remove(commit)
            masked_at = _now()
            left = self._writer.erase().left
            times = {"masked_at": masked_at, "erased_at": None if left else _now()}
            return receipt.model_copy(update={**times, "beyond_reach": (*left, *self._copies())})

    def _copies(self) -> tuple[str, ...]:
        if self._folder is None:
            return ()
        return (COPIES,) if self._database.is_sqlite else (COPIES, SERVER_COPIES)

    def exists(self, namespace: str, ids: Iterable[str]) -> set[str]:
        """Those of the ids that name a document which has not expired."""
        with self._reading() as connection:
            return set(document_rows.keys(connection, namespace, ids, alive_at=_now()))

    def get(self, namespace: str, id: str) -> Document:
        """A document at its current version; NotFoundError if there is none or it has expired."""
        with self._reading() as connection:
            return document_rows.document(connection, self._key(connection, namespace, id))

    def history(self, namespace: str, id: str) -> tuple[DocumentVersion, ...]:
        """Every version of a document, oldest first, the current one last."""
        with self._reading() as connection:
            return document_rows.history(connection, self._key(connection, namespace, id))

    def restore_version(self, namespace: str, id: str, version: int) -> OldVersion:
        """What a version said, to be encoded and stored as the next one; NotFoundError if there is none.

        The states of old versions were erased when they were replaced.
        """
        with self._reading() as connection:
            return document_rows.old_version(connection, self._key(connection, namespace, id), version)

    def events(self, namespace: str | None = None, *, limit: int = 100) -> tuple[Event, ...]:
        """Who changed what and when, newest first; of one namespace, or of the whole bank."""
        with self._reading() as connection:
            return ledger.read_events(connection, namespace, limit)

    def list(
        self, namespace: str, where: Where | None = None, *, limit: int = 100, cursor: str | None = None
    ) -> Page[Document]:
        """Documents that have not expired, last added first. Documents added meanwhile do not shift pages."""
        if limit < 1:
            raise ConfigError(f"limit is {limit}; expected 1 or more")
        before = None if cursor is None else read_cursor(cursor, namespace, where)
        tree = parse_filter(where)
        with self._enumerating() as connection:
            found = document_rows.page(connection, namespace, tree, _now(), before, limit + 1)
        shown = found[:limit]
        following = write_cursor(shown[-1][0], namespace, where) if len(found) > limit else None
        return Page[Document](items=tuple(document for _, document in shown), next_cursor=following)

    def count(self, namespace: str, where: Where | None = None) -> int:
        """How many documents match and have not expired."""
        tree = parse_filter(where)
        with self._enumerating() as connection:
            return document_rows.count(connection, namespace, tree, _now())

    def visible(self, namespace: str, where: Where | None = None, *, now: datetime | None = None) -> Numbers:
        """Sorted passage numbers of a namespace's documents that match and have not expired by ``now``.

        The array is read-only: later calls may share it.
        """
        tree = parse_filter(where)
        with self._reading() as connection:
            return self._visibility.numbers(connection, namespace, tree, now or _now())

    def passages(self, numbers: Iterable[int]) -> dict[int, PassageText]:
        """Passages with their documents' text; numbers that do not exist are left out."""
        with self._reading() as connection:
            return passage_rows.texts(connection, (int(number) for number in numbers))

    def states(self, record: PassageRecord) -> dict[str, TensorBytes]:
        """The states of a passage, a copy of its block that was checked when it was read.

        NotFoundError if the passage is gone, StateDamagedError if its bytes are not what was written.
        """
        self._use()
        return self._states.read(record)

    def verify(self) -> tuple[str, ...]:
        """Read everything once; one sentence per problem, none when the bank is sound."""
        self._use()
        return tuple(dict.fromkeys(self._checkup.problems()))

    def repair(self, encode: Encode) -> Repair:
        """Mend what ``verify`` finds as far as it follows from the texts; ``encode`` makes states anew.

        Documents whose text is damaged, and rows that are gone, need a backup; afterwards the rows that are
        there count as the memory.
        """
        self._use(write=True)
        repair = self._checkup.repair(encode)
        self._damage = find_damage(self._database)
        return repair

    def compact(self) -> int:
        """Erase expired documents, rewrite sparse segments and the catalog; returns bytes freed."""
        with self._writing() as sizes:
            before = self._database.size_bytes() + sum(self._segments.sizes().values())
            with self._reading() as connection:
                expired = document_rows.matching(connection, None, None, expired_at=_now())
            if expired:
                with self._writer.commit() as commit:
                    document_writes.remove(commit, expired)
                    commit.note("expire", None, count=len(expired))
            self._writer.rewrite_segments(sizes, self._states.raw)
            self._writer.erase(compacting=True)
            return before - self._database.size_bytes() - sum(self._segments.sizes().values())

    def close(self) -> None:
        """Release files and connections; calling it again does nothing."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        self._spool.close()
        self._segments.close()
        self._database.close()
        if self._folder is not None and self._database.is_sqlite and not (self._read_only or self._damage):
            with suppress(StorageError):  # without a seal the next opening checks every row
                write_seal(self._folder.seal, self._folder.catalog)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _use(self, *, write: bool = False) -> None:
        if os.getpid() != self._process:
            raise ForkedMemoryError(
                f"the memory at {self._place} was opened by process {self._process} and is used in its fork "
                f"{os.getpid()}; open it anew in the child"
            )
        if self._closed:
            raise StorageError(f"the memory at {self._place} is closed; open it again")
        if write and self._read_only:
            raise ReadOnlyError(
                f"the memory at {self._place} is open read-only; open it with read_only=False to write"
            )

    def _trust(self) -> None:
        """CatalogDamagedError where rows are known to be lost, for what would silently lack them."""
        if self._damage:
            raise CatalogDamagedError(
                f"the catalog of {self._place} was found damaged when it was opened: {self._damage[0]}; what "
                "is there can be read one by one; run verify with repair, or restore a backup"
            )

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        self._use()
        with self._database.reading() as connection:
            yield connection

    @contextmanager
    def _enumerating(self) -> Iterator[Connection]:
        """A reading that says how many there are, or which."""
        self._use()
        self._trust()
        with self._database.reading() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Sizes]:
        """Hold the writer lock; yields the committed size of every segment."""
        self._use(write=True)
        self._trust()
        with self._writer.held() as sizes:
            yield sizes

    def _model(self) -> str | None:
        self._refresh_identity()
        with self._reading() as connection:
            self._check_model(connection)
        return self._identity.fingerprint

    def _check_model(self, connection: Connection) -> None:
        """ModelMismatchError if another process moved the bank to another model since this one opened it."""
        now, known = bank_rows.identity(connection), self._identity
        if now is not None and known.fingerprint not in (None, now.fingerprint):
            raise ModelMismatchError(
                f"the bank at {self._place} was moved from model {known.model!r} to {now.model!r} meanwhile; "
                "open the memory again"
            )

    def _locate(self, number: int) -> PassageRecord | None:
        self._refresh_identity()
        with self._reading() as connection:
            self._check_model(connection)
            return passage_rows.record(connection, number)

    def _refresh_identity(self) -> None:
        if self._identity.fingerprint is not None:
            return
        with self._reading() as connection:
            identity = bank_rows.identity(connection)
        if identity is not None:
            self._identity = identity

    def _keys(
        self, names: Iterable[tuple[str, str]], alive_at: datetime | None = None
    ) -> dict[tuple[str, str], int]:
        by_namespace: dict[str, list[str]] = {}
        for namespace, id in names:
            by_namespace.setdefault(namespace, []).append(id)
        found: dict[tuple[str, str], int] = {}
        with self._reading() as connection:
            for namespace, ids in by_namespace.items():
                keys = document_rows.keys(connection, namespace, ids, alive_at)
                found.update(((namespace, id), key) for id, key in keys.items())
        return found

    def _key(self, connection: Connection, namespace: str, id: str) -> int:
        """The row key of a document that has not expired."""
        keys = document_rows.keys(connection, namespace, [id])
        if id not in keys:
            self._trust()
            raise not_found(namespace, [id])
        found = document_rows.document(connection, keys[id])
        if (found.namespace, found.id) != (namespace, id):
            raise CatalogDamagedError(
                f"the index of documents is damaged: it leads from {id!r:.200} in namespace {namespace!r} to "
                "another document; run verify with repair"
            )
        if found.expires_at is not None and found.expires_at <= _now():
            raise NotFoundError(
                f"document {id!r} in namespace {namespace!r} expired at {found.expires_at}; add it again if "
                "it is needed"
            )
        return keys[id]

    def _expect(self, namespace: str, id: str, version: int | None) -> int:
        """The key of an existing document that is at ``version``, if one is given."""
        with self._reading() as connection:
            key = self._key(connection, namespace, id)
            current = document_rows.document(connection, key).version
        if version not in (None, current):
            raise ConflictError(
                f"document {id!r} is at version {current}, expected {version}: it changed meanwhile; "
                "read it again and repeat the update"
            )
        return key

    def _documents(self, keys: Sequence[int]) -> Documents:
        with self._reading() as connection:
            found = document_rows.find(connection, dict.fromkeys(keys))
        return [found[key] for key in keys]


def _at(document: NewDocument, position: int) -> NewDocument:
    return replace(document, metadata={**document.metadata, "position": position})


def _now() -> datetime:
    return datetime.now(UTC)


def _refuse_in_memory(catalog_url: str | None, state_url: str | None, read_only: bool) -> None:
    if catalog_url or state_url or read_only:
        raise ConfigError(
            "a memory without a path is kept in memory and takes no catalog_url, state_url or read_only; "
            "give a path"
        )


def _conflict(document: NewDocument) -> ConflictError:
    return ConflictError(
        f"document {document.id!r} exists already in namespace {document.namespace!r}; "
        "use update, or on_conflict='replace' or 'skip'"
    )


def _check_storable(document: NewDocument, *, postgresql: bool) -> None:
    """InvalidDocumentError for text no database can hold."""
    fields = (document.namespace, document.id, document.text, document.source or "", document.trust or "")
    for value in (*fields, *(passage.header for passage in document.passages)):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidDocumentError(
                f"document {document.id!a} holds half of a surrogate pair at character {error.start}; "
                "expected valid Unicode"
            ) from error
        if postgresql and "\0" in value:
            raise InvalidDocumentError(
                f"document {document.id!r} holds a NUL character, which PostgreSQL cannot store"
            )
