"""Questions from documents alone, calibration, the fidelity curve, peft folders and the default's recipe."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from msa_memory.cli import app
from msa_memory.engine.adapter import Adapter, load_adapter
from msa_memory.engine.context import Feed, Sequence, advance
from msa_memory.engine.engine import load_engine
from msa_memory.engine.train.adapter import AdapterTraining, save_adapter
from msa_memory.engine.train.answerability import AnswerabilityTraining
from msa_memory.engine.train.calibrate import CalibrationOptions, calibrate, choose_threshold
from msa_memory.engine.train.data import Passage, read_passages, read_questions
from msa_memory.engine.train.default import DefaultModel, Recipe, train_default_model
from msa_memory.engine.train.exercises import held_out, places
from msa_memory.engine.train.mixture import MixtureOptions
from msa_memory.engine.train.peft_files import export_peft, import_peft
from msa_memory.engine.train.questions import QuestionMaking, _usable, make_questions
from msa_memory.engine.train.router import RouterTraining
from msa_memory.engine.train.run import Paused
from msa_memory.errors import CheckpointError, ConfigError
from msa_memory.memory import MemoryModel
from msa_memory.testing import tiny_model

TOWNS = "Aldham Barrow Corby Derwent Eastry Farley Goring Harlow Ilford Jarrow Kendal Ludlow".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data files of sixty small articles, named as those of the default model."""
    folder = tmp_path_factory.mktemp("data")
    passages, questions, tricks = [], [], []
    for n in range(60):
        town = f"{TOWNS[n % 12]}{n}"
        text = f"The fair of {town} opens on day {n + 11} of May. The Mayor of {town} is Mr Smith{n}."
        passages.append({"passage_id": f"p{n}", "text": text, "title": f"Fair {n}"})
        ask = {"question": f"When is the fair of {town}?", "passage_ids": [f"p{n}"], "answers": [str(n + 11)]}
        questions.append({"id": f"q{n}", **ask})
        tricks.append({"question": f"Who sings in {town}?", "distractor_passage_id": f"p{n}"})
    files = {"train_passages": passages, "train_qa": questions, "unanswerable_qa": tricks}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert 2 <= sum(held_out(passage) for passage in read_passages([folder / "train_passages.jsonl"])) <= 10
    return folder


def passages_of(data: Path) -> list[Path]:
    return [data / "train_passages.jsonl"]


