"""LlamaIndex's MetadataFilters as ``where`` filters.

Knows both filter languages and no memory. A filter that ``where`` cannot express is an error, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)

from msa_memory.errors import InvalidFilterError
from msa_memory.integrations.llama_index.nodes import EMPTY_LISTS

__all__ = ["combine", "to_where"]

_SAME = {
    FilterOperator.EQ: "$eq",
    FilterOperator.NE: "$ne",
    FilterOperator.GT: "$gt",
    FilterOperator.GTE: "$gte",
    FilterOperator.LT: "$lt",
    FilterOperator.LTE: "$lte",
    FilterOperator.IN: "$in",
    FilterOperator.NIN: "$nin",
    FilterOperator.CONTAINS: "$contains",
}


def to_where(filters: MetadataFilters | None) -> dict[str, Any] | None:
    """The ``where`` filter that matches what ``filters`` match; None for none.

    Raises:
        InvalidFilterError: ``TEXT_MATCH_INSENSITIVE``, which a memory does not have, or a value that does
            not fit its operator.
    """
    if filters is None or not filters.filters:
        return None
    parts = [_part(entry) for entry in filters.filters]
    found = [part for part in parts if part is not None]
    if not found:
        return None
    match filters.condition:
        case FilterCondition.OR:
            return {"$or": found}
        case FilterCondition.NOT:
            return {"$not": {"$or": found}}
    return {"$and": found}


def combine(filters: MetadataFilters | None, where: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Both filters at once; None for neither."""
    parts = [dict(part) for part in (to_where(filters), where) if part]
    return {"$and": parts} if len(parts) == 2 else parts[0] if parts else None


def _part(entry: MetadataFilter | MetadataFilters) -> dict[str, Any] | None:
    return to_where(entry) if isinstance(entry, MetadataFilters) else _test(entry)


def _test(entry: MetadataFilter) -> dict[str, Any]:
    key, value = entry.key, entry.value
    match entry.operator:
        case FilterOperator.ANY:
            return {"$or": [{key: {"$contains": item}} for item in _values(entry)]}
        case FilterOperator.ALL:
            return {"$and": [{key: {"$contains": item}} for item in _values(entry)]}
        case FilterOperator.TEXT_MATCH:
            return {"$and": [{key: {"$contains": value}}, {key: {"$gte": ""}}]}  # strings, no lists
        case FilterOperator.IS_EMPTY:
            absent = [{key: {"$exists": False}}, {key: None}, {key: ""}]
            return {"$or": [*absent, {EMPTY_LISTS: {"$contains": key}}]}
    operator = _SAME.get(entry.operator)
    if operator is None:
        raise InvalidFilterError(
            f"the filter on {key!r} uses {entry.operator.value!r}; a memory compares exactly: use "
            "'text_match', or keep a lower-case copy of the value in the metadata"
        )
    return {key: {operator: value}}


def _values(entry: MetadataFilter) -> list[Any]:
    if not isinstance(entry.value, list) or not entry.value:
        raise InvalidFilterError(
            f"the filter on {entry.key!r} compares {entry.operator.value!r} with {entry.value!r}; "
            "expected a list with at least one value"
        )
    return list(entry.value)
