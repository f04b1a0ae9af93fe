"""Agent memory inside the model's own attention: `MemoryModel` and the values it gives back.

Importing this package is cheap: torch, the database and the engine load when a memory is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msa_memory.config import MemoryConfig
from msa_memory.errors import MSAError
from msa_memory.types import (
    Answer,
    AnswerChunk,
    ChatMessage,
    Context,
    Document,
    ForgetReceipt,
    Message,
    Page,
    Source,
    Stats,
)

if TYPE_CHECKING:
    from msa_memory.memory import MemoryModel
    from msa_memory.session import Session

__version__: str

__all__ = [
    "Answer",
    "AnswerChunk",
    "ChatMessage",
    "Context",
    "Document",
    "ForgetReceipt",
    "MSAError",
    "MemoryConfig",
    "MemoryModel",
    "Message",
    "Page",
    "Session",
    "Source",
    "Stats",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "MemoryModel":
        from msa_memory.memory import MemoryModel

        return MemoryModel
    if name == "Session":
        from msa_memory.session import Session

        return Session
    if name == "__version__":
        from importlib.metadata import version

        return version("msa-memory")
    raise AttributeError(f"module 'msa_memory' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
