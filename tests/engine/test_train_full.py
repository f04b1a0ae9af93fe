"""Full training: examples are what they say, loss falls, routers learn, and a kill costs nothing."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from msa_memory.cli import app
from msa_memory.engine.adapter import LowRankLinear
from msa_memory.engine.convert import convert
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.train.data import Passage, Question
from msa_memory.engine.train.exercises import Exercises
from msa_memory.engine.train.full import FullTraining, Phase, TrainingRows, phases, train_full
from msa_memory.engine.train.losses import IGNORED
from msa_memory.engine.train.packing import Examples
from msa_memory.engine.train.run import Paused, TrainingRun
from msa_memory.errors import ConfigError
from msa_memory.memory import MemoryModel
from msa_memory.testing import tiny_model

TOWNS = "Aldham Barrow Corby Derwent Eastry Farley Goring Harlow Ilford Jarrow Kendal Ludlow".split()


def fresh() -> Engine:
    return load_engine(tiny_model(), device="cpu")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return fresh()


def corpus() -> tuple[list[Passage], list[Question]]:
    passages, questions = [], []
    for n, town in enumerate(TOWNS):
        passages.append(Passage(f"p{n}", f"The fair of {town} opens on day {n + 11} of May.", f"Fair {n}"))
        questions.append(Question(f"q{n}", f"When is the fair of {town}?", (f"p{n}",), (str(n + 11),), "x"))
    for n in range(0, 10, 2):
        gold = (f"p{n}", f"p{n + 1}")
        ask = f"Is the fair of {TOWNS[n]} before that of {TOWNS[n + 1]}?"
        questions.append(Question(f"two{n}", ask, gold, ("yes",), "x"))
    return passages, questions


@pytest.fixture(scope="module")
def exercises(engine: Engine) -> Exercises:
    return Exercises(*corpus(), [], engine.prompt)


@pytest.fixture(scope="module")
def examples(engine: Engine, exercises: Exercises) -> Examples:
    return Examples(exercises, engine.prompt.tail[0])


def plain_checkpoint(folder: Path) -> Path:
    """The tiny model without its routers."""
    folder.mkdir()
    for file in tiny_model().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "msa_config"}))
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".router_" not in k}, folder / "model.safetensors")
    return folder


class TestExamples:
    def test_an_example_is_a_function_of_its_number(self, engine: Engine, examples: Examples) -> None:
        other = Examples(Exercises(*corpus(), [], engine.prompt), engine.prompt.tail[0])
        forwards = [examples.example(n, 120) for n in range(30)]
        assert forwards == [other.example(n, 120) for n in reversed(range(30))][::-1]

    def test_rows_are_laid_out_as_the_engine_reads(self, engine: Engine, examples: Examples) -> None:
        passages, questions = corpus()
        answers = {question.text: question for question in questions}
        decode, hops = engine.tokenizer.decode, 0
        for number in range(60):
            example = examples.example(number, 150)
            row = example.row
            documents = [
                decode([t for t, code in zip(row.ids, row.codes, strict=True) if code == document])
                for document in range(1, max(row.codes) + 1)
            ]
            assert len(documents) == len(example.relevant) == len(set(documents))
            size = sum(code > 0 for code in row.codes)
            assert size <= 150 + 12 * len(documents)
            asking = [token for token, code in zip(row.ids, row.codes, strict=True) if code == 0]
            text = decode(asking)
            question = next(question for ask, question in answers.items() if text.endswith(ask))
            gold = [passages[int(id[1:])].text for id in question.gold]
            found = [d for d, right in zip(documents, example.relevant, strict=True) if right]
            assert all(any(text in document for text in gold) for document in found)
            read = [text for text in gold if text in decode(asking)]
            hops += bool(read)
            assert len(found) + len(read) == len(gold)
            if not read:
                assert asking == engine.prompt.question(question.text)[0]
            start = row.codes.index(0)
            assert row.positions[start] == engine.prompt.question_position
            assert row.ids[start + len(asking) :][: len(engine.prompt.tail)] == engine.prompt.tail
            said = [label for label in example.answer if label != IGNORED]
            assert decode(said[:-1]) == question.answers[0]
            assert said[-1] == engine.prompt.tail[0]
            labelled = [
                (token, label)
                for token, label, code in zip(row.ids, example.documents, row.codes, strict=True)
                if label != IGNORED
            ]
            assert all(token == label for token, label in labelled)
            assert len(labelled) == size - len(documents)
        assert hops > 3

    def test_models_that_generate_numbers_are_refused(self, tmp_path: Path) -> None:
        source = plain_checkpoint(tmp_path / "plain")
        convert(source, tmp_path / "numbered", layout={"documents": "numbered"})
        prompt = load_engine(tmp_path / "numbered", device="cpu").prompt
        with pytest.raises(ConfigError, match="numbered layout"):
            Examples(Exercises(*corpus(), [], prompt), 5)


RECIPE: dict[str, Any] = {
    "phases": (
        Phase(name="routers", steps=2, learning_rate=1e-3, lm=0.1, aux=1.0, memory_tokens=60, documents=True),
        Phase(name="tuning", steps=3, learning_rate=1e-3, memory_tokens=90),
    ),
    "rows_per_step": 3,
    "micro_batch_tokens": 200,
    "rank": 2,
    "alpha": 4.0,
    "recompute": False,
}


class TestTraining:
    @pytest.mark.parametrize("trainables", ["all", "upper", "low-rank"])
    def test_trains_what_it_says_and_nothing_else(
        self, examples: Examples, tmp_path: Path, trainables: str
    ) -> None:
        engine = fresh()
        before = {name: weight.clone() for name, weight in engine.decoder.named_parameters()}
        rows = TrainingRows(examples.example)
        recipe = FullTraining(**{**RECIPE, "trainables": trainables})
        adapters = train_full(engine.decoder, rows, recipe, tmp_path)
        now = dict(engine.decoder.named_parameters())
        changed = {name for name, weight in before.items() if name in now and not now[name].equal(weight)}
        routers = {name for name in before if ".router_" in name}
        assert routers <= changed
        if trainables == "low-rank":
            assert changed == routers
            assert {int(name.split(".")[2]) for name in adapters} == {2, 3}
            assert all(
                isinstance(module, LowRankLinear) and module.lora_b.any() for module in adapters.values()
            )
        else:
            layers = {int(name.split(".")[2]) for name in changed - routers if ".layers." in name}
            assert layers == ({0, 1, 2, 3} if trainables == "all" else {2, 3})
            assert ("model.embed_tokens.weight" in changed) == (trainables == "all")
            assert not adapters

    def test_loss_falls_and_router_recall_rises(self, examples: Examples, tmp_path: Path) -> None:
        engine = fresh()
        with torch.no_grad():  # routers that know nothing yet
            for layer in (1, 3):
                projection = engine.decoder.attention(layer).router_q_proj
                assert projection is not None
                projection[0].weight.normal_(generator=torch.Generator().manual_seed(layer))
        kept = [examples.example(n, 120) for n in range(8)]
        phase = Phase(name="joint", steps=50, learning_rate=2e-3, aux=1.0, memory_tokens=120)
        recipe = FullTraining(phases=(phase,), rows_per_step=4, micro_batch_tokens=900, recompute=False)
        rows = TrainingRows(lambda n, tokens: kept[n % 8], held_out=kept)
        train_full(engine.decoder, rows, recipe, tmp_path, evaluate_every=10)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 51))
        shown = [line["held_out"] for line in lines if "held_out" in line]
        assert len(shown) == 5
        assert shown[-1]["lm"] < 0.3 * lines[0]["lm"]
        assert shown[-1]["recall@1"] > max(0.8, lines[0]["recall@1"])

    def test_recomputing_and_micro_batches_change_nothing(self, examples: Examples, tmp_path: Path) -> None:
        moments = []
        for number, (tokens, recompute) in enumerate([(10_000, False), (1, False), (10_000, True)]):
            engine = fresh()
            changes = {"micro_batch_tokens": tokens, "recompute": recompute, "rows_per_step": 2}
            phase = Phase(name="one", steps=1, learning_rate=1e-3, memory_tokens=60)
            recipe = FullTraining(**{**RECIPE, **changes, "phases": (phase,)})
            # the second example comes twice, so that the means over rows and over tokens agree
            rows = TrainingRows(lambda n, size: examples.example(1, size))
            train_full(engine.decoder, rows, recipe, tmp_path / str(number))
            state = load_file(tmp_path / str(number) / "state.safetensors")
            moments.append({name: tensor for name, tensor in state.items() if name.endswith(".exp_avg")})
        for other in moments[1:]:
            for name, moment in moments[0].items():
                scale = float(moment.abs().max()) + 1e-12
                assert torch.allclose(moment, other[name], atol=1e-4 * scale), name

    def test_phases_follow_one_another(self) -> None:
        recipe = FullTraining(phases=phases(2, 3, [(8192, 4)]))
        names = [recipe.at(step)[0].name for step in range(1, recipe.steps + 1)]
        assert names == ["routers"] * 2 + ["joint"] * 3 + ["tuning over 8192"] * 4
        assert [recipe.at(step)[1] for step in range(1, 10)] == [1, 2, 1, 2, 3, 1, 2, 3, 4]
        first, second, third = recipe.phases
        assert (first.lm, first.aux, first.learning_rate) == (0.1, 1.0, 1e-4)
        assert (second.lm, second.aux, second.learning_rate) == (1.0, 0.1, 6e-6)
        assert third.memory_tokens == 8192

    @pytest.mark.parametrize("wrong", [{"trainables": "some"}, {"rank": 0}, {"phases": ()}])
    def test_senseless_recipes_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            FullTraining(**wrong)

    def test_small_updates_of_bfloat16_weights_add_up(self, tmp_path: Path) -> None:
        """A twentieth of the last bit at a time: without a float32 master the weight would never move."""
        weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        run = TrainingRun({"w": weight}, tmp_path, "x")
        for _ in range(40):
            weight.grad = torch.ones(3, dtype=torch.bfloat16)
            run.collect()
            run.step(2e-4)
        assert weight.detach().float().tolist() == pytest.approx([1 - 40 * 2e-4] * 3, abs=0.004)
        assert run.masters["w"].tolist() == pytest.approx([1 - 40 * 2e-4] * 3, abs=1e-4)

    def test_a_pause_loses_nothing(self, examples: Examples, tmp_path: Path) -> None:
        recipe, rows = FullTraining(**RECIPE), TrainingRows(examples.example)
        for step in range(1, 5):
            with pytest.raises(Paused, match=f"step {step} of 5"):
                train_full(fresh().decoder, rows, recipe, tmp_path / "parts", deadline=0.0)
        train_full(fresh().decoder, rows, recipe, tmp_path / "parts", deadline=0.0)
        train_full(fresh().decoder, rows, recipe, tmp_path / "whole")
        ours, theirs = (load_file(tmp_path / name / "state.safetensors") for name in ("parts", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


TRAINER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from msa_memory.engine.engine import load_engine
from msa_memory.engine.train.data import Passage, Question
from msa_memory.engine.train.exercises import Exercises
from msa_memory.engine.train.full import FullTraining, Phase, TrainingRows, train_full
from msa_memory.engine.train.mixture import Mixture, MixtureOptions
from msa_memory.engine.train.packing import Examples
from msa_memory.testing import tiny_model
engine = load_engine(tiny_model(), device="cpu", dtype=sys.argv[3])
passages = [Passage(f"p{n}", f"The fair of town {n} opens on day {n + 11} of May.", None) for n in range(9)]
questions = [Question(f"q{n}", f"When is town {n}?", (f"p{n}",), (str(n + 11),), "x") for n in range(9)]
exercises = Exercises(passages, questions, [], engine.prompt)
end = engine.prompt.tail[0]
def report(step, figures):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
phases = (
    Phase(name="routers", steps=2, learning_rate=1e-3, lm=0.1, aux=1.0, memory_tokens=60, documents=True),
    Phase(name="tuning", steps=3, learning_rate=1e-3, memory_tokens=90, reading=0.5),
)
recipe = FullTraining(phases=phases, trainables=sys.argv[4], rows_per_step=3, micro_batch_tokens=200, rank=2)
rows = TrainingRows(Examples(exercises, end).example, Mixture(exercises, (), end, MixtureOptions()).row)
train_full(engine.decoder, rows, recipe, Path(sys.argv[1]), save_every_s=0.0, report=report)
"""


