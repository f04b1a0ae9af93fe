"""Questions over memory: prefill with routing, decode, and the attention both use.

A ``Sequence`` is one running question: its caches, the snapshot of the bank it may see and what its
routers chose. Rows of a batch share the linear layers' work and nothing else. Source: msa-spec 6 to 8.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.bank import BankView, Selection
from msa_memory.engine.cache import SequenceCache
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.states import HeadStates
from msa_memory.errors import EngineError

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
    scores: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    carried: dict[int, Tensor] = field(default_factory=dict)
    bonus: NDArray[np.float32] | float = 0.0
    """What is added to the routers' mean, by passage, where a skim chooses what to score exactly."""
    fed_tokens: int = 0

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


class _ContextAttention:
    """Each row attends to [memory; template head; its own tokens so far]."""

    def __init__(self, decoder: Decoder, feeds: Rows[Feed], *, attach: bool, stop: bool) -> None:
        self.decoder, self.feeds, self.attach = decoder, feeds, attach
        self.scale = decoder.config.head_dim**-0.5
        self.msa = decoder.msa
        layers = decoder.msa.router_layers if decoder.msa else ()
        self.slots = {layer: slot for slot, layer in enumerate(layers)}
        self.last = layers[-1] if stop and layers else None
        self.masks = [_mask(feed, decoder.device) for feed in feeds]

    def __call__(self, layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        slot = self.slots.get(layer)
        outputs, start = [], 0
        for feed, mask in zip(self.feeds, self.masks, strict=True):
            part = slice(start, start + len(feed.ids))
            start = part.stop
            if slot is not None and mask is not None and self.msa is not None:
                self._route(self.msa, feed.sequence, layer, slot, h[part][mask], q[part][mask])
            if layer == self.last:
                continue
            outputs.append(self._attend(feed, layer, q[part], k[part], v[part]))
        if layer == self.last:
            return None
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, feed: Feed, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = feed.sequence.cache.layers[layer]
        cache.append(k, v)
        keys, values = cache.view()
        if feed.bidirectional:
            # Without a mask every query sees every key: one folded query per token.
            return torch.cat([ops.attend(q[t : t + 1], keys, values, self.scale) for t in range(len(q))])
        return ops.attend(q, keys, values, self.scale)

    def _route(self, msa: MSAConfig, row: Sequence, layer: int, slot: int, h: Tensor, q: Tensor) -> None:
        if row.view is None:
            return
        query = self.decoder.attention(layer).router_query(h) if msa.decouple_router else q
        if msa.router_normalize:
            query = ops.normalize_heads(query)
        if layer in row.carried:
            query = torch.cat((row.carried[layer], query))
        row.queries[layer] = query
        if row.view.skims and not self.attach:
            return  # scored when the queries of all layers are known
        scores = row.view.score(slot, query, best=row.top_k)
        row.scores[layer] = scores
        row.selections[layer] = row.view.select(scores, row.top_k)
        if self.attach:
            row._place(layer, slot, row.selections[layer])


@torch.inference_mode()
def advance(decoder: Decoder, feeds: Rows[Feed]) -> Tensor:
    """Feed tokens to one or several sequences and return the logits at each one's last token ``[B, V]``.

    Router layers choose memory anew for rows whose feed marks routing tokens, and keep the earlier choice
    for the others. Rows never influence each other.
    """
    hidden = _forward(decoder, feeds, attach=True, stop=False)
    assert hidden is not None
    ends = torch.tensor([len(feed.ids) for feed in feeds], device=decoder.device).cumsum(0) - 1
    return decoder.logits(hidden[ends])


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
            skimmed = row.view.skim([row.queries[layer] for layer in decoder.msa.router_layers], row.bonus)
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
    hidden: Tensor | None = decoder(
        torch.tensor(ids, device=device), torch.tensor(positions, device=device), attention
    )
    return hidden


def _mask(feed: Feed, device: torch.device) -> Tensor | None:
    if feed.routes is None or not any(feed.routes):
        return None
    return torch.tensor(list(feed.routes), device=device)
