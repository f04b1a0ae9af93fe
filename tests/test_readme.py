"""The README's code samples run with the real default model, and the first prints what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
SAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def run(code: str, folder: Path) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_first_sample_prints_what_the_readme_says(tmp_path: Path) -> None:
    said = re.findall(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert run(SAMPLES[0], tmp_path) == said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sample", "says"),
    [(1, "walnut"), (2, "Minerva"), (3, "second pier")],
    ids=["session", "langchain", "llama"],
)
def test_the_other_samples_find_what_they_ask_for(sample: int, says: str, tmp_path: Path) -> None:
    assert says in run(SAMPLES[sample], tmp_path)
