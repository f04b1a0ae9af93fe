"""Encoding documents into states against `transformers`' own forward of the same weights.

Opponent: LlamaModel (SDPA, same dtype and threads) over padded batches of the same passages, sorted by
length so that padding costs it little; it computes hidden states only, no states are pooled or kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import arguments, compare, rate, report, texts
from transformers import AutoModelForCausalLM

from msa_memory.engine.engine import load_engine
from msa_memory.engine.models import DEFAULT_MODEL, resolve


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="passages per batch of the opponent")
    options = parser.parse_args()
    folder = resolve(DEFAULT_MODEL)
    engine = load_engine(folder, name=DEFAULT_MODEL, device=options.device)
    dtype = engine.decoder.dtype
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device).eval().model
    figures = {}
    for words in (40, 120, 300):
        passages = texts(options.passages, words)
        ids = sorted((engine.tokenizer.encode(text) for text in passages), key=len)
        tokens = sum(map(len, ids))

        def encode(passages: Sequence[str] = passages) -> None:
            for number, text in enumerate(passages):
                engine.encode(number, "", text)

        def forward(ids: list[list[int]] = ids) -> None:
            for start in range(0, len(ids), options.batch):
                part = ids[start : start + options.batch]
                width = max(map(len, part))
                batch = torch.tensor([row + [0] * (width - len(row)) for row in part], device=options.device)
                mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
                theirs(batch, attention_mask=mask.to(options.device), use_cache=False)

        figures[f"{words}_words"] = {
            "tokens_per_passage": tokens / len(ids),
            **compare(
                lambda tokens=tokens: rate(encode, tokens),
                lambda tokens=tokens: rate(forward, tokens),
                options.runs,
            ),
        }
    report("encode", options, {"unit": "tokens/s", "dtype": str(dtype), "lengths": figures})


if __name__ == "__main__":
    main()
