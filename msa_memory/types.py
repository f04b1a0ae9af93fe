"""The values that cross the public API, and the one value that crosses between engine and storage.

Knows nothing of models or databases. Public values are frozen pydantic models; ``TensorBytes`` is how
the engine's states reach the storage without either knowing the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Answer",
    "AnswerChunk",
    "ChatMessage",
    "Context",
    "Document",
    "DocumentVersion",
    "Explanation",
    "ExportReceipt",
    "ForgetReceipt",
    "ImportReceipt",
    "LayerExplanation",
    "Message",
    "Page",
    "ReencodeReceipt",
    "Round",
    "Source",
    "Stats",
    "TensorBytes",
    "Timings",
    "Usage",
]

Metadata = Mapping[str, Any]
T = TypeVar("T")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Document(_Frozen):
    """What the user added, at its current version."""

    id: str
    namespace: str
    text: str
    metadata: dict[str, Any] = Field(default_factory=dict)
    version: int = 1
    timestamp: datetime
    """When the remembered thing was said or happened (UTC); the time of adding unless given."""
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None = None
    source: str | None = None
    trust: str | None = None
    passages: int
    tokens: int


class DocumentVersion(_Frozen):
    """One earlier or current version of a document."""

    id: str
    version: int
    text: str
    metadata: dict[str, Any] = Field(default_factory=dict)
    created_at: datetime
    current: bool


class Source(_Frozen):
    """A piece of evidence: where it comes from, what it says and how well it matched."""

    id: str
    passage: int
    """Passage number, unique in the bank and never reused."""
    start: int
    """First character of ``text`` in the document."""
    end: int
    text: str
    score: float
    """Relevance, -1..1, higher is nearer: the mean cosine over the router layers, joined with the lexical
    score by the model's weight."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    timestamp: datetime
    cited: bool = False


class Usage(_Frozen):
    """Tokens the model read and wrote."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Timings(_Frozen):
    """Seconds spent per stage of a query."""

    route_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0


class Round(_Frozen):
    """One round of retrieval: the documents it brought in."""

    number: int
    documents: tuple[str, ...]


class ChatMessage(_Frozen):
    """One message of a conversation that a memory is asked to continue."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    name: str | None = None
    """Who speaks, where several people share a role."""


class Answer(_Frozen):
    """The model's answer with its evidence."""

    text: str
    found: bool
    """False when nothing in the memory answers: the text then says so, or in a chat is the model's own."""
    finish_reason: Literal["stop", "length"] = "stop"
    """``length`` where ``max_new_tokens`` cut the answer off."""
    sources: tuple[Source, ...] = ()
    usage: Usage = Usage()
    rounds: tuple[Round, ...] = ()
    timings: Timings = Timings()
    dropped: tuple[Source, ...] = ()
    """Evidence that was chosen but did not fit ``max_evidence_tokens``."""

    def __str__(self) -> str:
        return self.text


class AnswerChunk(_Frozen):
    """A piece of a streamed answer; only the last one carries ``answer``."""

    text: str
    answer: Answer | None = None


class Context(_Frozen):
    """A citable block of recalled text for any language model."""

    text: str
    sources: tuple[Source, ...] = ()


class LayerExplanation(_Frozen):
    """How one router layer judged the visible passages, best first."""

    layer: int
    passages: tuple[int, ...]
    documents: tuple[str, ...]
    scores: tuple[float, ...]


class Explanation(_Frozen):
    """Scores and choices of every router layer for one question."""

    question: str
    layers: tuple[LayerExplanation, ...]
    sources: tuple[Source, ...]


class ForgetReceipt(_Frozen):
    """What was forgotten, when it was masked and when it was erased."""

    ids: tuple[str, ...]
    counts: dict[str, int]
    """Rows removed by kind: documents, versions, passages, messages."""
    bytes_erased: int
    masked_at: datetime | None
    erased_at: datetime | None
    beyond_reach: tuple[str, ...] = ()
    dry_run: bool = False


class Message(_Frozen):
    """One message of a session, as it was said."""

    session: str
    namespace: str
    position: int
    """Its place in the session, from 0; a forgotten message leaves a gap."""
    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    name: str | None = None
    """Who spoke, where the role does not say it."""
    content: str
    timestamp: datetime
    key: str | None = None
    """What makes appending it a second time do nothing."""
    document_id: str | None = None
    """The memory document that holds it; None for system messages."""


class ExportReceipt(_Frozen):
    """What one bundle file holds."""

    path: str
    namespace: str
    size_bytes: int
    sha256: str
    """Of the whole file."""
    documents: int
    versions: int
    """Earlier versions, beside the current ones."""
    passages: int
    messages: int
    without_states: tuple[str, ...] = ()
    """Documents whose states are damaged: their text is in the bundle, an import encodes it again."""


class ImportReceipt(_Frozen):
    """What an import did with the bundle's documents and messages."""

    namespace: str
    added: int
    replaced: int
    unchanged: int
    """There already, saying the same."""
    skipped: int
    """Their id is taken by something else, which was kept."""
    encoded: int
    """Documents the model had to read again; 0 with the bundle's own model."""
    messages: int
    """Session messages stored."""


class ReencodeReceipt(_Frozen):
    """How a bank was moved to another model."""

    model: str
    fingerprint: str
    documents: int
    """Documents of the bank; 0 if it was this model's already."""
    encoded: int
    """Documents read by this call; the others were read before it was interrupted."""


class Stats(_Frozen):
    """Sizes of a bank, as seen from one namespace."""

    namespace: str
    documents: int
    passages: int
    tokens: int
    namespaces: int
    catalog_bytes: int
    state_bytes: int
    model: str | None
    fingerprint: str | None
    format_version: int


class Page(_Frozen, Generic[T]):
    """One page of a listing; iterate it, or read ``items`` and ``next_cursor``."""

    items: tuple[T, ...]
    next_cursor: str | None = None

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """A tensor as plain bytes: dtype in safetensors' spelling, shape, little-endian row-major data."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview
