"""Greedy answers to real questions: packed weights against exact ones, guessed tokens against none.

Each question is read with its gold passage and two others, once; the same prefill is then decoded with
exact weights, with packed ones a token at a time, and with packed ones and guessed tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import arguments, report

from msa_memory.engine.context import Feed, advance
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.generation import Generation, decode_ahead
from msa_memory.engine.models import DEFAULT_MODEL, resolve
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.engine.stepper import Stepper
from msa_memory.engine.train.data import Passage, Question, read_passages, read_questions
from msa_memory.evaluation.grading import exact, f1
from msa_memory.evaluation.statistics import spread

OPTIONS = SamplingOptions(max_new_tokens=32)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--passages", type=Path, nargs="+", required=True)
    parser.add_argument("--questions", type=Path, nargs="+", required=True)
    parser.add_argument("--answers", type=int, default=50)
    parser.add_argument("--log", type=Path, help="per-question JSON lines")
    options = parser.parse_args()
    packed = load_engine(resolve(DEFAULT_MODEL), name=DEFAULT_MODEL, device="cpu", decode_weights="packed")
    plain = load_engine(resolve(DEFAULT_MODEL), name=DEFAULT_MODEL, device="cpu", decode_weights="exact")
    assert packed.stepper is not None
    assert plain.stepper is not None
    passages = {passage.id: passage for passage in read_passages(options.passages)}
    rows = []
    for question in spread(read_questions(options.questions), options.answers):
        prompt = packed.prompt.reading(evidence(question, passages), question.text)
        ways = {
            "exact": (plain.stepper, ()),
            "packed": (packed.stepper, ()),
            "guessed": (packed.stepper, prompt),
        }
        said = {name: answer(packed, prompt, *way) for name, way in ways.items()}
        assert said["packed"]["ids"] == said["guessed"]["ids"], question.id
        rows.append({"id": question.id, "gold": question.answers, "said": said})
    if options.log:
        options.log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report("decode_answers", options, summary(rows))


def evidence(question: Question, passages: dict[str, Passage]) -> str:
    """The gold passage between two others of the file."""
    ids = list(passages)
    place = ids.index(question.gold[0])
    chosen = [ids[place - 1], question.gold[0], ids[(place + 1) % len(ids)]]
    return "\n".join(f"[2026-01-31] {passages[id].text.strip()}\n" for id in chosen)


def answer(engine: Engine, prompt: list[int], stepper: Stepper, known: list[int]) -> dict[str, Any]:
    """One greedy answer; ``known`` is what tokens are guessed from, none where it is empty."""
    generation = prefilled(engine, prompt, known)
    started = time.perf_counter()
    for _ in unguessed(stepper, generation) if not known else decode_ahead(stepper, generation):
        pass
    seconds = time.perf_counter() - started
    return {"ids": generation.ids, "text": generation.text.strip(), "seconds": seconds}


_prefills: dict[tuple[int, ...], Any] = {}


def prefilled(engine: Engine, prompt: list[int], known: list[int]) -> Generation:
    """A generation behind the prompt; the last prompt's prefill is kept and taken up again."""

    if tuple(prompt) not in _prefills:
        _prefills.clear()
        row = engine.start(None, capacity=len(prompt) + OPTIONS.max_new_tokens)
        logits = advance(engine.decoder, [Feed(row, prompt)])[0]
        _prefills[tuple(prompt)] = (row, logits, row.cache.length, row.position)
    row, logits, length, position = _prefills[tuple(prompt)]
    row.cache.truncate(length)
    row.position = position
    return Generation(engine.tokenizer, OPTIONS, row, logits, None, known)


def unguessed(stepper: Stepper, generation: Generation) -> Iterator[None]:
    while generation.finish_reason is None:
        row = generation.sequence
        logits = stepper.feed(generation.ids[-1:], row.position, row.cache)
        row.position += 1
        generation.accept(logits[0])
        yield


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {"questions": len(rows)}
    for way in ("exact", "packed", "guessed"):
        said = [(row["said"][way], row["gold"]) for row in rows]
        tokens = sum(len(one["ids"]) - 1 for one, _ in said)
        figures[way] = {
            "em": 100
            * sum(max(exact(one["text"], right) for right in gold) for one, gold in said)
            / len(rows),
            "f1": 100 * sum(max(f1(one["text"], right) for right in gold) for one, gold in said) / len(rows),
            "tokens_per_answer": tokens / len(rows),
            "tokens_per_s": tokens / sum(one["seconds"] for one, _ in said),
        }
    figures["same_answer_exact_and_packed"] = sum(
        row["said"]["exact"]["ids"] == row["said"]["packed"]["ids"] for row in rows
    )
    return figures


if __name__ == "__main__":
    main()
