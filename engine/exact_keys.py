"""Exact routing keys of passages in sheets: fetched when asked for, those used last kept."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

from torch import Tensor

from msa_memory.engine.states import PassageStates
from msa_memory.errors import NotFoundError, StateDamagedError

__all__ = ["ExactKeys", "Fetch"]

logger = logging.getLogger(__name__)

EXACT_BYTES = 192 * 1024 * 1024
"""Of keys that are kept."""
Fetch = Callable[[int], PassageStates]


class ExactKeys:
    """Exact routing keys ``[L, R, G, D]`` of passages in sheets, fetched when asked for."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._held: OrderedDict[int, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def get(self, number: int) -> Tensor | None:
        """None for a passage that is gone, or damaged: it is named and stays out."""
        with self._lock:
            found = self._held.get(number)
            if found is not None:
                self._held.move_to_end(number)
                return found
        states = self.read(number)
        if states is None:
            return None
        with self._lock:
            self.nbytes += states.router_keys.nbytes if number not in self._held else 0
            self._held[number] = states.router_keys
            while self.nbytes > EXACT_BYTES and len(self._held) > 1:
                self.nbytes -= self._held.popitem(last=False)[1].nbytes
        return states.router_keys

    def read(self, number: int) -> PassageStates | None:
        """A passage's states, None as of ``get``."""
        try:
            return self._fetch(number)
        except NotFoundError:
            return None
        except StateDamagedError as error:
            logger.warning("left out of this memory until it is repaired: %s", error)
            return None

    def terms(self, number: int) -> Tensor | None:
        """A passage's terms, None as of ``get``."""
        states = self.read(number)
        return None if states is None else states.terms

    def drop(self, numbers: Iterable[int]) -> None:
        """Keep nothing of these passages."""
        with self._lock:
            for number in numbers:
                if (keys := self._held.pop(number, None)) is not None:
                    self.nbytes -= keys.nbytes
