"""The LlamaIndex examples run: with the tiny model in a second, once with the default model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from msa_memory.testing import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path, *arguments: str, model: Path | None) -> str:
    """What an example prints, started in an empty folder."""
    environment = {key: value for key, value in os.environ.items() if key != "MSA_MEMORY_MODEL"}
    if model is not None:
        environment["MSA_MEMORY_MODEL"] = str(model)
    done = subprocess.run(
        [sys.executable, "-P", str(EXAMPLES / name), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def sources(printed: str) -> list[list[str]]:
    """The file names below each question."""
    return [re.findall(r"^   -?[\d.]+ (\S+):", part, re.MULTILINE) for part in printed.split("\nQ: ")[1:]]


def test_a_query_engine_over_a_folder(tmp_path: Path, tiny: Path) -> None:
    printed = run("llama_index_folder.py", tmp_path, model=tiny)
    assert "3 files in the memory, 0 no longer there" in printed
    assert "2 files in the memory, 1 no longer there" in printed
    key, boat, moved, oil = sources(printed)
    assert key[0] == "house.md"
    assert "boat.md" in boat
    assert "blue pot" in printed.split("Q: Where is the spare key?")[2]
    assert "garden.md" not in moved
    assert oil == ["boat.md"]
    assert list(tmp_path.iterdir()) == []


def test_a_query_engine_over_a_folder_of_ones_own(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "deep" / "log.txt").write_text("Rained all day in Bergen.")
    printed = run("llama_index_folder.py", tmp_path, "mine", "Where did it rain?", model=tiny)
    assert sources(printed) == [["log.txt"]]


def test_a_long_chat(tmp_path: Path, tiny: Path) -> None:
    printed = run("llama_index_chat.py", tmp_path, model=tiny)
    left, said = map(int, re.findall(r"^(\d+) of (\d+) messages", printed)[0])
    assert 0 < left < said
    assert "Her name is Minerva." in printed.split("<msa_memory>")[1].split("</msa_memory>")[0]


@pytest.mark.slow
def test_the_default_model_answers_from_a_folder(tmp_path: Path) -> None:
    """End to end with real weights: read, ask, change, ask again."""
    printed = run("llama_index_folder.py", tmp_path, model=None)
    answers = re.findall(r"^A: (.*)$", printed, re.MULTILINE)
    key, boat, moved, oil = sources(printed)
    assert (key[0], boat[0], moved[0], oil[0]) == ("house.md", "boat.md", "house.md", "boat.md")
    assert "Minerva" in answers[1]
    assert "blue pot" in answers[2]


@pytest.mark.slow
def test_the_default_model_remembers_a_long_chat(tmp_path: Path) -> None:
    printed = run("llama_index_chat.py", tmp_path, model=None)
    assert "Her name is Minerva." in printed.split("<msa_memory>")[1].split("</msa_memory>")[0]
    assert "Minerva" in printed.split("A: ")[1]
