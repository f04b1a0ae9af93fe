"""The packed training forward equals encoding plus prefill, and its losses are what they say.

Golden values for one layout are in tests/test_reference_parity.py; here any lengths, modes and labels.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.config import BackboneConfig, MSAConfig, RopeConfig
from msa_memory.engine.context import Feed, Sequence, advance
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.encoding import encode_head, encode_passage
from msa_memory.engine.train.forward import PackedOutput, PackedRow, forward_packed, pack
from msa_memory.engine.train.losses import next_token_loss, router_loss, training_loss
from msa_memory.errors import ConfigError, EngineError

VOCAB, CHUNK, TOP_K, POSITION = 89, 8, 2, 5
HEAD, TAIL = [1, 2, 3], [4, 5]
LENGTHS = [1, 7, 8, 9, 63, 64, 65]
MODES: list[dict[str, Any]] = [
    {},
    {"decouple_router": False},
    {"head_reduce": "max", "query_reduce": "mean", "chunk_reduce": "mean"},
    {"query_reduce": "last", "router_chunk": 3},
    {"aux_loss_method": "BCE", "router_normalize": False},
]


def build(**options: Any) -> Decoder:
    """Four random layers, routers on 1 and 3, where layer 2 lies between."""
    backbone = BackboneConfig(
        model_type="qwen3",
        vocab_size=VOCAB,
        hidden_size=40,
        intermediate_size=56,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        max_positions=512,
        rope=RopeConfig(),
        tie_word_embeddings=True,
        qk_norm=True,
    )
    values = {"router_layers": (1, 3), "top_k": TOP_K, "chunk": CHUNK, "router_chunk": CHUNK, **options}
    torch.manual_seed(0)
    decoder = Decoder(backbone, MSAConfig(**values))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0.0, 0.15) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return decoder


def some_ids(seed: int, length: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def example(lengths: list[int], seed: int = 0) -> PackedRow:
    documents = [some_ids(seed + n, length) for n, length in enumerate(lengths)]
    question, response = some_ids(seed + 50, 9), some_ids(seed + 51, 6)
    return pack(HEAD, documents, question, TAIL, response, question_position=POSITION)


def rows_of(decoder: Decoder, rows: list[PackedRow]) -> tuple[PackedOutput, list[Tensor]]:
    output = forward_packed(decoder, rows)
    return output, list(output.logits().detach().split(output.lengths))


class TestPackedForward:
    @pytest.mark.parametrize("mode", range(len(MODES)))
    @pytest.mark.parametrize("lengths", [LENGTHS, [5], [64, 1], [3, 3, 3]])
    def test_equals_encoding_and_prefill(self, lengths: list[int], mode: int) -> None:
        decoder = build(**MODES[mode])
        assert decoder.msa is not None
        row = example(lengths)
        output, (logits,) = rows_of(decoder, [row])
        start = len(HEAD)
        states = []
        for length in lengths:
            states.append(encode_passage(decoder, row.ids[start : start + length]))
            start += length
        bank = MemoryBank(decoder.msa, states.__getitem__)
        for number, one in enumerate(states):
            bank.add(number, one.router_keys)
        view = bank.view()
        sequence = Sequence.start(
            decoder, encode_head(decoder, HEAD), position=POSITION, view=view, top_k=TOP_K
        )
        advance(decoder, [Feed(sequence, row.ids[start : start + 9], [True] * 9)])
        for at in range(start + 9, len(row)):
            expected = advance(decoder, [Feed(sequence, [row.ids[at]])])[0]
            assert (logits[at] - expected).abs().max() < 1e-5
        for layer in decoder.msa.router_layers:
            scores = output.doc_scores[layer].detach()
            assert scores.shape == (1, len(lengths) + 1)
            assert math.isinf(scores[0, 0])
            assert (scores[0, 1:] - torch.from_numpy(sequence.scores[layer])).abs().max() < 1e-5
            chosen = tuple(number - 1 for number in output.selected[layer][0])
            assert chosen == sequence.selections[layer].numbers

    def test_rows_do_not_influence_each_other(self) -> None:
        decoder = build()
        rows = [example([9, 4, 30]), example([17], 100), example([], 200), example([3, 70], 300)]
        together, logits = rows_of(decoder, rows)
        assert together.doc_scores[1].shape == (4, 4)
        for index, row in enumerate(rows):
            alone, (own,) = rows_of(decoder, [row])
            assert (logits[index] - own).abs().max() < 1e-5
            for layer, scores in alone.doc_scores.items():
                table = together.doc_scores[layer][index]
                assert torch.allclose(table[: scores.shape[1]], scores[0], atol=1e-6)
                assert table[scores.shape[1] :].isneginf().all()
                assert together.selected[layer][index] == alone.selected[layer][0]

    def test_documents_see_neither_each_other_nor_the_head(self) -> None:
        decoder = build()
        row = example([9, 20])
        _, (logits,) = rows_of(decoder, [row])
        alone = PackedRow(row.ids[12:32], [1] * 20, range(20))
        _, (own,) = rows_of(decoder, [alone])
        assert (logits[12:32] - own).abs().max() < 1e-5

    def test_a_row_without_a_question_attaches_nothing(self) -> None:
        decoder = build()
        row = pack(HEAD, [[7, 8, 9]], [], TAIL, [4, 4], question_position=POSITION)
        output, (logits,) = rows_of(decoder, [row])
        without = pack(HEAD, [], [], TAIL, [4, 4], question_position=POSITION)
        _, (expected,) = rows_of(decoder, [without])
        assert output.selected == {1: ((),), 3: ((),)}
        assert output.doc_scores[1].isneginf().all()
        assert (logits[6:] - expected[3:]).abs().max() < 1e-5

    def test_logits_at_some_tokens(self) -> None:
        output, (logits,) = rows_of(build(), [example([5, 9])])
        some = torch.tensor([2, 8, 19])
        assert torch.allclose(output.logits(some), logits[some], atol=1e-6)

    @pytest.mark.parametrize(("method", "growth"), [("INFONCE_DECOUPLE", 1.0), ("BCE", 10.0)])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_training_scores_are_cosines_for_the_infonce_family_only(
        self, normalize: bool, method: str, growth: float
    ) -> None:
        """Cosines do not grow with the projections; the checkpoint's own switch is for inference."""
        decoder = build(aux_loss_method=method, router_normalize=normalize)
        row = example([9, 20])
        before = forward_packed(decoder, [row]).doc_scores[3]
        weights = dict(decoder.named_parameters())
        with torch.no_grad():
            weights["model.layers.3.self_attn.router_q_proj.0.weight"].mul_(10)
        after = forward_packed(decoder, [row]).doc_scores[3]
        assert torch.allclose(after[:, 1:], growth * before[:, 1:], rtol=1e-5)

    @pytest.mark.parametrize(
        "codes",
        [
            [-2, 2, 0],  # documents start at 1
            [-2, 1, 3, 0],  # and have no gaps
            [-2, 1, 2, 1, 0],  # and are whole
            [-2, 1, 0, 2, 0],  # and lie side by side
            [0, 1, 0],  # only the head comes before them
            [-3, 1, 0],
        ],
    )
    def test_other_layouts_are_refused(self, codes: list[int]) -> None:
        with pytest.raises(EngineError, match="laid out as template head"):
            PackedRow([1] * len(codes), codes, [0] * len(codes))

    def test_unusable_rows_are_named(self) -> None:
        with pytest.raises(EngineError, match="got 2, 1 and 1"):
            PackedRow([1, 2], [0], [0])
        with pytest.raises(EngineError, match="at least one; got 0"):
            PackedRow([], [], [])
        with pytest.raises(EngineError, match="document 2 of a packed row has no tokens"):
            pack(HEAD, [[1], []], [1], TAIL, [], question_position=5)
        with pytest.raises(EngineError, match="at least one packed row"):
            forward_packed(build(), [])
        with pytest.raises(EngineError, match="no memory routers"):
            forward_packed(Decoder(build().config), [example([3])])


