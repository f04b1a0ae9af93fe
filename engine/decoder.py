"""The decoder: Llama, Qwen2 and Qwen3 layers over a flat run of tokens, with optional router projections.

Knows weights and per-token maths. It does not know who may see whom: each layer hands its queries, keys
and values to an ``Attention strategy`` (documents alone, a question over its memory, a packed training
row), so one forward serves encoding, prefill, decode and training. Tokens of several sequences travel
concatenated; only the strategy knows where one ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msa_memory.engine import ops
from msa_memory.engine.config import BackboneConfig, MSAConfig
from msa_memory.engine.rope import Rope, apply_rope
from msa_memory.errors import CheckpointError

__all__ = ["Attend", "Decoder", "DecoderLayer", "SelfAttention"]

Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor | None]
"""(layer index, normed input [N, E], q [N, H, D], k [N, G, D], v [N, G, D]) -> [N, H, D], or None to stop."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Projections of one layer; tensor names are those of the Hugging Face checkpoints."""

    def __init__(self, config: BackboneConfig, *, router: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        size, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, size, bias=config.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.router_q_proj: nn.Sequential | None = None
        self.router_k_proj: nn.Sequential | None = None
        if router:
            self.router_q_proj = nn.Sequential(nn.Linear(size, self.heads * self.head_dim, bias=False))
            self.router_k_proj = nn.Sequential(nn.Linear(size, self.kv_heads * self.head_dim, bias=False))

    def project(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[N, H, D]`` and keys ``[N, G, D]`` after norm and RoPE, and values ``[N, G, D]``."""
        q = self.q_proj(h).view(-1, self.heads, self.head_dim)
        k = self.k_proj(h).view(-1, self.kv_heads, self.head_dim)
        v = self.v_proj(h).view(-1, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def router_query(self, h: Tensor) -> Tensor:
        """Decoupled router queries ``[N, H, D]``: no norm, no position."""
        assert self.router_q_proj is not None
        out: Tensor = self.router_q_proj(h)
        return out.view(-1, self.heads, self.head_dim)

    def router_key(self, h: Tensor) -> Tensor:
        """Decoupled router keys ``[N, G, D]``: no norm, no position, linear in ``h``."""
        assert self.router_k_proj is not None
        out: Tensor = self.router_k_proj(h)
        return out.view(-1, self.kv_heads, self.head_dim)


class MLP(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: BackboneConfig, *, router: bool) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, router=router)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, index: int, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor | None:
        h = self.input_layernorm(x)
        mixed = attend(index, h, *self.self_attn.project(h, *rotation))
        if mixed is None:
            return None
        x = x + self.self_attn.o_proj(mixed.flatten(1))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Model(nn.Module):
    def __init__(self, config: BackboneConfig, router_layers: frozenset[int]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, router=index in router_layers) for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model with router projections on the layers ``msa`` names (if decoupled)."""

    def __init__(self, config: BackboneConfig, msa: MSAConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.msa = msa
        routed = frozenset(msa.router_layers) if msa is not None and msa.decouple_router else frozenset()
        self.model = _Model(config, routed)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = Rope(config.rope, config.head_dim)
        self.recompute = False

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def attention(self, layer: int) -> SelfAttention:
        """The projections of one layer."""
        found = self.model.layers[layer]
        assert isinstance(found, DecoderLayer)
        return found.self_attn

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor | None:
        """Run all layers over a flat run of tokens.

        Args:
            ids: ``[N]`` token ids of one or several sequences, concatenated.
            positions: ``[N]`` rotary positions.
            attend: the attention strategy, called once per layer in order.

        Returns:
            Final hidden states after the last norm ``[N, E]``; None when the strategy stopped early.
        """
        x = self.model.embed_tokens(ids)
        rotation = self.rope(positions, x.dtype)
        for index, layer in enumerate(self.model.layers):
            if self.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(layer, index, x, rotation, attend, use_reentrant=False)
            else:
                x = layer(index, x, rotation, attend)
            if x is None:
                return None
        out: Tensor = self.model.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits ``[N, V]`` in float32 for final hidden states ``[N, E]``."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden, weight).float()

    def load(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Copy checkpoint tensors in, by name; ``temperature`` and ``b`` are training-only and skipped.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape.
        """
        targets = dict(self.named_parameters())
        seen: set[str] = set()
        for name, tensor in tensors:
            if name in ("temperature", "b") or (name == "lm_head.weight" and self.lm_head is None):
                continue
            if name.endswith("rotary_emb.inv_freq"):
                continue
            target = targets.get(name)
            if target is None:
                raise CheckpointError(
                    f"checkpoint tensor {name!r} has no place in a {self.config.model_type} model"
                )
            if target.shape != tensor.shape:
                raise CheckpointError(
                    f"checkpoint tensor {name!r} has shape {tuple(tensor.shape)}, "
                    f"config.json implies {tuple(target.shape)}"
                )
            with torch.no_grad():
                target.copy_(tensor)
            seen.add(name)
        missing = sorted(name for name in targets if name not in seen)
        if missing:
            raise CheckpointError(
                f"checkpoint lacks {len(missing)} tensors, the first is {missing[0]!r}; "
                "the files are incomplete or belong to another config.json"
            )
