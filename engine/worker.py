"""One thread that runs everything a model does, as a scheduler of small steps.

A job is a generator: each ``yield`` lets the other jobs take a step, so several questions advance
together and none waits for another's whole answer. Values a job yields (other than None) go to whoever
started it. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from msa_memory.errors import EngineError

__all__ = ["Job", "Worker"]

T = TypeVar("T")
R = TypeVar("R")
Steps = Generator[T | None, None, R]
_END: Any = object()


class Job(Generic[T, R]):
    """A running generator: iterate its values, or wait for its result."""

    def __init__(self, steps: Steps[T, R], notify: Callable[[], None] | None = None) -> None:
        self.steps = steps
        self.values: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.notify = notify
        self.cancelled = threading.Event()
        self._result: R | None = None
        self._error: BaseException | None = None

    def result(self) -> R:
        """Wait for the end, dropping values; raises what the job raised."""
        for _ in self:
            pass
        return self._result  # type: ignore[return-value]

    def __iter__(self) -> Iterator[T]:
        while (value := self.values.get()) is not _END:
            yield value
        self.values.put(_END)  # for whoever asks again
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Stop the job before its next step."""
        self.cancelled.set()

    def _emit(self, value: Any) -> None:
        self.values.put(value)
        if self.notify is not None:
            self.notify()

    def _advance(self) -> bool:
        """Take one step; False when the job is over."""
        try:
            if self.cancelled.is_set():
                self.steps.close()
                raise EngineError("the call was cancelled before it finished")
            value = next(self.steps)
            if value is not None:
                self._emit(value)
            return True
        except StopIteration as stop:
            self._result = stop.value
        except BaseException as error:
            self._error = error
        self._emit(_END)
        return False


class Worker:
    """Runs jobs round-robin on one daemon thread, started with the first job."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._inbox: queue.SimpleQueue[Job[Any, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def start(self, steps: Steps[T, R], notify: Callable[[], None] | None = None) -> Job[T, R]:
        """Queue a generator; its values and result arrive through the returned job."""
        job = Job(steps, notify)
        with self._lock:
            if self._closed:
                raise EngineError("this memory's model was closed; open the memory again")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
                self._thread.start()
            self._inbox.put(job)
        return job

    def run(self, steps: Steps[Any, R]) -> R:
        """Run a generator to its end and return its result. On the worker thread itself: run it inline."""
        if self.is_current():
            return _drain(steps)
        job = self.start(steps)
        try:
            return job.result()
        except BaseException:
            job.cancel()
            raise

    def run_all(self, all_steps: Iterable[Steps[Any, R]]) -> list[R]:
        """Run several generators together; their results in order. One failure cancels the others."""
        if self.is_current():
            return [_drain(steps) for steps in all_steps]
        jobs = [self.start(steps) for steps in all_steps]
        try:
            return [job.result() for job in jobs]
        finally:
            for job in jobs:
                job.cancel()

    def stream(self, steps: Steps[T, Any]) -> Iterator[T]:
        """Yield a generator's values as they come; closing the iterator stops the job."""
        if self.is_current():
            yield from (value for value in steps if value is not None)
            return
        job = self.start(steps)
        try:
            yield from job
        finally:
            job.cancel()

    async def arun(self, steps: Steps[Any, R]) -> R:
        """``run`` for asyncio: the loop is never blocked; cancelling the task cancels the job."""
        job, ready = self._start_async(steps)
        async with aclosing(self._avalues(job, ready)) as values:
            async for _ in values:
                pass
        return job._result  # type: ignore[return-value]

    async def arun_all(self, all_steps: Iterable[Steps[Any, R]]) -> list[R]:
        """``run_all`` for asyncio."""
        tasks = [asyncio.ensure_future(self.arun(steps)) for steps in all_steps]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def astream(self, steps: Steps[T, Any]) -> AsyncGenerator[T, None]:
        """``stream`` for asyncio."""
        job, ready = self._start_async(steps)
        async with aclosing(self._avalues(job, ready)) as values:
            async for value in values:
                yield value

    def close(self) -> None:
        """Finish queued jobs and end the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._inbox.put(None)
        if self._thread is not None and not self.is_current():
            self._thread.join()

    def is_current(self) -> bool:
        """Whether the caller runs on this worker's thread."""
        return threading.current_thread() is self._thread

    def _start_async(self, steps: Steps[T, R]) -> tuple[Job[T, R], asyncio.Event]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            try:
                loop.call_soon_threadsafe(ready.set)
            except RuntimeError:  # the loop is gone, nobody listens
                job.cancel()

        job = self.start(steps, notify)
        return job, ready

    async def _avalues(self, job: Job[T, Any], ready: asyncio.Event) -> AsyncGenerator[T, None]:
        try:
            while True:
                await ready.wait()
                ready.clear()
                while not job.values.empty():
                    value = job.values.get()
                    if value is _END:
                        if job._error is not None:
                            raise job._error
                        return
                    yield value
        finally:
            job.cancel()

    def _run(self) -> None:
        jobs: deque[Job[Any, Any]] = deque()
        open_for_more = True
        while open_for_more or jobs:
            while open_for_more and (not jobs or not self._inbox.empty()):
                job = self._inbox.get()
                if job is None:
                    open_for_more = False
                else:
                    jobs.append(job)
            if jobs:
                job = jobs.popleft()
                if job._advance():
                    jobs.append(job)


def _drain(steps: Steps[Any, R]) -> R:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: R = stop.value
            return result
