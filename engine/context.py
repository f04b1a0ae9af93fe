"""Questions over memory: prefill with routing, decode, and the attention both use.

A ``Sequence`` is one running question: its caches, the snapshot of the bank it may see and what its
routers chose. Rows of a batch share the linear layers' work and nothing else. Source: msa-spec 6 to 8.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import MutableMapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.bank_view import BankView, Selection
from msa_memory.engine.cache import SequenceCache
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.device_bank import DeviceView, SharedRouting, as_selection
from msa_memory.engine.states import HeadStates
from msa_memory.engine.tiers import Fetching
from msa_memory.engine.transfer import sent_numbers
from msa_memory.errors import EngineError

if TYPE_CHECKING:
    from msa_memory.engine.kernels.routing import Routed

__all__ = ["Feed", "Sequence", "advance", "route"]


@dataclass(slots=True)
class Sequence:
    """One running question.

    ``position`` is the rotary position of the next token. ``selections`` and ``scores`` are per router
    layer, from the last routing: ``scores`` follows ``view.numbers``, ``queries`` are the router queries
    ``[T, H, D]`` it used. ``carried`` queries of earlier tokens route along with every later routing.
    """

    cache: SequenceCache
    position: int
    view: BankView | None = None
    top_k: int = 16
    selections: dict[int, Selection] = field(default_factory=dict)
    scores: MutableMapping[int, NDArray[np.float32]] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    carried: dict[int, Tensor] = field(default_factory=dict)
    bonus: NDArray[np.float32] | float = 0.0
    """What is added to the routers' mean, by passage, where a skim chooses what to score exactly."""
    fed_tokens: int = 0
    noted: dict[int, Tensor] = field(default_factory=dict)
    """Normed inputs ``[E]`` of the layers that the last feed ``noted``, at its last token."""

    @classmethod
    def start(
        cls,
        decoder: Decoder,
        head: HeadStates,
        *,
        position: int,
        view: BankView | None,
        top_k: int,
        capacity: int = 256,
    ) -> Sequence:
        return cls(SequenceCache(head, capacity), position, view, top_k)

    @torch.inference_mode()
    def attend_to(self, selections: dict[int, Selection], slots: dict[int, int]) -> None:
        """Put the chosen passages' pooled K/V in front of each router layer's cache."""
        assert self.view is not None
        for layer, selection in selections.items():
            self._place(layer, slots[layer], selection)
        self.selections = dict(selections)

    def _place(self, layer: int, slot: int, selection: Selection) -> None:
        cache = self.cache.layers[layer]
        if selection.numbers and self.view is not None:
            cache.set_memory(*self.view.gather(slot, selection.numbers, cache.keys))
        else:
            cache.set_memory(cache.keys[:, :0], cache.values[:, :0])


@dataclass(frozen=True, slots=True)
class Feed:
    """Tokens to feed to one sequence; ``routes`` marks the question tokens that choose memory."""

    sequence: Sequence
    ids: Rows[int]
    routes: Rows[bool] | None = None
    bidirectional: bool = False
    """The tokens see each other in both directions (the reference's injected question, spec 9.4)."""
    noted: Rows[int] = ()
    """Layers whose normed input at the last token is noted in the sequence."""


