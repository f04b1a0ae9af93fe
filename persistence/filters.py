"""The ``where`` filter: parsed into a small tree, then compiled to SQL with bound parameters only.

Knows the filter language and the tables ``documents`` and ``attributes``. Every compiled test is true or
false, never NULL. A test matches when any value at its path does, so ``$ne`` and ``$nin``, which are plain
negations of ``$eq`` and ``$in``, also match where the key is missing or the type is another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, exists, false, func, not_, or_, true

from msa_memory.errors import InvalidFilterError
from msa_memory.persistence import attributes as attribute
from msa_memory.persistence.tables import attributes, documents

__all__ = [
    "Comparison",
    "Every",
    "Filter",
    "Negation",
    "Some",
    "apart_from_ids",
    "compile_filter",
    "parse_filter",
]

MAX_DEPTH = 16
MAX_TESTS = 256
MAX_VALUES = 4096
MAX_BITS = 14_000  # Python writes integers of up to 4,300 digits, and JSON holds no others

OPERATORS = ("$eq", "$ne", "$in", "$nin", "$gt", "$gte", "$lt", "$lte", "$exists", "$contains", "$not")
COMBINERS = ("$and", "$or", "$not")
FIELDS = ("$id", "$source", "$timestamp", "$trust")
"""Columns of a document, spelled with ``$`` because plain keys mean metadata."""

_ORDER: dict[str, Callable[[Any, Any], Any]] = {
    "$gt": lambda column, value: column > value,
    "$gte": lambda column, value: column >= value,
    "$lt": lambda column, value: column < value,
    "$lte": lambda column, value: column <= value,
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison; ``operator`` is any of OPERATORS but ``$ne``, ``$nin`` and ``$not``."""

    key: str
    operator: str
    value: Any


@dataclass(frozen=True, slots=True)
class Every:
    """All parts hold."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Some:
    """At least one part holds."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Negation:
    """The part does not hold."""

    part: Filter


Filter = Comparison | Every | Some | Negation


def parse_filter(where: Mapping[str, Any] | None) -> Filter | None:
    """The tree of a ``where`` mapping; None for None or an empty one. InvalidFilterError if malformed."""
    if where is None:
        return None
    if not isinstance(where, Mapping):
        raise InvalidFilterError(f"where is a {type(where).__name__}; expected a mapping of keys to values")
    return _Parser().filter(where, 1) if where else None


def compile_filter(tree: Filter | None) -> ColumnElement[bool]:
    """A condition on ``documents``."""
    match tree:
        case None:
            return true()
        case Every(parts):
            return and_(*map(compile_filter, parts))
        case Some(parts):
            return or_(*map(compile_filter, parts))
        case Negation(part):
            return not_(compile_filter(part))
        case Comparison("$timestamp", operator, value):
            return _compile_timestamp(operator, value)
        case Comparison(key, operator, value) if key in FIELDS:
            return _compile_field(documents.c[key[1:]], operator, value)
        case Comparison(key, operator, value):
            condition = and_(attributes.c.path == key, _compile_attribute(operator, value))
            return exists().where(attributes.c.document == documents.c.key, condition)


def apart_from_ids(tree: Filter | None) -> tuple[Filter | None, tuple[str, ...]]:
    """A filter as a base and the ids it leaves out besides: it matches what the base does without those."""
    match tree:
        case Negation(Comparison("$id", "$in", values)):
            return None, tuple(value for value in values if isinstance(value, str))  # no id is anything else
        case Every(parts):
            split = [apart_from_ids(part) for part in parts]
            left = tuple(base for base, _ in split if base is not None)
            base = left[0] if len(left) == 1 else Every(left) if left else None
            return base, tuple(id for _, ids in split for id in ids)
        case _:
            return tree, ()


