"""Plain conversations answered by the untuned model, so that tuning on reading does not cost it its chat."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from msa_memory.engine.engine import Engine
from msa_memory.engine.generation import decode_batch
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.engine.train.mixture import Chat

__all__ = ["own_answers", "plain_prompts"]

REQUESTS = (
    "Hello!",
    "Hi, how are you today?",
    "Who are you?",
    "What can you help me with?",
    "Tell me a joke.",
    "Write a short poem about rain.",
    "Give me three tips for a good night's sleep.",
    "Write a two-sentence story about a lighthouse.",
    "How do I boil an egg?",
    "Explain what a computer program is to a child.",
    "Suggest a name for a cat.",
    "What is the capital of Italy?",
    "Translate 'good morning' into French.",
    "What should I cook for dinner tonight?",
    "Thank you for your help.",
    "Write a polite email that declines a meeting.",
)
ABOUT = ("What is {title}?", "Tell me about {title}.", "Write a short paragraph about {title}.")


def plain_prompts(titles: Sequence[str], questions: Sequence[str], count: int, seed: int) -> list[str]:
    """``count`` prompts: everyday requests, titles to write about and questions, without repeats."""
    rng = random.Random(f"{seed}:chat")
    names = sorted(set(titles))
    about = [rng.choice(ABOUT).format(title=title) for title in rng.sample(names, min(count, len(names)))]
    asked = rng.sample(questions, min(count, len(questions)))
    mixed = [prompt for pair in zip(about, asked, strict=False) for prompt in pair]
    return list(dict.fromkeys([*REQUESTS, *mixed]))[:count]


def own_answers(
    engine: Engine, prompts: Sequence[str], cache: Path, *, max_new_tokens: int = 40, batch: int = 24
) -> list[Chat]:
    """The engine's greedy answers; those in ``cache`` (JSON lines) are not generated again."""
    known = {}
    if cache.exists():
        known = {row["prompt"]: row["answer"] for row in map(json.loads, cache.read_text().splitlines())}
    missing = [prompt for prompt in prompts if prompt not in known]
    with cache.open("a", encoding="utf-8") as file:
        for start in range(0, len(missing), batch):
            some = missing[start : start + batch]
            for prompt, answer in zip(some, _generate(engine, some, max_new_tokens), strict=True):
                known[prompt] = answer
                file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
            file.flush()
    return [Chat(tuple(engine.chat_ids([("user", prompt)])), tuple(known[prompt])) for prompt in prompts]


def _generate(engine: Engine, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    options = SamplingOptions(max_new_tokens=max_new_tokens)
    running = [engine.chat(engine.chat_ids([("user", prompt)]), options) for prompt in prompts]
    for _ in decode_batch(engine.decoder, running):
        pass
    return [generation.ids for generation in running]
