"""What a namespace shows, kept up to date by changes: always the same as looking at everything anew."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from msa_memory.persistence import Store
from msa_memory.persistence.filters import parse_filter
from msa_memory.persistence.visibility import Visibility

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
WHERES = (None, {"n": 1}, {"n": True}, {"n": {"$ne": 1}}, {"$or": [{"n": {"$gt": 1}}, {"$source": "chat"}]})
BESIDE = (
    {"$id": {"$nin": ["d0", "d2", "none", 7, None]}},
    {"$and": [{"n": {"$ne": 1}}, {"$id": {"$nin": ["d1"]}}]},
    {"$id": {"$nin": ["d0"]}, "$and": [{"$id": {"$ne": "d3"}}, {"$id": {"$nin": ["d1", "d0"]}}]},
    {"$not": {"$id": {"$nin": ["d0", "d1"]}}},
    {"$or": [{"n": 2}, {"$id": {"$nin": ["d0"]}}]},
)
NAMESPACES = ("left", "right")


def anew(store: Store, namespace: str, where: object, now: datetime) -> list[int]:
    """What a store shows that never looked before."""
    with store._database.reading() as connection:
        return Visibility().numbers(connection, namespace, parse_filter(where), now).tolist()


@settings(max_examples=15)
@given(st.data())
def test_a_kept_look_is_a_fresh_look(data):
    import importlib.util

    spec = importlib.util.spec_from_file_location("builders", Path(__file__).with_name("conftest.py"))
    builders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builders)
    with Store.open(None) as store:
        store.bind_model(**builders.MODEL)
        now, held, done = NOON, {name: [] for name in NAMESPACES}, 0
        for _ in range(data.draw(st.integers(1, 12))):
            namespace = data.draw(st.sampled_from(NAMESPACES))
            ids = held[namespace]
            verb = data.draw(
                st.sampled_from(["add", "add", "replace", "metadata", "forget", "compact", "wait"])
            )
            metadata = {"n": data.draw(st.sampled_from([1, 2, True, "1"]))}
            if verb == "add":
                expires = data.draw(st.sampled_from([None, None, now + timedelta(hours=3)]))
                fields = {"namespace": namespace, "metadata": metadata, "expires_at": expires}
                fields["source"] = data.draw(st.sampled_from([None, "chat"]))
                store.add([builders.make_document(store, f"d{done}", parts=2, **fields)])
                ids.append(f"d{done}")
                done += 1
            elif verb == "wait":
                now += timedelta(hours=2)
            elif verb == "compact":
                store.compact()
                held = {name: [d.id for d in store.list(name)] for name in NAMESPACES}
            elif alive := sorted(store.exists(namespace, ids)):
                id = data.draw(st.sampled_from(alive))
                if verb == "forget":
                    store.forget(namespace, ids=[id])
                    ids.remove(id)
                elif verb == "metadata":
                    store.update_metadata(namespace, id, metadata)
                else:
                    store.replace(builders.make_document(store, id, namespace=namespace, metadata=metadata))
            for name in NAMESPACES:
                for where in WHERES:
                    expected = anew(store, name, where, now)
                    assert store.visible(name, where, now=now).tolist() == expected, (verb, where)
                    assert expected == sorted(expected)


def test_a_look_reads_what_changed_only(store, new):
    store.add([new(store, f"d{i}", metadata={"i": i % 7}) for i in range(500)])
    wheres = (None, {"i": 3})
    for where in wheres:
        store.visible("default", where)
    statements: list[str] = []

    def count(connection, cursor, statement, *_):
        if statement.startswith("SELECT"):
            statements.append(statement)

    event.listen(store._database.engine, "after_cursor_execute", count)
    before = [store.visible("default", where) for where in wheres]
    assert len(statements) == 2
    assert all("bank.generation" in statement for statement in statements)
    store.add([new(store, "more", metadata={"i": 3})])
    after = [store.visible("default", where) for where in wheres]
    for old, young in zip(before, after, strict=True):
        assert len(young) == len(old) + 1
        assert len(np.setdiff1d(young, old)) == 1
    with pytest.raises(ValueError, match="read-only"):
        after[0][0] = 1


@pytest.mark.parametrize("where", BESIDE, ids=str)
def test_ids_left_out_are_what_a_listing_leaves_out(store, new, where):
    """A listing compiles the whole filter to SQL; looks take the ids off a look without them."""
    store.add([new(store, "d0", namespace="other", parts=2)])

    def check() -> None:
        shown = store.passages(store.visible("default", where).tolist())
        listed = store.list("default", where, limit=100)
        assert sorted(shown) == store.visible("default", where).tolist()
        assert {passage.record.document_id for passage in shown.values()} == {each.id for each in listed}
        assert len(shown) == 2 * len(listed.items)

    check()
    for i in range(5):
        store.add([new(store, f"d{i}", parts=2, metadata={"n": i % 3})])
        check()
    store.forget("default", ids=["d1"])
    store.replace(new(store, "d2", "another text", parts=2, metadata={"n": 1}))
    check()


def test_turns_that_leave_out_other_ids_share_a_look(store, new):
    store.add([new(store, f"d{i}", metadata={"i": i % 7}) for i in range(300)])
    for where in (None, {"i": 3}):
        store.visible("default", where)
    for turn in range(100):
        beside = {"$id": {"$nin": [f"d{i}" for i in range(turn, turn + 5)]}}
        assert len(store.visible("default", beside)) == 295
        shown = store.visible("default", {"$and": [{"i": 3}, beside]})
        assert len(shown) == 43 - len({i for i in range(turn, turn + 5) if i % 7 == 3})
        with pytest.raises(ValueError, match="read-only"):
            shown[0] = 1
    assert len(store._visibility._seen) == 2


def test_every_process_sees_anothers_changes_at_its_next_look(store, new, again):
    other = again()
    assert other.visible("default").tolist() == []
    store.add([new(store, "a", parts=2)])
    assert len(other.visible("default")) == 2
    store.update_metadata("default", "a", {"n": 1})
    assert len(other.visible("default", {"n": 1})) == 2
    store.forget("default", ids=["a"])
    assert other.visible("default").tolist() == []
    assert other.visible("default", {"n": 1}).tolist() == []
