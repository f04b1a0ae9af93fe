"""An opened memory: its store, its model's thread and its settings, as all its verbs and views share them.

Knows how a verb reaches the worker thread, the engine and the bank; not what any verb does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from msa_memory.config import MemoryConfig
from msa_memory.engine.engine import Engine
from msa_memory.engine.worker import Worker
from msa_memory.errors import ConfigError, EngineError, ForkedMemoryError, ReadOnlyError
from msa_memory.living_bank import LivingBank
from msa_memory.persistence import Store
from msa_memory.runtime import Runtime

__all__ = ["OpenedMemory", "Shared"]

T = TypeVar("T")


@dataclass
class Shared:
    """What all namespace views of one opened memory have in common."""

    store: Store
    runtime: Runtime
    config: MemoryConfig
    model_named: bool
    read_only: bool
    pid: int = field(default_factory=os.getpid)
    bank: LivingBank | None = None
    closed: bool = False
    closing: threading.Lock = field(default_factory=threading.Lock)
    retired: set[Worker] = field(default_factory=set)
    """Threads of models this memory moved away from."""


class OpenedMemory:
    """One namespace's view of an opened memory; ``MemoryModel`` inherits it through its verbs."""

    def __init__(self, shared: Shared, namespace: str) -> None:
        self._shared = shared
        self._namespace = namespace

    @property
    def _store(self) -> Store:
        self._check_open()
        return self._shared.store

    def _check_open(self, *, write: bool = False) -> None:
        shared = self._shared
        if shared.pid != os.getpid():
            raise ForkedMemoryError(
                f"this memory was opened in process {shared.pid} and is used in its child {os.getpid()}; "
                "open the memory again after the fork"
            )
        if shared.closed:
            raise ConfigError("this memory is closed; open it again with MemoryModel.open")
        if write and shared.read_only:
            raise ReadOnlyError("this memory was opened with read_only=True; open it without to change it")

    def _run(self, steps: Generator[Any, None, T]) -> T:
        self._check_open()
        return self._shared.runtime.worker.run(steps)

    async def _arun(self, steps: Generator[Any, None, T]) -> T:
        self._check_open()
        return await self._shared.runtime.worker.arun(steps)

    def _stream(self, steps: Generator[T | None, None, Any]) -> Iterator[T]:
        self._check_open()
        return self._shared.runtime.worker.stream(steps)

    def _astream(self, steps: Generator[T | None, None, Any]) -> AsyncIterator[T]:
        self._check_open()
        return self._shared.runtime.worker.astream(steps)

    def _run_all(self, jobs: Sequence[Generator[Any, None, T]]) -> list[T]:
        self._check_open()
        return self._shared.runtime.worker.run_all(jobs)

    async def _arun_all(self, jobs: Sequence[Generator[Any, None, T]]) -> list[T]:
        self._check_open()
        return await self._shared.runtime.worker.arun_all(jobs)

    def _engine(self) -> Engine:
        shared = self._shared
        if any(worker.is_current() for worker in shared.retired):
            raise EngineError("the memory moved to another model meanwhile; ask again")
        engine = shared.runtime.engine(allow_download=shared.model_named)
        if shared.bank is None:
            shared.store.bind_model(
                model=shared.runtime.key.name, fingerprint=engine.fingerprint, info={"name": engine.name}
            )
            shared.bank = LivingBank(shared.store, engine, shared.config.routing)
        return engine

    def _bank(self) -> LivingBank:
        self._engine()
        assert self._shared.bank is not None
        return self._shared.bank
