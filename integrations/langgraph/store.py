"""``MSAStore``: LangGraph's store, kept in one namespace of a memory and searched by its routers.

Orders LangGraph's operations; ``items`` turns them into documents, ``matching`` decides filters.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from langgraph.store.base import (
    BaseStore,
    GetOp,
    Item,
    ListNamespacesOp,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    TTLConfig,
    validate_op_namespace,
)

from msa_memory.errors import ConfigError, NotFoundError
from msa_memory.integrations.langgraph.items import (
    StoredItem,
    below,
    document_id,
    item_text,
    joined,
    new_document,
)
from msa_memory.integrations.langgraph.matching import exact_part, fits_filter, fits_namespace
from msa_memory.integrations.opening import MemoryHandle
from msa_memory.memory import MemoryModel

__all__ = ["MSAStore"]

PAGE = 1000
MOST_IDS = 4000
FIRST_RANKED = 32


class MSAStore(BaseStore):
    """Long-term memory of LangGraph agents in one namespace of a memory.

    Behaves as LangGraph's ``InMemoryStore`` does, with these differences: it outlives the process;
    ``created_at`` stays when an item is put again and ``updated_at`` is when its value last changed; a path
    without items is not listed; comparing what is no number with ``$gt`` and its like does not match instead
    of raising; an item whose time to live has passed is gone at once. ``search(query=...)`` ranks by the
    memory's routers; items put with ``index=False`` come last, without a score.

    Args:
        memory: an open memory, its folder, or None for one in RAM.
        namespace: the memory's namespace to keep the items in.
        fields: what of a value the model reads, in LangGraph's path syntax; ``"$"`` is all of it.
        ttl: LangGraph's settings for how long items live.
    """

    supports_ttl = True

    def __init__(
        self,
        memory: MemoryModel | str | Path | None = None,
        *,
        namespace: str = "langgraph",
        fields: Sequence[str] = ("$",),
        ttl: TTLConfig | None = None,
    ) -> None:
        if isinstance(fields, str) or not all(isinstance(field, str) and field for field in fields):
            raise ConfigError(f"fields is {fields!r:.80}; expected a list of paths such as 'text' or '$'")
        self._handle = MemoryHandle(memory, namespace=namespace)
        self._fields = tuple(fields)
        self.ttl_config = ttl
        self._sweeper: threading.Thread | None = None
        self._stop_sweeping = threading.Event()

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Run operations. The reads among them see the state before the writes; a key's last write counts.

        Raises:
            InvalidNamespaceError: a label that is empty, no string, or holds a dot or NUL.
            InvalidDocumentError: a value that is not JSON.
        """
        ops = list(ops)
        for op in ops:
            validate_op_namespace(op)
        results = [self._read(op) for op in ops]
        self._write([op for op in ops if isinstance(op, PutOp)])
        return results

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """Async twin of ``batch``; the loop is not blocked, and a write that began is finished."""
        return await asyncio.to_thread(self.batch, list(ops))

    def sweep_ttl(self) -> int:
        """Erase the items whose time has passed; how many."""
        return len(self._memory.forget_expired().ids)

    def start_ttl_sweeper(self, sweep_interval_minutes: float | None = None) -> None:
        """Sweep every so often on a thread of its own, until ``stop_ttl_sweeper`` or ``close``."""
        every = sweep_interval_minutes or (self.ttl_config or {}).get("sweep_interval_minutes") or 5
        if self._sweeper is None:
            self._stop_sweeping.clear()
            self._sweeper = threading.Thread(target=self._sweep, args=(every * 60,), daemon=True)
            self._sweeper.start()

    def stop_ttl_sweeper(self, timeout: float | None = None) -> bool:
        """End the sweeper; False if it was still at work after ``timeout`` seconds."""
        self._stop_sweeping.set()
        if self._sweeper is None:
            return True
        self._sweeper.join(timeout)
        if self._sweeper.is_alive():
            return False
        self._sweeper = None
        return True

    def close(self) -> None:
        """End the sweeper, and close the memory if it was opened here."""
        self.stop_ttl_sweeper()
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # reading

    @property
    def _memory(self) -> MemoryModel:
        return self._handle.get()

    def _read(self, op: Op) -> Result:
        match op:
            case GetOp():
                return self._get(op)
            case SearchOp():
                return self._search(op)
            case ListNamespacesOp():
                return self._list_namespaces(op)
            case PutOp():
                return None
        raise ConfigError(f"an operation is {op!r:.80}; expected GetOp, SearchOp, PutOp or ListNamespacesOp")

    def _get(self, op: GetOp) -> Item | None:
        try:
            found = StoredItem(self._memory.get(document_id(op.namespace, op.key)))
        except NotFoundError:
            return None
        if op.refresh_ttl:
            self._refresh([found])
        return found.item()

    def _search(self, op: SearchOp) -> list[SearchItem]:
        wanted = slice(op.offset, op.offset + op.limit)
        found: list[tuple[float | None, StoredItem]]
        if op.query and op.query.strip():
            found = self._ranked(op)[wanted]
        else:
            found = [(None, item) for item in self._items(op.namespace_prefix, op.filter)[wanted]]
        if op.refresh_ttl:
            self._refresh([item for _, item in found])
        return [item.search_item(score) for score, item in found]

    def _ranked(self, op: SearchOp) -> list[tuple[float | None, StoredItem]]:
        """As many as are asked for, best first; then those that no question finds, in the order of adding."""
        wanted, where = op.offset + op.limit, {**below(op.namespace_prefix), **exact_part(op.filter)}
        k, ranked = max(wanted, FIRST_RANKED), list[tuple[float | None, StoredItem]]()
        while True:
            sources = self._memory.search(str(op.query), k=k, where={**where, "indexed": True})
            found = self._by_id([source.id for source in sources])
            ranked = [(s.score, found[s.id]) for s in sources if s.id in found]
            ranked = [(score, item) for score, item in ranked if fits_filter(item.value, op.filter)]
            if len(ranked) >= wanted or len(sources) < k:
                break
            k *= 4
        if len(ranked) < wanted:
            rest = self._items(op.namespace_prefix, op.filter, indexed=False)
            ranked += [(None, item) for item in rest]
        return ranked

    def _items(
        self, prefix: tuple[str, ...], asked: Mapping[str, Any] | None = None, *, indexed: bool | None = None
    ) -> list[StoredItem]:
        """Items that fit a filter: path by path as these came into use, in each as the items were added."""
        where = {**below(prefix), **exact_part(asked)}
        if indexed is not None:
            where["indexed"] = indexed
        found = [item for item in self._listed(where) if fits_filter(item.value, asked)]
        found.reverse()
        first: dict[tuple[str, ...], int] = {}
        for item in found:
            first[item.path] = min(item.order, first.get(item.path, item.order))
        return sorted(found, key=lambda item: (first[item.path], item.path))

    def _listed(self, where: Mapping[str, Any]) -> Iterator[StoredItem]:
        """Every stored item that matches, last added first."""
        cursor = None
        while True:
            page = self._memory.list(where, limit=PAGE, cursor=cursor)
            yield from map(StoredItem, page)
            cursor = page.next_cursor
            if cursor is None:
                return

    def _by_id(self, ids: Sequence[str]) -> dict[str, StoredItem]:
        found: dict[str, StoredItem] = {}
        for start in range(0, len(ids), MOST_IDS):
            where = {"$id": {"$in": list(ids[start : start + MOST_IDS])}}
            found.update((item.document.id, item) for item in self._listed(where))
        return found

    def _list_namespaces(self, op: ListNamespacesOp) -> list[tuple[str, ...]]:
        prefix: tuple[str, ...] = ()
        for condition in op.match_conditions or ():
            if condition.match_type == "prefix" and "*" not in condition.path:
                prefix = tuple(condition.path)
        paths = {item.path for item in self._listed(below(prefix))}
        fitting = {
            path[: op.max_depth]
            for path in paths
            if all(fits_namespace(path, condition) for condition in op.match_conditions or ())
        }
        return sorted(fitting)[op.offset : op.offset + op.limit]

    def _refresh(self, items: Sequence[StoredItem]) -> None:
        """Let items live for their whole time again."""
        by_ttl: dict[float, list[str]] = {}
        for item in items:
            if item.ttl_minutes is not None:
                by_ttl.setdefault(item.ttl_minutes, []).append(item.document.id)
        for ttl_minutes, ids in by_ttl.items():
            self._memory.set_expiry(ids, ttl=ttl_minutes * 60)

    # writing

    def _write(self, puts: Sequence[PutOp]) -> None:
        last = {(op.namespace, op.key): op for op in puts}
        kept = [op for op in last.values() if op.value is not None]
        gone = [document_id(*name) for name, op in last.items() if op.value is None]
        if kept:
            since = self._since(dict.fromkeys(op.namespace for op in kept))
            documents = [self._document(op, since[op.namespace]) for op in kept]
            self._memory.add_many(documents, on_conflict="replace", progress=False)
        for start in range(0, len(gone), MOST_IDS):
            self._memory.forget(where={"$id": {"$in": gone[start : start + MOST_IDS]}})

    def _document(self, op: PutOp, since: int) -> dict[str, Any]:
        assert op.value is not None
        fields = self._fields if op.index is None else op.index or ()
        text = item_text(op.value, fields)
        return new_document(op.namespace, op.key, op.value, text=text, since=since, ttl_minutes=op.ttl)

    def _since(self, paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], int]:
        """When each path came into use: now, where it holds no item yet."""
        now = time.time_ns()
        since: dict[tuple[str, ...], int] = {}
        for path in paths:
            known = self._memory.list({"path": joined(path)}, limit=1).items
            since[path] = StoredItem(known[0]).order if known else now + len(since)
        return since

    def _sweep(self, every_s: float) -> None:
        while not self._stop_sweeping.wait(every_s):
            self.sweep_ttl()
