"""The packed training forward: documents, question and answer of one example in a single run of tokens.

Same arithmetic as ``encoding`` and ``context`` (documents alone and pooled; the rest over the template
head, the chosen chunks and itself), differentiable. Choosing is a hard top-k and pooled states carry no
score, so a language-model loss trains pooled K/V and leaves the routers without a gradient: only the
losses on ``doc_scores`` train those. Source: arXiv 2603.23516, section 3; msa-spec section 10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.decoder import Decoder
from msa_memory.errors import EngineError

__all__ = ["PackedOutput", "PackedRow", "forward_packed", "pack"]

TEMPLATE, QUESTION, RESPONSE = -2, 0, -1


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One training example, unpadded: template head, documents back to back, then everything else.

    ``codes`` per token are -2 template, 0 question (the tokens that route), -1 response and 1, 2, ... for
    the documents in order. ``positions`` are rotary positions: see ``pack`` for the usual ones.

    Raises:
        EngineError: the lists differ in length or the codes are not laid out like this.
    """

    ids: Sequence[int]
    codes: Sequence[int]
    positions: Sequence[int]

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.codes) == len(self.positions) > 0:
            raise EngineError(
                f"a packed row needs as many ids as codes and positions, at least one; got {len(self.ids)}, "
                f"{len(self.codes)} and {len(self.positions)}"
            )
        documents = [code for code in self.codes if code > 0]
        first = next((at for at, code in enumerate(self.codes) if code > 0), 0)
        steps = [new - old for old, new in zip([0, *documents], documents, strict=False)]
        if (
            min(self.codes) < TEMPLATE
            or any(step not in (0, 1) for step in steps)
            or documents != list(self.codes[first : first + len(documents)])
            or any(code != TEMPLATE for code in self.codes[:first])
        ):
            raise EngineError(
                "a packed row is laid out as template head (code -2), documents (1, 2, ... without gaps), "
                f"then question, tail and response (0, -2, -1); got the codes {_runs(self.codes)}"
            )

    def __len__(self) -> int:
        return len(self.ids)


def pack(
    head: Sequence[int],
    documents: Sequence[Sequence[int]],
    question: Sequence[int],
    tail: Sequence[int],
    response: Sequence[int],
    *,
    question_position: int,
) -> PackedRow:
    """Lay out one example from its token ids, with the positions of encoding and prefill.

    Head and every document start at position 0, the question at ``question_position``
    (``PromptLayout.question_position``); tail and response go on from there.
    """
    ids, codes, positions = [*head], [TEMPLATE] * len(head), [*range(len(head))]
    for number, document in enumerate(documents, start=1):
        if not document:
            raise EngineError(f"document {number} of a packed row has no tokens; leave it out")
        ids += document
        codes += [number] * len(document)
        positions += range(len(document))
    rest = [*question, *tail, *response]
    ids += rest
    codes += [QUESTION] * len(question) + [TEMPLATE] * len(tail) + [RESPONSE] * len(response)
    positions += range(question_position, question_position + len(rest))
    return PackedRow(ids, codes, positions)


@dataclass(frozen=True, slots=True)
class PackedOutput:
    """What the training losses need of a forward; N tokens of all R rows, one after another.

    ``hidden`` ``[N, E]`` final hidden states; ``lengths`` tokens per row; ``doc_scores`` per router layer
    ``[R, max document code + 1]`` float32, column 0 and documents a row lacks -inf; ``selected`` per
    router layer and row the chosen document codes, best first.
    """

    hidden: Tensor
    lengths: tuple[int, ...]
    doc_scores: dict[int, Tensor]
    selected: dict[int, tuple[tuple[int, ...], ...]]
    head: Callable[[Tensor], Tensor]

    def logits(self, tokens: Tensor | None = None) -> Tensor:
        """Vocabulary logits ``[M, V]`` float32 at these token numbers or this mask ``[N]`` (None: all)."""
        return self.head(self.hidden if tokens is None else self.hidden[tokens])


def forward_packed(decoder: Decoder, rows: Sequence[PackedRow]) -> PackedOutput:
    """Run a batch of packed rows, with gradients; rows share the linear layers' work and nothing else.

    Scores are cosines whenever ``aux_loss_method`` is of the INFONCE family, whatever inference does
    (msa-spec 6.1). Documents may have any length. ``decoder.recompute`` trades time for memory.

    Raises:
        EngineError: no rows, or the decoder has no router layers.
    """
    if decoder.msa is None:
        raise EngineError("this model has no memory routers: convert it with `msa-memory models convert`")
    if not rows:
        raise EngineError("a training batch needs at least one packed row; it has none")
    msa = decoder.msa.with_options(router_normalize="INFONCE" in decoder.msa.aux_loss_method)
    attention = _PackedAttention(decoder, msa, rows)
    ids = torch.tensor([token for row in rows for token in row.ids], device=decoder.device)
    positions = torch.tensor([at for row in rows for at in row.positions], device=decoder.device)
    hidden = decoder(ids, positions, attention)
    assert hidden is not None
    lengths = tuple(len(row) for row in rows)
    return PackedOutput(hidden, lengths, attention.doc_scores(), attention.selected(), decoder.logits)


