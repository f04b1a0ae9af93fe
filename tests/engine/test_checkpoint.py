"""Checkpoint files: folders, shards and GGUF files read as transformers reads them; damage is named."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from msa_memory.engine import checkpoint as checkpoint_module
from msa_memory.engine.checkpoint import atomic_folder, open_checkpoint, write_checkpoint
from msa_memory.engine.fingerprint import file_digest, fingerprint_files
from msa_memory.engine.tokenizer import Tokenizer
from msa_memory.errors import CheckpointError, ConflictError

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 300, 64, 96, 2, 4, 2
HEAD_DIM = 128  # of Qwen3, where it is not hidden / heads; transformers' GGUF reader assumes 128
CONFIG: dict[str, Any] = {"model_type": "llama", "hidden_size": 8, "tie_word_embeddings": True}
FAMILIES = ["llama", "qwen2", "qwen3"]


def reference_model(family: str, **options: Any) -> Any:
    """A tiny random transformers model; head_dim is not hidden / heads where the family allows it."""
    import transformers

    kinds = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    head_dim = HEAD_DIM if family == "qwen3" else HIDDEN // HEADS
    config = getattr(transformers, f"{kinds[family]}Config")(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=head_dim,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        initializer_range=0.3,
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}, **options},
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kinds[family]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros, which hide mistakes
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row order of llama.cpp's converter: within a head, row i of each half side by side."""
    order = [
        head * (len(weight) // heads) + pair + half * (len(weight) // heads // 2)
        for head in range(heads)
        for pair in range(len(weight) // heads // 2)
        for half in range(2)
    ]
    return weight[order]


def gguf_name(name: str) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, LAYERS)
    return str(names.get_name(name, try_suffixes=(".weight", ".bias")))


def byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def start_gguf(path: Path, family: str, *, pre: str = "gpt-2", tokenizer: str = "gpt2") -> gguf.GGUFWriter:
    """Metadata of a tiny model and of a byte-level tokenizer with three merges."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    if family == "qwen3":
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    tokens = [*byte_alphabet(), "he", "Ġhe", "ll", "<|im_start|>", "<|im_end|>", "<tool>"]
    types = [gguf.TokenType.NORMAL] * 259 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.USER_DEFINED]
    fill = VOCAB - len(tokens)
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(fill)])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * fill)
    writer.add_token_merges(["h e", "Ġ he", "l l"])
    writer.add_eos_token_id(260)
    return writer


def finish_gguf(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path: Path, family: str, model: Any, kind: str = "F32", **options: str) -> Path:
    writer = start_gguf(path, family, **options)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = interleaved(tensor, HEADS if "q_proj" in name else KV_HEADS)
        add_tensor(writer, gguf_name(name), tensor.numpy(), kind)
    finish_gguf(writer)
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    stored = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
    writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], **options: Any) -> Path:
    write_checkpoint(folder, CONFIG, tensors, **options)
    return folder


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"model.t{i}": torch.randn(4, i + 1, generator=generator).bfloat16() for i in range(5)}


def assert_same(found: Iterator[tuple[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    seen = dict(found)
    assert seen.keys() == expected.keys()
    for name, tensor in seen.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_gives_the_original_weights_and_shape(tmp_path: Path, family: str, tied: bool) -> None:
    model = reference_model(family, tie_word_embeddings=tied)
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", family, model))
    expected = model.state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert_same(opened.tensors(), expected)
    for key in ("model_type", "tie_word_embeddings", "rms_norm_eps", "vocab_size", "hidden_act"):
        assert opened.config[key] == getattr(model.config, key), key
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
        assert opened.config[key] == getattr(model.config, key), key
    for key in ("num_attention_heads", "num_key_value_heads"):
        assert opened.config[key] == getattr(model.config, key), key
    assert opened.config["head_dim"] == (HEAD_DIM if family == "qwen3" else HIDDEN // HEADS)
    assert opened.config["rope_theta"] == 50000.0


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_weights_equal_those_transformers_reads(tmp_path: Path, family: str) -> None:
    """An independent reader of the same file, so that the test's own writer cannot be wrong with ours."""
    import transformers

    model = reference_model(family, tie_word_embeddings=False)
    write_gguf(tmp_path / "m.gguf", family, model, kind="Q8_0")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    assert_same(open_checkpoint(tmp_path).tensors(), loaded.state_dict())


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_gguf_tensors_come_out_as_float32(tmp_path: Path, kind: str) -> None:
    model = reference_model("llama")
    tensors = dict(open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", model, kind=kind)).tensors())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    name = "model.layers.1.self_attn.k_proj.weight"
    worst = (tensors[name] - model.state_dict()[name]).abs().max()
    assert worst < {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q4_1": 0.2}[kind]
    assert torch.equal(tensors["model.norm.weight"], model.state_dict()["model.norm.weight"])


def test_llama_biases_are_put_back_in_order_too(tmp_path: Path) -> None:
    model = reference_model("llama", attention_bias=True)
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", model))
    assert opened.config["attention_bias"] is True
    assert_same(opened.tensors(), model.state_dict())


def test_llama3_rope_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 50000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = reference_model("llama", tie_word_embeddings=True, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 50000.0 ** -(torch.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS))
    for divisors, fits in ((plain / scaled, True), (plain / scaled * 1.5, False)):
        writer = start_gguf(tmp_path / "m.gguf", "llama")
        writer.add_tensor("rope_freqs.weight", divisors.numpy().astype(np.float32))
        writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
        finish_gguf(writer)
        if fits:
            opened = open_checkpoint(tmp_path / "m.gguf")
            del scaling["rope_theta"]
            assert opened.config["rope_scaling"] == scaling
            assert [name for name, _ in opened.tensors()] == ["model.embed_tokens.weight"]
        else:
            with pytest.raises(CheckpointError, match=r"not the Llama 3\.1 scaling"):
                open_checkpoint(tmp_path / "m.gguf")


def test_yarn_and_linear_scaling_are_read_and_others_refused(tmp_path: Path) -> None:
    def config(kind: str) -> Any:
        writer = start_gguf(tmp_path / "m.gguf", "qwen3")
        writer.add_string("qwen3.rope.scaling.type", kind)
        writer.add_float32("qwen3.rope.scaling.factor", 4.0)
        writer.add_uint32("qwen3.rope.scaling.original_context_length", 128)
        writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
        finish_gguf(writer)
        return open_checkpoint(tmp_path / "m.gguf").config["rope_scaling"]

    expected = {"factor": 4.0, "original_max_position_embeddings": 128}
    assert config("yarn") == {"rope_type": "yarn", **expected}
    assert config("linear") == {"rope_type": "linear", **expected}
    assert config("none") is None
    with pytest.raises(CheckpointError, match="'longrope'"):
        config("longrope")


def tokenizer_of(path: Path, **options: str) -> Tokenizer:
    writer = start_gguf(path, "llama", **options)
    writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
    finish_gguf(writer)
    return Tokenizer.from_gguf(path)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text between token borders, for a vocabulary that merges whole words."""
    return [text[start:end] for start, end in tokenizer.encode_with_offsets(text)[1]]


def words(path: Path, pre: str, text: str) -> list[str]:
    """How ``pre`` cuts text before any merge."""
    tokenizer = tokenizer_of(path, pre=pre)
    return [text[start:end] for _, (start, end) in tokenizer._plain.pre_tokenizer.pre_tokenize_str(text)]


# What the tokenizers of SmolLM2, GPT-2, Llama 3 and Qwen2 do with the same text.
CUTS = [
    ("gpt-2", "I'M we'll  x123²", ["I", "'", "M", " we", "'ll", " ", " x", "123²"]),
    ("default", "a  1234\n\nb", ["a", " ", " 1234", "\n", "\n", "b"]),
    ("smollm", "a  1234\n\nb", ["a", "  ", "1", "2", "3", "4", "\n", "\n", "b"]),
    ("smollm", "x²Ⅷ it's", ["x", "²", "Ⅷ", " it", "'s"]),
    (
        "llama-bpe",
        "I'M  1234567\r\n\n?!\n x",
        ["I", "'M", " ", " ", "123", "456", "7", "\r\n\n", "?!\n", " x"],
    ),
    ("llama3", "(word) 12", ["(word", ")", " ", "12"]),
    ("qwen2", "I'M  1234\r\n?!\n x", ["I", "'M", " ", " ", "1", "2", "3", "4", "\r\n", "?!\n", " x"]),
]


@pytest.mark.parametrize(("pre", "text", "expected"), CUTS)
def test_gguf_pre_tokenizers_cut_as_published(
    tmp_path: Path, pre: str, text: str, expected: list[str]
) -> None:
    found = words(tmp_path / "m.gguf", pre, text)
    assert found == expected


def test_gguf_tokenizer_merges_and_declares_control_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "m.gguf")
    assert pieces(tokenizer, "hell he") == ["he", "ll", " he"]
    assert tokenizer.stop_ids == {260}
    assert tokenizer.token_id("<|im_start|>") == 259
    assert tokenizer.encode_prompt("<|im_end|><tool>") == [260, 261]
    assert tokenizer.decode([260, 261], skip_special=True) == "<tool>"
    assert not {259, 260, 261} & set(tokenizer.encode("<|im_start|><|im_end|><tool>"))
    assert tokenizer.decode(tokenizer.encode("å<|im_end|>\x00")) == "å<|im_end|>\x00"


def test_qwen2_composes_unicode_as_its_tokenizer_file_does(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "m.gguf", pre="qwen2")
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_gguf_qwen2_tokenizer_equals_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "m.gguf", "qwen2", reference_model("qwen2"), pre="qwen2")
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    tokenizer = Tokenizer.from_gguf(tmp_path / "m.gguf")
    # Composed text only: from GGUF transformers forgets the NFC of Qwen2's own tokenizer file.
    for text in ["hello he", "I'M  1234\r\n?!\n x", "é 你好 😀", "<|im_start|>user\nhe<|im_end|>"]:
        assert tokenizer.encode_prompt(text) == reference(text, add_special_tokens=False).input_ids


def write_sentencepiece(path: Path, *, prefix: bool = True) -> Path:
    """Pieces with scores: 'he' beats 'el', '▁he' and 'hell' come later; bytes for what is unknown."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 512),
        (writer.add_embedding_length, HIDDEN),
        (writer.add_block_count, LAYERS),
        (writer.add_feed_forward_length, INNER),
        (writer.add_head_count, HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    normal = [
        "he",
        "el",
        "ll",
        "▁he",
        "hell",
        "▁hell",
        "▁",
        "h",
        "e",
        "l",
        "o",
        "<",
        "/",
        "s",
        ">",
        "</",
        "s>",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *normal]
    types = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types + [gguf.TokenType.NORMAL] * len(normal))
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(normal))])
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(prefix)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), HIDDEN), np.float32))
    finish_gguf(writer)
    return path


