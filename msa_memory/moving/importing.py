"""A bundle into a memory: everything checked before anything is stored, then a part per commit.

With the bundle's own model nothing is encoded. What is already there and says the same is left as it is, so
an import that was killed is finished by running it again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import aiofiles

from msa_memory.config import MemoryConfig
from msa_memory.engine.engine import Engine
from msa_memory.engine.states import PassageStates
from msa_memory.errors import (
    ConfigError,
    ConflictError,
    ModelMismatchError,
    NotFoundError,
    StateDamagedError,
    StorageError,
)
from msa_memory.moving.container import BundleReader, chunks
from msa_memory.moving.encoding import Holding, encode_text
from msa_memory.moving.lines import DocumentLine, read_documents, read_messages
from msa_memory.moving.tensors import TensorFileError, read_tensors
from msa_memory.persistence import Arrival, Bundles, NewDocument, NewPassage, Store, StoredMessage
from msa_memory.progress import progress_reporter
from msa_memory.types import Document, ImportReceipt, Message, TensorBytes

__all__ = ["Import", "averify", "open_bundle"]

OnConflict = Literal["error", "replace", "skip"]
States = dict[tuple[str, str], dict[str, TensorBytes]]
"""Tensors by document and passage, both counted as text from "0"."""

MODES = ("error", "replace", "skip")


def open_bundle(path: Path) -> BundleReader:
    """Open a bundle and check every byte of it."""
    reader = BundleReader.open(path)
    try:
        reader.verify()
    except BaseException:
        reader.close()
        raise
    return reader


async def averify(path: Path) -> BundleReader:
    """``open_bundle`` for asyncio: neither reading nor hashing holds the loop up."""
    reader = await asyncio.to_thread(BundleReader.open, path)
    try:
        async with aiofiles.open(path, "rb") as file:
            for member in reader.members.values():
                digest = hashlib.sha256()
                for start, size in chunks(member):
                    await file.seek(start)
                    await asyncio.to_thread(digest.update, await file.read(size))
                reader.check(member, digest.hexdigest())
    except BaseException:
        reader.close()
        raise
    return reader


@dataclass
class Import:
    """One import of an open bundle into a namespace; ``steps`` runs on the engine's thread."""

    reader: BundleReader
    store: Store
    namespace: str
    config: MemoryConfig
    engine: Callable[[], Engine]
    on_conflict: OnConflict = "error"
    reencode: bool = False
    progress: bool | Callable[[int, int], None] | None = None
    _counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("added", "replaced", "unchanged", "skipped", "encoded"), 0)
    )

    def __post_init__(self) -> None:
        self._holding = Holding(self.store)

    def steps(self) -> Generator[None, None, ImportReceipt]:
        """Check everything, then store it.

        Raises:
            ModelMismatchError: another model wrote the bundle's states and ``reencode`` is false.
            ConflictError: an id is taken by something else and ``on_conflict`` is ``"error"``.
        """
        if self.on_conflict not in MODES:
            raise ConfigError(
                f"on_conflict is {self.on_conflict!r:.60}; expected 'error', 'replace' or 'skip'"
            )
        engine = self.engine()
        encode = self.reencode or not self._fits(engine)
        total = yield from self._check()
        with progress_reporter(self.progress, total, "Importing") as report:
            done = 0
            for name in self.reader.names("documents"):
                done += yield from self._bring_part(name, engine, encode)
                report(done)
        messages = yield from self._bring_messages()
        return ImportReceipt(namespace=self.namespace, messages=messages, **self._counts)

    def _fits(self, engine: Engine) -> bool:
        """Whether the bundle's states can be used as they are."""
        model = self.reader.manifest.get("model")
        model = model if isinstance(model, dict) else {}
        name, found = model.get("name"), model.get("fingerprint")
        if found != engine.fingerprint and not self.reencode and self.reader.names("documents"):
            raise ModelMismatchError(
                f"the bundle's states were written with model {str(name)[:60]!r} (fingerprint "
                f"{str(found)[:16]}), this memory's model is {engine.name!r} ({engine.fingerprint[:16]}); "
                "import it with reencode=True to encode the texts again, or open a memory of that model"
            )
        return engine.prompt.layout.documents == "bare"  # else the model read each passage with its number

    def _check(self) -> Generator[None, None, int]:
        """Read every line once; how many documents there are."""
        ids: set[object] = set()
        for name in self.reader.names("documents"):
            lines = list(read_documents(self.reader.read(name), self.config))
            for line in lines:
                _refuse_twice(ids, line.document.id, f"document {line.document.id!r}")
            self._refuse_taken(lines)
            yield
        places: set[object] = set()
        for messages in self._message_parts():
            for message in messages:
                place = (message.session, message.position)
                _refuse_twice(places, place, f"message {message.position} of session {message.session!r}")
            self._refuse_other_messages(messages)
            yield
        return len(ids)

    def _refuse_taken(self, lines: Sequence[DocumentLine]) -> None:
        if self.on_conflict != "error":
            return
        for id, (line, old) in self._taken(lines).items():
            if not _same_document(old, line):
                raise ConflictError(
                    f"document {id!r} of the bundle is another one in namespace {self.namespace!r}; nothing "
                    "was imported: use on_conflict='replace' or 'skip', or another namespace"
                )

    def _taken(self, lines: Sequence[DocumentLine]) -> dict[str, tuple[DocumentLine, Document]]:
        """Lines whose ids are taken, with the documents that have them."""
        by_id = {line.document.id: line for line in lines}
        found = {}
        for id in self.store.exists(self.namespace, by_id):
            with suppress(NotFoundError):  # forgotten meanwhile
                found[id] = by_id[id], self.store.get(self.namespace, id)
        return found

    def _bring_part(self, name: str, engine: Engine, encode: bool) -> Generator[None, None, int]:
        lines = list(read_documents(self.reader.read(name), self.config))
        states = self._states(name.replace("documents-", "states-").replace(".jsonl", ".safetensors"))
        taken = self._taken(lines)
        arrivals = []
        with Holding(self.store) as self._holding:
            for index, line in enumerate(lines):
                old = taken[line.document.id][1] if line.document.id in taken else None
                kind = self._kind(line, old)
                self._counts[kind] += 1
                if kind in ("added", "replaced"):
                    arrival = yield from self._arrival(line, index, states, engine, encode)
                    arrivals.append(replace(arrival, replaces=None if old is None else old.version))
            Bundles(self.store).bring(arrivals)
        return len(lines)

    def _kind(self, line: DocumentLine, old: Document | None) -> str:
        if old is None:
            return "added"
        if _same_document(old, line):
            return "unchanged"
        return "replaced" if self.on_conflict == "replace" else "skipped"

    def _arrival(
        self, line: DocumentLine, index: int, states: States, engine: Engine, encode: bool
    ) -> Generator[None, None, Arrival]:
        held = [states.get((str(index), str(ordinal)), {}) for ordinal in range(len(line.passages))]
        if encode or not held or not all(held):
            self._counts["encoded"] += 1
            passages = yield from encode_text(
                engine,
                line.document.text,
                line.passages[0].header if line.passages else "",
                passage_tokens=self.config.passage_tokens,
                reserve=self.store.reserve_numbers,
                what=f"document {line.document.id!r}",
                hold=self._holding.hold,
            )
        else:
            passages = self._as_they_are(line, held, engine)
            yield
        document = line.document
        new = NewDocument(
            id=document.id,
            namespace=self.namespace,
            text=document.text,
            metadata=document.metadata,
            timestamp=document.timestamp,
            expires_at=document.expires_at,
            source=document.source,
            trust=document.trust,
            passages=passages,
        )
        return Arrival(
            new=new,
            version=line.version,
            created_at=line.created_at,
            updated_at=line.updated_at,
            versions=line.versions,
        )

    def _as_they_are(
        self, line: DocumentLine, held: Sequence[dict[str, TensorBytes]], engine: Engine
    ) -> list[NewPassage]:
        passages = []
        numbers = self.store.reserve_numbers(len(held))
        for number, passage, tensors in zip(numbers, line.passages, held, strict=True):
            _check_states(tensors, engine, line.document.id)
            passages.append(
                NewPassage(
                    start=passage.start,
                    end=passage.end,
                    tokens=passage.tokens,
                    number=number,
                    header=passage.header,
                    states=tensors,
                )
            )
        return passages

    def _states(self, name: str) -> States:
        try:
            return _by_passage(read_tensors(self.reader.read(name)))
        except TensorFileError as error:
            raise StorageError(
                f"{name} of the bundle {self.reader.path} is no sound tensor file: {error}; import it with "
                "reencode=True after exporting it again"
            ) from error

    def _message_parts(self) -> Iterator[list[StoredMessage]]:
        for name in self.reader.names("messages"):
            yield list(read_messages(self.reader.read(name), self.namespace, self.config))

    def _refuse_other_messages(self, messages: Sequence[StoredMessage]) -> None:
        if self.on_conflict == "error":
            for message, old in self._same_places(messages):
                if old is not None and not _same_message(old, message):
                    raise ConflictError(
                        f"message {message.position} of session {message.session!r} is another one in "
                        f"namespace {self.namespace!r}; nothing was imported: use on_conflict='replace' or "
                        "'skip', or another namespace"
                    )

    def _same_places(
        self, messages: Sequence[StoredMessage]
    ) -> Iterator[tuple[StoredMessage, Message | None]]:
        """Messages, each with the one that has its place now."""
        held: dict[str, dict[int, Message]] = {}
        for message in messages:
            if message.session not in held:
                found = self.store.messages(self.namespace, message.session)
                held[message.session] = {old.position: old for old in found}
            yield message, held[message.session].get(message.position)

    def _bring_messages(self) -> Generator[None, None, int]:
        brought = 0
        for part in self._message_parts():
            fresh = [
                message
                for message, old in self._same_places(part)
                if old is None or (self.on_conflict == "replace" and not _same_message(old, message))
            ]
            Bundles(self.store).bring_messages(fresh)
            brought += len(fresh)
            yield
        return brought


