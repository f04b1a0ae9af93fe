"""LangGraph's own filters and namespace patterns, decided on plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from langgraph.store.base import MatchCondition

from msa_memory.errors import InvalidFilterError

__all__ = ["exact_part", "fits_filter", "fits_namespace"]

_ORDER: dict[str, Callable[[float, float], bool]] = {
    "$gt": lambda a, b: a > b,
    "$gte": lambda a, b: a >= b,
    "$lt": lambda a, b: a < b,
    "$lte": lambda a, b: a <= b,
}


def fits_filter(value: Mapping[str, Any], asked: Mapping[str, Any] | None) -> bool:
    """Whether every key of a filter matches; a key the value lacks counts as None.

    Raises:
        InvalidFilterError: an unknown operator.
    """
    return all(_fits(value.get(key), wanted) for key, wanted in (asked or {}).items())


def exact_part(asked: Mapping[str, Any] | None) -> dict[str, str]:
    """The part of a filter that the memory's own index can decide: top-level strings."""
    return {
        f"value.{key}": wanted
        for key, wanted in (asked or {}).items()
        if isinstance(wanted, str) and "\0" not in key + wanted and (key + wanted).isprintable()
    }


def fits_namespace(path: tuple[str, ...], condition: MatchCondition) -> bool:
    """Whether a path begins or ends with a pattern, in which ``*`` is any one label."""
    pattern = condition.path
    if len(path) < len(pattern):
        return False
    part = path[: len(pattern)] if condition.match_type == "prefix" else path[len(path) - len(pattern) :]
    return all(wanted in ("*", label) for label, wanted in zip(part, pattern, strict=True))


def _fits(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        if any(str(key).startswith("$") for key in wanted):
            return all(_holds(found, operator, operand) for operator, operand in wanted.items())
        return isinstance(found, Mapping) and all(
            _fits(found.get(key), inner) for key, inner in wanted.items()
        )
    if isinstance(wanted, list | tuple):
        same_length = isinstance(found, list | tuple) and len(found) == len(wanted)
        return same_length and all(map(_fits, found, wanted))
    return bool(found == wanted)


def _holds(found: Any, operator: str, operand: Any) -> bool:
    match operator:
        case "$eq":
            return bool(found == operand)
        case "$ne":
            return bool(found != operand)
        case "$gt" | "$gte" | "$lt" | "$lte":
            try:
                return _ORDER[operator](float(found), float(operand))
            except (TypeError, ValueError):  # what is no number is neither more nor less
                return False
    raise InvalidFilterError(f"{operator!r} is not an operator; expected $eq, $ne, $gt, $gte, $lt or $lte")
