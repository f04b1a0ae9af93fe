"""MSAStore behaves as LangGraph's InMemoryStore, finds by its routers, and survives the process."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from langgraph.store.base import (
    GetOp,
    InvalidNamespaceError,
    ListNamespacesOp,
    MatchCondition,
    Op,
    PutOp,
    SearchOp,
    TTLConfig,
)
from langgraph.store.memory import InMemoryStore

from msa_memory import MemoryModel
from msa_memory.errors import ConfigError, InvalidDocumentError, InvalidFilterError
from msa_memory.integrations.langgraph import MSAStore
from msa_memory.integrations.langgraph.items import document_id
from msa_memory.testing import open_memory

FACTS = {
    "bob": "Bob lives in Oslo and repairs violins.",
    "ann": "Ann paints lighthouses in Bergen.",
    "cat": "The cat sleeps under the kitchen table.",
}


@pytest.fixture(scope="module")
def memory() -> Iterator[MemoryModel]:
    with open_memory() as memory:
        yield memory


@pytest.fixture
def store(memory: MemoryModel, request: pytest.FixtureRequest) -> MSAStore:
    """A store of its own in a memory that the tests of this file share."""
    return MSAStore(memory, namespace=request.node.name)


@pytest.fixture
def people(store: MSAStore) -> MSAStore:
    for key, text in FACTS.items():
        store.put(("users", "bob"), key, {"text": text})
    return store


# the same as InMemoryStore, whatever is done to both

labels = st.sampled_from(["a", "b", "users", "Å"])
paths = st.lists(labels, min_size=1, max_size=3).map(tuple)
keys = st.sampled_from(["x", "y", "a key with spaces", "."])
plain = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(-2, 2), st.sampled_from(["", "red", "blue sky"])
)
values = st.fixed_dictionaries(
    {"n": st.integers(-3, 3)},
    optional={
        "colour": plain,
        "tags": st.lists(plain, max_size=2),
        "inner": st.fixed_dictionaries({}, optional={"deep": plain, "colour": plain}),
        "a.b": plain,
    },
)
operators = st.sampled_from(["$eq", "$ne", "$gt", "$gte", "$lt", "$lte"])
filters = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {},
        optional={
            "n": st.one_of(
                st.integers(-3, 3), st.dictionaries(operators, st.integers(-3, 3), min_size=1, max_size=2)
            ),
            "colour": st.one_of(plain, st.fixed_dictionaries({"$ne": plain})),
            "tags": st.lists(plain, max_size=2),
            "inner": st.fixed_dictionaries({}, optional={"deep": plain}),
            "a.b": plain,
        },
    ),
)
wildcards = st.lists(st.one_of(labels, st.just("*")), min_size=1, max_size=2).map(tuple)
conditions = st.builds(MatchCondition, st.sampled_from(["prefix", "suffix"]), wildcards)
sizes = st.integers(0, 4)
puts = st.tuples(paths, keys, values).map(lambda parts: PutOp(*parts))
operations = st.one_of(
    puts,
    st.tuples(paths, keys).map(lambda parts: PutOp(*parts, None)),
    st.tuples(paths, keys).map(lambda parts: GetOp(*parts)),
    st.tuples(st.one_of(st.just(()), paths), filters, sizes, sizes).map(lambda parts: SearchOp(*parts)),
    st.tuples(st.lists(conditions, max_size=2).map(tuple), st.one_of(st.none(), sizes), sizes, sizes).map(
        lambda parts: ListNamespacesOp(*parts)
    ),
)


def seen(result: Any) -> Any:
    """What two stores must agree on: everything but times."""
    if isinstance(result, list):
        return [seen(part) for part in result]
    if result is None or isinstance(result, tuple):
        return result
    return (result.namespace, result.key, result.value)


class Reference(InMemoryStore):
    """InMemoryStore without the empty paths it keeps, and lists, once they were named in a read or a put."""

    def _forget_empty_paths(self) -> None:
        for path in [path for path, items in self._data.items() if not items]:
            del self._data[path]

    def _handle_list_namespaces(self, op: ListNamespacesOp) -> list[tuple[str, ...]]:
        self._forget_empty_paths()
        return super()._handle_list_namespaces(op)

    def _apply_put_ops(self, put_ops: Any) -> None:
        for place, op in put_ops.items():
            self._forget_empty_paths()
            super()._apply_put_ops({place: op})


@settings(max_examples=20)
@given(batches=st.lists(st.lists(operations, max_size=6), min_size=1, max_size=6))
@example(
    [
        [
            PutOp(("a",), "x", {"n": 0}),
            PutOp(("a", "a"), "x", {"n": 0}),
            PutOp(("a",), "x", None),
            PutOp(("a",), "y", {"n": 0}),
        ],
        [PutOp(("a",), "x", {"n": 0}), SearchOp((), None, 1, 0)],
    ]
)
def test_it_behaves_as_the_store_in_memory(memory: MemoryModel, batches: list[list[Op]]) -> None:
    store, reference = MSAStore(memory, namespace=f"differential {time.monotonic_ns()}"), Reference()
    for batch in batches:
        expected = seen(reference.batch(batch))
        assert seen(store.batch(batch)) == expected


@settings(max_examples=10)
@given(batch=st.lists(puts, max_size=8), prefix=paths)
def test_a_question_reorders_and_loses_nothing(
    memory: MemoryModel, batch: list[Op], prefix: tuple[str, ...]
) -> None:
    store, reference = MSAStore(memory, namespace=f"semantic {time.monotonic_ns()}"), InMemoryStore()
    store.batch(batch)
    reference.batch(batch)
    expected = seen(reference.search(prefix, limit=100))
    found = store.search(prefix, query="red", limit=100)
    assert sorted(seen(found), key=repr) == sorted(expected, key=repr)
    scores = [item.score for item in found]
    assert None not in scores
    assert scores == sorted(scores, reverse=True)
    for offset in range(len(found)):
        assert seen(store.search(prefix, query="red", limit=2, offset=offset)) == seen(found)[offset:][:2]


# finding


def test_search_ranks_by_the_memorys_routers(people: MSAStore, memory: MemoryModel) -> None:
    found = people.search(("users",), query="Who repairs violins?", limit=3)
    hits = memory.namespace(people._memory.namespace_name).search("Who repairs violins?", k=3)
    assert found[0].key == "bob"
    assert [(item.value["text"], item.score) for item in found] == [
        (hit.metadata["value"]["text"], hit.score) for hit in hits
    ]


def test_search_spans_children_and_nothing_else(store: MSAStore) -> None:
    for path in [
        ("users", "bob"),
        ("users", "bob", "work"),
        ("users", "bobby"),
        ("user",),
        ("x", "users", "bob"),
    ]:
        store.put(path, "fact", {"text": "violins"})
    for query in (None, "violins"):
        found = {item.namespace for item in store.search(("users", "bob"), query=query)}
        assert found == {("users", "bob"), ("users", "bob", "work")}
        assert len(store.search((), query=query)) == 5


def test_a_filter_holds_beside_a_question(store: MSAStore) -> None:
    for number in range(60):
        value = {"text": f"violin number {number}", "n": number, "kind": "odd" if number % 2 else "even"}
        store.put(("instruments",), str(number), value)
    found = store.search(("instruments",), query="violin", filter={"kind": "odd", "n": {"$gte": 50}}, limit=9)
    assert {item.value["n"] for item in found} == {51, 53, 55, 57, 59}
    assert all(item.score is not None for item in found)
    # one that the index cannot decide, with most of the best-ranked items filtered out
    assert len(store.search(("instruments",), query="violin", filter={"n": {"$lt": 5}})) == 5


def test_what_is_not_indexed_comes_last_without_a_score(people: MSAStore) -> None:
    people.put(("users", "bob"), "hidden", {"text": "violins violins violins"}, index=False)
    found = people.search(("users",), query="violins")
    assert [item.key for item in found][-1] == "hidden"
    assert found[-1].score is None
    assert None not in [item.score for item in found[:-1]]
    assert people.get(("users", "bob"), "hidden").value == {"text": "violins violins violins"}
    assert [item.key for item in people.search(("users",), query="violins", limit=2)] != ["hidden"]


def test_fields_say_what_is_read(memory: MemoryModel) -> None:
    store = MSAStore(memory, namespace="fields", fields=["text"])
    store.put(("a",), "1", {"text": "lighthouses in Bergen", "note": "violins"})
    store.put(("a",), "2", {"text": "a violin", "note": "lighthouses"})
    store.put(("a",), "3", {"text": "a cat", "parts": [{"of": "violins and violas"}]}, index=["parts[*].of"])
    texts = {document.metadata["key"]: document.text for document in memory.namespace("fields").list()}
    assert texts == {"1": "lighthouses in Bergen", "2": "a violin", "3": "violins and violas"}
    store.put(("a",), "4", {"other": 1})
    assert store.search(("a",), query="violins")[-1].key == "4", "nothing of it is indexed"
    for wrong in ("text", [""], [1]):
        with pytest.raises(ConfigError, match="expected a list of paths"):
            MSAStore(memory, fields=wrong)


# operators, names and values


def test_comparing_what_is_no_number_never_matches(store: MSAStore) -> None:
    for key, n in {"none": None, "text": "many", "list": [3], "number": 3, "digits": "3"}.items():
        store.put(("a",), key, {"n": n})
    store.put(("a",), "absent", {"m": 1})
    for operator, expected in {"$gt": [], "$gte": ["number", "digits"], "$lte": ["number", "digits"]}.items():
        assert [item.key for item in store.search(("a",), filter={"n": {operator: 3}})] == expected
    with pytest.raises(InvalidFilterError, match=r"'\$like' is not an operator"):
        store.search(("a",), filter={"n": {"$like": 3}})


@pytest.mark.parametrize("path", [(), ("",), ("a.b",), ("a\0",), ("langgraph",), (1,)])
def test_unusable_paths_are_refused(store: MSAStore, path: Any) -> None:
    with pytest.raises(InvalidNamespaceError):
        store.put(path, "key", {"n": 1})
    if path not in ((), ("langgraph",)):
        for op in (PutOp(path, "key", {"n": 1}), GetOp(path, "key"), SearchOp(path)):
            with pytest.raises(InvalidNamespaceError):
                store.batch([op])
    assert store.search(()) == []


def test_values_come_back_as_they_were(store: MSAStore) -> None:
    value = {
        "text": 'naïve 你好 \n\t"quotes" {braces}',
        "big": 2**70,
        "float": 0.1 + 0.2,
        "nested": {"list": [1, [2, {"three": None}]], "": "empty key", "$gt": "operator key", "a.b": True},
    }
    store.put(("a",), "k" * 2000, value)
    assert store.get(("a",), "k" * 2000).value == value
    with pytest.raises(InvalidDocumentError, match="metadata is not JSON"):
        store.put(("a",), "bad", {"at": datetime.now(UTC)})
    assert store.get(("a",), "bad") is None


def test_times(store: MSAStore) -> None:
    begun = datetime.now(UTC)
    store.put(("a",), "k", {"n": 1})
    first = store.get(("a",), "k")
    store.put(("a",), "k", {"n": 2})
    second = store.get(("a",), "k")
    assert begun - timedelta(milliseconds=1) <= first.created_at == first.updated_at
    assert second.created_at == first.created_at < second.updated_at <= datetime.now(UTC)


def test_a_batch_reads_before_it_writes(store: MSAStore) -> None:
    store.put(("a",), "k", {"n": 1})
    results = store.batch(
        [
            PutOp(("a",), "k", {"n": 2}),
            GetOp(("a",), "k"),
            PutOp(("a",), "k", {"n": 3}),
            SearchOp(("a",)),
            PutOp(("b",), "k", {"n": 4}),
            ListNamespacesOp(),
            PutOp(("b",), "k", None),
        ]
    )
    assert seen(results) == [
        None,
        (("a",), "k", {"n": 1}),
        None,
        [(("a",), "k", {"n": 1})],
        None,
        [("a",)],
        None,
    ]
    assert store.get(("a",), "k").value == {"n": 3}
    assert store.get(("b",), "k") is None
    with pytest.raises(ConfigError, match="an operation is"):
        store.batch(["get"])


def test_deleting(people: MSAStore, memory: MemoryModel) -> None:
    people.delete(("users", "bob"), "bob")
    people.delete(("users", "bob"), "nobody")
    assert people.get(("users", "bob"), "bob") is None
    assert "bob" not in [item.key for item in people.search((), query="violins")]
    documents = memory.namespace(people._memory.namespace_name).list()
    assert not [document for document in documents if "violins" in document.text], (
        "it is forgotten, not hidden"
    )


def test_other_documents_of_the_memory_stay_out(memory: MemoryModel) -> None:
    view = memory.namespace("shared")
    view.add("Violins everywhere.")
    store = MSAStore(view, namespace="shared")
    assert store.search(()) == store.search((), query="violins") == store.list_namespaces() == []
    store.put(("a",), "k", {"text": "violins"})
    assert len(store.search((), query="violins")) == 1


# time to live


def expire_now(store: MSAStore, path: tuple[str, ...], key: str) -> None:
    """Let an item's time pass, as if the clock had moved on."""
    item = store._items(path)
    [document] = [found.document for found in item if found.document.metadata["key"] == key]
    store._memory.set_expiry(document.id, expires_at=datetime.now(UTC) - timedelta(seconds=1))


