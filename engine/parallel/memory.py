"""A memory of texts by number over all ranks: encoded, held, routed to and read where they are.

The tokens-level counterpart of ``MemoryModel`` for large memories that live in the ranks' own memory: no
catalog, nothing on disk. Leader only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from msa_memory.engine.bank_view import BankView
from msa_memory.engine.engine import Engine, Routing
from msa_memory.engine.interleave import Interleave, InterleaveOptions
from msa_memory.engine.parallel.bank import ShardedBank
from msa_memory.engine.parallel.cluster import Cluster
from msa_memory.engine.parallel.shard import Shard
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.errors import NotFoundError

__all__ = ["ParallelMemory", "Read"]

PASSAGES_AT_A_TIME = 64
"""Of one exchange per rank: a rank must not look lost because it reads long."""


@dataclass(frozen=True, slots=True)
class Read:
    """An answer and the passages it was read from, best first."""

    text: str
    numbers: tuple[int, ...]
    scores: tuple[float, ...]


class ParallelMemory:
    """Texts of passages on the leader, their states on the ranks that own them."""

    def __init__(self, cluster: Cluster, engine: Engine) -> None:
        self.engine = engine
        cluster.attach(Shard(cluster, engine))
        self.bank = ShardedBank(cluster, engine.msa)
        self.texts: dict[int, str] = {}
        self._batch = PASSAGES_AT_A_TIME * cluster.size

    def add(self, texts: Mapping[int, str]) -> None:
        """Let the ranks read these passages. A batch that fails leaves earlier ones added."""
        for batch in _batches(list(texts), self._batch):
            self.bank.encode((number, "", texts[number]) for number in batch)
            self.texts.update((number, texts[number]) for number in batch)

    def update(self, number: int, text: str) -> None:
        """Replace a passage's text, at once for every later question."""
        self._check([number])
        self.bank.encode([(number, "", text)], replacing=[number])
        self.texts[number] = text

    def forget(self, numbers: Iterable[int]) -> None:
        """Let go of passages, wherever they are held."""
        gone = list(numbers)
        self._check(gone)
        self.bank.remove(gone)
        for number in gone:
            del self.texts[number]

    def route(self, question: str, *, visible: Iterable[int] | None = None) -> Routing:
        """Score all visible passages for a question."""
        return self.engine.route(question, self._view(visible))

    def query(
        self,
        question: str,
        *,
        k: int = 4,
        visible: Iterable[int] | None = None,
        options: SamplingOptions | None = None,
    ) -> Read:
        """Route, read the k best passages, answer."""
        routing = self.route(question, visible=visible)
        found = routing.view.select(routing.relevance(), k)
        ids = self.engine.prompt.reading(
            "".join(f"{self.texts[number]}\n" for number in found.numbers), question
        )
        options = options or SamplingOptions()
        generation = self.engine.read(routing.view, routing.selections, ids, options)
        for _ in self.engine.decode(generation):
            pass
        return Read(generation.text, found.numbers, found.scores)

    def interleave(self, question: str, options: InterleaveOptions | None = None) -> Interleave:
        """A question answered by generating passage numbers, reading their texts, and so on; ``run`` it."""

        def texts(numbers: Sequence[int]) -> dict[int, str]:
            return {number: self.texts[number] for number in numbers if number in self.texts}

        return self.engine.interleave(self._view(None), question, texts, options or InterleaveOptions())

    def _view(self, visible: Iterable[int] | None) -> BankView:
        return self.bank.view(None if visible is None else np.fromiter(visible, dtype=np.int64))

    def _check(self, numbers: Iterable[int]) -> None:
        if unknown := [number for number in numbers if number not in self.texts]:
            raise NotFoundError(f"no passages {unknown} here; the memory holds {len(self.texts)} others")


def _batches(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
