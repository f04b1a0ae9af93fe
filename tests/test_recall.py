"""From scores to evidence: documents, excerpts within the budget, order, citations."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_memory.persistence import PassageRecord, PassageText
from msa_memory.recall import (
    Excerpt,
    Hit,
    best_documents,
    citation,
    cite,
    evidence_entry,
    evidence_text,
    fit_evidence,
    to_source,
)
from msa_memory.types import Source

DAY = datetime(2026, 1, 31, 12, tzinfo=UTC)


def record(number: int, document: str, start: int = 0, end: int = 10) -> PassageRecord:
    return PassageRecord(number, "default", document, 0, start, end, 3, "segment-00000001.seg", 0, 8, 0)


def passage(
    number: int, document: str, text: str, *, at: datetime = DAY, header: str = "", before: str = ""
) -> PassageText:
    whole = before + text
    return PassageText(
        record=record(number, document, len(before), len(whole)),
        text=text,
        header=header,
        document_text=whole,
        metadata={"k": document},
        timestamp=at,
        version=1,
        expires_at=None,
        source=None,
        trust=None,
    )


def excerpt(number: int, document: str, text: str, **options: object) -> Excerpt:
    found = passage(number, document, text, **options)
    return Excerpt(found, 0.5, found.record.start, found.record.end)


def words(excerpt: Excerpt) -> int:
    return len(excerpt.text.split())


def fit(
    passages: list[list[PassageText]], budget: int, *, cost: object = words, chunk: tuple[int, int] = (0, 1)
) -> tuple[list[Excerpt], list[Excerpt]]:
    """``fit_evidence`` of documents given as their passages, best first."""
    texts = {p.record.number: p for document in passages for p in document}
    hits = [
        Hit(document[0].record.document_id, 0.5, tuple(p.record for p in document)) for document in passages
    ]
    return fit_evidence(hits, texts, dict.fromkeys(texts, 0.5), budget, cost, lambda p: chunk)


# documents


def test_the_best_passage_ranks_a_document() -> None:
    records = {1: record(1, "a"), 2: record(2, "b"), 3: record(3, "a"), 4: record(4, "c")}
    scores = np.array([0.1, 0.5, 0.9, 0.3], dtype=np.float32)
    hits = best_documents(np.array([1, 2, 3, 4]), scores, records, 2)
    assert [hit.document_id for hit in hits] == ["a", "b"]
    assert [r.number for r in hits[0].passages] == [3]
    assert hits[0].score == pytest.approx(0.9)


def test_masked_skipped_and_forgotten_passages_are_never_chosen() -> None:
    records = {1: record(1, "a"), 2: record(2, "b"), 4: record(4, "d")}
    scores = np.array([-np.inf, 0.5, 0.9, 0.3], dtype=np.float32)
    hits = best_documents(np.array([1, 2, 3, 4]), scores, records, 4, skip=["b"])
    assert [hit.document_id for hit in hits] == ["d"]


def test_ties_go_to_the_older_passage() -> None:
    records = {n: record(n, str(n)) for n in (1, 2, 3)}
    hits = best_documents(np.array([3, 1, 2]), np.full(3, 0.5, dtype=np.float32), records, 2)
    assert [hit.document_id for hit in hits] == ["1", "2"]


@given(
    rows=st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(-1, 1, width=32)), max_size=30),
    k=st.integers(1, 8),
)
def test_k_distinct_documents_best_first(rows: list[tuple[str, float]], k: int) -> None:
    records = {n: record(n, document) for n, (document, _) in enumerate(rows)}
    scores = np.array([score for _, score in rows], dtype=np.float32)
    hits = best_documents(np.arange(len(rows)), scores, records, k)
    best = {document: max(s for d, s in rows if d == document) for document, _ in rows}
    assert [hit.score for hit in hits] == sorted(best.values(), reverse=True)[:k]
    assert len({hit.document_id for hit in hits}) == len(hits) == min(k, len(best))


# the budget


@given(
    texts=st.lists(
        st.text(st.sampled_from("ab c.\n日"), min_size=1, max_size=400).filter(str.strip), max_size=6
    ),
    heads=st.integers(0, 40),
    budget=st.integers(1, 300),
    place=st.floats(0, 1),
)
def test_evidence_never_exceeds_the_budget(texts: list[str], heads: int, budget: int, place: float) -> None:
    """Letters are cheap and other signs dear, as in real tokenizers, and every entry has a head."""

    def cost(excerpt: Excerpt) -> int:
        return heads + sum(3 if sign == "日" else 1 for sign in excerpt.text if sign not in "ab")

    passages = [passage(number, str(number), text) for number, text in enumerate(texts)]
    hits = [Hit(str(n), 0.5, (p.record,)) for n, p in enumerate(passages)]

    def best_chunk(p: PassageText) -> tuple[int, int]:
        return (int(place * len(p.text)),) * 2

    chosen, dropped = fit_evidence(
        hits, dict(enumerate(passages)), dict.fromkeys(range(9), 0.5), budget, cost, best_chunk
    )
    assert sum(map(cost, chosen)) <= budget
    read = [e.passage.record.number for e in chosen]
    assert read == sorted(read), "best first"
    assert sorted(read + [e.passage.record.number for e in dropped]) == list(range(len(texts)))
    assert all(e.text.strip() and e.text in e.passage.document_text for e in chosen)


def test_what_fits_is_read_whole_and_in_order() -> None:
    documents = [[passage(n, str(n), f"Words of document {n}.")] for n in (5, 1, 3)]
    chosen, dropped = fit(documents, 100)
    assert [e.text for e in chosen] == [
        "Words of document 5.",
        "Words of document 1.",
        "Words of document 3.",
    ]
    assert dropped == []


@pytest.mark.parametrize(("place", "kept"), [(0, "w0 "), (1500, " w300 "), (10_000, " w999")])
def test_a_long_passage_is_cut_around_its_best_chunk(place: int, kept: str) -> None:
    long = " ".join(f"w{n}" for n in range(1000))
    (cut,), dropped = fit([[passage(1, "a", long, before="Head. ")]], 60, chunk=(place + 6, place + 10))
    assert kept.strip() in cut.text.split()
    assert 40 <= words(cut) <= 60
    assert set(cut.text.split()) <= set(long.split()), "cut at word ends"
    assert cut.passage.document_text[cut.start : cut.end] == cut.text
    assert dropped == []


def test_a_text_without_spaces_is_cut_too() -> None:
    (cut,), _ = fit([[passage(1, "a", "日本語" * 200)]], 60, cost=lambda e: len(e.text), chunk=(300, 310))
    assert 40 <= len(cut.text) <= 60
    assert cut.start < 300 < 310 < cut.end


def test_a_cut_moves_no_further_than_a_word() -> None:
    place = 310
    text = "日" * 330 + " " + "日" * 300
    (cut,), _ = fit([[passage(1, "a", text)]], 60, cost=lambda e: len(e.text), chunk=(place, place + 2))
    assert cut.start < place < place + 2 < cut.end


def test_short_documents_leave_their_share_to_long_ones() -> None:
    chosen, _ = fit([[passage(1, "a", "word " * 500)], [passage(2, "b", "two words")]], 100)
    assert words(chosen[1]) == 2
    assert 80 <= words(chosen[0]) <= 98


def test_the_lowest_ranked_are_dropped_where_shares_get_too_small() -> None:
    documents = [[passage(n, str(n), "word " * 200)] for n in range(6)]
    chosen, dropped = fit(documents, 100)
    assert [e.passage.record.number for e in chosen] == [0, 1, 2]
    assert [e.passage.record.number for e in dropped] == [3, 4, 5]


def test_a_document_whose_head_alone_is_too_long_is_dropped() -> None:
    chosen, dropped = fit([[passage(1, "a", "some words")]], 40, cost=lambda e: 50 + words(e))
    assert (chosen, [e.text for e in dropped]) == ([], ["some words"])


def test_what_is_left_goes_to_further_passages_of_the_same_documents() -> None:
    first, second, third = (passage(n, "a", "word " * size) for n, size in ((1, 30), (2, 50), (3, 10)))
    chosen, dropped = fit([[first, second, third]], 60)
    assert [e.passage.record.number for e in chosen] == [1, 3]
    assert dropped == []


# what is read


def test_evidence_is_dated_and_oldest_first() -> None:
    new = excerpt(1, "a", "Bob moved to Bergen.", at=DAY, header="Notes | Ann\n")
    old = excerpt(2, "b", "Bob lives in Oslo.", at=DAY - timedelta(days=30))
    assert evidence_text([new, old]) == (
        "[2026-01-01] Bob lives in Oslo.\n\n[2026-01-31 | Notes | Ann] Bob moved to Bergen.\n"
    )


def test_of_one_time_the_best_stands_last() -> None:
    lines = evidence_text([excerpt(n, "x", f"Text {n}.") for n in (1, 2, 3)]).split("\n\n")
    assert [line.split()[-1] for line in lines] == ["3.", "2.", "1."]


def test_a_date_in_the_header_is_not_repeated() -> None:
    dated = excerpt(1, "a", "Text.", header="Notes | 2026-01-31\n")
    assert evidence_entry(dated) == "[Notes | 2026-01-31] Text.\n"


def test_a_citation_has_a_number_and_a_date() -> None:
    assert citation(3, excerpt(1, "a", " Text. ")) == "[3] (2026-01-31) Text."


def test_a_source_says_where_it_comes_from() -> None:
    whole = passage(7, "a", "Bob lives in Oslo.", before="Intro. ")
    source = to_source(Excerpt(whole, 0.25, 11, 16))
    assert (source.id, source.passage, source.start, source.end) == ("a", 7, 11, 16)
    assert source.text == whole.document_text[11:16]
    assert (source.score, source.metadata, source.timestamp) == (0.25, {"k": "a"}, DAY)
    assert not source.cited


# citations


def sources(*texts: str) -> list[Source]:
    return [to_source(excerpt(n, str(n), text)) for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("answer", "texts", "cited"),
    [
        ("Bergen", ["Bob moved to Bergen.", "Bob lives in Oslo."], [True, False]),
        ("He repairs violins.", ["Bob repairs violins.", "Bob likes violins."], [True, False]),
        ("Paris", ["Bob moved to Bergen."], [False]),
        ("the", ["The cat."], [False]),
        ("", ["Bob."], [False]),
        ("Bob", ["Bob.", "Ann."], [True, False]),
        ("BERGEN!", ["bergen", "Bergen"], [True, True]),
    ],
)
def test_sources_that_carry_the_answer_are_cited(answer: str, texts: list[str], cited: list[bool]) -> None:
    assert [s.cited for s in cite(answer, "Where does Bob live?", sources(*texts))] == cited


def test_no_sources_no_citations() -> None:
    assert cite("Bergen", "Where?", []) == ()
