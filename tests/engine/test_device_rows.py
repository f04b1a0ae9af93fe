"""The device's own way through a question against the plain one: the same logits, choices and tokens."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from msa_memory.engine import ops
from msa_memory.engine.bank_view import BankView
from msa_memory.engine.context import Feed, advance
from msa_memory.engine.device_rows import DeviceMemory, DeviceRows, Prompt
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.graphs import Replay
from msa_memory.engine.kernels.routing import KeyBlock, plan_routing
from msa_memory.engine.tiers import StateTier
from msa_memory.errors import EngineError
from msa_memory.testing import tiny_model

TEXTS = [
    f"{name} keeps a {thing} in {place}. " * (1 + i % 4)
    for i, (name, thing, place) in enumerate(
        [("Ann", "boat", "Oslo"), ("Ben", "horse", "Lima"), ("Cat", "piano", "Rome"), ("Dov", "kite", "Bern"),
         ("Eli", "drum", "Riga"), ("Fay", "loom", "Kiev"), ("Gil", "still", "Cork")]
    )
]  # fmt: skip
QUESTIONS = ["What does Ben keep in Lima?", "Where is the loom, and who has it?"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Both:
    """One memory, seen by ``context`` and held for ``DeviceRows``."""

    def __init__(self, device: str) -> None:
        self.engine: Engine = load_engine(tiny_model(), device=device)
        msa, config = self.engine.msa, self.engine.decoder.config
        self.states = {n: self.engine.encode(n, "", text) for n, text in enumerate(TEXTS)}
        self.bank = self.engine.new_bank(self.states.__getitem__)
        chunks = sum(states.chunks for states in self.states.values())
        self.tier = StateTier(
            len(msa.router_layers), config.num_kv_heads, config.head_dim, chunks,
            dtype=torch.float32, device=device,
        )  # fmt: skip
        for number, states in self.states.items():
            self.bank.add(number, states.router_keys, states.terms)
            self.tier.add(number, states)

    def rows(self, count: int, view: BankView | None, capacity: int = 160) -> DeviceRows:
        memory = None
        if view is not None:
            blocks = [KeyBlock(b.keys, b.lengths.tolist(), b.numbers) for b in view._blocks]
            visible = torch.from_numpy(view.visible).to(self.engine.decoder.device)
            memory = DeviceMemory(plan_routing(blocks), self.tier, visible)
        return DeviceRows(
            self.engine.decoder, self.engine.head, memory, rows=count, capacity=capacity,
            position=self.engine.prompt.question_position, top_k=self.engine.msa.top_k,
        )  # fmt: skip


@pytest.fixture(scope="module", params=DEVICES)
def both(request: pytest.FixtureRequest) -> Both:
    return Both(request.param)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected.cpu(), atol=2e-4, rtol=0)


def test_prompts_choose_and_decode_as_the_plain_way(both: Both) -> None:
    """Two questions at once: logits of the prompts, of later prompts that do not route, and of every step."""
    engine, view = both.engine, both.bank.view().without([5])
    asked = [engine.prompt.question(question) for question in QUESTIONS]
    plain = [engine.start(view) for _ in asked]
    expected = torch.stack(
        [advance(engine.decoder, [Feed(r, *a)])[0] for r, a in zip(plain, asked, strict=True)]
    )
    rows = both.rows(2, view)
    close(rows.feed([Prompt(row, *one) for row, one in enumerate(asked)]), expected)
    for layer in engine.msa.router_layers:
        chosen = [sum(both.states[n].chunks for n in row.selections[layer].numbers) for row in plain]
        assert rows._layers[layer].counts.tolist() == chosen

    more = engine.tokenizer.encode("And who else?")
    close(rows.feed([Prompt(1, more)]), advance(engine.decoder, [Feed(plain[1], more)]))

    ids, step = torch.tensor([5, 9], device=engine.decoder.device), Replay(rows.step, [rows.lengths])
    for _ in range(4):
        rows.stepped()
        found = step(ids)
        logits = advance(engine.decoder, [Feed(r, [t]) for r, t in zip(plain, ids.tolist(), strict=True)])
        close(found, logits)
        ids = found.argmax(-1)
        assert ids.tolist() == logits.argmax(-1).tolist()
    assert rows.lengths.tolist() == rows.held == [len(asked[0][0]) + 4, len(asked[1][0]) + len(more) + 4]


def test_rows_without_a_memory(both: Both) -> None:
    ids = both.engine.prompt.reading("Ann keeps a boat.", QUESTIONS[0])
    rows, plain = both.rows(1, None), both.engine.start(None)
    close(rows.feed([Prompt(0, ids)]), advance(both.engine.decoder, [Feed(plain, ids)]))
    close(
        rows.step(torch.tensor([7], device=both.engine.decoder.device)),
        advance(both.engine.decoder, [Feed(plain, [7])]),
    )


def test_a_row_is_used_again_without_a_trace(both: Both) -> None:
    engine, view = both.engine, both.bank.view()
    rows = both.rows(2, view)
    first, second = (engine.prompt.question(question) for question in QUESTIONS)
    rows.feed([Prompt(0, *first), Prompt(1, *second)])
    rows.clear(0)
    plain = engine.start(view)
    close(rows.feed([Prompt(0, *second)]), advance(engine.decoder, [Feed(plain, *second)]))
    assert rows.nbytes() > 0


def test_a_view_in_which_nothing_is_visible(both: Both) -> None:
    view = both.bank.view().without(range(len(TEXTS)))
    asked = both.engine.prompt.question(QUESTIONS[0])
    expected = advance(both.engine.decoder, [Feed(both.engine.start(view), *asked)])
    close(both.rows(1, view).feed([Prompt(0, *asked)]), expected)


@pytest.mark.gpu
def test_a_pass_never_asks_the_host() -> None:
    """CUDA raises at any synchronisation; the first pass compiles and builds tables."""
    both = Both("cuda")
    rows, asked = both.rows(2, both.bank.view()), both.engine.prompt.question(QUESTIONS[0])
    rows.feed([Prompt(0, *asked)])
    ids = torch.tensor([5, 9], device="cuda")
    rows.step(ids)
    rows.clear(0), rows.clear(1)
    rows.lengths.zero_()
    spans, tokens, positions = rows._lay_out([Prompt(0, *asked)])
    from msa_memory.engine.device_rows import _PromptAttention

    attention = _PromptAttention(rows, spans)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            both.engine.decoder(tokens, positions, attention)
        rows.step(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_step_answers_as_one_that_runs_anew() -> None:
    both = Both("cuda")
    asked = [both.engine.prompt.question(question) for question in QUESTIONS]
    outputs = []
    for capture in (True, False):
        rows = both.rows(2, both.bank.view())
        logits = rows.feed([Prompt(row, *one) for row, one in enumerate(asked)])
        step, told = Replay(rows.step, [rows.lengths], capture=capture), []
        for _ in range(8):
            rows.stepped()
            logits = step(logits.argmax(-1))
            told.append(logits.clone())
        outputs.append(torch.stack(told))
        assert rows.lengths.tolist() == rows.held
    assert torch.equal(*outputs)


@pytest.mark.parametrize("case", ["too long", "empty", "full"])
def test_what_does_not_fit_is_refused(both: Both, case: str) -> None:
    rows = both.rows(1, None, capacity=4)
    attempts: dict[str, Callable[[], object]] = {
        "too long": lambda: rows.feed([Prompt(0, [1] * 5)]),
        "empty": lambda: rows.feed([Prompt(0, [])]),
        "full": lambda: [rows.stepped() for _ in range(5)],
    }
    with pytest.raises(EngineError, match=r"of 4 tokens|its capacity"):
        attempts[case]()


def test_parts_merge_to_the_whole() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(5, 4, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    visible = torch.rand(5, 9) < 0.6
    visible[0, :4] = False  # one part without any key
    visible[:, 4] = True
    whole = ops.attend_part(query, keys, values, 0.3, visible)[0]
    parts = [
        ops.attend_part(query, keys[:, part], values[:, part], 0.3, visible[:, part])
        for part in (slice(0, 4), slice(4, 9))
    ]
    torch.testing.assert_close(ops.merge_parts(*parts), whole, atol=1e-6, rtol=0)
