"""Needle in a haystack, in the manner of RULER (arXiv 2404.06654): numbers hidden in ordinary text.

``single``: one needle. ``multi_key``: needles with other keys beside it. ``multi_value``: one key, several
numbers, all asked for. ``multi_query``: several keys, all asked for. The haystack is encoded once: it grows
from size to size, needles are added for a trial and forgotten after it. An answer's score is the share of
the numbers asked for that it spells out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from msa_memory.errors import ConfigError
from msa_memory.evaluation import statistics
from msa_memory.evaluation.baselines import Retriever
from msa_memory.evaluation.haystack import Haystack, hide
from msa_memory.evaluation.journal import Journal, Row
from msa_memory.evaluation.subject import MEMORY, ROUTERS, WORDS, Subject, Text
from msa_memory.progress import progress_reporter

__all__ = ["KINDS", "NeedleOptions", "Trial", "draw_trial", "evaluate_needles"]

KINDS = ("single", "multi_key", "multi_value", "multi_query")
NEEDLES = 4
WHOLE = "whole_context"
_ADJECTIVES = (
    "amber brisk calm dusty eager faded gentle hollow icy jolly keen lofty mellow narrow oaken pale quiet "
    "rustic silent tidy upper vivid wavy young zesty"
).split()
_NOUNS = (
    "anchor basket candle drum engine feather garden hammer island jacket kettle lantern mirror needle "
    "orchard piano quarry ribbon saddle teapot umbrella violin wagon yard zither"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleOptions:
    """``sizes`` are tokens of the haystack in memory, ascending; ``trials`` questions per size and kind."""

    sizes: Sequence[int] = (16_384, 65_536)
    kinds: Sequence[str] = KINDS
    trials: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise ConfigError(f"needles of kind {unknown} are unknown; expected some of {', '.join(KINDS)}")
        if not self.sizes or sorted(set(self.sizes)) != list(self.sizes) or self.sizes[0] < 1:
            raise ConfigError(f"sizes are {list(self.sizes)}; expected token counts, ascending")
        if self.trials < 1:
            raise ConfigError(f"trials is {self.trials}; expected at least 1")


@dataclass(frozen=True, slots=True)
class Trial:
    """One question: the documents that hide its needles by id, which of them it is about, and the numbers."""

    question: str
    documents: dict[str, str]
    gold: tuple[str, ...]
    numbers: tuple[str, ...]


def draw_trial(kind: str, hosts: Sequence[str], seed: str) -> Trial:
    """A trial of a kind, the same for the same seed; each needle in another host text if there are enough."""
    rng = random.Random(seed)
    several = 1 if kind == "single" else NEEDLES
    keys = rng.sample([f"{adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS], several)
    if kind == "multi_value":
        keys = keys[:1] * several
    numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), several)]
    chosen = [hosts[at % len(hosts)] for at in rng.sample(range(max(several, len(hosts))), several)]
    documents = {
        f"needle-{place}": hide(host, _needle(key, number), rng)
        for place, (host, key, number) in enumerate(zip(chosen, keys, numbers, strict=True))
    }
    asked = 1 if kind in ("single", "multi_key") else several
    return Trial(_question(kind, keys), documents, tuple(documents)[:asked], tuple(numbers[:asked]))


def _needle(key: str, number: str) -> str:
    return f"One of the special magic numbers for {key} is: {number}."


def _question(kind: str, keys: Sequence[str]) -> str:
    if kind == "multi_value":
        return f"What are all the special magic numbers for {keys[0]}?"
    if kind == "multi_query":
        return f"What are the special magic numbers for {', '.join(keys[:-1])} and {keys[-1]}?"
    return f"What is the special magic number for {keys[0]}?"


def evaluate_needles(
    subject: Subject,
    haystack: Haystack,
    hosts: Sequence[str],
    options: NeedleOptions,
    journal: Journal,
    baselines: Mapping[str, Retriever] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Accuracy, recall and latency per size and kind, of the memory and of the baselines' retrieval.

    The baselines answer with the same model from what they find. ``whole_context`` reads everything where
    it fits the model's window.
    """
    retrievers = dict(baselines or {})
    rows = []
    for size in options.sizes:
        trials = {
            f"{size}/{kind}/{number}": kind for kind in options.kinds for number in range(options.trials)
        }
        tokens = 0
        if not all(key in journal for key in trials):
            tokens = _grow(subject, haystack, size, retrievers)
            note(f"{tokens:,} tokens of haystack in memory")
        with progress_reporter(None, len(trials), f"{size:,} tokens") as report:
            for done, (key, kind) in enumerate(trials.items(), 1):
                trial = draw_trial(kind, hosts, f"{options.seed}/{key}")
                row = journal.once(key, _examine, subject, trial, retrievers, tokens)
                rows.append({"size": size, "kind": kind, **row})
                report(done)
    return _summary(rows)


