"""Long conversations in LoCoMo's file format (arXiv 2402.17753): evidence recall and scores per category.

Every turn is a document with its speaker and date; every conversation has a namespace of its own. F1 is
SQuAD's, over whole words, not the stemmed one of LoCoMo's authors. An adversarial question is right if it
is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msa_memory.errors import ConfigError
from msa_memory.evaluation import statistics
from msa_memory.evaluation.baselines import Retriever
from msa_memory.evaluation.grading import grade
from msa_memory.evaluation.journal import Journal, Row
from msa_memory.evaluation.subject import Subject
from msa_memory.memory import MemoryModel
from msa_memory.progress import progress_reporter

__all__ = ["CATEGORIES", "Conversation", "Probe", "evaluate_conversations", "read_conversations"]

CATEGORIES = {1: "multi_hop", 2: "temporal", 3: "open_domain", 4: "single_hop", 5: "adversarial"}
KS = (5, 10)
_TURN = re.compile(r"D\d+:\d+")
_WHEN = re.compile(r"(\d+):(\d+) ([ap])m on (\d+) (\w+), (\d+)")


@dataclass(frozen=True, slots=True)
class Probe:
    """A question about a conversation; ``evidence`` are the ids of the turns that answer it."""

    id: str
    question: str
    answer: str
    evidence: tuple[str, ...]
    category: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation as ``add_many`` takes it, and its questions."""

    id: str
    turns: tuple[dict[str, Any], ...]
    probes: tuple[Probe, ...]


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a file. Raises ConfigError saying which one is off and how."""
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(samples, list) or not samples:
        raise ConfigError(f"{path} is no LoCoMo file: expected a list of conversations")
    found = []
    for number, sample in enumerate(samples):
        try:
            id = str(sample.get("sample_id", number))
            turns = tuple(_turns(sample["conversation"]))
            found.append(Conversation(id, turns, tuple(_probes(id, sample["qa"]))))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"conversation {number} of {path} is not in LoCoMo's form: {error!r}"
            ) from error
    return found


def _turns(conversation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One document per turn, in order; a picture's caption counts as part of what was said."""
    sessions = sorted(int(name[8:]) for name in conversation if re.fullmatch(r"session_\d+", name))
    for session in sessions:
        when = _read_time(conversation[f"session_{session}_date_time"])
        for turn in conversation[f"session_{session}"]:
            caption = turn.get("blip_caption")
            said = " ".join(part for part in (turn["text"], f"[shares {caption}]" if caption else "") if part)
            if said.strip():
                metadata = {"speaker": turn["speaker"]}
                yield {"id": turn["dia_id"], "content": said, "metadata": metadata, "timestamp": when}


def _read_time(text: str) -> datetime:
    """``1:56 pm on 8 May, 2023`` as UTC."""
    match = _WHEN.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"the date {text!r} is not like '1:56 pm on 8 May, 2023'")
    hour, minute, half, day, month, year = match.groups()
    written = f"{hour} {minute} {half}m {day} {month[:3]} {year}"
    return datetime.strptime(written, "%I %M %p %d %b %Y").replace(tzinfo=UTC)


def _probes(sample: str, questions: Sequence[dict[str, Any]]) -> Iterator[Probe]:
    for number, row in enumerate(questions):
        category = CATEGORIES[int(row["category"])]
        evidence = tuple(dict.fromkeys(_TURN.findall(" ".join(map(str, row.get("evidence") or ())))))
        yield Probe(f"{sample}/{number}", row["question"], str(row.get("answer", "")), evidence, category)


def evaluate_conversations(
    memory: MemoryModel,
    conversations: Sequence[Conversation],
    journal: Journal,
    *,
    questions: int | None = None,
    baselines: Callable[[], Mapping[str, Retriever]] = dict,
) -> dict[str, Any]:
    """Evidence recall and answers, in all and per category; at most ``questions`` of each conversation.

    ``baselines`` makes retrievers for one conversation; they see the same turns, with speaker.
    """
    rows: list[Row] = []
    for conversation in conversations:
        subject = Subject(memory.namespace(f"conversation {conversation.id}"))
        subject.fill(conversation.turns)
        retrievers = baselines()
        for retriever in retrievers.values():
            retriever.add(
                {
                    turn["id"]: f"{turn['metadata']['speaker']}: {turn['content']}"
                    for turn in conversation.turns
                }
            )
        probes = statistics.spread(conversation.probes, questions)
        with progress_reporter(None, len(probes), conversation.id) as report:
            for done, probe in enumerate(probes, 1):
                rows.append(journal.once(probe.id, _examine, subject, probe, retrievers))
                report(done)
    named = {name: [row for row in rows if row["category"] == name] for name in CATEGORIES.values()}
    return {
        "conversations": len(conversations),
        "turns": sum(len(conversation.turns) for conversation in conversations),
        "all": _summary(rows),
        "categories": {name: _summary(some) for name, some in named.items() if some},
    }


def _examine(subject: Subject, probe: Probe, retrievers: Mapping[str, Retriever]) -> Row:
    ranked = dict(subject.rank(probe.question, max(KS)).ids)
    ranked |= {name: one.best(probe.question, max(KS)) for name, one in retrievers.items()}
    answer = subject.ask(probe.question)
    adversarial = probe.category == CATEGORIES[5]
    scores = {"refused": float(not answer.found)}
    if not adversarial:
        scores |= grade(answer.text, [probe.answer])
    scores["score"] = scores["refused"] if adversarial else scores["f1"]
    for name, ids in ranked.items() if probe.evidence else ():
        for k in KS:
            shared = set(ids[:k]).intersection(probe.evidence)
            scores[f"{name}_recall@{k}"] = len(shared) / len(probe.evidence)
    if probe.evidence:
        shown = {source.id for source in answer.sources}
        scores["evidence_read"] = len(shown.intersection(probe.evidence)) / len(probe.evidence)
    return {
        "question": probe.question,
        "category": probe.category,
        "gold": probe.answer,
        "answer": answer.text,
        "evidence": list(probe.evidence),
        "seconds": answer.timings.total_s,
        "scores": scores,
    }


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    keys = dict.fromkeys(key for row in rows for key in row["scores"])
    figures: dict[str, Any] = {
        key: statistics.mean([row["scores"][key] for row in rows if key in row["scores"]]) for key in keys
    }
    figures["seconds"] = statistics.percentiles([row["seconds"] for row in rows])
    return figures
