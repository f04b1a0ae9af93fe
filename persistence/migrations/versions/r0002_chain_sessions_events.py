"""Row stamps over everything users see, the chain of commits, sessions, messages and events."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MODULUS = 1 << 256
ROWS = 500
DOCUMENT = (
    "key namespace id version text metadata timestamp created_at updated_at expires_at source trust "
    "passages tokens"
).split()
VERSION = "document version text metadata timestamp created_at expires_at source trust".split()
PASSAGE = "number document namespace ordinal start end tokens header length checksum added".split()


def upgrade() -> None:
    _add_columns()
    _add_tables()
    connection = op.get_bind()
    generation = connection.scalar(sa.text("SELECT generation FROM bank"))
    if generation is not None:
        _seal(connection, int(generation))


def _add_columns() -> None:
    for table in ("bank", "passages", "segments", "erasures"):
        op.add_column(table, sa.Column("hash", sa.Text, nullable=False, server_default=""))
    op.add_column("documents", sa.Column("changed", sa.BigInteger, nullable=False, server_default="0"))
    op.create_index("documents_changed", "documents", ["changed"])


def _add_tables() -> None:
    op.create_table(
        "commits",
        sa.Column("generation", KEY, primary_key=True, autoincrement=False),
        sa.Column("added", sa.LargeBinary, nullable=False),
        sa.Column("removed", sa.LargeBinary, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("sequence", KEY, primary_key=True),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("time", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("namespace", NAME),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("document", sa.BigInteger),
        sa.Column("count", sa.BigInteger, nullable=False),
    )
    op.create_index("events_namespace", "events", ["namespace", "sequence"])
    op.create_table(
        "sessions",
        sa.Column("key", KEY, primary_key=True),
        sa.Column("namespace", NAME, nullable=False),
        sa.Column("id", NAME, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("next_position", sa.Integer, nullable=False),
        sa.Column("hash", sa.Text, nullable=False, server_default=""),
        sa.UniqueConstraint("namespace", "id", name="sessions_namespace_id"),
    )
    op.create_table(
        "messages",
        sa.Column("key", KEY, primary_key=True),
        sa.Column("session", KEY, _reference("sessions"), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("name", NAME),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("timestamp", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("idempotency_key", NAME),
        sa.Column("document", KEY, _reference("documents")),
        sa.Column("hash", sa.Text, nullable=False, server_default=""),
        sa.UniqueConstraint("session", "position", name="messages_session_position"),
        sa.UniqueConstraint("session", "idempotency_key", name="messages_session_idempotency_key"),
    )
    op.create_index("messages_document", "messages", ["document"])
    op.create_table(
        "reencoded",
        sa.Column("number", KEY, primary_key=True, autoincrement=False),
        sa.Column("document", KEY, _reference("documents"), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("ordinal", sa.Integer, nullable=False),
        sa.Column("start", sa.Integer, nullable=False),
        sa.Column("end", sa.Integer, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("header", sa.Text, nullable=False),
        sa.Column("segment", sa.Text, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("length", sa.BigInteger, nullable=False),
        sa.Column("checksum", sa.BigInteger, nullable=False),
    )
    op.create_index("reencoded_document", "reencoded", ["document", "ordinal"])


def _reference(table: str) -> sa.ForeignKey:
    return sa.ForeignKey(f"{table}.key", ondelete="CASCADE")


def _seal(connection: sa.Connection, generation: int) -> None:
    """Stamp the rows there are. A row that fails its old hash keeps it, and so stays damaged."""
    sound = _stamp_documents(connection)
    _stamp_versions(connection, sound)
    _stamp_rows(connection, "passages", "passage", PASSAGE, "number")
    _stamp_rows(connection, "segments", "segment", ["name", "size"], "name")
    _stamp_rows(connection, "erasures", "erasure", ["segment", "offset", "length"], "key")
    _stamp_rows(
        connection, "bank", "bank", "bank_id format_version model fingerprint model_info".split(), "id"
    )
    connection.execute(sa.text("UPDATE documents SET changed = :generation"), {"generation": generation})
    total = 0
    for table in ("documents", "versions", "passages"):
        total += sum(_number(stamp) for stamp in connection.scalars(sa.text(f"SELECT hash FROM {table}")))
    added, removed = ((value % MODULUS).to_bytes(32, "big") for value in (total, 0))
    bank_id = connection.scalar(sa.text("SELECT bank_id FROM bank"))
    before = hashlib.sha256(str(bank_id).encode()).digest()
    digest = hashlib.sha256(before + generation.to_bytes(8, "big") + added + removed).digest()
    connection.execute(
        sa.text("INSERT INTO commits VALUES (:generation, :added, :removed, :digest)"),
        {"generation": generation, "added": added, "removed": removed, "digest": digest},
    )


def _stamp_documents(connection: sa.Connection) -> dict[int, tuple[str, str]]:
    """Stamps documents; namespace and id by key of all of them."""
    names: dict[int, tuple[str, str]] = {}
    for row in _rows(connection, "documents", [*DOCUMENT, "hash"], "key"):
        names[row["key"]] = row["namespace"], row["id"]
        if row["hash"] == _old_hash(row["namespace"], row["id"], row):
            _write(connection, "documents", ["key"], row, _stamp("document", row, DOCUMENT))
    return names


def _stamp_versions(connection: sa.Connection, names: dict[int, tuple[str, str]]) -> None:
    for key in names:
        query = sa.text("SELECT * FROM versions WHERE document = :key ORDER BY version")
        for row in [dict(row) for row in connection.execute(query, {"key": key}).mappings()]:
            if row["hash"] == _old_hash(*names[key], row):
                stamp = _stamp("version", row, VERSION)
                _write(connection, "versions", ["document", "version"], row, stamp)


def _stamp_rows(connection: sa.Connection, table: str, kind: str, columns: list[str], key: str) -> None:
    for row in _rows(connection, table, list(dict.fromkeys([key, *columns])), key):
        _write(connection, table, [key], row, _stamp(kind, row, columns))


def _rows(connection: sa.Connection, table: str, columns: list[str], key: str) -> Iterable[dict[str, Any]]:
    """Rows in order of ``key``, some at a time, so that they may be written meanwhile."""
    names = ", ".join(f'"{name}"' for name in columns)
    last: dict[str, Any] = {}
    above = ""
    while True:
        query = f'SELECT {names} FROM {table} {above} ORDER BY "{key}" LIMIT {ROWS}'
        rows = [dict(row) for row in connection.execute(sa.text(query), last).mappings()]
        if not rows:
            return
        yield from rows
        last, above = {"last": rows[-1][key]}, f'WHERE "{key}" > :last'


def _write(connection: sa.Connection, table: str, keys: list[str], row: dict[str, Any], stamp: str) -> None:
    where = " AND ".join(f'"{key}" = :{key}' for key in keys)
    values = {key: row[key] for key in keys} | {"stamp": stamp}
    connection.execute(sa.text(f"UPDATE {table} SET hash = :stamp WHERE {where}"), values)


def _old_hash(namespace: str, id: str, row: dict[str, Any]) -> str:
    hashed = hashlib.sha256()
    for part in (namespace, id, str(row["version"]), row["text"], row["metadata"]):
        data = part.encode() if isinstance(part, str) else b""
        hashed.update(len(data).to_bytes(8, "little"))
        hashed.update(data)
    return hashed.hexdigest()


def _stamp(kind: str, row: dict[str, Any], columns: Iterable[str]) -> str:
    salt = os.urandom(16).hex()
    body = json.dumps([salt, kind, *(row[name] for name in columns)], default=repr).encode("ascii")
    return salt + hashlib.sha256(body).hexdigest()


def _number(stamp: str) -> int:
    try:
        return int(stamp[32:], 16)
    except ValueError:
        return 0
