"""Documents: adding, replacing, reading, listing; the same in memory, on SQLite and on PostgreSQL."""

from datetime import UTC, datetime, timedelta

import pytest

from msa_memory.errors import (
    ConfigError,
    ConflictError,
    InvalidDocumentError,
    NotFoundError,
    StorageError,
)
from msa_memory.persistence import NewDocument, NewPassage, Store
from msa_memory.types import TensorBytes

NOON = datetime(2024, 5, 1, 12, 0, 0, 123456, tzinfo=UTC)


def document_with(*passages):
    return NewDocument(id="odd", namespace="default", text="x", passages=passages)


def assert_bank_is_sound(store):
    assert store.verify() == ()


def test_add_and_get_round_trip(any_store, new):
    metadata = {"source": "chat", "n": 2**60 + 1, "deep": {"a": [1, "x", None, True]}, "é": "\u2028"}
    document = new(
        any_store, "a", "Bøb lives in Oslo. 🎻", parts=3, metadata=metadata, timestamp=NOON, trust="low"
    )
    [added] = any_store.add([document])
    assert added == any_store.get("default", "a")
    assert (added.text, added.metadata, added.version) == (document.text, metadata, 1)
    assert (added.timestamp, added.trust, added.source, added.expires_at) == (NOON, "low", None, None)
    assert (added.passages, added.tokens) == (3, len(document.text))
    assert_bank_is_sound(any_store)


def test_states_come_back_bit_for_bit(any_store, new, states_of):
    any_store.add([new(any_store, f"d{i}", parts=2) for i in range(5)])
    records = any_store.changes(0).added
    assert len(records) == 10
    for _ in range(2):
        for record in records:
            found = any_store.states(record)
            expected = states_of(record.number)
            assert {name: (t.dtype, t.shape, bytes(t.data)) for name, t in found.items()} == {
                name: (t.dtype, t.shape, bytes(t.data)) for name, t in expected.items()
            }
            assert all(tensor.data.readonly for tensor in found.values())
            assert record.offset % 8 == 0


def test_a_document_without_passages_is_kept(any_store):
    any_store.add([NewDocument(id="empty", namespace="default", text="words")])
    assert any_store.get("default", "empty").passages == 0
    any_store.forget("default", ids=["empty"])
    assert any_store.exists("default", ["empty"]) == set()


def test_reopened_bank_holds_the_same(folder, store, new, again):
    added = store.add([new(store, f"d{i}", parts=2, metadata={"i": i}) for i in range(3)])
    records = store.changes(0)
    store.close()
    reopened = again()
    assert list(reopened.list("default")) == added[::-1]
    assert reopened.changes(0) == records
    assert reopened.identity.model == "tiny"
    assert_bank_is_sound(reopened)


def test_numbers_are_never_given_twice(folder, new):
    seen = []
    for _ in range(3):
        with Store.open(folder) as store:
            store.bind_model(model="tiny", fingerprint="f" * 64, info={})
            for count in (1, 20, 0, 3):
                numbers = store.reserve_numbers(count)
                assert len(numbers) == count
                seen += numbers
            store.add([new(store, "x")])
            seen += store.visible("default").tolist()
            store.forget("default", ids=["x"])
    assert len(set(seen)) == len(seen)


def test_add_is_all_or_nothing(any_store, new):
    any_store.add([new(any_store, "taken")])
    before = (any_store.generation(), any_store.stats("default"))
    with pytest.raises(ConflictError, match="'taken'"):
        any_store.add([new(any_store, "fresh"), new(any_store, "taken"), new(any_store, "other")])
    with pytest.raises(ConflictError, match="'twice'"):
        any_store.add([new(any_store, "twice"), new(any_store, "twice")])
    after = any_store.stats("default")
    assert (any_store.generation(), after.documents, after.state_bytes) == (
        before[0], before[1].documents, before[1].state_bytes,
    )  # fmt: skip
    assert any_store.exists("default", ["fresh", "other", "twice", "taken"]) == {"taken"}


