"""A memory bank whose passages are spread over the ranks, seen from the leader.

Has the interface of ``MemoryBank`` and ``BankView``: a forward pass does not know that its scores come from
several processes. A question that only routes asks all ranks once, for all router layers; one that attends
to what it chooses asks once in each router layer, and the K/V of each rank's best passages come along. What
is chosen, and its scores, are exact as in a process alone; of all other passages 16 bits each come.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.bank_view import SETTLED, BankView, Numbers, Postings
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.engine import Engine
from msa_memory.engine.exact_keys import Fetch
from msa_memory.engine.parallel.cluster import Cluster, joined
from msa_memory.engine.parallel.shard import Shard
from msa_memory.engine.parallel.wire import pack, packed_bytes, unpack
from msa_memory.engine.states import PassageStates
from msa_memory.errors import ConflictError, NotFoundError

__all__ = ["ShardedBank", "ShardedView", "new_bank"]

PENDING_PASSAGES = 256
"""Held back on the leader until somebody looks, so that many go in one exchange."""
_serials = itertools.count(1)
Scores = NDArray[np.float32]
Passage = tuple[int, str, str]
"""Number, header and text."""


def new_bank(engine: Engine, fetch: Fetch) -> MemoryBank:
    """An empty bank of this model's states: spread over the ranks where this process leads some."""
    cluster = joined()
    if cluster is None:
        return engine.new_bank(fetch)
    return ShardedBank(cluster, engine.msa, fetch)


