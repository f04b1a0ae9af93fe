"""Row stamps: a salted SHA-256 over the columns of a row, kept beside them.

The salt is random and leaves with its row, so that what a commit chain keeps of a forgotten row says nothing
about it. Knows no table and no column's meaning.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

__all__ = ["MODULUS", "add_up", "fits", "make_stamp", "microseconds"]

MODULUS = 1 << 256
"""Sums of stamps are taken modulo this."""

_SALT_LETTERS = 32
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def microseconds(moment: datetime) -> int:
    """Whole microseconds since 1970 UTC; a datetime without zone is UTC."""
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND


def make_stamp(kind: str, *values: str | int | datetime | None) -> str:
    """A stamp of a row of ``kind``: 32 letters of salt and 64 of digest, both hexadecimal."""
    salt = os.urandom(_SALT_LETTERS // 2).hex()
    return salt + _digest(salt, kind, values)


def fits(stamp: object, kind: str, *values: object) -> bool:
    """Whether the stamp was made of these values; false for anything that is not a stamp."""
    if not isinstance(stamp, str):
        return False
    salt = stamp[:_SALT_LETTERS]
    try:
        return stamp == salt + _digest(salt, kind, values)
    except (TypeError, ValueError):  # a damaged row may hold any type
        return False


def add_up(stamps: Iterable[object]) -> int:
    """The sum of the stamps' digests modulo MODULUS: the same in any order, undone by subtraction."""
    return sum(map(_number, stamps)) % MODULUS


def _number(stamp: object) -> int:
    try:
        return int(str(stamp)[_SALT_LETTERS:], 16)
    except ValueError:  # a damaged one: whatever it counts as, the sum is wrong
        return 0


def _digest(salt: str, kind: str, values: Iterable[object]) -> str:
    plain = [microseconds(value) if isinstance(value, datetime) else value for value in values]
    return hashlib.sha256(json.dumps([salt, kind, *plain], allow_nan=False).encode("ascii")).hexdigest()
