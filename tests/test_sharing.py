"""One memory among threads, tasks and processes: all see all changes, and a running answer none."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.errors import NotFoundError
from msa_memory.testing import open_memory, tiny_model

BRIEF = MemoryConfig(max_new_tokens=6)
WORDS = ["violin", "lighthouse", "teapot", "lion"]


@pytest.fixture(params=["in RAM", "in a folder"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemoryModel]:
    with open_memory(tmp_path / "m" if request.param == "in a folder" else None, config=BRIEF) as memory:
        yield memory


def checked(memory: MemoryModel, word: str, gone: set[str], there: set[str]) -> None:
    """Ask in every way: what was forgotten before is nowhere, what stays is found."""
    found = {source.id for source in memory.search(word, k=1000)}
    assert there <= found
    assert not gone & found
    for chunk in memory.stream(f"What about the {word}?", k=8):
        if chunk.answer:
            assert not gone & {source.id for source in (*chunk.answer.sources, *chunk.answer.dropped)}


def test_threads_and_tasks_mix_everything(memory: MemoryModel) -> None:
    """Each keeps its own books; what the others do may not disturb them."""
    errors: list[BaseException] = []

    def in_a_thread(name: str, word: str) -> None:
        gone: set[str] = set()
        there: set[str] = set()
        try:
            for turn in range(5):
                id = f"{name}-{turn}"
                memory.add(f"The {word} number {turn} of {name}.", id=id, metadata={"by": name})
                there.add(id)
                memory.update(id, f"The {word} number {turn} of {name}, changed.")
                memory.session(name).append("user", f"I like the {word}.")
                if turn % 2:
                    memory.forget(f"{name}-{turn - 1}")
                    there.remove(f"{name}-{turn - 1}")
                    gone.add(f"{name}-{turn - 1}")
                checked(memory, word, gone, there)
        except BaseException as error:
            errors.append(error)

    async def in_a_task(name: str, word: str) -> None:
        there: set[str] = set()
        for turn in range(4):
            id = f"{name}-{turn}"
            await memory.aadd(f"The {word} number {turn} of {name}.", id=id, metadata={"by": name})
            there.add(id)
            if turn == 2:
                await memory.aforget(f"{name}-0")
                there.remove(f"{name}-0")
            stream = memory.astream(f"What about the {word}?", k=8)
            if turn == 1:
                await anext(stream)
                await stream.aclose()
                continue
            async for chunk in stream:
                if chunk.answer and turn >= 2:
                    assert f"{name}-0" not in {source.id for source in chunk.answer.sources}
            assert there <= {source.id for source in await memory.asearch(word, k=1000)}

    async def in_tasks() -> None:
        await asyncio.gather(*(in_a_task(f"task{n}", word) for n, word in enumerate(WORDS)))

    def in_a_loop() -> None:
        try:
            asyncio.run(in_tasks())
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=in_a_thread, args=(f"t{n}", word)) for n, word in enumerate(WORDS)]
    workers.append(threading.Thread(target=in_a_loop))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []
    for number in range(4):
        listed = {document.id for document in memory.list({"by": f"t{number}"})}
        assert listed == {f"t{number}-{turn}" for turn in (1, 3, 4)}
        assert len(memory.session(f"t{number}").messages()) == 5
        listed = {document.id for document in memory.list({"by": f"task{number}"})}
        assert listed == {f"task{number}-{turn}" for turn in (1, 2, 3)}
    assert memory.verify() == ()


# a running answer


def test_a_running_answer_keeps_what_it_began_with(tmp_path: Path) -> None:
    """What others add, change and forget meanwhile changes no letter of it; the next one sees it all."""
    with open_memory(tmp_path / "m") as memory, open_memory(tmp_path / "m") as other:
        memory.add_many([{"content": f"Violin number {n} is old.", "id": str(n)} for n in range(6)])
        undisturbed = memory.query("Which violin is old?", max_new_tokens=40)
        stream = memory.stream("Which violin is old?", max_new_tokens=40)
        texts = [next(stream).text]
        other.add("Violin number 9 is the oldest of all violins.", id="9")
        other.update("1", "Violin number 1 is new.")
        other.forget(["0", "2", "3"])
        memory.forget(["4", "5"])
        chunks = list(stream)
        texts += [chunk.text for chunk in chunks]
        answer = chunks[-1].answer
        assert answer is not None
        assert answer.model_dump(exclude={"timings"}) == undisturbed.model_dump(exclude={"timings"})
        assert "".join(texts) == undisturbed.text
        for each in (memory, other):
            found = {source.id for source in each.query("Which violin is old?", k=9).sources}
            assert found == {"1", "9"}


# processes


REPL = """
import json, sys
from msa_memory.errors import MSAError
from msa_memory.testing import open_memory
with open_memory(sys.argv[1]) as memory:
    print("ready", flush=True)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        try:
            if verb == "add":
                said = memory.add(arguments[1], id=arguments[0]).id
            elif verb == "update":
                said = memory.update(*arguments).version
            elif verb == "forget":
                said = list(memory.forget(arguments[0]).ids)
            elif verb == "say":
                said = memory.session(arguments[0]).append("user", arguments[1]).position
            elif verb == "read":
                said = [message.content for message in memory.session(arguments[0]).messages()]
            elif verb == "search":
                said = {source.id: source.text for source in memory.search(arguments[0], k=1000)}
            else:
                said = [source.id for source in memory.query(arguments[0], k=9, max_new_tokens=2).sources]
        except MSAError as error:
            said = type(error).__name__
        print(json.dumps(said), flush=True)
