"""What a checkpoint says about itself, as frozen values the engine can trust.

Reads Hugging Face style ``config.json`` dictionaries (GGUF files are translated to one first) for the
Llama, Qwen2 and Qwen3 families and for ``model_type: msa``. Knows no tensors and no files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from msa_memory.errors import CheckpointError, ConfigError

__all__ = ["BackboneConfig", "MSAConfig", "RopeConfig", "read_backbone", "read_msa"]

logger = logging.getLogger("msa_memory.engine")

Reduction = Literal["max", "mean", "last"]
AUX_LOSSES = ("INFONCE", "INFONCE_FOCAL", "INFONCE_DECOUPLE", "INFONCE_DECOUPLE_FOCAL", "BCE")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary embedding: base frequency ``theta`` and one of the scaling types of the three families."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """Shape of a pre-norm GQA decoder with SwiGLU, as Llama, Qwen2 and Qwen3 define it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly: "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd: rotary embedding needs an even one")

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class MSAConfig:
    """Memory Sparse Attention settings of a checkpoint (msa-spec section 2, plus this project's own).

    ``router_normalize`` scores with cosines; ``router_chunk`` pools routing keys over fewer tokens than
    K and V; ``positions`` is ``"reference"`` for the literal query start 3 + top_k, ``"head"`` for
    len(head) + top_k. ``layer_weights`` is what each router layer's scores count in a passage's relevance,
    in sum 1; empty, all count alike.
    """

    router_layers: tuple[int, ...]
    top_k: int = 16
    chunk: int = 64
    router_chunk: int = 64
    decouple_router: bool = True
    router_normalize: bool = True
    head_reduce: Reduction = "mean"
    query_reduce: Reduction = "max"
    chunk_reduce: Reduction = "max"
    aux_loss_method: str = "INFONCE_DECOUPLE"
    infonce_temperature: float = 0.1
    positions: Literal["reference", "head"] = "head"
    evidence: Literal["generative", "router"] = "router"
    layer_weights: tuple[float, ...] = ()
    loss_weights: Mapping[str, float] = field(
        default_factory=lambda: {"lm": 1.0, "aux": 0.1, "rec": 0.0, "ans": 1.0}
    )

    def __post_init__(self) -> None:
        _check_choice("head_reduce_method", self.head_reduce, ("max", "mean"))
        _check_choice("query_reduce_method", self.query_reduce, ("max", "mean", "last"))
        _check_choice("chunk_reduce_method", self.chunk_reduce, ("max", "mean"))
        _check_choice("aux_loss_method", self.aux_loss_method, AUX_LOSSES)
        for name, value in (
            ("top_k", self.top_k),
            ("chunk", self.chunk),
            ("router_chunk", self.router_chunk),
        ):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if list(self.router_layers) != sorted(set(self.router_layers)):
            raise CheckpointError(f"router layers {self.router_layers} must be distinct and ascending")
        weights = self.layer_weights
        if weights and (
            len(weights) != len(self.router_layers)
            or min(weights) < 0
            or not math.isclose(sum(weights), 1.0, abs_tol=1e-3)
        ):
            raise CheckpointError(
                f"router_layer_weights {list(weights)} must be one number of at least 0 for each of the "
                f"{len(self.router_layers)} router layers, in sum 1"
            )

    def mean_of_layers(
        self, scores: NDArray[np.float32], slots: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """The router layers' scores ``[L, ...]`` as one, weighted by ``layer_weights``.

        ``slots`` are the layers, by their place, of which ``scores`` are; all of them in order when None.
        """
        weights = np.array(self.layer_weights, dtype=np.float32)
        if slots is not None and len(weights):
            weights = weights[list(slots)] / (weights[list(slots)].sum() or 1)
        counted = weights > 0  # a masked passage scores -inf, which no weight of 0 may touch
        if not counted.any():
            mean: NDArray[np.float32] = scores.mean(axis=0)
            return mean
        total: NDArray[np.float32] = np.tensordot(weights[counted], scores[counted], axes=1)
        return total

    def score_scale(self, head_dim: int) -> float:
        """Factor on per-head router scores: 1 for decoupled cosines, else 1/sqrt(D) (msa-spec 6.2)."""
        return 1.0 if self.router_normalize and self.decouple_router else 1.0 / math.sqrt(head_dim)

    def with_options(self, **changes: Any) -> MSAConfig:
        return replace(self, **changes)


def read_backbone(config: Mapping[str, Any]) -> BackboneConfig:
    """Parse a ``config.json`` dictionary.

    Raises:
        CheckpointError: unsupported family, activation or sliding window, or a missing key.
    """
    model_type = str(config.get("model_type"))
    if model_type not in ("llama", "qwen2", "qwen3", "msa"):
        raise CheckpointError(
            f"model_type {model_type!r} is not supported; expected llama, qwen2, qwen3 or msa"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"hidden_act {activation!r} is not supported; these families use 'silu'")
    if config.get("use_sliding_window"):
        raise CheckpointError("use_sliding_window is true; sliding-window attention is not supported")
    hidden, heads = int(_need(config, "hidden_size")), int(_need(config, "num_attention_heads"))
    bias = bool(config.get("attention_bias", False))
    return BackboneConfig(
        model_type=model_type,
        vocab_size=int(_need(config, "vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(_need(config, "intermediate_size")),
        num_layers=int(_need(config, "num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_positions=int(config.get("max_position_embeddings", 2048)),
        rope=_read_rope(config),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=model_type in ("qwen3", "msa"),
        qkv_bias=model_type == "qwen2" or bias,
        output_bias=bias and model_type != "qwen2",
        mlp_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
    )


def read_msa(config: Mapping[str, Any], *, router_normalize: bool | None = None) -> MSAConfig | None:
    """Parse ``msa_config``; None when the checkpoint has no routers.

    A missing key takes the engine's default (msa-spec section 2). Without an explicit
    ``router_normalize`` a checkpoint of ``model_type: msa`` gets the reference's literal inference rule
    (cosine only when the method is exactly INFONCE), with a warning where that differs from training.
    """
    msa = config.get("msa_config")
    if msa is None:
        return None
    layers = int(_need(config, "num_hidden_layers"))
    method = str(msa.get("aux_loss_method") or "INFONCE")
    chunk = int(msa.get("pooling_kernel_size") or 64)
    normalize = router_normalize if router_normalize is not None else msa.get("router_normalize")
    if normalize is None:
        normalize = _default_normalize(str(config.get("model_type")), method)
    return MSAConfig(
        router_layers=_read_layers(msa.get("router_layer_idx"), layers),
        top_k=int(msa.get("doc_top_k") or msa.get("top_k_docs") or 16),
        chunk=chunk,
        router_chunk=int(msa.get("router_chunk") or chunk),
        decouple_router=bool(msa.get("decouple_router")),
        router_normalize=bool(normalize),
        head_reduce=msa.get("head_reduce_method") or "max",
        query_reduce=msa.get("query_reduce_method") or "max",
        chunk_reduce=msa.get("chunk_reduce_method") or "max",
        aux_loss_method=method,
        infonce_temperature=float(msa.get("infonce_loss_temp") or 0.1),
        positions=msa.get("positions") or ("reference" if config.get("model_type") == "msa" else "head"),
        evidence=msa.get("evidence") or ("generative" if config.get("model_type") == "msa" else "router"),
        layer_weights=_read_layer_weights(msa.get("router_layer_weights")),
        loss_weights={
            "lm": _weight(msa, "lmloss_weigth", 1.0),
            "aux": _weight(msa, "auxloss_weight", 0.1),
            "rec": _weight(msa, "recloss_weight", 0.0),
            "ans": _weight(msa, "ansloss_weight", 1.0),
        },
    )


def _default_normalize(model_type: str, method: str) -> bool:
    family = "INFONCE" in method
    literal = method == "INFONCE"
    if model_type != "msa":
        return family
    if family != literal:
        logger.warning(
            "this checkpoint was trained on cosine router scores (%s) but the reference engine infers with "
            "unnormalised ones; following the reference. Set router_normalize=True in msa_config (or "
            "MemoryConfig.router_normalize) to score with cosines.",
            method,
        )
    return literal


def _weight(msa: Mapping[str, Any], key: str, default: float) -> float:
    value = msa.get(key)
    return default if value is None else float(value)


def _read_layers(value: Any, num_layers: int) -> tuple[int, ...]:
    if value is None or value == "all":
        return tuple(range(num_layers))
    parts = value.split(",") if isinstance(value, str) else value
    try:
        layers = tuple(sorted({int(part) for part in parts}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"router_layer_idx {value!r} is neither 'all' nor a comma-separated list of layer numbers"
        ) from error
    if not layers or layers[0] < 0 or layers[-1] >= num_layers:
        raise CheckpointError(f"router_layer_idx {value!r} names layers outside 0..{num_layers - 1}")
    return layers


def _read_layer_weights(value: Any) -> tuple[float, ...]:
    try:
        return tuple(float(weight) for weight in value or ())
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"router_layer_weights {value!r:.80} is not a list of numbers") from error


def _read_rope(config: Mapping[str, Any]) -> RopeConfig:
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"rope type {kind!r} is not supported; expected one of {', '.join(ROPE_TYPES)}")
    limit = int(config.get("max_position_embeddings", 2048))
    original = scaling.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    factor = scaling.get("factor")
    if factor is None:
        factor = limit / original if original and kind == "yarn" else 1.0
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=float(factor),
        original_max_positions=limit if kind == "dynamic" else int(original or limit),
        low_freq_factor=float(scaling.get("low_freq_factor") or 1.0),
        high_freq_factor=float(scaling.get("high_freq_factor") or 4.0),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=scaling.get("attention_factor"),
        mscale=scaling.get("mscale"),
        mscale_all_dim=scaling.get("mscale_all_dim"),
        truncate=bool(scaling.get("truncate", True)),
    )


def _need(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"config.json has no {key!r}; the checkpoint is incomplete")
    return value


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise CheckpointError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
