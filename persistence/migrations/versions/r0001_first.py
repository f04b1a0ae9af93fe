"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "bank",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("bank_id", sa.Text, nullable=False),
        sa.Column("format_version", sa.Integer, nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("fingerprint", sa.Text),
        sa.Column("model_info", sa.Text, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("next_number", sa.BigInteger, nullable=False),
        sa.Column("next_document", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "documents",
        sa.Column("key", KEY, primary_key=True, autoincrement=False),
        sa.Column("namespace", NAME, nullable=False),
        sa.Column("id", NAME, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("timestamp", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("source", NAME),
        sa.Column("trust", NAME),
        sa.Column("passages", sa.Integer, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.UniqueConstraint("namespace", "id", name="documents_namespace_id"),
    )
    op.create_index("documents_namespace_key", "documents", ["namespace", "key"])
    op.create_index("documents_expires_at", "documents", ["expires_at"])
    op.create_table(
        "versions",
        sa.Column("document", KEY, _document(), primary_key=True, autoincrement=False),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("timestamp", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("source", NAME),
        sa.Column("trust", NAME),
        sa.Column("hash", sa.Text, nullable=False),
    )
    op.create_table(
        "passages",
        sa.Column("number", KEY, primary_key=True, autoincrement=False),
        sa.Column("document", KEY, _document(), nullable=False),
        sa.Column("namespace", NAME, nullable=False),
        sa.Column("ordinal", sa.Integer, nullable=False),
        sa.Column("start", sa.Integer, nullable=False),
        sa.Column("end", sa.Integer, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("header", sa.Text, nullable=False),
        sa.Column("segment", sa.Text, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("length", sa.BigInteger, nullable=False),
        sa.Column("checksum", sa.BigInteger, nullable=False),
        sa.Column("added", sa.BigInteger, nullable=False),
    )
    op.create_index("passages_document", "passages", ["document", "ordinal"])
    op.create_index("passages_added", "passages", ["added"])
    op.create_index("passages_namespace", "passages", ["namespace", "number"])
    op.create_table(
        "attributes",
        sa.Column("key", KEY, primary_key=True),
        sa.Column("document", KEY, _document(), nullable=False),
        sa.Column("path", NAME, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("value", NAME, nullable=False),
    )
    op.create_index("attributes_document", "attributes", ["document"])
    op.create_table(
        "tombstones",
        sa.Column("number", KEY, primary_key=True, autoincrement=False),
        sa.Column("removed", sa.BigInteger, nullable=False),
    )
    op.create_index("tombstones_removed", "tombstones", ["removed"])
    op.create_table(
        "segments",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("size", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "erasures",
        sa.Column("key", KEY, primary_key=True),
        sa.Column("segment", sa.Text),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("length", sa.BigInteger, nullable=False),
    )


def _document() -> sa.ForeignKey:
    return sa.ForeignKey("documents.key", ondelete="CASCADE")