"""


class Other:
    """The same memory, open in a process of its own, which does one thing at a time when told to."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-P", "-c", REPL, str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def __call__(self, *words: str) -> Any:
        self.send(*words)
        return self.hear()

    def send(self, *words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return line.strip() if line == "ready\n" else json.loads(line)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an empty memory, for all processes of this file."""
    tiny_model()
    folder = tmp_path_factory.mktemp("shared") / "m"
    with open_memory(folder):
        pass
    return folder


@pytest.fixture(scope="module")
def others(shared: Path) -> Iterator[list[Other]]:
    started = [Other(shared) for _ in range(4)]
    assert [other.hear() for other in started] == ["ready"] * 4
    yield started
    for other in started:
        assert other.process.stdin is not None
        other.process.stdin.close()
    assert [other.process.wait(timeout=60) for other in started] == [0] * 4


@pytest.mark.slow
def test_four_processes_see_each_other_at_the_next_question(others: list[Other], shared: Path) -> None:
    texts: dict[str, str] = {}

    def all_agree() -> None:
        for other in others:
            other.send("search", "violin lighthouse")
        assert [other.hear() for other in others] == [texts] * 4
        for other in others:
            other.send("query", "Which violin?")
        assert all(set(other.hear()) <= texts.keys() for other in others)

    for number, other in enumerate(others):
        texts[str(number)] = f"Violin number {number}."
        assert other("add", str(number), texts[str(number)]) == str(number)
        all_agree()
    for number, other in enumerate(others):
        neighbour = str((number + 1) % 4)
        if number % 2:
            texts[neighbour] = f"A lighthouse instead of violin {neighbour}."
            assert other("update", neighbour, texts[neighbour]) == 2
        else:
            del texts[neighbour]
            assert other("forget", neighbour) == [neighbour]
            assert others[number - 1]("forget", neighbour) == "NotFoundError"
        all_agree()
    for number, other in enumerate(others):
        assert other("say", "s", f"Process {number} speaks.") == number
    assert [other("read", "s") for other in others] == [[f"Process {n} speaks." for n in range(4)]] * 4
    with open_memory(shared) as memory:
        assert memory.verify() == ()


@pytest.mark.slow
def test_four_processes_write_at_once(others: list[Other], shared: Path) -> None:
    """Each is sent a pile of work at once; nothing waits for anything but the writer lock."""
    for number, other in enumerate(others):
        for turn in range(6):
            other.send("add", f"{number}-{turn}", f"Violin {turn} of process {number}.")
            other.send("say", "crowd", f"{number}-{turn}")
            if turn % 3 == 2:
                other.send("forget", f"{number}-{turn}")
            other.send("search", "violin")
    for number, other in enumerate(others):
        own: set[str] = set()
        for turn in range(6):
            id = f"{number}-{turn}"
            assert other.hear() == id
            assert isinstance(other.hear(), int)
            own.add(id)
            if turn % 3 == 2:
                assert other.hear() == [id]
                own.remove(id)
            seen = other.hear()
            assert own == {name for name in seen if name.startswith(f"{number}-")}
    with open_memory(shared) as memory:
        kept = {f"{number}-{turn}" for number in range(4) for turn in (0, 1, 3, 4)}
        said = memory.session("crowd").messages()
        listed = memory.list({"session": {"$exists": False}}, limit=1000)
        assert {document.id for document in listed if "-" in document.id} == kept
        assert memory.count({"session": "crowd"}) == 24
        assert [message.position for message in said] == list(range(24))
        for number in range(4):
            own = [m.content for m in said if m.content.startswith(f"{number}-")]
            assert own == [f"{number}-{turn}" for turn in range(6)]
        with pytest.raises(NotFoundError):
            memory.get("0-2")
        assert memory.verify() == ()
