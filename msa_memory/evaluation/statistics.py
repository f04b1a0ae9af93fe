"""Figures from many single results: means and differences with their intervals, thresholds, AUROC.

Intervals are 95% percentile bootstraps over questions, with a fixed seed: the same results give the same
interval. Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["auroc", "difference", "mean", "percentiles", "ratio", "refused_at", "spread"]

DRAWS, SEED = 2000, 0
LOW, HIGH = 2.5, 97.5
Figure = dict[str, Any]
Numbers = NDArray[np.float64]
T = TypeVar("T")


def mean(values: Sequence[float]) -> Figure:
    """Mean, its interval ``low`` and ``high``, and ``n``; None where there are no values."""
    one = np.asarray(values, dtype=np.float64)
    return _figure(lambda drawn: one[drawn].mean(axis=-1), len(one))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Mean of ours minus theirs, question by question."""
    return mean([a - b for a, b in zip(ours, theirs, strict=True)])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Mean of ours over the mean of theirs, on the same questions; None where theirs is 0."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} results against {len(b)}; both must be about the same questions")
    if not b.any():
        return {"mean": None, "low": None, "high": None, "n": len(b)}
    with np.errstate(divide="ignore", invalid="ignore"):
        return _figure(lambda drawn: a[drawn].mean(axis=-1) / b[drawn].mean(axis=-1), len(a))


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Chance that a positive's score beats a negative's, ties counting half; None if either is missing."""
    if not positive or not negative:
        return None
    high, low = np.asarray(positive)[:, None], np.asarray(negative)[None, :]
    return float(((high > low) + 0.5 * (high == low)).mean())


def refused_at(present: Sequence[float], absent: Sequence[float], false_refusals: float) -> Figure | None:
    """The threshold below which at most a share of ``present`` lies, and what it does to both.

    Scores under the threshold count as refused. None if either is missing.
    """
    if not present or not absent:
        return None
    threshold = sorted(present)[int(len(present) * false_refusals)]
    return {
        "threshold": threshold,
        "false_refusals": mean([score < threshold for score in present]),
        "refused": mean([score < threshold for score in absent]),
    }


def spread(items: Sequence[T], count: int | None) -> list[T]:
    """``count`` items evenly spread over a list, all of them where it is None or there are no more."""
    if count is None or count >= len(items):
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


def _figure(of: Callable[[NDArray[np.int64]], Numbers], n: int) -> Figure:
    """A statistic of all rows, and its interval over redrawn ones; ``of`` takes rows ``[..., n]``."""
    if n == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    drawn = np.random.default_rng(SEED).integers(0, n, size=(DRAWS, n))
    values = of(drawn)
    low, high = np.percentile(values[np.isfinite(values)], [LOW, HIGH])
    return {"mean": float(of(np.arange(n))), "low": float(low), "high": float(high), "n": n}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median ``p50`` and the ``p95`` of times."""
    middle, late = np.percentile(np.asarray(values, dtype=np.float64), [50, 95])
    return {"p50": float(middle), "p95": float(late)}
