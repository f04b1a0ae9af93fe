"""The pages under docs/ run: their Python and console blocks from top to bottom, their outputs compared.

Here with the tiny testing model; the slow test does the same with the default model. Blocks marked ``sh`` are
not run: their ``msa-memory`` lines are parsed, so that no page names a command or an option that is missing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.main import get_command
from typer.testing import CliRunner

from msa_memory.cli import app
from msa_memory.engine.models import DEFAULT_MODEL
from msa_memory.testing import tiny_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
RUN = {"python", "console"}
NOT_RUN = {"", "json", "sh", "text"}
_BLOCK = re.compile(r"^(?:<!-- needs: (\w+) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the environment variable it cannot run without."""

    language: str
    text: str
    needs: str


def blocks(page: Path) -> list[Block]:
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(language, text, needs) for needs, language, text in found]


def run_python(code: str, page: Path, names: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(page), "exec"), names)
    return printed.getvalue()


def run_console(text: str) -> None:
    """Every ``$ msa-memory`` line must end well."""
    for line in text.splitlines():
        assert line.startswith("$ msa-memory "), f"{line!r} is no command; put output in a text block"
        ran = CliRunner().invoke(app, shlex.split(line)[2:], prog_name="msa-memory")
        assert ran.exit_code == 0, (line, ran.output, ran.exception)


def run_page(page: Path) -> list[str]:
    """Run a page in the current folder; what it could not run, and why.

    A ``text`` block is output, except on a page where no Python stands before it.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    printed: str | None = None
    left_out = []
    for block in blocks(page):
        if block.needs and not os.environ.get(block.needs):
            left_out.append(f"{page.name}: a block needs {block.needs}")
        elif block.language == "python":
            printed = (printed or "") + run_python(block.text, page, names)
        elif block.language == "console":
            run_console(block.text)
        elif block.language == "text" and printed is not None:
            assert printed.startswith(block.text), (page.name, printed, block.text)
            printed = printed[len(block.text) :]
    return left_out


def backbone(folder: Path) -> Path:
    """The tiny model without its routers, as any checkpoint of the hub comes."""
    made = tiny_model(folder)
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    del config["msa_config"]
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(made / "model.safetensors")
    save_file({name: x for name, x in weights.items() if "router" not in name}, made / "model.safetensors")
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_schema: Callable[[str], str]) -> Path:
    """An empty working folder, and the tests' PostgreSQL server where there is one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MSA_MEMORY_PATH", raising=False)
    monkeypatch.setenv("BACKBONE", str(backbone(tmp_path / "elsewhere")))
    if server := os.environ.get("MSA_TEST_POSTGRES_URL"):
        monkeypatch.setenv("DATABASE_URL", new_schema(server))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSA_MEMORY_MODEL", str(tiny_model()))
    for reason in run_page(page):
        print(f"not run here: {reason}")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_what_the_default_model_does(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSA_MEMORY_MODEL", DEFAULT_MODEL)
    run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_has_a_language_that_is_looked_after(page: Path) -> None:
    fences = re.findall(r"^```", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page)), "a fence is not closed"
    assert {block.language for block in blocks(page)} <= RUN | NOT_RUN


def test_commands_that_are_not_run_can_be_parsed(folder: Path) -> None:
    lines = [
        line
        for page in [*PAGES, ROOT / "README.md"]
        for block in blocks(page)
        if block.language == "sh"
        for line in block.text.splitlines()
        if line.startswith("msa-memory ")
    ]
    assert len(lines) > 5
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        for word in words:
            if re.fullmatch(r"[\w-]+\.(jsonl|json|txt|msa)", word):
                Path(word).touch()
            elif word in ("FOLDER", "MODEL"):
                Path(word).mkdir(exist_ok=True)
        parse(words)


def parse(words: list[str]) -> None:
    """Fails as the command line would where a command or an option does not exist."""
    command: Any = get_command(app)
    context = command.make_context("msa-memory", words)
    while hasattr(command, "resolve_command"):
        left = [*context._protected_args, *context.args]
        name, command, left = command.resolve_command(context, left)
        context = command.make_context(name, left, parent=context)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(_LINK.findall((DOCS / "index.md").read_text(encoding="utf-8")))
    assert {page.name for page in PAGES} - {"index.md"} <= listed


def test_the_reference_is_up_to_date() -> None:
    ran = subprocess.run(
        [sys.executable, str(DOCS / "reference.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, f"run `python docs/reference.py`\n{ran.stderr}"