class _Parser:
    """Counts tests and values while it parses, because databases limit both."""

    def __init__(self) -> None:
        self._tests = 0
        self._values = 0

    def filter(self, where: object, depth: int) -> Filter:
        if depth > MAX_DEPTH:
            raise InvalidFilterError(f"the filter is nested deeper than {MAX_DEPTH} levels; flatten it")
        if not isinstance(where, Mapping) or not where:
            raise InvalidFilterError(
                f"{_shown(where)} is not a filter; expected a non-empty mapping of keys to values"
            )
        return _every([self._entry(key, value, depth) for key, value in where.items()])

    def _entry(self, key: object, value: object, depth: int) -> Filter:
        if not isinstance(key, str):
            raise InvalidFilterError(f"key {_shown(key)} is a {type(key).__name__}; filter keys are strings")
        if key in ("$and", "$or"):
            parts = tuple(self.filter(part, depth + 1) for part in _list(key, value, "filters"))
            if not parts:
                raise InvalidFilterError(f"{key} holds an empty list; give it at least one filter")
            return Every(parts) if key == "$and" else Some(parts)
        if key == "$not":
            return Negation(self.filter(value, depth + 1))
        if key.startswith("$") and key not in FIELDS:
            allowed = ", ".join(COMBINERS + FIELDS)
            raise InvalidFilterError(
                f"{_shown(key)} cannot stand here; expected a metadata key or one of {allowed}"
            )
        return self._field(_clean(key), value, depth)

    def _field(self, key: str, value: object, depth: int) -> Filter:
        if depth > MAX_DEPTH:
            raise InvalidFilterError(f"the filter is nested deeper than {MAX_DEPTH} levels; flatten it")
        if not isinstance(value, Mapping):
            return self._test(key, "$eq", value, depth)
        if not value:
            raise InvalidFilterError(
                f"key {_shown(key)} has no operator; expected one of {', '.join(OPERATORS)}"
            )
        return _every([self._test(key, operator, operand, depth) for operator, operand in value.items()])

    def _test(self, key: str, operator: object, value: object, depth: int) -> Filter:
        self._tests += 1
        if self._tests > MAX_TESTS:
            raise InvalidFilterError(
                f"the filter holds more than {MAX_TESTS} comparisons; use $in for lists of values"
            )
        match operator:
            case "$not":
                if not isinstance(value, Mapping):
                    raise InvalidFilterError(
                        f"$not on {_shown(key)} holds {_shown(value)}; expected operators"
                    )
                return Negation(self._field(key, value, depth + 1))
            case "$eq" | "$contains":
                return Comparison(key, operator, self._scalar(key, operator, value))
            case "$ne":
                return Negation(Comparison(key, "$eq", self._scalar(key, operator, value)))
            case "$in" | "$nin":
                values = tuple(self._scalar(key, operator, item) for item in _list(operator, value, "values"))
                test = Comparison(key, "$in", values)
                return test if operator == "$in" else Negation(test)
            case "$gt" | "$gte" | "$lt" | "$lte":
                return Comparison(key, operator, self._ordered(key, operator, value))
            case "$exists":
                if not isinstance(value, bool):
                    raise InvalidFilterError(
                        f"$exists on {_shown(key)} holds {_shown(value)}; expected True or False"
                    )
                return (
                    Comparison(key, "$exists", True) if value else Negation(Comparison(key, "$exists", True))
                )
        hint = (
            ""
            if not isinstance(operator, str) or operator.startswith("$")
            else f"; spell a nested key with a dot: {_shown(f'{key}.{operator}')}"
        )
        raise InvalidFilterError(
            f"{_shown(operator)} on {_shown(key)} is not an operator; "
            f"expected one of {', '.join(OPERATORS)}{hint}"
        )

    def _scalar(self, key: str, operator: str, value: object) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise InvalidFilterError(
                f"the filter compares with more than {MAX_VALUES} values; split the call"
            )
        if key == "$timestamp":
            return _moment(operator, value)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return _clean(value)
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise InvalidFilterError(
                f"{operator} on {_shown(key)} holds a number of {value.bit_length()} bits; metadata holds at "
                f"most {MAX_BITS}"
            )
        if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        raise InvalidFilterError(
            f"{operator} on {_shown(key)} holds {_shown(value)}, a {type(value).__name__}; "
            "expected a string, a finite number, a boolean or None"
        )

    def _ordered(self, key: str, operator: str, value: object) -> Any:
        if value is None or isinstance(value, bool):
            raise InvalidFilterError(
                f"{operator} on {_shown(key)} holds {value!r}; expected a number or a string"
            )
        return self._scalar(key, operator, value)


def _compile_attribute(operator: str, value: Any) -> ColumnElement[bool]:
    kind, text = attributes.c.kind, attributes.c.value
    if operator == "$exists":
        return kind.in_(attribute.KINDS)
    if operator == "$in":
        return _compile_choice([attribute.plain(item) for item in value])
    value_kind, value_text = attribute.plain(value)
    if operator == "$contains":
        member = and_(kind == value_kind.upper(), text == value_text)
        return (
            or_(member, and_(kind == attribute.STRING, _holds(text, value)))
            if isinstance(value, str)
            else member
        )
    order = _ORDER.get(operator)
    return and_(kind == value_kind, order(text, value_text) if order else text == value_text)


def _compile_choice(values: Sequence[tuple[str, str]]) -> ColumnElement[bool]:
    by_kind: dict[str, list[str]] = {}
    for kind, text in values:
        by_kind.setdefault(kind, []).append(text)
    if not by_kind:
        return false()
    return or_(
        *(and_(attributes.c.kind == kind, attributes.c.value.in_(texts)) for kind, texts in by_kind.items())
    )


def _compile_field(column: ColumnElement[Any], operator: str, value: Any) -> ColumnElement[bool]:
    if operator == "$exists":
        return column.is_not(None)
    if operator == "$in":
        texts = [item for item in value if isinstance(item, str)]
        return and_(column.is_not(None), column.in_(texts)) if texts else false()
    if not isinstance(value, str):
        return false()
    if operator == "$contains":
        return and_(column.is_not(None), _holds(column, value))
    order = _ORDER.get(operator)
    return and_(column.is_not(None), order(column, value) if order else column == value)


def _compile_timestamp(operator: str, value: Any) -> ColumnElement[bool]:
    column = documents.c.timestamp
    match operator:
        case "$exists":
            return true()
        case "$in":
            return column.in_(value) if value else false()
        case "$eq":
            return column.in_([value])
    condition: ColumnElement[bool] = _ORDER[operator](column, value)
    return condition


def _holds(column: ColumnElement[Any], text: str) -> ColumnElement[bool]:
    if not text:
        return true()
    return func.replace(column, text, "") != column  # LIKE would fold case; instr has a name per dialect


def _every(parts: list[Filter]) -> Filter:
    return parts[0] if len(parts) == 1 else Every(tuple(parts))


def _list(operator: str, value: object, of: str) -> list[Any]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise InvalidFilterError(f"{operator} holds {_shown(value)}; expected a list of {of}")
    return list(value)


def _moment(operator: str, value: object) -> datetime:
    moment = value
    if operator == "$contains":
        raise InvalidFilterError("$contains does not apply to $timestamp; use $gte and $lt")
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            moment = None
    if not isinstance(moment, datetime):
        raise InvalidFilterError(
            f"{operator} on '$timestamp' holds {_shown(value)}; expected a datetime or an ISO 8601 string"
        )
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _clean(text: str) -> str:
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidFilterError(
            f"{_shown(text)} holds a NUL or half of a surrogate pair; expected plain Unicode"
        )
    return text


def _shown(value: object) -> str:
    try:
        text = ascii(value)
    except ValueError:  # an integer that is too long to be written
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