class _ContextAttention:
    """Each row attends to [memory; template head; its own tokens so far]."""

    def __init__(self, decoder: Decoder, feeds: Rows[Feed], *, attach: bool, stop: bool) -> None:
        self.decoder, self.feeds, self.attach = decoder, feeds, attach
        self.scale = decoder.config.head_dim**-0.5
        self.msa = decoder.msa
        layers = decoder.msa.router_layers if decoder.msa else ()
        self.slots = {layer: slot for slot, layer in enumerate(layers)}
        self.last = layers[-1] if stop and layers else None
        ends = list(accumulate(len(feed.ids) for feed in feeds))
        self.parts = [slice(end - len(feed.ids), end) for end, feed in zip(ends, feeds, strict=True)]
        routing = [
            (feed.sequence, _routing_at(feed, part)) for feed, part in zip(feeds, self.parts, strict=True)
        ]
        self.routing = [
            (row, sent_numbers(places, decoder.device))
            for row, places in routing
            if places and row.view is not None
        ]
        self.shared = _share([row for row, _ in self.routing])

    def __call__(self, layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        for feed, part in zip(self.feeds, self.parts, strict=True):
            if layer in feed.noted:
                feed.sequence.noted[layer] = h[part.stop - 1].clone()  # no more of it is kept
        slot = self.slots.get(layer)
        if slot is not None and self.msa is not None:
            for row, places in self.routing:
                self._ask(self.msa, row, layer, h[places], q[places])
                if _device_view(row) is None:
                    self._route(row, layer, slot)
            for shared in self.shared:
                shared.route(layer, slot, attach=self.attach)
        if layer == self.last:
            return None
        for feed, part in zip(self.feeds, self.parts, strict=True):
            feed.sequence.cache.layers[layer].append(k[part], v[part])
        # What was chosen is on its way; meanwhile its rows attend to what is here.
        coming = (
            {id(row) for shared in self.shared for row in shared.coming(layer)} if slot is not None else ()
        )
        local = [
            self._attend_locally(feed, layer, q[part])
            if id(feed.sequence) in coming and not feed.bidirectional
            else None
            for feed, part in zip(self.feeds, self.parts, strict=True)
        ]
        if coming:
            for shared in self.shared:
                shared.place(layer)
        outputs = [
            self._attend(feed, layer, q[part])
            if here is None
            else self._attend_memory(feed, layer, q[part], here)
            for feed, part, here in zip(self.feeds, self.parts, local, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_locally(self, feed: Feed, layer: int, q: Tensor) -> ops.Part:
        """Attention over the template head and the row's own tokens, causal."""
        keys, values = feed.sequence.cache.layers[layer].own()
        visible = torch.ones(len(q), keys.shape[1], dtype=torch.bool, device=q.device)
        return ops.attend_part(q, keys, values, self.scale, visible.tril(keys.shape[1] - len(q)))

    def _attend_memory(self, feed: Feed, layer: int, q: Tensor, local: ops.Part) -> Tensor:
        """Attention over the memory, joined with that over the rest."""
        cache = feed.sequence.cache.layers[layer]
        keys, values = cache.in_memory()
        filled = torch.arange(keys.shape[1], device=q.device)
        visible = (
            torch.ones_like(filled, dtype=torch.bool) if cache.unfilled is None else filled >= cache.unfilled
        )
        memory = ops.attend_part(q, keys, values, self.scale, visible[None])
        return ops.merge_parts(local, memory).to(q.dtype)

    def _attend(self, feed: Feed, layer: int, q: Tensor) -> Tensor:
        cache = feed.sequence.cache.layers[layer]
        keys, values = cache.view()
        unseen = cache.unfilled
        if feed.bidirectional:
            # Without a mask every query sees every key: one folded query per token.
            each = [ops.attend(q[t : t + 1], keys, values, self.scale, unseen) for t in range(len(q))]
            return torch.cat(each)
        return ops.attend(q, keys, values, self.scale, unseen)

    def _ask(self, msa: MSAConfig, row: Sequence, layer: int, h: Tensor, q: Tensor) -> None:
        """Note the router queries of a row on one layer."""
        query = self.decoder.attention(layer).router_query(h) if msa.decouple_router else q
        if msa.router_normalize:
            query = ops.normalize_heads(query)
        if layer in row.carried:
            query = torch.cat((row.carried[layer], query))
        row.queries[layer] = query

    def _route(self, row: Sequence, layer: int, slot: int) -> None:
        assert row.view is not None
        if row.view.skims and not self.attach:
            return  # scored when the queries of all layers are known
        scores = row.view.score(slot, row.queries[layer], best=row.top_k)
        row.scores[layer] = scores
        row.selections[layer] = row.view.select(scores, row.top_k)
        if self.attach:
            row._place(layer, slot, row.selections[layer])


class _SharedRows:
    """Rows of one pass that route over one state of a device's bank; the host learns of it at the end."""

    def __init__(self, rows: Rows[Sequence], views: Rows[DeviceView]) -> None:
        self.rows, self.views = rows, views
        self.routing = SharedRouting(views, [row.top_k for row in rows])
        self.routed: dict[int, tuple[Routed, Tensor | None]] = {}
        """By layer, with the chunks ``[B]`` that the choices have."""
        self.fetching: dict[int, Fetching] = {}

    def route(self, layer: int, slot: int, *, attach: bool) -> None:
        """Score and choose on the device; with ``attach`` start to fetch what was chosen."""
        routed = self.routing(slot, [row.queries[layer] for row in self.rows])
        self.routed[layer] = routed, None
        if attach:
            self.fetching[layer] = self.routing.fetch(slot, routed.numbers)

    def coming(self, layer: int) -> Rows[Sequence]:
        """The rows whose choice on a layer is being fetched."""
        return self.rows if layer in self.fetching else ()

    def place(self, layer: int) -> None:
        """Put what was chosen into the caches as soon as it is there; the host does not wait."""
        if layer not in self.fetching:
            return
        chosen = self.fetching.pop(layer).wait()
        self.routed[layer] = self.routed[layer][0], chosen.counts
        room = chosen.keys.shape[1]
        places = torch.arange(room, device=chosen.keys.device)
        for index, row in enumerate(self.rows):
            filled = (places + chosen.counts[index]) % room  # to the end, where a memory has to lie
            row.cache.layers[layer].set_memory(
                chosen.keys[index, filled].transpose(0, 1),
                chosen.values[index, filled].transpose(0, 1),
                room - chosen.counts[index],
            )

    def learn(self) -> None:
        """Tell the rows what was chosen: one wait for the device, and another for scores that are wanted now.

        Raises:
            NotFoundError: a passage that was chosen is forgotten since its view was taken.
        """
        told = torch.stack([_as_told(routed, counts) for routed, counts in self.routed.values()]).cpu()
        attached = all(counts is not None for _, counts in self.routed.values())
        scores = [routed.scores for routed, _ in self.routed.values()]
        known: Rows[Any] = scores if attached else list(torch.stack(scores).cpu().numpy())
        for index, (row, view) in enumerate(zip(self.rows, self.views, strict=True)):
            row.scores = LateScores(
                {layer: one[index] for layer, one in zip(self.routed, known, strict=True)}
            )
            for layer, (count, *chosen) in zip(self.routed, told[:, index].tolist(), strict=True):
                half = len(chosen) // 2
                row.selections[layer] = as_selection(chosen[:half], chosen[half:])
                if attached:
                    row.cache.layers[layer].keep_memory(int(count))
                    view.check_held(row.selections[layer].numbers)


class LateScores(UserDict[int, Any]):
    """Scores ``[P]`` per router layer, which stay on a device until somebody looks at them."""

    def __getitem__(self, layer: int) -> NDArray[np.float32]:
        found = self.data[layer]
        if isinstance(found, Tensor):
            found = self.data[layer] = found.cpu().numpy()
        scores: NDArray[np.float32] = found
        return scores


def _as_told(routed: Routed, counts: Tensor | None) -> Tensor:
    """Counts, numbers and best scores as float64 ``[B, 1 + 2k]``, which holds them all exactly."""
    numbers = routed.numbers.double()
    first = numbers.new_zeros(len(numbers)) if counts is None else counts.double()
    return torch.cat((first[:, None], numbers, routed.best.double()), 1)


def _device_view(row: Sequence) -> DeviceView | None:
    """What a row sees, where a device routes over it; nothing has to be routed over an empty bank."""
    view = row.view
    return view if isinstance(view, DeviceView) and view.state.plan is not None else None


def _share(rows: Rows[Sequence]) -> list[_SharedRows]:
    """The rows that look at a device's bank, by the state of it that they see."""
    groups: dict[int, list[tuple[Sequence, DeviceView]]] = {}
    for row in rows:
        if (view := _device_view(row)) is not None:
            groups.setdefault(id(view.state), []).append((row, view))
    return [_SharedRows([row for row, _ in group], [view for _, view in group]) for group in groups.values()]


@torch.inference_mode()
def advance(decoder: Decoder, feeds: Rows[Feed]) -> Tensor:
    """Feed tokens to one or several sequences and return the logits at each one's last token ``[B, V]``.

    Router layers choose memory anew for rows whose feed marks routing tokens, and keep the earlier choice
    for the others. Rows never influence each other.
    """
    hidden = _forward(decoder, feeds, attach=True, stop=False)
    assert hidden is not None
    ends = [end - 1 for end in accumulate(len(feed.ids) for feed in feeds)]
    return decoder.logits(hidden[sent_numbers(ends, decoder.device)])


@torch.inference_mode()
def route(decoder: Decoder, feeds: Rows[Feed]) -> None:
    """Score and choose memory without attending to it; stops after the last router layer.

    Fills each sequence's ``scores`` and ``selections``. The caches are left incomplete: discard them.
    """
    if decoder.msa is None:
        raise EngineError("this model has no memory routers: train some with `msa-memory train router`")
    _forward(decoder, feeds, attach=False, stop=True)
    for row in (feed.sequence for feed in feeds):
        if row.view is not None and row.view.skims:
            queries = [row.queries[layer] for layer in decoder.msa.router_layers]
            skimmed = row.view.skim(queries, row.bonus, best=row.top_k)
            row.scores = dict(zip(decoder.msa.router_layers, skimmed, strict=True))
            row.selections = {layer: row.view.select(s, row.top_k) for layer, s in row.scores.items()}


def _forward(decoder: Decoder, feeds: Rows[Feed], *, attach: bool, stop: bool) -> Tensor | None:
    if any(not feed.ids for feed in feeds) or not feeds:
        raise EngineError("every sequence needs at least one token to feed; one has none")
    ids: list[int] = []
    positions: list[int] = []
    for feed in feeds:
        row, count = feed.sequence, len(feed.ids)
        ids.extend(feed.ids)
        positions.extend(range(row.position, row.position + count))
        row.position += count
        row.fed_tokens += count
    attention = _ContextAttention(decoder, feeds, attach=attach, stop=stop)
    device = decoder.device
    hidden: Tensor | None = decoder(sent_numbers(ids, device), sent_numbers(positions, device), attention)
    for shared in attention.shared:
        shared.learn()
    return hidden


def _routing_at(feed: Feed, part: slice) -> list[int]:
    """Where a feed's routing tokens lie in the flat run."""
    return [part.start + place for place, routes in enumerate(feed.routes or ()) if routes]
