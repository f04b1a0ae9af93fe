"""One open bank: documents, their passages and their states, safe among threads, processes and crashes.

Says what each verb reads and writes; holds no SQL (the modules named after rows), no file format
(``blocks``, ``segments``) and not the order of a write (``writer``). Knows no model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row

from msa_memory.errors import (
    CatalogDamagedError,
    ConfigError,
    ConflictError,
    LockedError,
    ModelMismatchError,
    NotFoundError,
    StorageError,
)
from msa_memory.persistence import (
    bank_rows,
    document_rows,
    document_writes,
    ledger,
    passage_rows,
    segment_rows,
)
from msa_memory.persistence.blocks import BlockError, pack
from msa_memory.persistence.checkup import Encode
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
from msa_memory.persistence.opened import check_storable, utc_now
from msa_memory.persistence.opening import find_damage
from msa_memory.persistence.records import (
    Changes,
    Event,
    Loaded,
    NewDocument,
    OldVersion,
    PassageRecord,
    PassageText,
    Repair,
    StagedStates,
)
from msa_memory.persistence.session_verbs import SessionVerbs
from msa_memory.persistence.sheets import SheetFiles, SheetPages, SheetPlace, tie
from msa_memory.persistence.visibility import Numbers
from msa_memory.persistence.writer import Sizes
from msa_memory.types import Document, DocumentVersion, ForgetReceipt, Page, Stats, TensorBytes

__all__ = ["Documents", "OnConflict", "Store", "Where"]

logger = logging.getLogger(__name__)

Where = Mapping[str, Any]
OnConflict = Literal["error", "replace", "skip"]
Keys = dict[tuple[str, str], int]
Documents = list[Document]  # spelled here, because inside the class ``list`` is a method

_RESERVE = 16  # passage numbers taken at a time: a short message then costs no commit of its own


class Store(SessionVerbs):
    """A bank, opened by ``Store.open``. Every method may be called from any thread of the opening process."""

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

    @property
    def in_files(self) -> bool:
        """Whether states lie in files, beside which sheets can be kept."""
        return self._segments.sheets is not None

    def load(self) -> Loaded:
        """All passages there are, with the sheets that still say what their states say."""
        with self._reading() as connection:
            self._check_model(connection)
            generation, rows = passage_rows.all_rows(connection)
        by_number = {row.number: row for row in rows}
        sheets, covered = [], set[int]()
        for pages in self._sheets_of(by_number):
            if covered.isdisjoint(pages.numbers):
                sheets.append(pages)
                covered.update(pages.numbers)
        others = tuple(number for number in by_number if number not in covered)
        return Loaded(generation, passage_rows.PassageRecords(rows), tuple(sheets), others)

    def _sheets_of(self, rows: Mapping[int, Row[Any]]) -> Iterator[SheetPages]:
        files = self._segments.sheets
        if files is None:
            return
        for place in files.places():
            with suppress(BlockError):
                pages = files.open(place)
                if all(number in rows for number in pages.numbers) and pages.tie == self._tie(
                    rows[number] for number in pages.numbers
                ):
                    yield pages

    def _tie(self, rows: Iterable[Row[Any]]) -> str:
        return tie(self._identity.bank_id, self._identity.fingerprint or "", rows)

    def keep_sheet(self, numbers: Sequence[int], sections: Mapping[str, bytes]) -> SheetPages | None:
        """Keep a copy of what the states of these passages say, of one segment, in a file beside them.

        It goes with the first of them that goes. None where it cannot be kept: in memory, read-only, where
        the disk is full or somebody else writes for long, or where one of the passages is gone.
        """
        self._use()
        files = self._segments.sheets
        if files is None or self._read_only or self._damage or not numbers:
            return None
        try:
            with self._writing():
                with self._reading() as connection:
                    self._check_model(connection)
                    found = passage_rows.rows(connection, numbers)
                if any(number not in found or not passage_rows.is_sound(found[number]) for number in numbers):
                    return None
                return _write_sheet(files, [found[number] for number in numbers], self._tie, sections)
        except (LockedError, StorageError) as error:
            logger.warning("routing keys are kept in memory, not in a file: %s", error)
            return None

    def records(self, numbers: Iterable[int]) -> dict[int, PassageRecord]:
        """Where the states of passages lie now; numbers that do not exist are left out."""
        with self._reading() as connection:
            return dict(passage_rows.PassageRecords(passage_rows.rows(connection, numbers).values()))

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
            count, passages, tokens = document_rows.sums(connection, namespace, utc_now())
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
            check_storable(document, postgresql=not self._database.is_sqlite)
        if not documents:
            self._use(write=True)
            return []
        names = [(document.namespace, document.id) for document in documents]

        def look(connection: Connection) -> tuple[str | None, Keys, Keys]:
            keys = document_rows.keys_of(connection, names)
            alive = document_rows.keys_of(connection, names, utc_now()) if keys else keys
            return self._check_model(connection), keys, alive

        with self._writing_after(look) as (sizes, (fingerprint, keys, alive)):
            if on_conflict == "replace":
                alive = keys
            return self._add(documents, on_conflict, sizes, fingerprint, keys, alive)

    def _add(
        self,
        documents: Sequence[NewDocument],
        on_conflict: OnConflict,
        sizes: Sizes,
        fingerprint: str | None,
        keys: Keys,
        alive: Keys,
    ) -> Documents:
        expired = {name: key for name, key in keys.items() if name not in alive}
        fresh: dict[tuple[str, str], NewDocument] = {}
        later: list[NewDocument] = []
        for document in documents:
            name = document.namespace, document.id
            if name in fresh or name in alive:
                if on_conflict == "error":
                    raise _conflict(document)
                if on_conflict == "replace":
                    later.append(document)
            else:
                fresh[name] = document
        stored = [*fresh.values(), *later]
        wanted = [(document.namespace, document.id) for document in documents]
        if not stored:
            with self._reading() as connection:
                return document_rows.find_all(connection, [keys[name] for name in wanted])
        placed = self._writer.append(stored, sizes, fingerprint)
        with self._writer.commit() as commit:
            segment_rows.grow(commit.connection, sizes, placed.values())
            self._make_room(commit, expired)
            new_keys = document_writes.insert_documents(commit, [*fresh.values()], placed)
            now_at = {**keys, **dict(zip(fresh, new_keys, strict=True))}
            for document in later:
                document_writes.replace(commit, now_at[document.namespace, document.id], document, placed)
            found = document_rows.find_all(commit.connection, [now_at[name] for name in wanted])
        self._writer.drop_staged(stored)
        if later or expired:
            self._writer.erase()
        return found

    @staticmethod
    def _make_room(commit: Commit, expired: Mapping[tuple[str, str], int]) -> None:
        """Remove expired documents whose ids are given out anew."""
        if expired:
            document_writes.remove(commit, expired.values())
            for (namespace, _), key in expired.items():
                commit.note("expire", namespace, key)

    def stage(
        self, number: int, states: Mapping[str, TensorBytes], *, fingerprint: str | None = None
    ) -> Mapping[str, TensorBytes] | StagedStates:
        """Set the states of a passage aside on disk until its document is added, to save memory.

        Give the result as the passage's ``states``, to this store, once; or to ``unstage``. What is neither
        goes at close, or with the process. A bank in memory touches no disk: it gives the states back.
        ``fingerprint`` names another model than the bank's, for ``Reencoding``.
        """
        self._use(write=True)
        if self._spool is None:
            return states
        fingerprint = fingerprint or self._identity.fingerprint or self._model()
        if fingerprint is None:
            raise ConfigError("the bank has no model recorded yet; call bind_model before staging states")
        block = pack(states, bank_id=self._identity.bank_id, number=number, fingerprint=fingerprint)
        return self._spool.put(number, block)

    def unstage(self, staged: Iterable[StagedStates]) -> None:
        """Let go of staged states whose document was not added; what was added is no longer there."""
        if self._spool is not None and not self._closed:
            for states in staged:
                self._spool.drop(states)

    def replace(self, document: NewDocument, *, expected_version: int | None = None) -> Document:
        """Give a document new text and passages; its version grows by one, the old text stays in its history.

        The states of its old passages are erased. NotFoundError if there is none, ConflictError if its
        version is not ``expected_version``.
        """
        check_storable(document, postgresql=not self._database.is_sqlite)
        with self._writing_after(
            lambda connection: (
                self._check_model(connection),
                self._expect(connection, document.namespace, document.id, expected_version),
            )
        ) as (sizes, (fingerprint, key)):
            placed = self._writer.append([document], sizes, fingerprint)
            with self._writer.commit() as commit:
                segment_rows.grow(commit.connection, sizes, placed.values())
                document_writes.replace(commit, key, document, placed)
                found = document_rows.document(commit.connection, key)
            self._writer.drop_staged([document])
            self._writer.erase()
            return found

    def update_metadata(
        self, namespace: str, id: str, metadata: Mapping[str, Any], *, expected_version: int | None = None
    ) -> Document:
        """Give a document other metadata, whole; its version grows by one, text and passages stay."""

        def look(connection: Connection) -> int:
            return self._expect(connection, namespace, id, expected_version)

        with self._writing_after(look) as (_, key), self._writer.commit() as commit:
            document_writes.replace_metadata(commit, key, metadata)
            return document_rows.document(commit.connection, key)

    def set_expiry(self, namespace: str, ids: Iterable[str], expires_at: datetime | None) -> int:
        """Change when documents stop being visible; how many there were that have not expired."""
        with self._writing():
            keys = self._keys(((namespace, id) for id in ids), utc_now())
            if keys:
                with self._writer.commit() as commit:
                    for key in keys.values():
                        document_writes.set_expiry(commit, key, expires_at)
        return len(keys)

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
        return self._forget(lambda connection: select_expired(connection, namespace, utc_now()), False)

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
            masked_at = utc_now()
            left = self._writer.erase().left
            times = {"masked_at": masked_at, "erased_at": None if left else utc_now()}
            return receipt.model_copy(update={**times, "beyond_reach": (*left, *self._copies())})

    def _copies(self) -> tuple[str, ...]:
        if self._folder is None:
            return ()
        return (COPIES,) if self._database.is_sqlite else (COPIES, SERVER_COPIES)

    def exists(self, namespace: str, ids: Iterable[str]) -> set[str]:
        """Those of the ids that name a document which has not expired."""
        with self._reading() as connection:
            return set(document_rows.keys(connection, namespace, ids, alive_at=utc_now()))

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
            found = document_rows.page(connection, namespace, tree, utc_now(), before, limit + 1)
        shown = found[:limit]
        following = write_cursor(shown[-1][0], namespace, where) if len(found) > limit else None
        return Page[Document](items=tuple(document for _, document in shown), next_cursor=following)

    def count(self, namespace: str, where: Where | None = None) -> int:
        """How many documents match and have not expired."""
        tree = parse_filter(where)
        with self._enumerating() as connection:
            return document_rows.count(connection, namespace, tree, utc_now())

    def visible(self, namespace: str, where: Where | None = None, *, now: datetime | None = None) -> Numbers:
        """Sorted passage numbers of a namespace's documents that match and have not expired by ``now``.

        The array is read-only: later calls may share it.
        """
        tree = parse_filter(where)
        with self._reading() as connection:
            return self._visibility.numbers(connection, namespace, tree, now or utc_now())

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
        """Erase expired documents, rewrite sparse segments and the catalog; returns bytes freed.

        Tombstones go too: who follows from before them is told all there is. Events stay.
        """
        with self._writing() as sizes:
            before = self._database.size_bytes() + sum(self._segments.sizes().values())
            with self._reading() as connection:
                expired = document_rows.matching(connection, None, None, expired_at=utc_now())
            if expired:
                with self._writer.commit() as commit:
                    document_writes.remove(commit, expired)
                    commit.note("expire", None, count=len(expired))
            self._writer.rewrite_segments(sizes, self._states.raw)
            self._writer.erase(compacting=True)
            return before - self._database.size_bytes() - sum(self._segments.sizes().values())

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
        if found.expires_at is not None and found.expires_at <= utc_now():
            raise NotFoundError(
                f"document {id!r} in namespace {namespace!r} expired at {found.expires_at}; add it again if "
                "it is needed"
            )
        return keys[id]

    def _expect(self, connection: Connection, namespace: str, id: str, version: int | None) -> int:
        """The key of an existing document that is at ``version``, if one is given."""
        key = self._key(connection, namespace, id)
        current = document_rows.document(connection, key).version
        if version not in (None, current):
            raise ConflictError(
                f"document {id!r} is at version {current}, expected {version}: it changed meanwhile; "
                "read it again and repeat the update"
            )
        return key


def _write_sheet(
    files: SheetFiles,
    rows: Sequence[Row[Any]],
    known_by: Callable[[Iterable[Row[Any]]], str],
    sections: Mapping[str, bytes],
) -> SheetPages | None:
    segment = rows[0].segment
    if any(row.segment != segment for row in rows):
        return None  # moved since
    end = max(row.offset + row.length for row in rows)
    place = SheetPlace(segment, min(row.offset for row in rows), end)
    files.drop(other for other in files.places() if other.overlaps(segment, place.first, end - place.first))
    return files.write(place, known_by(rows), [row.number for row in rows], sections)


def _conflict(document: NewDocument) -> ConflictError:
    return ConflictError(
        f"document {document.id!r} exists already in namespace {document.namespace!r}; "
        "use update, or on_conflict='replace' or 'skip'"
    )
