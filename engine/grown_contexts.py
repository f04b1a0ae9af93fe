"""Conversations that are read on from where they stand: turns, evidence and answers stay as they were read.

Unlike a kept context (``kept_contexts``) a grown one is not what reading everything anew would give: its
older tokens keep the states they got beside the memory chosen for their own turn, as in the reference's
interleaved rounds (arXiv 2603.23516, section 3). Only what is new is read, over the memory chosen now.
Used on one thread.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from msa_memory.engine.context import Sequence as Row

__all__ = ["Grown", "GrownContexts"]

MOST = 4
MOST_BYTES = 256 * 2**20
Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Grown:
    """A conversation as far as it was read: up to where the answer to its last turn, the user's, begins.

    ``ids`` are all its tokens behind the template head, ``read`` what stands for the evidence among them, and
    ``passages`` the numbers of all passages that were read or attended to.
    """

    system: str
    turns: Turns
    row: Row
    ids: tuple[int, ...]
    read: frozenset[Hashable]
    passages: frozenset[int]

    def goes_on_to(self, system: str, turns: Turns) -> bool:
        """Whether these turns, an answer last, are how it went on; its own oldest may be missing there."""
        if system != self.system or len(turns) < 2 or turns[-1][0] != "assistant":
            return False
        said = turns[:-1]
        return self.turns[-len(said) :] == said


class GrownContexts:
    """The newest few conversations, within a number of bytes.

    ``clear`` whenever something was forgotten: what is being read at that moment is not kept either.
    """

    def __init__(self, *, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.epoch = 0
        """Grows with every ``clear``; say it again when a conversation begun before is handed back."""
        self._kept: list[tuple[str, Grown]] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept keys and values, the room they were given included."""
        return sum(grown.row.cache.nbytes for _, grown in self._kept)

    def take(self, owner: str, system: str, turns: Turns) -> Grown | None:
        """The owner's conversation that these turns go on from, no longer kept here; the longest one."""
        found = [kept for kept in self._kept if kept[0] == owner and kept[1].goes_on_to(system, turns)]
        if not found:
            return None
        best = max(found, key=lambda kept: len(kept[1].ids))
        self._kept.remove(best)
        return best[1]

    def keep(self, owner: str, grown: Grown, epoch: int) -> None:
        """Keep a conversation without its newest answer, unless something was forgotten since ``epoch``."""
        row = grown.row
        if epoch != self.epoch or row.fed_tokens < len(grown.ids):
            return
        surplus = row.fed_tokens - len(grown.ids)
        row.cache.truncate(row.cache.length - surplus)
        row.position -= surplus
        row.fed_tokens -= surplus
        row.view = None
        self._kept.append((owner, grown))
        while len(self._kept) > self.most or self.nbytes > self.most_bytes:
            self._kept.pop(0)

    def clear(self) -> None:
        """Drop everything, and whatever is handed back of an earlier epoch."""
        self._kept.clear()
        self.epoch += 1