def _grow(subject: Subject, haystack: Haystack, size: int, retrievers: Mapping[str, Retriever]) -> int:
    """Fill the memory, and what it is compared with, up to ``size`` tokens; the tokens it then holds."""
    memory = subject.memory
    leftover = [document.id for document in memory.list(limit=1_000_000) if document.id.startswith("needle-")]
    if leftover:  # of a trial that was killed
        memory.forget(leftover)
    held = {document.id: document.tokens for document in memory.list(limit=1_000_000)}
    wanted, tokens = {}, 0
    for id, text in haystack:
        if tokens >= size:
            break
        wanted[id] = text
        tokens += held[id] if id in held else subject.tokens(text)
    if extra := held.keys() - wanted.keys():
        raise ConfigError(
            f"the memory holds {len(extra)} documents beyond the {size:,} tokens asked for (one is "
            f"{min(extra)!r}); give an empty folder, or the sizes in ascending order from the one it has"
        )
    items = [{"id": id, "content": text} for id, text in wanted.items()]
    subject.fill(items)
    for retriever in retrievers.values():
        retriever.add(wanted)
    return memory.stats.tokens


def _examine(subject: Subject, trial: Trial, retrievers: Mapping[str, Retriever], tokens: int) -> Row:
    """One trial, asked of everybody; the memory is as it was afterwards."""
    with _hidden(subject, trial, retrievers):
        ranked = subject.rank(trial.question, len(trial.gold)).ids
        results: dict[str, Row] = {
            name: {"found": _share(ranked[name], trial.gold)} for name in (MEMORY, ROUTERS, WORDS)
        }
        results[MEMORY] |= _ask_memory(subject, trial)
        for name, retriever in retrievers.items():
            results[name] = _ask_baseline(subject, trial, retriever)
        whole = subject.read_everything(trial.question)
        if whole is not None:
            results[WHOLE] = _score(trial, whole.text, whole.seconds)
    numbers = list(trial.numbers)
    return {"tokens": tokens, "question": trial.question, "numbers": numbers, "results": results}


@contextmanager
def _hidden(subject: Subject, trial: Trial, retrievers: Mapping[str, Retriever]) -> Iterator[None]:
    subject.fill([{"id": id, "content": text} for id, text in trial.documents.items()], progress=False)
    for retriever in retrievers.values():
        retriever.add(trial.documents)
    try:
        yield
    finally:
        subject.memory.forget(list(trial.documents))
        for retriever in retrievers.values():
            retriever.remove(trial.documents)


def _ask_memory(subject: Subject, trial: Trial) -> Row:
    """As people ask; where several numbers are wanted, for as many documents as there are needles."""
    options = {"k": len(trial.gold)} if len(trial.gold) > 1 else {}
    answer = subject.ask(trial.question, **options)
    ids = list(dict.fromkeys(source.id for source in answer.sources))
    return {
        **_score(trial, answer.text, answer.timings.total_s),
        "read": _share(ids, trial.gold),
        "route_s": answer.timings.route_s,
    }


def _ask_baseline(subject: Subject, trial: Trial, retriever: Retriever) -> Row:
    """The best documents of a retriever, as many as are needed to answer, read by the same model."""
    started = time.perf_counter()
    best = retriever.best(trial.question, len(trial.gold))
    route_s = time.perf_counter() - started
    texts = [Text.of(subject.memory.get(id)) for id in best]
    reading = subject.read(trial.question, texts)
    scored = _score(trial, reading.text, route_s + reading.seconds)
    return {**scored, "found": _share(best, trial.gold), "route_s": route_s}


def _score(trial: Trial, answer: str, seconds: float) -> Row:
    right = sum(number in answer for number in trial.numbers) / len(trial.numbers)
    return {"answer": answer, "accuracy": right, "seconds": seconds}


def _share(found: Sequence[str], gold: Sequence[str]) -> float:
    return len(set(found) & set(gold)) / len(gold)


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Per size, kind and system: accuracy, recall of the needles, latency."""
    sizes: dict[str, Any] = {}
    for size in dict.fromkeys(row["size"] for row in rows):
        some = [row for row in rows if row["size"] == size]
        kinds = {kind: [row for row in some if row["kind"] == kind] for kind in KINDS}
        sizes[str(size)] = {"tokens": some[0]["tokens"]} | {
            kind: _systems(of_kind) for kind, of_kind in kinds.items() if of_kind
        }
    return {"sizes": sizes}


def _systems(rows: Sequence[Row]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in rows[0]["results"]:
        results = [row["results"][name] for row in rows]
        figures[name] = {
            key: statistics.mean([result[key] for result in results])
            for key in ("accuracy", "found", "read")
            if key in results[0]
        } | {
            key: statistics.percentiles([result[key] for result in results])
            for key in ("seconds", "route_s")
            if key in results[0]
        }
    return figures
