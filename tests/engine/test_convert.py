"""Converted checkpoints: the source's weights, new routers, every setting spelt out and read back."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msa_memory.engine import ops
from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.checkpoint import open_checkpoint, write_checkpoint
from msa_memory.engine.config import MSAConfig, read_backbone, read_msa
from msa_memory.engine.context import Feed, Sequence, advance
from msa_memory.engine.convert import convert
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.encoding import encode_head, encode_passage
from msa_memory.engine.layout import Layout, read_layout
from msa_memory.errors import CheckpointError, ConfigError, ConflictError

VOCAB = 120
ROUTERS = {f"model.layers.{layer}.self_attn.router_{part}_proj.0.weight" for layer in (2, 3) for part in "qk"}
FAMILIES = ["llama", "qwen2", "qwen3"]


def source(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A tiny random checkpoint written by transformers."""
    import transformers

    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    saving = {key: options.pop(key) for key in ("max_shard_size",) if key in options}
    head_dim = {"head_dim": 16} if family == "qwen3" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        **{**head_dim, **options},
    )
    torch.manual_seed(1)
    getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).save_pretrained(folder, **saving)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    return folder


def opened(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], MSAConfig, Decoder]:
    checkpoint = open_checkpoint(folder)
    msa = read_msa(checkpoint.config)
    assert msa is not None
    tensors = dict(checkpoint.tensors())
    decoder = Decoder(read_backbone(checkpoint.config), msa)
    decoder.load(iter(tensors.items()))
    return checkpoint.config, tensors, msa, decoder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_stay_and_routers_are_added(family: str, tied: bool, tmp_path: Path) -> None:
    original = source(tmp_path / "in", family, tie_word_embeddings=tied)
    target = convert(original, tmp_path / "out", top_k=3, chunk=8)
    assert target == tmp_path / "out"
    before = dict(open_checkpoint(original).tensors())
    config, after, msa, _ = opened(target)
    assert set(after) - set(before) == ROUTERS | {"temperature"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after["model.layers.3.self_attn.router_q_proj.0.weight"].shape == (
        64 if family == "qwen3" else 32,
        32,
    )
    assert (msa.router_layers, msa.top_k, msa.chunk, msa.router_chunk) == ((2, 3), 3, 8, 8)
    assert float(after["temperature"]) == pytest.approx(msa.infonce_temperature) == 0.1
    kept = json.loads((original / "config.json").read_text())
    kept.pop("architectures"), kept.pop("model_type")
    assert kept.items() <= config.items()
    assert (target / "tokenizer_config.json").read_bytes() == (
        original / "tokenizer_config.json"
    ).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_qwen3_becomes_msa_and_the_others_keep_their_family(family: str, tmp_path: Path) -> None:
    config, _, msa, decoder = opened(convert(source(tmp_path / "in", family), tmp_path / "out"))
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "MSA"}
    assert config["architectures"] == [f"{names[family]}ForCausalLM"]
    assert config["model_type"] == ("msa" if family == "qwen3" else family)
    assert decoder.config.qk_norm is (family == "qwen3")
    assert config["msa_config"]["router_layer_idx"] == "2,3"
    assert msa.evidence == "router"


@pytest.mark.parametrize("family", FAMILIES)
def test_without_memory_the_model_is_the_one_it_was(family: str, tmp_path: Path) -> None:
    original = source(tmp_path / "in", family)
    checkpoint = open_checkpoint(original)
    plain = Decoder(read_backbone(checkpoint.config))
    plain.load(checkpoint.tensors())
    *_, converted = opened(convert(original, tmp_path / "out"))
    logits = []
    for decoder in (plain, converted):
        row = Sequence.start(decoder, encode_head(decoder, [1, 2]), position=2, view=None, top_k=1)
        logits.append(advance(decoder, [Feed(row, [5, 6, 7])]))
    assert torch.equal(*logits)


