"""An open bank as its verbs share it: parts, checks, transactions, and the look before a write.

Knows when reading and writing are allowed and under which model; no verb.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy import Connection

from msa_memory.errors import (
    CatalogDamagedError,
    ConfigError,
    ForkedMemoryError,
    InvalidDocumentError,
    ModelMismatchError,
    ReadOnlyError,
    StorageError,
)
from msa_memory.persistence import bank_rows, document_rows, passage_rows
from msa_memory.persistence.checkup import Checkup
from msa_memory.persistence.opening import OpenBank, open_folder, open_in_memory
from msa_memory.persistence.records import BankIdentity, NewDocument, PassageRecord
from msa_memory.persistence.seal import write_seal
from msa_memory.persistence.spool import Spool
from msa_memory.persistence.state_reader import StateReader
from msa_memory.persistence.visibility import Visibility
from msa_memory.persistence.writer import Sizes, Writer

__all__ = ["OpenedStore", "check_storable", "utc_now"]

T = TypeVar("T")


class OpenedStore:
    """What ``Store`` and the verbs it inherits have in common."""

    def __init__(self, bank: OpenBank, *, read_only: bool) -> None:
        self._database, self._segments, self._counter = bank.database, bank.segments, bank.counter
        self._identity, self._place = bank.identity, bank.place
        self._folder, self._damage = bank.folder, bank.damage
        self._spool = None if bank.folder is None else Spool(bank.folder.states)
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

    def close(self) -> None:
        """Release files and connections; calling it again does nothing."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        if self._spool is not None:
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

    @contextmanager
    def _writing_after(self, look: Callable[[Connection], T]) -> Iterator[tuple[Sizes, T]]:
        """Hold the writer lock; yields ``_writing``'s sizes and what ``look`` found, in one transaction."""
        self._use(write=True)
        self._trust()
        with self._writer.held_after(look) as held:
            yield held

    def _model(self) -> str | None:
        with self._reading() as connection:
            return self._check_model(connection)

    def _check_model(self, connection: Connection) -> str | None:
        """The bank's fingerprint, None before the first model is bound.

        ModelMismatchError if another process moved the bank to another model since this one opened it.
        """
        found, known = bank_rows.identity(connection), self._identity
        if found is not None and known.fingerprint not in (None, found.fingerprint):
            raise ModelMismatchError(
                f"the bank at {self._place} was moved from model {known.model!r} to {found.model!r} "
                "meanwhile; open the memory again"
            )
        if found is not None and known.fingerprint is None:
            self._identity = found
        return self._identity.fingerprint

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
        with self._reading() as connection:
            return document_rows.keys_of(connection, names, alive_at)


def utc_now() -> datetime:
    """The moment a verb goes by."""
    return datetime.now(UTC)


def _refuse_in_memory(catalog_url: str | None, state_url: str | None, read_only: bool) -> None:
    if catalog_url or state_url or read_only:
        raise ConfigError(
            "a memory without a path is kept in memory and takes no catalog_url, state_url or read_only; "
            "give a path"
        )


def check_storable(document: NewDocument, *, postgresql: bool) -> None:
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
