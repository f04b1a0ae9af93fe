"""The head that tells whether there is an answer: what it learns from, how it is fitted, where it goes."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from msa_memory.cli import app
from msa_memory.engine.answerability import HEAD_FILE, AnswerabilityHead, load_head, save_head, told_signals
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.train.answerability import (
    AnswerabilityTraining,
    Lesson,
    article_lessons,
    collect,
    fit,
    note_lesson,
)
from msa_memory.engine.train.asking import Ranked, Reader
from msa_memory.engine.train.data import Passage, Question
from msa_memory.engine.train.run import Paused
from msa_memory.errors import CheckpointError, ConfigError
from msa_memory.testing import tiny_model

SMALL = AnswerabilityTraining(parts=2, passages=12, questions=5, layers=(1, 3))


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    """Twenty articles of three passages each."""
    return [
        Passage(
            f"p{n}",
            f"The fair of Town{n} opens on day {n + 11} of May. Its mayor is called Smith{n}. Nobody sings.",
            f"Fair {n // 3}",
        )
        for n in range(60)
    ]


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    asked = [("When does the fair of Town{} open?", 11), ("On what day is the fair?", 11)]
    return [
        Question(f"q{n}-{kind}", text.format(n), (f"p{n}",), (f"day {n + first}",), "fairs")
        for n in range(60)
        for kind, (text, first) in enumerate(asked)
    ]


@pytest.fixture
def engine() -> Engine:
    return load_engine(tiny_model(), device="cpu")


class TestLessons:
    def test_parts_hold_whole_articles_and_none_twice(
        self, passages: list[Passage], questions: list[Question]
    ) -> None:
        lessons = article_lessons(passages, questions, SMALL)
        assert [lesson.name for lesson in lessons] == ["articles-0", "articles-1"]
        held = [{passage.id for passage in lesson.passages} for lesson in lessons]
        assert not held[0] & held[1]
        for lesson, ids in zip(lessons, held, strict=True):
            titles = {passage.title for passage in lesson.passages}
            assert ids == {passage.id for passage in passages if passage.title in titles}
            assert len(ids) >= 12
            assert len(lesson.asked) == 5 == len(lesson.articles)
            by_id = {passage.id: passage for passage in passages}
            assert lesson.articles == [by_id[one.gold[0]].title for one in lesson.asked]

    def test_a_note_holds_the_answer_alone(self, passages: list[Passage], questions: list[Question]) -> None:
        lesson = note_lesson(passages, questions, SMALL)
        texts = {passage.id: passage.text for passage in lesson.passages}
        assert len(texts) == len(lesson.passages)
        assert all(passage.title is None for passage in lesson.passages)
        made_up = [one for one in lesson.asked if one.source == "facts"]
        assert 0 < len(made_up) < len(lesson.asked)
        for one in lesson.asked:
            assert one.answers[0] in texts[one.gold[0]]
        cut = {texts[one.gold[0]] for one in lesson.asked if one.source != "facts"}
        assert cut <= {f"{passage.text.split('. ')[0]}." for passage in passages}

    def test_what_makes_no_sense_is_refused(self, engine: Engine) -> None:
        with pytest.raises(ConfigError, match="0 questions"):
            AnswerabilityTraining(questions=0)
        with pytest.raises(ConfigError, match=r"lost is 1\.0"):
            AnswerabilityTraining(lost=1.0)
        with pytest.raises(ConfigError, match=r"layers \[9\] are none of the model's 4"):
            AnswerabilityTraining(layers=(1, 9)).layers_of(engine)
        assert all(0 < layer < 4 for layer in AnswerabilityTraining().layers_of(engine))


class TestCollecting:
    @pytest.fixture
    def lesson(self, passages: list[Passage], questions: list[Question]) -> Lesson:
        return article_lessons(passages, questions, SMALL)[0]

    def test_every_question_is_read_with_and_without_its_passage(
        self, engine: Engine, lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[tuple[Ranked, set[int], Tensor]] = []
        start = Reader.start

        def spy(self: Reader, one: Ranked, numbers: Sequence[int], noted: Sequence[int] = ()) -> Any:
            row, logits = start(self, one, numbers, noted)
            chosen = {number for selection in one.selections.values() for number in selection.numbers}
            read.append((one, {*numbers, *chosen}, torch.stack([row.noted[layer] for layer in noted])))
            return row, logits

        monkeypatch.setattr(Reader, "start", spy)
        found = collect(engine, lesson, (1, 3), tmp_path / "rows.safetensors")
        assert found["absent"].tolist() == [False, True] * 5
        assert len(set(found["article"].tolist())) == len(set(lesson.articles))
        for place, (one, seen, inputs) in enumerate(read):
            gold = {lesson.passages.index(p) for p in lesson.passages if p.id in one.asked.gold}
            assert bool(seen & gold) is (place % 2 == 0)
            assert torch.equal(found["inputs"][place], inputs.half())
            best = one.relevance(engine.calibration.get("lexical_weight", 0.0))
            assert found["signals"][place, :3].tolist() == sorted(best[np.isfinite(best)], reverse=True)[:3]
        assert not found["found"][1::2].any()

    def test_it_goes_on_where_it_stopped(self, engine: Engine, lesson: Lesson, tmp_path: Path) -> None:
        whole = collect(engine, lesson, (1, 3), tmp_path / "whole.safetensors")
        path, late = tmp_path / "rows.safetensors", time.monotonic() + 3600

        def stop_after_two(what: str, done: int, total: int) -> None:
            if what.startswith("Asking") and done == 2:
                raise Paused("two are enough")

        with pytest.raises(Paused, match="two"):
            collect(engine, lesson, (1, 3), path, deadline=late, report=stop_after_two)
        assert 2 <= len(load_file(path)["absent"]) <= 4, "whole questions only"
        with pytest.raises(Paused, match="asking about articles-0 stopped at 0 of 5"):
            collect(engine, lesson, (1, 3), path, deadline=0.0)
        again = collect(engine, lesson, (1, 3), path)
        assert all(torch.equal(again[name], whole[name]) for name in whole)
        with pytest.MonkeyPatch.context() as patch:
            start = Reader.start
            read: list[Ranked] = []

            def interrupted(self: Reader, one: Ranked, *given: Any, **options: Any) -> Any:
                read.append(one)
                if len(read) == 4:
                    raise KeyboardInterrupt
                return start(self, one, *given, **options)

            patch.setattr(Reader, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                collect(engine, lesson, (1, 3), tmp_path / "half.safetensors")
        assert len(load_file(tmp_path / "half.safetensors")["absent"]) == 2
        engine.encode_many = pytest.fail  # type: ignore[assignment]
        assert collect(engine, lesson, (1, 3), path).keys() == whole.keys()


class TestFitting:
    @staticmethod
    def examples(seed: int, count: int = 400, size: int = 6) -> dict[str, Tensor]:
        """Rows whose second feature of the first layer tells them apart, more or less."""
        random = torch.Generator().manual_seed(seed)
        absent = torch.arange(count) % 2 == 1
        inputs = torch.randn(count, 2, size, generator=random) * torch.tensor([1.0, 5, 1, 1, 0.1, 1]) + 3
        inputs[:, 0, 1] += 10 * absent
        return {
            "inputs": inputs.half(),
            "signals": torch.randn(count, 8, generator=random),
            "absent": absent,
            "found": ~absent,
            "article": torch.arange(count) // 4,
        }

    def test_it_is_the_minimum_of_the_penalised_loss(self) -> None:
        """Where the gradient, in plain numpy, vanishes."""
        given = self.examples(1)
        head, _ = fit([given], (4, 7), 0.05, 0.1)
        rows = torch.cat((given["inputs"].float().flatten(1), given["signals"]), 1).numpy().astype(float)
        penalties = np.array([0.05] * 12 + [0.05 / 16] * 8)
        normed = (rows - rows.mean(0)) / rows.std(0, ddof=1)
        plain = torch.cat((head.weight.flatten(), head.signals)).numpy()
        weight = plain * rows.std(0, ddof=1)
        odds = rows @ plain + head.bias
        off = 1 / (1 + np.exp(-odds)) - given["absent"].numpy()
        assert np.abs(normed.T @ off / len(rows) + 2 * penalties * weight).max() < 2e-3
        assert abs(off.mean()) < 2e-3
        assert head.layers == (4, 7)
        assert int(np.abs(weight).argmax()) == 1

    def test_its_figures_are_of_articles_it_has_not_seen(self) -> None:
        """Rows that only their article tells apart look good to whoever has seen it."""
        given = self.examples(2)
        noise = torch.randn(given["inputs"].shape, generator=torch.Generator().manual_seed(5)).half()
        _, figures = fit([{**given, "inputs": noise}], (0, 1), 1e-4, 0.1)
        assert 0.35 < figures["auroc"] < 0.65
        _, figures = fit([given], (0, 1), 0.01, 0.1)
        assert figures["auroc"] > 0.85
        assert figures["refused"]["present"] <= 0.1 < 0.4 < figures["refused"]["absent"]
        assert figures["questions"] == 200

    def test_log_odds_are_those_of_the_fit(self) -> None:
        given = self.examples(3)
        head, figures = fit([given], (4, 7), 0.01, 0.1)
        rows = zip(given["inputs"].float(), given["signals"], strict=True)
        odds = [head.log_odds({4: row[0], 7: row[1]}, told) for row, told in rows]
        refused = torch.tensor(odds) >= figures["refusal_odds"]
        assert float(refused[given["absent"]].float().mean()) == pytest.approx(
            figures["refused"]["absent"], abs=0.1
        )

    def test_questions_whose_passage_was_not_found_teach_nothing_but_count(self) -> None:
        given = self.examples(6)
        missed = torch.arange(400) % 10 == 0
        wrong = {**given, "found": given["found"] & ~missed}
        wrong["inputs"] = torch.where(missed[:, None, None], given["inputs"] + 100, given["inputs"])
        kept = {name: rows[~missed] for name, rows in given.items()}
        head, figures = fit([wrong], (0, 1), 0.05, 0.1)
        expected, _ = fit([kept], (0, 1), 0.05, 0.1)
        torch.testing.assert_close(head.weight, expected.weight, atol=1e-4, rtol=1e-3)
        assert figures["questions"] == 200

    def test_too_few_articles_are_refused(self) -> None:
        given = self.examples(4, 8)
        with pytest.raises(ConfigError, match="2 articles"):
            fit([given], (0, 1), 0.1, 0.1)


class TestSignals:
    def test_they_say_what_was_found_and_what_would_be_said(self) -> None:
        routers, words = np.float32([0.2, 0.9, -np.inf, 0.4]), np.float32([0.5, 0.1, 1.0, 0.0])
        relevance = (routers + words) / 2
        logits = torch.tensor([1.0, 2.0, 0.0])
        first, second, third, *rest = told_signals(relevance, routers, words, logits, 2).tolist()
        assert (first, second, third) == pytest.approx((0.5, 0.35, 0.2))
        likely = logits.log_softmax(-1)
        entropy = float(-(likely.exp() * likely).sum())
        assert rest == pytest.approx([0.9, 0.1, float(likely[2]), float(likely[1]), entropy])

    def test_little_was_found_and_something_is_impossible(self) -> None:
        nothing = np.full(2, -np.inf, dtype=np.float32)
        told = told_signals(nothing, nothing, np.zeros(2, np.float32), torch.tensor([0.0, -torch.inf]), 1)
        assert told.tolist() == [0, 0, 0, 0, 0, -20, 0, 0]
        assert (
            told_signals(nothing[:0], nothing[:0], nothing[:0], torch.zeros(2), 1)[:5].tolist() == [0.0] * 5
        )


class TestFile:
    def test_it_comes_back_as_it_was(self, tmp_path: Path) -> None:
        head = AnswerabilityHead((1, 3), torch.randn(2, 8), torch.randn(8), -0.25)
        save_head(head, tmp_path / HEAD_FILE)
        found = load_head(tmp_path / HEAD_FILE, layers=4, size=8)
        assert (found.layers, found.bias) == (head.layers, head.bias)
        assert torch.equal(found.weight, head.weight)
        assert torch.equal(found.signals, head.signals)

    @pytest.mark.parametrize(
        ("layers", "weight", "bias", "told"),
        [
            ("1,3", torch.zeros(2, 9), torch.zeros(1), r"\(2, 9\).*size 8"),
            ("1,4", torch.zeros(2, 8), torch.zeros(1), r"layers \[1, 4\]; the model has 4"),
            ("1", torch.zeros(2, 8), torch.zeros(1), r"\(2, 8\).* for the layers \[1\]"),
            ("x", torch.zeros(1, 8), torch.zeros(1), "damaged"),
            ("1", torch.full((1, 8), torch.nan), torch.zeros(1), "not finite"),
        ],
    )
    def test_what_is_not_the_models_is_refused(
        self, tmp_path: Path, layers: str, weight: Tensor, bias: Tensor, told: str
    ) -> None:
        tensors = {"weight": weight, "signals": torch.zeros(8), "bias": bias}
        save_file(tensors, tmp_path / HEAD_FILE, metadata={"layers": layers})
        with pytest.raises(CheckpointError, match=told):
            load_head(tmp_path / HEAD_FILE, layers=4, size=8)

    def test_half_a_file_is_damaged(self, tmp_path: Path) -> None:
        save_head(AnswerabilityHead((1,), torch.zeros(1, 8), torch.zeros(8), 0.0), tmp_path / HEAD_FILE)
        whole = (tmp_path / HEAD_FILE).read_bytes()
        (tmp_path / HEAD_FILE).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="damaged"):
            load_head(tmp_path / HEAD_FILE, layers=4, size=8)


def test_the_command_puts_it_where_it_belongs(
    tmp_path: Path, passages: list[Passage], questions: list[Question]
) -> None:
    model = tiny_model(tmp_path / "model")
    before = load_engine(model, device="cpu")
    assert before.answerability is None
    rows = [{"passage_id": p.id, "text": p.text, "title": p.title} for p in passages]
    asked = [{"id": q.id, "question": q.text, "passage_ids": q.gold, "answers": q.answers} for q in questions]
    files = []
    for name, lines in (("passages", rows), ("questions", asked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        files += [f"--{name}", str(tmp_path / f"{name}.jsonl")]
    arguments = ["train", "answerability", "--model", str(model), "--out", str(tmp_path / "out"), *files]
    arguments += ["--bank-passages", "12", "--asked", "6", "--layer", "1", "--layer", "3"]
    paused = CliRunner().invoke(app, [*arguments, "--minutes", "0"])
    assert paused.exit_code == 3
    assert re.search(r"asking about articles-0 stopped at 0 of 6; run the same command again", paused.output)
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    collected = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*-*.safetensors")}
    assert len(collected) == 3
    again = CliRunner().invoke(app, [*arguments, "--lost", "0.3", "--json"])
    assert again.exit_code == 0, again.output
    assert collected == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*-*.safetensors")}
    assert json.loads(again.stdout)["refusal_odds"] < json.loads(result.stdout)["refusal_odds"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    engine = load_engine(model, device="cpu")
    assert engine.answerability is not None
    assert engine.answerability.layers == (1, 3)
    assert engine.calibration["refusal_odds"] == json.loads(result.stdout)["refusal_odds"]
    assert engine.fingerprint == before.fingerprint, "banks of the model stay usable"
    assert load_engine(model, device="cpu", adapter=False).answerability is None, (
        "it belongs to the model's own"
    )
