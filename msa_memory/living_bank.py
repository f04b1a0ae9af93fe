"""Keeps the engine's bank in step with the store: what any process added or forgot, at every query.

The one place where stored bytes become engine states. Used on the worker thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from msa_memory.engine.bank import BankView
from msa_memory.engine.engine import Engine
from msa_memory.engine.kept_contexts import KeptContexts
from msa_memory.engine.parallel import new_bank
from msa_memory.engine.states import PassageStates, tensor_from_bytes
from msa_memory.errors import NotFoundError, StateDamagedError
from msa_memory.persistence import PassageRecord, Store

__all__ = ["LivingBank"]

logger = logging.getLogger(__name__)


class LivingBank:
    """All passages of one store, resident in one engine's bank."""

    def __init__(self, store: Store, engine: Engine) -> None:
        self.store = store
        self.records: dict[int, PassageRecord] = {}
        self.generation = 0
        self.contexts = KeptContexts()
        self.bank = new_bank(engine, self._fetch)

    def refresh(self) -> None:
        """Apply what happened since the last call."""
        if self.store.generation() == self.generation:
            return
        changes = self.store.changes(self.generation)
        removed = set(changes.removed)
        if changes.complete:
            removed = self.records.keys() - {record.number for record in changes.added}
        for record in changes.added:
            if record.number not in removed and record.number not in self.records:
                self._add(record)
        if not changes.grew:
            self.contexts.clear()
        gone = removed & self.records.keys()
        if gone:
            self.bank.remove(gone)
            for number in gone:
                del self.records[number]
        self.generation = changes.generation

    def _add(self, record: PassageRecord) -> None:
        """Hold one passage. What is damaged stays out, so that the rest of the memory can be used."""
        try:
            states = self.store.states(record)
            keys, terms = (tensor_from_bytes(states, name) for name in ("router_keys", "terms"))
        except NotFoundError:  # forgotten or replaced since: the next refresh removes it
            return
        except StateDamagedError as error:
            logger.warning("left out of this memory until it is repaired: %s", error)
            return
        self.bank.add(record.number, keys, terms)
        self.records[record.number] = record

    def view(self, namespace: str, where: Mapping[str, Any] | None) -> BankView:
        """A snapshot of the passages one namespace shows through a filter."""
        self.refresh()
        return self.bank.view(self.store.visible(namespace, where))

    def _fetch(self, number: int) -> PassageStates:
        record = self.records.get(number)
        if record is None:
            raise NotFoundError(f"passage {number} was forgotten while it was being read; ask again")
        return PassageStates.from_bytes(self.store.states(record))
