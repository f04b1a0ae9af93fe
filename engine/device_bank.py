"""The bank of a GPU: routing keys on the device, pooled K/V in host memory, and choices that stay there.

A pass asks ``SharedRouting`` in every router layer: one kernel scores all of its questions that look at the
same state of the bank, and the choice goes straight to the tier that holds the K/V. The host learns what was
chosen when the pass is over. To everybody else this is a ``MemoryBank``; on CPU tensors the kernels' plain
references do the same. Knows passage numbers, routing keys and K/V; not texts or documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine import kernels
from msa_memory.engine.bank import BLOCK_CHUNKS, MemoryBank
from msa_memory.engine.bank_view import BankView, Numbers, Postings, Selection
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.exact_keys import Fetch
from msa_memory.engine.lexical import LexicalIndex
from msa_memory.engine.tiers import Fetching, StateTier
from msa_memory.engine.transfer import sent, sent_numbers
from msa_memory.errors import NotFoundError, StateDamagedError

if TYPE_CHECKING:
    from msa_memory.engine.kernels.routing import Routed, RoutingPlan
    from msa_memory.engine.packed_encoding import PackedStates

__all__ = ["DeviceBank", "DeviceView", "SharedRouting", "as_selection"]

Terms = Callable[[int], Tensor | None]
"""A passage's terms by its number."""
PENDING_PASSAGES = 4096
"""Added passages that wait on the host for one copy to the device, at most."""


@dataclass(slots=True)
class _Rows:
    """Routing keys ``[L, capacity, G, D]`` of some passages, one after another."""

    keys: Tensor
    numbers: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    used: int = 0

    def append(self, numbers: Sequence[int], keys: Sequence[Tensor]) -> None:
        """Take passages in by one copy; what a running view reads ends before them."""
        joined = torch.cat(list(keys), 1)
        self.keys[:, self.used : self.used + joined.shape[1]] = joined
        self.numbers += numbers
        self.lengths += [one.shape[1] for one in keys]
        self.used += joined.shape[1]

    def without(self, gone: set[int]) -> _Rows:
        """The survivors in fresh rows: running views keep the old ones, and these have no trace."""
        kept = [index for index, number in enumerate(self.numbers) if number not in gone]
        fresh = _Rows(torch.zeros_like(self.keys))
        if kept:
            parts = self.keys[:, : self.used].split(self.lengths, 1)
            fresh.append([self.numbers[index] for index in kept], [parts[index] for index in kept])
        return fresh


@dataclass(frozen=True, slots=True)
class _State:
    """A bank between two changes, as all views of that time share it; no plan where it holds nothing."""

    numbers: Numbers
    plan: RoutingPlan | None
    tier: StateTier | None


