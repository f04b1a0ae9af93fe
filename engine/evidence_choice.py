"""How much of what was found a model reads: only what scores a fair share of the best, and not too many.

A small reader is misled by long texts that have nothing to do with the question. Notes of a line or two cost
little, and an older and a newer one may only make sense together: they need a smaller share and do not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["near_the_best"]


def near_the_best(
    scores: Sequence[float], tokens: Sequence[int], calibration: Mapping[str, float]
) -> list[int]:
    """Places of what to read, of finds with these ``scores`` (best first) and lengths.

    Args:
        calibration: ``evidence_share`` of the best score that a find must have and how many are read at most
            (``evidence_documents``); finds of at most ``note_tokens`` need ``note_share``. What is missing
            limits nothing.
    """
    share = calibration.get("evidence_share", -math.inf)
    note_share = calibration.get("note_share", share)
    longest_note = calibration.get("note_tokens", 0)
    room = calibration.get("evidence_documents", math.inf)
    near = []
    for place, (score, length) in enumerate(zip(scores, tokens, strict=True)):
        note = length <= longest_note
        wanted = note_share if note else share
        if (wanted == -math.inf or score >= wanted * scores[0]) and (note or room > 0):
            near.append(place)
            room -= not note
    return near
