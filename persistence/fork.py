"""A second bank that starts as the first one is: the catalog copied, segment files linked where possible.

A linked segment is safe because a file with two names is never written (see ``segments``). The copy is made
in a folder beside its place and moved there whole. Knows no model.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import insert, select

from msa_memory.errors import LockedError, StorageError
from msa_memory.persistence import bank_rows, passage_rows
from msa_memory.persistence.commit_counter import Acknowledged, CommitCounter
from msa_memory.persistence.database import Database
from msa_memory.persistence.disk import (
    guarded,
    move,
    open_file,
    opened,
    sync,
    sync_folder,
    truncate,
    write_at,
)
from msa_memory.persistence.folder import BankFolder
from msa_memory.persistence.ledger import digest_at
from msa_memory.persistence.segments import FileSegments
from msa_memory.persistence.store import Store
from msa_memory.persistence.tables import metadata

__all__ = ["fork_bank"]

_COPY_BYTES = 1 << 20
_COPY_ROWS = 1000


def fork_bank(store: Store, path: Path) -> None:
    """Copy an open bank to the folder ``path``, which must not exist or be empty.

    Writers wait meanwhile. StorageError where something is in the way or the disk refuses.
    """
    with guarded("look for", path):
        if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
            raise StorageError(f"{path} exists already; name a new or an empty folder for the fork")
        path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as partial:
        folder = BankFolder(partial)
        with store._writing() as sizes, guarded("copy the bank to", path):
            _copy_states(store, folder, sizes)
            _write_counter(store, folder)
            _copy_catalog(store, folder)  # last: without it the folder opens as damaged, not as less
        with guarded("move the fork to", path):
            sync_folder(folder.states)
            sync_folder(partial)
            os.rename(partial, path)
            sync_folder(path.parent)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A folder of this fork's own next to ``path``, without what a killed one may have left there."""
    partial = path.with_name(f".{path.name}.fork")
    with guarded("create", partial):
        held = open_file(path.with_name(f".{path.name}.fork-lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(f"another fork is being made at {path}; name another folder") from error
        with guarded("create", partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(mode=0o700)
            (partial / "states").mkdir(mode=0o700)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            path.with_name(f".{path.name}.fork-lock").unlink(missing_ok=True)
    finally:
        os.close(held)


def _copy_states(store: Store, folder: BankFolder, sizes: Mapping[str, int]) -> None:
    segments = store._segments
    if not isinstance(segments, FileSegments):
        _write_states(store, folder, sizes)
        return
    for name in sizes:
        source, target = segments._folder / name, folder.states / name
        try:
            os.link(source, target)
        except FileNotFoundError:
            continue  # an empty segment has no file; a lost one is as lost in the fork
        except OSError:  # another file system, or one without links
            _copy_file(source, target)


def _copy_file(source: Path, target: Path) -> None:
    with opened(source, os.O_RDONLY) as of, opened(target, os.O_RDWR | os.O_CREAT | os.O_EXCL) as into:
        offset = 0
        while piece := os.pread(of, _COPY_BYTES, offset):
            write_at(into, piece, offset)
            offset += len(piece)
        sync(into)


def _write_states(store: Store, folder: BankFolder, sizes: Mapping[str, int]) -> None:
    """The blocks of a bank in memory, at the places its catalog says."""
    with store._reading() as connection:
        records = passage_rows.records_in(connection, list(sizes))
    for name in dict.fromkeys(record.segment for record in records):
        with opened(folder.states / name, os.O_RDWR | os.O_CREAT) as target:
            for record in records:
                if record.segment == name:
                    write_at(target, store._states.block(record), record.offset)
            truncate(target, sizes[name])
            sync(target)


def _write_counter(store: Store, folder: BankFolder) -> None:
    with store._reading() as connection:
        generation = bank_rows.generation(connection)
        digest = digest_at(connection, generation)
    counter = CommitCounter(folder.commit)
    counter.create(store.identity.bank_id)
    if generation:
        counter.write(Acknowledged(store.identity.bank_id, generation, digest))


def _copy_catalog(store: Store, folder: BankFolder) -> None:
    """The catalog without free pages, under another name until it is complete."""
    unfinished = folder.root / "unfinished"
    with opened(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL):
        pass
    if store._database.is_sqlite:
        store._database.copy_to(unfinished)
    else:
        _copy_rows(store, unfinished)
    with opened(unfinished, os.O_RDWR) as copied:
        sync(copied)
    move(unfinished, folder.catalog)


def _copy_rows(store: Store, path: Path) -> None:
    """Every row of a PostgreSQL catalog into an SQLite file."""
    target = Database.at(path, read_only=False, timeout_s=0)
    try:
        target.migrate()
        with store._reading() as source, target.writing() as into:
            for table in metadata.sorted_tables:
                result = source.execution_options(yield_per=_COPY_ROWS).execute(select(table)).mappings()
                for rows in result.partitions():
                    into.execute(insert(table), [dict(row) for row in rows])
    finally:
        target.close()