@pytest.mark.parametrize("decouple", [True, False])
def test_a_converted_model_encodes_routes_and_answers(decouple: bool, tmp_path: Path) -> None:
    *_, msa, decoder = opened(
        convert(source(tmp_path / "in", "llama"), tmp_path / "out", chunk=4, decouple_router=decouple)
    )
    states = [encode_passage(decoder, range(n, 3 * n)) for n in (5, 9, 20)]
    bank = MemoryBank(msa, states.__getitem__)
    for number, one in enumerate(states):
        bank.add(number, one.router_keys)
    row = Sequence.start(decoder, encode_head(decoder, [1]), position=4, view=bank.view(), top_k=2)
    assert advance(decoder, [Feed(row, [3, 4], [True, True])]).isfinite().all()
    assert [len(row.selections[layer].numbers) for layer in (2, 3)] == [2, 2]


def test_every_setting_is_written_and_read_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "top_k": 5,
        "chunk": 12,
        "router_chunk": 6,
        "decouple_router": True,
        "router_normalize": False,
        "head_reduce": "max",
        "query_reduce": "last",
        "chunk_reduce": "mean",
        "aux_loss_method": "INFONCE_FOCAL",
    }
    target = convert(
        source(tmp_path / "in", "qwen3"),
        tmp_path / "out",
        router_layers=[3, 1, 1],
        temperature=0.07,
        evidence="generative",
        **options,
    )
    config, _, msa, _ = opened(target)
    found = asdict(msa)
    assert {name: found[name] for name in options} == options
    assert msa.router_layers == (1, 3)
    assert (msa.positions, msa.evidence, msa.infonce_temperature) == ("reference", "generative", 0.07)
    assert read_layout(config) == read_layout({"model_type": "msa"})
    assert None not in config["msa_config"].values()
    spelt = {
        *("router_layer_idx", "top_k_docs", "pooling_kernel_size", "decouple_router", "head_reduce_method"),
        *("query_reduce_method", "chunk_reduce_method", "decouple_pooling_mode", "aux_loss_method"),
        *("infonce_loss_temp", "aux_loss", "rewrite_position", "lmloss_weigth", "auxloss_weight"),
        *("recloss_weight", "ansloss_weight"),
    }
    assert spelt <= set(config["msa_config"])


def test_nothing_is_left_to_a_familys_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Else an msa checkpoint would be read with the reference's unnormalised scores, positions and texts."""
    with caplog.at_level(logging.WARNING):
        config, _, msa, _ = opened(convert(source(tmp_path / "in", "qwen3"), tmp_path / "out"))
    assert not caplog.records
    assert msa.router_normalize
    assert (msa.positions, msa.evidence) == ("head", "router")
    assert read_layout(config) == Layout()


def test_prompt_strings_can_be_given(tmp_path: Path) -> None:
    target = convert(source(tmp_path / "in", "llama"), tmp_path / "out", layout={"response": "<|assistant|>"})
    assert read_layout(open_checkpoint(target).config) == Layout(response="<|assistant|>")
    with pytest.raises(CheckpointError, match=r"unknown keys \['answer'\]"):
        convert(tmp_path / "in", tmp_path / "other", layout={"answer": "x"})


def test_shards_in_and_out(tmp_path: Path) -> None:
    original = source(tmp_path / "in", "qwen3", max_shard_size="30KB")
    assert len(list(original.glob("*.safetensors"))) > 2
    target = convert(original, tmp_path / "out", max_shard_bytes=20_000)
    assert len(list(target.glob("*.safetensors"))) > 3
    index = json.loads((target / "model.safetensors.index.json").read_text())
    _, after, _, _ = opened(target)
    assert set(index["weight_map"]) == set(after)
    before = dict(open_checkpoint(original).tensors())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    single = dict(open_checkpoint(convert(original, tmp_path / "one")).tensors())
    assert all(torch.equal(after[name], tensor) for name, tensor in single.items())


