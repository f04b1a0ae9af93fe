"""The decoder computes what transformers computes, for every family and rope type we read.

Each test saves a tiny random transformers model and opens the folder with the engine's own reader.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.checkpoint import open_checkpoint, write_checkpoint
from msa_memory.engine.config import MSAConfig, read_backbone
from msa_memory.engine.context import Feed, Sequence, advance
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.encoding import encode_head
from msa_memory.engine.models import DEFAULT_MODEL, resolve
from msa_memory.errors import CheckpointError

VOCAB = 173
TOLERANCE = 1e-4
LIMIT = 64  # max_position_embeddings: prompts here are longer than what scaled ropes were trained on


def reference(family: str, **options: Any) -> Any:
    """A tiny random transformers model whose norms and biases are random too."""
    import transformers

    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": LIMIT,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.15,
        "attn_implementation": "eager",
    }
    if family == "qwen3":
        settings["head_dim"] = 16  # not hidden / heads
    config = getattr(transformers, f"{kind}Config")(**{**settings, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros, which hide mistakes
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def engine_model(folder: Path) -> Decoder:
    checkpoint = open_checkpoint(folder)
    decoder = Decoder(read_backbone(checkpoint.config))
    decoder.load(checkpoint.tensors())
    return decoder.eval()


@torch.inference_mode()
def engine_logits(decoder: Decoder, ids: list[int]) -> Tensor:
    """Logits ``[T, V]`` of plain causal attention."""

    def attend(layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attend(q, k.transpose(0, 1), v.transpose(0, 1), decoder.config.head_dim**-0.5)

    hidden = decoder(torch.tensor(ids), torch.arange(len(ids)), attend)
    assert hidden is not None
    return decoder.logits(hidden)


@torch.inference_mode()
def reference_logits(model: Any, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def some_ids(length: int, vocab: int = VOCAB) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 20000.0, **options}}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", rope("default")),
    "llama tied": ("llama", {**rope("default"), "tie_word_embeddings": True}),
    "llama head_dim": ("llama", {**rope("default"), "head_dim": 20}),
    "llama attention bias": ("llama", {**rope("default"), "attention_bias": True}),
    "llama mlp bias": ("llama", {**rope("default"), "mlp_bias": True, "attention_bias": True}),
    "llama one head each": ("llama", {**rope("default"), "num_key_value_heads": 6}),
    "llama linear": ("llama", rope("linear", factor=4.0)),
    "llama dynamic": ("llama", rope("dynamic", factor=4.0)),
    "llama llama3": ("llama", rope("llama3", **LLAMA3)),
    "llama yarn": ("llama", rope("yarn", **YARN)),
    "llama yarn mscale": ("llama", rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.2)),
    "llama yarn attention_factor": ("llama", rope("yarn", **YARN, attention_factor=1.3)),
    "llama yarn betas": ("llama", rope("yarn", **YARN, beta_fast=16.0, beta_slow=2.0, truncate=False)),
    "qwen2": ("qwen2", rope("default")),
    "qwen2 tied": ("qwen2", {**rope("default"), "tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", rope("yarn", **YARN)),
    "qwen3": ("qwen3", rope("default")),
    "qwen3 tied": ("qwen3", {**rope("default"), "tie_word_embeddings": True}),
    "qwen3 attention bias": ("qwen3", {**rope("default"), "attention_bias": True}),
    "qwen3 yarn": ("qwen3", rope("yarn", **YARN)),
    "qwen3 dynamic": ("qwen3", rope("dynamic", factor=2.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    model = reference(family, **options)
    model.save_pretrained(tmp_path)
    decoder = engine_model(tmp_path)
    for length in (1, 2, 40, LIMIT, 2 * LIMIT + 1):
        ids = some_ids(length)
        expected = reference_logits(model, ids)
        assert expected.abs().max() > 0.5  # else anything would pass
        assert (engine_logits(decoder, ids) - expected).abs().max() < TOLERANCE, length


@pytest.mark.parametrize("case", ["llama llama3", "qwen2", "qwen3 yarn"])
def test_sharded_checkpoints_and_old_rope_keys_read_the_same(case: str, tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling side by side, the type as "type" or "rope_type"."""
    family, options = CASES[case]
    model = reference(family, **options)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = some_ids(LIMIT)
    expected = reference_logits(model, ids)
    assert (engine_logits(engine_model(tmp_path), ids) - expected).abs().max() < TOLERANCE
    checkpoint = open_checkpoint(tmp_path)
    config = {key: value for key, value in checkpoint.config.items() if key != "rope_parameters"}
    scaling = dict(options["rope_parameters"])
    config["rope_theta"] = scaling.pop("rope_theta")
    if scaling["rope_type"] != "default":
        config["rope_scaling"] = {("type" if k == "rope_type" else k): v for k, v in scaling.items()}
    write_checkpoint(tmp_path / "old", config, dict(checkpoint.tensors()))
    assert (engine_logits(engine_model(tmp_path / "old"), ids) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_prefill_and_decode_are_a_plain_causal_model(family: str, tmp_path: Path) -> None:
    """The paths that answer questions, here without memory: head, prompt, then token by token."""
    model = reference(family, **rope("default"))
    model.save_pretrained(tmp_path)
    decoder = engine_model(tmp_path)
    head, prompt, answer = some_ids(3), some_ids(17), some_ids(12)
    expected = reference_logits(model, head + prompt + answer)
    states = encode_head(decoder, head)
    row = Sequence.start(decoder, states, position=3, view=None, top_k=1, capacity=2)
    for end, ids in [(20, prompt), *((21 + n, [token]) for n, token in enumerate(answer))]:
        logits = advance(decoder, [Feed(row, ids)])[0]
        assert (logits - expected[end - 1]).abs().max() < TOLERANCE


def test_smollm2_is_what_transformers_makes_of_the_same_folder() -> None:
    import transformers

    folder = resolve(DEFAULT_MODEL)
    torch.set_num_threads(2)
    decoder = engine_model(folder)
    ids = some_ids(300, decoder.config.vocab_size)
    found = engine_logits(decoder, ids)
    del decoder
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = reference_logits(model, ids)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (found - expected).abs().max() < TOLERANCE


class TestLoading:
    def tensors(self, **options: Any) -> tuple[Decoder, dict[str, Tensor]]:
        model = reference("llama", **rope("default"), **options)
        config = {**model.config.to_dict(), "model_type": "llama"}
        return Decoder(read_backbone(config)), dict(model.state_dict())

    def test_training_scalars_and_tied_heads_are_left_out(self) -> None:
        decoder, tensors = self.tensors(tie_word_embeddings=True)
        extra = {"temperature": torch.tensor(0.1), "b": torch.tensor(-20.0)}
        decoder.load(iter({**tensors, **extra}.items()))
        assert "lm_head.weight" in tensors

    def test_missing_unknown_and_misshapen_tensors_are_named(self) -> None:
        decoder, tensors = self.tensors()
        gone = {name: t for name, t in tensors.items() if name != "model.norm.weight"}
        with pytest.raises(CheckpointError, match=r"lacks 1 tensors, the first is 'model\.norm\.weight'"):
            decoder.load(iter(gone.items()))
        with pytest.raises(CheckpointError, match=r"'model\.extra' has no place in a llama model"):
            decoder.load(iter({**tensors, "model.extra": torch.zeros(1)}.items()))
        with pytest.raises(CheckpointError, match=r"shape \(1,\), config\.json implies \(48,\)"):
            decoder.load(iter({**tensors, "model.norm.weight": torch.zeros(1)}.items()))

    @pytest.mark.parametrize("decouple", [True, False])
    def test_router_projections_exist_on_router_layers_only(self, decouple: bool) -> None:
        backbone = self.tensors()[0].config
        decoder = Decoder(backbone, MSAConfig(router_layers=(0, 2), decouple_router=decouple))
        found = {name for name, _ in decoder.named_parameters() if "router" in name}
        expected = {
            f"model.layers.{layer}.self_attn.router_{part}_proj.0.weight"
            for layer in (0, 2)
            for part in ("q", "k")
        }
        assert found == (expected if decouple else set())
