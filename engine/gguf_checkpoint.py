"""GGUF files read as Hugging Face checkpoints: config, tensor names and layouts, tokenizer.

Covers the Llama, Qwen2 and Qwen3 architectures. Quantised tensors come out as float32. Metadata keys and
tensor names follow https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Knows nothing of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, TokenType, dequantize

from msa_memory.engine.tokenizer import Tokenizer
from msa_memory.errors import CheckpointError

__all__ = ["GGUFFile", "read_tokenizer"]

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_LLAMA3_ORIGINAL_POSITIONS = 8192


class GGUFFile:
    """One open GGUF file.

    Raises:
        CheckpointError: not a GGUF file, truncated, or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self._reader = GGUFReader(self.path)
        except Exception as error:  # the parser fails in many ways on damaged input
            raise CheckpointError(
                f"{self.path} is not a complete GGUF file ({type(error).__name__}: {error}); "
                "download it again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self.value("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.path} holds a {self.architecture!r} model; expected one of {', '.join(ARCHITECTURES)}"
            )

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python object."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def setting(self, key: str, default: Any = None) -> Any:
        """A metadata value of this architecture, such as ``attention.head_count``."""
        return self.value(f"{self.architecture}.{key}", default)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The file's metadata as a Hugging Face ``config.json``."""
        if self.setting("expert_count"):
            raise CheckpointError(f"{self.path} holds a mixture of experts, which is not supported")
        config: dict[str, Any] = {"model_type": self.architecture, "hidden_act": "silu"}
        config |= {name: int(self._need(key)) for key, name in _CONFIG_KEYS.items()}
        heads = config["num_attention_heads"]
        config |= {
            "num_key_value_heads": int(self.setting("attention.head_count_kv", heads)),
            "head_dim": int(self.setting("attention.key_length", config["hidden_size"] // heads)),
            "rms_norm_eps": _short_float(self._need("attention.layer_norm_rms_epsilon")),
            "rope_theta": _short_float(self.setting("rope.freq_base", 10000.0)),
            "vocab_size": int(self._need_tensor("token_embd.weight").shape[-1]),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "torch_dtype": "float32",
        }
        config["rope_scaling"] = self._rope_scaling(config)
        for role in ("bos", "eos"):
            config[f"{role}_token_id"] = self.value(f"tokenizer.ggml.{role}_token_id")
        return config

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors one by one under their Hugging Face names, as float32."""
        for name in self._tensors:
            if name != "rope_freqs.weight":  # part of the config
                yield _hf_name(name, self.path), self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        stored = self._tensors[name]
        try:
            array = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} is quantised as {stored.tensor_type.name}, which the gguf "
                "package cannot expand; use a Q4_0 to Q8_0, K-quant, F16 or BF16 file"
            ) from error
        tensor = torch.from_numpy(np.array(array, dtype=np.float32))
        if self.architecture == "llama" and ".attn_q." in name:
            return _to_half_split(tensor, self.config["num_attention_heads"])
        if self.architecture == "llama" and ".attn_k." in name:
            return _to_half_split(tensor, self.config["num_key_value_heads"])
        return tensor

    def _rope_scaling(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        if "rope_freqs.weight" in self._tensors:
            return self._llama3_scaling(config)
        kind = self.setting("rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise CheckpointError(
                f"{self.path} scales its positions by {kind!r}; expected none, linear or yarn"
            )
        scaling: dict[str, Any] = {
            "rope_type": kind,
            "factor": _short_float(self._need("rope.scaling.factor")),
        }
        original = self.setting("rope.scaling.original_context_length")
        if original is not None:
            scaling["original_max_position_embeddings"] = int(original)
        return scaling

    def _llama3_scaling(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Llama 3.1's scaling in its published form; GGUF keeps it as one divisor per frequency."""
        stored = self._read("rope_freqs.weight").double()
        factor = round(float(stored.max()), 4)
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": _LLAMA3_ORIGINAL_POSITIONS,
        }
        expected = _llama3_divisors(config["rope_theta"], config["head_dim"], factor)
        if expected.shape != stored.shape or not torch.allclose(expected, stored, rtol=1e-3):
            raise CheckpointError(
                f"{self.path}: rope_freqs.weight is not the Llama 3.1 scaling; not supported"
            )
        return scaling

    def _need(self, key: str) -> Any:
        value = self.setting(key)
        if value is None or isinstance(value, list):
            raise CheckpointError(f"{self.path}: {self.architecture}.{key} is {value!r}; expected one number")
        return value

    def _need_tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}; the file is not a whole model")
        return self._tensors[name]


