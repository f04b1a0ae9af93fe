"""A tiny memory model for tests: deterministic, made on the spot, nothing to download.

It retrieves by shared words (its routers compare random projections of token embeddings) and answers
with repeatable nonsense: assert on sources, counts and flags, not on the answer's wording. Its BPE
vocabulary was learned from *The Wonderful Wizard of Oz* (public domain).
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msa_memory.config import cache_folder

if TYPE_CHECKING:
    from torch import Tensor

    from msa_memory.memory import MemoryModel

__all__ = ["open_memory", "tiny_model"]

VERSION = 1
_HIDDEN, _LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM, _INNER = 128, 4, 4, 2, 32, 160
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MSA_CONFIG: dict[str, Any] = {
    "router_layer_idx": "1,3",
    "top_k_docs": 4,
    "pooling_kernel_size": 16,
    "router_chunk": 8,
    "decouple_router": True,
    "router_normalize": True,
    "head_reduce_method": "mean",
    "query_reduce_method": "mean",
    "chunk_reduce_method": "max",
    "aux_loss_method": "INFONCE_DECOUPLE",
}


def tiny_model(folder: str | Path | None = None) -> Path:
    """The tiny model's checkpoint folder, written on first use (about 3 MB).

    Args:
        folder: where to write it; a folder in the user's cache when None.
    """
    from msa_memory.engine.checkpoint import write_checkpoint

    target = Path(folder) if folder is not None else cache_folder() / f"testing-{VERSION}"
    if not (target / "config.json").is_file():
        tokenizer = (files("msa_memory") / "testing_tokenizer.json").read_bytes()
        settings = {"eos_token": "<|im_end|>", "chat_template": _TEMPLATE}
        write_checkpoint(
            target,
            _config(len(json.loads(tokenizer)["model"]["vocab"])),
            _weights(len(json.loads(tokenizer)["model"]["vocab"])),
            tokenizer_files={
                "tokenizer.json": tokenizer,
                "tokenizer_config.json": json.dumps(settings).encode(),
            },
            overwrite=True,
        )
    return target


def open_memory(path: str | Path | None = None, **options: Any) -> MemoryModel:
    """``MemoryModel.open`` with the tiny model; takes the same options."""
    from msa_memory.memory import MemoryModel

    return MemoryModel.open(path, **{"model": tiny_model(), "device": "cpu", **options})


def _config(vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "msa_config": _MSA_CONFIG,
    }


def _weights(vocabulary: int) -> dict[str, Tensor]:
    """Large embeddings and small everything else: hidden states keep the identity of their token."""
    import torch

    random = torch.Generator().manual_seed(VERSION)

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=random) * scale

    queries, keys = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
    weights = {
        "model.embed_tokens.weight": draw(vocabulary, _HIDDEN, scale=1.0),
        "model.norm.weight": torch.ones(_HIDDEN),
        "lm_head.weight": draw(vocabulary, _HIDDEN, scale=1.0),
    }
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": torch.ones(_HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(_HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": draw(queries, _HIDDEN, scale=0.05),
            f"{prefix}.self_attn.k_proj.weight": draw(keys, _HIDDEN, scale=0.05),
            f"{prefix}.self_attn.v_proj.weight": draw(keys, _HIDDEN, scale=0.05),
            f"{prefix}.self_attn.o_proj.weight": draw(_HIDDEN, queries, scale=0.05),
            f"{prefix}.mlp.gate_proj.weight": draw(_INNER, _HIDDEN, scale=0.05),
            f"{prefix}.mlp.up_proj.weight": draw(_INNER, _HIDDEN, scale=0.05),
            f"{prefix}.mlp.down_proj.weight": draw(_HIDDEN, _INNER, scale=0.05),
        }
        if str(layer) in _MSA_CONFIG["router_layer_idx"].split(","):
            key = draw(_KV_HEADS, _HEAD_DIM, _HIDDEN, scale=_HIDDEN**-0.5)
            twin = key.repeat_interleave(_HEADS // _KV_HEADS, dim=0)
            weights[f"{prefix}.self_attn.router_k_proj.0.weight"] = key.flatten(0, 1)
            weights[f"{prefix}.self_attn.router_q_proj.0.weight"] = twin.flatten(0, 1)
    return weights