class DeviceBank(MemoryBank):
    """Passages by number, as ``MemoryBank``; ``fetch`` is asked once for the K/V of everything added.

    Args:
        device: where routing keys lie and questions run.
        room: chunks whose K/V have room from the start; beyond it the tier grows.
    """

    takes_sheets = False

    def __init__(
        self, msa: MSAConfig, fetch: Fetch, *, device: torch.device | str, room: int = BLOCK_CHUNKS
    ) -> None:
        self.msa, self.fetch, self.exact, self._room = msa, fetch, True, room
        self.device = torch.device(device)
        self.lexical = LexicalIndex()
        self._rows: list[_Rows] = []
        self._held: dict[int, _Rows | None] = {}
        self._pending: dict[int, Tensor] = {}
        self._unread: list[int] = []
        """Passages whose K/V are to be fetched before the next question, and not sooner: ``fetch`` may not
        know a passage yet while it is added."""
        self._tier: StateTier | None = None
        self._state: _State | None = None

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, number: int) -> bool:
        return number in self._held

    @property
    def numbers(self) -> tuple[int, ...]:
        """Passage numbers held, ascending."""
        return tuple(sorted(self._held))

    def add(self, number: int, router_keys: Tensor, terms: Tensor | None = None) -> None:
        """Hold a passage's router keys ``[L, R, G, D]`` and terms ``[terms, 2]`` under its number."""
        self._pending[number] = router_keys
        self._held[number] = None
        self._state = None
        if terms is not None:
            self.lexical.add(number, terms)
        if len(self._pending) >= PENDING_PASSAGES:
            self._place()

    def add_packed(self, numbers: Sequence[int], states: PackedStates, terms: Terms) -> None:
        """Hold passages that were read together (``packed_encoding``), with their K/V, in a few copies."""
        keys, values = states.keys.cpu(), states.values.cpu()
        tier = self._tier = self._tier or self._new_tier(keys)
        tier.make_room(keys.shape[1])
        tier.add_rows(numbers, states.chunks, keys, values)
        for number, rows in zip(
            numbers, states.router_keys.split(list(states.router_chunks), 1), strict=True
        ):
            self.add(number, rows, terms(number))

    def remove(self, numbers: Iterable[int]) -> None:
        """Stop holding these passages; unknown numbers are ignored. Keys and K/V are zeroed."""
        gone = {number for number in numbers if number in self._held}
        if not gone:
            return
        self._place()
        touched = {id(rows) for number in gone if (rows := self._held.pop(number)) is not None}
        for index, rows in enumerate(self._rows):
            if id(rows) in touched:
                fresh = self._rows[index] = rows.without(gone)
                self._held.update(dict.fromkeys(fresh.numbers, fresh))
        self._rows = [rows for rows in self._rows if rows.numbers]
        if self._tier is not None:
            self._tier.remove(gone)
        self.lexical.remove(gone)
        self._state = None

    def view(self, visible: Numbers | None = None) -> DeviceView:
        """A snapshot in which only ``visible`` passage numbers (all when None) can be chosen.

        Whose K/V were removed since is told apart when a question chose it: it fails as one whose passage
        was forgotten while it was read.
        """
        self._load()
        state = self._state = self._state or self._as_it_is()
        mask = np.ones(len(state.numbers), bool) if visible is None else np.isin(state.numbers, visible)
        return DeviceView(self.msa, state, mask, self.fetch, self.lexical)

    def quantize(self) -> None:
        """Nothing: keys are read as they are."""

    def nbytes(self) -> int:
        """Bytes of resident routing keys, on the device."""
        self._place()
        return sum(rows.keys.nbytes for rows in self._rows)

    def host_bytes(self) -> int:
        """Bytes of K/V in host memory."""
        self._load()
        return self._tier.nbytes() if self._tier is not None else 0

    def _as_it_is(self) -> _State:
        if not self._rows:
            return _State(np.empty(0, dtype=np.int64), None, self._tier)
        from msa_memory.engine.kernels.routing import KeyBlock, plan_routing

        blocks = [
            KeyBlock(rows.keys, tuple(rows.lengths), np.asarray(rows.numbers, dtype=np.int64))
            for rows in self._rows
        ]
        return _State(np.concatenate([block.numbers for block in blocks]), plan_routing(blocks), self._tier)

    def _place(self) -> None:
        """Bring the routing keys of what was added to the device."""
        pending, self._pending = self._pending, {}
        batch: list[int] = []
        waiting = 0
        for number, keys in pending.items():
            if not self._rows or self._rows[-1].used + waiting + keys.shape[1] > self._rows[-1].keys.shape[1]:
                self._append(batch, pending)
                batch, waiting, shape = [], 0, list(keys.shape)
                shape[1] = max(BLOCK_CHUNKS, shape[1])
                self._rows.append(_Rows(torch.zeros(shape, dtype=keys.dtype, device=self.device)))
            batch.append(number)
            waiting += keys.shape[1]
        self._append(batch, pending)
        self._unread += pending

    def _append(self, batch: list[int], pending: dict[int, Tensor]) -> None:
        if batch:
            self._rows[-1].append(batch, [pending[number] for number in batch])
            self._held.update(dict.fromkeys(batch, self._rows[-1]))

    def _load(self) -> None:
        """Hold the K/V of all passages. What cannot be read fails the question that chooses it."""
        self._place()
        numbers, self._unread = self._unread, []
        for number in numbers:
            if number not in self._held or (self._tier is not None and self._tier.chunks(number)):
                continue
            try:
                states = self.fetch(number)
            except (NotFoundError, StateDamagedError):
                continue
            tier = self._tier = self._tier or self._new_tier(states.keys.transpose(1, 2))
            tier.make_room(states.chunks)
            tier.add(number, states)

    def _new_tier(self, keys: Tensor) -> StateTier:
        """A tier for K and V like these, ``[L, C, G, D]``."""
        layers, chunks, groups, dim = keys.shape
        rows = max(self._room, chunks)
        return StateTier(layers, groups, dim, rows, dtype=keys.dtype, device=self.device)


