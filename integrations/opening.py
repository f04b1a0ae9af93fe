"""The memory behind an adapter: one that the caller opened, or a folder that is opened at first use."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from msa_memory.errors import ConfigError

if TYPE_CHECKING:
    from msa_memory.memory import MemoryModel

__all__ = ["MemoryHandle"]


class MemoryHandle:
    """Gives one namespace of a memory, and closes what it opened itself.

    Args:
        memory: an open memory, which stays the caller's to close; a folder; or None for one in RAM.
        namespace: the namespace to use; None keeps the open memory's own, or ``default``.
        model: the model to open a folder with; None takes the one it was written with.
    """

    def __init__(
        self,
        memory: MemoryModel | str | Path | None,
        *,
        namespace: str | None = None,
        model: str | Path | None = None,
    ) -> None:
        self._given, self._namespace, self._model = memory, namespace, model
        self._opening = threading.Lock()
        self._opened: MemoryModel | None = None
        self._view: MemoryModel | None = None
        if memory is not None and not isinstance(memory, str | Path):
            self._check_open_memory(memory)

    def get(self) -> MemoryModel:
        """The memory, opened if it is not yet. Loads no weights."""
        with self._opening:
            if self._view is None:
                self._view = self._open()
            return self._view

    async def aget(self) -> MemoryModel:
        """``get`` for asyncio: opening a folder does not block the loop."""
        return self._view if self._view is not None else await asyncio.to_thread(self.get)

    def close(self) -> None:
        """Close the memory if it was opened here; the next ``get`` opens it again."""
        with self._opening:
            if self._opened is not None:
                self._opened.close()
            self._opened = self._view = None

    def _open(self) -> MemoryModel:
        from msa_memory.memory import MemoryModel

        if isinstance(self._given, MemoryModel):
            return self._given if self._namespace is None else self._given.namespace(self._namespace)
        namespace = self._namespace or "default"
        self._opened = MemoryModel.open(self._given, model=self._model, namespace=namespace)
        return self._opened

    def _check_open_memory(self, memory: object) -> None:
        from msa_memory.memory import MemoryModel

        if not isinstance(memory, MemoryModel):
            raise ConfigError(
                f"memory is {memory!r:.60}; expected a MemoryModel, a folder, or None for one in RAM"
            )
        if self._model is not None:
            raise ConfigError(
                f"model {str(self._model)!r} was named beside a memory that is already open; leave it out, "
                "or give the memory's folder"
            )
