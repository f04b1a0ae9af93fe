"""Routing keys and terms of many passages in one piece, in the form that routing reads: a sheet.

A sheet is a copy of what the passages' states say: 8-bit keys, the rows of one layer together, and postings
sorted by term. It is made of named sections of bytes, so that it can lie in a file and be mapped; whoever
keeps the file answers for which passages it belongs to. Knows passage numbers, not files, documents or SQL.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine.quantized import QuantizedKeys, QuantizedQuery
from msa_memory.errors import StateDamagedError

__all__ = ["Pages", "RamPages", "Sheet", "SheetPassage", "make_sections"]

logger = logging.getLogger(__name__)

_EDGE_BYTES = 64
"""Keys start and end at multiples of it."""
Numbers = NDArray[np.int64]
SheetPassage = tuple[int, Tensor, Tensor]
"""Number, routing keys ``[L, R, G, D]`` and terms ``[terms, 2]``."""


class Pages(Protocol):
    """Where the sections of a sheet lie."""

    def section(self, name: str) -> memoryview:
        """The bytes of a section; StateDamagedError if they are not what was written."""
        ...

    def intact(self) -> bool:
        """Whether nothing was erased since; asked after reading, it speaks for all that was read."""
        ...

    def close(self) -> None:
        """A passage of the sheet is gone: let go of what is held in memory."""
        ...

    def nbytes(self) -> int:
        """Bytes of memory that are this process's own."""
        ...


class RamPages:
    """Sections in memory, where no file can be written."""

    def __init__(self, sections: Mapping[str, bytes]) -> None:
        self._sections = dict(sections)

    def section(self, name: str) -> memoryview:
        if name not in self._sections:
            raise StateDamagedError(f"the sheet has no section {name!r}; its passages are read one by one")
        return memoryview(self._sections[name])

    def intact(self) -> bool:
        return bool(self._sections)

    def close(self) -> None:
        self._sections = {}

    def nbytes(self) -> int:
        return sum(map(len, self._sections.values()))


def make_sections(passages: Sequence[SheetPassage]) -> dict[str, bytes]:
    """The sections of a sheet of these passages, whose keys have one shape but for their chunks."""
    keys = torch.cat([keys for _, keys, _ in passages], 1)  # [L, C, G, D]
    layers, _, groups, dim = keys.shape
    table = [[number, keys.shape[1], int(terms[:, 1].sum())] for number, keys, terms in passages]
    sections = {
        "shape": np.array([layers, groups, dim], dtype="<i8").tobytes(),
        "passages": np.array(table, dtype="<i8").T.tobytes(),
        "terms": _postings(terms for _, _, terms in passages),
    }
    for slot in range(layers):
        sections[f"layer-{slot}"] = _layer(QuantizedKeys.of(keys[slot]))
    return sections


def _layer(keys: QuantizedKeys) -> bytes:
    levels = keys.levels.numpy().tobytes()
    scales = np.append(keys.scales.numpy(), [keys.largest_scale, keys.largest_norm]).astype("<f4")
    return levels.ljust(_padded(len(levels)), b"\0") + scales.tobytes()


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _EDGE_BYTES) * _EDGE_BYTES


def _postings(tables: Iterable[Tensor]) -> bytes:
    """Term hashes, ascending, then for each the passage's place in the sheet, then its count there."""
    parts = [np.insert(table.numpy(), 1, place, axis=1) for place, table in enumerate(tables)]
    joined = np.concatenate(parts)  # [N, 3]
    joined = joined[np.argsort(joined[:, 0], kind="stable")]
    return b"".join(
        np.minimum(column, np.iinfo(kind).max).astype(kind).tobytes()
        for column, kind in zip(joined.T, ("<u4", "<u4", "<u2"), strict=True)
    )


class Sheet:
    """A sheet as it is read. StateDamagedError where its sections do not fit each other.

    ``numbers``, ``lengths`` and ``words`` ``[P]`` are the passages' numbers, chunks and words; ``shape`` is
    router layers, heads and their width.
    """

    def __init__(self, pages: Pages, shape: tuple[int, int, int]) -> None:
        self.pages, self.shape = pages, shape
        layers, groups, dim = shape
        if np.frombuffer(pages.section("shape"), "<i8").tolist() != [layers, groups, dim]:
            raise StateDamagedError(f"the sheet is not of {layers} layers of {groups} heads of {dim}")
        table = np.frombuffer(pages.section("passages"), "<i8")
        if len(table) % 3 or not len(table):
            raise StateDamagedError("the sheet's table of passages is incomplete")
        table = table.reshape(3, -1).copy()
        self.numbers: Numbers = table[0]
        self.lengths: Numbers = table[1]
        self.words: Numbers = table[2]
        self.used = int(self.lengths.sum())
        self.damaged = False
        """Whether a section could not be read although nothing was erased."""
        self._width = groups * dim
        self._layers: list[QuantizedKeys | None] = [None] * layers
        self._terms: tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint16]] | None = None

    def score(self, slot: int, query: QuantizedQuery, out: Tensor, scale: float) -> float | None:
        """Write approximate scores to ``out`` ``[C]`` as ``QuantizedKeys`` do; returns their error.

        None where the sheet cannot be read, or was erased while it was read.
        """
        try:
            keys = self._layers[slot] or self._read_layer(slot)
        except StateDamagedError as error:
            self._note(error)
            return None
        keys.score(query, out, scale)
        return keys.error(query) * scale if self.pages.intact() else None

    def _read_layer(self, slot: int) -> QuantizedKeys:
        data = self.pages.section(f"layer-{slot}")
        size = self.used * self._width
        if len(data) != _padded(size) + 4 * (self.used + 2):
            raise StateDamagedError(f"layer {slot} of the sheet has {len(data)} bytes, too many or too few")
        levels = _tensor(data[:size], torch.int8).view(self.used, self._width)
        scales = _tensor(data[_padded(size) :], torch.float32)
        keys = QuantizedKeys(levels, scales[:-2], float(scales[-2]), float(scales[-1]))
        self._layers[slot] = keys
        return keys

    def postings(self, terms: Sequence[int]) -> dict[int, tuple[Numbers, Numbers]] | None:
        """Passage numbers and counts of those of the ascending terms that occur; None as of ``score``."""
        try:
            hashes, places, counts = self._terms or self._read_terms()
        except StateDamagedError as error:
            self._note(error)
            return None
        asked = np.array(terms, dtype=np.int64).astype(np.uint32)
        starts, ends = (np.searchsorted(hashes, asked, side).tolist() for side in ("left", "right"))
        found = {
            term: (self.numbers[places[start:end]], counts[start:end].astype(np.int64))
            for term, start, end in zip(terms, starts, ends, strict=True)
            if start < end
        }
        return found if self.pages.intact() else None

    def _note(self, error: StateDamagedError) -> None:
        if self.pages.intact() and not self.damaged:
            logger.warning("%s", error)
            self.damaged = True

    def _read_terms(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint16]]:
        data = self.pages.section("terms")
        count = len(data) // 10
        hashes, places = (np.frombuffer(data[at * count :][: 4 * count], "<u4") for at in (0, 4))
        self._terms = hashes, places, np.frombuffer(data[8 * count :][: 2 * count], "<u2")
        return self._terms


def _tensor(data: memoryview, dtype: torch.dtype) -> Tensor:
    """A tensor on bytes that nobody may write to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(data, dtype=dtype)
