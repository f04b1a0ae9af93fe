"""Statements on state bytes: how long each segment is, which passages fill it, which bytes are to be erased.

A function takes the connection of its transaction. Knows no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, or_, select, update

from msa_memory.errors import CatalogDamagedError
from msa_memory.persistence.segments import Placed, Span
from msa_memory.persistence.stamps import fits, make_stamp
from msa_memory.persistence.tables import erasures, passages, reencoded, segments

__all__ = [
    "Pending",
    "add_segment",
    "drop_reencoded",
    "drop_segments",
    "finish",
    "grow",
    "has_pending",
    "leave",
    "live_bytes",
    "move",
    "pending",
    "put_off",
    "reset_sizes",
    "sizes",
    "with_reencoded",
]


_NOW, _AT_COMPACT = 0, 1  # ``offset`` of a note about deleted rows, which has no segment


class Pending(NamedTuple):
    """Erasures that removals left to do: the last one's key, the states' bytes, and whether rows went too."""

    last_key: int
    spans: list[Span]
    rows: bool


def sizes(connection: Connection) -> dict[str, int]:
    """Committed bytes of every segment; CatalogDamagedError if one is not as it was written."""
    found: dict[str, int] = {}
    for row in connection.execute(select(segments)):
        if not fits(row.hash, "segment", row.name, row.size):
            raise CatalogDamagedError(
                f"the committed size of {str(row.name)[:64]!r} is damaged in the catalog; reading goes on, "
                "writing needs verify with repair"
            )
        found[row.name] = row.size
    return found


def grow(connection: Connection, known: Mapping[str, int], placed: Iterable[Placed]) -> None:
    """Commit appended blocks."""
    ends: dict[str, int] = {}
    for place in placed:
        ends[place.segment] = max(ends.get(place.segment, 0), place.offset + place.length)
    for name, end in ends.items():
        values = {"size": end, "hash": make_stamp("segment", name, end)}
        if name in known:
            connection.execute(update(segments).where(segments.c.name == name).values(values))
        else:
            connection.execute(insert(segments).values(name=name, **values))


def add_segment(connection: Connection, name: str) -> None:
    """An empty segment, so that its name is not used again."""
    connection.execute(insert(segments).values(name=name, size=0, hash=make_stamp("segment", name, 0)))


def drop_segments(connection: Connection, names: Sequence[str]) -> None:
    """Segments that no passage refers to any more."""
    connection.execute(delete(segments).where(segments.c.name.in_(names)))


def reset_sizes(connection: Connection, on_disk: Mapping[str, int]) -> None:
    """Write every size anew: what is on disk, and at least what passages refer to."""
    ends = select(passages.c.segment, func.max(passages.c.offset + passages.c.length))
    least = {name: int(end) for name, end in connection.execute(ends.group_by(passages.c.segment))}
    connection.execute(delete(segments))
    for name in sorted(on_disk.keys() | least.keys()):
        size = max(on_disk.get(name, 0), least.get(name, 0))
        connection.execute(
            insert(segments).values(name=name, size=size, hash=make_stamp("segment", name, size))
        )


def live_bytes(connection: Connection) -> dict[str, int]:
    """Bytes of blocks that passages refer to, by segment."""
    query = select(passages.c.segment, func.sum(passages.c.length)).group_by(passages.c.segment)
    return {name: int(size) for name, size in connection.execute(query)}


def move(connection: Connection, number: int, place: Placed) -> None:
    """Say where the same block lies now."""
    connection.execute(
        update(passages).where(passages.c.number == number).values(segment=place.segment, offset=place.offset)
    )


def leave(connection: Connection, spans: Iterable[Span], *, rows: bool = False) -> None:
    """Note bytes to erase once the transaction is through; ``rows``: deleted rows in the database too."""
    _note(connection, [*spans, *([(None, _NOW, 0)] if rows else [])])


def _note(connection: Connection, places: Sequence[Sequence[Any]]) -> None:
    new = [
        {"segment": place[0], "offset": place[1], "length": place[2], "hash": make_stamp("erasure", *place)}
        for place in places
    ]
    if new:
        connection.execute(insert(erasures), new)


def pending(connection: Connection, *, compacting: bool = False) -> Pending | None:
    """What is still to erase, with what waits for ``compact`` if it is ``compacting``, or None.

    CatalogDamagedError if a note of it is not as it was written.
    """
    query = select(erasures).order_by(erasures.c.key)
    found = connection.execute(query if compacting else query.where(_due())).all()
    if not found:
        return None
    if any(not fits(row.hash, "erasure", row.segment, row.offset, row.length) for row in found):
        raise CatalogDamagedError(
            "the catalog's note of which bytes to erase is damaged; run verify with repair"
        )
    spans = [Span(row.segment, row.offset, row.length) for row in found if row.segment is not None]
    return Pending(found[-1].key, spans, any(row.segment is None for row in found))


def has_pending(connection: Connection) -> bool:
    """Whether a removal left bytes to erase that do not wait for ``compact``."""
    return connection.scalar(select(erasures.c.key).where(_due()).limit(1)) is not None


def with_reencoded(connection: Connection) -> set[str]:
    """Segments that hold passages encoded for another model: they stay where they are until those move in."""
    return set(connection.scalars(select(reencoded.c.segment).distinct()))


def drop_reencoded(connection: Connection, chosen: ColumnElement[bool]) -> None:
    """Delete passages that were encoded for another model, leaving their bytes to erase."""
    places = (reencoded.c.segment, reencoded.c.offset, reencoded.c.length)
    leave(connection, [Span(*row) for row in connection.execute(select(*places).where(chosen))])
    connection.execute(delete(reencoded).where(chosen))


def put_off(connection: Connection, done: Pending) -> None:
    """Strike off the states' bytes; the deleted rows wait for ``compact``."""
    connection.execute(delete(erasures).where(erasures.c.key <= done.last_key, _due()))
    waits = select(erasures.c.key).where(erasures.c.segment.is_(None)).limit(1)
    if connection.scalar(waits) is None:
        _note(connection, [(None, _AT_COMPACT, 0)])


def finish(connection: Connection, done: Pending) -> None:
    """Strike off erasures that are done; cleaning the database after some rows cleans it after all."""
    up_to = erasures.c.key <= done.last_key
    connection.execute(delete(erasures).where(up_to if done.rows else and_(up_to, _due())))


def _due() -> ColumnElement[bool]:
    return or_(erasures.c.segment.is_not(None), erasures.c.offset == _NOW)
