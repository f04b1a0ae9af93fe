"""The parity check notices every broken rule: each mutation of the engine must make it fail.

A mutation replaces one rule and leaves the rest, and must end in a ParityError (not a crash) on at least
one of the three fixtures.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msa_memory.engine import bank_view, cache, config, context, encoding, layout, ops
from msa_memory.engine import decoder as decoder_module
from msa_memory.engine.rope import apply_rope
from msa_memory.engine.states import HeadStates
from msa_memory.engine.train import losses

Patch = pytest.MonkeyPatch


def load_parity() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "test_reference_parity.py"
    spec = importlib.util.spec_from_file_location("parity_under_mutation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


parity = load_parity()
FIXTURES = [parity.Fixture.read(parity.COPIES / name) for name in ("tiny_a", "tiny_c", "tiny_d")]


def positions_start_at_k(patch: Patch) -> None:
    """The paper's k, without the literal 3."""
    patch.setattr(layout, "REFERENCE_POSITION", 0)


def positions_start_one_late(patch: Patch) -> None:
    patch.setattr(layout, "REFERENCE_POSITION", 4)


def documents_do_not_restart(patch: Patch) -> None:
    """A document's positions go on after the template head's."""
    original = decoder_module.Decoder.forward

    def shifted(self: Any, ids: Tensor, positions: Tensor, attend: Any) -> Any:
        reading = isinstance(attend, encoding._PassageReader)
        return original(self, ids, positions + 3 if reading else positions, attend)

    patch.setattr(decoder_module.Decoder, "forward", shifted)


def normalised_before_pooling(patch: Patch) -> None:
    def router_keys(self: Any, layer: int, x: Tensor) -> list[Tensor]:
        keys = self.decoder.attention(layer).router_key(x) if self.msa.decouple_router else x
        if self.msa.router_normalize:
            keys = ops.normalize_heads(keys)
        pooled = ops.pool_chunks(keys, self.msa.router_chunk)
        return [ops.normalize_heads(pooled) if self.msa.router_normalize else pooled]

    patch.setattr(encoding._PassageReader, "_router_keys", router_keys)


def never_normalised(patch: Patch) -> None:
    patch.setattr(ops, "normalize_heads", lambda x: x)


def queries_not_normalised(patch: Patch) -> None:
    original = ops.normalize_heads
    patch.setattr(ops, "normalize_heads", lambda x: x if x.shape[1] in (4, 6) else original(x))


def normalised_as_trained(patch: Patch) -> None:
    """Cosines for the whole INFONCE family at inference, as in training."""
    patch.setattr(config, "_default_normalize", lambda model_type, method: "INFONCE" in method)


def wrong_score_factor(patch: Patch) -> None:
    patch.setattr(config.MSAConfig, "score_scale", lambda self, dim: 1.0)


def tail_tokens_route(patch: Patch) -> None:
    def every_token(feed: Any, part: slice) -> list[int]:
        routes = feed.routes is not None and any(feed.routes)
        return list(range(part.start, part.stop)) if routes else []

    patch.setattr(context, "_routing_at", every_token)


