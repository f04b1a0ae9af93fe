"""A book is added in bounded memory: states wait on disk for their commit, which is still one or none."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.engine.states import PassageStates
from msa_memory.errors import ConflictError
from msa_memory.moving import encoding
from msa_memory.testing import open_memory, tiny_model
from msa_memory.types import TensorBytes

CONFIG = MemoryConfig(passage_tokens=64)
CHAPTER = "Dorothy followed the yellow brick road with the lion, the scarecrow and the tin woodman. "

ADD_AND_WAIT = """
import sys
from pathlib import Path
from msa_memory.engine.engine import Engine
from msa_memory.errors import ConflictError
from msa_memory.moving import encoding
from msa_memory.testing import open_memory

encoding.HELD_BYTES = 0
encode, seen = Engine.encode, 0

def slowly(engine, number, header, text):
    global seen
    seen += 1
    if seen == 20:
        print("encoding", flush=True)
        sys.stdin.read()
    return encode(engine, number, header, text)

memory = open_memory(sys.argv[1])
memory.add("Something short.", id="before")
Engine.encode = slowly
memory.add("A long text about a long road. " * 3000, id="book")
"""


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[MemoryModel]:
    with open_memory(tmp_path / "bank", config=CONFIG) as memory:
        yield memory


@pytest.fixture
def aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state is set aside."""
    monkeypatch.setattr(encoding, "HELD_BYTES", 0)


class Counted(bytes):
    """The bytes of a tensor; says how many bytes of such are alive."""

    alive = peak = 0

    def __new__(cls, data: bytes) -> "Counted":
        made = super().__new__(cls, data)
        cls.alive += len(data)
        cls.peak = max(cls.peak, cls.alive)
        return made

    def __del__(self) -> None:
        Counted.alive -= len(self)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    monkeypatch.setattr(Counted, "alive", 0)
    monkeypatch.setattr(Counted, "peak", 0)
    to_bytes = PassageStates.to_bytes

    def counting(states: PassageStates) -> dict[str, TensorBytes]:
        return {
            name: TensorBytes(tensor.dtype, tensor.shape, Counted(tensor.data))
            for name, tensor in to_bytes(states).items()
        }

    monkeypatch.setattr(PassageStates, "to_bytes", counting)
    return Counted


def states_of(memory: MemoryModel) -> list[tuple[str, int, dict[str, bytes]]]:
    store = memory._shared.store
    return [
        (record.document_id, record.ordinal, {n: bytes(t.data) for n, t in store.states(record).items()})
        for record in store.changes(0).added
    ]


def is_let_go(memory: MemoryModel) -> bool:
    """Whether nothing is set aside any more, and no byte of what was."""
    spool = memory._shared.store._spool
    assert spool is not None
    return not spool._waiting and (spool._file is None or spool._file.seek(0, 2) == 0)


@pytest.mark.parametrize("tokens", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_book_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: type[Counted], tokens: int
) -> None:
    held = 1 << 16
    monkeypatch.setattr(encoding, "HELD_BYTES", held)
    with open_memory(tmp_path / "bank") as memory:
        engine = memory._run(_engine(memory))
        book = CHAPTER * (tokens // engine.count_tokens(CHAPTER) + 1)
        document = memory.add(book, id="book")
        assert document.passages > tokens // 600
        stored = sum(len(data) for *_, tensors in states_of(memory) for data in tensors.values())
        assert stored > 4 * held, "too short a book to show anything"
        largest = max(sum(map(len, tensors.values())) for *_, tensors in states_of(memory))
        assert counted.peak <= held + 2 * largest
        assert is_let_go(memory)
        assert memory.search("the scarecrow and the tin woodman", k=1)[0].id == "book"


def _engine(memory: MemoryModel) -> Any:
    yield
    return memory._engine()


def test_what_waited_on_disk_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way in: states that were set aside are bit for bit those that were not."""
    found = []
    other = tiny_model(tmp_path / "model")
    for name, held in (("held", encoding.HELD_BYTES), ("aside", 0)):
        monkeypatch.setattr(encoding, "HELD_BYTES", held)
        with open_memory(tmp_path / name, config=CONFIG) as memory:
            memory.add(CHAPTER * 10, id="book")
            memory.add_many([{"id": f"d{i}", "content": f"{CHAPTER * i} {i}"} for i in range(5)])
            memory.update("d1", CHAPTER * 3)
            memory.session("s").append("user", CHAPTER * 8, key="k")
            said = memory.session("s").messages()[0].document_id
            memory.export(tmp_path / f"{name}.msa")
            copy = memory.namespace("copy")
            copy.import_bundle(tmp_path / f"{name}.msa", reencode=True)
            assert is_let_go(memory)
            assert memory.verify() == ()
            first = states_of(memory)
            memory.reencode(other)
            assert is_let_go(memory)
            again = states_of(memory)
            found.append([("said" if id == said else id, *rest) for id, *rest in (*first, *again)])
    assert sorted(found[0], key=repr) == sorted(found[1], key=repr)


def test_in_memory_nothing_is_set_aside(aside: None) -> None:
    with open_memory(config=CONFIG) as memory:
        memory.add(CHAPTER * 20, id="book")
        assert memory._shared.store._spool is None
        assert memory.verify() == ()


def test_what_fails_is_let_go(memory: MemoryModel, aside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.add("Short.", id="taken")
    with monkeypatch.context() as patch:  # somebody else takes the id meanwhile
        patch.setattr(memory._shared.store, "exists", lambda *_: set())
        with pytest.raises(ConflictError):
            memory.add(CHAPTER * 20, id="taken")
    assert is_let_go(memory)
    steps = memory._add_one({"content": CHAPTER * 20, "id": "cancelled"}, "error")
    for _ in range(3):
        next(steps)
    assert not is_let_go(memory)
    steps.close()
    assert is_let_go(memory)
    assert memory.count() == 1
    assert memory.verify() == ()


def test_a_kill_leaves_nothing(tmp_path: Path) -> None:
    """Killed while a book is encoded: no part of it is there, nor a file of what was set aside."""
    folder = tmp_path / "bank"
    command = [sys.executable, "-c", ADD_AND_WAIT, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "encoding\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    with open_memory(folder) as memory:
        assert [document.id for document in memory.list()] == ["before"]
        assert memory.verify() == ()
        states = list((folder / "states").iterdir())
        assert [path.name for path in states] == ["segment-00000001.seg"]
        (record,) = memory._shared.store.changes(0).added
        assert states[0].stat().st_size == record.offset + record.length
        memory.add(CHAPTER * 50, id="book")
        assert memory.verify() == ()
