"""Checking what callers hand in before anything is encoded or written.

Turns ``add`` arguments into a ``DocumentInput`` or raises a named error; knows limits, not storage.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from msa_memory.config import MemoryConfig
from msa_memory.errors import InvalidDocumentError, LimitError

__all__ = [
    "DocumentInput",
    "check_name",
    "check_question",
    "limited",
    "read_expiry",
    "read_item",
    "read_metadata",
]

T = TypeVar("T")

MAX_ID_CHARS = 512
ITEM_KEYS = ("content", "id", "metadata", "timestamp", "expires_at", "ttl", "source", "trust")


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentInput:
    """A checked document that is not yet encoded."""

    id: str
    text: str
    metadata: dict[str, Any]
    timestamp: datetime | None = None
    expires_at: datetime | None = None
    source: str | None = None
    trust: str | None = None


def read_item(item: object, config: MemoryConfig) -> DocumentInput:
    """One item of ``add_many``: a string, or a mapping with ``add``'s arguments.

    Raises:
        InvalidDocumentError: not text, empty, an unusable id, date or metadata, or an unknown key.
        LimitError: longer than ``max_document_chars`` or ``max_metadata_bytes``.
    """
    if isinstance(item, str):
        item = {"content": item}
    if not isinstance(item, Mapping):
        raise InvalidDocumentError(
            f"an item is {_show(item)}; expected a string or a mapping with {', '.join(ITEM_KEYS)}"
        )
    unknown = sorted(map(str, set(item) - set(ITEM_KEYS)))
    if unknown:
        raise InvalidDocumentError(
            f"an item has unknown keys {unknown!s:.80}; expected some of {', '.join(ITEM_KEYS)}"
        )
    given = item.get("id")
    return DocumentInput(
        id=uuid.uuid4().hex if given is None else check_name("id", given),
        text=_read_text(item.get("content"), config),
        metadata=read_metadata(item.get("metadata"), config),
        timestamp=_read_time("timestamp", item.get("timestamp")),
        expires_at=read_expiry(item.get("expires_at"), item.get("ttl")),
        source=_read_label("source", item.get("source")),
        trust=_read_label("trust", item.get("trust")),
    )


def check_name(what: str, value: object) -> str:
    """An id or namespace: a non-empty string of at most 512 characters that is valid Unicode without NUL."""
    if not isinstance(value, str):
        raise InvalidDocumentError(f"{what} is {_show(value)}; expected a string")
    if not value or len(value) > MAX_ID_CHARS:
        raise InvalidDocumentError(f"{what} has {len(value)} characters; expected 1 to {MAX_ID_CHARS}")
    _check_unicode(what, value)
    return value


def read_metadata(value: object, config: MemoryConfig) -> dict[str, Any]:
    """Metadata: a JSON object with string keys."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidDocumentError(f"metadata is {_show(value)}; expected a mapping with string keys")
    _check_metadata(value, config.max_metadata_depth)
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDocumentError(
            f"metadata is not JSON ({error}); use strings, finite numbers, booleans, null, lists and mappings"
        ) from error
    if len(text.encode()) > config.max_metadata_bytes:
        raise LimitError(
            f"metadata takes {len(text.encode())} bytes; the limit is {config.max_metadata_bytes} "
            "(MemoryConfig.max_metadata_bytes)"
        )
    found: dict[str, Any] = json.loads(text)
    return found


def check_question(question: object) -> str:
    """A question: a non-blank string."""
    if not isinstance(question, str):
        raise InvalidDocumentError(f"the question is {_show(question)}; expected a string")
    if not question.strip():
        raise InvalidDocumentError("the question is empty; expected some text")
    _check_unicode("the question", question)
    return question


def limited(items: Iterable[T], config: MemoryConfig) -> Iterator[T]:
    """The items, as long as they are no more than ``max_batch``; LimitError then."""
    for count, item in enumerate(items):
        if count >= config.max_batch:
            raise LimitError(
                f"more than {config.max_batch} items in one call (MemoryConfig.max_batch); give them in parts"
            )
        yield item


def _read_text(content: object, config: MemoryConfig) -> str:
    if not isinstance(content, str):
        raise InvalidDocumentError(f"content is {_show(content)}; expected a string")
    if not content.strip():
        raise InvalidDocumentError("content is empty; expected some text to remember")
    if len(content) > config.max_document_chars:
        raise LimitError(
            f"content has {len(content)} characters; the limit is {config.max_document_chars} "
            "(MemoryConfig.max_document_chars): split it into several documents"
        )
    _check_unicode("content", content)
    return content


def _read_time(what: str, value: object) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError as error:
            raise InvalidDocumentError(
                f"{what} {_show(value)} is not an ISO 8601 date, such as 2026-01-31"
            ) from error
    if not isinstance(value, datetime):
        raise InvalidDocumentError(f"{what} is {_show(value)}; expected a datetime or an ISO 8601 string")
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError as error:
        raise InvalidDocumentError(f"{what} {value} lies outside the years 1 to 9999 in UTC") from error


def read_expiry(expires_at: object, ttl: object) -> datetime | None:
    """When a document expires: a date, or seconds (or a timedelta) from now."""
    if ttl is None:
        return _read_time("expires_at", expires_at)
    if expires_at is not None:
        raise InvalidDocumentError("both expires_at and ttl are given; expected one of them")
    if isinstance(ttl, timedelta):
        seconds = ttl.total_seconds()
    elif isinstance(ttl, int | float) and not isinstance(ttl, bool):
        seconds = ttl
    else:
        raise InvalidDocumentError(f"ttl is {_show(ttl)}; expected seconds or a timedelta")
    if not seconds > 0:  # NaN too
        raise InvalidDocumentError(f"ttl is {_show(ttl)}; expected more than 0 seconds")
    try:
        return datetime.now(UTC) + timedelta(seconds=seconds)
    except OverflowError as error:
        raise InvalidDocumentError(
            "the ttl ends after the year 9999; leave it out to keep the document"
        ) from error


def _read_label(what: str, value: object) -> str | None:
    return None if value is None else check_name(what, value)


def _check_unicode(what: str, text: str) -> None:
    if "\x00" in text:
        raise InvalidDocumentError(f"{what} contains a NUL character at {text.index(chr(0))}; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidDocumentError(
            f"{what} is not valid Unicode: half a surrogate pair at character {error.start}"
        ) from error


def _check_metadata(value: object, most: int, depth: int = 0) -> None:
    """What JSON would hide or storage could not hold: other keys than strings, NUL, endless nesting."""
    if depth > most:
        raise LimitError(
            f"metadata is nested deeper than {most} levels (MemoryConfig.max_metadata_depth); flatten it"
        )
    if isinstance(value, str):
        _check_unicode("metadata", value)
    elif isinstance(value, Mapping):
        for key, child in value.items():
            if not isinstance(key, str):
                raise InvalidDocumentError(f"metadata has the key {_show(key)}; expected string keys")
            _check_unicode("metadata", key)
            _check_metadata(child, most, depth + 1)
    elif isinstance(value, list | tuple):
        for child in value:
            _check_metadata(child, most, depth + 1)


def _plain(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{_show(value)} is no JSON value")


def _show(value: object) -> str:
    text = repr(value)
    return f"{text[:60]}{'…' if len(text) > 60 else ''} ({type(value).__name__})"
