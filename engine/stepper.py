"""The decoder prepared for few tokens at a time on the CPU, where every operation's fixed cost counts.

The same maths as ``Decoder`` in fewer operations: projections that read one input are joined, a layer's
keys and values enter the cache in one copy, and the weights may be packed (``packing``). Each token
attends by itself, so that with packed weights its result is the same bits whatever it is fed with.
Knows no routing: what router layers chose lies in the caches already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msa_memory.engine.cache import SequenceCache
from msa_memory.engine.context import Feed
from msa_memory.engine.context import Sequence as Row
from msa_memory.engine.decoder import Decoder, DecoderLayer
from msa_memory.engine.packing import BLOCK, LinearMap, LowRank, PlainMap, pack, pack_rows, packable

__all__ = ["Run", "Stepper", "packed_stepper", "plain_stepper"]

Run = tuple[SequenceCache, int]
"""The cache of one sequence and how many tokens are fed to it."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """Maps and norms of one layer; ``attention_norm`` and ``mlp_norm`` as ``_rms_norm`` takes them."""

    attention_norm: Tensor
    qkv: LinearMap
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: LinearMap
    mlp_norm: Tensor
    gate_up: LinearMap
    down: LinearMap

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        return (self.qkv, self.output, self.gate_up, self.down)


class Stepper:
    """All layers over one or several tokens of running sequences.

    Made by ``plain_stepper`` or ``packed_stepper``.
    """

    def __init__(self, decoder: Decoder, layers: Sequence[_Layer], head: LinearMap) -> None:
        self.decoder = decoder
        self.layers, self.head, self.norm = tuple(layers), head, _twice(decoder.model.norm.weight)
        config = decoder.config
        self.heads, self.kv_heads, self.dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.inner, self.eps = config.intermediate_size, config.rms_norm_eps
        self.scale = config.head_dim**-0.5
        self.bits = tuple(sorted({m.bits for layer in self.layers for m in layer.maps}))
        """Bits per weight of the layers."""
        maps = [head, *(m for layer in self.layers for m in layer.maps)]
        # Dynamic frequencies follow the last of all positions that are fed.
        self.rows_alike = config.rope.kind != "dynamic" and all(m.rows_alike for m in maps)
        """Whether tokens fed together give the same bits as one by one."""

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int], positions: Sequence[int], runs: Sequence[Run]) -> Tensor:
        """Final hidden states ``[N, E]`` of tokens fed to several sequences.

        Args:
            ids, positions: ``N`` tokens and their rotary positions.
            runs: the cache and the number of tokens of each sequence in turn.
        """
        x = self.decoder.model.embed_tokens.weight[torch.tensor(ids)]
        rotation = self._rotation(torch.tensor(positions), x.dtype)
        eps = self.eps
        for index, layer in enumerate(self.layers):
            mixed = self._attend(index, layer, _rms_norm(x, layer.attention_norm, eps), rotation, runs)
            x += layer.output(mixed)
            joined = layer.gate_up(_rms_norm(x, layer.mlp_norm, eps))
            gate, up = joined[:, : self.inner], joined[:, self.inner :]
            x += layer.down(F.silu(gate).mul_(up))
        return _rms_norm(x, self.norm, eps)

    def feed(self, ids: Sequence[int], position: int, cache: SequenceCache) -> Tensor:
        """Feed tokens to one sequence, the first at a rotary position: the logits after each ``[N, V]``."""
        positions = range(position, position + len(ids))
        return self.logits(self(ids, positions, [(cache, len(ids))]))

    def step(self, feeds: Sequence[Feed]) -> Sequence[Tensor]:
        """Feed tokens to several sequences together: the logits after each ``[N, V]``, by sequence.

        Their caches grow; their positions and counts are moved on by whoever takes the logits.
        """
        rows = [(feed.sequence, len(feed.ids)) for feed in feeds]
        hidden = self(
            [token for feed in feeds for token in feed.ids],
            [row.position + place for row, count in rows for place in range(count)],
            [(row.cache, count) for row, count in rows],
        )
        logits: Sequence[Tensor] = self.logits(hidden).split([count for _, count in rows])
        return logits

    def leave(self, row: Row) -> None:
        """A sequence is not stepped any more: nothing of it is held here."""

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits ``[N, V]`` in float32."""
        return self.head(hidden).float()

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factors ``[N, H+2G, D]`` of each head and of its swapped halves; those of values change nothing."""
        cos, sin = self.decoder.rope(positions, dtype)
        half = self.dim // 2
        sin = torch.cat((-sin[:, :half], sin[:, half:]), -1)
        turned, values = self.heads + self.kv_heads, (0, 0, 0, self.kv_heads)
        direct = F.pad(cos[:, None].expand(-1, turned, -1), values, value=1.0)
        return direct, F.pad(sin[:, None].expand(-1, turned, -1), values)

    def _attend(
        self, index: int, layer: _Layer, h: Tensor, rotation: tuple[Tensor, Tensor], runs: Sequence[Run]
    ) -> Tensor:
        """Attention of every token over its own past ``[N, H*D]``."""
        joined = layer.qkv(h).view(len(h), -1, self.dim)  # [N, H+2G, D]
        if layer.q_norm is not None and layer.k_norm is not None:
            self._normalise(joined, layer.q_norm, layer.k_norm)
        direct, crossed = rotation
        joined = torch.addcmul(joined * direct, joined.roll(self.dim // 2, -1), crossed)
        query = joined[:, : self.heads].unflatten(1, (self.kv_heads, -1))  # [N, G, H/G, D]
        outputs, start = [], 0
        for cache, count in runs:
            own = cache.layers[index]
            own.append_joined(joined[start : start + count, self.heads :])
            keys, values = own.view()
            for place in range(count):
                seen = keys.shape[1] - count + place + 1
                outputs.append(
                    F.scaled_dot_product_attention(
                        query[start + place, None],
                        keys[None, :, :seen],
                        values[None, :, :seen],
                        scale=self.scale,
                    )
                )
            start += count
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return mixed.flatten(1)

    def _normalise(self, joined: Tensor, q_norm: Tensor, k_norm: Tensor) -> None:
        turned = self.heads + self.kv_heads
        for part, weight in ((slice(0, self.heads), q_norm), (slice(self.heads, turned), k_norm)):
            joined[:, part] = F.rms_norm(joined[:, part], (self.dim,), weight, self.eps)


def _twice(weight: Tensor) -> Tensor:
    """A norm's weight for ``_rms_norm``."""
    return torch.cat((weight, weight))


