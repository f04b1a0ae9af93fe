"""Questions that advance together answer as they do alone, and none waits for, or suffers from, another."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msa_memory.engine import context, serving
from msa_memory.engine.bank_view import BankView
from msa_memory.engine.context import Feed, advance, route
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.generation import Generation, decode, decode_ahead
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.engine.serving import Batch
from msa_memory.engine.states import PassageStates
from msa_memory.engine.stepper import Stepper
from msa_memory.errors import NotFoundError
from msa_memory.testing import open_memory, tiny_model

TEXTS = [f"Note {i}: the {thing} is in the {place}. " * 3 for i, (thing, place) in enumerate(
    [("key", "drawer"), ("lamp", "hall"), ("boat", "harbour"), ("cat", "kitchen"), ("bell", "tower")]
)]  # fmt: skip
PROMPTS = ["Where is the key?", "Tell me of boats and bells, and of nothing else.", "cat", "hall lamp?" * 30]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(tiny_model(), device="cpu")


@pytest.fixture(scope="module", params=["decoder", "plain", "packed"])
def answering(request: pytest.FixtureRequest) -> tuple[Engine, Stepper | None]:
    """A model and what it decodes answers with; packed weights guess ahead."""
    dtype = "bfloat16" if request.param == "packed" else "float32"
    engine = load_engine(
        tiny_model(), device="cpu", dtype=dtype, decode_weights="packed" if dtype == "bfloat16" else "exact"
    )
    assert engine.stepper is not None
    assert engine.stepper.rows_alike == (request.param == "packed")
    return engine, None if request.param == "decoder" else engine.stepper


@pytest.fixture(scope="module")
def view(engine: Engine) -> BankView:
    states: dict[int, PassageStates] = {}
    bank = engine.new_bank(states.__getitem__)
    for number, text in enumerate(TEXTS):
        states[number] = engine.encode(number, "", text)
        bank.add(number, states[number].router_keys, states[number].terms)
    return bank.view()


def generation(engine: Engine, prompt: str, tokens: int) -> Generation:
    ids = engine.prompt.reading("", prompt)
    row = engine.start(None)
    logits = advance(engine.decoder, [Feed(row, ids)])[0]
    return Generation(engine.tokenizer, SamplingOptions(max_new_tokens=tokens), row, logits, prompt=ids)


def drain(steps: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def together(jobs: Sequence[Iterator[Any]]) -> list[list[Any]]:
    """Step by step in turn, as the worker thread does; what each yielded."""
    yielded: list[list[Any]] = [[] for _ in jobs]
    running = list(range(len(jobs)))
    while running:
        for index in list(running):
            try:
                yielded[index].append(next(jobs[index]))
            except StopIteration:
                running.remove(index)
    return yielded


@settings(max_examples=6)
@given(
    asked=st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.integers(1, 7), st.integers(0, 4)), min_size=1, max_size=4
    )
)
def test_answers_equal_one_by_one(
    answering: tuple[Engine, Stepper | None], asked: list[tuple[str, int, int]]
) -> None:
    """Whatever the prompts and lengths, and whenever each joins."""
    engine, stepper = answering
    alone = [generation(engine, prompt, tokens) for prompt, tokens, _ in asked]
    shown = [
        list(decode(engine.decoder, one) if stepper is None else decode_ahead(stepper, one)) for one in alone
    ]
    batch = Batch(engine.decoder, stepper)
    rows = [generation(engine, prompt, tokens) for prompt, tokens, _ in asked]

    def joining(row: Generation, later: int) -> Iterator[str]:
        yield from [""] * later
        yield from batch.decode(row)

    jobs = [joining(row, later) for row, (_, _, later) in zip(rows, asked, strict=True)]
    texts = together(jobs)
    for row, single, text, pieces, (_, _, later) in zip(rows, alone, texts, shown, asked, strict=True):
        assert (row.ids, row.text, row.finish_reason) == (single.ids, single.text, single.finish_reason)
        assert text[later:] == pieces
        assert row.sequence.position == single.sequence.position
        assert row.sequence.cache.length == single.sequence.cache.length
    assert batch._waiting == []


def test_a_round_of_questions_costs_one_pass(engine: Engine) -> None:
    rows = [generation(engine, prompt, 6) for prompt in PROMPTS]
    batch = Batch(engine.decoder)
    together([batch.decode(row) for row in rows])
    assert batch.passes == max(len(row.ids) for row in rows) - 1


def test_decoding_goes_on_beside_a_long_prompt(engine: Engine) -> None:
    """Each decoding row gets its token in every round, and the prompt its result."""
    ids = engine.prompt.reading("evidence " * 60, "Where?")
    whole = advance(engine.decoder, [Feed(engine.start(None), ids)])[0]
    batch = Batch(engine.decoder, prompt_tokens=16)
    row = generation(engine, PROMPTS[0], 6)
    found: list[Tensor] = []

    def reading() -> Iterator[None]:
        found.append((yield from batch.feed(Feed(engine.start(None), ids))))

    prompt, decoding = reading(), batch.decode(row)
    rounds = 0
    next(prompt)
    for _ in decoding:
        rounds += 1
        assert len(row.ids) >= rounds
        assert not found
        next(prompt, None)
    list(prompt)
    [logits] = found
    assert rounds == 6
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=0)


def test_memory_is_chosen_together_as_alone(engine: Engine, view: BankView) -> None:
    questions = [engine.prompt.question(prompt) for prompt in PROMPTS]
    alone = [engine.start(view) for _ in questions]
    for row, (ids, routes) in zip(alone, questions, strict=True):
        route(engine.decoder, [Feed(row, ids, routes)])
    batch = Batch(engine.decoder)
    rows = [engine.start(view) for _ in questions]
    together([batch.route(Feed(row, ids, r)) for row, (ids, r) in zip(rows, questions, strict=True)])
    assert batch.passes == 1
    for row, single in zip(rows, alone, strict=True):
        assert row.selections.keys() == single.selections.keys()
        for layer, chosen in single.selections.items():
            assert row.selections[layer].numbers == chosen.numbers


def test_prompts_that_route_are_fed_together(engine: Engine, view: BankView) -> None:
    questions = [engine.prompt.question(prompt) for prompt in PROMPTS]
    alone = [advance(engine.decoder, [Feed(engine.start(view), *one)])[0] for one in questions]
    batch = Batch(engine.decoder)
    found: list[Tensor] = []

    def job(ids: list[int], routes: list[bool]) -> Iterator[None]:
        found.append((yield from batch.feed(Feed(engine.start(view), ids, routes))))

    together([job(*one) for one in questions])
    assert batch.passes == 1
    for logits, single in zip(found, alone, strict=True):
        torch.testing.assert_close(logits, single, atol=1e-4, rtol=0)


def test_one_that_fails_spoils_no_other(
    engine: Engine, view: BankView, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A passage that is gone fails its own question in the midst of a pass; the others' tokens stay right."""
    expected = generation(engine, PROMPTS[0], 6)
    list(decode(engine.decoder, expected))
    row = generation(engine, PROMPTS[0], 6)
    gone = engine.start(view.without([0]))

    def gather(self: BankView, *args: Any) -> tuple[Tensor, Tensor]:
        raise NotFoundError("passage 3 was forgotten")

    monkeypatch.setattr(BankView, "gather", gather)
    batch = Batch(engine.decoder)
    decoding, failing = batch.decode(row), batch.feed(Feed(gone, *engine.prompt.question(PROMPTS[1])))
    next(decoding), next(failing)
    next(decoding)  # runs the pass for both
    with pytest.raises(NotFoundError, match="passage 3"):
        next(failing)
    list(decoding)
    assert row.ids == expected.ids
    assert gone.cache.length == engine.head.length


