"""Documents, versions and messages as lines of JSON, and back with every field checked.

A document is one line per earlier version, oldest first, and then its own. What is read back passes the
checks of ``add`` before anything is stored: a bundle is input like any other. Knows no file and no store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

from msa_memory.config import MemoryConfig
from msa_memory.documents import DocumentInput, check_name, read_item
from msa_memory.errors import InvalidDocumentError, LimitError, StorageError
from msa_memory.persistence import OldVersion, StoredDocument, StoredMessage

__all__ = ["DocumentLine", "PassageLine", "document_lines", "message_line", "read_documents", "read_messages"]

ROLES = ("system", "user", "assistant", "tool")
_MOST_VERSION = 2**31 - 1


class PassageLine(NamedTuple):
    """What a bundle says of a passage beside its states."""

    start: int
    end: int
    tokens: int
    header: str


class DocumentLine(NamedTuple):
    """A checked document of a bundle with its earlier versions."""

    document: DocumentInput
    version: int
    created_at: datetime
    updated_at: datetime
    passages: tuple[PassageLine, ...]
    versions: tuple[OldVersion, ...]


def document_lines(stored: StoredDocument) -> Iterator[bytes]:
    """The lines of a document: its earlier versions and itself."""
    document = stored.document
    for version in stored.versions:
        yield _line(
            "version",
            {
                "version": version.version,
                **_said(version),
                "created_at": version.created_at.isoformat(),
            },
        )
    passages = [
        {"start": passage.start, "end": passage.end, "tokens": passage.tokens, "header": header}
        for passage, header in stored.passages
    ]
    yield _line(
        "document",
        {
            "id": document.id,
            "version": document.version,
            **_said(document),
            "created_at": document.created_at.isoformat(),
            "updated_at": document.updated_at.isoformat(),
            "passages": passages,
        },
    )


def message_line(message: StoredMessage) -> bytes:
    """The line of a session's message."""
    return _line(
        "message",
        {
            "session": message.session,
            "position": message.position,
            "role": message.role,
            "name": message.name,
            "content": message.content,
            "timestamp": message.timestamp.isoformat(),
            "created_at": message.created_at.isoformat(),
            "key": message.key,
            "document": message.document_id,
        },
    )


def read_documents(data: bytes, config: MemoryConfig) -> Iterator[DocumentLine]:
    """The documents of a member; InvalidDocumentError, LimitError or StorageError for what is not one."""
    versions: list[OldVersion] = []
    for kind, fields in _read_lines(data):
        if kind == "version":
            versions.append(_version(fields, config))
        elif kind == "document":
            yield _document(fields, tuple(versions), config)
            versions = []
        else:
            raise _broken(f"a line of kind {kind[:20]!a} among documents")
    if versions:
        raise _broken("versions without their document")


def read_messages(data: bytes, namespace: str, config: MemoryConfig) -> Iterator[StoredMessage]:
    """The messages of a member, for a namespace."""
    for kind, fields in _read_lines(data):
        if kind != "message":
            raise _broken(f"a line of kind {kind[:20]!a} among messages")
        said = read_item({"content": fields.get("content"), "timestamp": fields.get("timestamp")}, config)
        name, key, document = fields.get("name"), fields.get("key"), fields.get("document")
        if fields.get("role") not in ROLES or said.timestamp is None:
            raise _broken(f"a message with role {str(fields.get('role'))[:20]!a} and no date")
        yield StoredMessage(
            namespace=namespace,
            session=check_name("session", fields.get("session")),
            position=_whole(fields, "position", 0, _MOST_VERSION - 1),
            role=fields["role"],
            name=None if name is None else check_name("name", name),
            content=said.text,
            timestamp=said.timestamp,
            created_at=_moment(fields, "created_at", config),
            key=None if key is None else check_name("key", key),
            document_id=None if document is None else check_name("document", document),
        )


