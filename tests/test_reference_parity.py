"""Reference parity: the engine computes every array that the published MSA engine computed for a fixture.

Fixture folders come from MSA_PARITY_FIXTURES (colon-separated; tests/fixtures/tiny_* when unset); each
one's README.md says what its arrays are. An array in golden.safetensors that no rule here computes is a
failure, not a gap. tests/engine/test_parity_mutations.py runs ``check`` on a broken engine.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.bank_view import BankView
from msa_memory.engine.config import MSAConfig, read_backbone, read_msa
from msa_memory.engine.context import Feed, Sequence, advance
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.encoding import encode_head, encode_passage
from msa_memory.engine.id_grammar import RetrievalTokens
from msa_memory.engine.interleave import Interleave, InterleaveOptions
from msa_memory.engine.layout import PromptLayout, read_layout
from msa_memory.engine.states import HeadStates, PassageStates
from msa_memory.engine.train.forward import PackedOutput, PackedRow, forward_packed
from msa_memory.engine.train.losses import training_loss

TOLERANCE = 1e-4
COPIES = Path(__file__).resolve().parent / "fixtures"
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_end|>", "user")  # ids 0 to 4

Values = dict[str, Tensor | list[Tensor]]
"""Arrays by their golden name; a list is ragged rows, compared without the golden array's padding."""


class ParityError(AssertionError):
    """The engine's arrays are not the reference's."""


def fixture_folders() -> list[Path]:
    named = os.environ.get("MSA_PARITY_FIXTURES")
    if named:
        return [Path(folder) for folder in named.split(":") if folder]
    return [COPIES / name for name in ("tiny_a", "tiny_c", "tiny_d")]


@dataclass(frozen=True)
class Fixture:
    """A fixture folder's content."""

    name: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    golden: dict[str, Tensor]
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Fixture":
        config, inputs = (json.loads((folder / f"{part}.json").read_text()) for part in ("config", "inputs"))
        golden, weights = (load_file(folder / f"{part}.safetensors") for part in ("golden", "model"))
        return cls(folder.name, config, inputs, golden, weights)

    @property
    def msa(self) -> MSAConfig:
        msa = read_msa(self.config)
        assert msa is not None
        return msa

    def decoder(self, msa: MSAConfig) -> Decoder:
        decoder = Decoder(read_backbone(self.config), msa)
        decoder.load(iter(self.weights.items()))
        return decoder

    def injected_tokens(self) -> dict[str, Tensor]:
        """Greedy ids after an injected question: ``inputs.json`` has them, not the golden file."""
        rounds = self.inputs.get("interleave", {}).get("rounds", [])
        return {
            f"interleave.round{number}.after_injection_tokens": torch.tensor(given["after_injection_tokens"])
            for number, given in enumerate(rounds)
            if "after_injection_tokens" in given
        }

    def prompt(self) -> PromptLayout:
        return PromptLayout(read_layout(self.config), CharTokenizer(), self.msa)  # type: ignore[arg-type]


class CharTokenizer:
    """The interleave scenario's vocabulary: five words, any other id is a character code."""

    pattern = re.compile("|".join(map(re.escape, CONTROL)) + "|.", re.DOTALL)

    def encode(self, text: str) -> list[int]:
        found = self.pattern.findall(text)
        return [CONTROL.index(part) if part in CONTROL else ord(part) for part in found]

    encode_prompt = encode
    vocab_size = 256

    def token_id(self, text: str) -> int | None:
        return CONTROL.index(text) if text in CONTROL else None

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        return "".join(CONTROL[number] if number < len(CONTROL) else chr(number) for number in ids)


