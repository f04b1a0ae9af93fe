"""A namespace as one bundle file: what goes into it, and how the file appears whole or not at all.

The rows are those of one moment: they are set aside in one transaction, which is as short as copying text can
be, and the states follow without one, so that neither writers nor erasure wait for the file. What is
forgotten meanwhile is left out; what is given another text meanwhile goes with the text it had, without the
states of it, which are gone.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path, PurePath
from typing import IO

import aiofiles

from msa_memory.errors import ConfigError, LockedError, NotFoundError, StateDamagedError, StorageError
from msa_memory.moving.container import BundleWriter
from msa_memory.moving.lines import document_lines, message_line
from msa_memory.moving.tensors import tensor_file
from msa_memory.persistence import Bundles, PassageRecord, Store, StoredDocument
from msa_memory.persistence.disk import guarded, sync, sync_folder
from msa_memory.types import ExportReceipt, TensorBytes

__all__ = ["Export", "aexport_to", "export_to"]

PART_DOCUMENTS = 64
PART_BYTES = 32 * 1024 * 1024
PART_MESSAGES = 1000

States = dict[int, dict[str, TensorBytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A message, or a document with its versions, as it was when the export began."""

    kind: str
    part: int
    key: int
    """Of its row."""
    stamp: str = ""
    """Of a message, whose key may be given to another one."""
    id: str = ""
    versions: int = 0
    passages: tuple[int, ...] = ()
    """Their numbers, in reading order."""
    lines: int
    """How many of them follow."""


class Export:
    """Iterate it for the pieces of the bundle; ``receipt`` says afterwards what is in it.

    ``beside`` is the folder for what is set aside meanwhile, in a file without a name.
    """

    def __init__(self, store: Store, namespace: str, *, beside: Path | None = None) -> None:
        self._store, self._rows, self._namespace = store, Bundles(store), namespace
        self._beside = beside
        self._writer = BundleWriter()
        self._counts = dict.fromkeys(("documents", "versions", "passages", "messages"), 0)
        self._without_states: list[str] = []

    def __iter__(self) -> Iterator[bytes]:
        with tempfile.TemporaryFile(dir=self._beside) as aside:
            for entry, lines in self._rows_of_now():
                aside.write(json.dumps(asdict(entry)).encode() + b"\n")
                aside.writelines(lines)
            aside.seek(0)
            for (kind, part), group in groupby(_read(aside), key=lambda each: (each[0].kind, each[0].part)):
                write = self._write_messages if kind == "messages" else self._write_documents
                yield from write(part, list(group))
        identity = self._store.identity
        yield from self._writer.finish(
            {
                "namespace": self._namespace,
                "model": {
                    "name": PurePath(identity.model or "").name,  # of a folder, not where it lies here
                    "fingerprint": identity.fingerprint,
                },
                "counts": self._counts,
            }
        )

    def receipt(self, path: Path) -> ExportReceipt:
        """What was written."""
        return ExportReceipt(
            path=str(path),
            namespace=self._namespace,
            size_bytes=self._writer.size,
            sha256=self._writer.sha256,
            without_states=tuple(self._without_states),
            **self._counts,
        )

    def _rows_of_now(self) -> Iterator[tuple[_Entry, list[bytes]]]:
        """Every message and document of one moment, with its lines, in the parts of the bundle."""
        with self._rows.snapshot(self._namespace) as snapshot:
            after = part = 0
            while found := snapshot.messages(after, PART_MESSAGES):
                part, after = part + 1, found[-1][0]
                for key, stamp, message in found:
                    yield _message_entry(part, key, stamp), [message_line(message)]
            after, part = -1, 0
            while rows := snapshot.documents(after, limit=PART_DOCUMENTS, most_bytes=PART_BYTES):
                part, after = part + 1, rows[-1][0]
                for key, stored in rows:
                    yield _document_entry(part, key, stored), list(document_lines(stored))

    def _write_messages(self, part: int, entries: list[tuple[_Entry, list[bytes]]]) -> Iterator[bytes]:
        left = self._rows.messages_left({entry.key: entry.stamp for entry, _ in entries})
        lines = [line for entry, lines in entries if entry.key in left for line in lines]
        yield from self._writer.member(f"messages-{part:06d}.jsonl", lines)
        self._counts["messages"] += len(lines)

    def _write_documents(self, part: int, entries: list[tuple[_Entry, list[bytes]]]) -> Iterator[bytes]:
        states = self._states([entry for entry, _ in entries])
        left = [(entry, lines) for entry, lines in entries if entry.key in states]
        tensors = {
            f"{index}.{ordinal}.{name}": tensor
            for index, (entry, _) in enumerate(left)
            for ordinal, number in enumerate(entry.passages)
            for name, tensor in states[entry.key].get(number, {}).items()
        }
        for entry, _ in left:
            self._count(entry, states[entry.key])
        yield from self._writer.member(f"documents-{part:06d}.jsonl", (line for _, ls in left for line in ls))
        yield from self._writer.member(f"states-{part:06d}.safetensors", tensor_file(tensors))

    def _states(self, entries: list[_Entry]) -> dict[int, States]:
        """The states of documents by row key and passage number, without what was forgotten meanwhile.

        None for a document that was given other passages meanwhile, or whose states are damaged.
        """
        while True:
            records = self._rows.records([entry.key for entry in entries])
            with suppress(NotFoundError):  # something more was forgotten or replaced: look again
                return {
                    entry.key: self._states_of(entry, records[entry.key])
                    for entry in entries
                    if entry.key in records
                }

    def _states_of(self, entry: _Entry, records: Mapping[int, PassageRecord]) -> States:
        if any(number not in records for number in entry.passages):
            return {}
        try:
            return {number: dict(self._store.states(records[number])) for number in entry.passages}
        except StateDamagedError:
            return {}

    def _count(self, entry: _Entry, states: States) -> None:
        self._counts["documents"] += 1
        self._counts["versions"] += entry.versions
        self._counts["passages"] += len(entry.passages)
        if any(number not in states for number in entry.passages):
            self._without_states.append(entry.id)


