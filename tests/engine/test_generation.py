"""Decoding on the tiny model: stop tokens and strings, limits, text that is safe to show, batches."""

from collections.abc import Callable

import pytest
import torch

from msa_memory.engine.context import Feed, advance
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.generation import Generation, decode, decode_batch
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.testing import tiny_model

Start = Callable[..., Generation]
QUESTION = "Who lives in the emerald city?"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(tiny_model(), device="cpu")


@pytest.fixture
def start(engine: Engine) -> Start:
    """A generation right behind the prefill of a question."""

    def begin(question: str = QUESTION, **options: object) -> Generation:
        row = engine.start(None)
        logits = advance(engine.decoder, [Feed(row, engine.prompt.reading("", question))])
        return Generation(engine.tokenizer, SamplingOptions(**options), row, logits[0])

    return begin


def test_greedy_decoding_repeats_itself_and_ends_at_the_limit(engine: Engine, start: Start) -> None:
    first, second = start(max_new_tokens=20), start(max_new_tokens=20)
    assert list(decode(engine.decoder, first)) == list(decode(engine.decoder, second))
    assert first.ids == second.ids
    assert len(first.ids) == 20
    assert first.finish_reason == "length"


def test_pieces_make_up_the_text_one_per_token(engine: Engine, start: Start) -> None:
    generation = start(max_new_tokens=30)
    pieces = list(decode(engine.decoder, generation))
    assert len(pieces) == 30
    assert "".join(pieces) == generation.text == engine.tokenizer.decode(generation.ids, skip_special=True)


def test_one_token_is_chosen_from_the_prefill_alone(engine: Engine, start: Start) -> None:
    generation = start(max_new_tokens=1)
    assert generation.finish_reason == "length"
    fed = generation.sequence.fed_tokens
    assert len(list(decode(engine.decoder, generation))) == 1
    assert generation.sequence.fed_tokens == fed, "nothing was fed after the only token"


def test_cached_decoding_equals_feeding_everything_at_once(engine: Engine, start: Start) -> None:
    generation = start(max_new_tokens=12)
    for _ in decode(engine.decoder, generation):
        pass
    prompt = engine.prompt.reading("", QUESTION)
    for count in (1, 6, 11):
        row = engine.start(None)
        logits = advance(engine.decoder, [Feed(row, prompt + generation.ids[:count])])
        assert int(logits[0].argmax()) == generation.ids[count]


@pytest.mark.parametrize("length", [2, 5, 11])
def test_a_stop_string_ends_the_answer_wherever_tokens_end(engine: Engine, start: Start, length: int) -> None:
    whole = start(max_new_tokens=30)
    for _ in decode(engine.decoder, whole):
        pass
    for at in range(3, len(whole.text) - length, 7):
        stop = whole.text[at : at + length]
        generation = start(max_new_tokens=30, stop=(stop,))
        shown = "".join(decode(engine.decoder, generation))
        assert shown == generation.text == whole.text[: whole.text.index(stop)]
        assert generation.finish_reason == "stop"


def test_a_stop_string_that_never_comes_costs_no_text(engine: Engine, start: Start) -> None:
    whole, other = start(max_new_tokens=15), start(max_new_tokens=15)
    text = "".join(decode(engine.decoder, whole))
    stopped = start(max_new_tokens=15, stop=(text[-3:] + "never",))
    assert "".join(decode(engine.decoder, stopped)) == "".join(decode(engine.decoder, other)) == text
    assert stopped.finish_reason == "length"


def test_a_stop_token_ends_the_answer_and_is_not_shown(engine: Engine, start: Start) -> None:
    generation = start(max_new_tokens=30)
    (end,) = engine.tokenizer.stop_ids
    logits = torch.zeros(engine.tokenizer.vocab_size)
    logits[end] = 1.0
    before = generation.text
    generation.accept(logits)
    assert generation.finish_reason == "stop"
    assert generation.ids[-1] == end
    assert generation.text == before
    assert list(decode(engine.decoder, generation)) == [before], "a finished generation feeds nothing"


def test_half_a_character_waits_for_the_other_half(engine: Engine, start: Start) -> None:
    generation = start(max_new_tokens=30)
    generation.take()
    before = generation.text
    for token in engine.tokenizer.encode("é")[:-1]:
        generation.accept(
            torch.nn.functional.one_hot(torch.tensor(token), engine.tokenizer.vocab_size).float()
        )
        assert "\ufffd" not in generation.take()
    last = engine.tokenizer.encode("é")[-1]
    generation.accept(torch.nn.functional.one_hot(torch.tensor(last), engine.tokenizer.vocab_size).float())
    assert generation.text.removeprefix(before).endswith("é")


def test_a_batch_equals_its_rows_alone(engine: Engine, start: Start) -> None:
    questions = [QUESTION, "What did the lion want?", "Oz"]
    limits = [25, 4, 12]
    alone = [start(question, max_new_tokens=limit) for question, limit in zip(questions, limits, strict=True)]
    for generation in alone:
        for _ in decode(engine.decoder, generation):
            pass
    together = [start(question, max_new_tokens=n) for question, n in zip(questions, limits, strict=True)]
    steps = sum(1 for _ in decode_batch(engine.decoder, together))
    assert [generation.ids for generation in together] == [generation.ids for generation in alone]
    assert steps == max(limits) - 1, "all rows advance in every step"


def test_sampling_with_a_seed_repeats_itself(engine: Engine, start: Start) -> None:
    texts = []
    for seed in (1, 1, 2):
        generation = start(max_new_tokens=20, temperature=1.5, top_p=1.0, seed=seed)
        texts.append("".join(decode(engine.decoder, generation)))
    assert texts[0] == texts[1] != texts[2]
