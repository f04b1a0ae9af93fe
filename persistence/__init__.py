"""Where a memory is kept: a catalog in SQL and states in files. Knows no model and no torch."""

from msa_memory.persistence.bundle import Arrival, Bundles, StoredDocument, StoredMessage
from msa_memory.persistence.fork import fork_bank
from msa_memory.persistence.records import (
    BankIdentity,
    Changes,
    NewDocument,
    NewPassage,
    OldVersion,
    PassageRecord,
    PassageText,
    StagedStates,
)
from msa_memory.persistence.reencoding import Reencoding
from msa_memory.persistence.sessions import NewMessage
from msa_memory.persistence.store import Store

__all__ = [
    "Arrival",
    "BankIdentity",
    "Bundles",
    "Changes",
    "NewDocument",
    "NewMessage",
    "NewPassage",
    "OldVersion",
    "PassageRecord",
    "PassageText",
    "Reencoding",
    "StagedStates",
    "Store",
    "StoredDocument",
    "StoredMessage",
    "fork_bank",
]