def test_whoever_leaves_is_not_computed_any_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counting(decoder: Any, feeds: Any) -> Tensor:
        sizes.append(len(feeds))
        return context.advance(decoder, feeds)

    monkeypatch.setattr(serving, "advance", counting)
    batch = Batch(engine.decoder)
    staying, leaving = (batch.decode(generation(engine, prompt, 6)) for prompt in PROMPTS[:2])
    next(staying), next(leaving)
    next(staying)
    leaving.close()
    list(staying)
    assert sizes[0] == 2
    assert set(sizes[1:]) == {1}
    assert batch._waiting == []


def test_questions_to_a_memory_share_their_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[str, int]] = []
    forward = Batch._forward

    def counting(batch: Batch, feeds: Sequence[Feed], way: Any) -> Any:
        passes.append((way, len(feeds)))
        return forward(batch, feeds, way)

    monkeypatch.setattr(Batch, "_forward", counting)
    with open_memory() as memory:
        memory.add_many(TEXTS)
        alone = [memory.query(prompt, max_new_tokens=5) for prompt in PROMPTS[:3]]
        assert {size for _, size in passes} == {1}
        passes.clear()
        memory.query_many(PROMPTS[:3], max_new_tokens=5)
        assert {way for way, size in passes if size == 3} == {"step"}, "on a CPU prompts keep their bits"
        passes.clear()
        memory._engine().batch.shares_prompts = True
        answers = memory.query_many(PROMPTS[:3], max_new_tokens=5)
    assert [answer.text for answer in answers] == [answer.text for answer in alone]
    for answer, single in zip(answers, alone, strict=True):
        assert [source.id for source in answer.sources] == [source.id for source in single.sources]
        scores = [source.score for source in single.sources]
        assert [source.score for source in answer.sources] == pytest.approx(scores, abs=1e-6)
    assert {way: size for way, size in passes if size == 3}.keys() == {"route", "advance", "step"}