@dataclass(frozen=True)
class Memory:
    """A model with documents read into a bank, numbered from 0."""

    decoder: Decoder
    head: HeadStates
    states: list[PassageStates]
    view: BankView
    question_position: int

    @classmethod
    def read(cls, fixture: Fixture, msa: MSAConfig, head: list[int], documents: list[list[int]]) -> "Memory":
        decoder = fixture.decoder(msa)
        states = [encode_passage(decoder, ids) for ids in documents]
        bank = MemoryBank(msa, states.__getitem__)
        for number, one in enumerate(states):
            bank.add(number, one.router_keys)
        position = fixture.prompt().question_position
        return cls(decoder, encode_head(decoder, head), states, bank.view(), position)

    @cached_property
    def msa(self) -> MSAConfig:
        assert self.decoder.msa is not None
        return self.decoder.msa

    def ask(self, prompts: list[dict[str, Any]]) -> tuple[list[Sequence], Tensor]:
        """Prefill: one sequence per prompt and the logits at their last tokens."""
        rows = [
            Sequence.start(
                self.decoder,
                self.head,
                position=self.question_position,
                view=self.view,
                top_k=self.msa.top_k,
            )
            for _ in prompts
        ]
        feeds = [
            Feed(row, prompt["input_ids"], [code == 0 for code in prompt["doc_ids"]])
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        return rows, advance(self.decoder, feeds)

    def routing(self, rows: list[Sequence]) -> Values:
        """Scores and choices of some rows by array name without prefix."""
        values: Values = {}
        for layer in self.msa.router_layers:
            scores = [torch.from_numpy(row.scores[layer]) for row in rows]
            chosen = [row.selections[layer].numbers for row in rows]
            chunks = [sum(self.states[number].chunks for number in numbers) for numbers in chosen]
            values[f"layer{layer}.doc_scores"] = torch.stack(scores)
            values[f"layer{layer}.selected_docs"] = torch.tensor(chosen)
            values[f"layer{layer}.num_selected_chunks"] = torch.tensor(chunks)
        return values


def stage1_values(memory: Memory) -> Values:
    values: Values = {}
    for slot, layer in enumerate(memory.msa.router_layers):
        name = f"stage1.layer{layer}"
        values[f"{name}.pooled_k"] = torch.cat([one.keys[slot] for one in memory.states], dim=1)
        values[f"{name}.pooled_v"] = torch.cat([one.values[slot] for one in memory.states], dim=1)
        routing = torch.cat([one.router_keys[slot] for one in memory.states])
        values[f"{name}.pooled_router_k"] = routing.transpose(0, 1)
    for layer in range(memory.decoder.config.num_layers):
        values[f"stage1.layer{layer}.prefix_k"] = memory.head.keys[layer]
        values[f"stage1.layer{layer}.prefix_v"] = memory.head.values[layer]
    owners = [number for number, one in enumerate(memory.states) for _ in range(one.chunks)]
    values["stage1.chunk_doc"] = torch.tensor(owners)
    return values


def question_values(fixture: Fixture, memory: Memory) -> Values:
    """Routing, prefill and greedy decoding of the queries as one batch."""
    rows, logits = memory.ask(fixture.inputs["queries"])
    values: Values = {f"stage2.{name}": value for name, value in memory.routing(rows).items()}
    values["stage2.last_logits"] = logits
    if "decode.tokens" in fixture.golden:
        values |= decode_values(memory, rows, logits, fixture.golden["decode.tokens"])
    return values


def decode_values(memory: Memory, rows: list[Sequence], logits: Tensor, tokens: Tensor) -> Values:
    steps = [logits]
    for column in tokens[:, :-1].T.tolist():
        feeds = [Feed(row, [token]) for row, token in zip(rows, column, strict=True)]
        steps.append(advance(memory.decoder, feeds))
    everything = torch.stack(steps, dim=1)
    return {"decode.logits": everything[:, 1:], "decode.tokens": everything.argmax(-1)}


def variant_values(fixture: Fixture, memory: Memory) -> Values:
    """The same weights with other reductions; names are head_query_chunk."""
    values: Values = {}
    for name in sorted({name.split(".")[1] for name in fixture.golden if name.startswith("variant.")}):
        head, query, chunk = name.split("_")
        msa = memory.msa.with_options(head_reduce=head, query_reduce=query, chunk_reduce=chunk)
        other = Memory.read(fixture, msa, fixture.inputs["template_head_ids"], fixture.inputs["documents"])
        rows, logits = other.ask(fixture.inputs["queries"])
        values |= {f"variant.{name}.{key}": value for key, value in other.routing(rows).items()}
        values[f"variant.{name}.last_logits"] = logits
    return values


def train_values(fixture: Fixture) -> Values:
    """Packed forward, losses and gradients of the training samples as one batch."""
    decoder, samples = fixture.decoder(fixture.msa), fixture.inputs["train"]["samples"]
    rows = [PackedRow(one["input_ids"], one["doc_ids"], one["position_ids"]) for one in samples]
    output = forward_packed(decoder, rows)
    values: Values = {"train.logits": list(output.logits().detach().split(output.lengths))}
    for layer, scores in output.doc_scores.items():
        values[f"train.layer{layer}.doc_scores"] = scores.detach()
    for name in fixture.golden:
        if found := re.fullmatch(r"train\.(lm_loss|aux_\w+)", name):
            values[name] = training_part(fixture, output, found[1]).detach()
        elif found := re.fullmatch(r"train\.grad_(\w+)\.layer(\d+)\.(\w+)", name):
            weight = named_weight(decoder, int(found[2]), found[3])
            loss = training_part(fixture, output, found[1])
            (values[name],) = torch.autograd.grad(loss, weight, retain_graph=True)
    return values


def training_part(fixture: Fixture, output: PackedOutput, name: str) -> Tensor:
    """One unweighted loss by its golden name: ``lm``, ``aux_infonce_focal``, ``aux_decouple``, ..."""
    samples = fixture.inputs["train"]["samples"]
    method = name.removeprefix("aux_").upper() if name.startswith("aux_") else "INFONCE"
    if not method.startswith(("INFONCE", "BCE")):
        method = f"INFONCE_{method}"
    losses = training_loss(
        output,
        replace(fixture.msa, aux_loss_method=method),
        num_layers=fixture.config["num_hidden_layers"],
        labels=[one["labels"] for one in samples],
        relevant=[one["aux_labels"] for one in samples],
    )
    part = losses.router if name.startswith("aux_") else losses.lm
    assert part is not None
    return part


def named_weight(decoder: Decoder, layer: int, projection: str) -> Tensor:
    pattern = rf"model\.layers\.{layer}\.\w+\.{projection}(\.0)?\.weight"
    (weight,) = [weight for name, weight in decoder.named_parameters() if re.fullmatch(pattern, name)]
    return weight


def interleave_values(fixture: Fixture) -> Values:
    """Each round prefills its given ids anew; forced, then injected tokens go through the decode path."""
    scenario = fixture.inputs["interleave"]
    memory = Memory.read(fixture, fixture.msa, scenario["template_head_ids"], scenario["doc_token_ids"])
    values: Values = {}
    for number, given in enumerate(scenario["rounds"]):
        prefix = f"interleave.round{number}"
        (row,), logits = memory.ask([given])
        for key, value in memory.routing([row]).items():
            assert isinstance(value, Tensor)
            values[f"{prefix}.{key}"] = value[0]
        values[f"{prefix}.prefill_last_logits"] = logits[0]
        if f"{prefix}.after_injection_logits" in fixture.golden:
            logits = injected_logits(memory, row, given)
            values[f"{prefix}.after_injection_logits"] = logits
            values[f"{prefix}.after_injection_tokens"] = logits.argmax(-1)
    return values


def injected_logits(memory: Memory, row: Sequence, given: dict[str, Any]) -> Tensor:
    """Optional in the README: a causal engine differs. Ours has the reference's rule as a switch."""
    for token in given["forced_token_ids"]:
        advance(memory.decoder, [Feed(row, [token])])
    steps = [advance(memory.decoder, [Feed(row, given["injected_token_ids"], bidirectional=True)])]
    for token in given["after_injection_tokens"][:-1]:
        steps.append(advance(memory.decoder, [Feed(row, [token])]))
    return torch.cat(steps)


def engine_values(fixture: Fixture) -> Values:
    """Everything the engine can compute for a fixture, by golden name."""
    groups = {name.split(".")[0] for name in fixture.golden}
    head, documents = fixture.inputs["template_head_ids"], fixture.inputs["documents"]
    memory = Memory.read(fixture, fixture.msa, head, documents)
    values = stage1_values(memory) | question_values(fixture, memory) | variant_values(fixture, memory)
    if "train" in groups:
        values |= train_values(fixture)
    if "interleave" in groups:
        values |= interleave_values(fixture)
    return values


def deviation(ours: Tensor | list[Tensor], golden: Tensor) -> float:
    """Largest absolute difference; infinite for wrong shapes, ids or infinities."""
    if isinstance(ours, list):
        parts = zip(ours, golden, strict=True)
        return max(deviation(row, padded[: len(row)]) for row, padded in parts)
    if ours.shape != golden.shape:
        return float("inf")
    if not golden.is_floating_point():
        return 0.0 if torch.equal(ours, golden) else float("inf")
    difference = torch.where(ours == golden, 0.0, (ours - golden).abs())
    return float(difference.nan_to_num(torch.inf, torch.inf).max())


def check(fixture: Fixture) -> dict[str, float]:
    """The largest deviation of every array group.

    Raises:
        ParityError: some array differs, or nothing here computes it.
    """
    values = engine_values(fixture)
    expected = fixture.golden | fixture.injected_tokens()
    unknown = sorted(set(expected) - set(values))
    if unknown:
        raise ParityError(f"{fixture.name}: no rule computes {', '.join(unknown)}")
    worst = {name: deviation(values[name], golden) for name, golden in expected.items()}
    wrong = [f"{name} by {off:.2g}" for name, off in sorted(worst.items()) if not off <= TOLERANCE]
    if wrong:
        raise ParityError(f"{fixture.name}: {len(wrong)} of {len(worst)} arrays differ: {', '.join(wrong)}")
    groups: dict[str, float] = {}
    for name, off in worst.items():
        group = re.sub(r"\.layer\d+|\.round\d+|(?<=variant)\.\w+", "", name)
        groups[group] = max(groups.get(group, 0.0), off)
    return groups


@pytest.fixture(params=fixture_folders(), ids=lambda folder: folder.name)
def fixture(request: pytest.FixtureRequest) -> Iterator[Fixture]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are too small to share
    yield Fixture.read(request.param)
    torch.set_num_threads(threads)


def test_every_array_is_the_references(fixture: Fixture) -> None:
    worst = check(fixture)
    print("\n" + "\n".join(f"{fixture.name} {group}: {off:.1e}" for group, off in sorted(worst.items())))


def test_an_array_nobody_computes_fails(fixture: Fixture) -> None:
    golden = {**fixture.golden, "stage3.layer0.something_new": torch.zeros(1)}
    with pytest.raises(ParityError, match=r"no rule computes stage3\.layer0\.something_new"):
        check(replace(fixture, golden=golden))


def test_one_wrong_element_or_id_fails(fixture: Fixture) -> None:
    logits, tokens = fixture.golden["decode.logits"].clone(), fixture.golden["decode.tokens"].clone()
    logits.view(-1)[7] += 2 * TOLERANCE
    tokens.view(-1)[-1] += 1
    with pytest.raises(ParityError, match=r"decode\.logits by 0\.0002, decode\.tokens by inf"):
        check(replace(fixture, golden={**fixture.golden, "decode.logits": logits, "decode.tokens": tokens}))


def test_questions_alone_give_what_the_batch_gives(fixture: Fixture) -> None:
    msa, inputs = fixture.msa, fixture.inputs
    memory = Memory.read(fixture, msa, inputs["template_head_ids"], inputs["documents"])
    for index, query in enumerate(inputs["queries"]):
        (row,), logits = memory.ask([query])
        assert deviation(logits[0], fixture.golden["stage2.last_logits"][index]) <= TOLERANCE
        for layer in msa.router_layers:
            chosen = fixture.golden[f"stage2.layer{layer}.selected_docs"][index].tolist()
            assert list(row.selections[layer].numbers) == chosen


def test_positions_start_where_the_reference_starts(fixture: Fixture) -> None:
    start = fixture.prompt().question_position
    for query in fixture.inputs["queries"]:
        assert query["position_ids"] == [*range(start, start + len(query["input_ids"]))]


def folders_with_interleave() -> list[Path]:
    named = [
        (folder, json.loads((folder / "inputs.json").read_text(encoding="utf-8")))
        for folder in fixture_folders()
    ]
    return [folder for folder, inputs in named if "interleave" in inputs]


@pytest.mark.parametrize("fixture", folders_with_interleave(), indirect=True, ids=lambda folder: folder.name)
class TestInterleaveScenario:
    """The scenario's texts against what the engine itself writes and reads (msa-spec 9)."""

    def test_the_engine_interleaves_as_the_reference_does(self, fixture: Fixture) -> None:
        scenario, golden, prompt = fixture.inputs["interleave"], fixture.golden, fixture.prompt()
        memory = Memory.read(fixture, fixture.msa, scenario["template_head_ids"], scenario["doc_token_ids"])
        tokens = RetrievalTokens(CharTokenizer(), prompt.layout.delimiter)  # type: ignore[arg-type]
        asking = Interleave(
            memory.decoder,
            prompt,
            tokens,
            start=lambda: Sequence.start(
                memory.decoder,
                memory.head,
                position=prompt.question_position,
                view=memory.view,
                top_k=fixture.msa.top_k,
            ),
            view=memory.view,
            texts=lambda numbers: {number: scenario["docs"][number] for number in numbers},
            question=scenario["question"],
            options=InterleaveOptions(reprefill=True, bidirectional=True),
        )
        first, second = scenario["rounds"]

        def close(logits: Tensor, name: str) -> None:
            assert (logits - golden[name]).abs().max() < 1e-4, name

        close(asking.ask(), "interleave.round0.prefill_last_logits")
        asking.feed(first["forced_token_ids"][:-1])  # the delimiter is fed with the texts
        close(asking.inject([3, 0]), "interleave.round1.prefill_last_logits")
        assert asking.ids == second["input_ids"]
        for layer in fixture.msa.router_layers:
            chosen = golden[f"interleave.round1.layer{layer}.selected_docs"].tolist()
            assert list(asking.row.selections[layer].numbers) == chosen
        asking.feed(second["forced_token_ids"])
        again = asking.ask_again()
        assert (again - golden["interleave.round1.after_injection_logits"][0]).abs().max() < 1e-4
        assert asking.ids == second["returned_token_ids"][: len(asking.ids)]

    def test_documents_and_question_are_tokenised_as_given(self, fixture: Fixture) -> None:
        scenario, prompt = fixture.inputs["interleave"], fixture.prompt()
        documents = [prompt.document(number, "", text) for number, text in enumerate(scenario["docs"])]
        assert documents == scenario["doc_token_ids"]
        assert prompt.head == scenario["template_head_ids"]
        ids, routes = prompt.question(scenario["question"])
        assert ids == scenario["rounds"][0]["input_ids"]
        assert routes == [code == 0 for code in scenario["rounds"][0]["doc_ids"]]

    def test_each_round_starts_from_the_text_the_last_one_returned(self, fixture: Fixture) -> None:
        tokenizer, rounds = CharTokenizer(), fixture.inputs["interleave"]["rounds"]
        for given in rounds:
            assert tokenizer.decode(given["returned_token_ids"]) == given["returned_text"]
            fed = given["input_ids"] + given["forced_token_ids"] + given["injected_token_ids"]
            assert given["returned_token_ids"][: len(fed)] == fed
        for given, following in pairwise(rounds):
            assert given["next_prompt_text"] == given["returned_text"]
            assert following["input_ids"] == tokenizer.encode(given["next_prompt_text"])

    def test_injected_texts_are_the_named_documents_and_last_the_question(self, fixture: Fixture) -> None:
        scenario, tokenizer = fixture.inputs["interleave"], CharTokenizer()
        layout = fixture.prompt().layout
        *fetching, last = scenario["rounds"]
        for given in fetching:
            named = re.findall(r"\[(\d+)\]", tokenizer.decode(given["forced_token_ids"]))
            lines = [f"[{n}]. {scenario['docs'][n]}\n" for n in sorted({int(n) for n in named})]
            assert tokenizer.decode(given["injected_token_ids"]) == "".join(lines) + layout.delimiter
        asked = f"The user's question is: {scenario['question']}\n"
        injected = tokenizer.decode(last["injected_token_ids"])
        assert injected == layout.reinjection_start + asked + layout.delimiter

    def test_the_question_and_the_newest_block_route(self, fixture: Fixture) -> None:
        tokenizer, rounds = CharTokenizer(), fixture.inputs["interleave"]["rounds"]
        end = "documents related to the question"
        asked, _, _ = tokenizer.decode(rounds[0]["input_ids"]).partition(end)
        for before, given in pairwise(rounds):
            codes = zip(given["input_ids"], given["doc_ids"], strict=True)
            newest = tokenizer.decode(before["injected_token_ids"]).removesuffix(CONTROL[3])
            assert tokenizer.decode([token for token, code in codes if code == 0]) == asked + end + newest
