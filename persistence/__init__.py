"""Where a memory is kept: a catalog in SQL and states in files. Knows no model and no torch."""

from msa_memory.persistence.records import (
    BankIdentity,
    Changes,
    NewDocument,
    NewPassage,
    PassageRecord,
    PassageText,
)
from msa_memory.persistence.store import Store

__all__ = [
    "BankIdentity",
    "Changes",
    "NewDocument",
    "NewPassage",
    "PassageRecord",
    "PassageText",
    "Store",
]
