"""The lexical signal against a plain BM25, and that what is not visible or forgotten leaves no mark in it."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.lexical import LexicalIndex, passage_terms, question_terms

TEXTS = st.lists(st.sampled_from("anna bob cello dover fog the".split()), min_size=1, max_size=12).map(
    " ".join
)
MSA = MSAConfig(router_layers=(0,), top_k=4)


def bank_of(texts: dict[int, str]) -> MemoryBank:
    bank = MemoryBank(MSA, lambda number: pytest.fail(f"passage {number} fetched"))
    for number, text in texts.items():
        bank.add(number, torch.zeros(1, 1, 2, 8), passage_terms(text))
    return bank


def plain(texts: list[str], question: str) -> list[float]:
    """BM25 with k1 1.2 and b 0.75 over word lists, as a share of what a perfect passage could reach.

    Frequencies are those of the texts and fifty more passages, half of which hold "the".
    """
    words = [re.findall(r"\w+", text) for text in texts]
    mean = sum(map(len, words)) / len(words)
    best, scores = 0.0, [0.0] * len(texts)
    for term in set(re.findall(r"\w+", question)):
        holding = sum(term in passage for passage in words)
        in_all = holding + (25 if term == "the" else 0)
        idf = math.log(1 + (len(texts) + 50 - in_all + 0.5) / (in_all + 0.5))
        best += idf * 2.2
        for place, passage in enumerate(words):
            count = Counter(passage)[term]
            scores[place] += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(passage) / mean))
    return [score / best for score in scores]


@given(texts=st.lists(TEXTS, min_size=1, max_size=8), question=TEXTS)
def test_scores_are_those_of_a_plain_bm25(texts: list[str], question: str) -> None:
    view = bank_of(dict(enumerate(texts, 10))).view()
    assert view.score_words(question_terms(question)).tolist() == pytest.approx(
        plain(texts, question), abs=1e-5
    )


@given(
    texts=st.lists(TEXTS, min_size=2, max_size=8, unique=True),
    question=TEXTS,
    data=st.data(),
)
def test_masked_passages_change_nothing(texts: list[str], question: str, data: st.DataObject) -> None:
    visible = data.draw(st.lists(st.sampled_from(range(len(texts))), min_size=1, unique=True).map(sorted))
    view = bank_of(dict(enumerate(texts))).view(np.array(visible, dtype=np.int64))
    alone = bank_of({number: texts[number] for number in visible}).view()
    scores = dict(
        zip(view.numbers.tolist(), view.score_words(question_terms(question)).tolist(), strict=True)
    )
    expected = alone.score_words(question_terms(question)).tolist()
    assert [scores[number] for number in visible] == expected
    assert all(scores[number] == 0 for number in scores.keys() - set(visible))


@given(
    texts=st.lists(TEXTS, min_size=2, max_size=8),
    question=TEXTS,
    data=st.data(),
)
def test_removal_leaves_an_index_as_if_never_added(
    texts: list[str], question: str, data: st.DataObject
) -> None:
    gone = data.draw(st.sets(st.sampled_from(range(len(texts))), min_size=1))
    bank = bank_of(dict(enumerate(texts)))
    bank.view().score_words(question_terms(question))
    bank.remove(gone)
    fresh = bank_of({number: text for number, text in enumerate(texts) if number not in gone})
    assert bank.view().score_words(question_terms(question)).tolist() == (
        fresh.view().score_words(question_terms(question)).tolist()
    )
    kept = {term for number, text in enumerate(texts) if number not in gone for term in question_terms(text)}
    assert bank.lexical.postings(question_terms(" ".join(texts))).keys() == kept


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Violins", "violin"),
        ("lives", "live"),
        ("moved", "moving"),
        ("repaired", "REPAIRING"),
        ("Straße", "STRASSE"),
        ("東京都庁", "京都"),
        ("ภาษาไทย", "ภาษา"),
        ("2026", "2026"),
        ("naïve", "NAÏVE"),
    ],
)
def test_forms_of_a_word_meet(one: str, other: str) -> None:
    assert question_terms(one) & question_terms(other)


@pytest.mark.parametrize(("one", "other"), [("bus", "bu"), ("2026", "2025"), ("red", "r"), ("王", "玉")])
def test_other_words_do_not(one: str, other: str) -> None:
    assert not question_terms(one) & question_terms(other)


@given(st.text(max_size=80))
def test_any_text_has_terms(text: str) -> None:
    terms = passage_terms(text)
    assert terms.dtype == torch.int64
    assert terms.shape[1] == 2
    assert set(terms[:, 0].tolist()) == question_terms(text)
    assert terms[:, 0].tolist() == sorted(set(terms[:, 0].tolist()))


def test_an_empty_view_and_an_empty_question_score_nothing() -> None:
    assert bank_of({}).view().score_words(question_terms("anna")).tolist() == []
    assert bank_of({1: "anna"}).view().score_words(frozenset()).tolist() == [0.0]
    assert (
        bank_of({1: "anna"}).view(np.array([], dtype=np.int64)).score_words(question_terms("anna")).tolist()
        == []
    )


def test_unknown_numbers_are_ignored() -> None:
    index = LexicalIndex()
    index.add(3, passage_terms("anna"))
    index.remove([4])
    assert index.lengths(np.array([3, 4])).tolist() == [1.0, 0.0]
