"""The numerical operations of Memory Sparse Attention, as plain torch on any device.

Every operation the engine performs beside linear layers is one public function here; a faster kernel
replaces a function's body, never its meaning. Shape letters: N tokens, T tokens of one sequence, H query
heads, G KV heads, D head width, S keys, C chunks, P passages, F = G*D routing width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from msa_memory.engine import kernels

__all__ = [
    "Part",
    "attend",
    "attend_documents",
    "attend_part",
    "fold_queries",
    "merge_parts",
    "normalize_heads",
    "pool_chunks",
    "reduce_passages",
    "rms_norm",
    "score_chunks",
    "score_tiles",
]

Part = tuple[Tensor, Tensor]
"""Attention over some of the keys: float32 ``[T, H, D]``, and the log of its weights' sum ``[T, H]``."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, computed in float32 (arXiv 1910.07467)."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, unseen: Tensor | None = None) -> Tensor:
    """Attention of the last T tokens of a sequence over all S keys, causal and right-aligned.

    Args:
        query: ``[T, H, D]``.
        keys, values: ``[G, S, D]`` with S >= T; the last T keys belong to the queries themselves, all
            earlier keys are visible to every query. Query head h reads KV head ``h // (H/G)``.
        scale: factor on the dot products.
        unseen: a number on the device, ``[]``: so many keys at the start are visible to no query.

    Returns:
        ``[T, H, D]``.
    """
    tokens, heads, dim = query.shape
    groups, total, _ = keys.shape
    if tokens == 1 and unseen is None:
        folded = query.view(groups, heads // groups, dim)
        out = F.scaled_dot_product_attention(folded[None], keys[None], values[None], scale=scale)
        return out[0].reshape(1, heads, dim)
    per_head = query.transpose(0, 1)  # [H, T, D]
    keys, values = _expand(keys, heads), _expand(values, heads)
    if total == tokens and unseen is None:
        out = F.scaled_dot_product_attention(
            per_head[None], keys[None], values[None], is_causal=True, scale=scale
        )
    else:
        visible = torch.ones(tokens, total, dtype=torch.bool, device=query.device)
        visible = visible.tril(total - tokens)
        if unseen is not None:
            visible &= torch.arange(total, device=query.device) >= unseen
        out = F.scaled_dot_product_attention(
            per_head[None], keys[None], values[None], attn_mask=visible, scale=scale
        )
    return out[0].transpose(0, 1)


def attend_documents(query: Tensor, keys: Tensor, values: Tensor, lengths: list[int], scale: float) -> Tensor:
    """Causal attention inside each document of a packed sequence; documents never see each other.

    ``query`` ``[N, H, D]``, ``keys`` and ``values`` ``[N, G, D]``; ``lengths`` sum to N.

    Returns:
        ``[N, H, D]``.
    """
    if kernels.usable(query, query.shape[-1]):
        from msa_memory.engine.kernels import documents

        return documents.attend_documents(query, keys, values, lengths, scale)
    outputs, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        outputs.append(attend(query[part], keys[part].transpose(0, 1), values[part].transpose(0, 1), scale))
        start += length
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def pool_chunks(x: Tensor, chunk: int) -> Tensor:
    """Arithmetic mean over consecutive chunks of tokens; the last chunk keeps its true count.

    ``x`` ``[T, ...]`` -> ``[ceil(T/chunk), ...]`` in ``x``'s dtype; sums run in float32 (msa-spec 5.3).
    """
    tokens = x.shape[0]
    full = tokens // chunk
    wide = x if x.dtype == torch.float64 else x.float()
    parts = []
    if full:
        parts.append(wide[: full * chunk].unflatten(0, (full, chunk)).mean(1))
    if tokens % chunk:
        parts.append(wide[full * chunk :].mean(0, keepdim=True))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.dtype)


def normalize_heads(x: Tensor) -> Tensor:
    """Divide each head vector (last axis) by its L2 norm, floored at 1e-12."""
    return F.normalize(x, dim=-1, eps=1e-12)