@pytest.mark.parametrize(("dtype", "trainables"), [("float32", "all"), ("bfloat16", "low-rank")])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, dtype: str, trainables: str) -> None:
    def run(folder: Path, die_at: int) -> int:
        command = [sys.executable, "-P", "-c", TRAINER, str(folder), str(die_at), dtype, trainables]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert run(tmp_path / "killed", 3) == -signal.SIGKILL
    assert run(tmp_path / "killed", 0) == 0
    assert run(tmp_path / "whole", 0) == 0
    ours, theirs = (load_file(tmp_path / name / "state.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def write_files(folder: Path, count: int = 60) -> list[str]:
    """Passages of many articles, so that some are held out; the options that name the files."""
    passages, questions = [], []
    for n in range(count):
        town = f"{TOWNS[n % 12]}{n}"
        text = f"The fair of {town} opens on day {n + 11} of May. The Mayor of {town} is Mr Smith{n}."
        passages.append({"passage_id": f"p{n}", "text": text, "title": f"Fair {n}"})
        ask = {"question": f"When is the fair of {town}?", "passage_ids": [f"p{n}"], "answers": [str(n + 11)]}
        questions.append({"id": f"q{n}", **ask})
    for name, rows in (("passages", passages), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--passages", str(folder / "passages.jsonl"), "--questions", str(folder / "questions.jsonl")]


@pytest.mark.parametrize("trainables", ["all", "low-rank"])
def test_the_command_trains_a_plain_checkpoint_into_a_memory_model(tmp_path: Path, trainables: str) -> None:
    plain = plain_checkpoint(tmp_path / "plain")
    out = tmp_path / "out"
    arguments = ["train", "full", *write_files(tmp_path), "--model", str(plain), "--out", str(out)]
    arguments += ["--trainables", trainables, "--router-steps", "1", "--joint-steps", "1"]
    arguments += ["--tuning-steps", "90:1", "--memory-tokens", "60", "--rows-per-step", "2", "--rank", "2"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--evaluate-every", "2"])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["routers", "joint", "tuning over 90"]
    assert (out / "model" / "adapter.safetensors").exists() == (trainables == "low-rank")
    with MemoryModel.open(model=str(out / "model"), device="cpu") as memory:
        note = memory.add("The fair of Selby opens on day 3.")
        assert memory.search("When does the fair of Selby open?")[0].id == note.id
