"""SIGKILL at random moments, and many processes and threads at once: on SQLite and on PostgreSQL."""

import os
import random
import runpy
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from msa_memory.persistence import Store

WORKER = Path(__file__).with_name("worker.py")
KILLS_PER_BANK = 10
PROCESSES = 8


@dataclass
class Ledger:
    """What the killed processes said: version and length of the text of every document, or None."""

    acknowledged: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    in_doubt: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    """The write that was announced and not acknowledged."""

    def read(self, lines: list[str]) -> int:
        """Take in a process's report; how many writes it was told are stored."""
        self.in_doubt, done = {}, 0
        for line in lines:
            match line.split():
                case [_, id, version, length]:
                    self.in_doubt = {id: (int(version), int(length))}
                case ["forget", id]:
                    self.in_doubt = {id: None}
                case ["done"]:
                    self.acknowledged |= self.in_doubt
                    self.in_doubt, done = {}, done + 1
        return done

    def settle(self, found: dict[str, tuple[int, int]]) -> None:
        """Compare with what the bank holds; the write in doubt may have happened or not."""
        known = {id: what for id, what in self.acknowledged.items() if what is not None}
        either = known | self.in_doubt
        assert found in (known, {id: what for id, what in either.items() if what is not None})
        self.acknowledged = dict(found)


def run(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def kill_at_random(folder: Path, prefix: str, url: list[str], generator: random.Random) -> list[str]:
    """What a process said that was killed at a random moment after a random number of lines."""
    reading, writing = os.pipe()
    child = os.fork()  # the same process as ``run`` would start, without its imports again
    if child == 0:
        os.close(reading)
        become_a_worker(writing, ["mix", str(folder), prefix, "0", *url])
    os.close(writing)
    with os.fdopen(reading) as said:
        lines = [said.readline() for _ in range(generator.randint(1, 40))]
        time.sleep(generator.uniform(0, 0.02))  # not to wait for anything: the moment of the kill
        os.kill(child, signal.SIGKILL)
        lines += said.readlines()
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "".join(lines)
    return [line for line in lines if line.endswith("\n")]


def become_a_worker(output: int, arguments: list[str]) -> NoReturn:
    try:
        sys.argv, sys.stdout = [str(WORKER), *arguments], os.fdopen(output, "w")
        runpy.run_path(str(WORKER), run_name="__main__")
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
    os._exit(1)


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
@pytest.mark.parametrize(
    "kills", [pytest.param(50, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.soak)]
)
def test_kills_lose_nothing_acknowledged(tmp_path, request, database, kills):
    url = [request.getfixturevalue("postgres_url")] if database == "postgres" else []
    generator, writes = random.Random(kills), 0
    for bank in range(kills // KILLS_PER_BANK):
        if url and bank:
            break_off(url[0])
        folder, ledger = tmp_path / f"bank{bank}", Ledger()
        for i in range(KILLS_PER_BANK):
            lines = kill_at_random(folder, f"k{i}", url, generator)
            writes += ledger.read(lines)
            with Store.open(folder, catalog_url=url[0] if url else None) as store:
                assert store.damage == ()
                found = {
                    document.id: (document.version, len(document.text))
                    for document in store.list("default", limit=10_000)
                }
                ledger.settle(found)
                assert store.verify() == ()
                for record in store.changes(0).added:
                    store.states(record)
    print(f"{database}: {kills} kills, {writes} acknowledged writes, none lost, every bank read")
    assert writes > kills


def break_off(url: str) -> None:
    """An empty schema again, for the next bank."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.engine import make_url

    parsed = make_url(url).set(drivername="postgresql+psycopg")
    schema = str(parsed.query["options"]).rpartition("=")[2]
    engine = create_engine(parsed)
    with engine.begin() as connection:
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    engine.dispose()


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
@pytest.mark.parametrize(
    "seconds", [pytest.param(10, marks=pytest.mark.slow), pytest.param(300, marks=pytest.mark.soak)]
)
def test_processes_and_threads_keep_their_namespaces(tmp_path, request, database, seconds):
    """8 processes of 4 threads write, forget and read one bank, each thread in a namespace of its own."""
    url = [request.getfixturevalue("postgres_url")] if database == "postgres" else []
    Store.open(tmp_path / "bank", catalog_url=url[0] if url else None).close()
    workers = [run("share", tmp_path / "bank", f"p{i}", seconds, *url) for i in range(PROCESSES)]
    outputs = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * PROCESSES, "".join(outputs)
    rounds = [int(word) for output in outputs for word in output.split("rounds")[1].split()]
    assert len(rounds) == 4 * PROCESSES
    assert min(rounds) > 0
    print(f"{database}: {PROCESSES} x 4 threads for {seconds} s, {sum(rounds)} rounds without an error")
    with Store.open(tmp_path / "bank", catalog_url=url[0] if url else None) as store:
        assert store.verify() == ()
        assert len(store.namespaces()) == 4 * PROCESSES
