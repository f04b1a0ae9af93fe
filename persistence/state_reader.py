"""Reads the states of passages, checks every block it reads, and says whose are damaged.

Knows blocks and segments; asks the catalog, through ``locate``, only when a block is not where a record
says: its passage may be gone, or moved by ``Store.compact``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import suppress

from msa_memory.errors import NotFoundError, StateDamagedError, StorageError
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
        self.identity = identity

    def read(self, record: PassageRecord) -> dict[str, TensorBytes]:
        """Tensors as views of one copy of the block, which is the caller's.

        NotFoundError if the passage is gone, StateDamagedError if its bytes are not what was written.
        """
        return self._found(record)[1]

    def block(self, record: PassageRecord) -> bytes:
        """The whole block, checked; raises as ``read`` does."""
        return self._found(record)[0]

    def raw(self, record: PassageRecord) -> bytes:
        """What there is of a block, damaged or not, filled up with zeros."""
        with suppress(NotFoundError, StateDamagedError):
            return self.block(record)
        try:
            return self._read(record)
        except BlockError:
            return bytes(record.length)

    def _found(self, record: PassageRecord) -> tuple[bytes, dict[str, TensorBytes]]:
        try:
            return self._checked(record)
        except BlockError as error:
            return self._anew(record, error)

    def _checked(self, record: PassageRecord) -> tuple[bytes, dict[str, TensorBytes]]:
        if record.checksum < 0:
            raise BlockError("its row in the catalog does not fit its stamp")
        block = self._read(record)
        checksum = zlib.crc32(block)
        if checksum != record.checksum:
            raise BlockError(f"its CRC-32 is {checksum:08x}, expected {record.checksum:08x}")
        bank = self.identity()
        stamp, tensors = unpack(memoryview(block))
        check_stamp(stamp, bank_id=bank.bank_id, number=record.number, fingerprint=bank.fingerprint)
        return block, tensors

    def _read(self, record: PassageRecord) -> bytes:
        try:
            return self._segments.read(Span(record.segment, record.offset, record.length))
        except (TypeError, ValueError, OverflowError, StorageError) as error:
            raise BlockError(f"the catalog places it wrongly: {error}") from error

    def _anew(self, record: PassageRecord, error: BlockError) -> tuple[bytes, dict[str, TensorBytes]]:
        current = self._locate(record.number)
        if current is None:
            raise NotFoundError(
                f"passage {record.number} of document {record.document_id!r} was forgotten or replaced; "
                "load the changes since"
            ) from error
        try:
            return self._checked(current)
        except BlockError as damage:
            raise StateDamagedError(
                f"the states of document {current.document_id!r} in namespace {current.namespace!r}, passage "
                f"{current.number}, are damaged: {damage} (block of {current.length} bytes at byte "
                f"{current.offset} of {current.segment!a:.64}); run verify with repair, or update the "
                "document with its own text, to encode it again"
            ) from damage