def gradients(decoder: Decoder, loss: Tensor) -> dict[str, Tensor]:
    decoder.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def lm_labels(row: PackedRow) -> list[int]:
    return [token if code == -1 else -100 for token, code in zip(row.ids, row.codes, strict=True)]


class TestGradients:
    def test_the_lm_loss_trains_pooled_states_and_no_router(self) -> None:
        decoder = build()
        row = example([9, 20, 5])
        output = forward_packed(decoder, [row])
        found = gradients(decoder, next_token_loss(output, [lm_labels(row)]))
        assert not [name for name in found if "router" in name]
        assert len(found) == sum("router" not in name for name, _ in decoder.named_parameters())
        # The chosen documents' tokens are read through pooled states alone.
        embeddings = found["model.embed_tokens.weight"].abs().sum(1)
        assert all(embeddings[token] > 0 for token in row.ids[3:12])

    def test_the_router_loss_trains_routers_and_what_feeds_them(self) -> None:
        decoder = build()
        output = forward_packed(decoder, [example([9, 20, 5])])
        found = gradients(decoder, router_loss(output.doc_scores, [[0, 1, 0]]))
        routers = {name for name, _ in decoder.named_parameters() if "router" in name}
        assert routers <= set(found)
        assert all(found[name].abs().max() > 0 for name in routers)
        assert not [name for name in found if name.startswith(("model.layers.3.mlp", "model.norm"))]

    @pytest.mark.parametrize("mode", range(len(MODES)))
    def test_recomputing_activations_changes_no_gradient(self, mode: int) -> None:
        decoder = build(**MODES[mode])
        assert decoder.msa is not None
        rows = [example([9, 20, 5]), example([1, 33], 100)]
        results = []
        for recompute in (False, True):
            decoder.recompute = recompute
            output = forward_packed(decoder, rows)
            before = {layer: scores.clone() for layer, scores in output.doc_scores.items()}
            losses = training_loss(
                output,
                decoder.msa,
                num_layers=4,
                labels=[lm_labels(row) for row in rows],
                relevant=[[0, 1, 0], [1, 0]],
            )
            results.append(gradients(decoder, losses.total))
            assert all(torch.equal(before[layer], output.doc_scores[layer]) for layer in before)
        plain, recomputed = results
        assert plain.keys() == recomputed.keys()
        for name, gradient in plain.items():
            assert torch.allclose(gradient, recomputed[name], atol=1e-7), name

    @pytest.mark.parametrize("mode", range(len(MODES)))
    def test_gradients_are_those_of_finite_differences(self, mode: int) -> None:
        """In float64 weights, along one random direction per weight of the first router layer."""
        decoder = build(**MODES[mode]).double()
        msa, row = decoder.msa, example([9, 20, 5])
        assert msa is not None

        def total() -> Tensor:
            output = forward_packed(decoder, [row])
            labels, relevant = [lm_labels(row)], [[0, 1, 0]]
            return training_loss(output, msa, num_layers=4, labels=labels, relevant=relevant).total

        found = gradients(decoder, total())
        random = torch.Generator().manual_seed(3)
        for name, weight in decoder.named_parameters():
            if "layers.1." not in name or name not in found:
                continue
            direction = torch.randn(weight.shape, generator=random, dtype=torch.float64)
            direction *= 3 / found[name].norm()
            ends = []
            for step in (1e-4, -1e-4):
                with torch.no_grad():
                    weight.add_(direction, alpha=step)
                    ends.append(float(total()))
                    weight.sub_(direction, alpha=step)
            slope = float((found[name] * direction).sum())
            # Logits and scores leave the model in float32, which bounds what a difference can show.
            assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(slope, rel=0.02, abs=0.02), name