def test_routers_are_seeded_and_start_as_a_similarity(tmp_path: Path) -> None:
    original = source(tmp_path / "in", "llama", dtype=torch.bfloat16)
    first, again, other = (
        opened(convert(original, tmp_path / name, seed=seed))[1]
        for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    for name in sorted(ROUTERS):
        assert first[name].dtype == torch.bfloat16
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    two, three = (first[f"model.layers.{n}.self_attn.router_k_proj.0.weight"] for n in (2, 3))
    assert not torch.equal(two, three)
    *_, decoder = opened(tmp_path / "a")
    projections = decoder.attention(3)
    query, key = (
        ops.normalize_heads(x)
        for x in (projections.router_query(torch.eye(32)), projections.router_key(torch.eye(32)))
    )
    same = ops.score_chunks(query[:1], key, head_reduce="mean", query_reduce="max", scale=1.0)
    assert float(same[0].detach()) == pytest.approx(1.0, abs=1e-5)
    assert (same[1:] < 0.9).all()


def test_coupled_routers_and_bce_write_what_they_need(tmp_path: Path) -> None:
    original = source(tmp_path / "in", "qwen3")
    before = set(dict(open_checkpoint(original).tensors()))
    target = convert(original, tmp_path / "out", decouple_router=False, aux_loss_method="BCE")
    _, after, msa, _ = opened(target)
    assert set(after) - before == {"b"}
    assert float(after["b"]) == -20.0
    assert not msa.router_normalize
    assert opened(convert(original, tmp_path / "all", router_layers="all"))[2].router_layers == (0, 1, 2, 3)


def test_scaled_ropes_keep_their_settings_in_both_places(tmp_path: Path) -> None:
    """The published engine reads rope_theta and rope_scaling; transformers 5 writes rope_parameters."""
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}
    original = source(tmp_path / "in", "qwen3", rope_parameters=yarn)
    config, *_ = opened(convert(original, tmp_path / "out"))
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"]["factor"] == 4.0
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    assert read_backbone(config) == read_backbone(old)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"router_layers": [4]}, r"router_layers \[4\] are not all within 0\.\.3"),
            ({"router_layers": []}, r"router_layers \[\]"),
            ({"router_layers": "1,2"}, "router_layers is '1,2'; expected 'all', 'upper' or layer numbers"),
            ({"top_k": 0}, "top_k is 0; it must be above 0"),
            ({"chunk": -1}, "chunk is -1"),
            ({"router_chunk": 0}, "router_chunk is 0"),
            ({"temperature": 0.0}, "temperature is 0.0"),
            ({"evidence": "both"}, "evidence is 'both'"),
        ],
    )
    def test_settings_out_of_range(self, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        original = source(tmp_path / "in", "llama")
        with pytest.raises(ConfigError, match=message):
            convert(original, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def test_unknown_methods_and_reductions(self, tmp_path: Path) -> None:
        original = source(tmp_path / "in", "llama")
        for options in ({"aux_loss_method": "NCE"}, {"head_reduce": "last"}):
            with pytest.raises(CheckpointError, match="expected one of"):
                convert(original, tmp_path / "out", **options)  # type: ignore[arg-type]

    def test_sources_with_routers_and_occupied_targets(self, tmp_path: Path) -> None:
        original = source(tmp_path / "in", "llama")
        target = convert(original, tmp_path / "out")
        with pytest.raises(CheckpointError, match="already has memory routers"):
            convert(target, tmp_path / "again")
        with pytest.raises(ConflictError, match="pass overwrite=True"):
            convert(original, target)
        assert opened(convert(original, target, top_k=4, overwrite=True))[2].top_k == 4

    def test_a_layer_without_its_tensors(self, tmp_path: Path) -> None:
        original = source(tmp_path / "in", "llama")
        checkpoint = open_checkpoint(original)
        tensors = {n: t for n, t in checkpoint.tensors() if "layers.3.self_attn.k_proj" not in n}
        write_checkpoint(tmp_path / "torn", checkpoint.config, tensors)
        with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.3\.self_attn\.k_proj"):
            convert(tmp_path / "torn", tmp_path / "out")
