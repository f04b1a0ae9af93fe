"""A connection to the catalog's database: how it is opened, its transactions, its schema and its errors.

Knows SQLite's and PostgreSQL's habits so that nothing else needs to; knows no statement about documents.
SQLAlchemy's and sqlite3's exceptions stop here and become ours.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, QueuePool, StaticPool, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, SQLAlchemyError

from msa_memory.errors import (
    CatalogDamagedError,
    ConfigError,
    InvalidDocumentError,
    LockedError,
    MissingExtraError,
    MSAError,
    StorageError,
)
from msa_memory.persistence.disk import guarded
from msa_memory.persistence.tables import metadata

__all__ = ["Database", "REVISIONS", "Scrubbed", "VACUUM_LIMIT_BYTES", "VERSION_TABLE", "first_line"]

REVISIONS = ("0001", "0002")
"""Every schema revision, oldest first; the last one is what this code reads and writes."""

VACUUM_LIMIT_BYTES = 64 * 1024 * 1024
"""Largest SQLite catalog that a forget rewrites at once; above it ``compact`` does."""

VERSION_TABLE = "msa_memory_version"
_SECRETS = ("password", "sslpassword")  # of a URL's query, beside the one before the host
_MIGRATIONS = Path(__file__).parent / "migrations"
_CORRUPT = (1, 11, 26)  # SQLITE_ERROR (tables or columns are not there), SQLITE_CORRUPT, SQLITE_NOTADB
_BUSY = (5, 6)
_SCRUB_WAIT_MS = 2000
_PRAGMAS = ("foreign_keys=ON", "temp_store=MEMORY", "cell_size_check=ON", "trusted_schema=OFF")
_WRITER_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON")


class Scrubbed(NamedTuple):
    """What is left of deleted rows in the database's files: nothing, or what and until when."""

    left: tuple[str, ...] = ()
    until_compact: bool = False
    """Whether it stays until ``compact``; else the next write can try again."""


