"""The order of a write: lock, states, fsync, SQL commit, acknowledgement, erasure of what was removed.

A crash at any point leaves the bank as before, as after, or with something the next write finishes: an
uncommitted tail of a segment to cut, removed bytes to overwrite. Knows no document's content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from sqlalchemy import Connection

from msa_memory.errors import ConfigError, LockedError, MSAError, StorageError
from msa_memory.persistence import passage_rows, segment_rows
from msa_memory.persistence.blocks import pack
from msa_memory.persistence.commit_counter import Acknowledged
from msa_memory.persistence.database import Scrubbed
from msa_memory.persistence.ledger import Commit, fold
from msa_memory.persistence.opening import OpenBank, check_commits
from msa_memory.persistence.records import NewDocument, NewPassage, PassageRecord, StagedStates
from msa_memory.persistence.segments import Placed, next_name
from msa_memory.persistence.spool import Spool

__all__ = ["Sizes", "Writer"]

Sizes = Mapping[str, int]
T = TypeVar("T")

_COMPACT_BELOW = 0.75  # a segment is rewritten when less than this share of it is alive


class Writer:
    """Writes to one open bank. Everything else is called inside ``held``, ``held_after`` or ``locked``."""

    def __init__(self, bank: OpenBank, spool: Spool | None) -> None:
        self._bank_id = bank.identity.bank_id
        self._identity = bank.identity
        self._database, self._segments = bank.database, bank.segments
        self._lock, self._counter = bank.lock, bank.counter
        self._spool = spool

    @contextmanager
    def held(self) -> Iterator[Sizes]:
        """``held_after`` without a look; yields the sizes."""
        with self.held_after(lambda connection: None) as (sizes, _):
            yield sizes

    @contextmanager
    def held_after(self, look: Callable[[Connection], T]) -> Iterator[tuple[Sizes, T]]:
        """Hold the writer lock on a bank that lost nothing and has no unfinished write.

        Yields the committed size of every segment, and what ``look`` found in the transaction that checked
        the bank. If the block fails, states it appended are cut off again.
        """
        with self._lock.held():
            with self.checked_reading() as connection:
                unfinished = segment_rows.has_pending(connection)
                sizes = segment_rows.sizes(connection)
                found = look(connection)
            if unfinished:
                self.erase()
            self._segments.cut(sizes)
            try:
                yield sizes, found
            except BaseException:
                with suppress(MSAError):
                    self._cut()
                raise

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the writer lock on a bank in whatever state it is."""
        with self._lock.held():
            yield

    @contextmanager
    def checked_reading(self) -> Iterator[Connection]:
        """A reading transaction on a catalog that holds every acknowledged commit."""
        acknowledged = None if self._counter is None else self._counter.read()
        with self._database.reading() as connection:
            if self._counter is not None:
                check_commits(acknowledged, connection, self._identity)
            yield connection

    @contextmanager
    def commit(self) -> Iterator[Commit]:
        """One SQL transaction with its link of the chain, then its acknowledgement."""
        with self._database.writing() as connection:
            commit = Commit.begin(connection)
            yield commit
            commit.close()
        if self._counter is not None:
            self._counter.write(Acknowledged(self._bank_id, commit.generation, commit.digest))

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
        blocks = (self._block(passage, fingerprint) for passage in passages)
        return dict(zip(numbers, self._segments.append(blocks, sizes), strict=True))

    def append_blocks(self, blocks: Iterable[bytes], sizes: Sizes) -> list[Placed]:
        """Append finished blocks."""
        return self._segments.append(blocks, sizes)

    def _block(self, passage: NewPassage, fingerprint: str) -> bytes:
        if not isinstance(passage.states, StagedStates):
            return pack(passage.states, bank_id=self._bank_id, number=passage.number, fingerprint=fingerprint)
        if passage.states.number != passage.number:
            raise ConfigError(
                f"passage {passage.number} was given the staged states of passage {passage.states.number}"
            )
        if self._spool is None:
            raise ConfigError("a bank in memory has no staged states; give the ones that stage returned")
        return self._spool.read(passage.states)

    def drop_staged(self, documents: Iterable[NewDocument]) -> None:
        """Let go of staged states that are stored now."""
        if self._spool is None:
            return
        for document in documents:
            for passage in document.passages:
                if isinstance(passage.states, StagedStates):
                    self._spool.drop(passage.states)

    def erase(self, *, compacting: bool = False) -> Scrubbed:
        """Overwrite what removals left. What fails is not lost: the next write tries again."""
        try:
            return self._erase(compacting)
        except (StorageError, LockedError) as error:
            return Scrubbed((f"bytes of what was removed, until the next write: {error}",))

    def _erase(self, compacting: bool) -> Scrubbed:
        with self._database.reading() as connection:
            pending = segment_rows.pending(connection, compacting=compacting)
        if pending is not None:
            self._segments.erase(pending.spans)
        scrubbed = Scrubbed()
        if compacting or (pending is not None and pending.rows):  # replaced text stays, as a version
            scrubbed = self._database.scrub(compacting=compacting)
        if pending is not None and (scrubbed.until_compact or not scrubbed.left):
            with self._database.writing() as connection:
                strike = segment_rows.put_off if scrubbed.until_compact else segment_rows.finish
                strike(connection, pending)
        return scrubbed

    def rewrite_segments(self, sizes: Sizes, block: Callable[[PassageRecord], bytes]) -> None:
        """Move the blocks that are still alive out of sparse segments, and delete those."""
        with self._database.reading() as connection:
            live = segment_rows.live_bytes(connection)
            kept = segment_rows.with_reencoded(connection)
            sparse = [
                name
                for name, size in sizes.items()
                if name not in kept and live.get(name, 0) < size * _COMPACT_BELOW
            ]
            records = passage_rows.records_in(connection, sparse)
        places = self._segments.append(map(block, records), sizes, fresh=True) if records else []
        with self.commit() as commit:
            segment_rows.grow(commit.connection, sizes, places)
            for record, place in zip(records, places, strict=True):
                segment_rows.move(commit.connection, record.number, place)
            segment_rows.drop_segments(commit.connection, sparse)
            if sparse and len(sparse) == len(sizes) and not places:  # names are never used twice
                segment_rows.add_segment(commit.connection, next_name(sizes))
            fold(commit)
            passage_rows.drop_tombstones(commit.connection)
            commit.note("compact", None, count=len(sparse))
        self._segments.remove(sparse)

    def _cut(self) -> None:
        with self._database.reading() as connection:
            sizes = segment_rows.sizes(connection)
        self._segments.cut(sizes)
