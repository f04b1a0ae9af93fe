"""The examples run on the tiny model; one also on the default model, where its answers make sense."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from langchain_core.language_models import GenericFakeChatModel

from msa_memory import MemoryModel
from msa_memory.engine.models import DEFAULT_MODEL
from msa_memory.testing import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str | Path, model: str | Path) -> str:
    ran = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "MSA_MEMORY_MODEL": str(model)},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_an_agent_with_a_memory_across_restarts(tmp_path: Path) -> None:
    printed = run("langchain_agent.py", tmp_path / "memory", model=tiny_model())
    monday, tuesday = printed.split("== Tuesday")
    assert "Minerva" in monday
    assert "recalled: []" in monday, "nothing to recall at first"
    assert "Her name is Minerva." in tuesday.split("recalled:")[1]
    with MemoryModel.open(tmp_path / "memory") as memory:
        assert memory.sessions() == ["monday", "tuesday"]


@pytest.mark.slow
def test_the_agent_on_the_default_model(tmp_path: Path) -> None:
    printed = run("langchain_agent.py", tmp_path / "memory", model=DEFAULT_MODEL)
    monday, tuesday = printed.split("== Tuesday")
    assert "calls get_weather({'city': 'Oslo'})" in monday
    assert "tool: It is sunny in Oslo, 21 degrees." in monday
    assert "ai: " in tuesday
    assert "Minerva" in tuesday


def test_another_chat_model_with_our_middleware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MSA_MEMORY_MODEL", str(tiny_model()))
    talk = runpy.run_path(str(EXAMPLES / "langchain_middleware.py"))["talk"]
    script = ["What a name!", "I will remember that.", "No chicken [1]."]
    assert talk(GenericFakeChatModel(messages=iter(script)), tmp_path / "memory") == script
    assert "tuesday, agent: No chicken [1]." in capsys.readouterr().out
    with MemoryModel.open(tmp_path / "memory") as memory:
        assert [len(memory.session(name).messages()) for name in memory.sessions()] == [4, 2]


def test_a_graph_with_our_store(tmp_path: Path) -> None:
    printed = run("langgraph_store.py", tmp_path / "store", model=tiny_model())
    last = printed.split("ann: What may my cat not eat?")[1]
    assert "My cat Minerva is allergic to chicken." in last
    assert "everything" not in last, "another user's notes stay out"
    assert "namespaces: [('notes', 'ann'), ('notes', 'ben')]" in printed
    again = run("langgraph_store.py", tmp_path / "store", model=tiny_model())
    assert "recalled: ['I paint lighthouses in Bergen.'" in again, "the folder remembers"
