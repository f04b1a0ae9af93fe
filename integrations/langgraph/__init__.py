"""LangGraph: a store that keeps a graph's long-term memory in one namespace of a memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msa_memory.errors import MissingExtraError

if TYPE_CHECKING:
    from msa_memory.integrations.langgraph.store import MSAStore

__all__ = ["MSAStore"]


def __getattr__(name: str) -> Any:
    if name != "MSAStore":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from msa_memory.integrations.langgraph.store import MSAStore
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{name} needs {error.name}: pip install 'msa-memory[langgraph]'") from error
    return MSAStore


def __dir__() -> list[str]:
    return __all__
