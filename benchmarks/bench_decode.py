"""Decoding against `transformers`' `generate` with its cache: same weights, dtype, prompt and length."""

from __future__ import annotations

import torch
from common import arguments, compare, rate, report, texts
from transformers import AutoModelForCausalLM

from msa_memory.engine.bank import Selection
from msa_memory.engine.context import Feed, advance
from msa_memory.engine.engine import load_engine
from msa_memory.engine.models import DEFAULT_MODEL, resolve


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    folder, new = resolve(DEFAULT_MODEL), options.new_tokens
    engine = load_engine(folder, name=DEFAULT_MODEL, device=options.device)
    theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=engine.decoder.dtype).to(options.device).eval()
    )
    bank = engine.new_bank(lambda number: states[number])
    states = [engine.encode(number, "", text) for number, text in enumerate(texts(16, 100))]
    for number, passage in enumerate(states):
        bank.add(number, passage.router_keys)
    view = bank.view()
    slots = {layer: slot for slot, layer in enumerate(engine.msa.router_layers)}
    everything = {layer: Selection(tuple(range(16)), (0.0,) * 16) for layer in slots}
    figures = {}
    for words in (30, 600):
        prompt = engine.tokenizer.encode(texts(1, words)[0])

        def ours(memory: bool, prompt: list[int] = prompt) -> float:
            row = engine.start(view, capacity=len(prompt) + new)
            if memory:
                row.attend_to(everything, slots)
            token = int(advance(engine.decoder, [Feed(row, prompt)]).argmax())

            def decode() -> None:
                step = token
                for _ in range(new):
                    step = int(advance(engine.decoder, [Feed(row, [step])]).argmax())

            return rate(decode, new)

        def generate(prompt: list[int] = prompt) -> float:
            ids = torch.tensor([prompt], device=options.device)
            settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
            short = 1 / rate(lambda: theirs.generate(ids, max_new_tokens=1, **settings), 1)
            long = 1 / rate(
                lambda: theirs.generate(ids, min_new_tokens=new + 1, max_new_tokens=new + 1, **settings), 1
            )
            return new / (long - short)

        figures[f"{len(prompt)}_token_prompt"] = {
            "without_memory": compare(lambda: ours(False), generate, options.runs),
            "with_16_passages_in_every_router_layer": compare(lambda: ours(True), generate, options.runs),
        }
    report("decode", options, {"unit": "tokens/s", "dtype": str(engine.decoder.dtype), "prompts": figures})


if __name__ == "__main__":
    main()
