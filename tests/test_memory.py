"""What a memory does for its user: the synchronous verbs, on the tiny model."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.answering import NOTHING_FOUND, NOTHING_MATCHES, NOTHING_STORED, AnswerOptions, _shown
from msa_memory.engine.engine import Engine
from msa_memory.errors import (
    ConfigError,
    ConflictError,
    EngineError,
    LimitError,
    MSAError,
    NotFoundError,
    ReadOnlyError,
)
from msa_memory.testing import open_memory, tiny_model
from msa_memory.types import Answer

BRIEF = MemoryConfig(max_new_tokens=12)
FACTS = {
    "bob": "Bob lives in Oslo and repairs violins.",
    "ann": "Ann paints lighthouses in Bergen.",
    "cat": "The cat sleeps under the kitchen table.",
    "oz": "Dorothy walked to the emerald city with the lion.",
    "tea": "Green tea tastes bitter after ten minutes.",
}


@pytest.fixture
def memory() -> Iterator[MemoryModel]:
    """An empty memory in RAM."""
    with open_memory(config=BRIEF) as memory:
        yield memory


@pytest.fixture
def filled(memory: MemoryModel) -> MemoryModel:
    memory.add_many([{"id": id, "content": text} for id, text in FACTS.items()])
    return memory


def ids(found: list) -> list[str]:
    return [source.id for source in found]


def same(answer: Answer) -> dict:
    """An answer without its timings."""
    return answer.model_dump(exclude={"timings"})


# adding


def test_what_is_added_is_found_and_read(memory: MemoryModel) -> None:
    note = memory.add(
        FACTS["bob"],
        id="bob",
        metadata={"title": "Neighbours", "speaker": "Ann"},
        timestamp="2026-01-31",
        source="chat",
        trust="high",
    )
    assert (note.id, note.namespace, note.text, note.version) == ("bob", "default", FACTS["bob"], 1)
    assert (note.source, note.trust, note.passages) == ("chat", "high", 1)
    assert note.timestamp == datetime(2026, 1, 31, tzinfo=UTC)
    assert memory.get("bob") == note
    answer = memory.query("What does Bob repair?")
    assert answer.found
    assert answer.text == str(answer) != ""
    (source,) = answer.sources
    assert (source.id, source.text, source.start, source.end) == ("bob", FACTS["bob"], 0, len(FACTS["bob"]))
    assert source.metadata == note.metadata
    assert source.timestamp == note.timestamp
    assert -1 <= source.score <= 1
    assert answer.rounds[0].documents == ("bob",)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens > 12
    assert answer.timings.total_s >= answer.timings.decode_s > 0


def test_the_model_reads_title_date_and_speaker(memory: MemoryModel, encoded: list[str]) -> None:
    memory.add("Text.", metadata={"title": "Notes", "speaker": "Ann"}, timestamp="2026-01-31")
    memory.add("Text.", metadata={"title": 5, "speaker": ["Ann"]})
    assert encoded == ["Notes | 2026-01-31 | Ann\nText.", "Text."]


def test_add_many_takes_strings_and_mappings(memory: MemoryModel) -> None:
    documents = memory.add_many(["One.", {"content": "Two.", "id": "2", "metadata": {"n": 2}}])
    assert [document.text for document in documents] == ["One.", "Two."]
    assert memory.get("2").metadata == {"n": 2}
    assert memory.count() == 2
    assert memory.add_many([]) == []
    assert [d.text for d in memory.add_many(f"Number {n}." for n in range(3))] == [
        "Number 0.",
        "Number 1.",
        "Number 2.",
    ]


def test_add_many_reports_progress_across_batches(memory: MemoryModel) -> None:
    reports: list[tuple[int, int]] = []
    memory.add_many([f"Number {n}." for n in range(70)], progress=lambda *report: reports.append(report))
    assert reports == [(n, 70) for n in range(1, 71)]
    assert memory.count() == 70


def test_a_progress_function_may_use_the_memory(memory: MemoryModel) -> None:
    memory.add("Zero.", id="0")
    seen: list[object] = []

    def look(done: int, total: int) -> None:
        seen.append((memory.count(), ids(memory.search("zero")), memory.query_many(["zero"])[0].found))
        seen.append([chunk.answer is not None for chunk in memory.stream("zero")][-1])

    memory.add_many(["One."], progress=look)
    assert seen == [(1, ["0"], True), True]


@pytest.mark.parametrize("mode", ["add", "add_many"])
def test_a_taken_id_is_a_conflict_and_nothing_changes(
    memory: MemoryModel, encoded: list[str], mode: str
) -> None:
    memory.add("Old.", id="x")
    encoded.clear()
    add = {
        "add": lambda: memory.add("New.", id="x"),
        "add_many": lambda: memory.add_many(["Other.", {"content": "New.", "id": "x"}]),
    }
    with pytest.raises(ConflictError, match=r"'x' is taken in namespace 'default'.*on_conflict='replace'"):
        add[mode]()
    assert encoded == []
    assert [document.text for document in memory.list()] == ["Old."]


def test_an_id_given_twice_is_a_conflict_before_anything_is_stored(memory: MemoryModel) -> None:
    items = [f"Number {n}." for n in range(64)] + [{"content": t, "id": "x"} for t in ("One.", "Two.")]
    with pytest.raises(ConflictError, match=r"'x'.*given twice"):
        memory.add_many(items)
    assert memory.count() == 0


def test_a_bad_item_is_refused_before_anything_is_encoded(memory: MemoryModel, encoded: list[str]) -> None:
    with pytest.raises(MSAError, match="content is empty"):
        memory.add_many([*(f"Number {n}." for n in range(100)), ""])
    assert encoded == []
    assert memory.count() == 0


def test_skip_keeps_what_is_there(memory: MemoryModel, encoded: list[str]) -> None:
    old = memory.add("Old.", id="x")
    encoded.clear()
    assert memory.add("New.", id="x", on_conflict="skip") == old
    assert encoded == []
    documents = memory.add_many(
        [{"content": "New.", "id": "x"}, {"content": "A.", "id": "y"}], on_conflict="skip"
    )
    assert [document.text for document in documents] == ["Old.", "A."]
    assert encoded == ["A."]


def test_replace_is_a_new_version_and_encodes_nothing_when_nothing_changed(
    memory: MemoryModel, encoded: list[str]
) -> None:
    first = memory.add("Old.", id="x", metadata={"a": (1, 2)}, source="chat")
    encoded.clear()
    again = memory.add("Old.", id="x", metadata={"a": [1, 2]}, source="chat", on_conflict="replace")
    assert (again, encoded) == (first, [])
    changed = memory.add("New.", id="x", on_conflict="replace")
    assert (changed.version, changed.text, changed.metadata, encoded) == (2, "New.", {}, ["New."])
    assert ids(memory.search("old")) == ["x"]
    assert [version.text for version in memory.history("x")] == ["Old.", "New."]


def test_a_long_document_is_split_and_every_part_is_found(memory: MemoryModel) -> None:
    paragraphs = [f"Paragraph {n} is about nothing at all, again and again." for n in range(60)]
    paragraphs[41] = "The password of the harbour is swordfish."
    document = memory.add("\n\n".join(paragraphs), id="long")
    memory.add("Something else entirely.")
    assert document.passages > 1
    best = memory.search("harbour swordfish password")[0]
    assert best.id == "long"
    assert paragraphs[41] in best.text
    assert document.text[best.start : best.end] == best.text
    assert len(memory.search("paragraph")) == 2, "one source per document"


# changing


def test_update_replaces_the_text_everywhere(memory: MemoryModel) -> None:
    first = memory.add("Bob lives in Oslo.", id="bob", metadata={"a": 1}, source="chat")
    memory.add("Something else.")
    changed = memory.update("bob", "Bob moved to Bergen.", metadata={"b": 2})
    assert (changed.version, changed.metadata, changed.source) == (2, {"a": 1, "b": 2}, "chat")
    assert changed.created_at == first.created_at
    assert changed.timestamp > first.timestamp, "it was said now"
    found = memory.search("Bob")[0]
    assert found.text == "Bob moved to Bergen."
    assert "Oslo" not in memory.context("Where is Bob?").text
    versions = memory.history("bob")
    assert [(v.version, v.text, v.current) for v in versions] == [
        (1, "Bob lives in Oslo.", False),
        (2, "Bob moved to Bergen.", True),
    ]


def test_metadata_alone_is_merged_without_encoding(memory: MemoryModel, encoded: list[str]) -> None:
    note = memory.add("Text.", id="x", metadata={"title": "T", "a": 1})
    encoded.clear()
    changed = memory.update("x", metadata={"a": 2, "b": 3})
    assert changed.metadata == {"title": "T", "a": 2, "b": 3}
    assert (changed.version, changed.timestamp, encoded) == (2, note.timestamp, [])
    assert memory.search("text")[0].metadata == changed.metadata
    assert memory.count({"a": 2}) == 1


@pytest.mark.parametrize("timestamp", [None, "2020-05-17"])
def test_a_new_title_is_encoded_but_nothing_gets_younger(
    memory: MemoryModel, encoded: list[str], timestamp: str | None
) -> None:
    note = memory.add("Text.", id="x", timestamp=timestamp)
    memory.update("x", "Text!") if timestamp is None else None
    note = memory.get("x")
    encoded.clear()
    changed = memory.update("x", metadata={"title": "New"})
    assert encoded == ["New\nText!" if timestamp is None else "New | 2020-05-17\nText."]
    assert (changed.text, changed.timestamp) == (note.text, note.timestamp)


def test_update_with_the_same_text_encodes_again(memory: MemoryModel, encoded: list[str]) -> None:
    """The way to repair damaged states."""
    memory.add("Text.", id="x")
    passage = memory.search("text")[0].passage
    memory.update("x", "Text.")
    assert encoded == ["Text.", "Text."]
    assert memory.search("text")[0].passage != passage


def test_update_needs_something_and_somebody(memory: MemoryModel) -> None:
    with pytest.raises(NotFoundError, match="'ghost'"):
        memory.update("ghost", "Boo.")
    memory.add("Text.", id="x")
    with pytest.raises(ConfigError, match="content or metadata"):
        memory.update("x")
    assert memory.get("x").version == 1


def test_forget_is_seen_at_once(filled: MemoryModel) -> None:
    view = filled.namespace("default")
    assert ids(view.search("violins", k=1)) == ["bob"]
    receipt = filled.forget("bob")
    assert receipt.ids == ("bob",)
    assert receipt.counts["documents"] == 1
    assert receipt.bytes_erased > 0
    assert receipt.masked_at is not None
    assert "bob" not in ids(view.search("violins", k=10))
    assert "violins" not in view.context("violins").text
    assert view.count() == len(FACTS) - 1
    for missing in (filled.get, filled.history, filled.forget):
        with pytest.raises(NotFoundError, match="'bob'"):
            missing("bob")


def test_forget_by_filter_and_dry_run(memory: MemoryModel) -> None:
    memory.add_many(
        [{"content": f"Number {n}.", "id": str(n), "metadata": {"even": n % 2 == 0}} for n in range(6)]
    )
    planned = memory.forget(where={"even": True}, dry_run=True)
    assert sorted(planned.ids) == ["0", "2", "4"]
    assert planned.dry_run
    assert memory.count() == 6
    assert sorted(memory.forget(where={"even": True}).ids) == ["0", "2", "4"]
    assert sorted(document.id for document in memory.list()) == ["1", "3", "5"]
    assert memory.forget(["1", "3"]).counts["documents"] == 2
    assert memory.forget(where={"even": True}).ids == ()


@pytest.mark.parametrize("selector", [{}, {"ids": []}, {"where": {}}, {"ids": "bob", "where": {"a": 1}}])
def test_forget_needs_exactly_one_selector(filled: MemoryModel, selector: dict) -> None:
    with pytest.raises(ConfigError, match="forget needs exactly one"):
        filled.forget(**selector)
    assert filled.count() == len(FACTS)


def test_an_unknown_id_forgets_nothing(filled: MemoryModel) -> None:
    with pytest.raises(NotFoundError, match="'ghost'"):
        filled.forget(["bob", "ghost"])
    assert filled.count() == len(FACTS)


def test_forget_namespace_wants_its_name_twice(memory: MemoryModel) -> None:
    other = memory.namespace("other")
    other.add("Text.")
    memory.add("Stays.")
    with pytest.raises(ConfigError, match="repeat the namespace"):
        memory.forget_namespace("other", confirm="othr")
    assert memory.forget_namespace("other", confirm="other").counts["documents"] == 1
    assert (other.count(), memory.count()) == (0, 1)
    assert other.search("text") == []


# looking up


def test_list_pages_newest_first(memory: MemoryModel) -> None:
    memory.add_many([{"content": f"Number {n}.", "id": str(n), "metadata": {"n": n}} for n in range(5)])
    first = memory.list(limit=2)
    second = memory.list(limit=2, cursor=first.next_cursor)
    third = memory.list(limit=2, cursor=second.next_cursor)
    assert [d.id for page in (first, second, third) for d in page] == ["4", "3", "2", "1", "0"]
    assert third.next_cursor is None
    assert [d.id for d in memory.list({"n": {"$gte": 3}})] == ["4", "3"]
    assert memory.count({"n": {"$lt": 3}}) == 3


def test_stats_count_what_there_is(filled: MemoryModel) -> None:
    filled.namespace("other").add("Text.")
    stats = filled.stats
    assert (stats.namespace, stats.documents, stats.passages, stats.namespaces) == ("default", 5, 5, 2)
    assert stats.tokens == sum(document.tokens for document in filled.list())
    assert stats.state_bytes > 0
    assert stats.model == str(tiny_model())
    assert stats.fingerprint
    assert filled.verify() == ()


# asking


def test_search_gives_k_distinct_documents_best_first(filled: MemoryModel) -> None:
    found = filled.search("Who repairs violins in Oslo?", k=3)
    assert found[0].id == "bob"
    assert len(set(ids(found))) == 3
    assert [source.score for source in found] == sorted((s.score for s in found), reverse=True)
    assert not any(source.cited for source in found)
    assert set(ids(filled.search("violins", k=50))) == set(FACTS), "fewer than k: all of them"


@pytest.mark.parametrize("id", FACTS)
def test_a_documents_own_words_find_it(filled: MemoryModel, id: str) -> None:
    assert ids(filled.search(FACTS[id], k=1)) == [id]


def test_search_many_equals_one_by_one(filled: MemoryModel) -> None:
    many = filled.search_many(["violins", "lighthouses", "kitchen table"], k=2)
    assert many == [filled.search(q, k=2) for q in ("violins", "lighthouses", "kitchen table")]
    assert [found[0].id for found in many] == ["bob", "ann", "cat"]
    assert filled.search_many([]) == []


def test_where_masks_before_the_choice(memory: MemoryModel) -> None:
    """The best k of what matches, however many better ones do not."""
    memory.add_many(
        [{"content": f"Violins are lovely, says critic {n}.", "metadata": {"year": 2000}} for n in range(20)]
    )
    memory.add("A violin case stood there.", id="case", metadata={"year": 2024})
    assert "case" not in ids(memory.search("violins lovely critic", k=5))
    recent = {"year": {"$gte": 2010}}
    assert ids(memory.search("violins lovely critic", k=5, where=recent)) == ["case"]
    answer = memory.query("violins lovely critic", where=recent, top_k=2)
    assert ids(answer.sources) == ["case"]
    explained = memory.explain("violins lovely critic", where=recent)
    assert {document for layer in explained.layers for document in layer.documents} == {"case"}
    assert memory.context("violins", where=recent).text.count("\n") == 0
    nothing = memory.query("violins", where={"year": 1900})
    assert (nothing.found, nothing.text, nothing.sources) == (False, NOTHING_MATCHES, ())


def test_an_empty_memory_says_so(memory: MemoryModel) -> None:
    answer = memory.query("Who is Bob?")
    assert (answer.found, answer.text) == (False, NOTHING_STORED)
    assert (answer.sources, answer.rounds, answer.dropped) == ((), (), ())
    assert answer.usage.completion_tokens == 0
    assert memory.search("Bob") == []
    assert (memory.context("Bob").text, memory.context("Bob").sources) == ("", ())
    explained = memory.explain("Bob")
    assert [layer.passages for layer in explained.layers] == [(), ()]
    assert explained.sources == ()
    assert [chunk.text for chunk in memory.stream("Bob")] == [NOTHING_STORED, ""]
    assert memory.list().items == ()
    assert memory.stats.documents == 0


def test_a_score_below_the_minimum_is_not_found() -> None:
    with open_memory(config=MemoryConfig(min_score=2.0)) as memory:
        memory.add(FACTS["bob"])
        answer = memory.query("Bob")
        assert (answer.found, answer.text, answer.sources) == (False, NOTHING_FOUND, ())
        assert len(memory.search("Bob")) == 1


def test_k_and_top_k_choose_how_much_is_read(filled: MemoryModel) -> None:
    assert len(filled.query("violins", k=2).sources) == 2
    assert ids(filled.query("violins", k=1, top_k=1).sources) == ["bob"]
    assert len(filled.query("violins", k=50).sources) == len(FACTS)


def test_more_rounds_bring_in_other_documents(filled: MemoryModel) -> None:
    answer = filled.query("violins", k=4, max_rounds=2)
    assert [round.number for round in answer.rounds] == [1, 2]
    named = [document for round in answer.rounds for document in round.documents]
    assert len(set(named)) == len(named) == 4
    assert len(filled.query("violins", k=2, max_rounds=9).rounds) == 2


def test_explain_shows_every_layer(filled: MemoryModel) -> None:
    explained = filled.explain("Who repairs violins?")
    assert [layer.layer for layer in explained.layers] == [1, 3]
    for layer in explained.layers:
        assert list(layer.scores) == sorted(layer.scores, reverse=True)
        assert set(layer.documents) == set(FACTS)
    assert explained.sources[0].id == "bob"
    means = [sum(layer.scores[layer.documents.index("bob")] for layer in explained.layers) / 2]
    assert means == pytest.approx([explained.sources[0].score], abs=1e-5)


# evidence


def test_long_evidence_is_cut_to_the_part_that_matters() -> None:
    filler = " ".join(f"word{n}" for n in range(300))
    text = f"{filler} The password of the harbour is swordfish. {filler}"
    with open_memory(
        config=MemoryConfig(max_evidence_tokens=100, max_new_tokens=4, passage_tokens=4096)
    ) as memory:
        memory.add(text, id="long")
        (source,) = memory.query("password harbour swordfish").sources
        assert "swordfish" in source.text
        assert len(source.text) < len(text) / 4
        assert text[source.start : source.end] == source.text


def test_evidence_that_does_not_fit_is_reported(memory: MemoryModel) -> None:
    with open_memory(config=MemoryConfig(max_evidence_tokens=64, max_new_tokens=4)) as small:
        small.add_many([f"Violin number {n} " + "has a very long story " * 10 for n in range(5)])
        answer = small.query("violin", k=5)
        assert len(answer.sources) == 2
        assert len(answer.dropped) == 3
        order = [document for round in answer.rounds for document in round.documents]
        assert ids(answer.sources) + ids(answer.dropped) == order, "the lowest-ranked are dropped"


def test_context_stays_within_its_tokens(filled: MemoryModel, engine: Engine) -> None:
    for limit in (20, 40, 80, 1000):
        context = filled.context("violins in Oslo", max_tokens=limit)
        assert engine.count_tokens(context.text) <= limit
        assert len(context.sources) == (len(context.text.splitlines()))
    assert context.text.startswith("[1] (20")
    assert FACTS["bob"] in context.text


@pytest.fixture(scope="module")
def engine() -> Engine:
    from msa_memory.engine.engine import load_engine

    return load_engine(tiny_model(), device="cpu")


def test_evidence_is_dated_oldest_first(memory: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.add("Bob moved to Bergen.", timestamp="2026-02-01", metadata={"title": "Letter"})
    memory.add("Bob lives in Oslo.", timestamp="2025-02-01")
    prompts: list[str] = []
    read = Engine.read_steps

    def spy(engine: Engine, view: object, selections: object, ids: list[int], *rest: object) -> object:
        prompts.append(engine.tokenizer.decode(ids))
        return read(engine, view, selections, ids, *rest)

    monkeypatch.setattr(Engine, "read_steps", spy)
    memory.query("Where does Bob live?")
    [prompt] = prompts
    assert "[2025-02-01] Bob lives in Oslo.\n\n[Letter | 2026-02-01] Bob moved to Bergen.\n" in prompt


def test_sources_that_carry_the_answer_are_cited(filled: MemoryModel) -> None:
    first = filled.query("violins", k=6, max_new_tokens=3)
    assert not any(source.cited for source in first.sources)
    filled.add(first.text, id="echo")
    answer = filled.query("violins", k=6, max_new_tokens=3)
    assert answer.text == first.text
    assert {source.id for source in answer.sources if source.cited} == {"echo"}


def test_expired_documents_are_invisible(memory: MemoryModel) -> None:
    past, future = datetime.now(UTC) - timedelta(days=1), datetime.now(UTC) + timedelta(days=1)
    memory.add("Violins were on sale.", id="old", expires_at=past)
    memory.add("Violins are on sale.", id="new", expires_at=future)
    assert ids(memory.search("violins")) == ["new"]
    assert ids(memory.query("violins").sources) == ["new"]
    assert [document.id for document in memory.list()] == ["new"]
    assert memory.count() == memory.stats.documents == 1
    for verb in (memory.get, memory.history, lambda id: memory.update(id, metadata={"a": 1})):
        with pytest.raises(NotFoundError, match=r"'old'.*expired at"):
            verb("old")


@pytest.mark.parametrize("mode", ["error", "skip", "replace"])
def test_the_id_of_an_expired_document_is_free(memory: MemoryModel, mode: str) -> None:
    past = datetime.now(UTC) - timedelta(days=1)
    memory.add("Violins were on sale.", id="x", expires_at=past)
    memory.add("Violins are on sale.", id="x", on_conflict=mode)
    assert memory.get("x").text == "Violins are on sale."
    assert [source.text for source in memory.search("violins")] == ["Violins are on sale."]


# decoding options


def test_the_answers_length_is_limited(filled: MemoryModel) -> None:
    assert filled.query("violins", max_new_tokens=3).usage.completion_tokens == 3
    assert filled.query("violins").usage.completion_tokens == 12


def test_an_answer_stops_at_a_string(filled: MemoryModel) -> None:
    whole = filled.query("violins", max_new_tokens=30).text
    for at in range(2, len(whole) - 6, 9):
        stop = whole[at : at + 6]
        expected = whole[: whole.index(stop)].strip()
        assert filled.query("violins", max_new_tokens=30, stop=stop).text == expected or expected == ""
        assert filled.query("violins", max_new_tokens=30, stop=["never there", stop]).text == (
            expected or NOTHING_FOUND
        )


def test_a_temperature_varies_the_answer(filled: MemoryModel) -> None:
    assert len({filled.query("violins").text for _ in range(3)}) == 1
    assert len({filled.query("violins", temperature=2.0).text for _ in range(5)}) > 1


def test_a_question_that_leaves_no_room_is_named(filled: MemoryModel) -> None:
    with pytest.raises(LimitError, match="window of 8192 leaves no room for evidence"):
        filled.query("violins", max_new_tokens=8192)
    with pytest.raises(LimitError, match="the limit is 2048"):
        filled.query("violins " * 3000)
    assert filled.query("violins").found


def test_evidence_never_overflows_the_window(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 400}))
    config = MemoryConfig(max_evidence_tokens=100_000, max_new_tokens=4)
    with open_memory(model=model, config=config) as memory:
        memory.add_many([f"Violin {n} " + "plays a song for me " * 12 for n in range(15)])
        answer = memory.query("violin", k=15)
        assert 200 < answer.usage.prompt_tokens < 400
        assert len(answer.sources) + len(answer.dropped) == 15
        assert answer.dropped
        with pytest.raises(LimitError, match="window of 400 leaves no room for evidence"):
            memory.query("violin " * 300)


# streaming


def test_a_stream_adds_up_to_the_answer(filled: MemoryModel) -> None:
    for question in ("violins", "Who sleeps?"):
        chunks = list(filled.stream(question, max_new_tokens=40))
        assert [chunk.answer is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
        assert len(chunks) > 5
        answer = chunks[-1].answer
        assert "".join(chunk.text for chunk in chunks) == answer.text
        assert same(answer) == same(filled.query(question, max_new_tokens=40))


@given(
    pieces=st.lists(st.none() | st.text(st.sampled_from("ab: \n"), max_size=4), max_size=8),
    opening=st.sampled_from(["", "a", "ab:", "b a:"]),
)
def test_what_is_shown_adds_up_however_it_comes(pieces: list[str | None], opening: str) -> None:
    steps, shown = _shown(pieces, opening=opening, otherwise="Nothing."), ""
    try:
        while True:
            chunk = next(steps)
            shown += chunk.text if chunk else ""
    except StopIteration as stop:
        answer = stop.value
    whole = "".join(filter(None, pieces)).strip().removeprefix(opening).strip()
    assert shown == answer == (whole or "Nothing.")


def test_a_blank_answer_streams_what_it_says(filled: MemoryModel) -> None:
    first = filled.query("violins").text[0]
    chunks = list(filled.stream("violins", stop=first))
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].answer.text == NOTHING_FOUND
    assert not chunks[-1].answer.found


def test_closing_a_stream_stops_the_model(filled: MemoryModel, decoded: list[int]) -> None:
    stream = filled.stream("violins", max_new_tokens=3000)
    next(stream)
    stream.close()
    assert filled.query("violins", max_new_tokens=5).found, "the worker goes on"
    stopped_at = decoded.count(3000)
    assert stopped_at < 3000
    filled.query("violins", max_new_tokens=50)
    assert decoded.count(3000) == stopped_at


def test_a_short_question_does_not_wait_for_a_long_answer(filled: MemoryModel, decoded: list[int]) -> None:
    long = filled.stream("violins", max_new_tokens=2000)
    next(long)
    before = decoded.count(2000)
    assert filled.query("cat", max_new_tokens=4).found
    assert decoded.count(4) == 4
    last_short = max(at for at, step in enumerate(decoded) if step == 4)
    assert decoded[:last_short].count(2000) < 2000, "the long answer was still under way"
    assert before <= decoded[:last_short].count(2000)
    long.close()


def test_query_many_equals_one_by_one(filled: MemoryModel, decoded: list[int]) -> None:
    questions = ["Who repairs violins?", "Where is the cat?", "Who is in Bergen?", "Oz"]
    together = filled.query_many(questions, k=2, max_new_tokens=10)
    assert [same(answer) for answer in together] == [
        same(filled.query(question, k=2, max_new_tokens=10)) for question in questions
    ]
    assert filled.query_many([]) == []


def test_one_bad_question_of_many_fails_the_call_only(filled: MemoryModel) -> None:
    with pytest.raises(LimitError, match="the limit is 2048"):
        filled.query_many(["violins", "violins " * 3000])
    assert filled.query("violins").found


# namespaces


def test_namespaces_share_nothing(memory: MemoryModel) -> None:
    red, blue = memory.namespace("red"), memory.namespace("blue")
    red.add("The red secret is violins.", id="same")
    blue.add("The blue secret is lighthouses.", id="same")
    assert (red.namespace_name, memory.namespace_name) == ("red", "default")
    assert red.get("same").text != blue.get("same").text
    assert [s.text for s in red.search("secret", k=9)] == ["The red secret is violins."]
    assert [s.text for s in blue.query("violins", k=9).sources] == ["The blue secret is lighthouses."]
    assert memory.search("secret") == []
    blue.forget("same")
    assert red.get("same").version == 1
    assert [s.text for s in red.search("secret", k=9)] == ["The red secret is violins."]


def test_namespaces_stay_apart_under_threads(memory: MemoryModel) -> None:
    names, problems = ["red", "blue", "green"], []

    def use(name: str) -> None:
        try:
            view = memory.namespace(name)
            for n in range(6):
                view.add(f"The {name} secret number {n} is a violin.", id=f"s{n}")
                seen = view.search("secret violin", k=50)
                assert all(f"The {name} secret" in source.text for source in seen)
                assert len(seen) == view.count()
                assert all(
                    f"The {name} secret" in s.text for s in view.query("secret", max_new_tokens=2).sources
                )
                if n % 3 == 2:
                    view.forget(f"s{n - 1}")
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=use, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert [memory.namespace(name).count() for name in names] == [4, 4, 4]


# two memories, one folder


def test_reopening_encodes_nothing(tmp_path: Path, encoded: list[str]) -> None:
    with open_memory(tmp_path / "m", config=BRIEF) as memory:
        memory.add_many([{"id": id, "content": text} for id, text in FACTS.items()])
        before = memory.query("violins"), memory.search("violins", k=9)
    encoded.clear()
    with open_memory(tmp_path / "m", config=BRIEF) as memory:
        assert (same(memory.query("violins")), memory.search("violins", k=9)) == (same(before[0]), before[1])
        assert [document.id for document in memory.list()] == list(reversed(FACTS))
    assert encoded == []


def test_the_recorded_model_is_used_again(tmp_path: Path) -> None:
    with open_memory(tmp_path / "m") as memory:
        memory.add(FACTS["bob"])
    with MemoryModel.open(tmp_path / "m", device="cpu") as memory:
        assert memory.search("violins")[0].text == FACTS["bob"]


def test_two_memories_see_each_other_at_the_next_question(tmp_path: Path) -> None:
    with open_memory(tmp_path / "m", config=BRIEF) as one, open_memory(tmp_path / "m", config=BRIEF) as two:
        assert two.search("violins") == []
        one.add(FACTS["bob"], id="bob")
        assert ids(two.query("violins").sources) == ["bob"]
        two.update("bob", "Bob sells violins.")
        assert [source.text for source in one.search("violins")] == ["Bob sells violins."]
        two.add(FACTS["ann"], id="ann")
        one.forget("bob")
        assert ids(two.search("violins", k=9)) == ["ann"]
        assert (one.count(), two.count()) == (1, 1)


def test_another_process_sees_it_too(tmp_path: Path) -> None:
    script = """