SCORES = {2: torch.tensor([[-math.inf, 0.3, -0.2, 0.1, 0.25], [-math.inf, 0.5, 0.4, -math.inf, -math.inf]])}
RELEVANT = [[1, 0, 0, 1], [0, 1]]


def plain_terms(scores: list[float], labels: list[int], tau: float, decouple: bool) -> list[float]:
    """-log p of each relevant document, written out."""
    e = [math.exp(score / tau) for score in scores]
    rest = [value for value, label in zip(e, labels, strict=True) if not label]
    return [
        -math.log(value / (value + sum(rest) if decouple else sum(e)))
        for value, label in zip(e, labels, strict=True)
        if label
    ]


class TestRouterLoss:
    @pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
    @pytest.mark.parametrize("tau", [0.05, 0.1, 0.5])
    @pytest.mark.parametrize(
        "method", ["INFONCE", "INFONCE_DECOUPLE", "INFONCE_FOCAL", "INFONCE_DECOUPLE_FOCAL"]
    )
    def test_contrastive_losses(self, method: str, tau: float, gamma: float) -> None:
        expected = []
        for scores, labels in zip(SCORES[2].tolist(), RELEVANT, strict=True):
            present = scores[1 : 1 + len(labels)]
            terms = plain_terms(present, labels, tau, "DECOUPLE" in method)
            if "FOCAL" in method:
                terms = [term * (1 - math.exp(-term)) ** gamma for term in terms]
            expected.append(sum(terms) / len(terms))
        found = router_loss(SCORES, RELEVANT, method=method, temperature=tau, gamma=gamma)
        assert float(found) == pytest.approx(sum(expected) / 2, rel=1e-5)

    def test_bce_leaves_the_labels_alone_and_does_not_divide_by_the_temperature(self) -> None:
        labels = [list(row) for row in RELEVANT]
        found = router_loss(SCORES, labels, method="BCE", temperature=0.1, bias=-0.2)
        assert labels == RELEVANT
        expected = []
        for scores, row in zip(SCORES[2].tolist(), RELEVANT, strict=True):
            signs = [
                (score - 0.2) * (1 if label else -1) for score, label in zip(scores[1:], row, strict=False)
            ]
            expected.append(sum(math.log1p(math.exp(-value)) for value in signs) / len(signs))
        assert float(found) == pytest.approx(sum(expected) / 2, rel=1e-5)
        bias = torch.tensor(-0.2, requires_grad=True)
        router_loss(SCORES, labels, method="BCE", bias=bias).backward()
        assert bias.grad is not None

    def test_the_default_is_equation_5(self) -> None:
        assert router_loss(SCORES, RELEVANT) == router_loss(SCORES, RELEVANT, method="INFONCE_DECOUPLE")

    def test_the_temperature_is_clamped(self) -> None:
        for given, used in ((5.0, 0.5), (0.0, 0.001), (-1.0, 0.001)):
            expected = router_loss(SCORES, RELEVANT, temperature=used)
            assert router_loss(SCORES, RELEVANT, temperature=given) == expected
            assert torch.isclose(router_loss(SCORES, RELEVANT, temperature=torch.tensor(given)), expected)

    def test_lower_layers_and_unlabelled_rows_take_no_part(self) -> None:
        worse = {1: -SCORES[2].nan_to_num(neginf=0), 2: SCORES[2]}
        assert router_loss(worse, RELEVANT, first_layer=2) == router_loss(SCORES, RELEVANT)
        only_second = router_loss({2: SCORES[2][1:]}, RELEVANT[1:])
        assert router_loss(SCORES, [None, RELEVANT[1]]) == only_second
        assert router_loss(SCORES, [[0, 0, 0, 0], RELEVANT[1]]) == only_second
        assert router_loss(SCORES, [None, None]) == 0
        assert router_loss(SCORES, RELEVANT, first_layer=3) == 0

    @pytest.mark.parametrize("method", ["INFONCE_DECOUPLE", "INFONCE_DECOUPLE_FOCAL", "INFONCE_FOCAL"])
    @pytest.mark.parametrize("labels", [[1, 1, 1], [1, 0, 0]])
    def test_extreme_scores_and_no_negatives_stay_finite(self, method: str, labels: list[int]) -> None:
        for values in ([1.0, 1.0, 1.0], [-1.0, 1.0, 1.0], [1.0, -1.0, -1.0]):
            scores = torch.tensor([[-math.inf, *values]], requires_grad=True)
            loss = router_loss({0: scores}, [labels], method=method, temperature=0.001)
            loss.backward()
            assert loss.isfinite()
            assert scores.grad is not None
            assert scores.grad.isfinite().all()

    def test_misuse_is_named(self) -> None:
        with pytest.raises(ConfigError, match="'NCE'; expected one of INFONCE"):
            router_loss(SCORES, RELEVANT, method="NCE")
        with pytest.raises(ConfigError, match=r"gamma is -1"):
            router_loss(SCORES, RELEVANT, gamma=-1)
        with pytest.raises(EngineError, match="4 documents but 3 relevance labels"):
            router_loss(SCORES, [[1, 0, 0], [0, 1]])


