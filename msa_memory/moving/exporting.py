"""A namespace as one bundle file: what goes into it, and how the file appears whole or not at all.

Documents are copied a part at a time in short transactions, so that neither writers nor erasure wait: each
is in the bundle whole, as it was at some moment of the export; what is forgotten meanwhile may be left out.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

import aiofiles

from msa_memory.errors import ConfigError, LockedError, NotFoundError, StateDamagedError, StorageError
from msa_memory.moving.container import BundleWriter
from msa_memory.moving.lines import document_lines, message_line
from msa_memory.moving.tensors import tensor_file
from msa_memory.persistence import Bundles, Store, StoredDocument
from msa_memory.persistence.disk import guarded, sync, sync_folder
from msa_memory.types import ExportReceipt, TensorBytes

__all__ = ["Export", "aexport_to", "export_to"]

PART_DOCUMENTS = 64
PART_BYTES = 32 * 1024 * 1024
PART_MESSAGES = 1000

States = dict[int, dict[str, TensorBytes]]


class Export:
    """Iterate it for the pieces of the bundle; ``receipt`` says afterwards what is in it."""

    def __init__(self, store: Store, namespace: str) -> None:
        self._store, self._rows, self._namespace = store, Bundles(store), namespace
        self._writer = BundleWriter()
        self._counts = dict.fromkeys(("documents", "versions", "passages", "messages"), 0)
        self._without_states: list[str] = []

    def __iter__(self) -> Iterator[bytes]:
        messages_end, documents_end = self._rows.ends(self._namespace)
        yield from self._messages(messages_end)
        yield from self._documents(documents_end)
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

    def _messages(self, end: int) -> Iterator[bytes]:
        after, part = 0, 0
        while rows := self._rows.messages(self._namespace, after, end, PART_MESSAGES):
            part += 1
            yield from self._writer.member(
                f"messages-{part:06d}.jsonl", (message_line(message) for _, message in rows)
            )
            self._counts["messages"] += len(rows)
            after = rows[-1][0]

    def _documents(self, end: int) -> Iterator[bytes]:
        after, part = -1, 0
        while True:
            rows, states = self._part(after, end)
            if not rows:
                return
            part += 1
            yield from self._write_part(part, [document for _, document in rows], states)
            after = rows[-1][0]

    def _part(self, after: int, end: int) -> tuple[list[tuple[int, StoredDocument]], States]:
        """The next documents with the states they had when they were read."""
        while True:
            rows = self._rows.documents(
                self._namespace, after, end, limit=PART_DOCUMENTS, most_bytes=PART_BYTES
            )
            states: States = {}
            with suppress(NotFoundError):  # one of them was forgotten or replaced meanwhile: read them again
                for _, document in rows:
                    states |= self._states(document)
                return rows, states

    def _states(self, document: StoredDocument) -> States:
        """A document's states by passage number; none where some are damaged."""
        try:
            return {record.number: dict(self._store.states(record)) for record, _ in document.passages}
        except StateDamagedError:
            return {}

    def _write_part(self, part: int, documents: list[StoredDocument], states: States) -> Iterator[bytes]:
        tensors = {}
        for index, document in enumerate(documents):
            for ordinal, (record, _) in enumerate(document.passages):
                for name, tensor in states.get(record.number, {}).items():
                    tensors[f"{index}.{ordinal}.{name}"] = tensor
            self._count(document, states)
        lines = (line for document in documents for line in document_lines(document))
        yield from self._writer.member(f"documents-{part:06d}.jsonl", lines)
        yield from self._writer.member(f"states-{part:06d}.safetensors", tensor_file(tensors))

    def _count(self, document: StoredDocument, states: States) -> None:
        self._counts["documents"] += 1
        self._counts["versions"] += len(document.versions)
        self._counts["passages"] += len(document.passages)
        if any(record.number not in states for record, _ in document.passages):
            self._without_states.append(document.document.id)


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