def test_conflicts_can_replace_or_skip(any_store, new):
    any_store.add([new(any_store, "a", "old")])
    kept, fresh = any_store.add([new(any_store, "a", "new"), new(any_store, "b", "b")], on_conflict="skip")
    assert (kept.text, kept.version, fresh.text) == ("old", 1, "b")
    batch = [new(any_store, "a", "newer"), new(any_store, "c", "c1"), new(any_store, "c", "c2", parts=2)]
    replaced, first, second = any_store.add(batch, on_conflict="replace")
    assert (replaced.text, replaced.version) == ("newer", 2)
    assert first == second == any_store.get("default", "c")
    assert (second.text, second.version, second.passages) == ("c2", 2, 2)
    generation = any_store.generation()
    any_store.add([new(any_store, "a", "ignored")], on_conflict="skip")
    assert any_store.generation() == generation
    assert_bank_is_sound(any_store)


def test_wrong_arguments_are_named(any_store, new):
    with pytest.raises(ConfigError, match="'merge'"):
        any_store.add([new(any_store, "a")], on_conflict="merge")
    assert any_store.add([]) == []
    with pytest.raises(ConfigError, match="-1"):
        any_store.reserve_numbers(-1)
    with pytest.raises(ConfigError, match="never reserved"):
        any_store.add([document_with(NewPassage(start=0, end=1, tokens=1, number=10**6, states={}))])
    number = any_store.reserve_numbers(1)[0]
    short = {"keys": TensorBytes("F32", (4,), b"123")}
    with pytest.raises(StorageError, match=r"3 bytes.*needs 16"):
        any_store.add([document_with(NewPassage(start=0, end=1, tokens=1, number=number, states=short))])
    odd = {"keys": TensorBytes("F33", (1,), b"123")}
    with pytest.raises(StorageError, match="F33"):
        any_store.add([document_with(NewPassage(start=0, end=1, tokens=1, number=number, states=odd))])
    twice = [NewPassage(start=0, end=1, tokens=1, number=number, states={})] * 2
    with pytest.raises(ConfigError, match="repeat"):
        any_store.add([document_with(*twice)])
    assert any_store.count("default") == 0
    any_store.add([new(any_store, "works")])
    assert_bank_is_sound(any_store)


@pytest.mark.parametrize(
    "metadata", [{"a": float("nan")}, {"a": {1, 2}}, {"a": float("inf")}, {1: 2, "b": 3}]
)
def test_metadata_that_is_not_json_is_refused(store, new, metadata):
    with pytest.raises(InvalidDocumentError, match="metadata"):
        store.add([new(store, "a", metadata=metadata)])
    assert store.count("default") == 0


def test_text_that_no_database_holds_is_refused(store, new):
    with pytest.raises(InvalidDocumentError, match="surrogate"):
        store.add([NewDocument(id="a", namespace="default", text="half \ud800")])
    with pytest.raises(InvalidDocumentError, match="surrogate"):
        store.add([new(store, "a", metadata={"deep": ["\ud800"]})])
    with pytest.raises(InvalidDocumentError, match="surrogate"):
        store.get("default", "\ud800")
    with pytest.raises(InvalidDocumentError, match="64-bit"):
        store.passages([2**70])


def test_replace_keeps_history_and_swaps_passages(any_store, new):
    any_store.add(
        [new(any_store, "a", "Bob lives in Oslo.", parts=2, metadata={"v": 1}), new(any_store, "b")]
    )
    old = any_store.changes(0)
    replaced = any_store.replace(new(any_store, "a", "Bob lives in Bergen.", metadata={"v": 2}))
    assert (replaced.version, replaced.text, replaced.passages) == (2, "Bob lives in Bergen.", 1)
    delta = any_store.changes(old.generation)
    gone = tuple(record.number for record in old.added if record.document_id == "a")
    assert delta.removed == gone
    assert [record.document_id for record in delta.added] == ["a"]
    first, second = any_store.history("default", "a")
    assert (first.text, first.metadata, first.version, first.current) == (
        "Bob lives in Oslo.",
        {"v": 1},
        1,
        False,
    )
    assert (second.text, second.metadata, second.version, second.current) == (
        replaced.text,
        {"v": 2},
        2,
        True,
    )
    assert any_store.count("default", {"v": 1}) == 0
    assert any_store.count("default", {"v": 2}) == 1
    for record in old.added[:2]:
        with pytest.raises(NotFoundError, match="forgotten or replaced"):
            any_store.states(record)
    assert_bank_is_sound(any_store)


