"""A trained model as a folder that opens: checkpoint, routers and adapter in one place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from msa_memory.engine.adapter import Adapter, LowRankLinear, load_adapter
from msa_memory.engine.checkpoint import Checkpoint, atomic_folder, write_files
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.train.adapter import save_adapter
from msa_memory.errors import CheckpointError

__all__ = ["decoder_tensors", "save_model", "save_with_routers", "write_json"]


def save_model(
    folder: Path,
    source: Checkpoint,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    adapter: Adapter | None = None,
) -> None:
    """Write a memory model: ``source``'s configuration and tokenizer with other settings and tensors.

    ``settings`` are the ``msa_config``. An earlier ``folder`` is replaced; the new one appears whole.
    """
    config = {**source.config, "msa_config": {**(source.config.get("msa_config") or {}), **settings}}
    named = dict(tensors)
    if "INFONCE" in str(settings.get("aux_loss_method")):
        named["temperature"] = torch.tensor(float(settings["infonce_loss_temp"]))
    with atomic_folder(folder, overwrite=True) as temporary:
        write_files(temporary, config, named, tokenizer_files=source.tokenizer_files())
        if adapter is not None:
            save_adapter(adapter, temporary / "adapter.safetensors")


def save_with_routers(
    folder: Path, source: Checkpoint, routers: Path, settings: Mapping[str, Any], adapter: Path | None
) -> None:
    """Write a memory model: ``source`` with the router file and adapter file of a training.

    Raises:
        CheckpointError: a file is damaged.
    """
    try:
        trained = load_file(routers)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the routers {routers} cannot be read: {error}") from error
    kept = {name: tensor for name, tensor in source.tensors() if ".router_" not in name}
    found = None if adapter is None else load_adapter(adapter)
    save_model(folder, source, settings, {**kept, **trained}, found)


def decoder_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights under their checkpoint names; adapters in training are left out."""
    named = {name: weight.detach() for name, weight in decoder.named_parameters() if ".lora_" not in name}
    for name, module in decoder.named_modules():
        if isinstance(module, LowRankLinear):
            named[f"{name}.weight"] = module.weight
    return {name: tensor.cpu().contiguous() for name, tensor in named.items()}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)
