"""The bank of a device against the plain one: the same scores, choices, caches and answers, and no waits."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from msa_memory.engine import device_bank
from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.context import Feed, advance, route
from msa_memory.engine.context import Sequence as Row
from msa_memory.engine.device_bank import DeviceBank
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.states import PassageStates
from msa_memory.errors import NotFoundError, StateDamagedError
from msa_memory.testing import open_memory, tiny_model

TEXTS = [
    f"{name} keeps a {thing} in {place}. " * (1 + i % 4)
    for i, (name, thing, place) in enumerate(
        [("Ann", "boat", "Oslo"), ("Ben", "horse", "Lima"), ("Cat", "piano", "Rome"), ("Dov", "kite", "Bern"),
         ("Eli", "drum", "Riga"), ("Fay", "loom", "Kiev"), ("Gil", "still", "Cork"), ("Hal", "lamp", "Graz")]
    )
]  # fmt: skip
QUESTIONS = ["What does Ben keep in Lima?", "Where is the loom, and who has it?", "lamp"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Both:
    """The same passages in a bank of the device and in a plain one."""

    def __init__(self, device: str) -> None:
        self.engine: Engine = load_engine(tiny_model(), device=device)
        encoded = {number: self.engine.encode(number, "", text) for number, text in enumerate(TEXTS)}
        self.states: dict[int, PassageStates] = dict(encoded)
        self.all = encoded
        self.empty()

    def empty(self) -> None:
        self.states = dict(self.all)
        device = self.engine.decoder.device
        self.plain = MemoryBank(self.engine.msa, self.fetch, device=device)
        self.bank = DeviceBank(self.engine.msa, self.fetch, device=device)

    def fetch(self, number: int) -> PassageStates:
        if number not in self.states:
            raise NotFoundError(f"passage {number} was forgotten")
        return self.states[number]

    def add(self, *numbers: int) -> None:
        for number in numbers:
            self.states[number] = self.all[number]
            for bank in (self.plain, self.bank):
                bank.add(number, self.all[number].router_keys, self.all[number].terms)

    def remove(self, *numbers: int) -> None:
        for number in numbers:
            self.states.pop(number, None)
        for bank in (self.plain, self.bank):
            bank.remove(numbers)


@pytest.fixture(scope="module", params=DEVICES)
def models(request: pytest.FixtureRequest) -> Both:
    return Both(request.param)


@pytest.fixture
def both(models: Both) -> Both:
    models.empty()
    return models


def feeds(engine: Engine, rows: list[Row]) -> list[Feed]:
    asked = [engine.prompt.question(QUESTIONS[index % len(QUESTIONS)]) for index in range(len(rows))]
    return [Feed(row, *one) for row, one in zip(rows, asked, strict=True)]


def by_number(numbers: Any, scores: Any) -> dict[int, float]:
    """Of the visible passages."""
    return {int(n): float(s) for n, s in zip(numbers, scores, strict=True) if np.isfinite(s)}


def same_choice(engine: Engine, row: Row, plain: Row) -> None:
    assert row.view is not None
    assert plain.view is not None
    for layer in engine.msa.router_layers:
        assert row.selections[layer].numbers == plain.selections[layer].numbers
        assert row.selections[layer].scores == pytest.approx(plain.selections[layer].scores, abs=1e-5)
        expected = by_number(plain.view.numbers, plain.scores[layer])
        assert by_number(row.view.numbers, row.scores[layer]) == pytest.approx(expected, abs=1e-5)


def same_caches(row: Row, plain: Row) -> None:
    for found, expected in zip(row.cache.layers, plain.cache.layers, strict=True):
        assert (found.memory, found.length, found.unfilled) == (expected.memory, expected.length, None)
        for one, other in zip(found.view(), expected.view(), strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=0)


@settings(max_examples=12)
@given(
    story=st.lists(
        st.tuples(st.sampled_from(["add", "remove"]), st.integers(0, len(TEXTS) - 1)), min_size=1, max_size=14
    ),
    hidden=st.sets(st.integers(0, len(TEXTS) - 1), max_size=5),
    top_ks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)
def test_questions_find_what_they_find_in_a_plain_bank(
    models: Both, story: list[tuple[str, int]], hidden: set[int], top_ks: list[int]
) -> None:
    """After any history, through any filter, several questions in one pass: routed, and attended to."""
    both, engine = models, models.engine
    both.empty()
    for verb, number in story:
        if verb == "remove":
            both.remove(number)
        elif number not in both.plain:
            both.add(number)
        if number % 3 == 0:
            both.bank.view()  # brings what was added so far to the device
    assert both.bank.numbers == both.plain.numbers
    views = [
        (both.bank.view(), both.plain.view()),
        (both.bank.view().without(hidden), both.plain.view().without(hidden)),
    ]
    shown = np.array([number for number in range(len(TEXTS)) if number not in hidden], dtype=np.int64)
    views.append((both.bank.view(shown), both.plain.view(shown)))
    for way in (route, advance):
        rows = [engine.start(views[i % 3][0], top_k=k) for i, k in enumerate(top_ks)]
        plain = [engine.start(views[i % 3][1], top_k=k) for i, k in enumerate(top_ks)]
        found = way(engine.decoder, feeds(engine, rows))
        expected = [way(engine.decoder, [feed]) for feed in feeds(engine, plain)]
        for row, one in zip(rows, plain, strict=True):
            same_choice(engine, row, one)
            if way is advance:
                same_caches(row, one)
        if found is not None:
            torch.testing.assert_close(found, torch.cat(expected), atol=2e-4, rtol=0)


def test_a_view_is_a_snapshot(both: Both) -> None:
    both.add(0, 1, 2)
    before = both.bank.view()
    both.remove(1)
    both.add(3)
    assert before.numbers.tolist() == [0, 1, 2]
    assert both.bank.view().numbers.tolist() == [0, 2, 3]
    row = both.engine.start(before)
    route(both.engine.decoder, feeds(both.engine, [row]))
    assert set(row.selections[both.engine.msa.router_layers[0]].numbers) == {0, 1, 2}


def test_one_chosen_after_it_was_forgotten_fails_the_question(both: Both) -> None:
    """As in a plain bank, which finds out when it fetches the K/V."""
    both.add(0, 1)
    for bank in (both.bank, both.plain):
        before = bank.view()
        bank.remove([1])
        both.states.pop(1, None)
        with pytest.raises(NotFoundError, match="passage 1"):
            advance(both.engine.decoder, feeds(both.engine, [both.engine.start(before, top_k=2)]))
        with pytest.raises(NotFoundError, match="passage 1"):
            before.gather(0, [0, 1], torch.empty(0))


def test_damaged_keys_and_values_fail_only_who_chooses_them(both: Both) -> None:
    def fetch(number: int) -> PassageStates:
        if number == 1:
            raise StateDamagedError("passage 1 is damaged")
        return both.states[number]

    bank = DeviceBank(both.engine.msa, fetch, device=both.engine.decoder.device)
    for number in (0, 1, 2):
        bank.add(number, both.all[number].router_keys)
    view = bank.view()
    advance(both.engine.decoder, feeds(both.engine, [both.engine.start(view.without([1]))]))
    with pytest.raises(StateDamagedError, match="passage 1"):
        advance(both.engine.decoder, feeds(both.engine, [both.engine.start(view, top_k=3)]))


def test_a_passage_is_fetched_only_after_it_was_added(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever adds notes a passage after the bank holds it; many at once go to the device before that."""
    monkeypatch.setattr(device_bank, "PENDING_PASSAGES", 2)
    states: dict[int, PassageStates] = {}

    def fetch(number: int) -> PassageStates:
        if number not in states:
            raise NotFoundError(f"passage {number} is not known yet")
        return states[number]

    bank = DeviceBank(both.engine.msa, fetch, device=both.engine.decoder.device)
    for number in range(5):
        bank.add(number, both.all[number].router_keys)
        states[number] = both.all[number]
    view = bank.view()
    assert view.state.tier is not None
    assert [view.state.tier.chunks(number) for number in range(5)] == [both.all[n].chunks for n in range(5)]