class TestTokenLosses:
    def test_next_token_loss_is_cross_entropy_of_the_token_before(self) -> None:
        decoder = build()
        rows = [example([9, 20]), example([4], 100)]
        output, logits = rows_of(decoder, rows)
        terms = []
        for row, own in zip(rows, logits, strict=True):
            shifted = own[:-1].log_softmax(-1)
            terms += [-shifted[at - 1, label] for at, label in enumerate(lm_labels(row)) if label >= 0]
        found = next_token_loss(output, [lm_labels(row) for row in rows])
        assert float(found.detach()) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)

    def test_labels_on_a_rows_first_token_and_no_labels(self) -> None:
        rows = [example([9]), example([4], 100)]
        output = forward_packed(build(), rows)
        nothing = [[-100] * len(row) for row in rows]
        assert next_token_loss(output, nothing) == 0
        first = [[7, *row[1:]] for row in nothing]
        assert next_token_loss(output, first) == 0
        with pytest.raises(EngineError, match="labels have rows of"):
            next_token_loss(output, [lm_labels(rows[0])])

    def test_the_total_is_the_weighted_sum_of_the_parts_given(self) -> None:
        decoder = build()
        row = example([9, 20])
        output = forward_packed(decoder, [row])
        msa = MSAConfig(router_layers=(1, 3), loss_weights={"lm": 0.1, "aux": 1.0, "rec": 2.0, "ans": 3.0})
        documents = [[t if c > 0 else -100 for t, c in zip(row.ids, row.codes, strict=True)]]
        answer, relevant = [lm_labels(row)], [[1, 0]]
        parts = training_loss(
            output,
            msa,
            num_layers=4,
            labels=answer,
            relevant=relevant,
            reconstruction=documents,
            answer=answer,
        )
        assert parts.lm is not None
        assert parts.router is not None
        assert parts.reconstruction is not None
        assert parts.answer is not None
        expected = 0.1 * parts.lm + parts.router + 2 * parts.reconstruction + 3 * parts.answer
        assert torch.isclose(parts.total, expected)
        upper = {3: output.doc_scores[3]}  # layer 1 of 4 is below half
        assert torch.isclose(parts.router, router_loss(upper, relevant))
        paper = training_loss(
            output, msa, num_layers=4, labels=answer, relevant=relevant, weights={"lm": 1.0, "aux": 0.1}
        )
        assert paper.answer is None
        assert torch.isclose(paper.total, parts.lm + 0.1 * parts.router)

    @pytest.mark.parametrize(("num_layers", "counted"), [(4, {2, 3, 4}), (5, {3, 4}), (6, {3, 4}), (8, {4})])
    def test_the_upper_half_starts_at_half_the_depth(self, num_layers: int, counted: set[int]) -> None:
        output = forward_packed(build(), [example([9, 20])])
        tables = {layer: torch.randn(1, 3).sigmoid() for layer in (2, 3, 4)}
        for table in tables.values():
            table[:, 0] = -math.inf
        swapped = replace(output, doc_scores=tables)
        msa = MSAConfig(router_layers=(2, 3, 4))
        found = training_loss(swapped, msa, num_layers=num_layers, relevant=[[1, 0]])
        expected = router_loss({layer: tables[layer] for layer in sorted(counted)}, [[1, 0]])
        assert found.router is not None
        assert torch.isclose(found.router, expected)
