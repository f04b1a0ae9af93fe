"""The order of a write: lock, states, fsync, SQL commit, acknowledgement, erasure of what was removed.

A crash at any point leaves the bank as before, as after, or with something the next write finishes: an
uncommitted tail of a segment to cut, removed bytes to overwrite. Knows no document's content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from sqlalchemy import Connection

from msa_memory.errors import ConfigError, LockedError, MSAError, StorageError
from msa_memory.persistence.blocks import pack
from msa_memory.persistence.catalog import Catalog
from msa_memory.persistence.database import Scrubbed
from msa_memory.persistence.opening import OpenBank, check_commits
from msa_memory.persistence.records import NewDocument, PassageRecord
from msa_memory.persistence.segments import Placed, next_name

__all__ = ["Sizes", "Writer"]

Sizes = Mapping[str, int]

_COMPACT_BELOW = 0.75  # a segment is rewritten when less than this share of it is alive


class Writer:
    """Writes to one open bank. Everything but ``held`` is called inside ``with writer.held()``."""

    def __init__(self, bank: OpenBank, catalog: Catalog) -> None:
        self._bank_id = bank.identity.bank_id
        self._identity = bank.identity
        self._database, self._segments = bank.database, bank.segments
        self._lock, self._counter = bank.lock, bank.counter
        self._catalog = catalog

    @contextmanager
    def held(self) -> Iterator[Sizes]:
        """Hold the writer lock on a bank that lost nothing and has no unfinished write.

        Yields the committed size of every segment. If the block fails, states it appended are cut off again.
        """
        with self._lock.held():
            with self.checked_reading() as connection:
                unfinished = self._catalog.has_erasures(connection)
                sizes = self._catalog.segment_sizes(connection)
            if unfinished:
                self.erase()
            self._segments.cut(sizes)
            try:
                yield sizes
            except BaseException:
                with suppress(MSAError):
                    self._cut()
                raise

    @contextmanager
    def checked_reading(self) -> Iterator[Connection]:
        """A reading transaction on a catalog that holds every acknowledged commit."""
        acknowledged = None if self._counter is None else self._counter.read()
        with self._database.reading() as connection:
            if self._counter is not None:
                check_commits(acknowledged, self._catalog.generation(connection), self._identity)
            yield connection

    @contextmanager
    def commit(self) -> Iterator[tuple[Connection, int]]:
        """One SQL transaction, then its acknowledgement; yields the new generation too."""
        with self._database.writing() as connection:
            generation = self._catalog.advance(connection)
            yield connection, generation
        if self._counter is not None:
            self._counter.write(self._bank_id, generation)

    def append(
        self, documents: Sequence[NewDocument], sizes: Sizes, fingerprint: str | None
    ) -> dict[int, Placed]:
        """Append the states of all passages; where each number's lie once ``commit`` is through."""
        passages = [passage for document in documents for passage in document.passages]
        numbers = [passage.number for passage in passages]
        if len(set(numbers)) < len(numbers):
            raise ConfigError(f"passage numbers {numbers[:5]}... repeat; take each from reserve_numbers once")
        if not passages:
            return {}
        if fingerprint is None:
            raise ConfigError("the bank has no model recorded yet; call bind_model before adding documents")
        blocks = (
            pack(passage.states, bank_id=self._bank_id, number=passage.number, fingerprint=fingerprint)
            for passage in passages
        )
        return dict(zip(numbers, self._segments.append(blocks, sizes), strict=True))

    def erase(self) -> Scrubbed:
        """Overwrite what removals left. What fails is not lost: the next write tries again."""
        try:
            return self._erase()
        except (StorageError, LockedError) as error:
            return Scrubbed(done=False, left=(f"bytes of what was removed, until the next write: {error}",))

    def _erase(self) -> Scrubbed:
        with self._database.reading() as connection:
            pending = self._catalog.pending_erasures(connection)
        if not pending:
            return Scrubbed(done=True, left=())
        self._segments.erase(span for _, span in pending if span is not None)
        whole = any(span is None for _, span in pending)  # a replaced document keeps its text as a version
        scrubbed = self._database.scrub() if whole else Scrubbed(done=True, left=())
        if scrubbed.done:
            with self._database.writing() as connection:
                self._catalog.finish_erasures(connection, pending[-1][0])
        return scrubbed

    def rewrite_segments(self, sizes: Sizes, block: Callable[[PassageRecord], bytes]) -> None:
        """Move the blocks that are still alive out of sparse segments, and delete those."""
        with self._database.reading() as connection:
            live = self._catalog.live_bytes(connection)
            sparse = [name for name, size in sizes.items() if live.get(name, 0) < size * _COMPACT_BELOW]
            records = self._catalog.records_in(connection, sparse)
        if not sparse:
            return
        places = self._segments.append(map(block, records), sizes, fresh=True)
        with self.commit() as (connection, _):
            self._catalog.grow_segments(connection, sizes, places)
            for record, place in zip(records, places, strict=True):
                self._catalog.move(connection, record.number, place)
            self._catalog.drop_segments(connection, sparse)
            if not places:  # keep a newest segment, because names are never used twice
                self._catalog.add_segment(connection, next_name(sizes))
        self._segments.remove(sparse)

    def _cut(self) -> None:
        with self._database.reading() as connection:
            sizes = self._catalog.segment_sizes(connection)
        self._segments.cut(sizes)