def attend_part(query: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor) -> Part:
    """Attention of ``[T, H, D]`` over some keys ``[G, S, D]``, to be merged with that over others.

    ``visible`` bool ``[T or 1, S]``. A token that sees no key has weight zero in a merge.
    """
    tokens, heads, dim = query.shape
    groups = keys.shape[0]
    folded = query.float().view(tokens, groups, heads // groups, dim).permute(1, 2, 0, 3)  # [G, R, T, D]
    logits = (folded @ keys.float()[:, None].transpose(2, 3)) * scale  # [G, R, T, S]
    logits = logits.masked_fill(~visible, -torch.inf)
    mass = logits.logsumexp(-1)
    weights = (logits - mass.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp()
    out = weights @ values.float()[:, None]  # [G, R, T, D]
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, dim), mass.permute(2, 0, 1).reshape(tokens, heads)


def merge_parts(one: Part, other: Part) -> Tensor:
    """The attention ``[T, H, D]`` over the keys of both parts; at least one of them sees a key."""
    mass = torch.logaddexp(one[1], other[1])
    return one[0] * (one[1] - mass).exp()[..., None] + other[0] * (other[1] - mass).exp()[..., None]


def fold_queries(query: Tensor, kv_heads: int) -> Tensor:
    """Sum router queries inside each KV group and divide by H: ``[T, H, D]`` -> ``[T, G*D]``.

    With head-mean reduction the score is linear in the query, so one product with the chunk keys
    ``[C, G*D]`` equals the mean of all per-head scores at H/G times less work.
    """
    tokens, heads, dim = query.shape
    folded = query.view(tokens, kv_heads, heads // kv_heads, dim).sum(2) / heads
    return folded.reshape(tokens, kv_heads * dim)


def score_chunks(query: Tensor, keys: Tensor, *, head_reduce: str, query_reduce: str, scale: float) -> Tensor:
    """Score every chunk against one question's router queries: ``[C]`` float32.

    Heads are reduced first, then tokens (msa-spec 6.3). No ``[H, T, C]`` tensor is ever made.

    Args:
        query: ``[T, H, D]`` router queries of the question tokens.
        keys: ``[C, G, D]`` router keys.
        head_reduce: ``mean`` or ``max``.
        query_reduce: ``max``, ``mean`` or ``last`` over tokens.
        scale: factor on the dot products.
    """
    if query_reduce == "last":
        query = query[-1:]
    if head_reduce == "mean":
        flat = fold_queries(query, keys.shape[1]).to(keys.dtype)
        return _over_tokens(_products(flat, keys), query_reduce) * scale
    return _over_tokens(_max_over_heads(query.to(keys.dtype), keys), query_reduce) * scale


def score_tiles(
    query: Tensor, tiles: Iterable[Tensor], size: int, *, head_reduce: str, query_reduce: str, scale: float
) -> Tensor:
    """``score_chunks`` in float32 of keys in tiles ``[c, G, D]`` of at most ``size`` chunks: ``[C]``.

    Products of one shape give a chunk the same score, bit for bit, whatever stands beside it and however
    many there are: tiles are filled up with zeros. What a tile makes stays in the CPU's cache.
    """
    if query_reduce == "last":
        query = query[-1:]
    query = query.float()
    flat: Tensor | None = None
    scores = []
    for keys in tiles:
        count, groups, dim = keys.shape
        if flat is None:
            flat = fold_queries(query, groups)
        rows = _tile_rows(size, groups * dim, keys.device)
        rows[:count] = keys.flatten(1)
        rows[count:] = 0
        if head_reduce == "mean":
            products = _tile_products(flat, rows)
        else:
            products = _max_over_heads(query, rows.view(size, groups, dim))
        scores.append(_over_tokens(products, query_reduce)[:count])
    return torch.cat(scores) * scale if scores else query.new_empty(0)


def reduce_passages(scores: Tensor, lengths: Tensor, reduction: str) -> Tensor:
    """Reduce chunk scores ``[C]`` to passages ``[P]``; ``lengths`` ``[P]`` chunks each, all at least 1."""
    return torch.segment_reduce(scores, reduction, lengths=lengths)


def _products(flat: Tensor, keys: Tensor) -> Tensor:
    return (flat @ keys.flatten(1).T).float()  # [T, C]


class _Tile(threading.local):
    """A thread's float32 rows of one product, kept: fresh memory is paid for page by page, tile by tile."""

    rows: Tensor | None = None


_TILE = _Tile()


def _tile_rows(tile: int, size: int, device: torch.device) -> Tensor:
    rows = _TILE.rows
    if rows is None or rows.shape != (tile, size) or rows.device != device:
        with torch.inference_mode(mode=False):  # or it could not be written outside of that mode
            rows = _TILE.rows = torch.empty(tile, size, device=device)
    return rows


def _tile_products(flat: Tensor, rows: Tensor) -> Tensor:
    """Products ``[T, C]``, by oneDNN where torch has it: for few tokens up to twice as fast as BLAS."""
    if rows.is_cpu and torch.backends.mkldnn.is_available():
        products: Tensor = torch.ops.mkldnn._linear_pointwise(flat, rows, None, "none", [], "")
        return products
    return flat @ rows.T


def _over_tokens(scores: Tensor, reduction: str) -> Tensor:
    return scores.mean(0) if reduction == "mean" else scores.amax(0)


def _max_over_heads(query: Tensor, keys: Tensor) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    best: Tensor | None = None
    for head in range(query.shape[1]):
        scores = (query[:, head] @ keys[:, head // group].T).float()  # [T, C]
        best = scores if best is None else torch.maximum(best, scores)
    assert best is not None
    return best


def _expand(x: Tensor, heads: int) -> Tensor:
    groups, total, dim = x.shape
    if groups == heads:
        return x
    return x[:, None].expand(groups, heads // groups, total, dim).reshape(heads, total, dim)
