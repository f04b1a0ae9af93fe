"""Two habits of all statements: long IN lists are cut up, and inserting nothing is no statement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Connection, Table, insert

__all__ = ["CHUNK", "chunks", "insert_many"]

CHUNK = 500
"""Values of one IN list; SQLite allows 32,766 parameters, plans stay small with few."""

T = TypeVar("T")


def chunks(values: Iterable[T]) -> Iterator[list[T]]:
    """The values, CHUNK at a time."""
    iterator = iter(values)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def insert_many(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """Insert the rows, if there are any."""
    if rows:
        connection.execute(insert(table), rows)
