"""Several questions on one stretch of evidence, as one run of tokens with gradients.

A row is the template head, what all its questions share (the evidence) and a branch per question. A branch
sees head, shared part and itself, so it computes what it would alone; the evidence is paid for once.
Rows may read documents as pooled memory on the router layers, their own and those of other rows in the
batch: to a question other rows' documents are more memory to choose from, as a bank holds. Routing is not
computed: all offered documents are attended to, as below ``top_k`` documents they are in the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.decoder import Decoder
from msa_memory.errors import EngineError

__all__ = [
    "Branch",
    "BranchedRow",
    "answer_losses",
    "attend_masked",
    "causal_mask",
    "forward_branches",
]


@dataclass(frozen=True, slots=True)
class Branch:
    """A question and its answer: token ids, of which the last ``answer_tokens`` are to be learned."""

    ids: tuple[int, ...]
    answer_tokens: int
    kind: str

    def __post_init__(self) -> None:
        if not 0 < self.answer_tokens < len(self.ids):
            raise EngineError(
                f"a branch of {len(self.ids)} tokens has an answer of {self.answer_tokens}; "
                "it needs at least one token, and one before it"
            )


@dataclass(frozen=True, slots=True)
class BranchedRow:
    """One training row. Head and documents stand at positions from 0, shared part and branches go on from
    ``position``. ``borrows`` lets a row see other rows' documents, at most ``borrows`` of them."""

    head: tuple[int, ...]
    shared: tuple[int, ...]
    position: int
    branches: tuple[Branch, ...]
    documents: tuple[tuple[int, ...], ...] = ()
    borrows: int = 0

    def __len__(self) -> int:
        return sum(map(len, self._runs()))

    def _runs(self) -> list[tuple[int, ...]]:
        return [*self.documents, self.head, self.shared, *(branch.ids for branch in self.branches)]

    def ids(self) -> list[int]:
        """All tokens: documents, head, shared part, branches."""
        return [token for run in self._runs() for token in run]

    def positions(self) -> list[int]:
        """Rotary positions in the order of ``ids``."""
        after = self.position + len(self.shared)
        starts = [0] * (len(self.documents) + 1) + [self.position] + [after] * len(self.branches)
        return [
            at
            for start, run in zip(starts, self._runs(), strict=True)
            for at in range(start, start + len(run))
        ]


def forward_branches(decoder: Decoder, rows: Sequence[BranchedRow]) -> Tensor:
    """Final hidden states ``[N, E]`` of all rows' tokens, one row after another.

    Raises:
        EngineError: the decoder has no router layers.
    """
    if decoder.msa is None:
        raise EngineError("this model has no memory routers: convert it with `msa-memory models convert`")
    attention = _Attention(decoder, rows)
    ids = torch.tensor([token for row in rows for token in row.ids()], device=decoder.device)
    positions = torch.tensor([at for row in rows for at in row.positions()], device=decoder.device)
    hidden: Tensor | None = decoder(ids, positions, attention)
    assert hidden is not None
    return hidden


def answer_losses(decoder: Decoder, hidden: Tensor, rows: Sequence[BranchedRow]) -> list[Tensor]:
    """Cross-entropy of every branch's answer tokens, ``[answer_tokens]`` float32 each, in order."""
    sources: list[int] = []
    targets: list[int] = []
    sizes: list[int] = []
    end = 0
    for row in rows:
        end += sum(map(len, row.documents)) + len(row.head) + len(row.shared)
        for branch in row.branches:
            end += len(branch.ids)
            sources += range(end - branch.answer_tokens - 1, end - 1)
            targets += branch.ids[-branch.answer_tokens :]
            sizes.append(branch.answer_tokens)
    logits = decoder.logits(hidden[torch.tensor(sources, device=hidden.device)])
    losses = torch.nn.functional.cross_entropy(
        logits, torch.tensor(targets, device=hidden.device), reduction="none"
    )
    return list(losses.split(sizes))


