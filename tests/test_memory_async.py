"""The async twins: the same answers, a loop that is never blocked, tasks that can be cancelled."""

import asyncio
import inspect
from collections.abc import AsyncIterator

import pytest

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.errors import ConfigError, ConflictError, MSAError, NotFoundError
from msa_memory.testing import open_memory
from msa_memory.types import Answer

SYNC_ONLY = {"open", "namespace", "namespace_name", "session", "stats"}
FACTS = {
    "bob": "Bob lives in Oslo and repairs violins.",
    "ann": "Ann paints lighthouses in Bergen.",
    "cat": "The cat sleeps under the kitchen table.",
}


@pytest.fixture
async def memory() -> AsyncIterator[MemoryModel]:
    async with open_memory(config=MemoryConfig(max_new_tokens=10)) as memory:
        await memory.aadd_many([{"id": id, "content": text} for id, text in FACTS.items()])
        yield memory


def same(answer: Answer) -> dict:
    """An answer without its timings."""
    return answer.model_dump(exclude={"timings"})


def test_every_verb_has_a_twin_with_the_same_arguments() -> None:
    public = {name for name in vars(MemoryModel) if not name.startswith("_")}
    twins = {name for name in public if name.startswith("a") and name[1:] in public}
    assert public - twins - {name[1:] for name in twins} == SYNC_ONLY
    for twin in twins:
        one, other = (inspect.signature(getattr(MemoryModel, name)) for name in (twin[1:], twin))
        assert one.parameters == other.parameters, twin
        assert "twin" in (getattr(MemoryModel, twin).__doc__ or ""), twin


async def test_twins_answer_alike(memory: MemoryModel) -> None:
    assert same(await memory.aquery("violins")) == same(memory.query("violins"))
    assert await memory.asearch("violins", k=2) == memory.search("violins", k=2)
    assert await memory.asearch_many(["violins", "cat"]) == memory.search_many(["violins", "cat"])
    assert await memory.acontext("violins", max_tokens=60) == memory.context("violins", max_tokens=60)
    assert await memory.aexplain("violins") == memory.explain("violins")
    assert await memory.aget("bob") == memory.get("bob")
    assert (await memory.alist(limit=2)).items == memory.list(limit=2).items
    assert await memory.acount() == memory.count() == 3
    assert await memory.ahistory("bob") == memory.history("bob")
    many = await memory.aquery_many(["violins", "cat"], max_new_tokens=5)
    assert [same(a) for a in many] == [
        same(a) for a in memory.query_many(["violins", "cat"], max_new_tokens=5)
    ]


async def test_writing(memory: MemoryModel) -> None:
    note = await memory.aadd("Violins are made of wood.", id="wood", metadata={"a": 1})
    assert await memory.aget("wood") == note
    changed = await memory.aupdate("wood", "Violins are made of spruce.")
    assert (changed.version, changed.metadata) == (2, {"a": 1})
    receipt = await memory.aforget("wood")
    assert receipt.ids == ("wood",)
    with pytest.raises(NotFoundError):
        await memory.aget("wood")
    with pytest.raises(ConflictError):
        await memory.aadd("Taken.", id="bob")
    assert (await memory.aforget_namespace("default", confirm="default")).counts["documents"] == 3
    assert await memory.acount() == 0


async def test_a_stream_adds_up_to_the_answer(memory: MemoryModel) -> None:
    chunks = [chunk async for chunk in memory.astream("violins", max_new_tokens=40)]
    assert [chunk.answer is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    answer = chunks[-1].answer
    assert answer is not None
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert same(answer) == same(memory.query("violins", max_new_tokens=40))


async def test_the_loop_ticks_while_a_question_is_answered(memory: MemoryModel) -> None:
    """Ticks are counted per token of a running answer: a blocked loop would see all tokens at once."""
    ticks, seen = 0, set()

    async def heartbeat() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    heart = asyncio.create_task(heartbeat())
    async for _ in memory.astream("violins", max_new_tokens=300):
        seen.add(ticks)
    before = ticks
    await memory.aquery("violins", max_new_tokens=100)
    heart.cancel()
    assert len(seen) > 10
    assert ticks > before + 10


async def test_questions_advance_together(memory: MemoryModel, decoded: list[int]) -> None:
    long = asyncio.create_task(memory.aquery("violins", max_new_tokens=1500))
    while decoded.count(1500) < 3:
        await asyncio.sleep(0)
    short = await memory.aquery("cat", max_new_tokens=5)
    assert short.usage.completion_tokens == 5
    last_short = max(at for at, step in enumerate(decoded) if step == 5)
    assert decoded[:last_short].count(1500) < 1500, "the long answer was still under way"
    assert (await long).usage.completion_tokens == 1500


async def test_many_at_once(memory: MemoryModel) -> None:
    answers = await asyncio.gather(
        *(memory.aquery("violins") for _ in range(12)), memory.aadd("New.", id="n")
    )
    assert len({answer.text for answer in answers[:12]}) == 1
    assert answers[12].id == "n"


async def test_cancelling_a_task_stops_the_model(memory: MemoryModel, decoded: list[int]) -> None:
    task = asyncio.create_task(memory.aquery("violins", max_new_tokens=5000))
    while not decoded:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await memory.aquery("violins", max_new_tokens=5)).found, "the worker goes on"
    stopped_at = decoded.count(5000)
    await memory.aquery("violins", max_new_tokens=50)
    assert decoded.count(5000) == stopped_at < 5000


async def test_a_timeout_stops_the_model(memory: MemoryModel, decoded: list[int]) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await memory.aquery("violins", max_new_tokens=7000)
    await memory.aquery("violins", max_new_tokens=5)
    assert decoded.count(7000) < 7000


async def test_leaving_a_stream_early_stops_the_model(memory: MemoryModel, decoded: list[int]) -> None:
    stream = memory.astream("violins", max_new_tokens=5000)
    async for _ in stream:
        break
    await stream.aclose()
    await memory.aquery("violins", max_new_tokens=5)
    stopped_at = decoded.count(5000)
    await memory.aquery("violins", max_new_tokens=50)
    assert decoded.count(5000) == stopped_at < 5000


async def test_one_bad_question_of_many_cancels_the_others(memory: MemoryModel, decoded: list[int]) -> None:
    with pytest.raises(MSAError, match="the limit is 2048"):
        await memory.aquery_many(["violins", "violins " * 3000], max_new_tokens=5000)
    await memory.aquery("violins", max_new_tokens=50)
    assert decoded.count(5000) < 5000


async def test_errors_are_the_same(memory: MemoryModel) -> None:
    with pytest.raises(ConfigError, match="unknown options"):
        await memory.aquery_many(["violins"], topk=3)
    with pytest.raises(ConfigError, match="give a list"):
        await memory.asearch_many("violins")
    with pytest.raises(ConfigError, match="temperature"):
        await memory.aquery("violins", temperature=-1)
    with pytest.raises(ConfigError, match="temperature"):
        memory.astream("violins", temperature=-1)


async def test_nothing_works_after_close() -> None:
    async with open_memory() as memory:
        pass
    for call in (memory.aadd("x"), memory.aquery("x"), memory.aget("x"), memory.asearch_many(["x"])):
        with pytest.raises(ConfigError, match="closed; open it again"):
            await call


def test_one_memory_serves_several_loops() -> None:
    with open_memory(config=MemoryConfig(max_new_tokens=4)) as memory:
        memory.add(FACTS["bob"])
        answers = [asyncio.run(memory.aquery("violins")) for _ in range(2)]
        assert same(answers[0]) == same(answers[1]) == same(memory.query("violins"))