class TestQuestions:
    def make(self, data: Path, out: Path, **options: Any) -> int:
        engine = load_engine(tiny_model(), device="cpu")
        return make_questions(engine, passages_of(data), out, QuestionMaking(max_new_tokens=3), **options)

    def test_every_answer_stands_in_its_passage_and_not_in_the_question(
        self, data: Path, tmp_path: Path
    ) -> None:
        count = self.make(data, tmp_path / "q.jsonl")
        texts = {passage.id: passage.text for passage in read_passages(passages_of(data))}
        questions = read_questions([tmp_path / "q.jsonl"])
        assert len(questions) == count == 120
        for question in questions:
            [gold], [answer] = question.gold, question.answers
            assert places(texts[gold], answer)
            assert not places(question.text, answer)
            assert question.text.endswith("?")
        assert len({question.id for question in questions}) == 120

    def test_goes_on_where_it_stopped_and_is_made_once(self, data: Path, tmp_path: Path) -> None:
        self.make(data, tmp_path / "whole.jsonl")
        told: list[int] = []

        def stop(done: int, total: int) -> None:
            told.append(done)
            if done == 24:
                raise KeyboardInterrupt

        out = tmp_path / "parts.jsonl"
        with pytest.raises(KeyboardInterrupt):
            self.make(data, out, report=stop)
        partial = out.with_suffix(".partial")
        partial.write_text(partial.read_text() + '[{"question": "cut of')  # a write that a kill cut short
        with pytest.raises(Paused, match="24 of 60"):
            self.make(data, out, deadline=0.0)
        self.make(data, out, report=lambda done, total: told.append(done))
        assert told == [8, 16, 24, 32, 40, 48, 56, 60]
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        self.make(data, out, report=lambda done, total: told.append(done))
        assert len(told) == 8
        out.write_text("")
        self.make(data, out)
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def test_written_questions_are_judged(self) -> None:
        passage = Passage("p", "The fair of Selby opens in May, when the Mayor rings the bell.", "Fairs")
        for written, usable in (
            ("When does the fair of Selby open?", "When does the fair of Selby open?"),
            ('Question:\n"When does the fair of Selby open?" It is', "When does the fair of Selby open?"),
            ("Does the fair of Selby open in May?", None),  # gives the answer away
            ("What is the capital of France?", None),  # another passage's
            ("The fair of Selby opens then", None),  # no question
            ("?", None),
            ("Selby fair " * 30 + "?", None),
        ):
            assert _usable(written, passage, "May") == usable

    def test_nothing_to_ask_for_is_an_error(self, tmp_path: Path) -> None:
        file = tmp_path / "p.jsonl"
        file.write_text(json.dumps({"passage_id": "p", "text": "It is so."}) + "\n")
        engine = load_engine(tiny_model(), device="cpu")
        with pytest.raises(ConfigError, match="none of the 1 passages"):
            make_questions(engine, [file], tmp_path / "q.jsonl", QuestionMaking())

    def test_routers_train_from_documents_alone(self, data: Path, tmp_path: Path) -> None:
        arguments = [
            "train",
            "router",
            "--model",
            str(tiny_model()),
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
        ]
        arguments += ["--passages", str(data / "train_passages.jsonl"), "--steps", "2", "--batch-size", "4"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert (tmp_path / "questions.jsonl").is_file()
        with MemoryModel.open(model=str(tmp_path / "model"), device="cpu") as memory:
            memory.add("The fair of Selby opens on day 3.")
            assert memory.search("fair")


class TestCalibration:
    @given(st.lists(st.floats(-1, 1), min_size=1, max_size=50), st.floats(0, 1))
    def test_a_threshold_loses_no_more_than_its_share(self, scores: list[float], lost: float) -> None:
        threshold = choose_threshold(scores, lost)
        assert sum(score < threshold for score in scores) <= lost * len(scores)
        assert threshold in scores

    def test_chooses_on_held_out_articles_only(self, data: Path, encoded: list[str]) -> None:
        engine = load_engine(tiny_model(), device="cpu")
        options = CalibrationOptions(read=2, distractors=7)
        found = calibrate(engine, passages_of(data), [data / "train_qa.jsonl"], options)
        kept = [passage for passage in read_passages(passages_of(data)) if held_out(passage)]
        assert {f"{passage.title}\n{passage.text}" for passage in kept} <= set(encoded)
        assert len(encoded) == len(kept) + 7 == found["curves"]["passages"]
        assert found["curves"]["questions"] == len(kept)
        chosen, curves = found["calibration"], found["curves"]
        by_weight = curves["mrr@10 by lexical_weight"]
        assert by_weight[chosen["lexical_weight"]] == pytest.approx(max(by_weight.values()), abs=1e-4)
        losses = curves["answer loss by evidence_share and evidence_documents"]
        best = f"{chosen['evidence_share']:g} {chosen['evidence_documents']}"
        assert losses[best] == min(losses.values())
        assert curves["refusals"]["present"] <= options.lost_to_refusal
        assert -1 <= chosen["min_score"] <= 1

    def test_the_least_score_is_on_the_engines_scale(self, data: Path) -> None:
        engine = load_engine(tiny_model(), device="cpu")
        options = CalibrationOptions(read=1, distractors=0, lost_to_score=0.0)
        found = calibrate(engine, passages_of(data), [data / "train_qa.jsonl"], options)["calibration"]
        kept = [passage for passage in read_passages(passages_of(data)) if held_out(passage)]
        states = [engine.encode(n, f"{p.title}\n", p.text) for n, p in enumerate(kept)]
        bank = engine.new_bank(states.__getitem__)
        for number, state in enumerate(states):
            bank.add(number, state.router_keys, state.terms)
        asked = {question.gold[0]: question.text for question in read_questions([data / "train_qa.jsonl"])}
        tops = [
            engine.route(asked[p.id], bank.view(), lexical_weight=found["lexical_weight"]).relevance().max()
            for p in kept
        ]
        assert found["min_score"] == pytest.approx(float(min(tops)), abs=1e-3)

    def test_the_command_writes_it_where_it_belongs(self, data: Path, tmp_path: Path) -> None:
        model = tiny_model(tmp_path / "model")
        before = load_engine(model, device="cpu").fingerprint
        files = ["--passages", str(passages_of(data)[0]), "--questions", str(data / "train_qa.jsonl")]
        arguments = ["train", "calibrate", "--model", str(model), "--out", str(tmp_path / "out"), *files]
        result = CliRunner().invoke(app, [*arguments, "--read", "2", "--distractors", "3", "--json"])
        assert result.exit_code == 0, result.output
        engine = load_engine(model, device="cpu")
        assert engine.calibration == json.loads(result.stdout)["calibration"]
        assert engine.fingerprint == before  # banks of the model stay usable

    def test_files_without_held_out_questions_are_refused(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "q.jsonl").write_text("")
        engine = load_engine(tiny_model(), device="cpu")
        with pytest.raises(ConfigError, match="held-out"):
            calibrate(engine, passages_of(data), [tmp_path / "q.jsonl"], CalibrationOptions())


def test_the_fidelity_curve(data: Path, tmp_path: Path) -> None:
    arguments = ["train", "fidelity", "--model", str(tiny_model()), "--out", str(tmp_path), "--device", "cpu"]
    arguments += ["--passages", str(passages_of(data)[0]), "--questions", str(data / "train_qa.jsonl")]
    arguments += ["--chunks", "4,32", "--steps", "2", "--probes", "3", "--rows-per-step", "2"]
    arguments += ["--first-layer", "2", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "fidelity.json").read_text())
    assert list(found["chunks"]) == ["4", "32"]
    small, large = found["chunks"].values()
    for each in (small, large):
        assert set(each["before"]) == set(each["after"]) == {"closed", "memory", "text", "both"}
        assert each["after"] != each["before"]
    for way in ("closed", "text"):  # nothing pooled in these
        assert small["before"][way] == pytest.approx(large["before"][way], abs=1e-5)
    assert small["before"]["memory"] != pytest.approx(large["before"]["memory"], abs=1e-6)
    assert small["kv_bytes_per_token"] == 8 * large["kv_bytes_per_token"]