class _Attention:
    """Who sees whom. Scores are plain products with an additive mask: for rows of a few hundred tokens on a
    CPU that takes a third of the time of the fused kernel, forward and backward."""

    def __init__(self, decoder: Decoder, rows: Sequence[BranchedRow]) -> None:
        assert decoder.msa is not None
        self.chunk, self.routers = decoder.msa.chunk, frozenset(decoder.msa.router_layers)
        self.scale = decoder.config.head_dim**-0.5
        self.documents: list[list[slice]] = []
        self.active: list[slice] = []
        start = 0
        for row in rows:
            spans = []
            for document in row.documents:
                spans.append(slice(start, start + len(document)))
                start += len(document)
            self.documents.append(spans)
            end = start + len(row) - sum(map(len, row.documents))
            self.active.append(slice(start, end))
            start = end
        self.memory = [self._offered(number, row) for number, row in enumerate(rows)]
        self.masks = [_mask(row, decoder.device, decoder.dtype) for row in rows]
        self.memory_masks = [
            self._memory_mask(row, spans, mask)
            for row, spans, mask in zip(rows, self.memory, self.masks, strict=True)
        ]

    def _offered(self, number: int, row: BranchedRow) -> list[slice]:
        """Documents a row attends to: its own, then the nearest rows' after it, around the end."""
        later = [*self.documents[number + 1 :], *self.documents[:number]]
        others = [span for spans in later for span in spans]
        return [*self.documents[number], *others[: row.borrows]]

    def _memory_mask(self, row: BranchedRow, spans: list[slice], mask: Tensor) -> Tensor:
        """``mask`` with columns for the pooled chunks in front, which all but the head sees."""
        chunks = sum(-(-(span.stop - span.start) // self.chunk) for span in spans)
        front = mask.new_zeros(len(mask), chunks)
        front[: len(row.head)] = -torch.inf
        return torch.cat((front, mask), dim=1)

    def __call__(self, layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * self.scale
        pooled = self._pool(k, v) if layer in self.routers else {}
        outputs = []
        for spans, active, memory, mask, memory_mask in zip(
            self.documents, self.active, self.memory, self.masks, self.memory_masks, strict=True
        ):
            for span in spans:
                causal = causal_mask(span.stop - span.start, mask)
                outputs.append(attend_masked(q[span], k[span], v[span], causal))
            keys, values = k[active], v[active]
            if pooled and memory:
                keys = torch.cat([*(pooled[span.start][0] for span in memory), keys])
                values = torch.cat([*(pooled[span.start][1] for span in memory), values])
                mask = memory_mask
            outputs.append(attend_masked(q[active], keys, values, mask))
        return torch.cat(outputs)

    def _pool(self, k: Tensor, v: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Pooled keys and values of every document, by its first token's number."""
        return {
            span.start: (ops.pool_chunks(k[span], self.chunk), ops.pool_chunks(v[span], self.chunk))
            for spans in self.documents
            for span in spans
        }


def _mask(row: BranchedRow, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[T, T]`` over head, shared part and branches: causal, branches blind to each other."""
    common = len(row.head) + len(row.shared)
    owner = [0] * common + [n for n, branch in enumerate(row.branches, 1) for _ in branch.ids]
    owners = torch.tensor(owner, device=device)
    seen = (owners[None] == 0) | (owners[None] == owners[:, None])
    seen = seen.tril()
    return torch.zeros(seen.shape, device=device, dtype=dtype).masked_fill_(~seen, -torch.inf)


def causal_mask(tokens: int, like: Tensor) -> Tensor:
    """Additive mask ``[T, T]`` under which tokens see themselves and what comes before."""
    return like.new_full((tokens, tokens), -torch.inf).triu(1)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scaled ``q`` ``[T, H, D]`` on ``k``, ``v`` ``[S, G, D]`` under an additive ``mask`` ``[T, S]``."""
    tokens, heads, dim = q.shape
    groups = k.shape[1]
    folded = q.view(tokens, groups, heads // groups, dim).permute(1, 2, 0, 3).reshape(groups, -1, dim)
    scores = torch.bmm(folded, k.permute(1, 2, 0)).view(heads, tokens, -1) + mask  # [H, T, S]
    weights = scores.softmax(-1).view(groups, -1, k.shape[0])
    mixed = torch.bmm(weights, v.transpose(0, 1)).view(heads, tokens, dim)
    return mixed.transpose(0, 1)