def _message_entry(part: int, key: int, stamp: str) -> _Entry:
    return _Entry(kind="messages", part=part, key=key, stamp=stamp, lines=1)


def _document_entry(part: int, key: int, stored: StoredDocument) -> _Entry:
    return _Entry(
        kind="documents",
        part=part,
        key=key,
        id=stored.document.id,
        versions=len(stored.versions),
        passages=tuple(record.number for record, _ in stored.passages),
        lines=len(stored.versions) + 1,
    )


def _read(aside: IO[bytes]) -> Iterator[tuple[_Entry, list[bytes]]]:
    while head := aside.readline():
        entry = _Entry(**json.loads(head))
        yield entry, [aside.readline() for _ in range(entry.lines)]


def export_to(path: Path, export: Export, *, overwrite: bool) -> ExportReceipt:
    """Write the bundle beside ``path``, and move it there once it is on the medium."""
    with _beside(path, overwrite) as partial, guarded("write the bundle", path):
        with open(partial, "wb", opener=_private) as file:
            for piece in export:
                file.write(piece)
            file.flush()
            sync(file.fileno())
        _put(partial, path)
    return export.receipt(path)


async def aexport_to(path: Path, export: Export, *, overwrite: bool) -> ExportReceipt:
    """``export_to`` for asyncio: neither reading the memory nor writing the file holds the loop up."""
    pieces = iter(export)
    with _beside(path, overwrite) as partial, guarded("write the bundle", path):
        async with aiofiles.open(partial, "wb", opener=_private) as file:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                await file.write(piece)
            await file.flush()
            await asyncio.to_thread(sync, file.fileno())
        await asyncio.to_thread(_put, partial, path)
    return export.receipt(path)


@contextmanager
def _beside(path: Path, overwrite: bool) -> Iterator[Path]:
    """A file to write first, this export's alone; it is gone if the block fails, and reused after a kill."""
    with guarded("look for", path):
        if path.is_dir() or (path.exists() and not overwrite):
            raise StorageError(f"{path} exists already; name another file, or say overwrite to replace it")
        if not path.parent.is_dir():
            raise ConfigError(f"the folder {path.parent} does not exist; make it first")
    partial = path.with_name(f".{path.name}.partial")
    with guarded("create", partial):
        held = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                f"another export is writing {path}; wait for it, or name another file"
            ) from error
        try:
            yield partial
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    finally:
        os.close(held)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _put(partial: Path, path: Path) -> None:
    os.replace(partial, path)
    sync_folder(path.parent)
