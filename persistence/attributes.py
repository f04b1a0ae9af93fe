"""Metadata as canonical JSON, and taken apart into rows that any SQL database can compare exactly.

Every value becomes a path, a kind and a text; numbers become texts that sort as the numbers do, so
64-bit ids stay exact and integers compare with floats. Knows no table and no filter syntax.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from msa_memory.errors import InvalidDocumentError

__all__ = [
    "Attribute",
    "BOOLEAN",
    "KINDS",
    "LIST",
    "MAPPING",
    "NULL",
    "NUMBER",
    "STRING",
    "attributes",
    "canonical",
    "number_text",
    "plain",
]

KINDS = STRING, NUMBER, BOOLEAN, NULL, MAPPING, LIST = ("s", "n", "b", "z", "o", "l")
"""Kinds of values at a path. A member of a list has its kind in upper case, at the path of the list."""

_EXPONENT_BIAS = 5000  # JSON numbers reach from 1e-324 to Python's limit of 4,300 digits
_NINES = str.maketrans("0123456789", "9876543210")


class Attribute(NamedTuple):
    """One value of a document's metadata. Keys of nested mappings are joined with dots."""

    path: str
    kind: str
    value: str


def canonical(metadata: Mapping[str, Any]) -> str:
    """The one JSON spelling of ``metadata``; InvalidDocumentError if it is not JSON."""
    try:
        text = json.dumps(metadata, sort_keys=True, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDocumentError(
            f"metadata cannot be stored as JSON: {error}; use strings, finite numbers, booleans, None, "
            "lists, and mappings with string keys"
        ) from error
    return text


def attributes(metadata: Mapping[str, Any]) -> Iterator[Attribute]:
    """Every value of parsed JSON metadata, nested mappings included; lists only with their plain members."""
    pending: list[tuple[str, Any]] = list(metadata.items())
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            yield Attribute(path, MAPPING, "")
            pending.extend((f"{path}.{key}", inner) for key, inner in value.items())
        elif isinstance(value, list):
            yield Attribute(path, LIST, "")
            members = {plain(member) for member in value if not isinstance(member, dict | list)}
            for kind, text in sorted(members):
                yield Attribute(path, kind.upper(), text)
        else:
            yield Attribute(path, *plain(value))


def plain(value: str | float | bool | None) -> tuple[str, str]:
    """Kind and comparable text of a value that is neither a list nor a mapping."""
    match value:
        case None:
            return NULL, ""
        case bool():
            return BOOLEAN, "true" if value else "false"
        case str():
            return STRING, value
        case _:
            return NUMBER, number_text(value)


def number_text(value: float) -> str:
    """A text for a finite number; texts compare by code point exactly as the numbers compare.

    Sign, biased decimal exponent, digits without trailing zeros; negative numbers in nines' complement. A
    float that is a whole number is spelled with all its digits, any other by its shortest repr, which lies on
    the same side of every other number as the float itself.
    """
    number = Decimal(int(value)) if value == int(value) else Decimal(repr(value))
    if not number:
        return "1"
    digits = "".join(map(str, number.as_tuple().digits)).rstrip("0")
    exponent = number.adjusted() + _EXPONENT_BIAS
    if number > 0:
        return f"2{exponent:05d}{digits}"
    return f"0{99999 - exponent:05d}{digits.translate(_NINES)}~"
