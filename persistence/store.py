"""One open bank: documents, their passages and their states, safe among threads, processes and crashes.

Says what each verb reads and writes; holds no SQL (``catalog``), no file format (``blocks``,
``segments``) and not the order of a write (``writer``). Knows no model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
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
    StateDamagedError,
    StorageError,
)
from msa_memory.persistence.catalog import Catalog
from msa_memory.persistence.cursor import read_cursor, write_cursor
from msa_memory.persistence.filters import parse_filter
from msa_memory.persistence.opening import OpenBank, open_folder, open_in_memory
from msa_memory.persistence.records import (
    BankIdentity,
    Changes,
    NewDocument,
    PassageRecord,
    PassageText,
)
from msa_memory.persistence.state_reader import StateReader
from msa_memory.persistence.writer import Sizes, Writer
from msa_memory.types import Document, DocumentVersion, ForgetReceipt, Page, Stats, TensorBytes

__all__ = ["Documents", "OnConflict", "Store", "Where"]

Where = Mapping[str, Any]
OnConflict = Literal["error", "replace", "skip"]
Documents = list[Document]  # spelled here, because inside the class ``list`` is a method

_RESERVE = 16  # passage numbers taken at a time: a short message then costs no commit of its own


class Store:
    """A bank, opened by ``Store.open``. Every method may be called from any thread of the opening process."""

    def __init__(self, bank: OpenBank, *, read_only: bool) -> None:
        self._database, self._segments, self._counter = bank.database, bank.segments, bank.counter
        self._identity, self._place = bank.identity, bank.place
        self._catalog = Catalog()
        self._writer = Writer(bank, self._catalog)
        self._read_only = read_only
        self._process = os.getpid()
        self._closed = False
        self._states = StateReader(self._segments, self._locate, lambda: self._identity)
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

    def bind_model(self, *, model: str, fingerprint: str, info: Mapping[str, Any]) -> None:
        """Record the model at first use; ModelMismatchError if another one wrote the bank.

        An empty bank that is read-only stays unbound.
        """
        self._refresh_identity()
        if self._identity.fingerprint is None and not self._read_only:
            with self._writing():
                self._refresh_identity()
                if self._identity.fingerprint is None:
                    with self._writer.commit() as (connection, _):
                        self._catalog.bind_model(connection, model, fingerprint, info)
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
            return self._catalog.generation(connection)

    def changes(self, since: int) -> Changes:
        """Passages added and removed after generation ``since``; 0 for everything there is."""
        with self._reading() as connection:
            return self._catalog.changes(connection, since)

    def reserve_numbers(self, count: int) -> range:
        """``count`` consecutive passage numbers, unique in the bank and never given out again."""
        self._use(write=True)
        if count < 0:
            raise ConfigError(f"cannot reserve {count} passage numbers; expected 0 or more")
        with self._spare_lock:
            if count > len(self._spare):
                with self._database.writing() as connection:
                    self._spare = self._catalog.take_numbers(connection, max(count, _RESERVE))
            taken, self._spare = self._spare[:count], self._spare[count:]
            return taken

    def namespaces(self) -> tuple[str, ...]:
        """Namespaces that hold at least one document, sorted."""
        with self._reading() as connection:
            return self._catalog.namespaces(connection)

    def stats(self, namespace: str) -> Stats:
        """Sizes of the bank and of what one namespace shows."""
        with self._reading() as connection:
            count, passages, tokens = self._catalog.sums(connection, namespace, _now())
            namespaces = len(self._catalog.namespaces(connection))
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

        An id that is taken (by an expired document too, or earlier in the same call) raises ConflictError, or
        replaces or skips, as ``on_conflict`` says.
        """
        if on_conflict not in ("error", "replace", "skip"):
            raise ConfigError(f"on_conflict is {on_conflict!r}; expected 'error', 'replace' or 'skip'")
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
        fresh: dict[tuple[str, str], NewDocument] = {}
        later: list[NewDocument] = []
        for name, document in zip(names, documents, strict=True):
            if name not in keys and name not in fresh:
                fresh[name] = document
            elif on_conflict == "error":
                raise _conflict(document)
            elif on_conflict == "replace":
                later.append(document)
        now = _now()
        if fresh or later:
            placed = self._writer.append([*fresh.values(), *later], sizes, self._model())
            with self._writer.commit() as (connection, generation):
                self._catalog.grow_segments(connection, sizes, placed.values())
                new_keys = self._catalog.insert(connection, [*fresh.values()], placed, generation, now)
                keys.update(zip(fresh, new_keys, strict=True))
                for document in later:
                    key = keys[document.namespace, document.id]
                    self._catalog.replace(connection, key, document, placed, generation, now)
        if later:
            self._writer.erase()
        return self._documents([keys[name] for name in names])

    def replace(self, document: NewDocument, *, expected_version: int | None = None) -> Document:
        """Give a document new text and passages; its version grows by one, the old text stays in its history.

        The states of its old passages are erased. NotFoundError if there is none, ConflictError if its
        version is not ``expected_version``.
        """
        _check_storable(document, postgresql=not self._database.is_sqlite)
        with self._writing() as sizes:
            key = self._expect(document.namespace, document.id, expected_version)
            placed = self._writer.append([document], sizes, self._model())
            with self._writer.commit() as (connection, generation):
                self._catalog.grow_segments(connection, sizes, placed.values())
                self._catalog.replace(connection, key, document, placed, generation, _now())
            self._writer.erase()
            return self._documents([key])[0]

    def update_metadata(
        self, namespace: str, id: str, metadata: Mapping[str, Any], *, expected_version: int | None = None
    ) -> Document:
        """Give a document other metadata, whole; its version grows by one, text and passages stay."""
        with self._writing():
            key = self._expect(namespace, id, expected_version)
            with self._writer.commit() as (connection, _):
                self._catalog.replace_metadata(connection, key, metadata, _now())
            return self._documents([key])[0]

    def forget(
        self,
        namespace: str,
        *,
        ids: Iterable[str] | None = None,
        where: Where | None = None,
        dry_run: bool = False,
    ) -> ForgetReceipt:
        """Remove documents with their versions, passages and states, and overwrite the states' bytes.

        Exactly one of ``ids`` and a non-empty ``where`` selects them, expired ones included; anything else is
        a ConfigError, an unknown id a NotFoundError and nothing is removed. ``where`` may match nothing.
        """
        self._use(write=not dry_run)
        wanted = None if ids is None else [ids] if isinstance(ids, str) else list(dict.fromkeys(ids))
        if (wanted is None) == (where is None) or not (wanted or where):
            raise ConfigError(
                "forget needs exactly one of ids (not empty) and where (not empty); "
                "to remove everything use forget_namespace"
            )
        return self._forget(namespace, wanted, where, dry_run)

    def forget_namespace(self, namespace: str, *, confirm: str) -> ForgetReceipt:
        """Forget every document of a namespace; ``confirm`` must repeat its name."""
        self._use(write=True)
        if confirm != namespace:
            raise ConfigError(
                f"confirm is {confirm!r}; repeat the namespace {namespace!r} to forget all of it"
            )
        receipt = self._forget(namespace, None, None, False)
        if not receipt.ids:
            raise NotFoundError(f"namespace {namespace!r} holds no documents; see namespaces()")
        return receipt

    def _forget(
        self, namespace: str, ids: list[str] | None, where: Where | None, dry_run: bool
    ) -> ForgetReceipt:
        if dry_run:
            with self._reading() as connection:
                return self._receipt(connection, self._selected(connection, namespace, ids, where))
        with self._writing():
            with self._reading() as connection:
                selected = self._selected(connection, namespace, ids, where)
                receipt = self._receipt(connection, selected)
            return self._remove(selected, receipt)

    def _selected(
        self, connection: Connection, namespace: str, ids: list[str] | None, where: Where | None
    ) -> dict[int, str]:
        if ids is None:
            return self._catalog.matching(connection, namespace, parse_filter(where))
        keys = self._catalog.keys(connection, namespace, ids)
        if missing := [id for id in ids if id not in keys]:
            raise _not_found(namespace, missing)
        return {keys[id]: id for id in ids}

    def _receipt(self, connection: Connection, selected: Mapping[int, str]) -> ForgetReceipt:
        removed = self._catalog.removal(connection, selected)
        return ForgetReceipt(
            ids=tuple(selected.values()),
            counts={
                "documents": removed.documents,
                "versions": removed.versions,
                "passages": removed.passages,
            },
            bytes_erased=removed.state_bytes,
            masked_at=None,
            erased_at=None,
            dry_run=True,
        )

    def _remove(self, selected: Mapping[int, str], planned: ForgetReceipt) -> ForgetReceipt:
        if not selected:
            return planned.model_copy(update={"dry_run": False})
        with self._writer.commit() as (connection, generation):
            self._catalog.remove(connection, selected, generation)
        masked_at = _now()
        done, left = self._writer.erase()
        times = {"masked_at": masked_at, "erased_at": _now() if done else None, "beyond_reach": left}
        return planned.model_copy(update={**times, "dry_run": False})

    def exists(self, namespace: str, ids: Iterable[str]) -> set[str]:
        """Those of the ids that are taken, by expired documents too."""
        with self._reading() as connection:
            return set(self._catalog.keys(connection, namespace, ids))

    def get(self, namespace: str, id: str) -> Document:
        """A document at its current version, expired or not; NotFoundError if there is none."""
        with self._reading() as connection:
            return self._catalog.document(connection, self._key(connection, namespace, id))

    def history(self, namespace: str, id: str) -> tuple[DocumentVersion, ...]:
        """Every version of a document, oldest first, the current one last."""
        with self._reading() as connection:
            return self._catalog.history(connection, self._key(connection, namespace, id))

    def list(
        self, namespace: str, where: Where | None = None, *, limit: int = 100, cursor: str | None = None
    ) -> Page[Document]:
        """Documents that have not expired, last added first. Documents added meanwhile do not shift pages."""
        if limit < 1:
            raise ConfigError(f"limit is {limit}; expected 1 or more")
        before = None if cursor is None else read_cursor(cursor, namespace, where)
        tree = parse_filter(where)
        with self._reading() as connection:
            found = self._catalog.page(connection, namespace, tree, _now(), before, limit + 1)
        shown = found[:limit]
        following = write_cursor(shown[-1][0], namespace, where) if len(found) > limit else None
        return Page[Document](items=tuple(document for _, document in shown), next_cursor=following)

    def count(self, namespace: str, where: Where | None = None) -> int:
        """How many documents match and have not expired."""
        tree = parse_filter(where)
        with self._reading() as connection:
            return self._catalog.count(connection, namespace, tree, _now())

    def visible(
        self, namespace: str, where: Where | None = None, *, now: datetime | None = None
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Sorted passage numbers of a namespace's documents that match and have not expired by ``now``."""
        tree = parse_filter(where)
        with self._reading() as connection:
            return self._catalog.visible(connection, namespace, tree, now or _now())

    def passages(self, numbers: Iterable[int]) -> dict[int, PassageText]:
        """Passages with their documents' text; numbers that do not exist are left out."""
        with self._reading() as connection:
            return self._catalog.texts(connection, (int(number) for number in numbers))

    def states(self, record: PassageRecord) -> dict[str, TensorBytes]:
        """The states of a passage as views of the mapped file, checked when a block is first touched.

        A view shows zeros once its passage is forgotten or replaced: copy what must outlive that.
        NotFoundError if the passage is gone, StateDamagedError if its bytes are not what was written.
        """
        self._use()
        return self._states.read(record)

    def verify(self) -> tuple[str, ...]:
        """Read everything once; one sentence per problem, none when the bank is sound."""
        self._use()
        problems = [*self._database.problems(), *self._commit_problems()]
        with self._reading() as connection:
            problems += self._catalog.damaged_documents(connection)
        return (*problems, *self._state_problems())

    def _commit_problems(self) -> Iterator[str]:
        try:
            with self._writer.checked_reading():
                pass
        except CatalogDamagedError as error:
            yield str(error)
        if self._counter is not None and (damaged := self._counter.damaged_slots()):
            yield f"the commit counter has {damaged} damaged slot of 2; the next write repairs it"

    def _state_problems(self) -> Iterator[str]:
        after = -1
        while True:
            with self._reading() as connection:
                records = self._catalog.records(connection, after, 1000)
            if not records:
                return
            for record in records:
                try:
                    self._states.read(record, again=True)
                except NotFoundError:
                    continue  # forgotten meanwhile
                except StateDamagedError as error:
                    yield str(error)
            after = records[-1].number

    def compact(self) -> int:
        """Erase expired documents, rewrite sparse segments and the catalog; returns bytes freed."""
        with self._writing() as sizes:
            before = self._database.size_bytes() + sum(self._segments.sizes().values())
            self._remove_expired()
            self._writer.rewrite_segments(sizes, self._states.block)
            self._database.scrub(limit_bytes=None)
            return before - self._database.size_bytes() - sum(self._segments.sizes().values())

    def _remove_expired(self) -> None:
        with self._reading() as connection:
            expired = self._catalog.matching(connection, None, None, expired_at=_now())
        if expired:
            with self._writer.commit() as (connection, generation):
                self._catalog.remove(connection, expired, generation)
            self._writer.erase()

    def close(self) -> None:
        """Release files and connections; calling it again does nothing."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        self._segments.close()
        self._database.close()

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

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        self._use()
        with self._database.reading() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Sizes]:
        """Hold the writer lock; yields the committed size of every segment."""
        self._use(write=True)
        with self._writer.held() as sizes:
            yield sizes

    def _model(self) -> str | None:
        self._refresh_identity()
        return self._identity.fingerprint

    def _locate(self, number: int) -> PassageRecord | None:
        self._refresh_identity()
        with self._reading() as connection:
            return self._catalog.record(connection, number)

    def _refresh_identity(self) -> None:
        if self._identity.fingerprint is not None:
            return
        with self._reading() as connection:
            identity = self._catalog.identity(connection)
        if identity is not None:
            self._identity = identity

    def _keys(self, names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
        by_namespace: dict[str, list[str]] = {}
        for namespace, id in names:
            by_namespace.setdefault(namespace, []).append(id)
        found: dict[tuple[str, str], int] = {}
        with self._reading() as connection:
            for namespace, ids in by_namespace.items():
                keys = self._catalog.keys(connection, namespace, ids)
                found.update(((namespace, id), key) for id, key in keys.items())
        return found

    def _key(self, connection: Connection, namespace: str, id: str) -> int:
        keys = self._catalog.keys(connection, namespace, [id])
        if id not in keys:
            raise _not_found(namespace, [id])
        return keys[id]

    def _expect(self, namespace: str, id: str, version: int | None) -> int:
        """The key of an existing document that is at ``version``, if one is given."""
        with self._reading() as connection:
            key = self._key(connection, namespace, id)
            current = self._catalog.document(connection, key).version
        if version not in (None, current):
            raise ConflictError(
                f"document {id!r} is at version {current}, expected {version}: it changed meanwhile; "
                "read it again and repeat the update"
            )
        return key

    def _documents(self, keys: Sequence[int]) -> Documents:
        with self._reading() as connection:
            found = self._catalog.documents(connection, dict.fromkeys(keys))
        return [found[key] for key in keys]


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


def _not_found(namespace: str, ids: Sequence[str]) -> NotFoundError:
    shown = ", ".join(repr(id) for id in ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
    return NotFoundError(f"no document {shown} in namespace {namespace!r}; see list()")


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
