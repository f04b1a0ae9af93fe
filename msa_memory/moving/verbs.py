"""The verbs of ``MemoryModel`` that move memories: export, import_bundle, import_from, fork, reencode.

Orders calls to the parts of this package, on the thread where each belongs; ``MemoryModel`` inherits them.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import aiofiles

from msa_memory.errors import ConfigError, LimitError, StorageError
from msa_memory.moving.container import BundleReader
from msa_memory.moving.exporting import Export, aexport_to, export_to
from msa_memory.moving.importers import read_export
from msa_memory.moving.importing import Import, OnConflict, averify, open_bundle
from msa_memory.moving.reencode import reencode_steps
from msa_memory.persistence import fork_bank
from msa_memory.runtime import Runtime, acquire, model_name, release
from msa_memory.types import Document, ExportReceipt, ImportReceipt, ReencodeReceipt

if TYPE_CHECKING:
    from msa_memory.memory import MemoryModel

__all__ = ["MovingVerbs"]

Progress = bool | Callable[[int, int], None] | None
Exported = str | Path | builtins.list[Any] | Mapping[str, Any]
MOST_EXPORT_BYTES = 1 << 30


class MovingVerbs:
    """What ``MemoryModel`` inherits; of no use on its own."""

    def export(self, path: str | Path, *, overwrite: bool = False) -> ExportReceipt:
        """Write this namespace to one file: texts, versions, states, sessions; no other namespace.

        The file appears whole or not at all. Others may write meanwhile: everything is in it as it was when
        the export began, except what is forgotten before it is written. A document whose text changes
        meanwhile goes without its states (``without_states``); importing it makes them anew.

        Raises:
            StorageError: the file exists and ``overwrite`` is false, or cannot be written.
        """
        return export_to(_path(path), _export(self, path), overwrite=overwrite)

    async def aexport(self, path: str | Path, *, overwrite: bool = False) -> ExportReceipt:
        """Async twin of ``export``."""
        return await aexport_to(_path(path), _export(self, path), overwrite=overwrite)

    def import_bundle(
        self,
        path: str | Path,
        *,
        on_conflict: OnConflict = "error",
        reencode: bool = False,
        progress: Progress = None,
    ) -> ImportReceipt:
        """Bring an exported namespace into this one. Run again after a crash, it goes on where it was.

        The whole file is checked before anything is stored. With the bundle's own model nothing is encoded.

        Args:
            on_conflict: what to do about an id that is taken by a document saying something else; one that
                says the same is left alone.
            reencode: make all states anew from the texts: for another model, or where the file's maker is
                not trusted.
            progress: as in ``add_many``.

        Raises:
            StorageError: the file is damaged, or no bundle.
            ModelMismatchError: another model wrote it and ``reencode`` is false.
            ConflictError: an id is taken and ``on_conflict`` is ``"error"``; nothing was imported.
            LimitError: something in it is larger than the limits in ``MemoryConfig``.
        """
        memory = _writable(self)
        with open_bundle(_path(path)) as reader:
            return memory._run(_import(memory, reader, on_conflict, reencode, progress).steps())

    async def aimport_bundle(
        self,
        path: str | Path,
        *,
        on_conflict: OnConflict = "error",
        reencode: bool = False,
        progress: Progress = None,
    ) -> ImportReceipt:
        """Async twin of ``import_bundle``."""
        memory = _writable(self)
        with await averify(_path(path)) as reader:
            return await memory._arun(_import(memory, reader, on_conflict, reencode, progress).steps())

    def import_from(
        self,
        format: str,
        source: Exported,
        *,
        progress: Progress = None,
    ) -> builtins.list[Document]:
        """Bring in what another system exported: ``"mem0"`` (``get_all``) or ``"langgraph"`` (store items).

        Ids are kept: importing again encodes only what changed. Items become documents of this namespace;
        their own user or namespace is metadata to filter by.

        Args:
            source: a JSON file, or what it would parse to.

        Raises:
            InvalidDocumentError: not such an export; says which entry.
        """
        data = _read(_path(source)) if isinstance(source, str | Path) else source
        return _memory(self)._run(_import_items(_memory(self), format, data, progress))

    async def aimport_from(
        self,
        format: str,
        source: Exported,
        *,
        progress: Progress = None,
    ) -> builtins.list[Document]:
        """Async twin of ``import_from``."""
        data = await _aread(_path(source)) if isinstance(source, str | Path) else source
        return await _memory(self)._arun(_import_items(_memory(self), format, data, progress))

    def fork(self, path: str | Path) -> MemoryModel:
        """Copy the memory, all namespaces, to a new folder and open the copy in this one's namespace.

        State files are shared by hard links where the file system allows it, until either side changes them.
        Other writers wait. What is forgotten here later stays in the copy.

        Raises:
            StorageError: the folder exists and is not empty, or the disk refused; nothing is left there.
        """
        memory = _writable(self)
        target = _path(path)
        fork_bank(memory._store, target)
        shared = memory._shared
        key = shared.runtime.key
        return type(memory).open(
            target,
            model=key.name if shared.model_named else None,
            namespace=memory._namespace,
            device=key.device,
            dtype=key.dtype,
            config=shared.config,
        )

    async def afork(self, path: str | Path) -> MemoryModel:
        """Async twin of ``fork``."""
        return await asyncio.to_thread(self.fork, path)

    def reencode(self, model: str | Path | None = None, *, progress: Progress = None) -> ReencodeReceipt:
        """Move the memory, all namespaces, to another model: every kept text is read again.

        The memory works under its old model until the last step, and under the new one after it; other
        processes then have to open it again. Run again after a crash, it goes on where it was.

        Args:
            model: as in ``open``; None means the memory's own, whose weights or routers changed.
            progress: as in ``add_many``.
        """
        memory = _writable(self)
        runtime = _new_runtime(memory, model)
        with _given_back_on_error(runtime):
            receipt = runtime.worker.run(_reencode(memory, runtime, model, progress))
            _adopt(memory, runtime)
        return receipt

    async def areencode(
        self, model: str | Path | None = None, *, progress: Progress = None
    ) -> ReencodeReceipt:
        """Async twin of ``reencode``."""
        memory = _writable(self)
        runtime = _new_runtime(memory, model)
        with _given_back_on_error(runtime):
            receipt = await runtime.worker.arun(_reencode(memory, runtime, model, progress))
            await asyncio.to_thread(_adopt, memory, runtime)
        return receipt


def _memory(verbs: MovingVerbs) -> MemoryModel:
    memory = cast("MemoryModel", verbs)
    memory._check_open()
    return memory


def _writable(verbs: MovingVerbs) -> MemoryModel:
    memory = _memory(verbs)
    memory._check_open(write=True)
    return memory


def _export(verbs: MovingVerbs, path: str | Path) -> Export:
    memory = _memory(verbs)
    return Export(memory._store, memory._namespace, beside=_path(path).parent)


def _import(
    memory: MemoryModel, reader: BundleReader, on_conflict: OnConflict, reencode: bool, progress: Progress
) -> Import:
    return Import(
        reader=reader,
        store=memory._store,
        namespace=memory._namespace,
        config=memory._shared.config,
        engine=memory._engine,
        on_conflict=on_conflict,
        reencode=reencode,
        progress=progress,
    )


def _import_items(
    memory: MemoryModel, format: str, data: bytes | builtins.list[Any] | Mapping[str, Any], progress: Progress
) -> Generator[None, None, builtins.list[Document]]:
    items = read_export(data, format)
    return (yield from memory._add_checked(items, "replace", progress))


def _new_runtime(memory: MemoryModel, model: str | Path | None) -> Runtime:
    old = memory._shared.runtime.key
    name = old.name if model is None else model_name(model, None, None)
    return acquire(replace(old, name=name))


def _reencode(
    memory: MemoryModel, runtime: Runtime, model: str | Path | None, progress: Progress
) -> Generator[None, None, ReencodeReceipt]:
    engine = runtime.engine(allow_download=model is not None)
    return (
        yield from reencode_steps(
            memory._store,
            engine,
            model=runtime.key.name,
            passage_tokens=memory._shared.config.passage_tokens,
            progress=progress,
        )
    )


def _adopt(memory: MemoryModel, runtime: Runtime) -> None:
    """Answer with another model from here on; questions still on the old one's thread fail by name."""
    shared = memory._shared
    with shared.closing:
        if shared.closed:
            raise ConfigError("the memory was closed while it moved to another model; open it again")
        old, shared.runtime, shared.bank = shared.runtime, runtime, None
        shared.retired = {*shared.retired, old.worker} - {runtime.worker}
    release(old)


@contextmanager
def _given_back_on_error(runtime: Runtime) -> Iterator[None]:
    try:
        yield
    except BaseException:
        release(runtime)
        raise


def _path(path: object) -> Path:
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise ConfigError(f"path is {path!r:.60}; expected a path")
    return Path(path).expanduser().absolute()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return _limited(file.read(MOST_EXPORT_BYTES + 1), path)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}; check the path") from error


async def _aread(path: Path) -> bytes:
    try:
        async with aiofiles.open(path, "rb") as file:
            return _limited(await file.read(MOST_EXPORT_BYTES + 1), path)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}; check the path") from error


def _limited(data: bytes, path: Path) -> bytes:
    if len(data) > MOST_EXPORT_BYTES:
        raise LimitError(f"{path} is larger than {MOST_EXPORT_BYTES} bytes; import it in several parts")
    return data