class DeviceView(BankView):
    """What one question may see of a bank, frozen at the time it was taken."""

    def __init__(
        self,
        msa: MSAConfig,
        state: _State,
        visible: NDArray[np.bool_],
        fetch: Fetch,
        lexical: LexicalIndex,
    ) -> None:
        self.msa, self.state, self.fetch, self._lexical = msa, state, fetch, lexical
        self.numbers, self.visible = state.numbers, visible

    @cached_property
    def shown(self) -> Tensor:
        """``visible`` on the device."""
        assert self.state.plan is not None
        return sent(torch.from_numpy(self.visible), self.state.plan.numbers.device)

    def without(self, numbers: Iterable[int]) -> DeviceView:
        """The same snapshot with more passages masked."""
        masked = np.fromiter(numbers, dtype=np.int64)
        visible = self.visible & ~np.isin(self.numbers, masked)
        return DeviceView(self.msa, self.state, visible, self.fetch, self._lexical)

    def words(self, terms: Iterable[int]) -> tuple[NDArray[np.float32], Postings]:
        """What ``score_words`` goes by: words per passage of ``numbers``, and the postings of these terms."""
        return self._lexical.lengths(self.numbers), self._lexical.postings(terms)

    def score(self, slot: int, query: Tensor, *, best: int | None = None) -> NDArray[np.float32]:
        """Scores of all passages of ``numbers``, for who asks outside a pass; always exact."""
        if self.state.plan is None:
            return np.empty(0, dtype=np.float32)
        scores: NDArray[np.float32] = SharedRouting([self], [1])(slot, [query]).scores[0].cpu().numpy()
        return scores

    def settle(
        self,
        scores: NDArray[np.float32],
        queries: Sequence[Tensor],
        bonus: NDArray[np.float32] | float = 0.0,
        count: int = 0,
    ) -> NDArray[np.float32]:
        """The scores themselves, for they are exact."""
        return scores

    def gather(self, slot: int, numbers: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled keys and values ``[G, M, D]`` of all chunks of these passages, ascending by number."""
        self.check_held(numbers)
        assert self.state.tier is not None
        wanted = sent_numbers(sorted(numbers), like.device)
        chosen = self.state.tier.fetch(slot, wanted[None]).wait()
        count = sum(self.state.tier.chunks(number) for number in numbers)
        return (
            chosen.keys[0, :count].transpose(0, 1).to(like.dtype),
            chosen.values[0, :count].transpose(0, 1).to(like.dtype),
        )

    def check_held(self, numbers: Iterable[int]) -> None:
        """Raise what fetching raises for a passage whose K/V are not here: it is gone, or damaged."""
        for number in numbers:
            if self.state.tier is None or not self.state.tier.chunks(number):
                self.fetch(number)
                raise NotFoundError(f"passage {number} changed while it was being read; ask again")


class SharedRouting:
    """The routing of several questions of one pass that look at one state of a bank.

    Args:
        top_k: passages that each of them chooses.
    """

    def __init__(self, views: Sequence[DeviceView], top_k: Sequence[int]) -> None:
        self.msa, self.state = views[0].msa, views[0].state
        most = max(1, min(max(top_k), len(self.state.numbers)))
        self._top_k = most
        masks = [view.shown for view in views]
        self._visible = masks[0] if len(masks) == 1 else torch.stack(masks)
        beyond = torch.arange(most) >= torch.tensor(top_k)[:, None]
        self._beyond = sent(beyond, masks[0].device) if beyond.any() else None

    def __call__(self, slot: int, queries: Sequence[Tensor]) -> Routed:
        """Scores and choices for router queries ``[T, H, D]`` of every question on one router layer."""
        from msa_memory.engine.kernels import routing

        assert self.state.plan is not None
        fused = kernels.usable(queries[0], queries[0].shape[-1])
        route = routing.route_questions if fused else routing.route_questions_reference
        routed = route(
            self.state.plan,
            slot,
            queries,
            top_k=self._top_k,
            scale=self.msa.score_scale(queries[0].shape[-1]),
            visible=self._visible,
            query_reduce=self.msa.query_reduce,
            chunk_reduce=self.msa.chunk_reduce,
        )
        if self._beyond is None:
            return routed
        return replace(routed, numbers=routed.numbers.masked_fill(self._beyond, -1))

    def fetch(self, slot: int, numbers: Tensor) -> Fetching:
        """Start fetching K/V of choices ``[B, k]`` (-1 for none), ascending by number; nobody waits."""
        if self.state.tier is None:
            raise NotFoundError("the keys and values of no passage here could be read; ask again")
        return self.state.tier.fetch(slot, numbers.sort(1).values)


def as_selection(numbers: Sequence[float], scores: Sequence[float]) -> Selection:
    """What a kernel chose, without the places it left empty."""
    chosen = [(int(number), score) for number, score in zip(numbers, scores, strict=True) if number >= 0]
    return Selection(tuple(number for number, _ in chosen), tuple(score for _, score in chosen))