class ShardedBank(MemoryBank):
    """Passages by number over all ranks. Leader only; not thread-safe, as ``MemoryBank``.

    Args:
        fetch: gives the states of passages added with ``add``, whose K/V stay with the caller. None: all
            passages come through ``encode``, and the ranks that encode them hold them.
    """

    takes_sheets = False

    def __init__(self, cluster: Cluster, msa: MSAConfig, fetch: Fetch | None = None) -> None:
        self.cluster, self.msa, self.number = cluster, msa, next(_serials)
        self.fetch = fetch or self._fetch
        self.on_ranks = fetch is None
        self.largest = 0
        """Bytes of K and V of the largest passage on one layer, where the ranks hold them."""
        self.version = 0
        """Counts changes."""
        self._held: set[int] = set()
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._last: tuple[Numbers | None, ShardedView] | None = None
        if not cluster.attached:
            cluster.attach(Shard(cluster))
        self.ask("open", msa=asdict(msa))
        weakref.finalize(self, cluster.dropped.append, (self.number, None))

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, number: int) -> bool:
        return number in self._held

    @property
    def numbers(self) -> tuple[int, ...]:
        """Passage numbers held, ascending."""
        return tuple(sorted(self._held))

    def add(self, number: int, router_keys: Tensor, terms: Tensor | None = None) -> None:
        """Hold a passage's router keys ``[L, R, G, D]`` and terms ``[terms, 2]`` on the rank that owns it."""
        none = torch.empty(0, 2, dtype=torch.int64)
        self._pending[number] = (router_keys, none if terms is None else terms)
        self._held.add(number)
        self._changed()
        if len(self._pending) >= PENDING_PASSAGES:
            self._flush()

    def encode(self, passages: Iterable[Passage], *, replacing: Iterable[int] = ()) -> None:
        """Let the ranks read passages of their own and hold them, in the place of some others.

        Nothing changes unless every rank could read its share.
        """
        told = [(number, header, text) for number, header, text in passages]
        gone = [number for number in replacing if number in self._held]
        taken = {number for number, _, _ in told} & self._held - set(gone)
        if taken:
            raise ConflictError(f"passages {sorted(taken)} are held already; name them in replacing")
        batch = next(_serials)
        replies = self.ask("stage", passages=told, batch=batch)
        self.ask("commit", remove=gone, batch=batch)
        self.largest = max(self.largest, *(int(unpack(reply)[0]) for reply in replies))
        self._held.difference_update(gone)
        self._held.update(number for number, _, _ in told)
        self._changed()

    def remove(self, numbers: Iterable[int]) -> None:
        """Stop holding these passages; unknown numbers are ignored."""
        self._flush()
        gone = [number for number in numbers if number in self._held]
        if gone:
            self.ask("commit", remove=gone, batch=0)
            self._held.difference_update(gone)
            self._changed()

    def view(self, visible: Numbers | None = None) -> ShardedView:
        """A snapshot in which only ``visible`` passage numbers (all when None) can be chosen.

        Asked twice for the same array with no change between, it is the same snapshot.
        """
        self._flush()
        if self._last is not None and self._last[0] is visible:
            return self._last[1]
        number = next(_serials)
        skim_from = None if self.skim_from is None else -(-self.skim_from // self.cluster.size)
        shown = None if visible is None else torch.from_numpy(visible.astype(np.int64))
        skim: dict[str, Any] = {"skim_from": skim_from, "skim_layers": list(self.skim_layers)}
        parts = [unpack(reply) for reply in self.ask("view", shown, view=number, **skim)]
        view = ShardedView(self, number, [n.numpy() for n, _ in parts], [v.numpy() for _, v in parts])
        self._last = (visible, view)
        return view

    def nbytes(self) -> int:
        """Bytes of resident routing keys, on all ranks together."""
        self._flush()
        return sum(int(unpack(reply)[0]) for reply in self.ask("size"))

    def ask(self, op: str, payload: Tensor | None = None, **request: Any) -> list[Tensor]:
        """One exchange about this bank."""
        options = {name: request.pop(name) for name in ("parts", "room") if name in request}
        return self.cluster.ask({"op": op, "bank": self.number, **request}, payload, **options)

    def _changed(self) -> None:
        self.version += 1
        self._last = None

    def _flush(self) -> None:
        """Send pending passages, each to the rank that owns it."""
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        shares: dict[int, list[int]] = {}
        for number in pending:
            shares.setdefault(self.cluster.owner(number), []).append(number)
        parts = {
            rank: pack([torch.tensor(share), *(tensor for number in share for tensor in pending[number])])
            for rank, share in shares.items()
        }
        self.ask("hold", parts=parts)

    def _fetch(self, number: int) -> PassageStates:
        if number not in self._held:
            raise NotFoundError(f"passage {number} was forgotten while it was being read; ask again")
        reply = self.ask("states", number=number)[self.cluster.owner(number)]
        return PassageStates(*unpack(reply))


class ShardedView(BankView):
    """What one question may see of a sharded bank. ``numbers`` and ``visible`` join those of all ranks."""

    skims = True
    """Questions that attend to no memory ask for all layers in one exchange, whatever the ranks do then."""

    def __init__(
        self,
        bank: ShardedBank,
        number: int,
        numbers: Sequence[Numbers],
        visible: Sequence[NDArray[np.bool_]],
    ) -> None:
        self.msa, self.fetch = bank.msa, bank.fetch
        self._bank, self._number, self._parts = bank, number, tuple(numbers)
        self.numbers, self.visible = np.concatenate(numbers), np.concatenate(visible)
        self._shipped: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        """K and V that came with the scores, by router layer slot and passage."""
        self._version = bank.version
        weakref.finalize(self, bank.cluster.dropped.append, (bank.number, number))

    def without(self, numbers: Iterable[int]) -> ShardedView:
        """The same snapshot with more passages masked."""
        number, masked = next(_serials), [int(n) for n in numbers]
        replies = self._bank.ask("without", of=self._number, view=number, numbers=masked)
        return ShardedView(self._bank, number, self._parts, [unpack(reply)[0].numpy() for reply in replies])

    def words(self, terms: Iterable[int]) -> tuple[NDArray[np.float32], Postings]:
        """Words per passage and postings of all ranks, so that rarity is judged over the whole memory."""
        asked = sorted(terms)
        parts = [
            [tensor.numpy() for tensor in unpack(reply)]
            for reply in self._bank.ask("words", view=self._number, terms=asked)
        ]
        postings = {
            term: (
                np.concatenate([part[1 + 2 * index] for part in parts]),
                np.concatenate([part[2 + 2 * index] for part in parts]),
            )
            for index, term in enumerate(asked)
        }
        return np.concatenate([part[0] for part in parts]), {
            term: found for term, found in postings.items() if len(found[0])
        }

    def score(self, slot: int, query: Tensor, *, best: int | None = None) -> NDArray[np.float32]:
        """Scores of all passages of ``numbers``, in one exchange; each rank's best ones' K/V come along.

        As many of each rank's as ``best`` says (all when None) are exact, so that the best of all are; the
        others come rounded to 16 bits, and lower than those.
        """
        most = max(len(part) for part in self._parts)
        exact = min(best or most, most)
        ship = min(best or self.msa.top_k, most) if self._bank.on_ranks else 0
        room = 8 + packed_bytes(2 * most + 12 * exact + ship * (16 + self._bank.largest), tensors=7, dims=3)
        replies = self._bank.ask(
            "score", query, view=self._number, slot=slot, best=exact, ship=ship, room=room
        )
        parts = [unpack(reply) for reply in replies]
        self._shipped[slot] = _by_number(part[3:] for part in parts)
        scores = []
        for kept, values, rough in _as_arrays(parts):
            below = np.nextafter(values.min(initial=np.inf), -np.inf, dtype=np.float32)
            scores.append(np.minimum(rough, below))
            scores[-1][kept] = values[0]
        return np.concatenate(scores)

    def skim(
        self,
        queries: Sequence[Tensor],
        bonus: NDArray[np.float32] | float = 0.0,
        *,
        best: int | None = None,
        count: int = 0,
    ) -> NDArray[np.float32]:
        """Scores ``[L, P]`` of all layers, in one exchange.

        Exact are, as in a process alone, the ``best`` of each layer on it, and the most relevant ones
        (``count`` of them, and at least 128) on every layer: that is what comes of each rank. The others get
        their mean over the layers, in 16 bits, lowered so that none comes before one of those.
        """
        best, count = best or self.msa.top_k, max(count, SETTLED)
        most, layers = max(len(part) for part in self._parts), len(queries)
        room = 8 + packed_bytes(
            2 * most + min(most, count + layers * best) * (8 + 4 * layers), tensors=3, dims=2
        )
        shift = np.broadcast_to(np.asarray(bonus, dtype=np.float32), self.numbers.shape)
        places = np.flatnonzero(shift)
        places = places[np.argsort(self.numbers[places])]  # as the ranks look them up
        asked = pack(
            [
                torch.stack(list(queries)),
                torch.from_numpy(self.numbers[places]),
                torch.from_numpy(shift[places]),
            ]
        )
        replies = self._bank.ask("survey", asked, view=self._number, best=best, count=count, room=room)
        parts = list(_as_arrays([unpack(reply) for reply in replies]))
        least = min(
            (values[np.isfinite(values)].min(initial=np.inf) for _, values, _ in parts), default=np.inf
        )
        rough = np.concatenate([rough for *_, rough in parts])
        rough -= max(np.float32(0.0), rough.max(initial=-np.inf) - least + 1)
        scores = np.repeat(rough[None], layers, axis=0)
        first = 0
        for (kept, values, _), part in zip(parts, self._parts, strict=True):
            scores[:, first + kept] = values
            first += len(part)
        return scores

    def settle(
        self,
        scores: NDArray[np.float32],
        queries: Sequence[Tensor],
        bonus: NDArray[np.float32] | float = 0.0,
        count: int = 0,
    ) -> NDArray[np.float32]:
        """Scores of which the ``count`` most relevant are exact: those of ``skim``, or more of them."""
        return scores if count <= SETTLED else self.skim(queries, bonus, count=count)

    def gather(self, slot: int, numbers: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled keys and values ``[G, M, D]`` of all chunks of these passages, ascending by number."""
        if not self._bank.on_ranks:
            return super().gather(slot, numbers, like)
        if self._bank.version != self._version:  # what came may be of a passage that is gone or replaced
            self._shipped, self._version = {}, self._bank.version
        known = self._shipped.get(slot, {})
        if lacking := [number for number in numbers if number not in known]:
            replies = self._bank.ask("fetch", slot=slot, numbers=lacking)
            known = known | _by_number(map(unpack, replies))
        if lost := [number for number in numbers if number not in known]:
            raise NotFoundError(f"passages {lost} were forgotten while they were being read; ask again")
        pairs = [known[number] for number in sorted(numbers)]
        return (
            torch.cat([keys for keys, _ in pairs], 1).to(like.device, like.dtype),
            torch.cat([values for _, values in pairs], 1).to(like.device, like.dtype),
        )


def _as_arrays(parts: Iterable[Sequence[Tensor]]) -> Iterator[tuple[Numbers, Scores, Scores]]:
    """Of every rank: places of the passages whose scores came, these ``[l, C]``, and rough ones of all."""
    for kept, values, rough, *_ in parts:
        yield kept.numpy(), values.numpy(), rough.float().numpy()


def _by_number(parts: Iterable[Sequence[Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
    """K and V ``[G, C, D]`` of each passage, from numbers, chunk counts and joined tensors of every rank."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for numbers, counts, *pooled in parts:
        if pooled:
            split = [tensor.split(counts.tolist(), 1) for tensor in pooled]
            found |= dict(zip(numbers.tolist(), zip(*split, strict=True), strict=True))
    return found
