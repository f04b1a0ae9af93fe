"""Keeps the engine's bank in step with the store: what any process added or forgot, at every query.

The one place where stored bytes become engine states. Used on the worker thread only. Passages that lie
together in a segment are held as sheets, which a later opening finds beside the states and reads none of.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from msa_memory.engine import bank as banks
from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.bank_view import BankView
from msa_memory.engine.engine import Engine
from msa_memory.engine.exact_keys import Fetch
from msa_memory.engine.grown_contexts import GrownContexts
from msa_memory.engine.kept_contexts import KeptContexts
from msa_memory.engine.sheets import Pages, RamPages, SheetPassage, make_sections
from msa_memory.engine.states import PassageStates, tensor_from_bytes
from msa_memory.errors import NotFoundError, StateDamagedError
from msa_memory.persistence import PassageRecord, Store

__all__ = ["LivingBank"]

logger = logging.getLogger(__name__)


class LivingBank:
    """All passages of one store, as one engine's bank holds them."""

    def __init__(self, store: Store, engine: Engine, routing: str = "auto") -> None:
        self.store = store
        self.records: MutableMapping[int, PassageRecord] = {}
        self.generation = 0
        self.contexts = KeptContexts()
        self.conversations = GrownContexts()
        self.bank = _new_bank(engine, self._fetch)
        self.bank.skim_from = {"auto": banks.SKIM_FROM, "skim": 1, "exact": None}[routing]
        self.bank.skim_layers = engine.skim_layers
        self._shelves = store.in_files and self.bank.takes_sheets
        backbone = engine.decoder.config
        self._shape = len(engine.msa.router_layers), backbone.num_kv_heads, backbone.head_dim
        self._looked_at = 0
        """Chunks that were held one by one when sheets were last made of what lies together."""

    def refresh(self) -> None:
        """Apply what happened since the last call."""
        if self.store.generation() != self.generation:
            if self.generation:
                self._follow()
            else:
                self._load()
        if self._shelves:
            self._keep_shelves()

    def _follow(self) -> None:
        """Take in what came and let go of what went."""
        changes = self.store.changes(self.generation)
        removed = set(changes.removed)
        if changes.complete:
            removed = self.records.keys() - {record.number for record in changes.added}
        for record in changes.added:
            if record.number not in removed and record.number not in self.records:
                self._add(record)
        if not changes.grew:
            self.contexts.clear()
            self.conversations.clear()
        gone = removed & self.records.keys()
        if gone:
            self.bank.remove(gone)
            for number in gone:
                del self.records[number]
        self.generation = changes.generation

    def _load(self) -> None:
        """Hold everything there is, without reading the states of what lies in sheets."""
        loaded = self.store.load()
        self.records = loaded.records
        others = set(loaded.others)
        for pages in loaded.sheets:
            if not (self._shelves and self._hold(pages)):
                others.update(pages.numbers)
        self._bring(others)
        if self._shelves:
            self._looked_at = self.bank.loose_chunks
        self.generation = loaded.generation

    def _keep_shelves(self) -> None:
        """Bring anew what lay in sheets that were erased or damaged; make more where much is held loose."""
        erased, damaged = self.bank.take_spoiled()
        if erased or damaged:
            current = self.store.records([*erased, *damaged])
            for number in (*erased, *damaged):
                del self.records[number]
            for number in erased:
                if number in current:
                    self._add(current[number])
            self.records.update({number: current[number] for number in damaged if number in current})
            self._bring(number for number in damaged if number in current)
        loose = self.bank.loose_chunks
        if loose >= self._looked_at + 2 * banks.BLOCK_CHUNKS:
            numbers = self.bank.loose_numbers
            self.records.update(self.store.records(numbers))
            self._bring(numbers)
            loose = self._looked_at = self.bank.loose_chunks
        self._looked_at = min(self._looked_at, loose)

    def _bring(self, numbers: Iterable[int]) -> None:
        """Hold passages whose records are known: as sheets where enough lie together, else one by one."""
        records = sorted((self.records[n] for n in numbers), key=lambda one: (one.segment, one.offset))
        newest = records[-1].segment if records else ""
        run: list[SheetPassage] = []
        chunks, segment = 0, ""
        for record in records:
            if record.segment != segment or chunks >= banks.BLOCK_CHUNKS:
                self._place(run, chunks, ended=record.segment != segment)
                run, chunks, segment = [], 0, record.segment
            if (passage := self._read(record)) is None:
                if record.number not in self.bank:
                    del self.records[record.number]
                continue
            run.append(passage)
            chunks += passage[1].shape[1]
        self._place(run, chunks, ended=segment != newest)

    def _place(self, run: list[SheetPassage], chunks: int, *, ended: bool) -> None:
        """Hold passages that lie together; a segment that has ended gets a smaller sheet for its rest."""
        least = banks.BLOCK_CHUNKS // 4 if ended else banks.BLOCK_CHUNKS
        if self._shelves and chunks >= least:
            sections = make_sections(run)
            kept = self.store.keep_sheet([number for number, _, _ in run], sections)
            if self._hold(kept or RamPages(sections)):
                return
        for number, keys, terms in run:
            if number not in self.bank:
                self.bank.add(number, keys, terms)

    def _hold(self, pages: Pages) -> bool:
        try:
            self.bank.add_sheet(pages, self._shape)
        except StateDamagedError as error:
            logger.warning("%s", error)
            return False
        return True

    def _add(self, record: PassageRecord) -> None:
        """Hold one passage."""
        if (passage := self._read(record)) is not None:
            self.bank.add(*passage)
            self.records[record.number] = record

    def _read(self, record: PassageRecord) -> SheetPassage | None:
        """What is held of a passage. What is damaged stays out, so that the rest can be used."""
        try:
            states = self.store.states(record)
            keys, terms = (tensor_from_bytes(states, name) for name in ("router_keys", "terms"))
        except NotFoundError:  # forgotten or replaced since: the next refresh removes it
            return None
        except StateDamagedError as error:
            logger.warning("left out of this memory until it is repaired: %s", error)
            return None
        return record.number, keys, terms

    def view(self, namespace: str, where: Mapping[str, Any] | None) -> BankView:
        """A snapshot of the passages one namespace shows through a filter."""
        self.refresh()
        return self.bank.view(self.store.visible(namespace, where))

    def _fetch(self, number: int) -> PassageStates:
        record = self.records.get(number)
        if record is None:
            raise NotFoundError(f"passage {number} was forgotten while it was being read; ask again")
        return PassageStates.from_bytes(self.store.states(record))


def _new_bank(engine: Engine, fetch: Fetch) -> MemoryBank:
    """An empty bank: spread over the ranks where this process leads some, which it then imported."""
    parallel = sys.modules.get("msa_memory.engine.parallel")
    found: MemoryBank = engine.new_bank(fetch) if parallel is None else parallel.new_bank(engine, fetch)
    return found