def until(store: MSAStore, key: str) -> datetime | None:
    return {item.document.metadata["key"]: item.document.expires_at for item in store._items(())}[key]


def test_an_item_is_gone_when_its_time_has_passed(people: MSAStore) -> None:
    people.put(("users", "bob"), "short", {"text": "violins"}, ttl=1)
    expire_now(people, ("users", "bob"), "short")
    assert people.get(("users", "bob"), "short") is None
    assert "short" not in [item.key for item in people.search(())]
    assert "short" not in [item.key for item in people.search((), query="violins")]
    people.put(("users", "bob"), "short", {"text": "again"})
    assert people.get(("users", "bob"), "short").value == {"text": "again"}


@pytest.mark.parametrize("refresh", [True, False])
def test_reading_lets_an_item_live_on(memory: MemoryModel, refresh: bool) -> None:
    settings_: TTLConfig = {"default_ttl": 10, "refresh_on_read": refresh}
    store = MSAStore(memory, namespace=f"refresh {refresh}", ttl=settings_)
    store.put(("a",), "k", {"text": "violins"})
    store.put(("a",), "for ever", {"text": "violas"}, ttl=None)
    reads = [
        lambda: store.get(("a",), "k"),
        lambda: store.search(("a",)),
        lambda: store.search(("a",), query="violins"),
    ]
    for read in reads:
        before = until(store, "k")
        assert timedelta(minutes=9) < before - datetime.now(UTC) <= timedelta(minutes=10)
        read()
        assert (until(store, "k") > before) is refresh
    before = until(store, "k")
    store.get(("a",), "k", refresh_ttl=not refresh)
    assert (until(store, "k") > before) is not refresh
    assert until(store, "for ever") is None
    assert [
        v.version for v in memory.namespace(f"refresh {refresh}").history(store._items(())[0].document.id)
    ] == [1], "a read makes no new version"


