"""A memory on a GPU through its own verbs: added, asked one by one and together, beside the plain way.

The plain way is the same memory on the same device without kernels, slots and batches of passages: routing
block by block, a forward pass per token, a passage at a time. Answers of both are compared. `--device cpu
--tiny` proves this script on the testing model, where Triton is not even asked: its figures mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from common import arguments, report, texts

from msa_memory import MemoryModel
from msa_memory.engine.device_stepper import DeviceStepper
from msa_memory.engine.engine import Engine
from msa_memory.engine.models import DEFAULT_MODEL
from msa_memory.types import Answer


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tiny", action="store_true", help="the testing model and toy sizes, for a CPU")
    parser.add_argument("--documents", type=int, default=2_000)
    parser.add_argument("--words", type=int, default=200)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    if options.tiny:
        options.documents, options.questions, options.new_tokens, options.runs = 6, 3, 4, 1
    elif not options.device.startswith("cuda"):
        print("bench_gpu_serving: measured on a CUDA device; --tiny proves this script on a CPU")
        return
    ways: dict[str, Any] = {}
    answers = {}
    for way in ("device", "plain"):
        Engine.uses_kernels = way == "device"  # type: ignore[assignment,method-assign]
        with opened(options) as memory:
            ways[way], answers[way] = measured(memory, options)
    same = sum(a.text == b.text for a, b in zip(*answers.values(), strict=True))
    sources = [[source.id for source in answer.sources] for answer in answers["device"]]
    report(
        "gpu_serving",
        options,
        {
            **ways,
            "ratios": {
                name: ways["device"][name] / ways["plain"][name]
                for name in ways["plain"]
                if name.endswith("_per_s")
            },
            "same_texts": same,
            "same_first_sources": sum(
                a[:1] == [source.id for source in b.sources][:1]
                for a, b in zip(sources, answers["plain"], strict=True)
            ),
            "questions": options.questions,
        },
    )


def opened(options: Any) -> MemoryModel:
    if options.tiny:
        from msa_memory.testing import open_memory

        return open_memory(device=options.device)
    return MemoryModel.open(model=DEFAULT_MODEL, device=options.device)


def measured(memory: MemoryModel, options: Any) -> tuple[dict[str, Any], list[Answer]]:
    documents = texts(options.documents, options.words)
    asked = [f"What is said about {text.split()[3]} and {text.split()[7]}?" for text in documents]
    asked = asked[: options.questions]
    started = time.perf_counter()
    memory.add_many([{"id": str(n), "content": text} for n, text in enumerate(documents)], progress=False)
    synchronise(options)
    figures: dict[str, Any] = {"added_per_s": len(documents) / (time.perf_counter() - started)}
    first = time.perf_counter()
    memory.query(asked[0], max_new_tokens=options.new_tokens)
    figures["first_question_s"] = time.perf_counter() - first  # plans, compiles and captures
    together(memory, asked, options)
    figures["alone_tokens_per_s"], figures["question_s"] = alone(memory, asked, options)
    figures["together_tokens_per_s"], answers = together(memory, asked, options)
    started = time.perf_counter()
    memory.search_many(asked, k=4)
    figures["searches_per_s"] = len(asked) / (time.perf_counter() - started)
    stepper = memory._engine().batch.stepper
    if isinstance(stepper, DeviceStepper):
        figures["fed_without_a_slot"] = stepper.plain
        figures["graphs"] = sorted(size for size, one in stepper._replays.items() if one._graph is not None)
    return figures, answers


def alone(memory: MemoryModel, asked: Sequence[str], options: Any) -> tuple[float, float]:
    started, tokens = time.perf_counter(), 0
    for question in asked:
        tokens += memory.query(question, max_new_tokens=options.new_tokens).usage.completion_tokens
    took = time.perf_counter() - started
    return tokens / took, took / len(asked)


def together(memory: MemoryModel, asked: Sequence[str], options: Any) -> tuple[float, list[Answer]]:
    started = time.perf_counter()
    answers = memory.query_many(list(asked), max_new_tokens=options.new_tokens)
    tokens = sum(answer.usage.completion_tokens for answer in answers)
    return tokens / (time.perf_counter() - started), answers


def synchronise(options: Any) -> None:
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
