"""Layers that learn to route: losses against the engine's own scores, batches, refusals."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msa_memory.engine.adapter import TARGETS, attach
from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.encoding import encode_passage
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.train.adapter import AdapterTraining, train_adapter
from msa_memory.engine.train.contrast import RoutedQuestions, RoutingExercises, routing_loss
from msa_memory.engine.train.data import Passage, Question
from msa_memory.engine.train.exercises import Exercises, scouted
from msa_memory.engine.train.mixture import Mixture, MixtureOptions
from msa_memory.errors import ConfigError, EngineError
from msa_memory.testing import tiny_model

TEXTS = ("Bob repairs violins in Oslo. " * 4, "Toto ran after the wind.", "Dorothy went home. " * 9)
ASKED = {"Who repairs violins?": (0,), "Who went home, and what ran?": (1, 2)}
FILLER = "The wind came from the hills over the old bridge. "
COSINES = {"decouple_router": True, "router_normalize": True, "head_reduce": "mean", "query_reduce": "max"}


@pytest.fixture
def engine() -> Engine:
    engine = load_engine(tiny_model(), device="cpu", dtype="float32")
    engine.decoder.msa = engine.msa = engine.msa.with_options(**COSINES)
    return engine


def people(engine: Engine, *, known: bool | None = None) -> Exercises:
    """Three passages an article, one question each; ``known``: of articles the scouts know, or do not."""
    names = [f"Person{n}" for n in range(60)]
    passages = [
        Passage(f"p{n}", f"{name} lives in Town{n}. {FILLER * 3}", f"Chapter {n // 3}")
        for n, name in enumerate(names)
    ]
    passages = [passage for passage in passages if known is None or scouted(passage) == known]
    questions = [
        Question(f"q{n}", f"Where does {name} live?", (f"p{n}",), (f"Town{n}",), "squad1.1")
        for n, name in enumerate(names)
    ]
    return Exercises(passages, questions, [], engine.prompt)


def routing(engine: Engine, questions: int = 6) -> RoutingExercises:
    exercises = people(engine)
    mixture = Mixture(exercises, (), engine.prompt.tail[0], MixtureOptions(seed=3))
    return RoutingExercises(mixture, questions=questions, together=3)


def asked_of(engine: Engine) -> RoutedQuestions:
    prompts = [engine.prompt.question(question) for question in ASKED]
    return RoutedQuestions(
        head=tuple(engine.prompt.head),
        position=engine.prompt.question_position,
        questions=tuple(
            tuple(token for token, routes in zip(ids, marks, strict=True) if routes) for ids, marks in prompts
        ),
        documents=tuple(tuple(engine.tokenizer.encode(text)) for text in TEXTS),
        gold=tuple(ASKED.values()),
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_that_of_the_engines_own_scores(engine: Engine, weighted: bool) -> None:
    layers = len(engine.msa.router_layers)
    weights = [0.7] + [0.3 / (layers - 1)] * (layers - 1) if weighted else [1 / layers] * layers
    if weighted:
        engine.decoder.msa = engine.msa = engine.msa.with_options(layer_weights=tuple(weights))
    states = [encode_passage(engine.decoder, engine.tokenizer.encode(text)) for text in TEXTS]
    bank = MemoryBank(engine.msa, states.__getitem__, exact=True)
    for number, one in enumerate(states):
        bank.add(number, one.router_keys)
    scores = [engine.route(question, bank.view()).scores for question in ASKED]  # [L, P] each

    def contrast(row: list[float], right: tuple[int, ...]) -> float:
        against = sum(math.exp(s / 0.1) for place, s in enumerate(row) if place not in right)
        return sum(math.log1p(against / math.exp(row[place] / 0.1)) for place in right)

    pairs = sum(map(len, ASKED.values()))
    joined = [sum(w * layer for w, layer in zip(weights, table, strict=True)).tolist() for table in scores]
    wanted = sum(contrast(row, right) for row, right in zip(joined, ASKED.values(), strict=True)) / pairs
    for slot, weight in enumerate(weights):
        own = [contrast(t[slot].tolist(), right) for t, right in zip(scores, ASKED.values(), strict=True)]
        wanted += 0.5 * weight * sum(own) / pairs
    assert float(routing_loss(engine.decoder, asked_of(engine), 0.1)) == pytest.approx(wanted, rel=2e-3)


def test_layers_below_the_routers_learn_and_the_routers_stay(engine: Engine) -> None:
    batch = asked_of(engine)
    before = {n: p.detach().clone() for n, p in engine.decoder.named_parameters() if ".router_" in n}
    modules = attach(engine.decoder, {0: TARGETS, 1: TARGETS}, rank=4, alpha=8.0, seed=0)
    parameters = [side for module in modules.values() for side in (module.lora_a, module.lora_b)]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    losses = []
    for _ in range(12):
        for module in modules.values():
            module.refresh()
        loss = routing_loss(engine.decoder, batch, 0.1)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    after = {n: p for n, p in engine.decoder.named_parameters() if ".router_" in n}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_reports_the_loss_beside_the_others(engine: Engine, tmp_path: Path) -> None:
    exercises = routing(engine)
    recipe = AdapterTraining(steps=2, rows_per_step=1, rank=2, first_layer=2, routed_questions=6)
    seen = []
    train_adapter(
        engine.decoder,
        exercises.mixture.row,
        recipe,
        tmp_path,
        routing=exercises.batch,
        report=lambda step, figures: seen.append(figures["losses"]["routing"]),
    )
    assert len(seen) == 2
    assert min(seen) > 0
    with pytest.raises(ConfigError, match="routed_questions"):
        train_adapter(engine.decoder, exercises.mixture.row, recipe, tmp_path / "other")


class TestBatches:
    def test_one_is_a_function_of_its_number(self, engine: Engine) -> None:
        exercises = routing(engine)
        assert exercises.batch(4) == routing(engine).batch(4)
        assert len({exercises.batch(n) for n in range(6)}) == 6

    def test_questions_are_of_a_few_articles_that_scouts_do_not_know(self, engine: Engine) -> None:
        exercises = routing(engine)
        texts = exercises.mixture.exercises
        seen: set[str] = set()
        for number in range(20):
            batch = exercises.batch(number)
            assert len(batch.questions) == len(batch.gold) == 6
            assert len(batch.documents) == len({place for gold in batch.gold for place in gold})
            read = [engine.tokenizer.decode(ids) for ids in batch.documents]
            found = [next(p for p in texts.passages if p.text.split()[0] + " " in text) for text in read]
            assert not any(map(scouted, found))
            assert len({passage.title for passage in found}) <= 4
            seen |= {passage.id for passage in found}
        assert len(seen) > 10
        assert any(map(scouted, texts.passages))

    def test_too_few_passages_are_refused(self, engine: Engine) -> None:
        some = people(engine, known=True)
        with pytest.raises(ConfigError, match="0 passages"):
            RoutingExercises(Mixture(some, (), 0, MixtureOptions()), questions=4)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"router_normalize": False}, "cosine"), ({"chunk_reduce": "mean"}, "mean, max and mean")],
)
def test_other_routers_are_refused(engine: Engine, change: dict[str, object], said: str) -> None:
    engine.decoder.msa = engine.msa.with_options(**change)
    with pytest.raises(EngineError, match=said):
        routing_loss(engine.decoder, asked_of(engine), 0.1)


def test_nothing_asked_or_read_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineError, match="needs questions and passages"):
        routing_loss(engine.decoder, replace(asked_of(engine), questions=(), gold=()), 0.1)