def test_changed_times_leave_a_whole_memory(tmp_path: Path) -> None:
    with open_memory(tmp_path / "memory") as memory:
        memory.add_many([{"id": id, "content": text} for id, text in FACTS.items()])
        assert memory.set_expiry(["bob", "ann", "nobody"], ttl=3600) == 2
        assert memory.set_expiry("ann") == 1
        assert memory.get("bob").version == 1
        assert memory.get("bob").expires_at > datetime.now(UTC) + timedelta(minutes=59)
        assert memory.get("ann").expires_at is None
        assert memory.set_expiry("bob", expires_at=datetime.now(UTC) - timedelta(seconds=1)) == 1
        assert [source.id for source in memory.search("violins", k=9)].count("bob") == 0
        assert memory.set_expiry("bob") == 0, "what has expired stays so"
        assert memory.verify() == ()
        assert memory.forget_expired().ids == ("bob",)
        assert memory.forget_expired().ids == ()
        assert memory.verify() == ()
    with open_memory(tmp_path / "memory") as memory:
        assert {document.id for document in memory.list()} == {"ann", "cat"}
        assert memory.verify() == ()


def test_sweeping(people: MSAStore, memory: MemoryModel) -> None:
    for key in ("one", "two"):
        people.put(("users", "bob"), key, {"text": "soon gone"}, ttl=1)
        expire_now(people, ("users", "bob"), key)
    assert people.sweep_ttl() == 2
    assert people.sweep_ttl() == 0
    assert len(people.search(())) == 3


