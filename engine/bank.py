"""The living bank: routing keys of every passage, resident in fixed blocks or mapped in sheets.

On a CPU with integer products, blocks that are full have a second, 8-bit copy of their keys (``quantized``);
of passages in a sheet (``sheets``) nothing but that copy is at hand, mapped from a file for the most part. A
bank told to be ``exact`` never looks at it. How a question sees all that is ``bank_view``'s business.

Knows passage numbers, routing keys and how to fetch a passage's K/V; not texts, documents or SQL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine.bank_view import BankView, BlockView, Numbers, SheetView, visibility
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.exact_keys import ExactKeys, Fetch
from msa_memory.engine.lexical import LexicalIndex
from msa_memory.engine.quantized import QuantizedKeys, usable
from msa_memory.engine.sheets import Pages, Sheet
from msa_memory.errors import CheckpointError

__all__ = ["MemoryBank"]

BLOCK_CHUNKS = 4096
SKIM_SHARES = (1 / 5, 1 / 3, 1 / 2)
"""Shares of the router layers that a skim has looked at by its cuts. On 13,359 passages of real text (default
model) it chose for each of 124 questions the 16 that are best by the exact mean over all layers."""
SKIM_LEAST_LAYERS = 4
SKIM_FROM = 131_072
"""Chunks from which on a skim pays, where nobody decides otherwise."""


@dataclass(slots=True)
class _Block:
    """A fixed number of chunk rows per layer; passages are contiguous and never straddle blocks."""

    keys: Tensor  # [L, capacity, G, D]
    numbers: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    used: int = 0
    quantized: dict[int, QuantizedKeys] = field(default_factory=dict)
    """By layer slot, made while the block is full; a changed block starts with none."""

    def fits(self, chunks: int) -> bool:
        return self.used + chunks <= self.keys.shape[1]

    def append(self, number: int, router_keys: Tensor) -> None:
        chunks = router_keys.shape[1]
        self.keys[:, self.used : self.used + chunks] = router_keys
        self.numbers.append(number)
        self.lengths.append(chunks)
        self.used += chunks
        self.quantized = {}  # of a block that was full once, before later ones went


@dataclass(slots=True)
class _Shelf:
    """A sheet and which of its passages are still there; a removal makes a new mask."""

    sheet: Sheet
    live: NDArray[np.bool_]

    def remaining(self) -> list[int]:
        numbers: list[int] = self.sheet.numbers[self.live].tolist()
        return numbers


class MemoryBank:
    """Routing keys of all passages in memory, by passage number.

    Not thread-safe: one owner adds and removes; views may be read anywhere. ``fetch`` gives a passage's
    full states when a router layer has chosen it. ``exact``: every score comes from the keys as they are.
    ``skim_from``: chunks from which on questions ``skim``; None, the default, never. ``skim_layers``: which
    router layers it scores, by their numbers in the model; empty leaves it to this module.
    """

    skim_from: int | None = None
    skim_layers: Sequence[int] = ()

    def __init__(
        self, msa: MSAConfig, fetch: Fetch, *, device: torch.device | str = "cpu", exact: bool = False
    ) -> None:
        self.msa = msa
        self.exact = exact
        self.fetch = fetch
        self.device = torch.device(device)
        self._exact_keys = ExactKeys(fetch)
        self.lexical = LexicalIndex(self._exact_keys.terms)
        self._blocks: list[_Block] = []
        self._shelves: list[_Shelf] = []
        self._home: dict[int, _Block | _Shelf] = {}

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, number: int) -> bool:
        return number in self._home

    @property
    def numbers(self) -> tuple[int, ...]:
        """Passage numbers held, ascending."""
        return tuple(sorted(self._home))

    def add(self, number: int, router_keys: Tensor, terms: Tensor | None = None) -> None:
        """Hold a passage's router keys ``[L, R, G, D]`` and terms ``[terms, 2]`` under its number."""
        block = self._room_for(router_keys)
        block.append(number, router_keys)
        self._home[number] = block
        if terms is not None:
            self.lexical.add(number, terms)

    @property
    def takes_sheets(self) -> bool:
        """Whether ``add_sheet`` is of use: where 8-bit keys are scored first."""
        return self._quantizes()

    @property
    def loose_numbers(self) -> list[int]:
        """Passages that are held one by one, in no sheet."""
        return [number for block in self._blocks for number in block.numbers]

    @property
    def loose_chunks(self) -> int:
        """Chunks of those."""
        return sum(block.used for block in self._blocks)

    def add_sheet(self, pages: Pages, shape: tuple[int, int, int]) -> None:
        """Hold the passages of a sheet, of router layers, heads and their width as in ``shape``.

        Passages that were added one by one move there; none may lie in another sheet. StateDamagedError, and
        nothing changes, if its sections do not fit.
        """
        sheet = Sheet(pages, shape)
        numbers = sheet.numbers.tolist()
        self.remove(number for number in numbers if number in self._home)
        shelf = _Shelf(sheet, np.ones(len(numbers), dtype=bool))
        self._shelves.append(shelf)
        self._home.update(dict.fromkeys(numbers, shelf))
        self.lexical.add_sheet(sheet)

    def take_spoiled(self) -> tuple[list[int], list[int]]:
        """Let go of sheets that were erased meanwhile, and of damaged ones; the passages they still held.

        Erasing one passage of a sheet takes the whole sheet along: bring the others anew.
        """
        left: tuple[list[int], list[int]] = [], []
        for shelf in list(self._shelves):
            erased = not shelf.sheet.pages.intact()
            if erased or shelf.sheet.damaged:
                self._let_go(shelf)
                for number in shelf.remaining():
                    del self._home[number]
                    left[0 if erased else 1].append(number)
        return left

    def remove(self, numbers: Iterable[int]) -> None:
        """Stop holding these passages; unknown numbers are ignored. Their rows are zeroed.

        Those of a sheet in a file are the file owner's to erase; a sheet in memory is let go of as a whole.
        """
        held = {number: self._home.pop(number) for number in numbers if number in self._home}
        self._exact_keys.drop(held)
        blocks: dict[int, tuple[_Block, set[int]]] = {}
        shelves: dict[int, tuple[_Shelf, set[int]]] = {}
        for number, home in held.items():
            if isinstance(home, _Shelf):
                shelves.setdefault(id(home), (home, set()))[1].add(number)
            else:
                blocks.setdefault(id(home), (home, set()))[1].add(number)
        for block, gone in blocks.values():
            self._rebuild(block, gone)
            self.lexical.remove(gone)
        self._blocks = [block for block in self._blocks if block.numbers]
        for shelf, gone in shelves.values():
            shelf.live = shelf.live & ~np.isin(shelf.sheet.numbers, list(gone))
            shelf.sheet.pages.close()
            if not shelf.live.any():
                self._let_go(shelf)

    def _let_go(self, shelf: _Shelf) -> None:
        self._shelves = [held for held in self._shelves if held is not shelf]
        self.lexical.remove_sheet(shelf.sheet)

    def view(self, visible: Numbers | None = None) -> BankView:
        """A snapshot in which only ``visible`` passage numbers (all when None) can be chosen."""
        homes: list[_Shelf | _Block] = [*self._shelves, *self._blocks]
        parts = [
            home.sheet.numbers if isinstance(home, _Shelf) else np.array(home.numbers, dtype=np.int64)
            for home in homes
        ]
        views: list[BlockView | SheetView] = []
        quantizes = self._quantizes()
        for home, numbers, mask in zip(homes, parts, visibility(parts, visible), strict=True):
            if isinstance(home, _Shelf):
                mask &= home.live
            if not mask.any():
                continue
            if isinstance(home, _Shelf):
                sheet = home.sheet
                views.append(SheetView(sheet, torch.from_numpy(sheet.lengths), sheet.used, numbers, mask))
            else:
                lengths = torch.tensor(home.lengths, device=self.device)
                edges = np.cumsum([0, *home.lengths])
                full = quantizes and home is not self._blocks[-1]
                copies = home.quantized
                views.append(BlockView(home.keys, lengths, home.used, numbers, mask, edges, copies, full))
        view = BankView(self.msa, views, self.fetch, self.lexical, self._exact_keys)
        chunks = sum(one.used for one in views)
        suited = (
            self.msa.router_normalize and not self.exact and len(self.msa.router_layers) >= SKIM_LEAST_LAYERS
        )
        view.skims = suited and self.skim_from is not None and chunks >= self.skim_from
        view.skim_order = self._skim_order()
        return view

    def _skim_order(self) -> tuple[tuple[int, ...], ...]:
        """Layers as a skim comes to them: by what they count, or from above through the whole depth."""
        layers, weights = self.msa.router_layers, self.msa.layer_weights
        if unknown := set(self.skim_layers) - set(layers):
            raise CheckpointError(
                f"skim_layers names {sorted(unknown)}, which are no router layers; they are {list(layers)}"
            )
        order = [slot for start in (3, 0, 1, 4, 2) for slot in reversed(range(start, len(layers), 5))]
        if weights:
            order.sort(key=lambda slot: -weights[slot])
        named = [layers.index(layer) for layer in self.skim_layers]
        order = [*named, *(slot for slot in order if slot not in named)]
        first = len(named) or max(1, int(SKIM_SHARES[0] * len(layers)))
        ends = [max(first, int(share * len(layers))) for share in SKIM_SHARES]
        return tuple(tuple(sorted(order[start:end])) for start, end in zip((0, *ends), ends, strict=False))

    def quantize(self) -> None:
        """Make the 8-bit copies of all full blocks now, which questions else do one block at a time."""
        for block in self.view()._blocks if self._quantizes() else ():
            if isinstance(block, BlockView) and block.full:
                for slot in range(len(block.keys)):
                    block.quantize(slot)

    def nbytes(self) -> int:
        """Bytes of resident routing keys, their 8-bit copies included; not what is mapped from files."""
        copies = [copy.nbytes for block in self._blocks for copy in block.quantized.values()]
        sheets = [shelf.sheet.pages.nbytes() for shelf in self._shelves]
        return (
            sum(block.keys.nbytes for block in self._blocks)
            + sum(copies)
            + sum(sheets)
            + self._exact_keys.nbytes
        )

    def _quantizes(self) -> bool:
        suitable = self.device.type == "cpu" and self.msa.head_reduce == "mean"
        return suitable and not self.exact and usable()

    def _room_for(self, router_keys: Tensor) -> _Block:
        layers, chunks, groups, dim = router_keys.shape
        if not self._blocks or not self._blocks[-1].fits(chunks):
            shape = (layers, max(BLOCK_CHUNKS, chunks), groups, dim)
            self._blocks.append(_Block(torch.zeros(shape, dtype=router_keys.dtype, device=self.device)))
        return self._blocks[-1]

    def _rebuild(self, block: _Block, gone: set[int]) -> None:
        """Move the survivors to fresh rows: running views keep the old tensor, the new one has no trace."""
        if len(gone) == len(block.numbers):
            block.numbers = []
            return
        kept = torch.zeros_like(block.keys)
        numbers, lengths, read, write = [], [], 0, 0
        for number, length in zip(block.numbers, block.lengths, strict=True):
            if number not in gone:
                kept[:, write : write + length] = block.keys[:, read : read + length]
                numbers.append(number)
                lengths.append(length)
                write += length
            read += length
        block.keys, block.numbers, block.lengths, block.used = kept, numbers, lengths, write
        block.quantized = {}
