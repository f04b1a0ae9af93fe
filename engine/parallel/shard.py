"""One rank's share of the passages, and what it does with the leader's requests.

A shard holds routing keys in a ``MemoryBank`` of its own, so scores are computed by the same code as in one
process, and K/V in host memory where the leader gave it the texts to encode. Views are named by numbers
that the leader chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.bank_view import BankView, Numbers
from msa_memory.engine.config import MSAConfig
from msa_memory.engine.device_bank import DeviceBank
from msa_memory.engine.engine import Engine
from msa_memory.engine.parallel.cluster import Cluster, Request
from msa_memory.engine.parallel.wire import pack, unpack
from msa_memory.engine.states import PassageStates
from msa_memory.errors import EngineError, NotFoundError

__all__ = ["Shard"]

NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass(slots=True)
class _Held:
    """One bank's share: routing keys, the K/V that live here, and views by number."""

    bank: MemoryBank
    states: dict[int, PassageStates]
    staged: dict[int, PassageStates] = field(default_factory=dict)
    batch: int = 0
    """Which attempt the staged states belong to."""
    views: dict[int, BankView] = field(default_factory=dict)


class Shard:
    """Carries out requests; ``Cluster.serve`` and ``Cluster.attach`` take it as what to do with them.

    Args:
        engine: encodes the passages that this rank owns; a rank without one holds routing keys only.
    """

    def __init__(self, cluster: Cluster, engine: Engine | None = None) -> None:
        self.cluster, self.engine = cluster, engine
        self._banks: dict[int, _Held] = {}

    def __call__(self, request: Request, payload: Tensor | None) -> Tensor:
        for bank, view in request.get("dropped", ()):
            if view is None:
                self._banks.pop(bank, None)
            elif bank in self._banks:
                self._banks[bank].views.pop(view, None)
        known = {
            "open": self._open, "stage": self._stage, "hold": self._hold, "commit": self._commit,
            "view": self._view, "without": self._without, "score": self._score, "fetch": self._fetch,
            "states": self._states, "words": self._words,
            "survey": self._survey, "size": self._size,
        }  # fmt: skip
        return known[request["op"]](request, payload)

    def _held(self, request: Request) -> _Held:
        return self._banks[request["bank"]]

    # changing

    def _open(self, request: Request, payload: Tensor | None) -> Tensor:
        states: dict[int, PassageStates] = {}
        settings = {**request["msa"], "router_layers": tuple(request["msa"]["router_layers"])}
        self._banks[request["bank"]] = _Held(self._bank(MSAConfig(**settings), states), states)
        return NOTHING

    def _bank(self, msa: MSAConfig, states: Mapping[int, PassageStates]) -> MemoryBank:
        """What scores here: the same as in a process alone. The K/V of chosen passages are sent apart."""
        device = self.cluster.device
        if device.type == "cuda" and msa.head_reduce == "mean":
            return DeviceBank(msa, _nothing_held, device=device)
        return MemoryBank(msa, states.__getitem__, device=device)

    def _stage(self, request: Request, payload: Tensor | None) -> Tensor:
        """Encode the own ones of these passages; a commit takes them in."""
        held = self._held(request)
        held.staged.clear()
        held.batch = request["batch"]
        own = [
            (number, header, text)
            for number, header, text in request["passages"]
            if self.cluster.owner(number) == self.cluster.rank
        ]
        if own and self.engine is None:
            raise EngineError("this rank has no model to encode passages with; serve(Shard(cluster, engine))")
        encoded = self.engine.encode_many(own) if self.engine is not None else ()
        for (number, _, _), states in zip(own, encoded, strict=True):
            held.staged[number] = _in_host_memory(states, pinned=self.cluster.device.type == "cuda")
        largest = [_layer_bytes(states) for states in held.staged.values()]
        return pack([torch.tensor([max(largest, default=0)])])

    def _commit(self, request: Request, payload: Tensor | None) -> Tensor:
        """Let go of some passages and take the staged ones in, as one step."""
        held = self._held(request)
        gone = [number for number in request["remove"] if self.cluster.owner(number) == self.cluster.rank]
        held.bank.remove(gone)
        for number in gone:
            held.states.pop(number, None)
        staged = held.staged if held.batch == request["batch"] else {}
        for number, states in staged.items():
            held.bank.add(number, states.router_keys, states.terms)
            held.states[number] = states
        held.staged.clear()
        return NOTHING

    def _hold(self, request: Request, payload: Tensor | None) -> Tensor:
        """Take routing keys and terms in; the leader keeps the K/V."""
        if payload is not None and len(payload):
            numbers, *tensors = unpack(payload)
            bank = self._held(request).bank
            for number, keys, terms in zip(numbers.tolist(), tensors[::2], tensors[1::2], strict=True):
                bank.add(number, keys, terms)
        return NOTHING

    def _size(self, request: Request, payload: Tensor | None) -> Tensor:
        return pack([torch.tensor([self._held(request).bank.nbytes()])])

    # seeing

    def _view(self, request: Request, payload: Tensor | None) -> Tensor:
        held = self._held(request)
        held.bank.skim_from, held.bank.skim_layers = request["skim_from"], request["skim_layers"]
        visible = None if payload is None else payload.cpu().numpy()
        view = held.views[request["view"]] = held.bank.view(visible)
        return pack([torch.from_numpy(view.numbers), torch.from_numpy(view.visible)])

    def _without(self, request: Request, payload: Tensor | None) -> Tensor:
        held = self._held(request)
        view = held.views[request["of"]].without(request["numbers"])
        held.views[request["view"]] = view
        return pack([torch.from_numpy(view.visible)])

    def _seen(self, request: Request) -> BankView:
        return self._held(request).views[request["view"]]

    def _score(self, request: Request, payload: Tensor | None) -> Tensor:
        """Scores of all passages here, and the K/V of the best ones, which may be among the chosen."""
        assert payload is not None
        view, slot = self._seen(request), request["slot"]
        scores = view.score(slot, payload.to(self.cluster.device), best=request["best"])
        best = view.select(scores, request["best"]).numbers
        shipped = self._pooled(self._held(request).states, slot, best[: request["ship"]])
        return pack([*_told(scores[None], scores, _places(view, best)), *shipped])

    def _survey(self, request: Request, payload: Tensor | None) -> Tensor:
        """Scores on all layers at once: exact ones of those that matter, about right ones of the others."""
        assert payload is not None
        view, best = self._seen(request), request["best"]
        asked, numbers, values = unpack(payload.cpu())
        queries = list(asked.to(self.cluster.device))
        bonus = np.zeros(len(view.numbers), dtype=np.float32)
        bonus[_places(view, numbers.numpy())] = values.numpy()[np.isin(numbers.numpy(), view.numbers)]
        if view.skims:
            scores = view.skim(queries, bonus)
        else:
            scores = np.stack([view.score(slot, query, best=best) for slot, query in enumerate(queries)])
        scores = view.settle(scores, queries, bonus, request["count"])
        mean: NDArray[np.float32] = view.msa.mean_of_layers(scores)
        layers = [view.select(layer, best).numbers for layer in scores]
        kept = {number for chosen in layers for number in chosen}
        kept |= set(view.select(mean + bonus, request["count"]).numbers)
        return pack(_told(scores, mean, _places(view, kept)))

    def _fetch(self, request: Request, payload: Tensor | None) -> Tensor:
        held = self._held(request)
        return pack(self._pooled(held.states, request["slot"], request["numbers"]))

    def _pooled(self, states: Mapping[int, PassageStates], slot: int, numbers: Iterable[int]) -> list[Tensor]:
        """Numbers, chunk counts, keys and values of the passages among these that live here."""
        own = [number for number in numbers if number in states]
        counts = [states[number].chunks for number in own]
        tables = [torch.tensor(own, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64)]
        if not own:
            return tables
        return [
            *tables,
            torch.cat([states[number].keys[slot] for number in own], 1),
            torch.cat([states[number].values[slot] for number in own], 1),
        ]

    def _states(self, request: Request, payload: Tensor | None) -> Tensor:
        """All states of one passage, from the rank that has it."""
        number: int = request["number"]
        if self.cluster.owner(number) != self.cluster.rank:
            return NOTHING
        found = self._held(request).states.get(number)
        if found is None:
            raise NotFoundError(f"passage {number} was forgotten while it was being read; ask again")
        return pack([found.keys, found.values, found.router_keys, found.terms])

    def _words(self, request: Request, payload: Tensor | None) -> Tensor:
        """What BM25 needs of the visible passages here: lengths, then places and counts of each term.

        The leader joins them, for how rare a word is depends on all ranks.
        """
        view, terms = self._seen(request), request["terms"]
        lengths, postings = view.words(terms)
        tensors = [torch.from_numpy(lengths)]
        for term in terms:
            numbers, counts = postings.get(term, (np.empty(0, np.int64), np.empty(0, np.int64)))
            shown = np.isin(numbers, view.numbers[view.visible])
            tensors += [torch.from_numpy(numbers[shown]), torch.from_numpy(counts[shown])]
        return pack(tensors)