def test_weights_are_prepared_for_decoding_at_the_first_answer() -> None:
    with open_memory() as memory:
        memory.add_many(TEXTS)
        memory.search(PROMPTS[0])
        engine = memory._engine()
        assert "stepper" not in vars(engine)
        memory.query(PROMPTS[0], max_new_tokens=3)
        assert engine.batch.stepper is engine.stepper


def test_a_prompt_alone_is_read_as_a_whole_and_beside_others_in_turn(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked first is done first; one alone has the bits of a single pass."""
    ids = engine.prompt.reading("evidence " * 60, "Where?")
    batch = Batch(engine.decoder, prompt_tokens=16)
    expected = advance(engine.decoder, [Feed(engine.start(None), ids)])[0]
    assert torch.equal(drain(batch.feed(Feed(engine.start(None), ids))), expected)
    assert batch.passes == 1
    order: list[int] = []

    def job(index: int) -> Iterator[None]:
        logits = yield from batch.feed(Feed(engine.start(None), ids))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        order.append(index)

    together([job(index) for index in range(3)])
    assert order == [0, 1, 2]


def test_prompts_with_memory_are_read_together_as_alone(
    engine: Engine, view: BankView, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator twins of route, read and chat: what each gives alone, in fewer passes."""
    monkeypatch.setattr(engine.batch, "shares_prompts", True)
    options = SamplingOptions(max_new_tokens=4)

    def job(prompt: str) -> Generator[None, None, tuple[Any, Generation, Generation]]:
        routing = yield from engine.route_steps(prompt, view)
        ids = engine.prompt.reading("Note 1.", prompt)
        read = yield from engine.read_steps(view, routing.selections, ids, options)
        chat = yield from engine.chat_steps(engine.tokenizer.encode(prompt), options)
        return routing, read, chat

    def collected(prompt: str) -> Iterator[None]:
        found[prompt] = yield from job(prompt)

    alone = {prompt: drain(job(prompt)) for prompt in PROMPTS}
    before, found = engine.batch.passes, {}
    together([collected(prompt) for prompt in PROMPTS])
    assert engine.batch.passes - before < 3 * len(PROMPTS)
    for prompt, (routing, *generations) in alone.items():
        np.testing.assert_allclose(found[prompt][0].scores, routing.scores, atol=1e-5)
        assert [g.ids for g in found[prompt][1:]] == [g.ids for g in generations]
