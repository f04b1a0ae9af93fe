"""From a path or URLs to the parts of an open bank: creating it, migrating it, refusing what is damaged.

Everything that decides whether a bank may be opened is here. An existing bank is opened without the
writer lock; only creation and migration take it. Knows no document.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection

from msa_memory.errors import CatalogDamagedError, ConfigError, StorageError
from msa_memory.persistence import bank_rows
from msa_memory.persistence.audit import lost_or_inconsistent
from msa_memory.persistence.commit_counter import Acknowledged, CommitCounter
from msa_memory.persistence.database import REVISIONS, Database
from msa_memory.persistence.disk import guarded
from msa_memory.persistence.folder import BankFolder, state_folder
from msa_memory.persistence.ledger import digest_at
from msa_memory.persistence.records import BankIdentity
from msa_memory.persistence.seal import fits_seal
from msa_memory.persistence.segments import FileSegments, MemorySegments, Segments
from msa_memory.persistence.writer_lock import AdvisoryLock, FileLock, ThreadLock, WriterLock

__all__ = ["OpenBank", "check_commits", "find_damage", "open_folder", "open_in_memory"]

logger = logging.getLogger(__name__)

CHECKED_WHEN_UNSEALED_BYTES = 32 * 1024 * 1024
"""Largest SQLite catalog that is read through at opening, where its bank was not closed properly."""


@dataclass(frozen=True, slots=True)
class OpenBank:
    """The parts a store works with; ``counter`` and ``folder`` are None for a bank in memory."""

    database: Database
    segments: Segments
    lock: WriterLock
    counter: CommitCounter | None
    identity: BankIdentity
    place: str
    folder: BankFolder | None = None
    damage: tuple[str, ...] = ()
    """What was found lost or inconsistent: what is still there can be read, nothing can be written."""


def open_in_memory(timeout_s: float) -> OpenBank:
    """A new bank that touches no disk."""
    database = Database.in_memory()
    database.migrate()
    _create_bank(database)
    return OpenBank(
        database, MemorySegments(), ThreadLock(timeout_s), None, _read_identity(database), "memory"
    )


def open_folder(
    path: Path, *, catalog_url: str | None, state_url: str | None, read_only: bool, timeout_s: float
) -> OpenBank:
    """The bank at ``path``, created if there is none and ``read_only`` is false."""
    folder = BankFolder(path, state_folder(state_url))
    folder.check()
    counter = CommitCounter(folder.commit)
    if not read_only:
        folder.create()
    if catalog_url is None:
        lock: WriterLock = FileLock(folder.lock, timeout_s)
        _need_catalog_file(folder, counter, lock, read_only)
        database = Database.at(folder.catalog, read_only=read_only, timeout_s=timeout_s)
    else:
        database = Database.server(catalog_url, read_only=read_only)
        lock = AdvisoryLock(database.engine, timeout_s)
    try:
        _prepare(folder, database, counter, lock, read_only)
        identity = _read_identity(database)
        acknowledged = counter.read()  # before the catalog: another process may commit in between
        with database.reading() as connection:
            check_commits(acknowledged, connection, identity)
        damage = _look_for_damage(folder, database) if database.is_sqlite else ()
    except BaseException:
        database.engine.dispose()
        raise
    segments = FileSegments(folder.states)
    return OpenBank(database, segments, lock, counter, identity, str(path), folder, damage)


def _look_for_damage(folder: BankFolder, database: Database) -> tuple[str, ...]:
    """Nothing for a catalog that fits its seal; else what reading would not notice, if it is small."""
    if fits_seal(folder.seal, folder.catalog) or database.size_bytes() > CHECKED_WHEN_UNSEALED_BYTES:
        return ()
    damage = find_damage(database)
    for problem in damage:
        logger.error("%s", problem)
    return damage


def find_damage(database: Database) -> tuple[str, ...]:
    """What the database finds wrong with its files, and rows that are lost, back or inconsistent."""
    found: list[str] = []
    try:
        found += database.problems()
        with database.reading() as connection:
            found += lost_or_inconsistent(connection)
    except CatalogDamagedError as error:  # so damaged that it cannot be read to the end
        found.append(str(error))
    return tuple(found)


def check_commits(acknowledged: Acknowledged | None, connection: Connection, identity: BankIdentity) -> None:
    """CatalogDamagedError unless the catalog has every commit that was ever acknowledged.

    ``acknowledged`` was read before the transaction began: another process may commit in between.
    """
    if acknowledged is None:
        raise CatalogDamagedError("the commit counter is missing; restore the bank's folder from a backup")
    bank_id, count, digest = acknowledged
    generation = bank_rows.generation(connection)
    if bank_id != identity.bank_id:
        raise CatalogDamagedError(
            f"the catalog belongs to bank {identity.bank_id}, the commit counter and states to bank "
            f"{bank_id}; put files of one bank together"
        )
    if generation < count:
        raise CatalogDamagedError(
            f"the catalog has {generation} commits, but {count} were acknowledged: its write-ahead log was "
            "lost or an older copy was put in place; restore the whole folder from one backup"
        )
    if digest is not None and (found := digest_at(connection, count)) not in (digest, None):
        raise CatalogDamagedError(
            f"commit {count} of the catalog is {found.hex()[:16]}, but {digest.hex()[:16]} was acknowledged: "
            "another copy was put in place and written to; restore the whole folder from one backup"
        )


def _need_catalog_file(folder: BankFolder, counter: CommitCounter, lock: WriterLock, read_only: bool) -> None:
    with guarded("look for", folder.catalog):
        if folder.catalog.exists() and folder.catalog.stat().st_size:
            return
    _refuse_lost_catalog(folder, counter)
    if read_only:
        raise StorageError(f"there is no bank at {folder.root}; open it without read_only to create one")
    with lock.held():
        folder.create_catalog()


def _refuse_lost_catalog(folder: BankFolder, counter: CommitCounter) -> None:
    acknowledged = counter.read()
    if folder.holds_states() or (acknowledged is not None and acknowledged.generation > 0):
        raise CatalogDamagedError(
            f"the catalog of {folder.root} is missing or empty, but the bank has states or acknowledged "
            "commits; restore the catalog from a backup (a new one would hide the memory)"
        )


def _prepare(
    folder: BankFolder, database: Database, counter: CommitCounter, lock: WriterLock, read_only: bool
) -> None:
    if database.is_sqlite:
        database.check_size()
    revision = _known_revision(database)
    if revision == REVISIONS[-1] and (read_only or counter.read() is not None):
        return
    if read_only:
        if revision is None:
            _refuse_lost_catalog(folder, counter)
            raise StorageError(f"there is no bank at {folder.root}; open it without read_only to create one")
        raise StorageError(
            f"the bank at {folder.root} has schema {revision}, this version reads {REVISIONS[-1]}; "
            "open it once without read_only to migrate it"
        )
    with lock.held():
        revision = _known_revision(database)
        if revision is None:
            _refuse_lost_catalog(folder, counter)
        if revision != REVISIONS[-1]:
            database.migrate()
        if _identity(database) is None:
            _refuse_lost_catalog(folder, counter)
            _create_bank(database)
        _create_counter(folder, database, counter)


def _known_revision(database: Database) -> str | None:
    revision = database.revision()
    if revision is not None and revision not in REVISIONS:
        raise StorageError(
            f"the bank has schema {revision}, this version knows {', '.join(REVISIONS)}; upgrade msa-memory"
        )
    return revision


def _create_bank(database: Database) -> None:
    with database.writing() as connection:
        bank_rows.create(connection, uuid.uuid4().hex)


def _create_counter(folder: BankFolder, database: Database, counter: CommitCounter) -> None:
    acknowledged = counter.read()
    identity = _read_identity(database)
    with database.reading() as connection:
        generation = bank_rows.generation(connection)
    if generation == 0 and (acknowledged is None or acknowledged.generation == 0):
        counter.create(identity.bank_id)
    elif acknowledged is None:
        raise CatalogDamagedError(
            f"{folder.commit} is missing, but the catalog has {generation} commits; restore the folder from "
            "a backup, or give the state_url the bank was made with"
        )


def _identity(database: Database) -> BankIdentity | None:
    with database.reading() as connection:
        return bank_rows.identity(connection)


def _read_identity(database: Database) -> BankIdentity:
    identity = _identity(database)
    if identity is None:
        raise CatalogDamagedError("the catalog has lost its bank row; restore it from a backup")
    if identity.format_version != bank_rows.FORMAT_VERSION:
        raise ConfigError(
            f"the bank has format {identity.format_version}, this version reads {bank_rows.FORMAT_VERSION}; "
            "upgrade msa-memory"
        )
    return identity