def read_tokenizer(source: Path | GGUFFile) -> Tokenizer:
    """The tokenizer inside a GGUF file.

    Raises:
        CheckpointError: a tokenizer model or pre-tokenizer this reader does not know.
    """
    file = source if isinstance(source, GGUFFile) else GGUFFile(source)
    kind = file.value("tokenizer.ggml.model")
    tokens = file.value("tokenizer.ggml.tokens")
    if tokens is None:
        raise CheckpointError(f"{file.path} holds no tokenizer (tokenizer.ggml.tokens is missing)")
    types = file.value("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if kind == "gpt2":
        spec = _byte_level_spec(file, tokens)
    elif kind == "llama":
        spec = _sentencepiece_spec(file, tokens, types)
    else:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.model is {kind!r}; expected 'gpt2' or 'llama'")
    spec["added_tokens"] = _added_tokens(tokens, types)
    return Tokenizer(
        spec,
        chat_template=file.value("tokenizer.chat_template"),
        special_tokens=_special_tokens(file, tokens),
        stop_ids=_stop_ids(file),
    )


def _to_half_split(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's interleaved RoPE rows of a Llama projection [heads * D, ...], pair by pair, per head."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def _hf_name(name: str, path: Path) -> str:
    stem, _, kind = name.rpartition(".")
    block, _, part = stem.partition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    layer, _, part = part.partition(".")
    if block == "blk" and part in _LAYER_NAMES:
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    raise CheckpointError(f"{path} has a tensor {name} that no Llama, Qwen2 or Qwen3 model has")


def _short_float(value: float) -> float:
    """The decimal a float32 was written from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _llama3_divisors(theta: float, head_dim: int, factor: float) -> torch.Tensor:
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = _LLAMA3_ORIGINAL_POSITIONS * frequencies / (2 * math.pi)
    smooth = ((turns - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


# The published regular expressions of the tokenizers that llama.cpp names in tokenizer.ggml.pre.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2_SPLIT = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"


def _bytes_step(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


def _split_then_bytes(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _bytes_step(use_regex=False)]}


_DIGITS = {"type": "Digits", "individual_digits": True}
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "default": _bytes_step(use_regex=True),
    "gpt-2": _bytes_step(use_regex=True),
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _bytes_step(use_regex=True)]},
    "llama-bpe": _split_then_bytes(_LLAMA3_SPLIT),
    "llama3": _split_then_bytes(_LLAMA3_SPLIT),
    "qwen2": _split_then_bytes(_QWEN2_SPLIT),
}


def _byte_level_spec(file: GGUFFile, tokens: Sequence[str]) -> dict[str, Any]:
    pre = file.value("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre is {pre!r}; expected one of {', '.join(_PRE_TOKENIZERS)}. "
            "Use the checkpoint's safetensors folder, which carries its own tokenizer.json"
        )
    merges = [merge.split(" ", 1) for merge in file.value("tokenizer.ggml.merges") or ()]
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "decoder": _bytes_step(use_regex=True),
        "model": _bpe(tokens, merges, ignore_merges=pre in ("llama-bpe", "llama3")),
    }


def _sentencepiece_spec(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    scores = file.value("tokenizer.ggml.scores")
    if scores is None:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.scores is missing, so its merges are unknown")
    prefix = bool(file.value("tokenizer.ggml.add_space_prefix", True))
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    merges = _merges_from_scores(tokens, types, scores)
    return {
        "version": "1.0",
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}] * prefix + [from_space],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}] + [strip] * prefix,
        },
        "model": {**_bpe(tokens, merges), "unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
    }


def _bpe(
    tokens: Sequence[str], merges: Sequence[Sequence[str]], *, ignore_merges: bool = False
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": list(merges),
        "ignore_merges": ignore_merges,
        "byte_fallback": False,
    }


def _merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
    """Every way to build a piece from two others, best-scored piece first, as SentencePiece merges."""
    ranks = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind == TokenType.NORMAL}
    found = []
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ranks and right in ranks:
                found.append((-scores[rank], ranks[left], ranks[right], [left, right]))
    return [merge for *_, merge in sorted(found, key=lambda entry: entry[:3])]


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    added = []
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            added.append({"id": i, "content": text, **flags, "special": kind != TokenType.USER_DEFINED})
    return added


def _special_tokens(file: GGUFFile, tokens: Sequence[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: file.value(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}


def _stop_ids(file: GGUFFile) -> list[int]:
    ids = [file.value(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    return [i for i in ids if i is not None]
