"""Prompts that were read before, so that the next one with the same beginning reads only what is new.

A kept context is the keys and values of a prompt's tokens together with the memory they attended to: only
a prompt that starts alike, over the same passages and for the same owner, goes on from it. Of the answer
nothing is kept, since it may have been decoded with packed weights. Used on one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msa_memory.engine.bank_view import Selection
from msa_memory.engine.cache import SequenceCache
from msa_memory.engine.context import Sequence as Row

__all__ = ["KeptContexts"]

MOST = 4
MOST_BYTES = 256 * 2**20
Selections = Mapping[int, Selection]
_Key = tuple[str, int, tuple[tuple[int, tuple[int, ...]], ...]]


@dataclass(frozen=True, slots=True)
class _Kept:
    key: _Key
    ids: tuple[int, ...]
    cache: SequenceCache
    before: int
    """Tokens in the cache before ``ids``: the template head's."""


class KeptContexts:
    """The newest few contexts, within a number of bytes.

    ``clear`` whenever something was forgotten: what is being read at that moment is not kept either.
    """

    def __init__(self, *, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.epoch = 0
        """Grows with every ``clear``; say it again when a context that was begun before is handed back."""
        self._kept: list[_Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept keys and values, the room they were given included."""
        return sum(kept.cache.nbytes for kept in self._kept)

    def take(self, owner: str, position: int, selections: Selections, ids: Sequence[int]) -> Row | None:
        """A row that has read the longest known beginning of ``ids`` (never all of it); no longer kept here.

        Args:
            owner: who may go on from what it read itself, and nobody else.
            position: rotary position of the first of ``ids``.
            selections: the passages in each router layer's memory; none without memory.
        """
        key = _key(owner, position, selections)
        found = [(min(_shared(kept.ids, ids), len(ids) - 1), kept) for kept in self._kept if kept.key == key]
        known, best = max(found, key=lambda one: one[0], default=(0, None))
        if best is None or not known:
            return None
        self._kept.remove(best)
        best.cache.truncate(best.before + known)
        return Row(best.cache, position + known, selections=dict(selections), fed_tokens=known)

    def keep(self, owner: str, row: Row, ids: Sequence[int], epoch: int) -> None:
        """Keep the first of a row's tokens, ``ids``, unless something was forgotten since ``epoch``."""
        if epoch != self.epoch or row.fed_tokens < len(ids):
            return
        before = row.cache.length - row.fed_tokens
        row.cache.truncate(before + len(ids))
        key = _key(owner, row.position - row.fed_tokens, row.selections)
        self._kept.append(_Kept(key, tuple(ids), row.cache, before))
        while len(self._kept) > self.most or self.nbytes > self.most_bytes:
            self._kept.pop(0)

    def clear(self) -> None:
        """Drop everything, and whatever is handed back of an earlier epoch."""
        self._kept.clear()
        self.epoch += 1


def _key(owner: str, position: int, selections: Selections) -> _Key:
    chosen = {layer: tuple(sorted(choice.numbers)) for layer, choice in selections.items()}
    return owner, position, tuple(sorted(chosen.items()))


def _shared(known: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens two prompts have in common at their beginning."""
    pairs = zip(known, ids, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(known), len(ids)))
