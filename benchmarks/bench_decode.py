"""Decoding against `transformers`' `generate` with its cache: same prompt and length, weights as named.

`exact` decodes with the weights the opponent has, `packed` with the default model's own 4 bits, the adapter
beside them. The last figure is answers that copy evidence, decoded with and without guessed tokens. With
--gguf the second opponent is llama.cpp (`pip install llama-cpp-python`) on the backbone's own file, without
the adapter that ours carries.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import arguments, compare, rate, report, texts
from transformers import AutoModelForCausalLM

from msa_memory.engine.bank_view import Selection
from msa_memory.engine.context import Feed, Sequence, advance
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.generation import Generation, decode_ahead
from msa_memory.engine.models import DEFAULT_MODEL, resolve
from msa_memory.engine.sampling import SamplingOptions

COPIED = "The ferry to the island leaves from the second pier at a quarter past seven every weekday morning."


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--gguf", type=Path, help="the backbone's GGUF file, for llama.cpp to run")
    options = parser.parse_args()
    folder, new = resolve(DEFAULT_MODEL), options.new_tokens
    engine = load_engine(folder, name=DEFAULT_MODEL, device=options.device)
    exact = load_engine(folder, name=DEFAULT_MODEL, device=options.device, decode_weights="exact")
    theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=engine.decoder.dtype).to(options.device).eval()
    )
    figures, second = {}, {}
    for words in (30, 600):
        prompt = engine.tokenizer.encode(texts(1, words)[0])
        ids = torch.tensor([prompt], device=options.device)

        def generate(ids: torch.Tensor = ids) -> float:
            settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
            short = 1 / rate(lambda: theirs.generate(ids, max_new_tokens=1, **settings), 1)
            long = 1 / rate(
                lambda: theirs.generate(ids, min_new_tokens=new + 1, max_new_tokens=new + 1, **settings), 1
            )
            return new / (long - short)

        figures[f"{len(prompt)}_token_prompt"] = {
            name: compare(ours(which, prompt, new, memory), generate, options.runs)
            for name, which, memory in (
                ("exact", exact, False),
                ("packed", engine, False),
                ("packed_with_16_passages_in_every_router_layer", engine, True),
            )
        }
        if options.gguf:
            second[f"{len(prompt)}_token_prompt"] = compare(
                ours(engine, prompt, new, False), llama_cpp(options.gguf, prompt, new), options.runs
            )
    copying = compare(copied(engine, guess=True), copied(engine, guess=False), options.runs)
    report(
        "decode",
        options,
        {
            "unit": "tokens/s",
            "dtype": str(engine.decoder.dtype),
            "packed_bits": engine.stepper.bits if engine.stepper else None,
            "prompts": figures,
            "packed_against_llama_cpp": second or None,
            "guessed_tokens_on_a_copied_sentence": copying,
        },
    )


def ours(engine: Engine, prompt: list[int], new: int, memory: bool) -> Callable[[], float]:
    """Tokens per second of greedy decoding behind a prompt, with passages in every router layer or none."""
    states = [engine.encode(number, "", text) for number, text in enumerate(texts(16, 100))]
    bank = engine.new_bank(lambda number: states[number])
    for number, passage in enumerate(states):
        bank.add(number, passage.router_keys)
    slots = {layer: slot for slot, layer in enumerate(engine.msa.router_layers)}
    everything = {layer: Selection(tuple(range(16)), (0.0,) * 16) for layer in slots}

    def measure() -> float:
        row = engine.start(bank.view(), capacity=len(prompt) + new)
        if memory:
            row.attend_to(everything, slots)
        token = int(advance(engine.decoder, [Feed(row, prompt)]).argmax())
        step = stepped(engine, row)

        def decode() -> None:
            newest = token
            for _ in range(new):
                newest = int(step(newest).argmax())

        return rate(decode, new)

    return measure


def llama_cpp(gguf: Path, prompt: list[int], new: int) -> Callable[[], float]:
    """Tokens per second of llama.cpp's greedy decoding behind a prompt, on as many threads."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(str(gguf), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def measure() -> float:
        model.reset()
        model.eval(prompt)

        def decode() -> None:
            for _ in range(new):
                model.eval([model.sample(temp=0.0)])

        return rate(decode, new)

    return measure


def stepped(engine: Engine, row: Sequence) -> Callable[[int], torch.Tensor]:
    """Logits after one more token, computed as answers are."""

    def step(token: int) -> torch.Tensor:
        if engine.stepper is None:
            return advance(engine.decoder, [Feed(row, [token])])[0]
        row.position += 1
        return engine.stepper.feed([token], row.position - 1, row.cache)[0]

    return step


def copied(engine: Engine, *, guess: bool) -> Callable[[], float]:
    """Tokens per second while the model says a sentence of its prompt again."""
    prompt = engine.prompt.reading(COPIED, "Repeat the whole sentence about the ferry.")
    said = engine.tokenizer.encode(COPIED)

    def measure() -> float:
        row = engine.start(None, capacity=len(prompt) + len(said) + 1)
        logits = advance(engine.decoder, [Feed(row, prompt)])[0]
        generation = Generation(
            engine.tokenizer,
            SamplingOptions(max_new_tokens=len(said)),
            row,
            logits,
            _Saying(said, len(logits)),
            prompt if guess else (),
        )
        assert engine.stepper is not None
        started = time.perf_counter()
        count = sum(1 for _ in decode_ahead(engine.stepper, generation))
        return count / (time.perf_counter() - started)

    return measure


class _Saying:
    """Lets only one text be said, so that both ways say the same whatever the model would rather say."""

    def __init__(self, ids: list[int], vocabulary: int) -> None:
        self.ids, self.place = ids, 0
        self.mask = torch.zeros(vocabulary, dtype=torch.bool)

    @property
    def finished(self) -> bool:
        return self.place >= len(self.ids)

    def allowed(self) -> torch.Tensor:
        mask = self.mask.clone()
        mask[self.ids[self.place]] = True
        return mask

    def accept(self, token_id: int) -> None:
        self.place += 1


if __name__ == "__main__":
    main()
