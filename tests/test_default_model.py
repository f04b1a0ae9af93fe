"""The shipped default model end to end: real weights, real routers, real text."""

from collections.abc import Iterator

import pytest

from msa_memory import MemoryModel
from msa_memory.answering import NOTHING_FOUND

pytestmark = pytest.mark.slow

OSLO, BERGEN = "Bob lives in Oslo and repairs violins.", "Bob moved to Bergen; he still repairs violins."
FACTS = (
    "The library on Elm Street opens at nine and closes at six.",
    "Copper melts at 1085 degrees Celsius.",
    "Ingrid is allergic to walnuts.",
    "The ferry to the island leaves from the second pier.",
)


@pytest.fixture
def memory() -> Iterator[MemoryModel]:
    with MemoryModel.open(None) as opened:
        yield opened


def test_where_two_memories_disagree_the_newer_one_wins(memory: MemoryModel) -> None:
    memory.add(BERGEN, timestamp="2026-02-01")
    memory.add(OSLO, timestamp="2025-02-01")
    answer = memory.query("Where does Bob live?")
    assert "Bergen" in answer.text
    assert "Oslo" not in answer.text
    assert [source.timestamp.year for source in answer.sources if source.cited] == [2026]


def test_an_updated_fact_replaces_the_old_one(memory: MemoryModel) -> None:
    note = memory.add(OSLO)
    memory.update(note.id, BERGEN)
    answer = memory.query("Where does Bob live?")
    assert "Bergen" in answer.text
    assert [source.text for source in answer.sources] == [BERGEN]


@pytest.mark.parametrize(
    ("question", "place"),
    [
        ("When does the library close?", 0),
        ("At what temperature does copper melt?", 1),
        ("What must Ingrid not eat?", 2),
        ("Where does the ferry leave from?", 3),
    ],
)
def test_the_right_memory_is_found_first(memory: MemoryModel, question: str, place: int) -> None:
    memory.add_many(FACTS)
    assert memory.search(question, k=1)[0].text == FACTS[place]


def test_it_does_not_invent_an_answer_to_what_has_nothing_to_do_with_the_memory(memory: MemoryModel) -> None:
    memory.add_many(FACTS)
    answer = memory.query("Quelle est la hauteur du mont Fuji?")
    assert not answer.found
    assert answer.text == NOTHING_FOUND


def test_a_forgotten_fact_is_not_told(memory: MemoryModel) -> None:
    notes = memory.add_many(FACTS)
    memory.forget(notes[2].id)
    answer = memory.query("What is Ingrid allergic to?")
    assert "walnut" not in answer.text.lower()
    assert notes[2].id not in {source.id for source in answer.sources}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is Ingrid allergic to?", "walnuts"),
        ("When does the library on Elm Street open?", "nine"),
        ("At what temperature does copper melt?", "1085"),
        ("What did Ingrid study?", None),
        ("What is Ingrid's phone number?", None),
    ],
)
def test_it_knows_what_the_memory_does_not_say(
    memory: MemoryModel, question: str, answer: str | None
) -> None:
    """Questions about the very things it remembers: relevance alone refuses none of them."""
    memory.add_many(FACTS)
    said = memory.query(question)
    assert said.sources, "something was found"
    if answer is None:
        assert not said.found
        assert said.text == "I don't know."
    else:
        assert answer in said.text


def test_two_rounds_follow_a_title(memory: MemoryModel) -> None:
    memory.add(
        "The Long Winter is a film of 1951 directed by Olga Berg.", metadata={"title": "The Long Winter"}
    )
    memory.add("She was born in Tromso and studied law.", id="berg", metadata={"title": "Olga Berg"})
    memory.add_many([f"Olaf Winter number {n} was born in a long winter in the north." for n in range(12)])
    question = "Where was the director of The Long Winter born?"
    rounds = memory.query(question, k=4, max_rounds=2).rounds
    assert rounds[1].documents[0] == "berg"
