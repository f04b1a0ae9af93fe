"""SIGKILL in the middle of every move: nothing is lost or half there, and running it again finishes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from msa_memory import MemoryModel
from msa_memory.errors import MSAError
from msa_memory.testing import open_memory, tiny_model

WORKER = Path(__file__).with_name("moving_worker.py")
DOCUMENTS = 10
KILLS = [4, pytest.param(16, marks=pytest.mark.slow)]
Do = Callable[[str, int, Path, Path], int]


@pytest.fixture(scope="module")
def do() -> Iterator[Do]:
    """Run an action in a process of its own that dies before its n-th step; how many steps it took."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen(
        [sys.executable, str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )

    def run(action: str, after: int, folder: Path, other: Path) -> int:
        worker.stdin.write(json.dumps([action, after, str(folder), str(other)]) + "\n")
        worker.stdin.flush()
        status, steps = json.loads(worker.stdout.readline())
        assert status == (signal.SIGKILL if after else 0)
        return steps

    yield run
    worker.stdin.close()
    worker.wait()


@pytest.fixture(scope="module")
def second_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights."""
    folder = tiny_model(tmp_path_factory.mktemp("model") / "second")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory with versions, a session, forgotten and expired documents."""
    folder = tmp_path_factory.mktemp("filled") / "memory"
    with open_memory(folder) as memory:
        memory.add_many(
            {"id": f"d{i}", "content": f"Person {i} lives in house {i} and likes tea.", "metadata": {"i": i}}
            for i in range(DOCUMENTS)
        )
        memory.update("d3", "Person 3 moved to a boat.")
        memory.session("talk").append("system", "Be brief.")
        memory.session("talk").append("user", "Which tea is green?", key="k1")
        memory.add_many([{"id": f"gone{i}", "content": f"gone {i} " * 40} for i in range(DOCUMENTS)])
        memory.forget([f"gone{i}" for i in range(DOCUMENTS)])
        memory.add("Already over.", id="over", expires_at=datetime.now(UTC) - timedelta(days=1))
    return folder


@pytest.fixture(scope="module")
def bundle(filled: Path, tmp_path_factory: pytest.TempPathFactory, do: Do) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "all.msa"
    do("export", 0, filled, path)
    return path


def contents(memory: MemoryModel) -> dict[str, object]:
    """Everything people see of a memory, and that it is sound."""
    assert memory.verify() == ()
    found = {doc.id: (doc, memory.history(doc.id)) for doc in memory.list(limit=1000)}
    sessions = {name: memory.session(name).messages() for name in memory.sessions()}
    return {"documents": found, "sessions": sessions}


def look(folder: Path, **options: object) -> dict[str, object]:
    with open_memory(folder, **options) as memory:
        return contents(memory)


def spread(steps: int, kills: int) -> list[int]:
    """Where to kill: before the first step, before one of the last and in between."""
    return sorted({1 + (steps - 4) * place // (kills - 1) for place in range(kills)})


def copied(folder: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(folder, target)


@pytest.mark.parametrize("kills", KILLS)
def test_export(kills: int, do: Do, filled: Path, bundle: Path, tmp_path: Path) -> None:
    before, target = look(filled), tmp_path / "out.msa"
    for after in spread(do("export", 0, filled, tmp_path / "count.msa"), kills):
        do("export", after, filled, target)
        if target.exists():
            assert target.read_bytes() == bundle.read_bytes()
            target.unlink()
        do("export", 0, filled, target)
        assert target.read_bytes() == bundle.read_bytes()
        target.unlink()
        assert [entry.name for entry in tmp_path.iterdir()] == ["count.msa"]
    assert look(filled) == before


@pytest.mark.parametrize("kills", KILLS)
def test_import(kills: int, do: Do, filled: Path, bundle: Path, tmp_path: Path) -> None:
    whole = look(filled)
    empty = tmp_path / "empty"
    with open_memory(empty) as memory:
        memory.search("nothing")  # binds the model
    halves = set()
    for after in spread(do("import", 0, copied(empty, tmp_path / "count"), bundle), kills):
        target = copied(empty, tmp_path / "target")
        do("import", after, target, bundle)
        half = look(target)
        assert half["documents"].items() <= whole["documents"].items()
        halves.add(len(half["documents"]))
        do("import", 0, target, bundle)
        assert look(target) == whole
    assert {0, DOCUMENTS + 1} <= halves
    assert len(halves) > 2


@pytest.mark.parametrize("kills", KILLS)
def test_fork(kills: int, do: Do, filled: Path, tmp_path: Path) -> None:
    whole, target = look(filled), tmp_path / "target"
    for after in spread(do("fork", 0, filled, tmp_path / "count"), kills):
        do("fork", after, filled, target)
        for left in tmp_path.iterdir():
            if left.is_dir() and left.name.startswith("."):
                assert is_whole_or_refused(left, whole)
        if target.exists():
            assert look(target) == whole
            shutil.rmtree(target)
        do("fork", 0, filled, target)
        assert look(target) == whole
        shutil.rmtree(target)
        assert [entry.name for entry in tmp_path.iterdir()] == ["count"]
    assert look(filled) == whole


def is_whole_or_refused(folder: Path, whole: dict[str, object]) -> bool:
    if not any(folder.iterdir()) or [entry.name for entry in folder.iterdir()] == ["states"]:
        return True  # nothing that could be mistaken for a memory
    try:
        return look(folder) == whole
    except MSAError:
        return True


@pytest.mark.parametrize("kills", KILLS)
def test_reencode(kills: int, do: Do, filled: Path, second_model: Path, tmp_path: Path) -> None:
    before = look(filled)
    new, target = tmp_path / "new", tmp_path / "target"
    steps = do("reencode", 0, copied(filled, new), second_model)
    after_all, outcomes = look(new, model=None), set()
    with open_memory(new, model=None) as memory:
        best = memory.search("house 7", k=1)
    for after in spread(steps, kills):
        do("reencode", after, copied(filled, target), second_model)
        with open_memory(target, model=None) as memory:  # under whichever model it is now
            outcomes.add(Path(memory.stats.model).name)
            assert memory.search("house 7", k=1)[0].id == "d7"
            assert contents(memory)["sessions"] == before["sessions"]
            assert contents(memory)["documents"].keys() == before["documents"].keys()
        if outcomes == {"second"}:
            break
        do("reencode", 0, target, second_model)
        assert look(target, model=None) == after_all
        with open_memory(target, model=None) as memory:
            found = memory.search("house 7", k=1)
            assert [(hit.id, hit.score) for hit in found] == [(hit.id, hit.score) for hit in best]
    assert len(outcomes) == 2


@pytest.mark.parametrize("kills", KILLS)
def test_compact(kills: int, do: Do, filled: Path, tmp_path: Path) -> None:
    before, target = look(filled), tmp_path / "target"
    for after in spread(do("compact", 0, copied(filled, tmp_path / "count"), target), kills):
        do("compact", after, copied(filled, target), target)
        assert look(target) == before
        do("compact", 0, target, target)
        assert look(target) == before
