"""What routers learn on is what the engine computes; a cache is never stale; training finds documents."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.testing import CliRunner

from msa_memory.cli import app
from msa_memory.engine import ops
from msa_memory.engine.adapter import adapter_of, attach
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.lexical import question_terms
from msa_memory.engine.train import hidden as hidden_module
from msa_memory.engine.train import router as router_module
from msa_memory.engine.train.adapter import save_adapter
from msa_memory.engine.train.hidden import HiddenCache, weights_digest
from msa_memory.engine.train.router import (
    RouterHeads,
    RouterTask,
    RouterTraining,
    recall,
    score_documents,
    train_router,
)
from msa_memory.engine.train.routing_data import RoutingReader, header
from msa_memory.engine.train.teacher import Teacher, cached_embeddings
from msa_memory.engine.train.words import word_scores
from msa_memory.errors import CheckpointError, ConfigError
from msa_memory.testing import tiny_model

WORDS = (
    "harbour violin lantern meadow copper thistle anchor barrel cellar dragon ember falcon garden hammer "
    "island jacket kettle ladder marble needle orchard pepper quarry ribbon saddle tunnel umbrella valley "
    "window yarrow zephyr basket candle dagger engine feather goblet hollow insect jungle"
).split()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(tiny_model(), device="cpu")


def corpus(count: int = 20) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Passages about a number and two words each, and questions that name one of the words."""
    passages, questions = [], []
    for n in range(count):
        first, second = WORDS[2 * n % 40], WORDS[(2 * n + 1) % 40]
        text = (
            f"In the year {1900 + n} the {first} was moved to a house of {n + 3} rooms. The {second} stayed."
        )
        passages.append({"passage_id": f"p{n}", "text": text, "title": f"Story {n}"})
        for word in (first, second):
            questions.append({"id": f"{n}{word}", "question": f"Where is the {word}?", "passage_id": f"p{n}"})
    return passages, questions


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    paths = (folder / "passages.jsonl", folder / "questions.jsonl")
    for path, rows in zip(paths, corpus(), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def adapter_file(path: Path) -> Path:
    """An adapter that changes every layer of the tiny model."""
    decoder = load_engine(tiny_model(), device="cpu").decoder
    modules = attach(decoder, dict.fromkeys(range(4), ("q_proj", "down_proj")), rank=2, alpha=4.0, seed=1)
    random = torch.Generator().manual_seed(2)
    for module in modules.values():
        module.lora_b.data = torch.randn(module.lora_b.shape, generator=random) * 0.3
    save_adapter(adapter_of(modules, 2, 4.0), path)
    return path


class TestWhatRoutersSee:
    @pytest.mark.parametrize("adapted", [False, True])
    def test_documents_and_questions_are_the_engines(
        self, files: tuple[Path, Path], tmp_path: Path, adapted: bool
    ) -> None:
        adapter = adapter_file(tmp_path / "a.safetensors") if adapted else False
        engine = load_engine(tiny_model(), device="cpu", adapter=adapter)
        reader = RoutingReader(engine, engine.msa, tmp_path)
        data = reader.read([files[0]], [files[1]])
        bank = engine.new_bank(lambda number: states[number])
        states = {
            n: engine.encode(n, header(passage, False), passage.text)
            for n, passage in enumerate(data.passages)
        }
        for n, state in states.items():
            bank.add(n, state.router_keys)
        for slot, layer in enumerate(engine.msa.router_layers):
            attention = engine.decoder.attention(layer)
            keys = ops.normalize_heads(attention.router_key(data.documents.rows[slot].float()))
            expected = torch.cat([states[n].router_keys[slot] for n in range(len(states))])
            assert torch.allclose(keys, expected, atol=0.01)  # the cache is bfloat16
            for place in (0, 7, 39):
                routing = engine.route(data.asked[place].text, bank.view())
                rows = data.questions.rows[slot][data.questions.flat(torch.tensor([place]))].float()
                query = ops.normalize_heads(attention.router_query(rows))
                assert query.shape == routing.queries[layer].shape
                assert torch.allclose(query, routing.queries[layer], atol=0.01)

    def test_ids_are_the_engines(self, engine: Engine, files: tuple[Path, Path], tmp_path: Path) -> None:
        reader = RoutingReader(engine, engine.msa, tmp_path)
        data = reader.read([files[0]], [files[1]])
        for passage in data.passages:
            ids = reader.document_ids(passage, always_titled=True)
            assert ids == engine.prompt.document(1, f"{passage.title}\n", passage.text)
        for question in data.asked:
            assert reader.question_ids(question) == engine.prompt.question(question.text)[0]
        titled = [bool(header(passage, False)) for passage in data.passages]
        assert True in titled
        assert False in titled


class TestCache:
    def encode(self, engine: Engine, folder: Path, chunk: int = 8, layers: tuple[int, ...] = (1, 3)) -> int:
        """Shards computed anew for a few documents."""
        made: list[str] = []
        cache = HiddenCache(engine.decoder, layers, folder)
        before = set(folder.glob("*.safetensors"))
        cache.documents([[5, 6, 7 + n] * (n + 1) for n in range(9)], chunk)
        made = [path.name for path in set(folder.glob("*.safetensors")) - before]
        return len(made)

    def test_every_setting_makes_other_shards(
        self, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hidden_module, "SHARD_ITEMS", 4)
        folder = tmp_path / "cache"
        assert self.encode(engine, folder) == 3
        assert self.encode(engine, folder) == 0
        assert self.encode(engine, folder, chunk=4) == 3
        assert self.encode(engine, folder, layers=(0, 3)) == 3
        adapted = load_engine(tiny_model(), device="cpu", adapter=adapter_file(tmp_path / "a.safetensors"))
        assert self.encode(adapted, folder) == 3
        half = load_engine(tiny_model(), device="cpu", dtype="bfloat16")
        assert self.encode(half, folder) == 3
        assert self.encode(engine, folder) == 0

    def test_the_routers_own_weights_do_not_count(self, engine: Engine) -> None:
        other = load_engine(tiny_model(), device="cpu")
        projection = other.decoder.attention(1).router_q_proj
        assert projection is not None
        with torch.no_grad():
            projection[0].weight += 1
        assert weights_digest(other.decoder) == weights_digest(engine.decoder)

    def test_a_truncated_shard_is_made_again(self, engine: Engine, tmp_path: Path) -> None:
        assert self.encode(engine, tmp_path) == 1
        [shard] = tmp_path.glob("*.safetensors")
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-7])
        self.encode(engine, tmp_path)
        assert shard.read_bytes() == whole

    def test_packing_changes_nothing(
        self, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        items = [[3 + n, 8, 9] * (1 + n % 5) for n in range(12)]
        rows = []
        for tokens in (1, 40, 10_000):
            monkeypatch.setattr(hidden_module, "BATCH_TOKENS", tokens)
            cache = HiddenCache(engine.decoder, (1, 3), tmp_path / str(tokens))
            rows.append(
                (cache.documents(items, 4).rows.float(), cache.questions(items, engine.head, 9).rows.float())
            )
        for documents, questions in rows[1:]:
            assert torch.allclose(documents, rows[0][0], rtol=0.02, atol=0.02)
            assert torch.allclose(questions, rows[0][1], rtol=0.02, atol=0.02)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from msa_memory.engine.engine import load_engine
from msa_memory.engine.train import hidden
from msa_memory.testing import tiny_model
hidden.SHARD_ITEMS = 5
def report(what, done, total):
    print(what, done, flush=True)
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
cache = hidden.HiddenCache(load_engine(tiny_model(), device="cpu").decoder, (1, 3), Path(sys.argv[1]), report)
cache.documents([[5, 6, 7 + n] for n in range(20)], 2)
"""


def test_encoding_goes_on_after_a_kill(tmp_path: Path) -> None:
    def run(folder: Path, die_at: int) -> int:
        command = [sys.executable, "-P", "-c", KILLED, str(folder), str(die_at)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert run(tmp_path / "killed", 15) == -signal.SIGKILL
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.safetensors")}
    assert len(first) == 3
    assert run(tmp_path / "killed", 0) == 0
    assert run(tmp_path / "whole", 0) == 0
    killed, whole = sorted(os.listdir(tmp_path / "killed")), sorted(os.listdir(tmp_path / "whole"))
    assert killed == whole
    for name in whole:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == at for name, at in first.items())


RECIPE: dict[str, Any] = {
    "steps": 30,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "hard_negatives": 1,
    "mine_from_step": 8,
    "mine_every": 7,
    "dropout": 0.05,
}


@pytest.fixture(scope="module")
def task(engine: Engine, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RouterTask:
    data = RoutingReader(engine, engine.msa, tmp_path_factory.mktemp("hidden")).read([files[0]], [files[1]])
    texts = [header(passage, False) + passage.text for passage in data.passages]
    words = word_scores(texts, [question.text for question in data.asked])
    return RouterTask(data.questions, data.documents, data.gold, words)


def heads_of(engine: Engine, seed: int = 0, **options: Any) -> RouterHeads:
    torch.manual_seed(seed)
    return RouterHeads.like(engine.decoder.config, 2, **options)


class TestScores:
    def test_all_documents_are_scored_as_one_by_one(self, engine: Engine, task: RouterTask) -> None:
        heads = heads_of(engine)
        items = [3, 0, 39, 17]
        scores = score_documents(heads, task.questions, task.documents, items, batch_tokens=9)
        for row, item in enumerate(items):
            for document in range(0, 20, 3):
                per_layer = []
                for layer in range(2):
                    asked = task.questions.rows[layer][task.questions.flat(torch.tensor([item]))]
                    read = task.documents.rows[layer][task.documents.flat(torch.tensor([document]))]
                    dots = heads.queries(layer, asked) @ heads.keys(layer, read).T
                    per_layer.append(dots.max())
                assert abs(float(torch.stack(per_layer).mean() - scores[row, document])) < 0.01

    @given(
        st.lists(st.integers(1, 5), min_size=1, max_size=5),
        st.lists(st.integers(1, 5), min_size=1, max_size=6),
        st.integers(0, 99),
    )
    def test_winners_are_the_largest_pairs_on_any_device(
        self, tokens: list[int], chunks: list[int], seed: int
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        dots = torch.randn(sum(tokens), sum(chunks), generator=random)
        lengths = torch.tensor(tokens), torch.tensor(chunks)
        for winners in (router_module._winners, router_module._winners_padded):
            token, chunk = winners(dots, *lengths)
            for q, rows in enumerate(dots.split(tokens)):
                for d, block in enumerate(rows.split(chunks, dim=1)):
                    assert dots[token[q, d], chunk[q, d]] == block.max()

    @given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4))
    def test_the_loss_is_equation_5(self, labels: list[list[bool]]) -> None:
        positive = torch.tensor([[True, *row[1:-1], False] for row in labels])
        scores = torch.randn(positive.shape, generator=torch.Generator().manual_seed(len(labels)))
        losses = []
        for row, right in zip(scores.double() / 0.1, positive, strict=True):
            against = sum(math.exp(s) for s, good in zip(row, right, strict=True) if not good)
            losses += [
                -math.log(math.exp(s) / (math.exp(s) + against))
                for s, good in zip(row, right, strict=True)
                if good
            ]
        found = router_module.contrastive_loss(scores, positive, 0.1)
        assert float(found) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


class TestTraining:
    def test_loss_falls_and_recall_rises(self, engine: Engine, task: RouterTask, tmp_path: Path) -> None:
        plain = replace(task, words=None)
        heads = heads_of(engine)
        everything = range(len(task.gold))
        before = recall(score_documents(heads, task.questions, task.documents, everything), task.gold)
        recipe = RouterTraining(**{**RECIPE, "steps": 60})
        train_router(heads, plain, recipe, tmp_path)
        after = recall(score_documents(heads, task.questions, task.documents, everything), task.gold)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 61))
        assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
        assert after["recall@1"] > before["recall@1"]
        assert after["recall@1"] > 0.9

    def test_the_weight_of_good_words_rises_and_of_useless_ones_falls(
        self, engine: Engine, task: RouterTask, tmp_path: Path
    ) -> None:
        learned = []
        right = torch.zeros(len(task.gold), 20, dtype=torch.float16)
        for row, gold in enumerate(task.gold):
            right[row, list(gold)] = 0.02
        for name, words in (("right", right), ("wrong", 0.2 - 10 * right)):
            heads = heads_of(engine, lexical_weight=1.0)
            train_router(heads, replace(task, words=words), RouterTraining(**RECIPE), tmp_path / name)
            learned.append(heads.lexical_weight)
        assert learned[0] > 1.0 > learned[1]

    def test_a_teacher_is_followed(self, engine: Engine, task: RouterTask, tmp_path: Path) -> None:
        """The labels name the wrong passages and the teacher the right ones: enough of it wins."""
        right = torch.tensor([gold[0] for gold in task.gold])
        wrong = [[(gold[0] + 7) % 20] for gold in task.gold]
        taught = replace(task, gold=wrong, words=None, teacher=(torch.eye(20)[right], torch.eye(20)))
        agreement = []
        for share in (0.0, 20.0):
            heads = heads_of(engine)
            recipe = RouterTraining(**{**RECIPE, "steps": 60, "teacher_share": share, "dropout": 0.0})
            train_router(heads, taught, recipe, tmp_path / str(share))
            scores = score_documents(heads, task.questions, task.documents, range(len(task.gold)))
            agreement.append(float((scores.argmax(1) == right).float().mean()))
        assert agreement[1] > agreement[0] + 0.3

    def test_batches_are_a_function_of_their_step(self, task: RouterTask) -> None:
        recipe = RouterTraining(**RECIPE)
        one, other = (router_module._Batches(task, recipe) for _ in range(2))
        drawn = [one.draw(step) for step in range(1, 9)]
        for step in (8, 3, 1):
            again = other.draw(step)
            assert torch.equal(again.questions, drawn[step - 1].questions)
            assert torch.equal(again.passages, drawn[step - 1].passages)
        epoch = torch.cat([batch.questions for batch in drawn[:2]]).tolist()
        assert len(set(epoch)) == 32

    def test_questions_about_one_article_come_side_by_side(self, task: RouterTask) -> None:
        articles = [f"article {number % 5}" for number in range(len(task.gold))]
        recipe = RouterTraining(**{**RECIPE, "batch_size": 40, "together": 4})
        drawn = router_module._Batches(replace(task, articles=articles), recipe).draw(1).questions.tolist()
        assert sorted(drawn) == list(range(40))
        groups = [{articles[item] for item in drawn[at : at + 4]} for at in range(0, 40, 4)]
        assert all(len(group) == 1 for group in groups)
        assert [group.pop() for group in groups] != sorted(articles)[::4]

    def test_mined_passages_are_confused_and_never_right(self, engine: Engine, task: RouterTask) -> None:
        batches = router_module._Batches(task, RouterTraining(**RECIPE))
        heads = heads_of(engine)
        router_module._mine(heads, task, batches, 8)
        scores = score_documents(heads, task.questions, task.documents, range(40), [1])
        assert task.words is not None
        scores += heads.lexical_weight * task.words.float()
        for item, gold in enumerate(task.gold):
            found = [n for n in batches.hard[item].tolist() if n >= 0]
            assert set(found) == set(range(20)) - set(gold)
            ordered = scores[item][found]
            assert (ordered.diff() < 1e-3).all()  # best first, but for rounding

    @pytest.mark.parametrize("wrong", [{"steps": 0}, {"temperature": 0.0}, {"lexical_weight": -1.0}])
    def test_senseless_recipes_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            RouterTraining(**wrong)


TRAINER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from msa_memory.engine.train.hidden import HiddenStates
from msa_memory.engine.train.router import RouterHeads, RouterTask, RouterTraining, train_router
random = torch.Generator().manual_seed(3)
def ragged(lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return HiddenStates(torch.randn(2, int(starts[-1]), 16, generator=random).bfloat16(), starts)
questions, documents = ragged([4, 2, 3] * 6), ragged([2, 3, 1, 4] * 3)
words = torch.rand(18, 12, generator=random).half()
teacher = (torch.randn(18, 4, generator=random), torch.randn(12, 4, generator=random))
task = RouterTask(questions, documents, [[n % 12] for n in range(18)], words, teacher)
torch.manual_seed(0)
heads = RouterHeads(2, 16, 4, 2, 4)
def report(step, figures):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
recipe = RouterTraining(steps=12, batch_size=5, mine_from_step=3, mine_every=3, learning_rate=1e-2)
train_router(heads, task, recipe, Path(sys.argv[1]), save_every_s=0.0, report=report)
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def run(folder: Path, die_at: int) -> int:
        command = [sys.executable, "-P", "-c", TRAINER, str(folder), str(die_at)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert run(tmp_path / "killed", 8) == -signal.SIGKILL
    assert run(tmp_path / "killed", 0) == 0
    assert run(tmp_path / "whole", 0) == 0
    ours, theirs = (load_file(tmp_path / name / "state.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    figures = [
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("killed", "whole")
    ]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 12


def test_word_scores_are_the_banks(engine: Engine, files: tuple[Path, Path]) -> None:
    passages, questions = corpus()
    states = [engine.encode(n, "", passage["text"]) for n, passage in enumerate(passages)]
    bank = engine.new_bank(states.__getitem__)
    for number, state in enumerate(states):
        bank.add(number, state.router_keys, state.terms)
    asked = [question["question"] for question in questions]
    found = word_scores([passage["text"] for passage in passages], asked)
    for row, question in zip(found, asked, strict=True):
        expected = bank.view().score_words(question_terms(question))
        assert np.allclose(row.float().numpy(), expected, atol=1e-3)


def test_the_command_trains_routers_that_open(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["train", "router", "--model", str(tiny_model()), "--out", str(out), "--device", "cpu"]
    arguments += [
        "--passages",
        str(files[0]),
        "--questions",
        str(files[1]),
        "--lexical",
        "--router-chunk",
        "4",
    ]
    arguments += ["--dev-passages", str(files[0]), "--dev-questions", str(files[1])]
    arguments += ["--steps", "25", "--batch-size", "16", "--learning-rate", "0.01", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["questions"] == 40
    engine = load_engine(out / "model", device="cpu")
    assert engine.msa.router_chunk == 4
    assert engine.calibration["lexical_weight"] == pytest.approx(told["lexical_weight"], abs=1e-3)
    states = {n: engine.encode(n, f"{p['title']}\n", p["text"]) for n, p in enumerate(corpus()[0])}
    bank = engine.new_bank(states.__getitem__)
    for number, state in states.items():
        bank.add(number, state.router_keys, state.terms)
    right = 0
    for n, question in enumerate(corpus()[1]):
        routing = engine.route(question["question"], bank.view())
        right += int(routing.numbers[routing.mean().argmax()] == n // 2)
    assert right / 40 == pytest.approx(told["router"]["recall@1"], abs=0.06)  # the cache is bfloat16


class TestTeacher:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A random BERT of two layers as transformers saves it."""
        transformers = pytest.importorskip("transformers")
        folder: Path = tmp_path_factory.mktemp("bert")
        config = transformers.BertConfig(
            vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40
        )
        torch.manual_seed(0)
        transformers.BertModel(config, add_pooling_layer=False).eval().save_pretrained(folder)
        tokenizer = Tokenizer(WordLevel({"[UNK]": 0, **{w: n + 1 for n, w in enumerate(WORDS)}}, "[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    def test_embeds_as_transformers_does(self, folder: Path) -> None:
        transformers = pytest.importorskip("transformers")
        model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
        texts = ["harbour violin", "lantern", " ".join(WORDS[:30]), "harbour lantern meadow copper"]
        found = Teacher.open(folder).embed(texts)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text, vector in zip(texts, found, strict=True):
            with torch.no_grad():
                states = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
            assert torch.allclose(vector, F.normalize(states.mean(0), dim=-1), atol=1e-5)

    def test_embeddings_are_made_once_and_never_mixed_up(self, folder: Path, tmp_path: Path) -> None:
        teacher, made = Teacher.open(folder), []
        texts = ["harbour", "violin lantern"]
        for some in (texts, texts, texts[::-1]):
            cached_embeddings(teacher, some, tmp_path, made.append)
        assert made == [2, 2]

    def test_other_models_and_damage_are_refused(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot be read"):
            Teacher.open(tmp_path)
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
        with pytest.raises(CheckpointError, match="expected a BERT encoder"):
            Teacher.open(tmp_path)
