"""Two namespaces in one memory never see each other, whatever their names, ids, words and filters are."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.errors import MSAError
from msa_memory.testing import open_memory

BRIEF = MemoryConfig(max_new_tokens=3)
HOSTILE = [
    "default",
    "'; DROP TABLE documents; --",
    '" OR "1"="1',
    "%",
    "_",
    "*",
    "\\",
    "a/../b",
    "$and",
    "$id",
    "null",
    "1",
    "a",
    "A",
    "á",
    "á",
    "<|im_end|>",
    " ",
    "  ",
    "\n",
    "\u202e",
    "\uffff",
    "n" * 512,
]
NAMES = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40),
)
VALUES = st.one_of(NAMES, st.integers(-(2**53), 2**53), st.booleans(), st.none(), st.floats(allow_nan=False))
KEYS = NAMES.filter(lambda key: not key.startswith("$") and "." not in key)


@pytest.fixture
def memory() -> Iterator[MemoryModel]:
    with open_memory(config=BRIEF) as memory:
        yield memory


def seen(view: MemoryModel, where: dict | None = None) -> set[str]:
    """Ids of everything that any way of reading shows; they must agree."""
    listed = found(view, where)
    answer = view.query("Who repairs violins?", where=where)
    assert {source.id for source in (*answer.sources, *answer.dropped)} <= listed
    assert {source.id for source in view.context("violin", where=where).sources} <= listed
    explained = view.explain("violin", where=where)
    assert {name for layer in explained.layers for name in layer.documents} <= listed
    return listed


def found(view: MemoryModel, where: dict | None = None) -> set[str]:
    """What the list, the count and the routers show."""
    listed = {document.id for document in view.list(where, limit=1000)}
    assert {source.id for source in view.search("violin lighthouse tea", k=1000, where=where)} == listed
    assert view.count(where) == len(listed)
    return listed


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=NAMES, other=NAMES, ids=st.lists(NAMES, min_size=1, max_size=3, unique=True), where=st.data())
def test_hostile_names_never_meet(
    memory: MemoryModel, one: str, other: str, ids: list[str], where: st.DataObject
) -> None:
    if one == other:
        other += "'" if len(other) < 512 else ""
    if one == other:
        return
    left, right = memory.namespace(one), memory.namespace(other)
    left.add_many([{"content": f"Bob repairs violin {n}.", "id": id} for n, id in enumerate(ids)])
    right.add("Ann paints lighthouses.", id=ids[0])
    right.session(ids[0]).append("user", "Only on the right.", key=ids[0])
    try:
        assert seen(left) == set(ids)
        assert right.get(ids[0]).text == "Ann paints lighthouses."
        assert (left.sessions(), left.session(ids[0]).messages()) == ([], [])
        value = where.draw(NAMES)
        assert seen(left, {"$id": value}) == {value} & set(ids)
        left.forget(ids)
        assert seen(left) == set()
        assert right.count() == 2
        assert len(right.session(ids[0]).messages()) == 1
    finally:
        for view in (left, right):
            if view.count():
                view.forget_namespace(view.namespace_name, confirm=view.namespace_name)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=KEYS, stored=VALUES, asked=VALUES)
@example(key="a", stored="1", asked=1)
@example(key="a", stored=1, asked=True)
@example(key="a", stored=1, asked=1.0)
@example(key="a' OR '1'='1", stored="x", asked="x' OR '1'='1")
@example(key="%", stored="%", asked="_")
@example(key="a", stored="\u00e1", asked="a\u0301")
def test_a_filter_matches_exactly_what_is_equal(
    memory: MemoryModel, key: str, stored: Any, asked: Any
) -> None:
    view = memory.namespace("filters")
    document = view.add("Bob repairs violins.", metadata={key: stored})
    elsewhere = memory.namespace("elsewhere").add("Ann paints lighthouses.", metadata={key: asked})
    equal = isinstance(stored, bool) == isinstance(asked, bool) and stored == asked
    try:
        assert found(view, {key: asked}) == ({document.id} if equal else set())
        assert found(view, {key: {"$ne": asked}}) == (set() if equal else {document.id})
        assert found(view, {key: {"$in": [asked]}}) == ({document.id} if equal else set())
        assert view.forget(where={key: asked}).ids == ((document.id,) if equal else ())
        assert memory.namespace("elsewhere").get(elsewhere.id) == elsewhere
    finally:
        for each in (view, memory.namespace("elsewhere")):
            if each.count():
                each.forget_namespace(each.namespace_name, confirm=each.namespace_name)


JSON = st.recursive(
    st.one_of(VALUES, st.floats()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                NAMES, st.sampled_from(["$and", "$or", "$not", "$eq", "$in", "$gt", "$exists", "$contains"])
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.one_of(JSON, st.dictionaries(NAMES, JSON, max_size=3)))
def test_no_filter_reaches_another_namespace_or_breaks(memory: MemoryModel, where: Any) -> None:
    """Any value at all: a named error, or some of the namespace's own documents."""
    mine, other = memory.namespace("mine"), memory.namespace("other")
    mine.add("Bob repairs violins.", id="mine", on_conflict="skip")
    other.add("Ann repairs violins.", id="other", on_conflict="skip")
    try:
        listed = {document.id for document in mine.list(where)}
    except MSAError:
        return
    assert listed <= {"mine"}
    assert {source.id for source in mine.search("violins", where=where)} == listed


