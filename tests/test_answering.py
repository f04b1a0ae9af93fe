"""What a model's calibration decides about answers: when it may refuse, how many documents it reads."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from msa_memory import MemoryModel
from msa_memory.engine import layout
from msa_memory.engine.answerability import AnswerabilityHead, told_signals
from msa_memory.engine.context import Feed, advance
from msa_memory.engine.sampling import Constraint, without_doubtful
from msa_memory.testing import open_memory, tiny_model

Open = Callable[..., MemoryModel]
TEXTS = ["The lion wanted courage.", "The lion slept.", "A lion and a tiger.", "Lions roar at night."]
QUESTION = "What did the lion want?"


@pytest.fixture
def calibrated(tmp_path: Path) -> Iterator[Open]:
    """Opens a memory of four documents whose model has this refusal and these calibration entries."""
    with ExitStack() as opened:

        def open_one(refusal: str = "", **calibration: float) -> MemoryModel:
            model = tiny_model(tmp_path / f"model-{len(list(tmp_path.iterdir()))}")
            config = json.loads((model / "config.json").read_text())
            config["msa_config"] |= {"calibration": calibration, "layout": {"refusal": refusal}}
            (model / "config.json").write_text(json.dumps(config))
            memory = opened.enter_context(open_memory(model=model))
            memory.add_many([{"content": text, "id": str(n)} for n, text in enumerate(TEXTS)])
            return memory

        yield open_one


def first_choices(memory: MemoryModel) -> torch.Tensor:
    """Log-probabilities ``[V]`` at the start of the answer, from a prefill of its own."""
    engine = memory._engine()
    seen = []
    read = engine.read_steps

    def spy(view, selections, ids, *rest):  # type: ignore[no-untyped-def]
        row = engine.start(view)
        row.attend_to(selections, {layer: slot for slot, layer in enumerate(engine.msa.router_layers)})
        seen.append(advance(engine.decoder, [Feed(row, ids)])[0].log_softmax(-1))
        return read(view, selections, ids, *rest)

    engine.read_steps = spy  # type: ignore[method-assign]
    try:
        memory.query(QUESTION, max_new_tokens=1)
    finally:
        del engine.read_steps
    return seen[0]


@pytest.fixture
def wish(calibrated: Open) -> tuple[str, float, str]:
    """What the model says first, how sure it is, and what it would say next best."""
    memory = calibrated()
    sure, tokens = first_choices(memory).topk(2)
    decode = memory._engine().tokenizer.decode
    return decode([int(tokens[0])]), float(sure[0]), decode([int(tokens[1])])


@pytest.mark.parametrize(("above", "refuses"), [(-0.01, True), (0.01, False), (None, True)])
def test_a_refusal_needs_its_likelihood(
    calibrated: Open, wish: tuple[str, float, str], above: float | None, refuses: bool
) -> None:
    refusal, sure, instead = wish
    entry = {} if above is None else {"refusal_logprob": sure + above}
    memory = calibrated(refusal, **entry)
    assert memory._engine().prompt.refusal, "the refusal has a first token"
    said = memory.query(QUESTION, max_new_tokens=1)
    assert said.text == (refusal if refuses else instead).strip()
    assert said.found is not refuses


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(("above", "refuses"), [(-0.01, True), (0.01, False)])
def test_a_calibrated_head_decides_alone(
    calibrated: Open, wish: tuple[str, float, str], above: float, refuses: bool, second: bool
) -> None:
    """Also where the refusal is not what the model would say first, which ``second`` is."""
    first, sure, other = wish
    refusal = other if second else first
    memory = calibrated(refusal, refusal_logprob=0.0 if refuses else sure - 5)
    engine = memory._engine()
    size = engine.decoder.config.hidden_size
    head = AnswerabilityHead((0, 3), torch.randn(2, size), torch.randn(8), 0.5)
    engine.answerability = head
    routing = engine.route(QUESTION, memory._bank().view("default", None))
    likely = first_choices(memory)
    told = told_signals(routing.relevance(), routing.mean(), routing.words, likely, engine.prompt.refusal[0])
    odds = head.log_odds(noted_inputs(memory, head.layers), told)
    uncalibrated = memory.query(QUESTION, max_new_tokens=1).text
    assert uncalibrated == (first if second or not refuses else other).strip(), "by its likelihood"
    engine.calibration["refusal_odds"] = odds + above
    said = memory.query(QUESTION, max_new_tokens=1)
    assert said.text == (refusal if refuses else first if second else other).strip()
    assert said.found is not refuses


def noted_inputs(memory: MemoryModel, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Normed inputs of these layers at the end of the prompt of ``QUESTION``, from a hook on its own."""
    engine, found = memory._engine(), {}
    handles = [
        engine.decoder.model.layers[layer].input_layernorm.register_forward_hook(
            lambda module, given, out, layer=layer: found.__setitem__(layer, out[-1])
        )
        for layer in layers
    ]
    try:
        first_choices(memory)
        return {layer: found[layer].clone() for layer in layers}
    finally:
        for handle in handles:
            handle.remove()


