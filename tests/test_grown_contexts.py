"""Conversations that grow: a turn reads its question and new evidence; forgetting holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.engine import serving
from msa_memory.engine.context import Feed, advance
from msa_memory.engine.engine import Engine
from msa_memory.engine.generation import Generation
from msa_memory.engine.layout import evidence_entry
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.testing import open_memory
from msa_memory.types import Answer

GROWING = MemoryConfig(max_new_tokens=6, context="grow", k=1)
NOTES = {"lion": "The lion wanted courage.", "road": "The road is made of yellow brick."}
ABOUT = {"lion": "What did the lion want, the courage?", "road": "The road of yellow brick?"}


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens that each prefill of an answer reads from here on."""
    runs: list[list[int]] = []
    forward = serving.advance

    def spy(decoder: object, feeds: list[Feed]) -> object:
        runs.extend(list(feed.ids) for feed in feeds)
        return forward(decoder, feeds)

    monkeypatch.setattr(serving, "advance", spy)
    return runs


@pytest.fixture
def memory() -> Iterator[MemoryModel]:
    with open_memory(config=GROWING) as opened:
        for id, text in NOTES.items():
            opened.add(text, id=id, timestamp="2026-01-31")
        yield opened


def say(memory: MemoryModel, turns: list[dict[str, str]], text: str, only: str, **options: object) -> Answer:
    """One turn of a conversation over one note, both sides of it appended to ``turns``."""
    turns.append({"role": "user", "content": text})
    answer = memory.chat(turns, where={"$id": only}, **options)
    turns.append({"role": "assistant", "content": answer.text})
    return answer


def entry(memory: MemoryModel, id: str) -> str:
    return evidence_entry("", memory.get(id).timestamp.date(), NOTES[id])


def grown(memory: MemoryModel) -> int:
    return len(memory._bank().conversations)


def test_a_turn_reads_the_answer_before_it_and_what_is_new(memory: MemoryModel, fed: list[list[int]]) -> None:
    prompt, turns = memory._engine().prompt, []
    first = say(memory, turns, ABOUT["lion"], "lion")
    assert fed.pop() == prompt.conversation([("user", ABOUT["lion"])], entry(memory, "lion"), 0)
    second = say(memory, turns, "And why?", "lion")
    assert fed.pop() == prompt.next_turn(first.text, "", "And why?"), "its evidence stands there already"
    assert [source.id for source in second.sources] == ["lion"]
    say(memory, turns, "And when?", "lion")
    assert fed.pop() == prompt.next_turn(second.text, "", "And when?")


def test_new_evidence_is_read_where_it_comes_up(fed: list[list[int]]) -> None:
    with open_memory(config=GROWING) as memory:
        memory.add(NOTES["lion"], id="lion", timestamp="2026-01-31")
        turns: list[dict[str, str]] = []
        turns.append({"role": "user", "content": ABOUT["lion"]})
        first = memory.chat(turns)
        turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": ABOUT["road"]}]
        memory.add(NOTES["road"], id="road", timestamp="2026-01-31")
        second = memory.chat(turns, k=2)
        assert {source.id for source in second.sources} == {"lion", "road"}
        expected = memory._engine().prompt.next_turn(first.text, entry(memory, "road"), ABOUT["road"])
        assert fed.pop() == expected


