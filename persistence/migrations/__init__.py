"""Alembic revisions of the catalog's schema, run by ``Database.migrate``; never run by a read-only store."""
