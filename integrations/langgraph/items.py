"""A LangGraph item as a document of the memory, and back.

The value is kept exactly, in the metadata; the text is what of it the model reads. A path's labels cannot
contain a dot, so paths joined with dots are unique, and every prefix of an item's path is indexed beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langgraph.store.base import Item, SearchItem, get_text_at_path

from msa_memory.types import Document

__all__ = ["StoredItem", "below", "document_id", "item_text", "joined", "new_document"]

Path = tuple[str, ...]
WHOLE = "$"
NO_TEXT = "(not indexed)"
"""What the model reads of an item that no question should find; the item is hidden from the routers."""


@dataclass(frozen=True, slots=True)
class StoredItem:
    """A stored document, read as an item."""

    document: Document

    @property
    def path(self) -> Path:
        return tuple(self.document.metadata["path"].split("."))

    @property
    def value(self) -> dict[str, Any]:
        value: dict[str, Any] = self.document.metadata["value"]
        return value

    @property
    def order(self) -> int:
        """Grows with the time at which the item's path came into use."""
        return int(self.document.metadata["since"])

    @property
    def ttl_minutes(self) -> float | None:
        ttl: float | None = self.document.metadata["ttl_minutes"]
        return ttl

    def item(self) -> Item:
        return Item(**self._fields())

    def search_item(self, score: float | None) -> SearchItem:
        return SearchItem(**self._fields(), score=score)

    def _fields(self) -> dict[str, Any]:
        return {
            "namespace": self.path,
            "key": self.document.metadata["key"],
            "value": self.value,
            "created_at": self.document.created_at,
            "updated_at": self.document.updated_at,
        }


def joined(path: Path) -> str:
    """A path as one string."""
    return ".".join(path)


def document_id(path: Path, key: str) -> str:
    """The id of the document that holds an item; of fixed length, whatever the item is called."""
    return hashlib.sha256(json.dumps([joined(path), key]).encode()).hexdigest()


def below(prefix: Path) -> dict[str, Any]:
    """A ``where`` for all items whose path begins with ``prefix``."""
    return {"under": {"$contains": joined(prefix)}} if prefix else {"path": {"$exists": True}}


def new_document(
    path: Path, key: str, value: Mapping[str, Any], *, text: str, since: int, ttl_minutes: float | None
) -> dict[str, Any]:
    """``add``'s arguments for an item."""
    return {
        "id": document_id(path, key),
        "content": text or NO_TEXT,
        "metadata": {
            "path": joined(path),
            "under": [joined(path[:depth]) for depth in range(1, len(path) + 1)],
            "key": key,
            "value": dict(value),
            "indexed": bool(text),
            "since": since,
            "ttl_minutes": ttl_minutes,
        },
        "ttl": None if ttl_minutes is None else ttl_minutes * 60,
    }


def item_text(value: Mapping[str, Any], fields: Sequence[str]) -> str:
    """What the model reads of a value: the named fields, or with ``$`` every leaf behind its name."""
    texts: list[str] = []
    for field in fields:
        texts += list(_lines(value, "")) if field == WHOLE else get_text_at_path(dict(value), field)
    return "\n".join(text for text in texts if text.strip())


def _lines(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _lines(inner, str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _lines(inner, name)
    elif value is not None:
        yield f"{name}: {value}"