def pooled_before_rope(patch: Patch) -> None:
    original = encoding._PassageReader.__call__

    def unrotated(self: Any, layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        out = original(self, layer, h, q, k, v)
        if layer in self.layers:
            cos, sin = self.decoder.rope(torch.arange(len(k)), k.dtype)
            keys = apply_rope(k, cos, -sin)
            _, values, routing = self.pooled.pop()
            if not self.msa.decouple_router:
                routing = self._router_keys(layer, keys)
            self.pooled.append((self._pool(keys), values, routing))
        return out

    patch.setattr(encoding._PassageReader, "__call__", unrotated)


def neighbouring_pairs_rotate(patch: Patch) -> None:
    def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        order = torch.arange(x.shape[-1]).view(half, 2).T.flatten()  # even places, then odd ones
        return apply_rope(x[..., order], cos, sin)[..., order.argsort()]

    patch.setattr(decoder_module, "apply_rope", interleaved)


def query_unrotated(patch: Patch) -> None:
    original = context._ContextAttention._ask

    def unrotated(self: Any, msa: Any, row: Any, layer: int, h: Tensor, q: Tensor) -> None:
        start = row.position - row.fed_tokens
        cos, sin = self.decoder.rope(torch.arange(start, start + len(q)), q.dtype)
        original(self, msa, row, layer, h, apply_rope(q, cos, -sin))

    patch.setattr(context._ContextAttention, "_ask", unrotated)


def remainder_divided_by_chunk(patch: Patch) -> None:
    def padded(x: Tensor, chunk: int) -> Tensor:
        short = -len(x) % chunk
        whole = torch.cat((x, x.new_zeros(short, *x.shape[1:])))
        return whole.view(-1, chunk, *x.shape[1:]).mean(1)

    patch.setattr(ops, "pool_chunks", padded)


def remainder_dropped(patch: Patch) -> None:
    original = ops.pool_chunks

    def truncated(x: Tensor, chunk: int) -> Tensor:
        return original(x[: max(len(x) // chunk, 1) * chunk], chunk)

    patch.setattr(ops, "pool_chunks", truncated)


def chunks_summed(patch: Patch) -> None:
    patch.setattr(ops, "pool_chunks", lambda x, chunk: torch.stack([part.sum(0) for part in x.split(chunk)]))


def heads_summed(patch: Patch) -> None:
    original = ops.fold_queries
    patch.setattr(ops, "fold_queries", lambda query, groups: original(query, groups) * query.shape[1])


def router_heads_interleaved(patch: Patch) -> None:
    """Query head h shares KV head h % G, not h // (H/G)."""
    original = ops.fold_queries

    def reordered(query: Tensor, groups: int) -> Tensor:
        order = torch.arange(query.shape[1]).view(-1, groups).T.flatten()
        return original(query[:, order], groups)

    patch.setattr(ops, "fold_queries", reordered)


def attention_heads_interleaved(patch: Patch) -> None:
    def tiled(x: Tensor, heads: int) -> Tensor:
        return x.repeat(heads // x.shape[0], 1, 1)

    patch.setattr(ops, "_expand", tiled)


def max_head_order(patch: Patch) -> None:
    """As above where heads are reduced with max: only the variants show it."""
    original = ops._max_over_heads

    def reordered(query: Tensor, keys: Tensor) -> Tensor:
        order = torch.arange(query.shape[1]).view(-1, keys.shape[1]).T.flatten()
        return original(query[:, order], keys)

    patch.setattr(ops, "_max_over_heads", reordered)


def selection_shared_across_layers(patch: Patch) -> None:
    original = context._ContextAttention._route

    def shared(self: Any, row: Any, layer: int, slot: int) -> None:
        original(self, row, layer, slot)
        row.selections[layer] = row.selections[self.msa.router_layers[0]]
        row._place(layer, slot, row.selections[layer])

    patch.setattr(context._ContextAttention, "_route", shared)


def one_document_too_few(patch: Patch) -> None:
    original = bank_view.BankView.select
    patch.setattr(bank_view.BankView, "select", lambda self, scores, k: original(self, scores, k - 1))


def worst_first(patch: Patch) -> None:
    original = bank_view.BankView.select

    def reversed_order(self: Any, scores: Any, k: int) -> Any:
        best = original(self, scores, k)
        return bank_view.Selection(best.numbers[::-1], best.scores[::-1])

    patch.setattr(bank_view.BankView, "select", reversed_order)


def chunks_before_tokens(patch: Patch) -> None:
    """Mean over the tokens of the best chunk's score, not the best chunk of the mean over tokens."""
    original = bank_view.BankView.score

    def score(self: Any, slot: int, query: Tensor, *, best: int | None = None) -> Any:
        if self.msa.query_reduce != "mean":
            return original(self, slot, query)
        return np.stack([original(self, slot, one[None]) for one in query]).mean(0)

    patch.setattr(bank_view.BankView, "score", score)


def chunks_meaned(patch: Patch) -> None:
    original = ops.reduce_passages
    patch.setattr(
        ops, "reduce_passages", lambda scores, lengths, reduction: original(scores, lengths, "mean")
    )


def template_head_missing(patch: Patch) -> None:
    original = cache.SequenceCache.__init__

    def without_head(self: Any, head: HeadStates, capacity: int) -> None:
        original(self, HeadStates(head.keys[:, :, :0], head.values[:, :, :0]), capacity)

    patch.setattr(cache.SequenceCache, "__init__", without_head)


def memory_in_no_layer(patch: Patch) -> None:
    patch.setattr(context.Sequence, "_place", lambda self, layer, slot, selection: None)


def chunks_weighted_by_length(patch: Patch) -> None:
    """A pooled chunk counts as one key; here a full one counts as often as it has tokens."""
    original = cache.LayerCache.set_memory

    def repeated(self: Any, keys: Tensor, values: Tensor) -> None:
        original(self, keys.repeat(1, 4, 1), values.repeat(1, 4, 1))

    patch.setattr(cache.LayerCache, "set_memory", repeated)


def decode_routes_again(patch: Patch) -> None:
    original = context._routing_at

    def always(feed: Any, part: slice) -> list[int]:
        return [part.start] if len(feed.ids) == 1 else original(feed, part)

    patch.setattr(context, "_routing_at", always)


def no_qk_norm(patch: Patch) -> None:
    original = decoder_module.SelfAttention.project

    def plain(self: Any, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_norm, k_norm, self.q_norm, self.k_norm = self.q_norm, self.k_norm, None, None
        result = original(self, h, cos, sin)
        self.q_norm, self.k_norm = q_norm, k_norm
        return result

    patch.setattr(decoder_module.SelfAttention, "project", plain)


def training_pools_detached(patch: Patch) -> None:
    """Pooled keys and values carry no gradient: only the gradients show it."""
    original = ops.pool_chunks
    patch.setattr(ops, "pool_chunks", lambda x, chunk: original(x, chunk).detach())


def training_scores_unnormalised(patch: Patch) -> None:
    original = config.MSAConfig.with_options

    def literal(self: Any, **changes: Any) -> Any:
        changes.pop("router_normalize", None)
        return original(self, router_normalize=False, **changes)

    patch.setattr(config.MSAConfig, "with_options", literal)


def positives_compete_in_eq5(patch: Patch) -> None:
    original = losses._row_loss

    def competing(scores: Tensor, positive: Tensor, method: str, *rest: Any) -> Tensor:
        return original(scores, positive, method.replace("_DECOUPLE", ""), *rest)

    patch.setattr(losses, "_row_loss", competing)


def focal_exponent_counts_positives(patch: Patch) -> None:
    original = losses._row_loss

    def counted(scores: Tensor, positive: Tensor, method: str, tau: Any, gamma: float, bias: Any) -> Tensor:
        return original(scores, positive, method, tau, float(positive.sum()), bias)

    patch.setattr(losses, "_row_loss", counted)


def labels_not_shifted(patch: Patch) -> None:
    original = losses.next_token_loss
    patch.setattr(
        losses, "next_token_loss", lambda output, rows: original(output, [[*row[1:], -100] for row in rows])
    )


def injection_is_causal(patch: Patch) -> None:
    """The reference's quirk; the README calls this one array optional."""
    original = context._ContextAttention._attend

    def causal(self: Any, feed: Any, layer: int, q: Tensor) -> Tensor:
        return original(self, context.Feed(feed.sequence, feed.ids, feed.routes), layer, q)

    patch.setattr(context._ContextAttention, "_attend", causal)


MUTATIONS: list[Callable[[Patch], None]] = [
    positions_start_at_k,
    positions_start_one_late,
    documents_do_not_restart,
    normalised_before_pooling,
    never_normalised,
    queries_not_normalised,
    normalised_as_trained,
    wrong_score_factor,
    tail_tokens_route,
    pooled_before_rope,
    neighbouring_pairs_rotate,
    query_unrotated,
    remainder_divided_by_chunk,
    remainder_dropped,
    chunks_summed,
    heads_summed,
    router_heads_interleaved,
    attention_heads_interleaved,
    max_head_order,
    selection_shared_across_layers,
    one_document_too_few,
    worst_first,
    chunks_before_tokens,
    chunks_meaned,
    template_head_missing,
    memory_in_no_layer,
    chunks_weighted_by_length,
    decode_routes_again,
    no_qk_norm,
    training_pools_detached,
    training_scores_unnormalised,
    positives_compete_in_eq5,
    focal_exponent_counts_positives,
    labels_not_shifted,
    injection_is_causal,
]


def killed_by() -> dict[str, str]:
    """Fixtures whose parity check fails, with what it says."""
    found = {}
    for fixture in FIXTURES:
        try:
            parity.check(fixture)
        except parity.ParityError as error:
            found[fixture.name] = str(error)
    return found


def test_the_unmutated_engine_passes() -> None:
    assert killed_by() == {}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_broken_rule_fails_parity(mutation: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutation(monkeypatch)
    found = killed_by()
    assert found, f"{mutation.__name__} survives: no array of any fixture differs"
    print("\n" + "\n".join(message[:240] for message in found.values()))
