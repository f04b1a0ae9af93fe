"""Running questions on a GPU, in which nothing waits for the host: routing, fetching, attention, decoding.

B rows have caches of fixed size on the device, and everything that changes from step to step (lengths,
choices, counts) is a tensor there. A prompt's router queries choose passages on the device, their K/V come
from a ``StateTier`` while the local attention runs, and a decode step is the same kernels over the same
addresses every time, so it may be captured once and replayed (``graphs``). Answers are those of
``context``, which is the plain way and the one for the CPU. On CPU tensors the same code runs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msa_memory.engine import kernels, ops
from msa_memory.engine.cache import SequenceCache
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.kernels import decoding, routing
from msa_memory.engine.states import HeadStates
from msa_memory.engine.tiers import Fetching, StateTier
from msa_memory.errors import EngineError

__all__ = ["DeviceMemory", "DeviceRows", "Prompt"]

Route = Callable[..., routing.Routed]


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What the rows may choose from: routing keys on the device, K/V in a tier.

    ``visible`` bool ``[P]`` for all rows or ``[B, P]``; None shows everything.
    """

    plan: routing.RoutingPlan
    tier: StateTier
    visible: Tensor | None = None

    def seen_by(self, rows: Sequence[int]) -> Tensor | None:
        if self.visible is None or self.visible.dim() == 1:
            return self.visible
        return self.visible[list(rows)]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens for one row; ``routes`` marks those that choose memory anew."""

    row: int
    ids: Sequence[int]
    routes: Sequence[bool] | None = None


@dataclass(slots=True)
class _Layer:
    """Caches of one layer: own tokens ``[B, G, S, D]`` and the chosen chunks ``[B, M, G, D]``."""

    keys: Tensor
    values: Tensor
    memory_keys: Tensor
    memory_values: Tensor
    counts: Tensor


@dataclass(slots=True)
class _Span:
    """Where a prompt's tokens lie: in the flat run, and in its row's cache."""

    prompt: Prompt
    flat: slice
    own: slice
    routing: Tensor | None = field(default=None)
    """Places in the flat run of the tokens that route."""


class DeviceRows:
    """B questions over one memory, as it is when the rows are made.

    Args:
        position: rotary position of a row's first token, unless ``load`` says another.
        capacity: tokens a row can hold behind the template head.
        memory_room: chunks a row can hold on each router layer; None is what ``top_k`` passages may take.
    """

    def __init__(
        self,
        decoder: Decoder,
        head: HeadStates,
        memory: DeviceMemory | None,
        *,
        rows: int,
        capacity: int,
        position: int,
        top_k: int,
        memory_room: int | None = None,
    ) -> None:
        self.decoder, self.head, self.memory = decoder, head, memory
        self.top_k, self.capacity, self.first_position = top_k, capacity, position
        device = decoder.device
        self.offsets = torch.full((rows,), position, dtype=torch.int64, device=device)
        """What a place in a row's cache lacks to the rotary position of the token there."""
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.held = [0] * rows
        """The lengths as the host knows them: how many tokens it has asked for."""
        if memory_room is None:
            memory_room = top_k * memory.tier.largest if memory else 0
        layers = decoder.msa.router_layers if decoder.msa and memory_room else ()
        self._slots = {layer: slot for slot, layer in enumerate(layers)}
        room = max(1, memory_room)
        self._layers = [
            self._empty(rows, room if index in self._slots else 1)
            for index in range(decoder.config.num_layers)
        ]
        self._rows = torch.arange(rows, device=device)
        self._groups = torch.arange(decoder.config.num_kv_heads, device=device)
        table = torch.arange(rows * room, dtype=torch.int32, device=device).view(rows, room)
        self._tables = {True: table, False: table[:, :1].contiguous()}

    def _empty(self, rows: int, room: int) -> _Layer:
        config, like = self.decoder.config, self.head.keys
        own = (rows, config.num_kv_heads, self.capacity + 1, config.head_dim)  # one to write what is not kept
        memory = (rows, room, config.num_kv_heads, config.head_dim)
        counts = torch.zeros(rows, dtype=torch.int32, device=like.device)
        return _Layer(
            like.new_zeros(own), like.new_zeros(own), like.new_zeros(memory), like.new_zeros(memory), counts
        )

    def nbytes(self) -> int:
        """Bytes of all caches."""
        tensors = [t for x in self._layers for t in (x.keys, x.values, x.memory_keys, x.memory_values)]
        return sum(tensor.nbytes for tensor in tensors)

    def clear(self, row: int) -> None:
        """Make a row ready for another question."""
        self.lengths[row] = 0
        self.held[row] = 0
        self.offsets[row] = self.first_position
        for layer in self._layers:
            layer.counts[row] = 0

    def fits(self, cache: SequenceCache) -> bool:
        """Whether a row can hold this sequence and one more token."""
        rooms = [
            layer.memory_keys.shape[1] if i in self._slots else 0 for i, layer in enumerate(self._layers)
        ]
        known = zip(cache.layers, rooms, strict=True)
        return cache.length < self.capacity and all(layer.memory <= room for layer, room in known)

    @torch.inference_mode()
    def load(self, row: int, cache: SequenceCache, position: int) -> None:
        """Make a row go on from a sequence that fits; ``position`` is the rotary one of its next token.

        A sequence's cache begins with its template head: rows that are loaded have an empty one of their own.
        """
        length = cache.length
        for mine, theirs in zip(self._layers, cache.layers, strict=True):
            size = theirs.memory
            for own, memory, found in (
                (mine.keys, mine.memory_keys, theirs.view()[0]),
                (mine.values, mine.memory_values, theirs.view()[1]),
            ):
                own[row, :, :length] = found[:, size:]
                if size:
                    memory[row, :size] = found[:, :size].transpose(0, 1)
            mine.counts[row] = size
        self.lengths[row] = self.held[row] = length
        self.offsets[row] = position - length

    @torch.inference_mode()
    def unload(self, row: int, cache: SequenceCache) -> None:
        """Bring the tokens that a row took since it was loaded back into the sequence's cache."""
        fresh = slice(cache.length, self.held[row])
        if fresh.start < fresh.stop:
            for mine, theirs in zip(self._layers, cache.layers, strict=True):
                theirs.append(*(own[row, :, fresh].transpose(0, 1) for own in (mine.keys, mine.values)))

    @torch.inference_mode()
    def feed(self, prompts: Sequence[Prompt]) -> Tensor:
        """Feed tokens to some rows, each at most once: logits ``[len(prompts), V]`` at each one's last.

        Raises:
            EngineError: a row has no room for its tokens, or a prompt has none.
        """
        spans, ids, positions = self._lay_out(prompts)
        hidden = self.decoder(ids, positions, _PromptAttention(self, spans))
        assert hidden is not None
        ends = torch.tensor([span.flat.stop - 1 for span in spans], device=self.decoder.device)
        return self.decoder.logits(hidden[ends])

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Feed one token ``[N]`` to each of the first N rows, where it is not negative: logits ``[N, V]``.

        Reads and writes device tensors only; a captured graph of it may be replayed. Count the step with
        ``stepped`` on the host.
        """
        rows = len(ids)
        lengths = self.lengths[:rows]
        # What a row that stands still writes lies behind its last token.
        places = lengths.clamp(max=self.capacity).long()
        lengths.add_(ids >= 0)
        attention = _StepAttention(self, places)
        hidden = self.decoder(ids.clamp(min=0), places + self.offsets[:rows], attention)
        assert hidden is not None
        return self.decoder.logits(hidden)

    def stepped(self, rows: Sequence[int] | None = None) -> None:
        """Note on the host that these rows (all when None) took a token.

        Raises:
            EngineError: a row is full.
        """
        for row in range(len(self.held)) if rows is None else rows:
            if self.held[row] >= self.capacity:
                raise EngineError(
                    f"a row holds {self.held[row]} tokens, its capacity; make rows with more room"
                )
            self.held[row] += 1

    def forget_step(self) -> None:
        """Make the device's lengths what the host knows, after a step that failed."""
        self.lengths.copy_(torch.tensor(self.held, dtype=torch.int32))

    def _lay_out(self, prompts: Sequence[Prompt]) -> tuple[list[_Span], Tensor, Tensor]:
        ids: list[int] = []
        positions: list[int] = []
        spans = []
        for prompt in prompts:
            count, begin = len(prompt.ids), self.held[prompt.row]
            if not count or begin + count > self.capacity:
                raise EngineError(
                    f"row {prompt.row} holds {begin} of {self.capacity} tokens and got {count}; give 1 to "
                    f"{self.capacity - begin}"
                )
            flat, own = slice(len(ids), len(ids) + count), slice(begin, begin + count)
            routing_at = [flat.start + i for i, routes in enumerate(prompt.routes or ()) if routes]
            device = self.decoder.device
            spans.append(
                _Span(prompt, flat, own, torch.tensor(routing_at, device=device) if routing_at else None)
            )
            ids.extend(prompt.ids)
            positions.extend(range(self.first_position + begin, self.first_position + begin + count))
            self.held[prompt.row] += count
            self.lengths[prompt.row] += count
        device = self.decoder.device
        return spans, torch.tensor(ids, device=device), torch.tensor(positions, device=device)


