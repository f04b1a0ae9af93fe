"""Questions made from passages alone, by the model itself, for those who have documents and nothing else.

A stretch of the passage is chosen as the answer, and the untuned model asks for it. What it writes counts
only if it is a question, does not give the answer away and speaks of the passage; else the sentence
around the answer becomes a question with a gap. So every answer stands in its passage. Which stretches are
chosen depends on the seed and the passage's id; a run that was killed goes on with the next batch.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from msa_memory.engine.engine import Engine
from msa_memory.engine.generation import decode_batch
from msa_memory.engine.lexical import COMMON_WORDS
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.engine.train.bm25 import words
from msa_memory.engine.train.data import Passage, read_passages
from msa_memory.engine.train.exercises import places
from msa_memory.engine.train.run import Paused
from msa_memory.errors import ConfigError

__all__ = ["QuestionMaking", "make_questions"]

BATCH = 8
PROMPT_TOKENS = 320
REQUEST = (
    'Text: {text}\n\nWrite one short question about this text. Its answer must be "{answer}". '
    "Write only the question."
)
GAP = 'What belongs in the gap: "{sentence}"?'
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]?")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][\w'-]+(?: (?:of |the )?[A-Z][\w'-]+)*|\b\d[\d,.]*\d\b|\b\d+\b")
_WORD = re.compile(r"\b[^\W\d_]{5,}\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionMaking:
    """How many questions per passage at most, and how long the model may write."""

    per_passage: int = 2
    max_new_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_passage < 1:
            raise ConfigError(f"per_passage is {self.per_passage}; it must be at least 1")


def make_questions(
    engine: Engine,
    passages: Sequence[Path],
    out: Path,
    making: QuestionMaking,
    *,
    deadline: float | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a question file for these passage files; returns the number of questions.

    A file that is there for the same texts, model and settings is left as it is; ``report`` is called with
    the number of passages done and all.

    Raises:
        Paused: the ``deadline`` (monotonic) is over; the next call goes on.
        ConfigError: no passage has anything to ask for.
    """
    texts = read_passages(list(passages))
    about = json.dumps([engine.fingerprint, REQUEST, GAP, repr(making), [(p.id, p.text) for p in texts]])
    cache = _Cache(out.with_suffix(".partial"), hashlib.sha256(about.encode()).hexdigest())
    if out.exists() and cache.finished(out):
        return sum(1 for _ in out.open(encoding="utf-8"))
    rows = cache.read()
    for number in range(len(rows), (len(texts) + BATCH - 1) // BATCH):
        if deadline is not None and time.monotonic() >= deadline:
            raise Paused(f"making questions stopped after {number * BATCH} of {len(texts)} passages")
        part = texts[number * BATCH : (number + 1) * BATCH]
        made = _ask(engine, part, making)
        cache.append(made)
        rows.append(made)
        report(min(len(texts), (number + 1) * BATCH), len(texts))
    questions = [question for batch in rows for question in batch]
    if not questions:
        raise ConfigError(f"none of the {len(texts)} passages has a name, a number or a long word to ask for")
    cache.finish(out, questions)
    return len(questions)


class _Cache:
    """Questions of the batches done, one line each after a line that says of which run."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        self.done = path.with_suffix(".made")

    def finished(self, out: Path) -> bool:
        found = self.done.read_text(encoding="utf-8") if self.done.exists() else ""
        return found == f"{self.run} {hashlib.sha256(out.read_bytes()).hexdigest()}"

    def read(self) -> list[list[dict[str, object]]]:
        """The batches of this run; what a kill cut off and another run's are dropped."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if not whole or whole[0] != f"{self.run}\n":
            whole = [f"{self.run}\n"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(whole), encoding="utf-8")
        scratch.replace(self.path)
        return [json.loads(line) for line in whole[1:]]

    def append(self, batch: Sequence[dict[str, object]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(batch) + "\n")

    def finish(self, out: Path, questions: Sequence[dict[str, object]]) -> None:
        scratch = out.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
        scratch.replace(out)
        self.done.write_text(f"{self.run} {hashlib.sha256(out.read_bytes()).hexdigest()}", encoding="utf-8")
        self.path.unlink()


def _ask(engine: Engine, passages: Sequence[Passage], making: QuestionMaking) -> list[dict[str, object]]:
    """Questions about a batch of passages."""
    wanted = [
        (passage, *spot)
        for passage in passages
        for spot in _spots(passage, random.Random(f"{making.seed}:{passage.id}"), making.per_passage)
    ]
    written = _write(engine, [(sentence, answer) for _, sentence, answer in wanted], making)
    rows: list[dict[str, object]] = []
    for (passage, sentence, answer), text in zip(wanted, written, strict=True):
        question = _usable(text, passage, answer)
        rows.append(
            {
                "id": f"{passage.id}:{len(rows)}",
                "question": question or GAP.format(sentence=_gapped(sentence, answer)),
                "passage_ids": [passage.id],
                "answers": [answer],
                "source": "written" if question else "gap",
            }
        )
    return rows


def _spots(passage: Passage, rng: random.Random, most: int) -> list[tuple[str, str]]:
    """Sentences of the passage and what to ask for in each: a name, a number, else a long word."""
    found = []
    for sentence in (match[0].strip() for match in _SENTENCE.finditer(passage.text)):
        if len(words(sentence)) < 4:
            continue
        names = [match[0] for match in _NAME.finditer(sentence)]
        rare = [word for word in _WORD.findall(sentence) if word.lower() not in COMMON_WORDS]
        answers = [answer for answer in names or rare if places(passage.text, answer)]
        if answers:
            found.append((sentence, rng.choice(answers)))
    rng.shuffle(found)
    return found[:most]


def _write(engine: Engine, asked: Sequence[tuple[str, str]], making: QuestionMaking) -> list[str]:
    """What the model writes when it is asked for a question."""
    options = SamplingOptions(max_new_tokens=making.max_new_tokens)
    prompts = [
        REQUEST.format(text=sentence[: 4 * PROMPT_TOKENS], answer=answer) for sentence, answer in asked
    ]
    running = [engine.chat(engine.chat_ids([("user", prompt)]), options) for prompt in prompts]
    for _ in decode_batch(engine.decoder, running):
        pass
    return [generation.text for generation in running]


def _usable(text: str, passage: Passage, answer: str) -> str | None:
    """The question in what was written; None unless it is one that only this kind of passage answers."""
    question, mark, _ = text.strip().partition("?")
    question = question.rsplit("\n", 1)[-1].strip().strip('"')
    said = set(words(question)) - COMMON_WORDS
    there = set(words(f"{passage.title or ''} {passage.text}"))
    if not mark or not 3 <= len(words(question)) <= 40 or places(question, answer):
        return None
    return f"{question}?" if len(said & there) >= 2 else None


def _gapped(sentence: str, answer: str) -> str:
    for start, stop in reversed(places(sentence, answer)):
        sentence = f"{sentence[:start]}___{sentence[stop:]}"
    return sentence.rstrip(".!?")
