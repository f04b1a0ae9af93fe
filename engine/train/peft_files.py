"""Adapters as folders of the ``peft`` library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from msa_memory.engine.adapter import Adapter, load_adapter
from msa_memory.engine.checkpoint import atomic_folder
from msa_memory.engine.train.adapter import save_adapter
from msa_memory.engine.train.run import write_tensors
from msa_memory.errors import CheckpointError

__all__ = ["export_peft", "import_peft"]

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_LAYER = re.compile(r"model\.layers\.(\d+)\.\w+\.(\w+)")


def export_peft(adapter: Path, folder: Path, *, base_model: str, overwrite: bool = False) -> None:
    """Write an adapter file as a folder that ``PeftModel.from_pretrained`` reads.

    Raises:
        ConflictError: ``folder`` is not empty and ``overwrite`` is false.
    """
    found = load_adapter(adapter)
    places = {match.groups() for match in map(_LAYER.fullmatch, found.pairs) if match}
    layers, targets = ({place[side] for place in places} for side in (0, 1))
    even = len(places) == len(layers) * len(targets)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": found.rank,
        "lora_alpha": int(found.alpha) if found.alpha == int(found.alpha) else found.alpha,
        "target_modules": sorted(targets if even else found.pairs),
        **({"layers_to_transform": sorted(map(int, layers)), "layers_pattern": "layers"} if even else {}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {f"{PREFIX}{name}": tensor for name, tensor in found.tensors().items()}
        write_tensors(temporary / WEIGHTS, tensors, {"format": "pt"})


def import_peft(folder: Path, adapter: Path) -> None:
    """Write a peft folder's LoRA as an adapter file.

    Raises:
        CheckpointError: it is damaged, or uses something an adapter file cannot say.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the peft folder {folder} cannot be read: {error}") from error
    _check(config, folder)
    pairs: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        module, side = name.removeprefix(PREFIX).removesuffix(".weight").rsplit(".lora_", 1)
        pairs.setdefault(module, {})[side] = tensor
    complete = {module: (sides["A"], sides["B"]) for module, sides in pairs.items() if len(sides) == 2}
    if len(complete) < len(pairs):
        raise CheckpointError(f"the peft folder {folder} lacks a lora_A or lora_B of some module")
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    save_adapter(Adapter(rank=rank, alpha=alpha, pairs=complete), adapter)
    load_adapter(adapter)


def _check(config: dict[str, Any], folder: Path) -> None:
    wrong = [
        name
        for name in (
            "use_rslora",
            "use_dora",
            "fan_in_fan_out",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
        )
        if config.get(name)
    ]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or wrong:
        raise CheckpointError(
            f"the peft folder {folder} is a {config.get('peft_type')} with bias {config.get('bias')!r}"
            f"{' and ' + ', '.join(wrong) if wrong else ''}; only plain LoRA of one rank can be imported"
        )