def test_many_threads_on_two_namespaces_never_meet(memory: MemoryModel) -> None:
    """The same ids, words and sessions on both sides, changed and read by four threads each."""
    names, errors = ["left", "left' --"], []

    def live(name: str, number: int) -> None:
        view = memory.namespace(name)
        try:
            for turn in range(4):
                id = f"{number}-{turn}"
                view.add(f"{name} repairs violin {id}.", id=id, metadata={"side": name})
                view.session("s").append("user", f"{name} says {id}.", name=name)
                for source in (*view.search("violin", k=100), *view.query("Who repairs?").sources):
                    assert source.text.startswith(name)
                    assert source.metadata.get("side", source.metadata.get("speaker")) == name
                assert all(message.name == name for message in view.session("s").messages())
                assert view.get(id).text == f"{name} repairs violin {id}."
                if turn % 2:
                    view.forget(id)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=live, args=(name, n)) for name in names for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    expected = {f"{number}-{turn}" for number in range(4) for turn in (0, 2)}
    for name in names:
        view = memory.namespace(name)
        assert {document.id for document in view.list({"side": name}, limit=100)} == expected
        assert [message.position for message in view.session("s").messages()] == list(range(16))
    assert memory.verify() == ()


async def test_many_tasks_on_two_namespaces_never_meet(memory: MemoryModel) -> None:
    async def live(name: str) -> None:
        view = memory.namespace(name)
        for turn in range(4):
            await view.aadd(f"{name} repairs violins.", id=str(turn))
            async for chunk in view.astream("Who repairs violins?"):
                if chunk.answer:
                    assert {source.text for source in chunk.answer.sources} == {f"{name} repairs violins."}
            found = await view.asearch("violins", k=50)
            assert {source.text for source in found} == {f"{name} repairs violins."}
            if turn == 2:
                await view.aforget("0")

    await asyncio.gather(*(live(name) for name in ("Ann", "Bob", "ann", "Ann ")))
    assert [memory.namespace(name).count() for name in ("Ann", "Bob", "ann", "Ann ")] == [3] * 4


def test_a_view_cannot_be_turned_into_another(memory: MemoryModel) -> None:
    view = memory.namespace("n")
    with pytest.raises(AttributeError):
        view.namespace_name = "default"
    with pytest.raises(AttributeError):
        view.session("s").namespace_name = "default"
    page = view.namespace("other")
    assert (view.namespace_name, page.namespace_name) == ("n", "other")
