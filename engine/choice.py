"""Which of a few short texts a question is about, by the model's own routers.

A small model cannot tell whether a message asks for a tool; its routers, trained to find texts for questions,
can. Knows texts and scores, not what they are for.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np

from msa_memory.engine.engine import Engine
from msa_memory.engine.states import PassageStates

__all__ = ["rank_texts"]

MOST_CACHED = 512


def rank_texts(engine: Engine, question: str, texts: Sequence[str], *, turns_before: str = "") -> list[float]:
    """Mean router score (-1..1) of each text for a question; what was said before it is read too."""
    states = [_encoded(engine, text) for text in texts]
    bank = engine.new_bank(states.__getitem__)
    for number, text_states in enumerate(states):
        bank.add(number, text_states.router_keys)
    view = bank.view(np.arange(len(states)))
    scores = engine.route(question, view, turns_before=turns_before).mean()
    return [float(score) for score in scores]


_cached: weakref.WeakKeyDictionary[Engine, dict[str, PassageStates]] = weakref.WeakKeyDictionary()


def _encoded(engine: Engine, text: str) -> PassageStates:
    """The states of a text, computed once per engine as long as there are not too many."""
    known = _cached.setdefault(engine, {})
    if text not in known:
        if len(known) >= MOST_CACHED:
            known.clear()
        known[text] = engine.encode(0, "", text)
    return known[text]