def _nothing_held(number: int) -> PassageStates:
    raise NotFoundError(f"the bank of this rank holds no keys and values of passage {number}")


def _places(view: BankView, numbers: Iterable[int]) -> Numbers:
    """Where these passages stand among those of a view, ascending by number; unknown ones are left out."""
    order = np.argsort(view.numbers)
    wanted = np.array(sorted(numbers), dtype=np.int64)
    at = np.searchsorted(view.numbers, wanted, sorter=order)
    found = order[np.minimum(at, len(order) - 1)] if len(order) else at[:0]
    places: Numbers = found[view.numbers[found] == wanted[: len(found)]]
    return places


def _told(scores: NDArray[np.float32], rough: NDArray[np.float32], kept: Numbers) -> list[Tensor]:
    """What the leader learns of scores ``[L, P]``: those of ``kept``, and of the others ``rough`` ``[P]``."""
    return [
        torch.from_numpy(kept),
        torch.from_numpy(np.ascontiguousarray(scores[:, kept])),
        torch.from_numpy(rough).half(),
    ]


def _in_host_memory(states: PassageStates, *, pinned: bool) -> PassageStates:
    """K/V leave the device; pinned where there is one, so that they come back without a copy between."""
    keys, values = states.keys.cpu(), states.values.cpu()
    return replace(
        states, keys=keys.pin_memory() if pinned else keys, values=values.pin_memory() if pinned else values
    )


def _layer_bytes(states: PassageStates) -> int:
    """Bytes of one layer's K and V."""
    return 2 * states.keys[0].nbytes