def test_replace_checks_what_it_replaces(any_store, new):
    with pytest.raises(NotFoundError, match="'a'"):
        any_store.replace(new(any_store, "a"))
    any_store.add([new(any_store, "a")])
    any_store.replace(new(any_store, "a", "second"), expected_version=1)
    with pytest.raises(ConflictError, match="version 2, expected 1"):
        any_store.replace(new(any_store, "a", "third"), expected_version=1)
    assert any_store.get("default", "a").text == "second"


def test_update_metadata_leaves_passages_alone(any_store, new):
    any_store.add([new(any_store, "a", "text", metadata={"x": 1, "y": 2})])
    before = any_store.changes(0)
    updated = any_store.update_metadata("default", "a", {"x": 3})
    assert (updated.version, updated.metadata, updated.text) == (2, {"x": 3}, "text")
    delta = any_store.changes(before.generation)
    assert (delta.added, delta.removed) == ((), ())
    assert any_store.changes(0).added == before.added
    assert [version.metadata for version in any_store.history("default", "a")] == [{"x": 1, "y": 2}, {"x": 3}]
    assert any_store.count("default", {"y": {"$exists": True}}) == 0
    with pytest.raises(ConflictError, match="version 2, expected 1"):
        any_store.update_metadata("default", "a", {}, expected_version=1)
    assert_bank_is_sound(any_store)


def test_namespaces_never_meet(any_store, new):
    hostile = ["default", "Default", "default ", "%", "_", "' OR 1=1 --", 'a"b', "ø"]
    for name in hostile:
        any_store.add([new(any_store, "same", f"text of {name}", namespace=name, metadata={"of": name})])
    assert set(any_store.namespaces()) == set(hostile)
    numbers = [tuple(any_store.visible(name).tolist()) for name in hostile]
    assert len({*numbers}) == len(hostile)
    for name in hostile:
        assert any_store.get(name, "same").text == f"text of {name}"
        assert [document.metadata for document in any_store.list(name)] == [{"of": name}]
        assert any_store.stats(name).documents == 1
    any_store.forget("_", ids=["same"])
    assert any_store.exists("_", ["same"]) == set()
    assert all(any_store.exists(name, ["same"]) for name in hostile if name != "_")
    with pytest.raises(NotFoundError):
        any_store.get("_", "same")


def test_pages_do_not_shift_while_documents_are_added(any_store, new):
    any_store.add([new(any_store, f"d{i:02}", metadata={"even": i % 2 == 0}) for i in range(25)])
    page = any_store.list("default", limit=10)
    seen = [document.id for document in page]
    while page.next_cursor:
        any_store.add([new(any_store, f"late{len(seen)}")])
        page = any_store.list("default", limit=10, cursor=page.next_cursor)
        seen += [document.id for document in page]
    assert seen == [f"d{i:02}" for i in reversed(range(25))]
    even = any_store.list("default", {"even": True}, limit=13)
    assert (len(even), even.next_cursor) == (13, None)


def test_cursors_belong_to_their_listing(any_store, new):
    any_store.add([new(any_store, f"d{i}", metadata={"a": 1}) for i in range(4)])
    any_store.add([new(any_store, f"d{i}", namespace="other") for i in range(4)])
    cursor = any_store.list("default", {"a": 1}, limit=2).next_cursor
    assert len(any_store.list("default", {"a": 1}, limit=2, cursor=cursor)) == 2
    for namespace, where in (("other", {"a": 1}), ("default", None), ("default", {"a": 2})):
        with pytest.raises(ConfigError, match="another listing"):
            any_store.list(namespace, where, cursor=cursor)
    for bad in ("", "x", "MS4yLjM", "é", cursor[:-3], cursor + "AAAA", "=" * 8):
        with pytest.raises(ConfigError, match="cursor"):
            any_store.list("default", {"a": 1}, cursor=bad)
    with pytest.raises(ConfigError, match="limit is 0"):
        any_store.list("default", limit=0)


