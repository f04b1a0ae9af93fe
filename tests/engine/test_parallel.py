"""Memory Parallel with real processes on Gloo: ids, tokens and scores as in one process, and named losses."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.engine import Engine, Routing, load_engine
from msa_memory.engine.interleave import Interleave, InterleaveOptions
from msa_memory.engine.parallel import join, joined, new_bank
from msa_memory.engine.parallel.wire import pack, packed_bytes, unpack
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.engine.states import PassageStates
from msa_memory.errors import ConfigError, EngineError, RankLostError
from msa_memory.testing import open_memory, tiny_model

RANK = Path(__file__).with_name("parallel_rank.py")
WITHIN_S = 280
"""A bound on waiting, not a measure: the machine may be busy."""


def rank_module() -> dict[str, Any]:
    """The texts, questions and story of the ranks' own script."""
    import runpy

    return runpy.run_path(str(RANK))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The one process to compare with; sums depend on the number of threads, and every rank has one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_engine(tiny_model(), device="cpu")
    torch.set_num_threads(threads)


def start(count: int, scenario: str, *more: str) -> list[subprocess.Popen[str]]:
    """One process per rank with the environment that torchrun gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-P", str(RANK), scenario, str(tiny_model()), *more]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    return processes


def told_by_leader(processes: list[subprocess.Popen[str]]) -> Any:
    """What the leader printed last, once all ranks ended well."""
    try:
        outputs = [process.communicate(timeout=WITHIN_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return json.loads(outputs[0][0].splitlines()[-1])


class OneProcess:
    """``ParallelMemory``'s verbs over a plain ``MemoryBank``."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.texts: dict[int, str] = {}
        self.states: dict[int, PassageStates] = {}
        self.bank: MemoryBank = engine.new_bank(self.states.__getitem__)

    def add(self, texts: Mapping[int, str]) -> None:
        for number, text in texts.items():
            self.texts[number] = text
            self.states[number] = self.engine.encode(number, "", text)
            self.bank.add(number, self.states[number].router_keys, self.states[number].terms)

    def update(self, number: int, text: str) -> None:
        self.bank.remove([number])
        self.add({number: text})

    def forget(self, numbers: list[int]) -> None:
        self.bank.remove(numbers)

    def route(self, question: str, *, visible: list[int] | None = None) -> Routing:
        shown = None if visible is None else np.array(visible, dtype=np.int64)
        return self.engine.route(question, self.bank.view(shown))

    def query(
        self, question: str, *, k: int, options: SamplingOptions, visible: list[int] | None = None
    ) -> Any:
        routing = self.route(question, visible=visible)
        found = routing.view.select(routing.relevance(), k)
        evidence = "".join(f"{self.texts[number]}\n" for number in found.numbers)
        ids = self.engine.prompt.reading(evidence, question)
        generation = self.engine.read(routing.view, routing.selections, ids, options)
        list(self.engine.decode(generation))
        return type("Read", (), {"text": generation.text, "numbers": found.numbers})

    def interleave(self, question: str, options: InterleaveOptions) -> Interleave:
        return self.engine.interleave(
            self.bank.view(), question, lambda numbers: {n: self.texts[n] for n in numbers}, options
        )


def same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal words, ids and counts; equal numbers within a tolerance."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same(found[name], value, tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other, tolerance)
    elif isinstance(expected, float) and np.isfinite(expected):
        assert found == pytest.approx(expected, abs=tolerance)
    else:
        assert found == expected


def visible_only(seen: dict[str, Any]) -> dict[str, Any]:
    """Without the passages a view masks, which a bank may list or leave out."""

    def shown(look: dict[str, Any]) -> dict[str, Any]:
        kept = [index for index, score in enumerate(look["scores"][0]) if np.isfinite(score)]
        pick = lambda row: [row[index] for index in kept]  # noqa: E731
        return look | {
            "numbers": pick(look["numbers"]),
            "words": pick(look["words"]),
            "scores": [pick(row) for row in look["scores"]],
        }

    looks = ("added", "changed", "filtered", "nothing")
    return seen | {name: [shown(look) for look in seen[name]] for name in looks}


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, Any]:
    """What the leader of two ranks saw in every scenario."""
    told: dict[str, Any] = told_by_leader(start(2, "everything"))
    return told


