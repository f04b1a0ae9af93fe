"""Made-up memories that changed their mind: two dated statements disagree, and the newer one is right.

No question file teaches a model that memories age, so these are generated: people, things they have that
change, an old and a new statement of each, other people beside them. Deterministic per seed and index.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import date, timedelta

__all__ = ["Conflict", "Fact", "conflict", "facts"]

NAMES = (
    "Ada Alice Amir Anna Ben Carla Chen Clara Daniel Diego Elena Emma Erik Fatima Felix Grace Hana Hugo "
    "Ines Ivan Jack Jana Jonas Julia Karl Laura Leo Lena Liam Lucia Maja Marco Maria Martin Mia Milan "
    "Nadia Nina Noah Nora Olga Omar Oscar Paul Petra Priya Rosa Ruth Sara Simon Sofia Tara Theo Tom "
    "Vera Victor Yuki Zoe"
).split()
PLACES = (
    "Athens Berlin Boston Cairo Chicago Cologne Dublin Edinburgh Geneva Hamburg Helsinki Krakow Leeds "
    "Leipzig Lima Lisbon London Lyon Madrid Manila Milan Montreal Munich Nairobi Naples Paris Porto "
    "Prague Riga Rome Seattle Seville Sydney Tokyo Toronto Turin Utrecht Vienna Warsaw Zurich"
).split()
JOBS = (
    "a nurse|a teacher|a baker|a carpenter|a pilot|a librarian|a translator|a gardener|"
    "an accountant|a chemist|a photographer|an electrician|a dentist|a journalist|a cook|a lawyer|"
    "a tailor|a bus driver|a surveyor"
).split("|")
THINGS = (
    "red|blue|green|yellow|black|white|grey|orange",
    "a cat|a dog|a parrot|two rabbits|a tortoise|a hamster|three hens",
    "tea|coffee|cocoa|lemonade|apple juice|mint tea",
    "chess|tennis|the cello|the piano|rowing|climbing|judo|the flute",
)
COLOURS, PETS, DRINKS, HOBBIES = (options.split("|") for options in THINGS)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TIMES = [f"{hour}:{minute}" for hour in range(7, 21) for minute in ("00", "15", "30", "45")]


@dataclass(frozen=True, slots=True)
class _Kind:
    """One thing that changes: what it may be, how it is told at first and later, how it is asked for."""

    values: list[str]
    first: tuple[str, ...]
    later: tuple[str, ...]
    questions: tuple[str, ...]


_KINDS = (
    _Kind(
        PLACES,
        (
            "{n} lives in {v}.",
            "{n} has a flat in {v}.",
            "Home for {n} is {v}.",
            "{n} is living in {v} these days.",
        ),
        (
            "{n} lives in {v}.",
            "{n} moved to {v}.",
            "{n} has settled in {v} now.",
            "{n}'s new home is in {v}.",
        ),
        ("Where does {n} live?", "Which city does {n} live in?", "Where is {n}'s home now?"),
    ),
    _Kind(
        JOBS,
        ("{n} works as {v}.", "{n} is {v}.", "{n} earns a living as {v}."),
        ("{n} works as {v}.", "{n} became {v}.", "{n} is now {v}.", "{n} started a new job as {v}."),
        ("What does {n} do for work?", "What is {n}'s job?", "What does {n} work as?"),
    ),
    _Kind(
        COLOURS,
        ("{n}'s car is {v}.", "{n} drives a car painted {v}."),
        ("{n}'s car is {v}.", "{n} had the car painted {v}.", "{n} bought another car, it is {v}."),
        ("What colour is {n}'s car?", "Which colour does {n}'s car have?"),
    ),
    _Kind(
        PETS,
        ("{n} has {v}.", "{n} keeps {v} at home."),
        ("{n} has {v} now.", "{n} gave the old pet away and keeps {v}."),
        ("What pet does {n} have?", "Which animal lives with {n}?"),
    ),
    _Kind(
        DRINKS,
        ("{n} likes {v} best.", "{n}'s favourite drink is {v}."),
        ("{n}'s favourite drink is {v}.", "{n} has gone over to {v}.", "{n} prefers {v} now."),
        ("What does {n} like to drink?", "What is {n}'s favourite drink?"),
    ),
    _Kind(
        HOBBIES,
        ("{n} takes lessons in {v}.", "{n} spends the weekends on {v}."),
        ("{n} takes lessons in {v} now.", "{n} gave that up and took to {v}."),
        ("What is {n}'s hobby?", "What does {n} take lessons in?"),
    ),
    _Kind(
        DAYS,
        ("{n}'s class is on {v}.", "The meeting with {n} is on {v}."),
        (
            "{n} moved it to {v}.",
            "The meeting with {n} was put off to {v}.",
            "{n}'s class is on {v} from now on.",
        ),
        ("On which day is it with {n}?", "Which day does {n} have now?"),
    ),
    _Kind(
        TIMES,
        ("{n}'s train leaves at {v}.", "{n} arrives at {v}."),
        ("{n}'s train now leaves at {v}.", "{n} will arrive at {v} instead.", "{n} arrives at {v}."),
        ("When is {n}'s train?", "What time is it for {n}?", "At what time does {n} come or go?"),
    ),
)


@dataclass(frozen=True, slots=True)
class Conflict:
    """Dated statements oldest first, a question about one thing that changed, and the newest answer."""

    entries: tuple[tuple[date, str], ...]
    question: str
    answer: str


def conflict(seed: int, index: int) -> Conflict:
    """The sample of this number: two statements that disagree among up to three of other people."""
    draw = random.Random(f"{seed}:{index}")
    names = draw.sample(NAMES, 4)
    kind = draw.choice(_KINDS)
    old, new = draw.sample(kind.values, 2)
    day = date(2020, 1, 1) + timedelta(days=draw.randrange(1500))
    later = day + timedelta(days=draw.randrange(1, 900))
    entries = [
        (day, draw.choice(kind.first).format(n=names[0], v=old)),
        (later, draw.choice(kind.later).format(n=names[0], v=new)),
    ]
    for other in names[1 : 1 + draw.randrange(4)]:
        beside = draw.choice(_KINDS) if draw.random() < 0.5 else kind
        when = date(2020, 1, 1) + timedelta(days=draw.randrange(2400))
        entries.append((when, draw.choice(beside.first).format(n=other, v=draw.choice(beside.values))))
    question = draw.choice(kind.questions).format(n=names[0])
    return Conflict(tuple(sorted(entries)), question, new)


@dataclass(frozen=True, slots=True)
class Fact:
    """A statement about a person, a question about it, and the answer."""

    text: str
    question: str
    answer: str


def facts(rng: random.Random, each: int = 4) -> list[Fact]:
    """So many facts about each of the people."""
    found = []
    for name in NAMES:
        for kind in rng.sample(_KINDS, each):
            value = rng.choice(kind.values)
            text, question = rng.choice(kind.first), rng.choice(kind.questions)
            found.append(Fact(text.format(n=name, v=value), question.format(n=name), value))
    return found