def test_expired_documents_leave_lists_and_masks(any_store, new):
    past, future = datetime.now(UTC) - timedelta(days=1), datetime.now(UTC) + timedelta(days=1)
    any_store.add(
        [
            new(any_store, "old", expires_at=past),
            new(any_store, "young", expires_at=future),
            new(any_store, "plain"),
        ]
    )
    assert [document.id for document in any_store.list("default")] == ["plain", "young"]
    assert (any_store.count("default"), any_store.stats("default").documents) == (2, 2)
    assert len(any_store.visible("default")) == 2
    assert len(any_store.visible("default", now=past - timedelta(days=1))) == 3
    assert len(any_store.visible("default", now=future)) == 1
    assert any_store.exists("default", ["old", "young", "plain"]) == {"young", "plain"}
    for read in (any_store.get, any_store.history, lambda *name: any_store.restore_version(*name, 1)):
        with pytest.raises(NotFoundError, match=r"'old'.*expired at"):
            read("default", "old")
    with pytest.raises(NotFoundError, match="expired"):
        any_store.replace(new(any_store, "old"))
    any_store.compact()
    with pytest.raises(NotFoundError, match="no document 'old'"):
        any_store.get("default", "old")
    assert any_store.forget("default", where={"$id": "old"}).ids == ()
    assert_bank_is_sound(any_store)


def test_the_id_of_an_expired_document_is_free(any_store, new):
    past = datetime.now(UTC) - timedelta(days=1)
    any_store.add([new(any_store, f"d{i}", "was here", expires_at=past) for i in range(3)])
    numbers = {record.number for record in any_store.changes(0).added}
    generation = any_store.generation()
    [fresh] = any_store.add([new(any_store, "d0", "is here")])
    assert (fresh.version, fresh.text) == (1, "is here")
    assert any_store.history("default", "d0")[0].text == "is here"
    assert min(numbers) in any_store.changes(generation).removed
    [skipped] = any_store.add([new(any_store, "d1", "is here")], on_conflict="skip")
    assert (skipped.version, skipped.text) == (1, "is here")
    [replaced] = any_store.add([new(any_store, "d2", "is here")], on_conflict="replace")
    assert [version.text for version in any_store.history("default", "d2")] == ["was here", "is here"]
    assert replaced.version == 2
    assert any_store.visible("default").tolist() == [r.number for r in any_store.changes(0).added]
    assert_bank_is_sound(any_store)


def test_passages_carry_their_document(any_store, new):
    text = "Bob lives in Oslo and repairs violins."
    any_store.add(
        [
            new(any_store, "a", text, parts=3, metadata={"m": 1}, timestamp=NOON, source="chat"),
            new(any_store, "b"),
        ]
    )
    records = any_store.changes(0).added
    found = any_store.passages([*(record.number for record in records), 10**9])
    assert sorted(found) == [record.number for record in records]
    parts = [found[record.number] for record in records if record.document_id == "a"]
    assert "".join(part.text for part in parts) == text
    assert [part.record.ordinal for part in parts] == [0, 1, 2]
    assert all(
        (part.document_text, part.metadata, part.timestamp, part.source, part.version)
        == (text, {"m": 1}, NOON, "chat", 1)
        for part in parts
    )
    assert any_store.passages([]) == {}


def test_many_numbers_and_ids_in_one_call(store, new):
    store.add([new(store, f"d{i}") for i in range(1200)])
    numbers = store.visible("default")
    assert len(store.passages(numbers.tolist())) == 1200
    assert len(store.exists("default", [f"d{i}" for i in range(40_000)])) == 1200
    receipt = store.forget("default", ids=[f"d{i}" for i in range(1100)])
    assert receipt.counts == {"documents": 1100, "versions": 0, "passages": 1100, "messages": 0}
    assert store.count("default") == 100
