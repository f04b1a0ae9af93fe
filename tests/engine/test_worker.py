"""The worker: fair turns, results, errors, cancelling, and the same from asyncio."""

import asyncio
import threading
from collections.abc import Generator, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_memory.engine.worker import Worker
from msa_memory.errors import EngineError


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("test worker")
    yield worker
    worker.close()


def counting(name: str, steps: int, log: list[str]) -> Generator[int, None, str]:
    for step in range(steps):
        log.append(name)
        yield step
    return name


def endless(log: list[str]) -> Generator[int, None, None]:
    """Far more steps than any test waits for."""
    try:
        yield from range(300_000)
        log.append("ran out")
    finally:
        log.append("closed")


def gate(opened: threading.Event) -> Generator[None, None, None]:
    """Holds the worker until the event is set, so that the jobs after it start together."""
    opened.wait()
    yield


def failing(error: BaseException) -> Generator[int, None, None]:
    yield 1
    raise error


def test_a_job_gives_its_values_and_its_result(worker: Worker) -> None:
    job = worker.start(counting("a", 3, []))
    assert list(job) == [0, 1, 2]
    assert job.result() == "a"
    assert job.result() == "a", "a result can be read again"


def test_none_is_a_step_without_a_value(worker: Worker) -> None:
    def steps() -> Generator[int | None, None, str]:
        yield None
        yield 7
        yield None
        return "done"

    assert list(worker.start(steps())) == [7]
    assert worker.run(steps()) == "done"


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6))
def test_jobs_take_turns(lengths: list[int]) -> None:
    """Among jobs that start together, none is more than one step ahead of another that still runs."""
    worker, opened, log = Worker("turns"), threading.Event(), list[str]()
    held = worker.start(gate(opened))
    jobs = [worker.start(counting(str(index), length, log)) for index, length in enumerate(lengths)]
    opened.set()
    assert [job.result() for job in jobs] == [str(index) for index in range(len(lengths))]
    held.result()
    worker.close()
    expected = [str(i) for turn in range(max(lengths)) for i, length in enumerate(lengths) if turn < length]
    assert log == expected


def test_a_short_job_does_not_wait_for_a_long_one(worker: Worker) -> None:
    log: list[str] = []
    long = worker.stream(endless(log))
    assert next(long) == 0
    assert worker.run(counting("short", 5, [])) == "short"
    assert log == [], "the long job is still running"
    long.close()


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_an_error_reaches_its_caller_only(worker: Worker, error: BaseException) -> None:
    other = worker.start(counting("other", 50, []))
    with pytest.raises(type(error)) as caught:
        worker.run(failing(error))
    assert caught.value is error
    assert other.result() == "other"
    assert worker.run(counting("next", 2, [])) == "next"


def test_values_before_an_error_arrive(worker: Worker) -> None:
    stream = worker.stream(failing(ValueError("late")))
    assert next(stream) == 1
    with pytest.raises(ValueError, match="late"):
        next(stream)


def test_a_cancelled_job_is_closed_and_says_so(worker: Worker) -> None:
    log: list[str] = []
    job = worker.start(endless(log))
    assert next(iter(job)) == 0
    job.cancel()
    with pytest.raises(EngineError, match="cancelled"):
        job.result()
    assert log == ["closed"]


def test_a_job_that_refuses_to_close_does_not_stop_the_worker(worker: Worker) -> None:
    def stubborn() -> Generator[int, None, None]:
        try:
            yield 1
        finally:
            raise ValueError("will not close")

    job = worker.start(stubborn())
    next(iter(job))
    job.cancel()
    with pytest.raises((ValueError, EngineError)):
        job.result()
    assert worker.run(counting("next", 1, [])) == "next"


def test_closing_a_stream_stops_its_job(worker: Worker) -> None:
    log: list[str] = []
    stream = worker.stream(endless(log))
    assert [next(stream), next(stream)] == [0, 1]
    stream.close()
    worker.run(counting("a", 1, []))  # the worker took at least one more turn
    assert log == ["closed"]


def test_a_stream_starts_when_it_is_read(worker: Worker) -> None:
    log: list[str] = []
    stream = worker.stream(counting("late", 1, log))
    worker.run(counting("first", 1, log))
    assert list(stream) == [0]
    assert log == ["first", "late"]