def check_story(found: dict[str, Any], engine: Engine) -> None:
    story: Callable[..., dict[str, Any]] = rank_module()["story"]
    expected = story(OneProcess(engine), engine)
    assert found.pop("exchanges") == len(engine.msa.router_layers)
    expected.pop("exchanges")
    same(visible_only(found), visible_only(expected))
    assert found["changed"][0]["numbers"] == [0, 2, 3, 5, 6, 7, 8, 9, 10]
    assert found["snapshot"] == list(range(9))


def test_two_ranks_answer_as_one_process_does(two_ranks: dict[str, Any], engine: Engine) -> None:
    """Added, updated, forgotten, filtered, routed, read and interleaved; logits within 1e-5."""
    check_story(two_ranks["tell"], engine)


@pytest.mark.slow
def test_four_ranks_answer_as_one_process_does(engine: Engine) -> None:
    check_story(told_by_leader(start(4, "tell")), engine)


def test_a_rank_that_cannot_do_its_part_changes_nothing(two_ranks: dict[str, Any]) -> None:
    told = two_ranks["fail"]
    assert "rank 1 could not carry a request out" in told["error"]
    assert "at least one token" in told["error"]
    assert told["held"] == told["found"] == [1]


def test_routing_keys_alone_may_live_on_the_ranks(two_ranks: dict[str, Any], engine: Engine) -> None:
    told = two_ranks["keys_only"]
    texts, questions = rank_module()["TEXTS"], rank_module()["QUESTIONS"]
    plain = OneProcess(engine)
    plain.add({number: text for number, text in texts.items() if number != 3})
    shown = [number for number in texts if number not in (3, 5)]
    routing = plain.route(questions[0], visible=shown)
    assert told["numbers"] == shown
    assert told["chosen"] == list(routing.view.select(routing.relevance(), 3).numbers)
    pooled = routing.view.gather(0, [1, 2], torch.empty(0))
    assert told["gathered"] == pytest.approx([float(x.sum()) for x in pooled], abs=1e-4)
    assert told["bytes"] > 0


@pytest.mark.parametrize("way", ["whole", "skimmed"])
def test_ranks_that_score_roughly_tell_the_leader_what_is_exact(two_ranks: dict[str, Any], way: str) -> None:
    """Of 6,000 passages on 8-bit keys: all that is chosen, and its scores, are those of one exact bank."""
    rank, told = rank_module(), two_ranks["wide"][way]
    bank = MemoryBank(rank["WIDE"], int, exact=True)
    for number, states in rank["wide_states"](rank["COUNT"]).items():
        bank.add(number, states.router_keys)
    view, queries = bank.view(np.arange(1, rank["COUNT"])), rank["wide_queries"]()
    exact = np.stack([view.score(slot, query) for slot, query in enumerate(queries)])
    relevance = exact.mean(0) + rank["wide_bonus"](rank["COUNT"])[view.numbers]
    assert told["exchanges"] == 1
    for found, scores, count in (
        (told["relevant"], relevance, 128),
        *([(told["more"], relevance, 700)] if way == "whole" else []),
        (told["one"], exact[2], 16),
        (told["all"], exact[2], rank["COUNT"]),
        *((layer, exact[slot], 16) for slot, layer in enumerate(told["layers"]) if way == "whole"),
    ):
        best = view.select(scores, count)
        assert found[0] == list(best.numbers)
        assert found[1] == pytest.approx(list(best.scores), abs=1e-6)
    # Beyond 512 a skim chooses by what it saw first; the scores are exact all the same.
    places = np.searchsorted(view.numbers, told["more"][0])
    assert told["more"][1] == pytest.approx(relevance[places].tolist(), abs=1e-6)