def some_adapter(path: Path, *, even: bool = True) -> Adapter:
    """Layers 1 and 2, two targets, as our training writes it; layer 1's attention alone if not ``even``."""
    random = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (128, 128), "mlp.down_proj": (128, 160)}
    pairs = {
        f"model.layers.{layer}.{name}": (
            torch.randn(2, shape[1], generator=random).bfloat16(),
            torch.randn(shape[0], 2, generator=random).bfloat16() * 0.1,
        )
        for layer in (1, 2)
        for name, shape in shapes.items()
        if even or (layer, name) != (1, "mlp.down_proj")
    }
    adapter = Adapter(rank=2, alpha=4.0, pairs=pairs)
    save_adapter(adapter, path)
    return adapter


class TestPeft:
    def test_there_and_back(self, tmp_path: Path) -> None:
        adapter = some_adapter(tmp_path / "a.safetensors")
        export_peft(tmp_path / "a.safetensors", tmp_path / "peft", base_model="base")
        import_peft(tmp_path / "peft", tmp_path / "b.safetensors")
        back = load_adapter(tmp_path / "b.safetensors")
        assert (back.rank, back.alpha, back.pairs.keys()) == (2, 4.0, adapter.pairs.keys())
        for module, (a, b) in adapter.pairs.items():
            assert torch.equal(back.pairs[module][0], a)
            assert torch.equal(back.pairs[module][1], b)

    @pytest.mark.parametrize("even", [True, False])
    def test_peft_computes_what_the_engine_merges(self, tmp_path: Path, even: bool) -> None:
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        some_adapter(tmp_path / "a.safetensors", even=even)
        export_peft(tmp_path / "a.safetensors", tmp_path / "peft", base_model="base")
        config = json.loads((tiny_model() / "config.json").read_text())
        config = {name: value for name, value in config.items() if name not in ("msa_config", "torch_dtype")}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
        kept = {k: v for k, v in load_file(tiny_model() / "model.safetensors").items() if ".router_" not in k}
        assert not model.load_state_dict(kept, strict=False).unexpected_keys
        ids = [5, 9, 17, 200, 31]
        plain = model(torch.tensor([ids])).logits[0]
        tuned = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
        expected = tuned(torch.tensor([ids])).logits[0].detach()
        engine = load_engine(tiny_model(), device="cpu", adapter=tmp_path / "a.safetensors")
        losses = []
        row = Sequence.start(engine.decoder, engine.head.first(0), position=0, view=None, top_k=1)
        for token in ids:
            losses.append(advance(engine.decoder, [Feed(row, [token])])[0])
        found = torch.stack(losses)
        assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))
        assert not torch.allclose(plain, expected, atol=2e-3 * float(expected.abs().max()))

    def test_what_peft_itself_writes_can_be_imported(self, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            hidden_size=128, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, vocab_size=32
        )
        lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).save_pretrained(tmp_path / "peft")
        import_peft(tmp_path / "peft", tmp_path / "a.safetensors")
        found = load_adapter(tmp_path / "a.safetensors")
        assert (found.rank, found.alpha, len(found.pairs)) == (3, 6.0, 8)

    @pytest.mark.parametrize(
        "change", [{"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"rank_pattern": {"q": 4}}]
    )
    def test_what_an_adapter_file_cannot_say_is_refused(self, tmp_path: Path, change: dict[str, Any]) -> None:
        some_adapter(tmp_path / "a.safetensors")
        export_peft(tmp_path / "a.safetensors", tmp_path / "peft", base_model="base")
        config = tmp_path / "peft" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
        with pytest.raises(CheckpointError, match="only plain LoRA"):
            import_peft(tmp_path / "peft", tmp_path / "b.safetensors")
        assert not (tmp_path / "b.safetensors").exists()


SMALL = Recipe(
    read=AdapterTraining(steps=3, rows_per_step=2, rank=2, first_layer=2),
    recall=AdapterTraining(steps=2, rows_per_step=2, rank=2, first_layer=2, seed=1),
    recall_rows=MixtureOptions(alone_rows=0.5, seed=1),
    route=AdapterTraining(
        steps=2, rows_per_step=2, rank=2, first_layer=2, attention_from=1, routed_questions=2, seed=2
    ),
    route_rows=MixtureOptions(recall_rows=0.5, seed=2),
    chats=0,
    route_chats=0,
    scouts=RouterTraining(steps=2, batch_size=4),
    routers=RouterTraining(steps=3, batch_size=4),
    calibration=CalibrationOptions(read=2, distractors=3),
    answerability=AnswerabilityTraining(parts=1, passages=12, questions=6, layers=(1, 3)),
)
RESULT = ("adapter.safetensors", "answerability.safetensors", "router.json", "router.safetensors")


class TestDefault:
    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        torch.set_num_threads(1)
        work = tmp_path_factory.mktemp("whole")
        return train_default_model(DefaultModel(data=data, work=work, recipe=SMALL, model=str(tiny_model())))

    def test_its_files_make_a_model(self, whole: Path, data: Path) -> None:
        assert tuple(sorted(path.name for path in whole.iterdir())) == RESULT
        calibration = json.loads((whole / "router.json").read_text())["calibration"]
        assert {
            "lexical_weight",
            "min_score",
            "evidence_share",
            "refusal_logprob",
            "refusal_odds",
        } <= calibration.keys()
        engine = load_engine(whole.parent / "calibrated" / "model", device="cpu")
        routers = load_file(whole / "router.safetensors")
        trained = routers["model.layers.1.self_attn.router_k_proj.0.weight"].float()
        projection = engine.decoder.attention(1).router_k_proj
        assert projection is not None
        assert torch.equal(projection[0].weight, trained)
        plain = load_engine(tiny_model(), device="cpu").decoder.attention(2).q_proj.weight
        assert not torch.equal(engine.decoder.attention(2).q_proj.weight, plain)

    def test_in_many_short_calls_it_is_the_same(self, whole: Path, data: Path, tmp_path: Path) -> None:
        def job(deadline: float | None) -> DefaultModel:
            return DefaultModel(
                data=data, work=tmp_path, recipe=SMALL, model=str(tiny_model()), deadline=deadline
            )

        stopped = []
        for _ in range(9):  # each call with a deadline in the past does one step, where steps are resumable
            try:
                train_default_model(job(0.0))
            except Paused as pause:
                stopped.append(re.sub(r"\d+", "n", str(pause)))
        assert stopped[:2] == ["tuning stopped after step n of n"] * 2
        assert "encoding stopped at n of n documents" in stopped
        folder = train_default_model(job(None))
        assert (folder / "router.json").read_text() == (whole / "router.json").read_text()
        for name in RESULT[:2] + RESULT[3:]:
            ours, theirs = load_file(folder / name), load_file(whole / name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    def test_what_is_done_is_not_done_again(self, whole: Path, data: Path) -> None:
        told: list[str] = []
        work = whole.parent
        job = DefaultModel(data=data, work=work, recipe=SMALL, model=str(tiny_model()), deadline=0.0)
        train_default_model(job, lambda label, done, total, note: told.append(label))
        assert told == []
        other = replace(SMALL, calibration=CalibrationOptions(read=1, distractors=3))
        with pytest.raises(Paused, match="encoding passages"):
            train_default_model(replace(job, recipe=other))

    def test_missing_data_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="train_passages"):
            train_default_model(DefaultModel(data=tmp_path, work=tmp_path / "work"))


def test_a_paused_command_says_so_and_exits_with_3(data: Path, tmp_path: Path) -> None:
    files = ["--passages", str(passages_of(data)[0]), "--questions", str(data / "train_qa.jsonl")]
    arguments = ["train", "adapter", "--model", str(tiny_model()), "--out", str(tmp_path), *files]
    arguments += ["--steps", "2", "--rows-per-step", "1", "--rank", "2", "--first-layer", "3", "--chats", "0"]
    result = CliRunner().invoke(app, [*arguments, "--minutes", "0", "--device", "cpu"])
    assert result.exit_code == 3
    assert "step 1 of 2; run the same command again" in result.stderr
    peft_out = tmp_path / "peft"
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--peft-out", str(peft_out)])
    assert result.exit_code == 0, result.output
    assert (peft_out / "adapter_config.json").is_file()
