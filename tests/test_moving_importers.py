"""What other systems exported comes in with its ids, dates and labels, once however often it is imported."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.engine.engine import Engine
from msa_memory.errors import ConfigError, InvalidDocumentError, LimitError, MSAError, StorageError
from msa_memory.moving.importers import read_export
from msa_memory.testing import open_memory

MEM0 = [
    {
        "id": "892db2ae-06d9-49e5-8b3e-585ef9b85b8e",
        "memory": "Alice likes hiking in the mountains",
        "hash": "1a5f",
        "user_id": "alice",
        "agent_id": None,
        "run_id": "trip",
        "metadata": {"category": "hobby", "weight": 3},
        "created_at": "2024-07-26T10:29:36.630547-07:00",
        "updated_at": None,
    },
    {
        "id": "second",
        "memory": "Alice is allergic to nuts",
        "user_id": "alice",
        "metadata": None,
        "created_at": "2024-08-01T00:00:00+00:00",
        "updated_at": "2024-08-02T00:00:00+00:00",
    },
]
LANGGRAPH = [
    {
        "namespace": ["memories", "alice"],
        "key": "k1",
        "value": {"kind": "Memory", "content": {"content": "Alice sails a small boat."}},
        "created_at": "2025-01-02T03:04:05+00:00",
        "updated_at": "2025-01-02T03:04:05+00:00",
    },
    {
        "namespace": ["memories", "bob"],
        "key": "k1",
        "value": {"text": "Bob keeps bees.", "importance": 2},
        "created_at": "2025-01-03T00:00:00+00:00",
        "updated_at": "2025-01-03T00:00:00+00:00",
        "score": None,
    },
    {"namespace": ["facts"], "key": "k2", "value": {"color": "blue", "rooms": [1, 2]}},
]


@pytest.fixture
def memory() -> Iterator[MemoryModel]:
    with open_memory() as memory:
        yield memory


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the engine encodes from here on."""
    texts: list[str] = []
    encode = Engine.encode

    def spy(engine: Engine, number: int, header: str, text: str) -> object:
        texts.append(text)
        return encode(engine, number, header, text)

    monkeypatch.setattr(Engine, "encode", spy)
    return texts


@pytest.mark.parametrize("envelope", [lambda entries: entries, lambda entries: {"results": entries}])
def test_mem0(memory: MemoryModel, tmp_path: Path, envelope: Any) -> None:
    file = tmp_path / "mem0.json"
    file.write_text(json.dumps(envelope(MEM0)))
    first, second = memory.import_from("mem0", file)
    assert (first.id, first.text, first.source) == (MEM0[0]["id"], MEM0[0]["memory"], "mem0")
    assert first.metadata == {"category": "hobby", "weight": 3, "user_id": "alice", "run_id": "trip"}
    assert first.timestamp.isoformat() == "2024-07-26T17:29:36.630547+00:00"
    assert second.metadata == {"user_id": "alice", "updated_at": "2024-08-02T00:00:00+00:00"}
    assert [doc.id for doc in memory.list({"run_id": "trip", "$source": "mem0"})] == [first.id]


def test_langgraph(memory: MemoryModel) -> None:
    alice, bob, facts = memory.import_from("langgraph", LANGGRAPH)
    assert (alice.id, alice.text) == ('["memories", "alice", "k1"]', "Alice sails a small boat.")
    assert alice.metadata["namespace"] == ["memories", "alice"]
    assert alice.metadata["value"] == {"kind": "Memory"}
    assert bob.id != alice.id
    assert (bob.text, bob.metadata["value"]) == ("Bob keeps bees.", {"importance": 2})
    assert json.loads(facts.text) == {"color": "blue", "rooms": [1, 2]}
    assert "value" not in facts.metadata
    assert [doc.id for doc in memory.list({"namespace": {"$contains": "bob"}})] == [bob.id]


def test_importing_again_encodes_only_what_changed(memory: MemoryModel, encoded: list[str]) -> None:
    memory.import_from("mem0", MEM0)
    before = {doc.id: doc for doc in memory.list()}
    encoded.clear()
    memory.import_from("mem0", {"results": MEM0})
    assert not encoded
    assert {doc.id: doc for doc in memory.list()} == before
    changed = {**MEM0[1], "memory": "Alice is allergic to nuts and pollen"}
    memory.import_from("mem0", [MEM0[0], changed])
    assert encoded == [changed["memory"]]
    assert (memory.get("second").version, memory.count()) == (2, 2)


async def test_async_twin(memory: MemoryModel, tmp_path: Path) -> None:
    file = tmp_path / "items.json"
    file.write_text(json.dumps({"items": LANGGRAPH}))
    assert len(await memory.aimport_from("langgraph", str(file))) == 3
    with pytest.raises(StorageError, match="missing"):
        await memory.aimport_from("langgraph", tmp_path / "missing.json")


def test_keys_that_join_to_the_same_text_stay_apart(memory: MemoryModel) -> None:
    items = [
        {"namespace": namespace, "key": key, "value": {"text": f"{namespace} {key}"}}
        for namespace, key in ([["a", "b"], "c"], [["a"], "b/c"], [["a/b"], "c"], [['a", "b'], "c"])
    ]
    assert len({doc.id for doc in memory.import_from("langgraph", items)}) == 4
    [long] = memory.import_from("langgraph", [{"namespace": ["n" * 600], "key": "k", "value": "some text"}])
    assert len(long.id) == 64


@pytest.mark.parametrize(
    ("format", "data", "says"),
    [
        ("mem0", "{", "not JSON"),
        ("mem0", "[" * 100_000, "not JSON"),
        ("mem0", {"answer": 42}, "no list"),
        ("mem0", [7], "entry 0 .* int"),
        ("mem0", [MEM0[0], {"id": "x"}], "entry 1 .* memory None"),
        ("mem0", [{**MEM0[0], "metadata": [1]}], "metadata of type list"),
        ("langgraph", [{"namespace": "a", "key": "k", "value": {}}], "namespace 'a'"),
        ("langgraph", [{"namespace": ["a"], "key": "k"}], "no value"),
        ("langgraph", [{"namespace": ["a"], "key": "", "value": {}}], "key ''"),
    ],
)
def test_what_is_no_export_is_named(
    memory: MemoryModel, format: str, data: Any, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(InvalidDocumentError, match=says):
        memory.import_from(format, file)
    assert memory.count() == 0


def test_unknown_formats_and_limits(memory: MemoryModel) -> None:
    with pytest.raises(ConfigError, match="langgraph, mem0"):
        memory.import_from("zep", [])
    with open_memory(config=MemoryConfig(max_batch=1)) as small, pytest.raises(LimitError, match="max_batch"):
        small.import_from("mem0", MEM0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.dictionaries(
    st.sampled_from(["id", "memory", "metadata", "namespace", "key", "value", "created_at", "content"]), JSON
)


@given(st.lists(ENTRY | JSON, max_size=3) | JSON, st.sampled_from(["mem0", "langgraph"]))
def test_any_json_is_read_or_refused_by_name(data: Any, format: str) -> None:
    try:
        items = read_export(json.dumps(data), format)
    except MSAError:
        return
    assert all(isinstance(item["id"], str) and isinstance(item["content"], str) for item in items)