def test_blocks_and_tier_grow(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of a few chunks: every passage is where its number says, after removals too."""
    monkeypatch.setattr(device_bank, "BLOCK_CHUNKS", 5)
    both.bank = DeviceBank(both.engine.msa, both.fetch, device=both.engine.decoder.device, room=5)
    both.add(*range(4))
    both.bank.view()
    both.remove(1, 2)
    both.add(4, 5, 6, 7)
    view = both.bank.view()
    assert len(both.bank._rows) > 1
    for number in both.bank.numbers:
        keys, values = view.gather(1, [number], torch.empty(0, device=both.engine.decoder.device))
        assert torch.equal(keys, both.all[number].keys[1])
        assert torch.equal(values, both.all[number].values[1])
    row, plain = both.engine.start(view), both.engine.start(both.plain.view())
    for one in (row, plain):
        route(both.engine.decoder, feeds(both.engine, [one]))
    same_choice(both.engine, row, plain)
    assert both.bank.nbytes() > 0
    assert both.bank.host_bytes() == sum(2 * both.all[n].keys.nbytes for n in both.bank.numbers)


def test_passages_that_were_read_together_are_held_as_each_alone(both: Both) -> None:
    from msa_memory.engine.packed_encoding import encode_packed

    engine = both.engine
    both.add(*range(len(TEXTS)))
    ids = [engine.prompt.document(number, "", text) for number, text in enumerate(TEXTS)]
    packed = DeviceBank(engine.msa, int, device=engine.decoder.device, room=4)
    for numbers in (range(3), range(3, len(TEXTS))):
        states = encode_packed(engine.decoder, [ids[number] for number in numbers])
        packed.add_packed(numbers, states, lambda number: both.all[number].terms)
    rows = [engine.start(bank.view()) for bank in (packed, both.plain)]
    for row in rows:
        advance(engine.decoder, feeds(engine, [row]))
    same_choice(engine, *rows)
    same_caches(*rows)
    assert packed.view().score_words(frozenset()).shape == (len(TEXTS),)


def test_what_is_removed_leaves_no_trace(both: Both) -> None:
    both.add(0, 1, 2)
    both.bank.view()
    tier = both.bank._tier
    assert tier is not None
    first, count = tier._places[1].tolist()
    both.remove(1)
    assert not any(pool[:, first : first + count].any() for pool in tier._pools)
    kept = sum(both.all[n].router_keys.shape[1] for n in (0, 2))
    assert not both.bank._rows[0].keys[:, kept:].any()


def test_rows_of_two_states_of_a_bank_share_a_pass(both: Both) -> None:
    both.add(0, 1, 2)
    older, plain_older = both.bank.view(), both.plain.view()
    both.add(3, 4)
    views = [(older, plain_older), (both.bank.view(), both.plain.view())]
    rows = [both.engine.start(view) for view, _ in views]
    plain = [both.engine.start(view) for _, view in views]
    advance(both.engine.decoder, feeds(both.engine, rows))
    for feed in feeds(both.engine, plain):
        advance(both.engine.decoder, [feed])
    for row, one in zip(rows, plain, strict=True):
        same_choice(both.engine, row, one)
        same_caches(row, one)


def two_passes(both: Both) -> list[Any]:
    """Two questions over different views, with and without memory: what they chose, and their logits."""
    both.add(0, 1, 2, 3)
    seen: list[Any] = []
    for way in (route, advance):
        rows = [
            both.engine.start(both.bank.view(), top_k=3),
            both.engine.start(both.bank.view().without([2]), top_k=2),
        ]
        logits = way(both.engine.decoder, feeds(both.engine, rows))
        seen.append([[list(one.numbers) for one in row.selections.values()] for row in rows])
        seen.append([] if logits is None else logits.tolist())
    return seen


def test_the_kernels_choose_what_the_references_choose(both: Both) -> None:
    """In a process whose Triton interprets kernels; on a GPU they are what every other test here runs."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", __file__], env=environment, text=True, capture_output=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    chosen, nothing, attended, logits = json.loads(done.stdout)
    expected = two_passes(both)
    assert [chosen, nothing, attended] == expected[:3]
    np.testing.assert_allclose(logits, expected[3], atol=2e-3)