def test_the_sweeper_sweeps_until_it_is_stopped(people: MSAStore) -> None:
    people.put(("users", "bob"), "short", {"text": "soon gone"}, ttl=1)
    expire_now(people, ("users", "bob"), "short")
    people.start_ttl_sweeper(sweep_interval_minutes=0.001)
    people.start_ttl_sweeper()
    stored, name = people._memory._shared.store, people._memory.namespace_name
    deadline = time.monotonic() + 60
    while stored._keys([(name, document_id(("users", "bob"), "short"))]):  # expired ones too
        assert time.monotonic() < deadline
    assert people.stop_ttl_sweeper(timeout=60)
    assert people.stop_ttl_sweeper()
    assert len(people.search(())) == 3


# processes, threads and loops


def test_it_outlives_the_process(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from msa_memory.testing import open_memory\n"
        "from msa_memory.integrations.langgraph import MSAStore\n"
        "with open_memory(sys.argv[1]) as memory, MSAStore(memory) as store:\n"
        "    store.put(('users', 'bob'), 'fact', {'text': 'Bob repairs violins.'})\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "memory")], check=True)
    with MSAStore(tmp_path / "memory") as store:
        assert [item.value for item in store.search(("users",), query="violins")] == [
            {"text": "Bob repairs violins."}
        ]


async def test_the_async_surface_is_the_same(people: MSAStore) -> None:
    assert seen(await people.asearch(("users",), query="violins")) == seen(
        people.search(("users",), query="violins")
    )
    await people.aput(("users", "bob"), "new", {"text": "New."})
    assert (await people.aget(("users", "bob"), "new")).value == {"text": "New."}
    await people.adelete(("users", "bob"), "new")
    assert await people.aget(("users", "bob"), "new") is None
    assert await people.alist_namespaces() == [("users", "bob")]


async def test_the_loop_goes_on_while_a_batch_runs(store: MSAStore) -> None:
    puts = [PutOp(("a",), str(number), {"text": f"violin {number}"}) for number in range(30)]
    batch, ticks = asyncio.create_task(store.abatch(puts)), 0
    while not batch.done():
        ticks += 1
        await asyncio.sleep(0)
    assert ticks > 10
    assert len(await store.asearch(("a",), limit=100)) == 30


async def test_many_writers_at_once(store: MSAStore) -> None:
    await asyncio.gather(*(store.aput((f"user{n % 3}",), str(n), {"n": n}) for n in range(12)))
    assert sorted(item.value["n"] for item in await store.asearch((), limit=100)) == list(range(12))
    assert await store.alist_namespaces() == [("user0",), ("user1",), ("user2",)]