def test_run_all_keeps_order_and_advances_together(worker: Worker) -> None:
    log: list[str] = []
    results = worker.run_all([counting("long", 4, log), counting("short", 1, log)])
    assert results == ["long", "short"]
    assert log.index("short") < len(log) - 1 - log[::-1].index("long")


def test_run_all_cancels_the_others_when_one_fails(worker: Worker) -> None:
    log: list[str] = []
    with pytest.raises(ValueError, match="bad"):
        worker.run_all([failing(ValueError("bad")), endless(log)])
    worker.run(counting("a", 1, []))
    assert log == ["closed"]


def test_work_started_on_the_worker_itself_runs_inline(worker: Worker) -> None:
    def outer() -> Generator[None, None, list[object]]:
        yield
        return [
            worker.run(counting("inner", 2, [])),
            worker.run_all([counting("a", 1, []), counting("b", 1, [])]),
            list(worker.stream(counting("c", 2, []))),
        ]

    assert worker.run(outer()) == ["inner", ["a", "b"], [0, 1]]


def test_close_finishes_what_was_queued(worker: Worker) -> None:
    jobs = [worker.start(counting(str(index), 20, [])) for index in range(3)]
    worker.close()
    assert [job.result() for job in jobs] == ["0", "1", "2"]
    with pytest.raises(EngineError, match="closed; open the memory again"):
        worker.run(counting("late", 1, []))
    worker.close()


def test_a_worker_that_was_never_used_closes() -> None:
    Worker("idle").close()


def test_many_threads_share_one_worker(worker: Worker) -> None:
    results: dict[int, str] = {}

    def ask(number: int) -> None:
        results[number] = worker.run(counting(str(number), 5, []))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: str(number) for number in range(16)}


# asyncio


async def test_arun_gives_the_result_and_the_error(worker: Worker) -> None:
    assert await worker.arun(counting("a", 3, [])) == "a"
    with pytest.raises(ValueError, match="broken"):
        await worker.arun(failing(ValueError("broken")))


async def test_astream_gives_every_value(worker: Worker) -> None:
    assert [value async for value in worker.astream(counting("a", 100, []))] == list(range(100))


async def test_the_loop_runs_while_a_job_does(worker: Worker) -> None:
    """The job ends only once the loop has ticked: a blocked loop would never let it end."""
    ticked = threading.Event()

    def until_ticked() -> Generator[None, None, str]:
        while not ticked.is_set():
            yield
        return "done"

    async def tick() -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        ticked.set()

    result, _ = await asyncio.gather(worker.arun(until_ticked()), tick())
    assert result == "done"


async def test_cancelling_the_task_stops_the_job(worker: Worker) -> None:
    log: list[str] = []
    first = asyncio.Event()
    loop = asyncio.get_running_loop()

    def steps() -> Generator[int, None, None]:
        loop.call_soon_threadsafe(first.set)
        yield from endless(log)

    task = asyncio.create_task(worker.arun(steps()))
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await worker.arun(counting("a", 1, []))
    assert log == ["closed"]


async def test_leaving_an_async_stream_early_stops_the_job(worker: Worker) -> None:
    log: list[str] = []
    stream = worker.astream(endless(log))
    async for value in stream:
        if value == 3:
            break
    await stream.aclose()
    await worker.arun(counting("a", 1, []))
    assert log == ["closed"]


async def test_arun_all_cancels_the_others_when_one_fails(worker: Worker) -> None:
    assert await worker.arun_all([counting("a", 3, []), counting("b", 1, [])]) == ["a", "b"]
    log: list[str] = []
    with pytest.raises(ValueError, match="bad"):
        await worker.arun_all([endless(log), failing(ValueError("bad"))])
    while not log:  # the task that owned the endless job ends in its own time
        await worker.arun(counting("a", 1, []))
    assert log == ["closed"]


def test_a_job_whose_loop_is_gone_ends(worker: Worker) -> None:
    log: list[str] = []

    async def leave() -> None:
        job, _ = worker._start_async(endless(log))
        job.values.get()

    asyncio.run(leave())
    worker.close()  # would wait for ever if the job went on
    assert log == ["closed"]
