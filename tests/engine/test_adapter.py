"""Adapters: the arithmetic of merging, gradients through the merged weight, files that are not adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msa_memory.engine.adapter import (
    TARGETS,
    Adapter,
    LowRankLinear,
    adapter_of,
    attach,
    load_adapter,
    merge,
)
from msa_memory.engine.config import BackboneConfig, RopeConfig
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.engine import load_engine
from msa_memory.engine.train.adapter import save_adapter
from msa_memory.errors import CheckpointError, ConfigError
from msa_memory.testing import tiny_model

RANK, ALPHA = 3, 6.0
QUERY = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.2.mlp.down_proj"


def build(dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    backbone = BackboneConfig(
        model_type="qwen2",
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        max_positions=128,
        rope=RopeConfig(),
        tie_word_embeddings=True,
        qkv_bias=True,
    )
    torch.manual_seed(seed)
    decoder = Decoder(backbone)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0.0, 0.3)
    return decoder.to(dtype)


def random_adapter(decoder: Decoder, modules: tuple[str, ...] = (QUERY, DOWN), seed: int = 1) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    pairs = {}
    for module in modules:
        out_size, in_size = decoder.get_submodule(module).weight.shape  # type: ignore[union-attr]
        a = torch.randn(RANK, in_size, generator=random)
        pairs[module] = a, torch.randn(out_size, RANK, generator=random)
    return Adapter(rank=RANK, alpha=ALPHA, pairs=pairs)


def weights(decoder: Decoder) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_adds_in_float32_and_rounds_once(self, dtype: torch.dtype) -> None:
        decoder = build(dtype)
        adapter = random_adapter(decoder)
        before = weights(decoder)
        merge(decoder, adapter)
        for name, after in weights(decoder).items():
            module = name.removesuffix(".weight")
            if module not in adapter.pairs:
                assert torch.equal(after, before[name])
                continue
            a, b = (side.double() for side in adapter.pairs[module])
            exact = before[name].double() + ALPHA / RANK * b @ a
            # One rounding to the weight's dtype, after an error of float32 size.
            step = torch.finfo(dtype).eps * exact.abs() / 2 + 1e-5
            assert ((after.double() - exact).abs() <= step).all()

    def test_a_misfit_changes_nothing(self) -> None:
        decoder = build()
        good = random_adapter(decoder)
        other = {"model.layers.7.mlp.up_proj": (torch.ones(RANK, 24), torch.ones(40, RANK))}
        before = weights(decoder)
        with pytest.raises(CheckpointError, match=r"model\.layers\.7\.mlp\.up_proj.*no such layer"):
            merge(decoder, Adapter(rank=RANK, alpha=ALPHA, pairs={**good.pairs, **other}))
        assert all(torch.equal(before[name], after) for name, after in weights(decoder).items())

    @pytest.mark.parametrize(("out_size", "in_size"), [(33, 24), (32, 25), (24, 32)])
    def test_another_shape_is_named(self, out_size: int, in_size: int) -> None:
        pairs = {QUERY: (torch.ones(RANK, in_size), torch.ones(out_size, RANK))}
        with pytest.raises(CheckpointError, match=rf"{QUERY}.*{out_size} by {in_size}.*\(32, 24\)"):
            merge(build(), Adapter(rank=RANK, alpha=ALPHA, pairs=pairs))

    def test_a_norm_is_no_place_for_an_adapter(self) -> None:
        pairs = {"model.layers.0.self_attn.forward": (torch.ones(RANK, 24), torch.ones(24, RANK))}
        with pytest.raises(CheckpointError, match="no such layer"):
            merge(build(), Adapter(rank=RANK, alpha=ALPHA, pairs=pairs))


class TestFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        adapter = random_adapter(build())
        save_adapter(adapter, tmp_path / "adapter.safetensors", {"step": "7"})
        loaded = load_adapter(tmp_path / "adapter.safetensors")
        assert (loaded.rank, loaded.alpha, loaded.pairs.keys()) == (RANK, ALPHA, adapter.pairs.keys())
        for module, (a, b) in adapter.pairs.items():
            assert torch.equal(loaded.pairs[module][0], a.bfloat16())
            assert torch.equal(loaded.pairs[module][1], b.bfloat16())
        assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]

    def test_the_names_are_those_of_peft(self, tmp_path: Path) -> None:
        save_adapter(random_adapter(build()), tmp_path / "adapter.safetensors")
        named = load_file(tmp_path / "adapter.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in named.items()} == {
            f"{QUERY}.lora_A.weight": (RANK, 24),
            f"{QUERY}.lora_B.weight": (32, RANK),
            f"{DOWN}.lora_A.weight": (RANK, 40),
            f"{DOWN}.lora_B.weight": (24, RANK),
        }

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t, m: t.update({"model.embed_tokens.weight": torch.ones(2, 2)}), "embed_tokens"),
            (lambda t, m: t.pop(f"{QUERY}.lora_B.weight"), rf"lacks the tensor '{QUERY}\.lora_B"),
            (lambda t, m: t.pop(f"{DOWN}.lora_A.weight"), rf"lacks the tensor '{DOWN}\.lora_A"),
            (
                lambda t, m: t.update({f"{QUERY}.lora_A.weight": torch.ones(RANK + 1, 24)}),
                rf"{QUERY}\.lora_A.*\(4, 24\).*3 rows",
            ),
            (
                lambda t, m: t.update({f"{QUERY}.lora_B.weight": torch.ones(32)}),
                rf"{QUERY}\.lora_B.*3 columns",
            ),
            (
                lambda t, m: t.update({f"{QUERY}.lora_A.weight": torch.ones(RANK, 24, dtype=torch.int32)}),
                rf"{QUERY}\.lora_A.*int32",
            ),
            (
                lambda t, m: t.update({f"{DOWN}.lora_A.weight": torch.full((RANK, 40), torch.nan)}),
                rf"{DOWN}\.lora_A.*not finite",
            ),
            (lambda t, m: m.pop("rank"), "metadata"),
            (lambda t, m: m.update(alpha="many"), "'alpha': 'many'"),
        ],
    )
    def test_what_is_no_adapter_is_refused_by_name(
        self, change: Callable[[dict[str, Tensor], dict[str, str]], Any], message: str, tmp_path: Path
    ) -> None:
        adapter = random_adapter(build())
        tensors, metadata = adapter.tensors(), adapter.metadata()
        change(tensors, metadata)
        save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            load_adapter(tmp_path / "a.safetensors")

    def test_a_cut_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        save_adapter(random_adapter(build()), path)
        whole = path.read_bytes()
        for size in (0, 5, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match="damaged"):
                load_adapter(path)
        with pytest.raises(CheckpointError, match="damaged"):
            load_adapter(tmp_path / "none.safetensors")


class TestLowRankLinear:
    @given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 17), st.booleans(), st.integers(0, 99))
    def test_gradients_are_those_of_the_plain_formula(
        self, tokens: int, in_size: int, out_size: int, bias: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        base = nn.Linear(in_size, out_size, bias=bias).requires_grad_(False)
        layer = LowRankLinear(base, RANK, ALPHA, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            layer.lora_b.normal_()
        layer.refresh()
        x = torch.randn(tokens, in_size, requires_grad=True)
        wanted = torch.randn(tokens, out_size)
        (layer(x) * wanted).sum().backward()
        twin, a, b = (t.detach().double().requires_grad_() for t in (x, layer.lora_a, layer.lora_b))
        plain = twin @ base.weight.double().T + ALPHA / RANK * (twin @ a.T) @ b.T
        plain = plain + base.bias.double() if bias else plain
        (plain * wanted).sum().backward()
        assert torch.allclose(layer(x).double(), plain, atol=1e-4)
        for ours, theirs in ((x, twin), (layer.lora_a, a), (layer.lora_b, b)):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-3)

    def test_starts_as_the_base_and_computes_as_the_merged_model(self) -> None:
        decoder, twin = build(torch.bfloat16), build(torch.bfloat16)
        modules = attach(decoder, {1: TARGETS, 2: TARGETS}, rank=RANK, alpha=ALPHA, seed=0)
        ids = torch.arange(12)
        before = _hidden(decoder, ids)
        assert torch.equal(before, _hidden(twin, ids))
        with torch.no_grad():
            for module in modules.values():
                module.lora_b.normal_(0.0, 0.2)
                module.refresh()
        merge(twin, adapter_of(modules, RANK, ALPHA))
        after = _hidden(decoder, ids)
        assert torch.equal(after, _hidden(twin, ids))
        assert not torch.equal(after, before)

    def test_only_the_adapter_learns(self) -> None:
        decoder = build()
        modules = attach(decoder, {2: ("q_proj", "up_proj")}, rank=RANK, alpha=ALPHA, seed=0)
        assert list(modules) == ["model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj"]
        learning = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
        assert learning == {f"{name}.{side}" for name in modules for side in ("lora_a", "lora_b")}

    @pytest.mark.parametrize(
        ("targets", "rank"), [({3: ("q_proj",)}, 2), ({0: ("gate",)}, 2), ({0: ("q_proj",)}, 0)]
    )
    def test_what_cannot_be_adapted(self, targets: dict[int, tuple[str, ...]], rank: int) -> None:
        with pytest.raises(ConfigError):
            attach(build(), targets, rank=rank, alpha=ALPHA, seed=0)


def _hidden(decoder: Decoder, ids: Tensor) -> Tensor:
    from msa_memory.engine import ops

    def attend(layer: int, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attend(q, k.transpose(0, 1), v.transpose(0, 1), 0.35)

    with torch.no_grad():
        hidden = decoder(ids, torch.arange(len(ids)), attend)
    assert hidden is not None
    return hidden


class TestLoadEngine:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tiny_model(tmp_path / "model")

    def test_merges_the_adapter_in_the_checkpoints_folder(self, folder: Path) -> None:
        plain = load_engine(folder, device="cpu")
        adapter = random_adapter(plain.decoder, (QUERY, DOWN))
        expected = load_engine(folder, device="cpu").decoder
        save_adapter(adapter, folder / "adapter.safetensors")
        merge(expected, load_adapter(folder / "adapter.safetensors"))
        loaded = load_engine(folder, device="cpu")
        for name, weight in weights(loaded.decoder).items():
            assert torch.equal(weight, weights(expected)[name]), name
        assert not torch.equal(
            weights(loaded.decoder)[f"{QUERY}.weight"], weights(plain.decoder)[f"{QUERY}.weight"]
        )

    def test_the_fingerprint_covers_it(self, folder: Path) -> None:
        plain = load_engine(folder, device="cpu")
        seen = {plain.fingerprint}
        for seed in (1, 2):
            adapter = random_adapter(plain.decoder, (QUERY, DOWN), seed)
            save_adapter(adapter, folder / "adapter.safetensors")
            seen.add(load_engine(folder, device="cpu").fingerprint)
        assert len(seen) == 3
        assert load_engine(folder, device="cpu", adapter=False).fingerprint == plain.fingerprint

    def test_another_adapter_can_be_named(self, folder: Path, tmp_path: Path) -> None:
        plain = load_engine(folder, device="cpu")
        elsewhere = tmp_path / "other.safetensors"
        save_adapter(random_adapter(plain.decoder, (DOWN,)), elsewhere)
        changed = weights(load_engine(folder, device="cpu", adapter=elsewhere).decoder)
        different = [
            name for name, weight in weights(plain.decoder).items() if not torch.equal(weight, changed[name])
        ]
        assert different == [f"{DOWN}.weight"]
        with pytest.raises(CheckpointError, match=r"none\.safetensors"):
            load_engine(folder, device="cpu", adapter=tmp_path / "none.safetensors")

    def test_a_foreign_adapter_is_refused(self, folder: Path) -> None:
        save_adapter(random_adapter(build()), folder / "adapter.safetensors")
        with pytest.raises(CheckpointError, match="another model"):
            load_engine(folder, device="cpu")
