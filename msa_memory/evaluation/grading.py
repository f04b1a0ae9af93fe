"""Whether an answer is right: exact match and F1 after SQuAD's normalisation, and refusals."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["contains", "exact", "f1", "grade", "normal"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal(text: str) -> str:
    """Lower-cased, without punctuation, articles and outer or repeated whitespace."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(given: str, right: str) -> bool:
    """Whether two answers are the same once normalised."""
    return normal(given) == normal(right)


def f1(given: str, right: str) -> float:
    """Harmonic mean of the shares of words that two answers have in common."""
    said, wanted = normal(given).split(), normal(right).split()
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def contains(given: str, right: str) -> bool:
    """Whether an answer holds the right one as whole words, once normalised."""
    return bool(normal(right)) and f" {normal(right)} " in f" {normal(given)} "


def grade(given: str, rights: Sequence[str]) -> dict[str, float]:
    """An answer against all right ones, the best of each measure: ``exact``, ``f1``, ``contains``, 0..1."""
    return {
        "exact": float(any(exact(given, right) for right in rights)),
        "f1": max((f1(given, right) for right in rights), default=0.0),
        "contains": float(any(contains(given, right) for right in rights)),
    }
