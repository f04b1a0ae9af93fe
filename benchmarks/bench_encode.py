"""Encoding documents into states against `transformers`' own forward of the same weights.

`one_message` is what encoding a single message costs beside its forward pass, on the worker thread.

Opponent: LlamaModel (SDPA, same dtype and threads) over padded batches of the same passages, sorted by
length so that padding costs it little; it computes hidden states only, no states are pooled or kept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence

import torch
from common import arguments, compare, rate, report, texts
from transformers import AutoModelForCausalLM

from msa_memory.engine.encoding import encode_passage
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.models import DEFAULT_MODEL, resolve
from msa_memory.engine.worker import Worker


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
            for _ in engine.encode_many((number, "", text) for number, text in enumerate(passages)):
                pass

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
    report(
        "encode",
        options,
        {
            "unit": "tokens/s",
            "dtype": str(dtype),
            "lengths": figures,
            "one_message": one_message(engine, 10 * options.runs),
        },
    )


def one_message(engine: Engine, runs: int) -> dict[str, float]:
    """Median milliseconds of one short message: all of it, and its forward pass alone."""
    worker, text = Worker("benchmark"), texts(1, 20)[0]
    ids = engine.prompt.document(0, "", text)

    def encode() -> Generator[None, None, None]:
        engine.encode(0, "", text)
        yield

    def milliseconds(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - started)

    pairs = [
        (
            milliseconds(lambda: worker.run(encode())),
            milliseconds(lambda: encode_passage(engine.decoder, ids)),
        )
        for _ in range(runs)
    ]
    worker.close()
    whole, forward = (statistics.median(times) for times in zip(*pairs, strict=True))
    beside = statistics.median(a - b for a, b in pairs)
    return {"tokens": len(ids), "whole_ms": whole, "forward_ms": forward, "beside_ms": beside}


if __name__ == "__main__":
    main()
