"""Messages at the level of the store: with their document or not at all, once, in order."""

import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from msa_memory.errors import CatalogDamagedError, NotFoundError, StorageError
from msa_memory.persistence import NewMessage, Store

THEN = datetime(2026, 1, 31, 12, tzinfo=UTC)
SELF = Path(__file__)


def message(content: str = "Hello.", session: str = "s", role: str = "user", **fields: object) -> NewMessage:
    return NewMessage(
        **{
            "session": session,
            "namespace": "default",
            "role": role,
            "content": content,
            "timestamp": THEN,
            **fields,
        }
    )


def contents(
    store: Store, session: str = "s", namespace: str = "default", **part: int
) -> list[tuple[int, str]]:
    return [(each.position, each.content) for each in store.messages(namespace, session, **part)]


def test_a_message_and_its_document_are_one_write(any_store, new):
    generation = any_store.generation()
    document = new(any_store, "d", "Hello.", metadata={"session": "s"})
    stored = any_store.append_message(message(name="Bob", key="k"), document)
    assert any_store.generation() == generation + 1
    assert (stored.position, stored.document_id, stored.name, stored.key) == (0, "d", "Bob", "k")
    assert (stored.timestamp, stored.role, stored.session, stored.namespace) == (THEN, "user", "s", "default")
    assert any_store.messages("default", "s") == [stored]
    assert any_store.get("default", "d").metadata == {"session": "s", "position": 0}
    assert any_store.count("default", {"position": 0}) == 1
    assert any_store.append_message(message("Pinned.", role="system"), None).position == 1
    assert any_store.count("default") == 1
    assert any_store.verify() == ()


def test_a_key_is_unique_in_its_session_alone(any_store, new):
    first = any_store.append_message(message("One.", key="k"), new(any_store, "a"))
    generation = any_store.generation()
    assert any_store.append_message(message("Two.", key="k"), new(any_store, "b")) == first
    assert any_store.message("default", "s", "k") == first
    assert any_store.message("default", "s", "other") is None
    assert (any_store.exists("default", ["b"]), any_store.generation()) == (set(), generation)
    assert any_store.append_message(message("Two.", "t", key="k"), new(any_store, "b")).session == "t"
    elsewhere = message("Three.", key="k", namespace="n")
    assert any_store.append_message(elsewhere, new(any_store, "c", namespace="n")).position == 0
    assert any_store.append_message(message("No key."), None).position == 1
    assert any_store.append_message(message("No key."), None).position == 2
    assert any_store.verify() == ()


def test_the_newest_and_the_pinned(any_store):
    for number in range(12):
        role = "system" if number in (0, 3) else "user"
        any_store.append_message(message(str(number), role=role), None)
    assert contents(any_store) == [(n, str(n)) for n in range(12)]
    assert [n for n, _ in contents(any_store, newest=2)] == [0, 3, 10, 11]
    assert [n for n, _ in contents(any_store, newest=2, before=6)] == [0, 3, 4, 5]
    assert [n for n, _ in contents(any_store, before=3)] == [0, 1, 2]
    assert contents(any_store, "unknown") == contents(any_store, namespace="n") == []


def test_forgetting_takes_messages_and_empty_sessions_along(any_store, new):
    for number in range(3):
        any_store.append_message(message(str(number)), new(any_store, f"d{number}"))
    any_store.append_message(message("Alone.", "t"), new(any_store, "alone"))
    any_store.append_message(message("Pinned.", "u", role="system"), None)
    receipt = any_store.forget("default", ids=["d1", "alone"])
    assert (receipt.counts["documents"], receipt.counts["messages"]) == (2, 2)
    assert contents(any_store) == [(0, "0"), (2, "2")]
    assert any_store.sessions("default") == ["s", "u"]
    assert any_store.append_message(message("3"), None).position == 3
    plan = any_store.forget_session("default", "s", dry_run=True)
    assert (plan.ids, plan.counts["messages"]) == (("d0", "d2"), 3)
    assert any_store.forget_session("default", "s").ids == ("d0", "d2")
    assert (any_store.sessions("default"), any_store.count("default")) == (["u"], 0)
    with pytest.raises(NotFoundError, match="'s'"):
        any_store.forget_session("default", "s")
    assert any_store.forget_namespace("default", confirm="default").counts["messages"] == 1
    assert any_store.sessions("default") == []
    assert any_store.verify() == ()