def _refuse_twice(seen: set[object], value: object, what: str) -> None:
    if value in seen:
        raise StorageError(f"the bundle holds {what} twice; export it again")
    seen.add(value)


def _same_document(old: Document, line: DocumentLine) -> bool:
    new = line.document
    return (old.text, old.metadata, old.timestamp, old.expires_at, old.source, old.trust) == (
        new.text,
        new.metadata,
        new.timestamp,
        new.expires_at,
        new.source,
        new.trust,
    )


def _same_message(old: Message, new: StoredMessage) -> bool:
    return (old.role, old.name, old.content, old.timestamp, old.key) == (
        new.role,
        new.name,
        new.content,
        new.timestamp,
        new.key,
    )


def _by_passage(tensors: dict[str, TensorBytes]) -> States:
    """The tensors of a member by document and passage, under their own names."""
    found: States = {}
    for name, tensor in tensors.items():
        index, _, rest = name.partition(".")
        ordinal, _, own = rest.partition(".")
        found.setdefault((index, ordinal), {})[own] = tensor
    return found


def _check_states(tensors: dict[str, TensorBytes], engine: Engine, id: str) -> None:
    """StorageError unless the model could have written these states."""
    names = {each.name for each in fields(PassageStates)}
    if tensors.keys() != names:
        raise _unfit(id, f"they are {str(sorted(tensors))[:100]}, expected {sorted(names)}")
    try:
        states = PassageStates.from_bytes(tensors)
    except (StateDamagedError, RuntimeError, ValueError) as error:
        raise _unfit(id, str(error)[:120]) from error
    if any(len(getattr(states, name).shape) != 4 for name in ("keys", "values", "router_keys")):
        raise _unfit(id, "they have another number of axes than 4")
    msa, config = engine.msa, engine.decoder.config
    layers, heads, size = len(msa.router_layers), config.num_kv_heads, config.head_dim
    chunks_of, finer = states.keys.shape[2], states.router_keys.shape[1]
    shapes = {
        "keys": (layers, heads, chunks_of, size),
        "values": (layers, heads, chunks_of, size),
        "router_keys": (layers, finer, heads, size),
        "terms": (states.terms.shape[0], 2),
    }
    for name, shape in shapes.items():
        tensor = getattr(states, name)
        if tuple(tensor.shape) != shape or tensor.is_floating_point() == (name == "terms"):
            raise _unfit(id, f"{name} is {list(tensor.shape)} of {tensor.dtype}, expected {list(shape)}")
        if not tensor.isfinite().all():
            raise _unfit(id, f"{name} holds numbers that are not finite")
    tokens = range((chunks_of - 1) * msa.chunk + 1, chunks_of * msa.chunk + 1)
    finer_tokens = range((finer - 1) * msa.router_chunk + 1, finer * msa.router_chunk + 1)
    if max(tokens[0], finer_tokens[0], 1) > min(tokens[-1], finer_tokens[-1]):
        raise _unfit(id, f"{chunks_of} chunks and {finer} router chunks cannot come from one passage")


def _unfit(id: str, why: str) -> StorageError:
    return StorageError(
        f"the states of document {id!r} in the bundle are not this model's: {why}; import it with "
        "reencode=True, which makes them anew from the text"
    )