def _rms_norm(x: Tensor, twice: Tensor, eps: float) -> Tensor:
    """RMSNorm of rows ``[N, E]`` as the LayerNorm of ``x`` beside ``-x``, with the weight ``twice`` ``[2E]``.

    That has mean 0 and the mean square as its variance, and one kernel where torch's RMSNorm has six: for a
    single token it takes half the time.
    """
    normed = F.layer_norm(torch.cat((x, -x), -1), twice.shape, twice, None, eps)
    return normed[:, : x.shape[1]].contiguous()


def plain_stepper(decoder: Decoder) -> Stepper:
    """The decoder's own weights; joined ones are moved, so that nothing is held twice."""

    def join(linears: Sequence[nn.Linear], names: Sequence[str]) -> LinearMap:
        joined = linears[0].weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
        if len(linears) > 1:
            sizes = [linear.out_features for linear in linears]
            for linear, part in zip(linears, joined.split(sizes), strict=True):
                linear.weight.data = part
        return PlainMap(joined, _bias(linears))

    return Stepper(decoder, _layers(decoder, join), PlainMap(_head(decoder)))


def packed_stepper(
    decoder: Decoder, base: Mapping[str, Tensor], changes: Mapping[str, LowRank]
) -> Stepper | None:
    """The decoder's weights packed into 4 or 8 bits; None where it is not bfloat16 or its shapes do not fit.

    Args:
        base: weights without their low-rank change, by module name; for modules that have one.
        changes: the low-rank changes that were merged into the decoder's weights, by module name.
    """
    linears = [module for module in decoder.model.layers.modules() if isinstance(module, nn.Linear)]
    if not all(packable(linear.weight) for linear in linears) or _head(decoder).shape[1] % BLOCK:
        return None

    def join(linears: Sequence[nn.Linear], names: Sequence[str]) -> LinearMap:
        merged = [linear.weight for linear in linears]
        stored = [base.get(name, weight) for name, weight in zip(names, merged, strict=True)]
        return pack(stored, merged, [changes.get(name) for name in names], _bias(linears))

    return Stepper(decoder, _layers(decoder, join), pack_rows(_head(decoder)))


Join = Callable[[Sequence[nn.Linear], Sequence[str]], LinearMap]
"""Linear layers that read one input, with their module names, as one map."""


@torch.no_grad()
def _layers(decoder: Decoder, join: Join) -> list[_Layer]:
    return [_layer(decoder, index, join) for index in range(decoder.config.num_layers)]


def _layer(decoder: Decoder, index: int, join: Join) -> _Layer:
    layer = decoder.model.layers[index]
    assert isinstance(layer, DecoderLayer)
    attention = layer.self_attn

    def joined(*modules: str) -> LinearMap:
        linears = [layer.get_submodule(module) for module in modules]
        plain = [linear for linear in linears if isinstance(linear, nn.Linear)]
        assert len(plain) == len(linears), "adapters in training are not stepped"
        return join(plain, [f"model.layers.{index}.{module}" for module in modules])

    return _Layer(
        attention_norm=_twice(layer.input_layernorm.weight),
        qkv=joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=attention.q_norm.weight if attention.q_norm is not None else None,
        k_norm=attention.k_norm.weight if attention.k_norm is not None else None,
        output=joined("self_attn.o_proj"),
        mlp_norm=_twice(layer.post_attention_layernorm.weight),
        gate_up=joined("mlp.gate_proj", "mlp.up_proj"),
        down=joined("mlp.down_proj"),
    )


def _head(decoder: Decoder) -> Tensor:
    return decoder.model.embed_tokens.weight if decoder.lm_head is None else decoder.lm_head.weight


def _bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    """All biases below each other; of joined layers either all have one or none."""
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat(biases) if biases else None
