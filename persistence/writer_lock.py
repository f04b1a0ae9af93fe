"""One writer at a time: among threads, among processes (flock), among hosts (PostgreSQL advisory lock).

Held per write, not for the life of a store, and released by the operating system or the server when its
holder dies. Knows nothing of what is written.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from msa_memory.errors import LockedError, StorageError
from msa_memory.persistence.database import first_line
from msa_memory.persistence.disk import guarded, opened

__all__ = ["AdvisoryLock", "FileLock", "ThreadLock", "WriterLock"]

_POLL_S = 0.01


class WriterLock(Protocol):
    """What a store asks of a lock; not reentrant."""

    def held(self) -> AbstractContextManager[None]:
        """Hold the lock for the block, or raise LockedError after the timeout."""
        ...


class ThreadLock:
    """Keeps threads of one process apart; enough for a bank in memory."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=self.timeout_s):
            raise LockedError(
                f"another thread of this process has been writing for more than {self.timeout_s:g} s; "
                "try again, or open with a larger lock_timeout_s"
            )
        try:
            yield
        finally:
            self._lock.release()


class FileLock:
    """Keeps processes of one host apart with ``flock``; the file holds the owner's process id."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self._threads = ThreadLock(timeout_s)

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._threads.held():
            descriptor = self._acquire()
            try:
                yield
            finally:
                os.close(descriptor)

    def _acquire(self) -> int:
        with guarded("open the writer lock", self._path):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _poll(lambda: _flock(descriptor), self._threads.timeout_s, self._owner)
            with guarded("write the writer lock", self._path):
                os.pwrite(descriptor, f"{os.getpid():<20d}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _owner(self) -> str:
        with guarded("read the writer lock", self._path), opened(self._path, os.O_RDONLY) as descriptor:
            return (
                f"process {os.pread(descriptor, 32, 0).decode(errors='replace').strip()} holds {self._path}"
            )


class AdvisoryLock:
    """Keeps every client of one PostgreSQL bank apart, on whatever host."""

    _KEY = "hashtext('msa-memory writer ' || current_schema())"

    def __init__(self, engine: Engine, timeout_s: float) -> None:
        self._engine = engine
        self._threads = ThreadLock(timeout_s)

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._threads.held():
            try:
                connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            except SQLAlchemyError as error:
                raise StorageError(
                    f"cannot reach the catalog's server: {first_line(error, self._engine)}"
                ) from error
            try:
                attempt = text(f"SELECT pg_try_advisory_lock({self._KEY})")
                _poll(lambda: bool(connection.scalar(attempt)), self._threads.timeout_s, self._owner)
                yield
            finally:
                connection.invalidate()  # ends the server session, and the lock with it, in every case
                connection.close()

    def _owner(self) -> str:
        return "another client holds the catalog's advisory lock"


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _poll(attempt: Callable[[], bool], timeout_s: float, owner: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    wait_s = _POLL_S / 10
    while not attempt():
        if time.monotonic() >= deadline:
            raise LockedError(
                f"{owner()} and has been writing for more than {timeout_s:g} s; "
                "wait for it, stop it, or open with a larger lock_timeout_s"
            )
        time.sleep(wait_s)
        wait_s = min(wait_s * 2, _POLL_S)