def test_sentencepiece_gguf_merges_by_score(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(write_sentencepiece(tmp_path / "m.gguf"))
    names = {tokenizer._prompt.id_to_token(i): i for i in range(tokenizer.vocab_size)}
    assert tokenizer.encode("hello") == [names["▁hell"], names["o"]]
    assert tokenizer.encode("elh") == [names["▁"], names["el"], names["h"]]
    assert tokenizer.encode("é") == [names["▁"], names["<0xC3>"], names["<0xA9>"]]
    assert 2 not in tokenizer.encode("</s>")
    assert tokenizer.encode_prompt("</s>") == [2]
    for text in ("hello  hell", "</s><unk><0x41>", "日本\n", " he", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    bare = Tokenizer.from_gguf(write_sentencepiece(tmp_path / "bare.gguf", prefix=False))
    assert bare.encode("hello") == [names["hell"], names["o"]]
    assert bare.decode(bare.encode(" he")) == " he"


def test_sentencepiece_gguf_equals_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_gguf(write_sentencepiece(tmp_path / "m.gguf"))
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    # Not a leading space: there transformers leaves out the prefix that SentencePiece always adds.
    for text in ["hello", "elh ell", "é hell", "hello  hell", "</s>", "日本"]:
        assert tokenizer.encode_prompt(text) == reference(text, add_special_tokens=False).input_ids


def test_gguf_tokenizers_of_unknown_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'tekken'.*smollm"):
        tokenizer_of(tmp_path / "m.gguf", pre="tekken")
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.model is 'bert'"):
        tokenizer_of(tmp_path / "m.gguf", tokenizer="bert")


def test_other_architectures_and_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'gemma2' model; expected one of llama, qwen2, qwen3"):
        tokenizer_of_family(tmp_path / "m.gguf", "gemma2")
    writer = start_gguf(tmp_path / "moe.gguf", "llama")
    writer.add_expert_count(8)
    finish_gguf(writer)
    with pytest.raises(CheckpointError, match="mixture of experts"):
        open_checkpoint(tmp_path / "moe.gguf")


def tokenizer_of_family(path: Path, family: str) -> Tokenizer:
    finish_gguf(start_gguf(path, family))
    return Tokenizer.from_gguf(path)


def test_a_foreign_tensor_in_a_gguf_is_named(tmp_path: Path) -> None:
    writer = start_gguf(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
    writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32))
    finish_gguf(writer)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_sinks\.weight"):
        list(open_checkpoint(tmp_path / "m.gguf").tensors())


@pytest.mark.parametrize("kept", [0, 3, 50, 0.5, 0.999])
def test_a_truncated_gguf_is_an_error(tmp_path: Path, kept: float) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", reference_model("llama"))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"not a complete GGUF file.*download it again"):
        open_checkpoint(path)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100, 1])
