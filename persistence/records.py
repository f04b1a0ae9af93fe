"""The values that cross between the memory and its storage.

They know nothing of SQL or models. What people see of a document is ``msa_memory.types.Document``;
these are the parts only the memory and its bank exchange. Passage numbers are unique in a bank and never
given out twice.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from msa_memory.persistence.sheets import SheetPages
from msa_memory.types import TensorBytes

__all__ = [
    "BankIdentity",
    "Changes",
    "Event",
    "Loaded",
    "NewDocument",
    "NewPassage",
    "OldVersion",
    "PassageRecord",
    "PassageText",
    "Repair",
    "StagedStates",
]


@dataclass(frozen=True, slots=True)
class StagedStates:
    """The states of one passage, packed and set aside on disk by ``Store.stage`` until their document."""

    number: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPassage:
    """One encoded passage on its way in; ``number`` comes from ``Store.reserve_numbers``."""

    start: int
    """First character in the document's text."""
    end: int
    """One past the last character."""
    tokens: int
    number: int
    states: Mapping[str, TensorBytes] | StagedStates
    header: str = ""
    """What the model read before the passage (title, date, speaker)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDocument:
    """A validated document with its encoded passages, in reading order."""

    id: str
    namespace: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    timestamp: datetime | None = None
    """None means the moment of adding. A datetime without zone is UTC."""
    expires_at: datetime | None = None
    source: str | None = None
    trust: str | None = None
    passages: Sequence[NewPassage] = ()


@dataclass(frozen=True, slots=True)
class PassageRecord:
    """Where a passage comes from and where its states lie."""

    number: int
    namespace: str
    document_id: str
    ordinal: int
    """Position among the passages of its document, from 0."""
    start: int
    end: int
    tokens: int
    segment: str
    """File name inside the ``states`` folder."""
    offset: int
    """Bytes from the start of the segment, a multiple of 8."""
    length: int
    """Bytes."""
    checksum: int
    """CRC-32 of the block's ``length`` bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageText:
    """A passage as evidence: its text and what is known about its document."""

    record: PassageRecord
    text: str
    header: str
    document_text: str
    metadata: dict[str, Any]
    timestamp: datetime
    version: int
    expires_at: datetime | None
    source: str | None
    trust: str | None


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened to a bank's passages after some generation, up to ``generation``.

    Apply ``removed`` after ``added``: a passage that came and went in between may be in both. Where it is
    ``complete``, ``added`` is all there is: what else was known before is gone. Where ``grew``, every commit
    in between brought passages and took none away, so whatever was read before still stands.
    """

    generation: int
    added: tuple[PassageRecord, ...]
    removed: tuple[int, ...]
    complete: bool = False
    grew: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """All passages of a bank at ``generation``: those of sheets, whose states can wait, and the others."""

    generation: int
    records: MutableMapping[int, PassageRecord]
    """Of all of them, by number."""
    sheets: tuple[SheetPages, ...]
    others: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BankIdentity:
    """Which bank this is and which model wrote its states (None until the first one is bound)."""

    bank_id: str
    format_version: int
    model: str | None
    fingerprint: str | None
    model_info: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class OldVersion:
    """What a version of a document said, for ``restore``; its states are gone and have to be made anew."""

    namespace: str
    id: str
    version: int
    text: str
    metadata: dict[str, Any]
    timestamp: datetime
    created_at: datetime
    """When this version was written."""
    expires_at: datetime | None
    source: str | None
    trust: str | None


@dataclass(frozen=True, slots=True)
class Event:
    """One change of a bank: who, when, where and of which kind. Holds no text and no id."""

    generation: int
    """The commit it belongs to."""
    time: datetime
    actor: str
    """Host and process id."""
    namespace: str | None
    """None for the whole bank, and for a namespace that was forgotten."""
    kind: str
    document: int | None
    """The first document's row number, never its id; None for a selection."""
    count: int


@dataclass(frozen=True, slots=True)
class Repair:
    """What ``Store.repair`` mended and what it could not, in sentences."""

    repaired: tuple[str, ...]
    remaining: tuple[str, ...]