def _said(value: Any) -> dict[str, Any]:
    """What a document and each of its versions have in common."""
    return {
        "text": value.text,
        "metadata": value.metadata,
        "timestamp": value.timestamp.isoformat(),
        "expires_at": value.expires_at.isoformat() if value.expires_at else None,
        "source": value.source,
        "trust": value.trust,
    }


def _line(kind: str, fields: Mapping[str, Any]) -> bytes:
    return json.dumps({kind: fields}, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _read_lines(data: bytes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line:
            continue
        try:
            value = json.loads(line)
        except RecursionError as error:
            raise LimitError(
                f"line {number} of the bundle is nested too deeply; flatten its metadata"
            ) from error
        except ValueError as error:
            raise _broken(f"line {number} is not JSON") from error
        match value:
            case dict() if len(value) == 1 and isinstance(fields := next(iter(value.values())), dict):
                yield next(iter(value)), fields
            case _:
                raise _broken(f"line {number} is not one object under one name")


def _document(
    fields: Mapping[str, Any], versions: tuple[OldVersion, ...], config: MemoryConfig
) -> DocumentLine:
    document = _input(fields, config, id=check_name("id", fields.get("id")))
    version = _whole(fields, "version", 1, _MOST_VERSION)
    numbers = [earlier.version for earlier in versions] + [version]
    if any(after <= before for before, after in pairwise(numbers)):
        raise _broken(f"document {document.id[:60]!a} has its versions in the order {numbers[:5]}")
    passages = fields.get("passages")
    if not isinstance(passages, list):
        raise _broken(f"document {document.id[:60]!a} has no list of passages")
    return DocumentLine(
        document=document,
        version=version,
        created_at=_moment(fields, "created_at", config),
        updated_at=_moment(fields, "updated_at", config),
        passages=tuple(_passage(passage, document, config) for passage in passages),
        versions=versions,
    )


def _version(fields: Mapping[str, Any], config: MemoryConfig) -> OldVersion:
    said = _input(fields, config)
    assert said.timestamp is not None
    return OldVersion(
        namespace="",  # where it goes is the importing memory's to say
        id="",
        version=_whole(fields, "version", 1, _MOST_VERSION),
        text=said.text,
        metadata=said.metadata,
        timestamp=said.timestamp,
        created_at=_moment(fields, "created_at", config),
        expires_at=said.expires_at,
        source=said.source,
        trust=said.trust,
    )


def _input(fields: Mapping[str, Any], config: MemoryConfig, id: str | None = None) -> DocumentInput:
    given = {key: fields.get(key) for key in ("metadata", "timestamp", "expires_at", "source", "trust")}
    if given["timestamp"] is None:
        raise _broken("a document without timestamp")
    return read_item({"content": fields.get("text"), "id": id, **given}, config)


def _passage(passage: Any, document: DocumentInput, config: MemoryConfig) -> PassageLine:
    if not isinstance(passage, dict) or not isinstance(header := passage.get("header"), str):
        raise _broken(f"document {document.id[:60]!a} has a passage without a heading")
    if len(header) > config.max_metadata_bytes:
        raise LimitError(
            f"a passage of document {document.id!r} has a heading of {len(header)} characters; the limit is "
            f"{config.max_metadata_bytes} (MemoryConfig.max_metadata_bytes)"
        )
    start = _whole(passage, "start", 0, len(document.text) - 1)
    end = _whole(passage, "end", start + 1, len(document.text))
    return PassageLine(start, end, _whole(passage, "tokens", 0, _MOST_VERSION), header)


def _whole(fields: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _broken(f"{name} is {str(value)[:20]!a}, expected a whole number from {least} to {most}")
    return value


def _moment(fields: Mapping[str, Any], name: str, config: MemoryConfig) -> datetime:
    found = read_item({"content": "-", "timestamp": fields.get(name)}, config).timestamp
    if found is None:
        raise InvalidDocumentError(f"a line of the bundle has no {name}; expected an ISO 8601 date")
    return found


def _broken(why: str) -> StorageError:
    return StorageError(f"the bundle holds {why}; export it again")