def test_conversations_are_not_judged(calibrated: Open, wish: tuple[str, float, str]) -> None:
    memory = calibrated(wish[0])
    engine = memory._engine()
    said = memory.chat([{"role": "user", "content": QUESTION}], max_new_tokens=1).text
    engine.answerability = AnswerabilityHead(
        (0,), torch.zeros(1, engine.decoder.config.hidden_size), torch.zeros(8), 1.0
    )
    engine.calibration["refusal_odds"] = 5.0
    memory.query(QUESTION, max_new_tokens=1)
    assert memory.chat([{"role": "user", "content": QUESTION}], max_new_tokens=1).text == said


def test_only_the_refusal_is_held_back_and_only_at_the_start(
    calibrated: Open, wish: tuple[str, float, str]
) -> None:
    refusal, _, instead = wish
    free = calibrated(instead).query(QUESTION, max_new_tokens=8).text
    held = calibrated(instead, refusal_logprob=0.0).query(QUESTION, max_new_tokens=8).text
    assert held == free, "what would not come first is not excluded"
    assert free.startswith(refusal.strip())


def test_a_form_that_was_asked_for_is_not_touched(calibrated: Open, wish: tuple[str, float, str]) -> None:
    class Only(Constraint):
        finished = False

        def __init__(self, token: int, size: int) -> None:
            self.mask = torch.zeros(size, dtype=torch.bool)
            self.mask[token] = True

        def allowed(self) -> torch.Tensor:
            return self.mask

        def accept(self, token_id: int) -> None:
            self.finished = True

    memory = calibrated(wish[0], refusal_logprob=0.0)
    token = memory._engine().prompt.refusal[0]
    constraint = Only(token, memory._engine().tokenizer.vocab_size)
    said = memory.chat([{"role": "user", "content": QUESTION}], constraint=constraint)
    assert said.text == wish[0].strip()


def test_doubtful_tokens_leave_the_others_alone() -> None:
    logits = torch.tensor([0.5, 2.0, 1.0])
    sure = float(logits.log_softmax(-1)[1])
    assert without_doubtful(logits, 1, sure).tolist() == logits.tolist()
    assert without_doubtful(logits, 1, sure + 0.01).tolist() == [0.5, -torch.inf, 1.0]
    assert without_doubtful(logits, 2, 0.0).tolist() == logits.tolist()
    assert logits.tolist() == [0.5, 2.0, 1.0]


@pytest.mark.parametrize(("most", "read"), [(1, 1), (2, 2), (9, 4), (None, 4)])
def test_a_model_reads_no_more_documents_than_it_was_calibrated_for(
    calibrated: Open, most: int | None, read: int
) -> None:
    memory = calibrated(**({} if most is None else {"evidence_documents": most}))
    answer = memory.query(QUESTION, max_new_tokens=1)
    found = [hit.id for hit in memory.search(QUESTION, k=read)]
    assert [source.id for source in answer.sources] == found
    assert len(memory.query(QUESTION, k=3, max_new_tokens=1).sources) == 3, "an explicit k is obeyed"