class _Spans:
    """Where the parts of one row lie among all tokens of the batch."""

    def __init__(self, row: PackedRow, start: int, device: torch.device) -> None:
        lengths = [0] * max(0, *row.codes)
        for code in row.codes:
            if code > 0:
                lengths[code - 1] += 1
        first = next((at for at, code in enumerate(row.codes) if code > 0), 0)
        self.head = slice(start, start + first)
        self.documents: list[slice] = []
        at = self.head.stop
        for length in lengths:
            self.documents.append(slice(at, at + length))
            at += length
        self.active = slice(at, start + len(row))
        asking = [number for number, code in enumerate(row.codes, start) if code == QUESTION]
        self.question = torch.tensor(asking, dtype=torch.long, device=device)


class _PackedAttention:
    """Who sees whom in packed rows; keeps every document's score and each row's choice by router layer."""

    def __init__(self, decoder: Decoder, msa: MSAConfig, rows: Sequence[PackedRow]) -> None:
        self.decoder, self.msa = decoder, msa
        self.scale = decoder.config.head_dim**-0.5
        self.routers = frozenset(msa.router_layers)
        self.rows: list[_Spans] = []
        start = 0
        for row in rows:
            self.rows.append(_Spans(row, start, decoder.device))
            start += len(row)
        self._scores: dict[tuple[int, int], Tensor] = {}
        self._chosen: dict[tuple[int, int], tuple[int, ...]] = {}

    def __call__(self, layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for index, row in enumerate(self.rows):
            chosen = self._choose(layer, index, row, h, q, k) if layer in self.routers else ()
            memory = [row.documents[number - 1] for number in sorted(chosen)]
            outputs.extend(self._row(row, memory, q, k, v))
        return torch.cat(outputs)

    def _row(self, row: _Spans, memory: list[slice], q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Outputs ``[tokens, H, D]`` of the row's parts in order."""
        alone = [part for part in (row.head, *row.documents) if part.stop > part.start]
        outputs = [self._attend(q[part], k[part], v[part]) for part in alone]
        if row.active.stop > row.active.start:
            outputs.append(
                self._attend(q[row.active], self._context(row, memory, k), self._context(row, memory, v))
            )
        return outputs

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attend(q, k.transpose(0, 1), v.transpose(0, 1), self.scale)

    def _context(self, row: _Spans, memory: list[slice], x: Tensor) -> Tensor:
        """Keys or values ``[S, G, D]`` the active tokens see: chunks of the choice, head, themselves."""
        pooled = [ops.pool_chunks(x[document], self.msa.chunk) for document in memory]
        return torch.cat([*pooled, x[row.head], x[row.active]])

    def _choose(
        self, layer: int, index: int, row: _Spans, h: Tensor, q: Tensor, k: Tensor
    ) -> tuple[int, ...]:
        """Score the row's documents and choose the best, by code; ties go to the earlier document."""
        if not row.documents or not len(row.question):
            return ()
        scores = self._score(layer, row, h, q, k)
        order = scores.detach().sort(descending=True, stable=True).indices[: self.msa.top_k]
        chosen = tuple(number + 1 for number in order.tolist())
        self._scores[layer, index], self._chosen[layer, index] = scores, chosen
        return chosen

    def _score(self, layer: int, row: _Spans, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Scores ``[documents]`` of one row, float32."""
        projections, size = self.decoder.attention(layer), self.msa.router_chunk
        keyed = h if self.msa.decouple_router else k
        pooled = [ops.pool_chunks(keyed[document], size) for document in row.documents]
        keys = torch.cat(pooled)
        if self.msa.decouple_router:
            query, keys = projections.router_query(h[row.question]), projections.router_key(keys)
        else:
            query = q[row.question]
        if self.msa.router_normalize:
            query, keys = ops.normalize_heads(query), ops.normalize_heads(keys)
        chunks = ops.score_chunks(
            query.float(),
            keys.float(),
            head_reduce=self.msa.head_reduce,
            query_reduce=self.msa.query_reduce,
            scale=self.msa.score_scale(query.shape[-1]),
        )
        lengths = torch.tensor([len(part) for part in pooled], device=chunks.device)
        return ops.reduce_passages(chunks, lengths, self.msa.chunk_reduce)

    def doc_scores(self) -> dict[int, Tensor]:
        """``[R, max document code + 1]`` per router layer."""
        width = 1 + max(len(row.documents) for row in self.rows)
        absent = torch.full((width,), -torch.inf, device=self.decoder.device)
        tables = {}
        for layer in self.msa.router_layers:
            found = [self._scores.get((layer, index), absent[:0]) for index in range(len(self.rows))]
            filled = [torch.cat((absent[:1], row, absent[1 + len(row) :])) for row in found]
            tables[layer] = torch.stack(filled)
        return tables

    def selected(self) -> dict[int, tuple[tuple[int, ...], ...]]:
        rows = range(len(self.rows))
        return {
            layer: tuple(self._chosen.get((layer, index), ()) for index in rows)
            for layer in self.msa.router_layers
        }


def _runs(codes: Sequence[int]) -> str:
    """Codes with repeats left out, shortened, for messages."""
    changes = [code for at, code in enumerate(codes) if at == 0 or codes[at - 1] != code]
    return ", ".join(map(str, changes[:12])) + (", ..." if len(changes) > 12 else "")