class _PromptAttention:
    """Each prompt over [its choice; template head; its row so far]; choices are made on the way."""

    def __init__(self, rows: DeviceRows, spans: Sequence[_Span]) -> None:
        self.rows, self.spans = rows, spans
        self.scale = rows.decoder.config.head_dim**-0.5
        device = rows.decoder.device
        routing_spans = [span for span in spans if span.routing is not None]
        self.routing_rows = [span.prompt.row for span in routing_spans]
        self.row_index = torch.tensor(self.routing_rows, device=device)
        memory = rows.memory
        self.visible = memory.seen_by(self.routing_rows) if memory and routing_spans else None

    def __call__(self, layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slot, caches = self.rows._slots.get(layer), self.rows._layers[layer]
        fetching = self._choose(layer, slot, h, q) if slot is not None and self.routing_rows else None
        local = [self._local(span, layer, q, k, v) for span in self.spans]
        if slot is None:
            return torch.cat([out for out, _ in local]).to(q.dtype)
        if fetching is not None:
            self._place(caches, fetching)
        merged = [
            ops.merge_parts(part, self._memory(span, caches, q))
            for part, span in zip(local, self.spans, strict=True)
        ]
        return torch.cat(merged).to(q.dtype)

    def _choose(self, layer: int, slot: int, h: Tensor, q: Tensor) -> Fetching:
        decoder, memory = self.rows.decoder, self.rows.memory
        assert decoder.msa is not None
        assert memory is not None
        queries = []
        for span in self.spans:
            if span.routing is not None:
                if decoder.msa.decouple_router:
                    query = decoder.attention(layer).router_query(h[span.routing])
                else:
                    query = q[span.routing]
                queries.append(ops.normalize_heads(query) if decoder.msa.router_normalize else query)
        fused = kernels.usable(q, q.shape[-1])
        route: Route = routing.route_questions if fused else routing.route_questions_reference
        routed = route(
            memory.plan,
            slot,
            queries,
            top_k=self.rows.top_k,
            scale=decoder.msa.score_scale(q.shape[-1]),
            visible=self.visible,
            query_reduce=decoder.msa.query_reduce,
            chunk_reduce=decoder.msa.chunk_reduce,
        )
        return memory.tier.fetch(slot, routed.numbers)

    def _place(self, caches: _Layer, fetching: Fetching) -> None:
        chosen = fetching.wait()
        room = chosen.keys.shape[1]
        caches.memory_keys[self.row_index, :room] = chosen.keys.to(caches.memory_keys.dtype)
        caches.memory_values[self.row_index, :room] = chosen.values.to(caches.memory_values.dtype)
        caches.counts[self.row_index] = chosen.counts

    def _local(self, span: _Span, layer: int, q: Tensor, k: Tensor, v: Tensor) -> ops.Part:
        """Attention over the template head and the row's own tokens."""
        caches, head = self.rows._layers[layer], self.rows.head
        caches.keys[span.prompt.row, :, span.own] = k[span.flat].transpose(0, 1)
        caches.values[span.prompt.row, :, span.own] = v[span.flat].transpose(0, 1)
        keys = torch.cat((head.keys[layer], caches.keys[span.prompt.row, :, : span.own.stop]), 1)
        values = torch.cat((head.values[layer], caches.values[span.prompt.row, :, : span.own.stop]), 1)
        tokens = span.own.stop - span.own.start
        visible = torch.ones(tokens, keys.shape[1], dtype=torch.bool, device=q.device)
        return ops.attend_part(q[span.flat], keys, values, self.scale, visible.tril(keys.shape[1] - tokens))

    def _memory(self, span: _Span, caches: _Layer, q: Tensor) -> ops.Part:
        row = span.prompt.row
        keys, values = caches.memory_keys[row].transpose(0, 1), caches.memory_values[row].transpose(0, 1)
        filled = torch.arange(keys.shape[1], device=q.device) < caches.counts[row]
        return ops.attend_part(q[span.flat], keys, values, self.scale, filled[None, :])


class _StepAttention:
    """One token of every row over [template head; choice; own tokens]; see ``kernels.decoding``."""

    def __init__(self, rows: DeviceRows, places: Tensor) -> None:
        self.rows, self.places = rows, places
        self.scale = rows.decoder.config.head_dim**-0.5

    def __call__(self, layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, caches, count = self.rows, self.rows._layers[layer], len(self.places)
        at = (rows._rows[:count, None], rows._groups[None, :], self.places[:, None])
        caches.keys.index_put_(at, k)
        caches.values.index_put_(at, v)
        context = decoding.Context(
            rows.head.keys[layer],
            rows.head.values[layer],
            caches.memory_keys.flatten(0, 1),
            caches.memory_values.flatten(0, 1),
            rows._tables[layer in rows._slots][:count],
            caches.counts[:count],
            caches.keys[:count],
            caches.values[:count],
            rows.lengths[:count],
        )
        attend = (
            decoding.attend_decode if kernels.usable(q, q.shape[-1]) else decoding.attend_decode_reference
        )
        return attend(q, context, self.scale)
