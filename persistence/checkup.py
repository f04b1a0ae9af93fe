"""Reading a whole bank once to say what is wrong with it, and mending what can be mended without a backup.

Texts are the truth that is kept; states, filter attributes, indexes and counters follow from them and can be
made again. A damaged text cannot, and stays a named error. Knows no model: the caller encodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from msa_memory.errors import CatalogDamagedError, NotFoundError, StateDamagedError
from msa_memory.persistence import audit, document_writes, passage_rows, segment_rows
from msa_memory.persistence.blocks import BlockError, pack
from msa_memory.persistence.opening import OpenBank, find_damage
from msa_memory.persistence.records import PassageRecord, PassageText, Repair
from msa_memory.persistence.sheets import SheetPlace
from msa_memory.persistence.state_reader import StateReader
from msa_memory.persistence.writer import Writer
from msa_memory.types import TensorBytes

__all__ = ["Checkup", "Encode"]

Encode = Callable[[PassageText], Mapping[str, TensorBytes]]
"""Makes the states of a passage from its number, header and text, as they were made first."""

_AT_A_TIME = 1000


class Checkup:
    """Verifies and repairs one open bank."""

    def __init__(self, bank: OpenBank, writer: Writer, states: StateReader) -> None:
        self._bank, self._writer, self._states = bank, writer, states

    def problems(self) -> Iterator[str]:
        """One sentence per problem, none when the bank is sound."""
        yield from self._counter_problems()
        try:
            with self._bank.database.reading() as connection:
                yield from list(audit.damaged_documents(connection))
            yield from (problem for _, problem in self._damaged_states())
            yield from (problem for _, problem in self._damaged_sheets())
        except CatalogDamagedError as error:  # so damaged that it cannot be read to the end
            yield str(error)
        yield from find_damage(self._bank.database)

    def repair(self, encode: Encode) -> Repair:
        """Mend indexes, filters, counters and states; sentences on what was mended and what was not."""
        before = list(dict.fromkeys(self.problems()))
        if before:
            with self._writer.locked():
                self._mend_catalog()
                self._mend_sheets()
            self._mend_states(encode)
        remaining = tuple(dict.fromkeys(self.problems()))
        return Repair(tuple(problem for problem in before if problem not in remaining), remaining)

    def _counter_problems(self) -> Iterator[str]:
        try:
            with self._writer.checked_reading():
                pass
        except CatalogDamagedError as error:
            yield str(error)
            return
        counter = self._bank.counter
        if counter is not None and (damaged := counter.damaged_slots()):
            yield f"the commit counter has {damaged} damaged slot of 2; the next write repairs it"

    def _damaged_states(self) -> Iterator[tuple[PassageRecord, str]]:
        after = -1
        while True:
            with self._bank.database.reading() as connection:
                records = passage_rows.records(connection, after, _AT_A_TIME)
            if not records:
                return
            for record in records:
                try:
                    self._states.block(record)
                except NotFoundError:
                    continue  # forgotten meanwhile
                except StateDamagedError as error:
                    yield record, str(error)
            after = records[-1].number

    def _damaged_sheets(self) -> Iterator[tuple[SheetPlace, str]]:
        """Sheets that say something else than was written, or something of passages that are gone."""
        files = self._bank.segments.sheets
        if files is None:
            return
        for place in files.places():
            try:
                pages = files.open(place)
                for name in pages.names:
                    pages.section(name)
            except (BlockError, StateDamagedError) as error:
                if not files.erased(place):
                    yield place, f"the sheet {place.name} is damaged: {error}; it can be made anew"
                continue
            with self._bank.database.reading() as connection:
                gone = set(pages.numbers) - passage_rows.rows(connection, pages.numbers).keys()
            if gone and pages.intact():
                yield place, f"the sheet {place.name} holds passages {sorted(gone)[:5]}, which are gone"

    def _mend_sheets(self) -> None:
        if (files := self._bank.segments.sheets) is not None:
            files.drop([place for place, _ in self._damaged_sheets()])

    def _mend_catalog(self) -> None:
        self._bank.database.rebuild_indexes()
        with self._writer.commit() as commit:
            commit.note("repair", None)
            audit.mend(commit, self._bank.segments.sizes())

    def _mend_states(self, encode: Encode) -> None:
        for record in [record for record, _ in self._damaged_states()]:
            with self._bank.database.reading() as connection:
                try:
                    text = passage_rows.texts(connection, [record.number]).get(record.number)
                except CatalogDamagedError:
                    continue  # its text is damaged too
            if text is not None:
                self._place(text, encode(text))

    def _place(self, text: PassageText, states: Mapping[str, TensorBytes]) -> None:
        identity = self._states.identity()
        number = text.record.number
        block = pack(states, bank_id=identity.bank_id, number=number, fingerprint=identity.fingerprint or "")
        with self._writer.held() as sizes:
            with self._bank.database.reading() as connection:
                current = passage_rows.record(connection, number)
            if current is None:
                return  # forgotten while it was encoded
            [place] = self._writer.append_blocks([block], sizes)
            with self._writer.commit() as commit:
                segment_rows.grow(commit.connection, sizes, [place])
                document_writes.place_anew(commit, number, place)
                commit.note("repair", current.namespace)
            self._writer.erase()
