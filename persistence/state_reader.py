"""Reads the states of passages, checks each block when it is first touched, and says whose are damaged.

Knows blocks and segments; asks the catalog, through ``locate``, only when a block is not where a record
says: its passage may be gone, or moved by ``Store.compact``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

from msa_memory.errors import NotFoundError, StateDamagedError
from msa_memory.persistence.blocks import BlockError, check_stamp, unpack
from msa_memory.persistence.records import BankIdentity, PassageRecord
from msa_memory.persistence.segments import Segments, Span
from msa_memory.types import TensorBytes

__all__ = ["StateReader"]


class StateReader:
    """``locate`` finds the current record of a passage number, ``identity`` the bank's newest identity."""

    def __init__(
        self,
        segments: Segments,
        locate: Callable[[int], PassageRecord | None],
        identity: Callable[[], BankIdentity],
    ) -> None:
        self._segments = segments
        self._locate = locate
        self._identity = identity
        self._checked: set[tuple[str, int]] = set()

    def read(self, record: PassageRecord, *, again: bool = False) -> dict[str, TensorBytes]:
        """Tensors as views of the segment; ``again`` checks a block that was checked before.

        NotFoundError if the passage is gone, StateDamagedError if its bytes are not what was written.
        """
        if again:
            self._checked.discard((record.segment, record.offset))
        try:
            return self._tensors(record)
        except BlockError as error:
            return self._tensors_anew(record, error)

    def block(self, record: PassageRecord) -> bytes:
        """A copy of the whole block, checked."""
        self.read(record, again=True)
        return bytes(self._segments.view(Span(record.segment, record.offset, record.length)))

    def _tensors(self, record: PassageRecord) -> dict[str, TensorBytes]:
        place = (record.segment, record.offset)
        block = self._segments.view(Span(record.segment, record.offset, record.length))
        if place in self._checked:
            return unpack(block)[1]
        checksum = zlib.crc32(block)
        if checksum != record.checksum:
            raise BlockError(f"its CRC-32 is {checksum:08x}, expected {record.checksum:08x}")
        stamp, tensors = unpack(block)
        bank = self._identity()
        check_stamp(stamp, bank_id=bank.bank_id, number=record.number, fingerprint=bank.fingerprint)
        self._checked.add(place)
        return tensors

    def _tensors_anew(self, record: PassageRecord, error: BlockError) -> dict[str, TensorBytes]:
        current = self._locate(record.number)
        if current is None:
            raise NotFoundError(
                f"passage {record.number} of document {record.document_id!r} was forgotten or replaced; "
                "load the changes since"
            ) from error
        try:
            return self._tensors(current)
        except BlockError as damage:
            raise StateDamagedError(
                f"the states of document {current.document_id!r} in namespace {current.namespace!r}, passage "
                f"{current.number}, are damaged: {damage} (block of {current.length} bytes at byte "
                f"{current.offset} of {current.segment}); update the document with its own text to encode "
                "it again"
            ) from damage
