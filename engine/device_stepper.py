"""Decoding on a GPU: running answers in slots of fixed addresses, each step of all of them one CUDA graph.

Has the role that ``stepper`` has on a CPU. An answer that starts to decode copies its cache into a free slot;
when it ends, or outgrows the slot, its new tokens go back. Who finds no slot is fed the plain way and takes
the next one that is free. Knows caches and tokens; no sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msa_memory.engine.context import Feed, advance
from msa_memory.engine.context import Sequence as Row
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.device_rows import DeviceRows
from msa_memory.engine.graphs import Replay
from msa_memory.engine.states import HeadStates
from msa_memory.engine.transfer import sent_numbers

__all__ = ["DeviceStepper", "device_stepper"]

SIZES = (1, 4, 16)
"""Slots of which a graph is made each; a step runs the least that covers those in use."""
CAPACITY = 4096
"""Tokens of a slot, the template head's included."""
MEMORY_ROOM = 1024
"""Chunks of a slot on each router layer."""
SHARE_OF_MEMORY = 0.125
"""Of the device's free memory, that all slots take at most."""


class DeviceStepper:
    """Running answers of one decoder, in slots that are made at the first step.

    Args:
        sizes: slots per graph, ascending; the last is how many there are.
        capacity, memory_room: tokens and, on each router layer, chunks of one slot.
    """

    rows_alike = False
    """Tokens fed together are those of different answers: nobody guesses ahead."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        sizes: Sequence[int] = SIZES,
        capacity: int = CAPACITY,
        memory_room: int = MEMORY_ROOM,
    ) -> None:
        self.decoder, self.sizes = decoder, tuple(sizes)
        self.capacity, self.memory_room = capacity, memory_room
        self.taken: list[Row | None] = [None] * self.sizes[-1]
        """Who is in which slot."""
        self.plain = 0
        """Tokens that were fed without a slot."""
        self._slots: DeviceRows | None = None
        self._replays: dict[int, Replay] = {}

    def step(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Feed one token each to several sequences: logits ``[1, V]`` of each.

        Positions and counts of the sequences stay as they are: whoever takes the logits moves them on.
        """
        slots = [self._slot_of(feed.sequence) for feed in feeds]
        others = [feed for slot, feed in zip(slots, feeds, strict=True) if slot is None]
        # First, for the caller undoes what a failure leaves in caches, and knows nothing of slots.
        plain = iter(self._fed_plainly(others) if others else ())
        seated = {slot: feed.ids[0] for slot, feed in zip(slots, feeds, strict=True) if slot is not None}
        found = dict(zip(seated, self._replayed(seated), strict=True)) if seated else {}
        return [next(plain) if slot is None else found[slot] for slot in slots]

    def leave(self, row: Row) -> None:
        """Bring a sequence's new tokens back into its cache and free its slot; nothing where it has none."""
        slot = self._seat(row)
        if slot is not None and self._slots is not None:
            self._slots.unload(slot, row.cache)
            self._slots.clear(slot)
            self.taken[slot] = None

    def _seat(self, row: Row) -> int | None:
        return next((slot for slot, other in enumerate(self.taken) if other is row), None)

    def _slot_of(self, row: Row) -> int | None:
        """The slot of a sequence, a free one if it has none; None where it fits nowhere."""
        slots = self._slots = self._slots or self._made()
        slot = self._seat(row)
        if slot is None and None in self.taken and slots.fits(row.cache):
            slot = self.taken.index(None)
            slots.load(slot, row.cache, row.position)
            self.taken[slot] = row
        return slot

    def _replayed(self, seated: dict[int, int]) -> Sequence[Tensor]:
        """Logits of the slots that are fed, in their order."""
        assert self._slots is not None
        size = next(size for size in self.sizes if size > max(seated))
        ids = sent_numbers([seated.get(slot, -1) for slot in range(size)], self.decoder.device)
        try:
            logits = self._replay(size)(ids)
        except Exception:
            self._slots.forget_step()
            raise
        self._slots.stepped(list(seated))
        # A copy: the next replay writes where this one did.
        kept: Sequence[Tensor] = logits[sent_numbers(list(seated), self.decoder.device)].split(1)
        for row in [self.taken[slot] for slot in seated if self._slots.held[slot] == self.capacity]:
            if row is not None:
                self.leave(row)
        return kept

    def _replay(self, size: int) -> Replay:
        assert self._slots is not None
        if size not in self._replays:
            self._replays[size] = Replay(self._slots.step, [self._slots.lengths])
        return self._replays[size]

    def _fed_plainly(self, feeds: Sequence[Feed]) -> Sequence[Tensor]:
        """The same for sequences without a slot, into their own caches."""
        logits: Sequence[Tensor] = advance(self.decoder, feeds).split(1)
        for feed in feeds:
            feed.sequence.position -= len(feed.ids)
            feed.sequence.fed_tokens -= len(feed.ids)
        self.plain += len(feeds)
        return logits

    def _made(self) -> DeviceRows:
        config, device = self.decoder.config, self.decoder.device
        head = torch.empty(
            config.num_layers,
            config.num_kv_heads,
            0,
            config.head_dim,
            dtype=self.decoder.dtype,
            device=device,
        )
        return DeviceRows(
            self.decoder,
            HeadStates(head, head),
            None,
            rows=self.sizes[-1],
            capacity=self.capacity,
            position=0,
            top_k=0,
            memory_room=self.memory_room if self.decoder.msa else 0,
        )


def device_stepper(decoder: Decoder) -> DeviceStepper | None:
    """Slots that fit the device's free memory; None where positions depend on what is fed beside."""
    if decoder.config.rope.kind == "dynamic":
        return None
    capacity = min(CAPACITY, decoder.config.max_positions)
    if decoder.device.type != "cuda":
        return DeviceStepper(decoder, capacity=capacity)
    config, free = decoder.config, torch.cuda.mem_get_info(decoder.device)[0]
    routers = len(decoder.msa.router_layers) if decoder.msa else 0
    rows = config.num_layers * capacity + routers * MEMORY_ROOM
    slot_bytes = 2 * rows * config.num_kv_heads * config.head_dim * decoder.dtype.itemsize
    most = max(1, int(free * SHARE_OF_MEMORY) // slot_bytes)
    return DeviceStepper(decoder, sizes=[size for size in SIZES if size <= most], capacity=capacity)
