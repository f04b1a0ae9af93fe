"""LangChain: a chat model, a retriever and an agent middleware over one memory.

Each class is imported when it is first named: the middleware needs ``langchain``, the others only
``langchain-core``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from msa_memory.errors import MissingExtraError

if TYPE_CHECKING:
    from msa_memory.integrations.langchain.chat_model import ChatMSA
    from msa_memory.integrations.langchain.middleware import MSAMemoryMiddleware
    from msa_memory.integrations.langchain.retriever import MSARetriever

__all__ = ["ChatMSA", "MSAMemoryMiddleware", "MSARetriever"]


_MODULES = {"ChatMSA": "chat_model", "MSAMemoryMiddleware": "middleware", "MSARetriever": "retriever"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        extra = "agents" if name == "MSAMemoryMiddleware" else "langchain"
        raise MissingExtraError(f"{name} needs {error.name}: pip install 'msa-memory[{extra}]'") from error


def __dir__() -> list[str]:
    return __all__
