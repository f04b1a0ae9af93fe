"""What a result is worth without: the command that made it, the machine and the versions; and its file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["command_line", "machine", "result", "write_result"]


def machine(device: str = "cpu") -> dict[str, Any]:
    """The hardware and the libraries a figure belongs to; torch only where it is loaded already."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    found = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
    }
    if torch := sys.modules.get("torch"):
        found |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
            found["gpu"] = torch.cuda.get_device_name()
    return found


def command_line(arguments: Sequence[str]) -> str:
    """The command as anybody could type it: files by their names, without this machine's folders."""
    program, *rest = arguments
    named = [Path(one).name if os.sep in one else one for one in rest]
    return shlex.join([Path(program).name, *named])


def result(evaluation: str, device: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures with what they need to be believed and repeated."""
    return {
        "evaluation": evaluation,
        "command": command_line(sys.argv),
        "version": version("msa-memory"),
        "machine": machine(device),
        **figures,
    }


def write_result(path: Path, value: Mapping[str, Any]) -> None:
    """Write a result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)
