"""Memories that other systems exported as JSON, turned into items for ``add_many``; knows no model, no store.

Every item keeps its dates and the id it had there, so that importing the same file again changes nothing.
What has no place of its own goes to the metadata, to filter by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msa_memory.documents import MAX_ID_CHARS
from msa_memory.errors import ConfigError, InvalidDocumentError

__all__ = ["FORMATS", "read_export"]

Item = dict[str, Any]
_MEM0_SCOPES = ("user_id", "agent_id", "run_id", "app_id", "actor_id", "role", "categories", "memory_type")
_TEXT_FIELDS = ("content", "text", "memory", "data", "value")


def read_export(data: object, format: str) -> list[Item]:
    """The items of an export, as JSON text or parsed: ``format`` is ``"mem0"`` or ``"langgraph"``.

    Raises:
        ConfigError: an unknown format.
        InvalidDocumentError: not JSON, or not of that format; says which entry.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r:.60}; expected one of {', '.join(sorted(FORMATS))}")
    try:
        value = json.loads(data) if isinstance(data, str | bytes) else data
    except (ValueError, RecursionError) as error:
        raise InvalidDocumentError(f"the {format} export is not JSON: {str(error)[:80]}") from error
    entries, read = _entries(value, format), FORMATS[format]
    items: dict[str, Item] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise _wrong(format, index, f"is {type(entry).__name__}", "an object")
        item = read(entry, index)
        items[item["id"]] = item  # the newest of an id given twice
    return list(items.values())


def _entries(value: Any, format: str) -> list[Any]:
    """A plain list, or the list in one of the envelopes these systems use."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("results", "memories", "items") if key in value), None)
    if not isinstance(value, list):
        raise InvalidDocumentError(
            f'the {format} export is no list of memories; expected [...] or {{"results": [...]}}'
        )
    return value


def _mem0(entry: Mapping[str, Any], index: int) -> Item:
    """One memory of mem0's ``get_all``."""
    metadata = entry.get("metadata")
    if not isinstance(metadata, Mapping | None):
        raise _wrong("mem0", index, f"has metadata of type {type(metadata).__name__}", "an object or null")
    scopes = {key: entry[key] for key in _MEM0_SCOPES if entry.get(key) is not None}
    return {
        "id": _text(entry, "id", "mem0", index),
        "content": _text(entry, "memory", "mem0", index),
        "metadata": {**(metadata or {}), **scopes, **_changed(entry)},
        "timestamp": entry.get("created_at"),
        "expires_at": entry.get("expiration_date"),
        "source": "mem0",
    }


def _langgraph(entry: Mapping[str, Any], index: int) -> Item:
    """One item of a LangGraph store, as ``Item.dict()`` gives it; LangMem's memories are such items."""
    namespace, key = entry.get("namespace"), _text(entry, "key", "langgraph", index)
    if not isinstance(namespace, list) or not all(isinstance(part, str) for part in namespace):
        raise _wrong("langgraph", index, f"has the namespace {namespace!r:.40}", "a list of strings")
    if "value" not in entry:
        raise _wrong("langgraph", index, "has no value", "an object")
    text, rest = _split(entry["value"])
    return {
        "id": _id([*namespace, key]),
        "content": text,
        "metadata": {
            "namespace": namespace,
            "key": key,
            **({"value": rest} if rest else {}),
            **_changed(entry),
        },
        "timestamp": entry.get("created_at"),
        "source": "langgraph",
    }


FORMATS: dict[str, Callable[[Mapping[str, Any], int], Item]] = {"langgraph": _langgraph, "mem0": _mem0}
"""What reads one entry, by the format's name."""


def _text(entry: Mapping[str, Any], name: str, format: str, index: int) -> str:
    found = entry.get(name)
    if not isinstance(found, str) or not found:
        raise _wrong(format, index, f"has {name} {found!r:.40}", "a non-empty string")
    return found


def _changed(entry: Mapping[str, Any]) -> dict[str, Any]:
    changed = entry.get("updated_at")
    return {} if changed is None else {"updated_at": changed}


def _split(value: Any) -> tuple[str, Any]:
    """The text of a stored value, and what else is in it: all of it is the text where no field is."""
    if isinstance(value, str):
        return value, None
    for field in _TEXT_FIELDS if isinstance(value, Mapping) else ():
        if isinstance(value.get(field), str | Mapping):
            text, inner = _split(value[field])
            rest = {key: child for key, child in value.items() if key != field}
            return text, {**rest, field: inner} if inner else rest
    return json.dumps(value, ensure_ascii=False, sort_keys=True), None


def _id(parts: Iterable[str]) -> str:
    """An id that no other namespace and key share: their JSON, or its digest where that is too long."""
    id = json.dumps(list(parts), ensure_ascii=False)
    return id if len(id) <= MAX_ID_CHARS else hashlib.sha256(id.encode(errors="surrogatepass")).hexdigest()


def _wrong(format: str, index: int, seen: str, expected: str) -> InvalidDocumentError:
    return InvalidDocumentError(f"entry {index} of the {format} export {seen}; expected {expected}")
