"""The benchmarks of memories on a GPU run on a CPU at toy sizes, find their needles and answer alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_gpu_memory.py"
SERVING = SCRIPT.with_name("bench_gpu_serving.py")
UNFINISHED = 3


def run(*options: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(script), "--device", "cpu", "--tiny", *options]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_memory_is_built_in_steps_and_finds_its_needles(tmp_path: Path) -> None:
    whole = run("--work", str(tmp_path))
    assert whole.returncode == 0, whole.stderr
    told = json.loads(whole.stdout)
    assert told["needles"]["found_in_8"] == told["needles"]["asked"] == 2
    assert told["memory"]["kv_held_over_arithmetic"] <= 1.0
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"{n}-{n + 8}.safetensors" for n in (0, 16, 8)]
    kept = shards[-1].read_bytes()

    shards[-1].unlink()
    cut_short = run("--work", str(tmp_path), "--minutes", "0")
    assert cut_short.returncode == UNFINISHED
    assert json.loads(cut_short.stdout)["unfinished"] == 8
    again = run("--work", str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert shards[-1].read_bytes() == kept
    for name in ("asked", "found_first", "found_in_8", "answered"):
        assert json.loads(again.stdout)["needles"][name] == told["needles"][name]


@pytest.mark.slow
def test_a_memory_answers_on_both_ways_alike() -> None:
    done = run(script=SERVING)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["same_texts"] == told["same_first_sources"] == told["questions"]
    assert told["device"]["fed_without_a_slot"] == 0
    assert told["ratios"].keys() == {
        "added_per_s", "alone_tokens_per_s", "together_tokens_per_s", "searches_per_s"
    }  # fmt: skip