@contextmanager
def losing(ranks: int, *more: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks whose leader has answered once and waits for a line before it asks again."""
    processes = start(ranks, "lose", *more)
    try:
        assert processes[0].stdout is not None
        assert json.loads(processes[0].stdout.readline()) == {"ready": ranks}
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_killed_rank_is_named() -> None:
    """After kill -9 the leader's next question fails with the rank's name, and so does every later one."""
    with losing(3) as (leader, second, third):
        second.send_signal(signal.SIGKILL)
        second.wait()
        output, errors = leader.communicate("go on\n", timeout=WITHIN_S)
        assert leader.returncode == 0, errors
        told = json.loads(output)
        assert told["seconds"] < rank_module()["TIMEOUT_S"] / 4  # a closed connection tells, not the timeout
        first, again = told["errors"]
        assert "rank 1 of 3 was lost while" in first
        assert again == first
        errors = third.communicate(timeout=WITHIN_S)[1]
        assert third.returncode == 1  # its leader is gone
        assert "RankLostError" in errors


def test_a_rank_that_hangs_is_named_in_bounded_time() -> None:
    """Stopped, not dead: its connections stay open, and the time that a request may take tells."""
    timeout_s = 15.0
    with losing(3, str(timeout_s)) as (leader, second, third):
        second.send_signal(signal.SIGSTOP)
        output, errors = leader.communicate("go on\n", timeout=WITHIN_S)
        assert leader.returncode == 0, errors
        told = json.loads(output)
        first, again = told["errors"]
        assert "rank 1 of 3 was lost while" in first
        assert f"timeout {timeout_s:g} s" in first
        assert again == first
        assert timeout_s / 2 < told["seconds"] < 6 * timeout_s
        errors = third.communicate(timeout=WITHIN_S)[1]
        assert "RankLostError" in errors


def test_a_memory_without_ranks_imports_nothing_of_them() -> None:
    code = (
        "import sys\nfrom msa_memory.testing import open_memory\n"
        "with open_memory() as memory:\n"
        "    memory.add('Ann keeps a boat.')\n"
        "    assert memory.search('boat')\n"
        "assert 'msa_memory.engine.parallel' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=WITHIN_S
    )
    assert done.returncode == 0, done.stderr


def test_the_ranks_end_when_their_leader_is_killed() -> None:
    with losing(2) as (leader, follower):
        leader.send_signal(signal.SIGKILL)
        errors = follower.communicate(timeout=WITHIN_S)[1]
        assert follower.returncode == 1
        assert "RankLostError" in errors


def torchrun(arguments: list[str], folder: Path, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, input=said, env=environment, text=True, capture_output=True, timeout=WITHIN_S
    )
    assert done.returncode == 0, done.stderr
    return done


def test_leaving_ends_the_threads_of_the_groups() -> None:
    assert isinstance(told_by_leader(start(2, "leave")), str)


@pytest.mark.slow
def test_torchrun_answers_a_file_of_texts(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Ada bakes bread in Oslo.\nBob mends boats in Rome.\n")
    options = ["--model", str(tiny_model()), "--k", "1", "--max-new-tokens", "4"]
    done = torchrun(
        ["-m", "msa_memory.engine.parallel", "texts.txt", *options],
        tmp_path,
        "Who mends boats?\nWho bakes bread?\n",
    )
    assert [line.split("\t")[-1] for line in done.stdout.splitlines()] == ["1", "0"]
    assert "2 passages over 2 ranks" in done.stderr


@pytest.mark.slow
def test_a_memory_with_a_store_works_over_ranks(tmp_path: Path) -> None:
    """The example: documents added, forgotten and found, and one process reads the folder afterwards."""
    example = RANK.parents[2] / "examples" / "parallel.py"
    done = torchrun([str(example), "memory", str(tiny_model())], tmp_path)
    assert done.stdout.splitlines()[0] == "bob: Bob lives in Oslo and repairs violins."
    assert done.stdout.splitlines()[-1] == "2 processes, 3 documents"
    with open_memory(tmp_path / "memory") as memory:
        assert [hit.id for hit in memory.search("Who repairs violins?", k=1)] == ["bob"]


def test_joining_without_torchrun_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
        join()
    assert joined() is None


def test_ranks_that_never_come_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLostError, match="not all ranks met within 1 s"):
        join(timeout_s=1)
    assert joined() is None


def test_a_process_on_its_own_gets_a_plain_bank(engine: Engine) -> None:
    assert type(new_bank(engine, int)) is MemoryBank


def test_tensors_travel_as_bytes() -> None:
    tensors = [
        torch.randn(2, 0, 3), torch.tensor(7), torch.randn(3, 5).bfloat16(), torch.tensor([True, False]),
        torch.arange(6).view(2, 3).T,
    ]  # fmt: skip
    data = pack(tensors)
    assert len(data) <= packed_bytes(sum(x.nbytes for x in tensors), len(tensors), 3)
    for found, expected in zip(unpack(data), tensors, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    for cut in (0, 5, len(data) - 1):
        with pytest.raises(EngineError, match="ends before"):
            unpack(data[:cut])