def test_written_checkpoints_read_back_bit_for_bit(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = some_tensors()
    folder = write_folder(
        tmp_path / "m", tensors, max_shard_bytes=max_shard_bytes, tokenizer_files={"tokenizer.json": b"{}"}
    )
    opened = open_checkpoint(folder)
    assert opened.config == CONFIG
    assert opened.tokenizer_files() == {"tokenizer.json": b"{}"}
    assert_same(opened.tensors(), tensors)
    assert len(opened.weight_files) == {10**9: 1, 100: 2, 1: 5}[max_shard_bytes]
    assert len(list(folder.glob("*.safetensors"))) == len(opened.weight_files)  # no empty shard
    assert {stat.st_mode & 0o777 for stat in map(os.stat, folder.iterdir())} == {0o666 & ~current_umask()}


def current_umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    import transformers

    model = reference_model("qwen3", tie_word_embeddings=False)
    write_checkpoint(tmp_path / "m", model.config.to_dict(), model.state_dict(), max_shard_bytes=50_000)
    assert len(open_checkpoint(tmp_path / "m").weight_files) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_transformers_writes_in_shards_reads_back(tmp_path: Path) -> None:
    model = reference_model("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same(open_checkpoint(tmp_path).tensors(), model.state_dict())


def test_tensors_that_share_memory_are_both_written(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {"a": base, "b": base, "c": base[2:4], "d": base.t()}
    assert_same(open_checkpoint(write_folder(tmp_path / "m", tensors)).tensors(), tensors)


def test_nothing_appears_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "m", some_tensors())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())

    def fail_half_way() -> None:
        with atomic_folder(folder, overwrite=True) as temporary:
            (temporary / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert_same(open_checkpoint(folder).tensors(), some_tensors())
    assert list(tmp_path.iterdir()) == [folder]


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    newer = {"model.new": torch.ones(3)}
    with pytest.raises(ConflictError, match="overwrite=True"):
        write_folder(folder, newer)
    assert_same(open_checkpoint(folder).tensors(), some_tensors())
    write_folder(folder, newer, overwrite=True)
    assert_same(open_checkpoint(folder).tensors(), newer)
    assert list(tmp_path.iterdir()) == [folder]


def test_every_file_is_flushed_before_the_folder_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    real = checkpoint_module._fsync

    def record(path: Path) -> None:
        flushed.append((path.name, (tmp_path / "m").exists()))
        real(path)

    monkeypatch.setattr(checkpoint_module, "_fsync", record)
    write_folder(tmp_path / "m", some_tensors())
    assert {name for name, appeared in flushed if not appeared} >= {"config.json", "model.safetensors"}
    assert flushed[-1] == (tmp_path.name, True)


def test_a_folder_without_weights_config_or_existence_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"holds no weights; expected model\.safetensors"):
        open_checkpoint(tmp_path)
    write_folder(tmp_path / "m", some_tensors())
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path / "m")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"is a \.txt file"):
        open_checkpoint(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_unopened(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(CheckpointError, match=f"{name}, a pickle.*[Cc]onvert it to safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "half", "header", "last byte"])
def test_damaged_safetensors_are_refused_at_open(tmp_path: Path, damage: str) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    file = folder / "model.safetensors"
    content = file.read_bytes()
    damaged = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "header": b"\xff" * 8 + content[8:],
        "last byte": content[:-1],
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or incomplete"):
        open_checkpoint(folder)


def test_a_missing_wrong_or_foreign_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors(), max_shard_bytes=100)
    second = folder / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 weight files: model-00002-of-00002"):
        open_checkpoint(folder)
    save_file({"other": torch.ones(1)}, second)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors lacks tensor model\.t"):
        open_checkpoint(folder)
    second.write_bytes(content)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="points outside its folder"):
        open_checkpoint(folder)
    for broken in ("{", "[]", "{}"):
        index.write_text(broken)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            open_checkpoint(folder)


@pytest.mark.parametrize("content", ['{"model_type": "mamba"}', "{}", "[1]", "{"])
def test_an_unsupported_or_broken_config_is_named(tmp_path: Path, content: str) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


def test_a_folder_with_two_gguf_files_asks_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_a_gguf_checkpoint_converts_with_its_tokenizer(tmp_path: Path) -> None:
    model = reference_model("llama")
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", model, pre="smollm"))
    write_checkpoint(
        tmp_path / "m", opened.config, dict(opened.tensors()), tokenizer_files=opened.tokenizer_files()
    )
    converted = open_checkpoint(tmp_path / "m")
    assert_same(converted.tensors(), dict(opened.tensors()))
    assert converted.tokenizer().digest() == opened.tokenizer().digest()


def test_a_file_digest_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msa_memory.engine import fingerprint

    reads: list[Path] = []
    real = fingerprint._sha256
    monkeypatch.setattr(fingerprint, "_sha256", lambda path: reads.append(path) or real(path))
    file, cache = tmp_path / "f", tmp_path / "cache"
    file.write_bytes(b"one")
    first = file_digest(file, cache_dir=cache)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert file_digest(file, cache_dir=cache) == first
    assert len(reads) == 1
    file.write_bytes(b"two")
    assert file_digest(file, cache_dir=cache) != first
    (cache / "digests.json").write_text("{")
    assert file_digest(file, cache_dir=cache) != first
    assert len(reads) == 3
    with pytest.raises(CheckpointError, match="cannot be read"):
        file_digest(tmp_path / "nothing", cache_dir=cache)


def test_a_fingerprint_covers_names_and_contents_and_not_folders(tmp_path: Path) -> None:
    for folder, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w").write_text(content)
        (tmp_path / folder / "v").write_text("v")

    def of(folder: str, *names: str) -> str:
        return fingerprint_files([tmp_path / folder / name for name in names], cache_dir=tmp_path)

    assert of("a", "w", "v") == of("b", "v", "w")
    assert of("a", "w", "v") != of("c", "w", "v")
    assert of("a", "w") != of("a", "w", "v")