class Database:
    """Transactions on one catalog. Several threads may share it."""

    def __init__(self, engine: Engine, place: str, *, path: Path | None = None) -> None:
        self.engine = engine
        self._place = place
        self._path = path
        shared = isinstance(engine.pool, StaticPool)  # one connection for all threads: one at a time
        self._gate: AbstractContextManager[Any] = threading.RLock() if shared else nullcontext()
        if self.is_sqlite:
            event.listen(engine, "begin", _begin)

    @classmethod
    def in_memory(cls) -> Database:
        """A database that lives and ends with this object and touches no disk."""

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            return _prepared(connection, (*_PRAGMAS, "secure_delete=ON"))

        engine = create_engine("sqlite://", creator=connect, poolclass=StaticPool, hide_parameters=True)
        return cls(engine, "the catalog in memory")

    @classmethod
    def at(cls, path: Path, *, read_only: bool, timeout_s: float) -> Database:
        """The SQLite file ``path``, which must exist; an empty file is an empty database."""
        uri = f"{path.absolute().as_uri()}?{_mode(path, read_only)}"
        pragmas = _PRAGMAS if read_only else _PRAGMAS + _WRITER_PRAGMAS

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(
                uri, uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False
            )
            return _prepared(connection, pragmas)

        engine = create_engine(
            "sqlite://",
            creator=connect,
            poolclass=QueuePool,
            pool_size=8,
            max_overflow=-1,
            hide_parameters=True,
        )
        return cls(engine, str(path), path=path)

    @classmethod
    def server(cls, url: str, *, read_only: bool) -> Database:
        """A PostgreSQL database by URL. ConfigError for other URLs, MissingExtraError without psycopg."""
        try:
            parsed = make_url(url)
        except (ArgumentError, AttributeError, TypeError, ValueError):
            raise ConfigError(
                "catalog_url cannot be parsed; expected postgresql://user@host/database, with the special "
                "characters of a password percent-encoded"
            ) from None  # the parser's own message may hold a piece of the password
        if parsed.get_backend_name() != "postgresql":
            raise ConfigError(
                f"catalog_url names {parsed.get_backend_name()!r}; expected postgresql://user@host/database, "
                "or leave it out for SQLite in the bank's folder"
            )
        try:
            engine = create_engine(
                parsed.set(drivername="postgresql+psycopg"),
                pool_size=8,
                max_overflow=-1,
                pool_pre_ping=True,
                hide_parameters=True,
                isolation_level="REPEATABLE READ",
                execution_options={"postgresql_readonly": True} if read_only else {},
            )
        except ImportError as error:
            raise MissingExtraError("PostgreSQL needs psycopg: pip install 'msa-memory[postgres]'") from error
        shown = parsed.difference_update_query(_SECRETS)
        return cls(engine, shown.render_as_string(hide_password=True))

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the catalog throughout."""
        with self._gate, self._translated(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that commits at the end of the block and rolls back on any exception."""
        options: Any = {"immediate": True} if self.is_sqlite else {"isolation_level": "READ COMMITTED"}
        with self._gate, self._translated(), self.engine.connect() as connection:
            connection = connection.execution_options(**options)
            with connection.begin():
                yield connection

    def revision(self) -> str | None:
        """The schema's revision, None for an empty database; StorageError if it is another application's."""
        with self.reading() as connection:
            names = inspect(connection).get_table_names()
            if VERSION_TABLE in names:
                found = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))
                return None if found is None else str(found)
        if names:
            raise StorageError(
                f"{self._place} holds tables of another application: {sorted(names)[:5]}; expected a bank"
            )
        return None

    def migrate(self) -> None:
        """Bring the schema to the newest revision, in one transaction."""
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        with self.writing() as connection:
            config.attributes.update(connection=connection, version_table=VERSION_TABLE)
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise StorageError(f"cannot migrate {self._place}: {error}") from error

    def scrub(self, *, compacting: bool = False) -> Scrubbed:
        """Remove what deleted rows left in the database's files; in large ones only when ``compacting``."""
        if not self.is_sqlite:
            if compacting:
                self._vacuum_full()
            kept = "deleted rows in PostgreSQL's files until compact() runs VACUUM FULL"
            return Scrubbed() if compacting else Scrubbed((kept,), until_compact=True)
        large = not compacting and self.size_bytes() > VACUUM_LIMIT_BYTES
        if not large:
            self._outside_transactions("VACUUM")  # moved cells leave copies that secure_delete does not see
        if self._path is not None and self._outside_transactions("PRAGMA wal_checkpoint(TRUNCATE)")[0]:
            log = "the SQLite write-ahead log, which another reader holds open, until the next write"
            return Scrubbed((log,))
        if large:
            kept = "fragments of index entries in the SQLite file until compact()"
            return Scrubbed((kept,), until_compact=True)
        return Scrubbed()

    def _vacuum_full(self) -> None:
        """Rewrite this catalog's tables in files of their own; waits for readers only briefly."""
        with self._translated(), self.engine.connect() as connection:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(text(f"SET lock_timeout = {_SCRUB_WAIT_MS}"))
            for table in metadata.sorted_tables:
                connection.execute(text(f'VACUUM (FULL, ANALYZE) "{table.name}"'))
            connection.execute(text("RESET lock_timeout"))

    def copy_to(self, path: Path) -> None:
        """Write an SQLite database, without free pages, to the empty file ``path``; not synced."""
        with self._gate, self._translated():
            connection = self.engine.raw_connection()
            try:
                connection.cursor().execute("VACUUM INTO ?", (str(path),))
            finally:
                connection.close()

    def size_bytes(self) -> int:
        """Bytes the catalog occupies, its write-ahead log included."""
        if self._path is not None:
            with guarded("measure", self._path):
                return self._path.stat().st_size + self._log_bytes()
        query = (
            "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
            if self.is_sqlite
            else "SELECT pg_database_size(current_database())"
        )
        with self.reading() as connection:
            return int(connection.scalar(text(query)) or 0)

    def check_size(self) -> None:
        """CatalogDamagedError if the SQLite file is shorter than its own header says."""
        if self._path is None or self._log_bytes():
            return
        with guarded("read", self._path), self._path.open("rb") as file:
            header = file.read(100)
            size = os.fstat(file.fileno()).st_size
        page_bytes = int.from_bytes(header[16:18], "big")
        expected = int.from_bytes(header[28:32], "big") * (65536 if page_bytes == 1 else page_bytes)
        if size < expected:
            raise CatalogDamagedError(
                f"{self._path} is cut off: {size} bytes, its header says {expected}; restore it from a backup"
            )

    def _log_bytes(self) -> int:
        assert self._path is not None
        try:
            return self._path.with_name(f"{self._path.name}-wal").stat().st_size
        except FileNotFoundError:
            return 0

    def problems(self) -> list[str]:
        """What the database itself finds wrong with its files."""
        if not self.is_sqlite:
            return []
        with self.reading() as connection:
            lines = [str(row[0]) for row in connection.execute(text("PRAGMA integrity_check(20)"))]
        return [f"{self._place}: {line}" for line in lines if line != "ok"]

    def rebuild_indexes(self) -> None:
        """Make every index anew from its table."""
        with self.writing() as connection:
            if self.is_sqlite:
                connection.execute(text("REINDEX"))
            else:
                for table in metadata.sorted_tables:
                    connection.execute(text(f'REINDEX TABLE "{table.name}"'))

    def close(self) -> None:
        """Close every connection; SQLite then folds its write-ahead log into the file."""
        with self._translated():
            self.engine.dispose()

    def _outside_transactions(self, statement: str) -> tuple[Any, ...]:
        """Run a statement that SQLite refuses in a transaction, waiting for readers only briefly."""
        with self._gate, self._translated():
            connection = self.engine.raw_connection()
            try:
                cursor = connection.cursor()
                (timeout_ms,) = cursor.execute("PRAGMA busy_timeout").fetchone()
                cursor.execute(f"PRAGMA busy_timeout={min(timeout_ms, _SCRUB_WAIT_MS)}")
                try:
                    return tuple(cursor.execute(statement).fetchone() or ())
                finally:
                    cursor.execute(f"PRAGMA busy_timeout={timeout_ms}")
            finally:
                connection.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:  # SQLite quotes a damaged schema in its message
            raise CatalogDamagedError(
                f"{self._place} is damaged: {error}; restore it from a backup"
            ) from error
        except (UnicodeEncodeError, OverflowError) as error:
            raise InvalidDocumentError(
                f"{self._place} cannot hold the value: {error}; expected valid Unicode and 64-bit integers"
            ) from error
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise self._ours(error) from error

    def _ours(self, error: Exception) -> MSAError:
        original = error.orig if isinstance(error, DBAPIError) and error.orig else error
        reason = first_line(original, self.engine)
        code = getattr(original, "sqlite_errorcode", 0) & 0xFF
        if code in _CORRUPT:
            return CatalogDamagedError(f"{self._place} is damaged: {reason}; restore it from a backup")
        if code in _BUSY:
            return LockedError(f"{self._place} is locked by another program: {reason}; try again")
        if isinstance(error, DataError):
            return InvalidDocumentError(f"{self._place} cannot store the value: {reason}")
        return StorageError(f"{self._place} refused: {reason}; check free space, permissions and the server")


def first_line(error: BaseException, engine: Engine) -> str:
    """What a driver or server says first, without the passwords of the engine's URL."""
    line, url = str(error).partition("\n")[0], engine.url
    for secret in (url.password, *(url.query.get(name) for name in _SECRETS)):
        if secret:
            line = line.replace(str(secret), "***")
    return line


def _begin(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _prepared(connection: sqlite3.Connection, pragmas: tuple[str, ...]) -> sqlite3.Connection:
    connection.text_factory = _text
    try:
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}").close()
    except BaseException:
        connection.close()
        raise
    return connection


def _text(data: bytes) -> str:
    """Bytes that are no text become a string that fits no stamp, so that the row is named, not the file."""
    return data.decode(errors="surrogateescape")


def _mode(path: Path, read_only: bool) -> str:
    """How SQLite opens the file; a WAL database in an unwritable folder only as one that nobody changes."""
    if not read_only:
        return "mode=rw"
    if os.access(path.parent, os.W_OK) or path.with_name(f"{path.name}-wal").exists():
        return "mode=ro"
    return "mode=ro&immutable=1"