@pytest.mark.gpu
def test_a_pass_with_routing_never_asks_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA raises at any synchronisation between the first layer and the last; the host learns after that."""
    both = Both("cuda")
    both.add(*range(len(TEXTS)))
    engine, view = both.engine, both.bank.view().without([5])
    for way in (route, advance):  # compiles, and builds tables
        way(engine.decoder, feeds(engine, [engine.start(view), engine.start(view)]))
    forward = type(engine.decoder).forward

    def watched(*args: Any) -> Any:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(type(engine.decoder), "forward", watched)
    for way in (route, advance):
        way(engine.decoder, feeds(engine, [engine.start(view), engine.start(view)]))


@pytest.fixture(params=DEVICES)
def wired(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Opens memories whose engine goes the device's way."""
    if request.param == "cpu":
        monkeypatch.setattr(Engine, "uses_kernels", True)
    return lambda **options: open_memory(device=request.param, **options)


def test_a_memory_answers_as_on_the_plain_way(
    wired: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with wired() as memory:
        seen, scores = _story(memory)
        assert isinstance(memory._shared.bank.bank, DeviceBank)
    monkeypatch.setattr(Engine, "uses_kernels", False)
    with open_memory() as memory:
        expected, plain_scores = _story(memory)
        assert type(memory._shared.bank.bank) is MemoryBank
    assert seen == expected
    assert scores == pytest.approx(plain_scores, abs=1e-3)


def _story(memory: Any) -> tuple[list[Any], list[float]]:
    """Added, asked, changed, asked: ids and texts, and the scores of all that was found."""
    seen: list[Any] = []
    scores: list[float] = []

    def look() -> None:
        for question in QUESTIONS:
            hits = memory.search(question, k=3)
            seen.append([hit.id for hit in hits])
            scores.extend(hit.score for hit in hits)
            answer = memory.query(question, max_new_tokens=6)
            seen.append((answer.text, [source.id for source in answer.sources]))
        seen.append(memory.query(QUESTIONS[0], evidence="generative", max_new_tokens=4).text)
        seen.append([(one.layer, one.documents) for one in memory.explain(QUESTIONS[0]).layers])

    for number, text in enumerate(TEXTS[:5]):
        memory.add(text, id=str(number))
    look()
    memory.forget("1")
    memory.update("2", TEXTS[5])
    memory.add_many([{"id": str(n), "content": TEXTS[n]} for n in (6, 7)])
    look()
    seen.append([hit.id for hit in memory.search(QUESTIONS[0], where={"kind": "none"})])
    return seen, scores


if __name__ == "__main__":
    print(json.dumps(two_passes(Both("cpu"))))