def test_answers_are_those_of_one_row_fed_turn_by_turn(memory: MemoryModel) -> None:
    """The same by hand: one sequence whose memory is changed before every turn."""
    engine, turns = memory._engine(), []
    prompt = engine.prompt
    sampling = SamplingOptions(max_new_tokens=6)
    texts = [ABOUT["lion"], "And why?", "And when?"]
    answers = [say(memory, turns, text, "lion").text for text in texts]
    row = None
    ids: list[int] = []
    for number, text in enumerate(texts):
        view = memory._bank().view(memory.namespace_name, {"$id": "lion"})
        before = "\n".join(f"{turn['content']}" for turn in turns[: 2 * number])
        selections = engine.route(text, view, turns_before=before[-400:].strip()).selections
        if row is None:
            row = engine.start(view, capacity=1024)
            new = prompt.conversation([("user", text)], entry(memory, "lion"), 0)
        else:
            row.cache.truncate(row.cache.length - (row.fed_tokens - len(ids)))
            row.position -= row.fed_tokens - len(ids)
            row.fed_tokens = len(ids)
            row.view = view
            new = prompt.next_turn(answers[number - 1], "", text)
        row.attend_to(selections, {layer: slot for slot, layer in enumerate(engine.msa.router_layers)})
        logits = advance(engine.decoder, [Feed(row, new)])[0]
        ids += new
        generation = Generation(engine.tokenizer, sampling, row, logits, None, ids)
        for _ in engine.decode(generation):
            pass
        assert generation.text.strip() == answers[number].strip()


def test_what_the_question_may_not_see_is_not_gone_on_from(memory: MemoryModel, fed: list[list[int]]) -> None:
    turns: list[dict[str, str]] = []
    say(memory, turns, ABOUT["lion"], "lion")
    answer = say(memory, turns, ABOUT["road"], "road")
    lion = memory._engine().tokenizer.encode(NOTES["lion"])
    read = fed.pop()
    assert not any(read[at : at + len(lion)] == lion for at in range(len(read)))
    assert read[: len(fed[0]) // 2] != fed[0][: len(fed[0]) // 2]
    assert [source.id for source in answer.sources] == ["road"]


@pytest.mark.parametrize("verb", ["forget", "update"])
def test_forgetting_drops_the_conversation(memory: MemoryModel, fed: list[list[int]], verb: str) -> None:
    turns: list[dict[str, str]] = []
    say(memory, turns, ABOUT["lion"], "lion")
    assert grown(memory) == 1
    memory.forget("lion") if verb == "forget" else memory.update("lion", "The lion slept.")
    memory.search("Anything?")
    assert grown(memory) == 0
    turns.append({"role": "user", "content": "And why?"})
    answer = memory.chat(turns)
    assert not any("courage" in source.text for source in answer.sources)
    said = memory._engine().tokenizer.encode("wanted courage")
    assert not any(fed[-1][at : at + len(said)] == said for at in range(len(fed[-1])))


def test_another_conversation_or_another_namespace_starts_anew(
    memory: MemoryModel, fed: list[list[int]]
) -> None:
    turns: list[dict[str, str]] = []
    answer = say(memory, turns, ABOUT["lion"], "lion")
    changed = [turns[0] | {"content": "Something else?"}, turns[1], {"role": "user", "content": "And why?"}]
    memory.chat(changed, where={"$id": "lion"})
    whole = len(fed.pop())
    assert whole > len(memory._engine().prompt.next_turn(answer.text, "", "And why?"))
    other = memory.namespace("other")
    other.add(NOTES["lion"], id="lion", timestamp="2026-01-31")
    other.chat([*turns, {"role": "user", "content": "And why?"}])
    assert len(fed.pop()) >= whole - 8


def test_a_full_window_starts_anew(
    memory: MemoryModel, fed: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[dict[str, str]] = []
    window = 1500
    monkeypatch.setattr(Engine, "max_positions", window)
    long = "Say more about the lion, please. " * (window // 60)
    lengths = []
    for number in range(12):
        say(memory, turns, f"{number}. {long}", "lion")
        lengths.append(len(fed.pop()))
        assert grown(memory) == 1
    assert max(lengths) <= window
    assert max(lengths[1:]) > 1.5 * min(lengths[1:]), "once or more all that fits was read again"
    assert min(lengths[1:]) < window / 4, "and else only what was new"


def test_by_default_every_turn_reads_as_if_for_the_first_time(fed: list[list[int]]) -> None:
    with open_memory(config=MemoryConfig(max_new_tokens=6, k=1)) as memory:
        memory.add(NOTES["lion"], id="lion", timestamp="2026-01-31")
        turns: list[dict[str, str]] = []
        say(memory, turns, ABOUT["lion"], "lion")
        say(memory, turns, "And why?", "lion")
        assert grown(memory) == 0
