"""What LangChain costs: ChatMSA against the memory itself, on the default model with real questions.

``overhead`` is the share that ``ChatMSA.invoke`` takes beyond ``MemoryModel.query`` with the same options, in
wall time and in CPU time of the whole process, which other programs disturb less. ``first_token`` compares
the time to the first text of ``astream`` with that of ``stream`` and of the memory's own ``stream``.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator

from common import arguments, report, texts

from msa_memory import MemoryModel
from msa_memory.engine.models import DEFAULT_MODEL
from msa_memory.integrations.langchain import ChatMSA

QUESTIONS = (
    "Which statement exits a loop at once?",
    "What does a lambda expression give?",
    "How are default arguments evaluated?",
    "When is a finally clause executed?",
)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def first(stream: Iterator[object]) -> float:
    """Seconds to the first text of a stream, which is then closed."""
    started = time.perf_counter()
    next(stream)
    taken = time.perf_counter() - started
    stream.close()  # type: ignore[attr-defined]
    return taken


def first_async(loop: asyncio.AbstractEventLoop, make: Callable[[], AsyncIterator[object]]) -> float:
    """``first`` for an async stream."""

    async def run() -> float:
        started, stream = time.perf_counter(), make()
        await anext(stream)
        taken = time.perf_counter() - started
        await stream.aclose()  # type: ignore[attr-defined]
        return taken

    return loop.run_until_complete(run())


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--passages", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    with MemoryModel.open(None, model=DEFAULT_MODEL, device=options.device) as memory:
        memory.add_many(texts(options.passages, 60))
        model = ChatMSA(memory=memory, max_tokens=options.new_tokens)
        loop = asyncio.new_event_loop()
        walls, cpus, to_stream, to_memory = [], [], [], []
        for number in range(options.runs + 1):
            question = QUESTIONS[number % len(QUESTIONS)]
            ways = [
                lambda q=question: model.invoke(q),
                lambda q=question: memory.query(q, max_new_tokens=options.new_tokens),
            ]
            order = (0, 1) if number % 2 else (1, 0)  # neither always goes first
            times = {way: seconds(ways[way]) for way in order}
            beginnings = (
                first_async(loop, lambda q=question: model.astream(q)),
                first(model.stream(question)),
                first(memory.stream(question, max_new_tokens=options.new_tokens)),
            )
            if number:  # the first round warms up
                walls.append(times[0][0] / times[1][0])
                cpus.append(times[0][1] / times[1][1])
                to_stream.append(beginnings[0] / beginnings[1])
                to_memory.append(beginnings[0] / beginnings[2])
        loop.close()
    report(
        "langchain",
        options,
        {
            "passages": options.passages,
            "new_tokens": options.new_tokens,
            "runs": options.runs,
            "overhead_wall": statistics.median(walls) - 1,
            "overhead_cpu": statistics.median(cpus) - 1,
            "first_token_astream_to_stream": statistics.median(to_stream),
            "first_token_astream_to_memory_stream": statistics.median(to_memory),
        },
    )


if __name__ == "__main__":
    main()