def test_expiry_takes_the_message_along(any_store, new):
    past = datetime(2020, 1, 1, tzinfo=UTC)
    any_store.append_message(message("Gone."), new(any_store, "d", expires_at=past))
    any_store.append_message(message("Kept."), None)
    any_store.compact()
    assert contents(any_store) == [(1, "Kept.")]
    assert any_store.verify() == ()


def test_threads_take_consecutive_positions(any_store, new):
    errors: list[BaseException] = []

    def talk(name: str) -> None:
        try:
            for number in range(10):
                id = f"{name}-{number}"
                any_store.append_message(message(id, key=id), new(any_store, id))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=talk, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = contents(any_store)
    assert [position for position, _ in found] == list(range(40))
    for name in ("t0", "t1", "t2", "t3"):
        assert [text for _, text in found if text.startswith(name)] == [f"{name}-{n}" for n in range(10)]
    assert any_store.verify() == ()


@pytest.mark.parametrize("table", ["documents", "passages", "sessions", "messages", "commits"])
def test_a_write_that_fails_midway_leaves_nothing(store, new, table):
    store.append_message(message("Before."), new(store, "a"))
    before = store.generation()
    document = new(store, "b")
    verb = "UPDATE" if table == "sessions" else "INSERT"
    with store._database.writing() as connection:
        connection.exec_driver_sql(
            f"CREATE TRIGGER stop BEFORE {verb} ON {table} BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    with pytest.raises(StorageError):
        store.append_message(message("Lost."), document)
    with store._database.writing() as connection:
        connection.exec_driver_sql("DROP TRIGGER stop")
    assert (contents(store), store.exists("default", ["b"])) == ([(0, "Before.")], set())
    assert store.generation() == before
    assert store.append_message(message("After."), document).position == 1
    assert store.verify() == ()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("UPDATE messages SET content = 'Forged.' WHERE position = 1", "message 1 of session 's'"),
        ("UPDATE messages SET role = 'system' WHERE position = 1", "message 1 of session 's'"),
        ("UPDATE messages SET position = 7 WHERE position = 1", "message 7 of session 's'"),
        ("UPDATE messages SET document = NULL WHERE position = 1", "message 1 of session 's'"),
        ("UPDATE messages SET timestamp = timestamp + 1 WHERE position = 1", "message 1 of session 's'"),
        ("UPDATE sessions SET next_position = 1", "session 's'"),
        ("DELETE FROM messages WHERE position = 1", "lost, altered or brought back"),
    ],
)
def test_what_was_changed_below_sql_is_named(store, new, change, named):
    for number in range(3):
        store.append_message(message(str(number)), new(store, f"d{number}"))
    with store._database.writing() as connection:
        connection.exec_driver_sql(change)
    assert any(named in problem for problem in store.verify())
    if "messages SET" in change:
        with pytest.raises(CatalogDamagedError, match=named):
            store.messages("default", "s")
    if "sessions SET" in change:
        with pytest.raises(CatalogDamagedError, match=named):
            store.append_message(message("More."), None)


def test_a_damaged_session_can_be_forgotten(store, new):
    store.append_message(message("One."), new(store, "d"))
    with store._database.writing() as connection:
        connection.exec_driver_sql("UPDATE messages SET content = 'Forged.'")
        connection.exec_driver_sql("UPDATE sessions SET created_at = 5")
    assert store.forget_session("default", "s").ids == ("d",)
    assert store.sessions("default") == []
    assert store.verify() == ()


def write(folder: str) -> None:
    """Append without end, and say so: what a killed process did."""
    sys.path.insert(0, str(SELF.parent))
    from conftest import MODEL, make_document

    with Store.open(Path(folder)) as store:
        store.bind_model(**MODEL)
        number = 0
        while True:
            document = make_document(store, f"d{number}", f"text {number} " * 20, parts=2)
            print(store.append_message(message(f"text {number}"), document).position, flush=True)
            number += 1


@pytest.mark.parametrize("after", [1, 40])
def test_kill_leaves_the_last_acknowledged_message_last(folder, after):
    process = subprocess.Popen([sys.executable, str(SELF), str(folder)], stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(after)]
    process.kill()
    lines += process.communicate(timeout=60)[0].splitlines()
    with Store.open(folder) as store:
        assert store.verify() == ()
        found = contents(store)
        assert len(found) in (len(lines), len(lines) + 1)
        assert found == [(n, f"text {n}") for n in range(len(found))]
        listed = {document.id for document in store.list("default", limit=1000)}
        assert listed == {each.document_id for each in store.messages("default", "s")}
        assert store.append_message(message("On we go."), None).position == len(found)


if __name__ == "__main__":
    write(sys.argv[1])
