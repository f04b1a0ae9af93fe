"""Statements on the bank's one row: which bank this is, which model wrote it, and its three counters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from msa_memory.errors import CatalogDamagedError
from msa_memory.persistence.attributes import canonical
from msa_memory.persistence.records import BankIdentity
from msa_memory.persistence.stamps import fits, make_stamp
from msa_memory.persistence.tables import bank, documents, passages, tombstones

__all__ = [
    "FORMAT_VERSION",
    "advance",
    "bind_model",
    "create",
    "generation",
    "identity",
    "next_number",
    "take_keys",
    "take_numbers",
]

FORMAT_VERSION = 1

_IDENTITY = (bank.c.bank_id, bank.c.format_version, bank.c.model, bank.c.fingerprint, bank.c.model_info)
_LOST = "the catalog has lost its bank row; restore it from a backup"


def create(connection: Connection, bank_id: str) -> None:
    """Write the row of a new bank."""
    stamp = make_stamp("bank", bank_id, FORMAT_VERSION, None, None, "{}")
    connection.execute(
        insert(bank).values(
            id=1,
            bank_id=bank_id,
            format_version=FORMAT_VERSION,
            model_info="{}",
            generation=0,
            next_number=0,
            next_document=0,
            hash=stamp,
        )
    )


def identity(connection: Connection) -> BankIdentity | None:
    """None while the bank's row is not written yet; CatalogDamagedError if it is not as it was written."""
    row = connection.execute(select(*_IDENTITY, bank.c.hash)).one_or_none()
    if row is None:
        return None
    if not fits(row.hash, "bank", *row[: len(_IDENTITY)]):
        raise CatalogDamagedError(
            f"the catalog's bank row is damaged (it names model {str(row.model)[:64]!r}); "
            "restore the catalog from a backup"
        )
    return BankIdentity(
        row.bank_id, row.format_version, row.model, row.fingerprint, json.loads(row.model_info)
    )


def bind_model(connection: Connection, model: str, fingerprint: str, info: Mapping[str, Any]) -> None:
    """Record which model writes this bank's states."""
    bank_id, version = connection.execute(select(bank.c.bank_id, bank.c.format_version)).one()
    values = {"model": model, "fingerprint": fingerprint, "model_info": canonical(info)}
    connection.execute(
        update(bank).values(**values, hash=make_stamp("bank", bank_id, version, *values.values()))
    )


def generation(connection: Connection) -> int:
    """The number of commits."""
    found = connection.scalar(select(bank.c.generation).where(bank.c.id == 1))
    if found is None:
        raise CatalogDamagedError(_LOST)
    return int(found)


def advance(connection: Connection) -> int:
    """Count one more commit; the new generation."""
    connection.execute(update(bank).values(generation=bank.c.generation + 1))
    return generation(connection)


def take_numbers(connection: Connection, count: int) -> range:
    """Passage numbers that were never given out, even where the counter was damaged."""
    connection.execute(update(bank).values(next_number=bank.c.next_number + count))
    start = next_number(connection) - count
    used = [
        connection.scalar(select(func.max(column))) for column in (passages.c.number, tombstones.c.number)
    ]
    if (least := max((number + 1 for number in used if number is not None), default=0)) > start:
        connection.execute(update(bank).values(next_number=least + count))
        start = least
    return range(start, start + count)


def next_number(connection: Connection) -> int:
    """The lowest passage number that was not given out."""
    return int(connection.execute(select(bank.c.next_number)).scalar_one())


def take_keys(connection: Connection, count: int) -> range:
    """Document keys that were never given out."""
    connection.execute(update(bank).values(next_document=bank.c.next_document + count))
    newest = select(func.max(documents.c.key)).scalar_subquery()
    end, used = connection.execute(select(bank.c.next_document, newest)).one()
    start = int(end) - count
    if used is not None and used >= start:
        start = int(used) + 1
        connection.execute(update(bank).values(next_document=start + count))
    return range(start, start + count)
