"""Adding memory routers to a checkpoint: any Llama, Qwen2 or Qwen3 model becomes a memory model.

Writes the format of the published MSA checkpoints (msa-spec sections 1 and 2) with every setting spelt
out. New router projections are random: they choose usefully only after training. Knows files and names;
the maths is the decoder's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from msa_memory.engine.checkpoint import DEFAULT_SHARD_BYTES, Checkpoint, open_checkpoint, write_checkpoint
from msa_memory.engine.config import BackboneConfig, MSAConfig, read_backbone, read_msa
from msa_memory.engine.layout import read_layout
from msa_memory.engine.models import resolve
from msa_memory.errors import CheckpointError, ConfigError

__all__ = ["convert"]

DEFAULT_INITIAL_BIAS = -20.0


def convert(
    source: str | Path,
    target: str | Path,
    *,
    router_layers: Sequence[int] | Literal["all", "upper"] = "upper",
    top_k: int = 16,
    chunk: int = 64,
    router_chunk: int | None = None,
    decouple_router: bool = True,
    router_normalize: bool | None = None,
    head_reduce: str = "mean",
    query_reduce: str = "max",
    chunk_reduce: str = "max",
    aux_loss_method: str = "INFONCE_DECOUPLE",
    temperature: float = 0.1,
    evidence: Literal["router", "generative"] = "router",
    layout: Mapping[str, str] | None = None,
    seed: int = 0,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write ``source`` with memory routers to the folder ``target`` and return it.

    A Qwen3 model becomes ``model_type: msa``, as published MSA checkpoints are; Llama and Qwen2 keep theirs.
    The same ``seed`` always gives the same routers. Weights keep their stored dtype.

    Args:
        source: folder, GGUF file, registered model name or hub id.
        router_layers: 0-based layers that route and hold memory; ``"upper"`` is the upper half.
        top_k: passages each router layer chooses.
        chunk: tokens pooled into one key and value.
        router_chunk: tokens pooled into one routing key; ``chunk`` when None.
        decouple_router: route with projections of their own; otherwise with the attention's q and k.
        router_normalize: score with cosines; when None, as the loss method trains (INFONCE family: yes).
        temperature: of the auxiliary loss.
        evidence: ``"generative"`` for models that will name documents as they generate: the published
            prompt strings and positions. ``"router"`` keeps this engine's.
        layout: prompt strings that differ from those, by their names in ``Layout``.

    Raises:
        ConfigError: a setting is out of range.
        CheckpointError: ``source`` already has routers, or is no supported checkpoint.
        ConflictError: ``target`` is not empty and ``overwrite`` is false.
    """
    checkpoint = open_checkpoint(resolve(source))
    if checkpoint.config.get("msa_config") is not None:
        raise CheckpointError(
            f"{checkpoint.path} already has memory routers (msa_config); convert the model it came from"
        )
    backbone = read_backbone(checkpoint.config)
    settings = {
        "router_layer_idx": _layer_list(router_layers, backbone.num_layers),
        "top_k_docs": top_k,
        "pooling_kernel_size": chunk,
        "router_chunk": chunk if router_chunk is None else router_chunk,
        "decouple_router": decouple_router,
        "router_normalize": "INFONCE" in aux_loss_method if router_normalize is None else router_normalize,
        "head_reduce_method": head_reduce,
        "query_reduce_method": query_reduce,
        "chunk_reduce_method": chunk_reduce,
        "decouple_pooling_mode": "mean",
        "aux_loss_method": aux_loss_method,
        "infonce_loss_temp": temperature,
        "aux_loss": True,
        "rewrite_position": True,
        "lmloss_weigth": 1.0,
        "auxloss_weight": 0.1,
        "recloss_weight": 0.0,
        "ansloss_weight": 1.0,
        **_conventions(evidence, layout),
    }
    _check_positive(top_k=top_k, chunk=chunk, router_chunk=settings["router_chunk"], temperature=temperature)
    config = _config(checkpoint.config, backbone, settings)
    msa = read_msa(config)
    assert msa is not None
    tensors = _with_routers(checkpoint, backbone, msa, seed)
    target = Path(target)
    write_checkpoint(
        target,
        config,
        tensors,
        tokenizer_files=checkpoint.tokenizer_files(),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )
    return target


def _layer_list(layers: Sequence[int] | str, num_layers: int) -> str:
    if layers == "all":
        chosen = list(range(num_layers))
    elif layers == "upper":
        chosen = list(range(num_layers // 2, num_layers))
    elif isinstance(layers, str):
        raise ConfigError(f"router_layers is {layers!r}; expected 'all', 'upper' or layer numbers")
    else:
        chosen = sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_layers:
        raise ConfigError(f"router_layers {chosen} are not all within 0..{num_layers - 1}, or there are none")
    return ",".join(map(str, chosen))


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{name} is {value}; it must be above 0")


def _conventions(evidence: str, layout: Mapping[str, str] | None) -> dict[str, Any]:
    """Positions, evidence and prompt strings: those of published MSA models or this engine's own."""
    if evidence not in ("router", "generative"):
        raise ConfigError(f"evidence is {evidence!r}; expected 'router' or 'generative'")
    family = "msa" if evidence == "generative" else "llama"
    strings = read_layout({"model_type": family, "msa_config": {"layout": dict(layout or {})}})
    positions = "reference" if evidence == "generative" else "head"
    return {"positions": positions, "evidence": evidence, "layout": strings.as_dict()}


def _config(
    source: Mapping[str, Any], backbone: BackboneConfig, settings: Mapping[str, Any]
) -> dict[str, Any]:
    config = {**source, "msa_config": dict(settings)}
    if backbone.model_type == "qwen3":
        config |= {"model_type": "msa", "architectures": ["MSAForCausalLM"]}
        # The published engine reads rope settings where transformers 4 keeps them.
        rope = source.get("rope_parameters") or {}
        config.setdefault("rope_theta", backbone.rope.theta)
        if backbone.rope.kind != "default" and rope:
            config.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
    return config


def _with_routers(
    checkpoint: Checkpoint, backbone: BackboneConfig, msa: MSAConfig, seed: int
) -> dict[str, Tensor]:
    tensors = dict(checkpoint.tensors())
    if backbone.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if "INFONCE" in msa.aux_loss_method:
        tensors["temperature"] = torch.tensor(msa.infonce_temperature)
    else:
        tensors["b"] = torch.tensor(DEFAULT_INITIAL_BIAS)
    if msa.decouple_router:
        random = torch.Generator().manual_seed(seed)
        for layer in msa.router_layers:
            prefix = f"model.layers.{layer}.self_attn"
            like = tensors.get(f"{prefix}.k_proj.weight")
            if like is None:
                raise CheckpointError(f"{checkpoint.path} lacks the tensor {prefix}.k_proj.weight")
            query, key = _random_router(backbone, random)
            tensors[f"{prefix}.router_q_proj.0.weight"] = query.to(like.dtype)
            tensors[f"{prefix}.router_k_proj.0.weight"] = key.to(like.dtype)
    return tensors


def _random_router(backbone: BackboneConfig, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """``router_q_proj`` ``[H*D, E]`` and ``router_k_proj`` ``[G*D, E]``.

    Every query head starts as its KV head's twin, so untrained scores are a random-projection similarity
    of hidden states and not noise.
    """
    shape = (backbone.num_kv_heads, backbone.head_dim, backbone.hidden_size)
    key = torch.randn(shape, generator=random) * backbone.hidden_size**-0.5
    return key.repeat_interleave(backbone.group_size, dim=0).flatten(0, 1), key.flatten(0, 1)