def test_every_round_reads_its_own(calibrated: Open) -> None:
    rounds = calibrated(evidence_documents=1).query(QUESTION, max_rounds=2, max_new_tokens=1).rounds
    assert [len(step.documents) for step in rounds] == [1, 1]


@pytest.mark.parametrize("k", [2, 4, None])
def test_a_later_round_reads_what_the_evidence_names(calibrated: Open, k: int | None) -> None:
    """Wherever the first round begins: every document names another one by its title."""
    memory = calibrated(evidence_documents=1)
    circle = 40
    memory.add_many(
        {
            "id": f"film {n}",
            "content": f"A film about lions by Director Number{(n + 7) % circle}.",
            "metadata": {"title": f"Director Number{n} (director)"},
        }
        for n in range(circle)
    )
    where = {"$id": {"$in": [f"film {n}" for n in range(circle)]}}
    first, second = memory.query(QUESTION, k=k, max_rounds=2, where=where, max_new_tokens=1).rounds
    named = [f"film {(int(id.removeprefix('film ')) + 7) % circle}" for id in first.documents]
    assert len(first.documents) == (1 if k is None else k // 2)
    assert set(second.documents) == set(named) - set(first.documents)
    assert {source.id for source in memory.query(QUESTION, k=k, max_rounds=2, where=where).sources} == {
        *first.documents,
        *second.documents,
    }


def test_a_text_that_names_itself_leads_nowhere(calibrated: Open) -> None:
    """Passages of one article share its title: the second round is what question and evidence find."""
    memory = calibrated()
    titled = {f"part {n}" for n in range(0, 24, 2)}
    memory.add_many(
        {
            "id": id,
            "content": f"Old Oak, {id}, of lions.",
            "metadata": {"title": "Old Oak"} if id in titled else {},
        }
        for id in (f"part {n}" for n in range(24))
    )
    engine, bank, told = memory._engine(), memory._bank(), 0
    for start in range(16):
        where = {"$id": {"$in": [f"part {n}" for n in range(start, start + 8)]}}
        first, second = memory.query(QUESTION, k=4, max_rounds=2, where=where, max_new_tokens=1).rounds
        if not titled.intersection(first.documents):
            continue
        entries = [
            layout.evidence_entry(
                layout.document_header(title=text.metadata.get("title"), when=None, speaker=None),
                text.timestamp.date(),
                text.text,
            )
            for text in map(memory.get, reversed(first.documents))
        ]
        routing = engine.route(QUESTION, bank.view("default", where), evidence="\n".join(entries))
        order = routing.numbers[np.argsort(-routing.relevance(), kind="stable")].tolist()
        left = [id for number in order if (id := bank.records[number].document_id) not in first.documents]
        assert list(second.documents) == left[:2]
        told += left[:2] != [id for id in left if id in titled][:2]
    assert told, "no choice of passages would have shown a difference"


def test_what_comes_beside_the_named_is_found_by_the_question(calibrated: Open) -> None:
    memory = calibrated()
    texts = [f"The lion number {n} sleeps beside Old Oak." for n in range(20)]
    memory.add_many({"id": f"lion {n}", "content": text} for n, text in enumerate(texts))
    memory.add("A tree.", id="tree", metadata={"title": "Old Oak"})
    where = {"$id": {"$in": ["tree", *(f"lion {n}" for n in range(20))]}}
    ranked = [hit.id for hit in memory.search(QUESTION, k=21, where=where) if hit.id != "tree"]
    scores = {hit.id: hit.score for hit in memory.search(QUESTION, k=21, where=where)}
    answer = memory.query(QUESTION, k=6, max_rounds=2, where=where, max_new_tokens=1)
    read = [id for step in answer.rounds for id in step.documents]
    if "tree" not in answer.rounds[0].documents:
        assert answer.rounds[1].documents[0] == "tree"
    assert [id for id in read if id != "tree"] == ranked[:5]
    shown = {source.id: source.score for source in answer.sources if source.id != "tree"}
    assert shown == {id: scores[id] for id in shown}, "each is scored by the routing that found it"
