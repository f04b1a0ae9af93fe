"""Checkpoint files: open a Hugging Face folder or a GGUF file, write a Hugging Face folder.

Reads safetensors (one file or shards) and GGUF, never pickles. A folder appears whole or not at all.
Knows file layouts and tensor names; what the tensors mean is the decoder's business.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msa_memory.engine.gguf_checkpoint import GGUFFile, read_tokenizer
from msa_memory.engine.tokenizer import TOKENIZER_FILES, Tokenizer
from msa_memory.errors import CheckpointError, ConflictError

__all__ = ["Checkpoint", "atomic_folder", "open_checkpoint", "write_checkpoint", "write_files"]

SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "msa")
DEFAULT_SHARD_BYTES = 4 * 2**30
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files are all present; tensors are read when asked for."""

    path: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    """The files that hold the weights, for fingerprints."""
    _gguf: GGUFFile | None = field(default=None, repr=False)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors one by one under their Hugging Face names, in their stored dtype (GGUF: float32).

        Raises:
            CheckpointError: a file changed or cannot be read.
        """
        if self._gguf is not None:
            yield from self._gguf.tensors()
            return
        for file in self.weight_files:
            with _open_safetensors(file) as shard:
                for name in shard.keys():  # noqa: SIM118 - not a mapping
                    yield name, shard.get_tensor(name)

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read anew at every call."""
        return read_tokenizer(self._gguf) if self._gguf is not None else Tokenizer.from_folder(self.path)

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name, to hand to ``write_checkpoint``."""
        if self._gguf is not None:
            return self.tokenizer().files()
        present = [name for name in TOKENIZER_FILES if (self.path / name).is_file()]
        return {name: (self.path / name).read_bytes() for name in present}


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a Hugging Face folder, a ``.gguf`` file, or a folder with exactly one ``.gguf`` file.

    Every weight file's header is checked here, so a truncated download fails now and not mid-way.

    Raises:
        CheckpointError: something is missing, damaged or of an unsupported kind.
    """
    path = Path(path)
    if path.is_file():
        return _open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint folder or a .gguf file")
    weights = _weight_files(path)
    if not weights:
        return _open_gguf(_only_gguf(path))
    config = _read_config(path / "config.json")
    return Checkpoint(path=path, config=config, weight_files=weights)


def write_checkpoint(
    folder: Path | str,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    tokenizer_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a Hugging Face folder of safetensors; it appears whole, flushed to disk, or not at all.

    Args:
        tensors: by Hugging Face name; stored in the dtype they come in.
        tokenizer_files: contents by file name, as ``Checkpoint.tokenizer_files`` gives them.
        max_shard_bytes: above this the weights are split over several files with an index.
        overwrite: replace ``folder`` where it already holds something.

    Raises:
        ConflictError: ``folder`` is not empty and ``overwrite`` is false.
    """
    with atomic_folder(Path(folder), overwrite=overwrite) as temporary:
        write_files(
            temporary, config, tensors, tokenizer_files=tokenizer_files, max_shard_bytes=max_shard_bytes
        )


def write_files(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    tokenizer_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """The files of ``write_checkpoint`` into an existing folder, without its guarantees."""
    for name, content in (tokenizer_files or {}).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    shards = _plan_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        _save(tensors, shards[0], folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _save(tensors, names, folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``target`` that takes its place, flushed to disk, when the block succeeds.

    Raises:
        ConflictError: ``target`` holds something and ``overwrite`` is false.
    """
    target = target.absolute()
    _refuse_occupied(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _fsync(file)
        _fsync(temporary)
        _refuse_occupied(target, overwrite)
        _swap_in(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_occupied(target: Path, overwrite: bool) -> None:
    if not overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConflictError(
            f"{target} already exists and is not empty; choose another folder or pass overwrite=True"
        )


def _swap_in(temporary: Path, target: Path) -> None:
    """Renames; a non-empty target is moved aside first, since no portable call exchanges two folders."""
    if target.exists() and any(target.iterdir()):
        old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex}")
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plan_shards(tensors: Mapping[str, torch.Tensor], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _save(tensors: Mapping[str, torch.Tensor], names: list[str], file: Path) -> None:
    seen: set[int] = set()
    stored: dict[str, torch.Tensor] = {}
    for name in names:
        tensor = tensors[name].detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if pointer in seen else tensor  # safetensors refuses shared memory
        seen.add(pointer)
    save_file(stored, file, metadata={"format": "pt"})
    # safetensors makes the file readable by its owner only; the folder's other files follow the umask.
    file.chmod((file.parent / "config.json").stat().st_mode)


def _open_gguf(path: Path) -> Checkpoint:
    if path.suffix != ".gguf":
        raise CheckpointError(
            f"{path} is a {path.suffix or 'plain'} file; expected a checkpoint folder or a .gguf file"
        )
    gguf = GGUFFile(path)
    return Checkpoint(path=path, config=gguf.config, weight_files=(path,), _gguf=gguf)


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder} holds several GGUF files ({names}); name the one to open")
    if found:
        return found[0]
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights only as {pickles[0]}, a pickle, which can run code and is never "
            "opened. Convert it to safetensors where you trust it: transformers' "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise CheckpointError(
        f"{folder} holds no weights; expected model.safetensors, model.safetensors.index.json or one "
        ".gguf file"
    )


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The folder's safetensors files, all present and readable; none when it has none."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = _shards(index)
    else:
        return ()
    for file in files:
        with _open_safetensors(file):
            pass
    return tuple(files)


def _shards(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    names = sorted(set(weight_map.values()))
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise CheckpointError(f"{index} points outside its folder: {foreign[0]!r}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing)}"
        )
    _check_shards(index.parent, weight_map)
    return [index.parent / name for name in names]


def _check_shards(folder: Path, weight_map: Mapping[str, str]) -> None:
    held: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if file not in held:
            with _open_safetensors(folder / file) as shard:
                held[file] = set(shard.keys())
        if tensor not in held[file]:
            raise CheckpointError(f"{folder / file} lacks tensor {tensor}, which the index places there")


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or incomplete ({error}); download it again") from error


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} has weights but no config.json, which says what they are")
    config = _read_json(file)
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise CheckpointError(
            f"{file}: model_type {model_type!r} is not supported; expected one of "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    return config


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a JSON {type(value).__name__}; expected an object")
    return value
