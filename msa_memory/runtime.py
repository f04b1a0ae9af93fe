"""Loaded models, shared by every memory of the process.

A ``Runtime`` is one model and the one thread that runs it. It loads on first use and is dropped when the
last memory that uses it closes.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msa_memory.engine.models import DEFAULT_MODEL, resolve
from msa_memory.engine.worker import Worker
from msa_memory.errors import ConfigError

if TYPE_CHECKING:
    from msa_memory.engine.engine import DecodeWeights, Engine

__all__ = ["Runtime", "RuntimeKey", "acquire", "release"]


@dataclass(frozen=True, slots=True)
class RuntimeKey:
    """What makes two memories share a model; ``name`` is a registered name, a path or a hub id."""

    name: str
    device: str = "auto"
    dtype: str = "auto"
    router_normalize: bool | None = None
    decode_weights: DecodeWeights = "auto"


class Runtime:
    """One model and its worker thread."""

    def __init__(self, key: RuntimeKey) -> None:
        self.key = key
        self.worker = Worker(f"msa-memory {key.name}")
        self.users = 0
        self._engine: Engine | None = None

    @property
    def loaded(self) -> bool:
        return self._engine is not None

    def engine(self, *, allow_download: bool) -> Engine:
        """The engine, loading it if need be. Call on the worker thread only."""
        if self._engine is None:
            from msa_memory.engine.engine import load_engine

            path = resolve(self.key.name, allow_download=allow_download)
            registered = self.key.name if not Path(self.key.name).expanduser().exists() else None
            self._engine = load_engine(
                path,
                name=registered,
                device=self.key.device,
                dtype=self.key.dtype,
                router_normalize=self.key.router_normalize,
                decode_weights=self.key.decode_weights,
            )
        return self._engine


_runtimes: dict[RuntimeKey, Runtime] = {}
_lock = threading.Lock()


def _forget_parent() -> None:
    """In a forked child: the parent's worker threads do not exist here, and its lock may be held for ever."""
    global _lock
    _lock = threading.Lock()
    _runtimes.clear()


os.register_at_fork(after_in_child=_forget_parent)


def acquire(key: RuntimeKey) -> Runtime:
    """The runtime for ``key``, new or shared; pair with ``release``."""
    with _lock:
        runtime = _runtimes.get(key)
        if runtime is None:
            runtime = _runtimes[key] = Runtime(key)
        runtime.users += 1
        return runtime


def release(runtime: Runtime) -> None:
    """Give a runtime back; the last one to do so ends its thread and frees its weights."""
    with _lock:
        runtime.users -= 1
        last = runtime.users == 0
        if last:
            _runtimes.pop(runtime.key, None)
    if last:
        runtime.worker.close()


def model_name(given: str | Path | None, recorded: str | None, environment: str | None) -> str:
    """Which model to use: the caller's, else the bank's, else the environment's, else the default."""
    if given is not None:
        _check_name(given)
        path = Path(given).expanduser()
        return str(path.absolute()) if path.exists() else str(given)
    return recorded or environment or DEFAULT_MODEL


def _check_name(given: object) -> None:
    if not isinstance(given, str | Path) or not str(given) or "\0" in str(given):
        raise ConfigError(f"model is {given!r:.60}; expected a registered name, a local folder or a hub id")