import sys
from msa_memory.testing import open_memory
with open_memory(sys.argv[1]) as memory:
    print(memory.search("violins")[0].text)
    memory.forget("bob")
    memory.add("Ann sold her violins.", id="ann")
"""
    with open_memory(tmp_path / "m") as memory:
        memory.add(FACTS["bob"], id="bob")
        done = subprocess.run(
            [sys.executable, "-P", "-c", script, str(tmp_path / "m")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == FACTS["bob"]
        assert ids(memory.search("violins")) == ["ann"]


class Meddling:
    """Steps a question by hand and changes the memory between two steps."""

    def __init__(self, memory: MemoryModel, question: str) -> None:
        self.memory = memory
        self.asking = memory._asking(AnswerOptions(question))

    def finish(self, verb: str, after: int, change: object) -> object:
        steps = getattr(self.asking, verb)()
        for _ in range(after):
            next(steps)
        change()
        try:
            while True:
                next(steps)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("where", ["same memory", "another memory"])
@pytest.mark.parametrize("verb", ["answer", "search", "explain"])
def test_what_is_forgotten_under_a_running_question_is_not_read(
    tmp_path: Path, where: str, verb: str
) -> None:
    """After routing chose it, before its states and text were fetched: the question looks again."""
    with open_memory(tmp_path / "m", config=BRIEF) as memory, open_memory(tmp_path / "m") as another:
        memory.add_many([{"id": id, "content": text} for id, text in FACTS.items()])
        other = memory if where == "same memory" else another
        memory.search("violins")

        def change() -> None:
            other.update("ann", "Ann paints violins.")
            other.forget("bob")

        result = Meddling(memory, "violins").finish(verb, 1, change)
        found = result if verb == "search" else result.sources
        assert found
        assert "bob" not in ids(found)
        assert memory.query("violins").sources[0].text == "Ann paints violins."


# opening and closing


def test_nothing_works_after_close(tmp_path: Path) -> None:
    memory = open_memory(tmp_path / "m")
    memory.add(FACTS["bob"], id="bob")
    view = memory.namespace("other")
    memory.close()
    memory.close()
    calls = [
        lambda: memory.add("Text."),
        lambda: memory.add_many(["Text."]),
        lambda: memory.update("bob", "Text."),
        lambda: memory.forget("bob"),
        lambda: memory.forget_namespace("default", confirm="default"),
        lambda: memory.get("bob"),
        lambda: memory.list(),
        lambda: memory.count(),
        lambda: memory.history("bob"),
        lambda: memory.stats,
        lambda: memory.query("Bob?"),
        lambda: memory.query_many(["Bob?"]),
        lambda: memory.stream("Bob?"),
        lambda: memory.search("Bob"),
        lambda: memory.search_many(["Bob"]),
        lambda: memory.context("Bob"),
        lambda: memory.explain("Bob"),
        lambda: memory.verify(),
        lambda: memory.compact(),
        lambda: view.count(),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="closed; open it again"):
            call()


def test_a_stream_left_over_says_that_the_memory_is_closed(tmp_path: Path) -> None:
    memory = open_memory(tmp_path / "m")
    stream = memory.stream("Bob?")
    memory.close()
    with pytest.raises(EngineError, match="closed; open the memory again"):
        next(stream)


def test_closing_one_memory_leaves_the_model_to_the_other() -> None:
    with open_memory() as one:
        with open_memory() as two:
            two.add("Text.")
        one.add(FACTS["bob"])
        assert one.query("Bob").found


def test_close_waits_for_running_questions(filled: MemoryModel) -> None:
    answers: list[Answer] = []
    stream = filled.stream("violins", max_new_tokens=200)
    next(stream)
    reader = threading.Thread(target=lambda: answers.extend(c.answer for c in stream if c.answer))
    reader.start()
    filled.close()
    reader.join()
    assert answers[0].usage.completion_tokens == 200


def test_read_only_reads_and_refuses_to_write(tmp_path: Path) -> None:
    with open_memory(tmp_path / "m", config=BRIEF) as memory:
        memory.add(FACTS["bob"], id="bob")
    with open_memory(tmp_path / "m", config=BRIEF, read_only=True) as memory:
        assert memory.query("violins").found
        assert memory.get("bob").text == FACTS["bob"]
        assert memory.forget("bob", dry_run=True).ids == ("bob",)
        for call in (
            lambda: memory.add("Text."),
            lambda: memory.add_many(["Text."]),
            lambda: memory.update("bob", "Text."),
            lambda: memory.update("bob", metadata={"a": 1}),
            lambda: memory.forget("bob"),
            lambda: memory.forget_namespace("default", confirm="default"),
            lambda: memory.compact(),
        ):
            with pytest.raises(ReadOnlyError, match="read_only"):
                call()
        assert memory.count() == 1


def test_an_empty_read_only_memory_can_be_asked(tmp_path: Path) -> None:
    open_memory(tmp_path / "m").close()
    with open_memory(tmp_path / "m", read_only=True) as memory:
        assert memory.query("Bob?").text == NOTHING_STORED


FORKING = """
import os, sys
from msa_memory.errors import ForkedMemoryError
from msa_memory.testing import open_memory

memory = open_memory(sys.argv[1])
memory.add("Bob lives in Oslo.", id="bob")
child = os.fork()
if child == 0:
    status = 1
    try:
        for call in (lambda: memory.get("bob"), lambda: memory.query("Bob"), lambda: memory.add("x"),
                     lambda: memory.stream("Bob"), lambda: memory.namespace("n").count()):
            try:
                call()
            except ForkedMemoryError as error:
                assert "open the memory again after the fork" in str(error)
            else:
                raise AssertionError("a memory was used across a fork")
        memory.close()
        with open_memory(sys.argv[1]) as again:  # what the message says to do
            assert again.search("Oslo")[0].id == "bob"
        status = 0
    finally:
        os._exit(status)
_, status = os.waitpid(child, 0)
assert memory.search("Oslo")[0].id == "bob", "the parent's memory is as it was"
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_fork_must_open_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", FORKING, str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_compact_and_verify(tmp_path: Path) -> None:
    with open_memory(tmp_path / "m", config=BRIEF) as memory:
        memory.add_many([f"Violin number {n}." for n in range(30)])
        memory.forget([document.id for document in memory.list(limit=25)])
        assert memory.compact() > 0
        assert memory.verify() == ()
        assert len(memory.search("violin", k=50)) == 5
