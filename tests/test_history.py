"""Versions, going back to one, and what expires: seen by no reading, erased by ``compact``."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.errors import InvalidDocumentError, MSAError, NotFoundError, ReadOnlyError
from msa_memory.testing import open_memory, tiny_model

BRIEF = MemoryConfig(max_new_tokens=8)
AT_ONCE = 1e-6
"""Seconds: over before ``add`` returns."""


@pytest.fixture
def memory() -> Iterator[MemoryModel]:
    with open_memory(config=BRIEF) as memory:
        yield memory


# restore


def test_restore_brings_a_version_back_as_the_newest(memory: MemoryModel) -> None:
    memory.add("Bob lives in Oslo.", id="bob", metadata={"a": 1}, source="chat", trust="high")
    memory.update("bob", "Bob lives in Bergen.", metadata={"a": 2, "b": 3})
    back = memory.restore("bob", 1)
    assert (back.version, back.text, back.metadata) == (3, "Bob lives in Oslo.", {"a": 1})
    assert (back.source, back.trust) == ("chat", "high")
    assert memory.get("bob") == back
    assert memory.search("Bob")[0].text == "Bob lives in Oslo."
    assert "Bergen" not in memory.context("Where is Bob?").text
    assert [(v.version, v.text, v.current) for v in memory.history("bob")] == [
        (1, "Bob lives in Oslo.", False),
        (2, "Bob lives in Bergen.", False),
        (3, "Bob lives in Oslo.", True),
    ]
    assert memory.restore("bob", 2).text == "Bob lives in Bergen."
    assert (memory.count({"b": 3}), memory.count({"a": 1})) == (1, 0)


def test_restore_brings_back_what_a_replacement_changed(memory: MemoryModel) -> None:
    """Labels and date belong to the text: a distrusted text does not come back as a trusted one."""
    first = memory.add("Old.", id="x", source="web", trust="low", timestamp="2020-05-17")
    memory.add("New.", id="x", source="chat", trust="high", on_conflict="replace")
    back = memory.restore("x", 1)
    assert (back.source, back.trust, back.timestamp) == ("web", "low", first.timestamp)


@pytest.mark.parametrize("timestamp", [None, "2020-05-17"])
def test_a_restored_text_is_encoded_as_it_was(
    memory: MemoryModel, encoded: list[str], timestamp: str | None
) -> None:
    first = memory.add("Text.", id="x", metadata={"title": "T", "speaker": "Ann"}, timestamp=timestamp)
    memory.update("x", "Other.")
    assert memory.restore("x", 1).timestamp == first.timestamp
    assert encoded[2] == encoded[0]
    assert encoded[0].startswith("T | 2020-05-17 | Ann" if timestamp else "T | Ann")


def test_restoring_the_current_version_repairs_its_states(memory: MemoryModel, encoded: list[str]) -> None:
    memory.add("Text.", id="x")
    assert memory.restore("x", 1).version == 2
    assert encoded == ["Text.", "Text."]


@pytest.mark.parametrize(
    ("id", "version", "error"),
    [
        ("x", 0, NotFoundError),
        ("x", 3, NotFoundError),
        ("x", -1, NotFoundError),
        ("ghost", 1, NotFoundError),
        ("gone", 1, NotFoundError),
        ("x", "1", InvalidDocumentError),
        ("x", True, InvalidDocumentError),
        ("x", 1.0, InvalidDocumentError),
        ("", 1, InvalidDocumentError),
    ],
)
def test_what_is_not_there_cannot_be_restored(
    memory: MemoryModel, id: str, version: object, error: type[MSAError]
) -> None:
    memory.add_many([{"content": "One.", "id": "x"}, {"content": "Gone.", "id": "gone", "ttl": AT_ONCE}])
    memory.update("x", "Two.")
    with pytest.raises(error, match=r"version|id|document"):
        memory.restore(id, version)
    assert (memory.get("x").version, memory.get("x").text) == (2, "Two.")


def test_what_was_forgotten_has_no_history(memory: MemoryModel) -> None:
    memory.add("One.", id="x")
    memory.update("x", "Two.")
    memory.forget("x")
    for verb in (memory.history, lambda id: memory.restore(id, 1)):
        with pytest.raises(NotFoundError):
            verb("x")
    memory.add("Another.", id="x")
    assert [version.text for version in memory.history("x")] == ["Another."]


def test_a_read_only_memory_restores_nothing(tmp_path: Path) -> None:
    with open_memory(tmp_path / "m") as memory:
        memory.add("One.", id="x")
    with open_memory(tmp_path / "m", read_only=True) as memory, pytest.raises(ReadOnlyError):
        memory.restore("x", 1)


async def test_the_twin_restores(memory: MemoryModel) -> None:
    await memory.aadd("One.", id="x")
    await memory.aupdate("x", "Two.")
    assert (await memory.arestore("x", 1)).text == "One."


RESTORING = """
import sys
from msa_memory.testing import open_memory
with open_memory(sys.argv[1]) as memory:
    print("ready", flush=True)
    while True:
        print(memory.restore("x", 1).version, flush=True)
"""


@pytest.mark.parametrize("after", [0, 3])
def test_a_killed_restore_leaves_the_version_before_or_after(tmp_path: Path, after: int) -> None:
    tiny_model()
    with open_memory(tmp_path / "m") as memory:
        memory.add("One. " * 200, id="x")
        memory.update("x", "Two.")
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", RESTORING, str(tmp_path / "m")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(1 + after)]
    os.kill(process.pid, signal.SIGKILL)
    said += process.communicate(timeout=60)[0].splitlines()
    last = int(said[-1]) if len(said) > 1 else 2
    with open_memory(tmp_path / "m") as memory:
        assert memory.verify() == ()
        found = memory.get("x")
        assert found.version in (last, last + 1)
        assert found.text == ("Two." if found.version == 2 else "One. " * 200)
        assert [v.version for v in memory.history("x")] == list(range(1, found.version + 1))
        assert {source.id for source in memory.search("One")} == {"x"}


# expiry


def expired_sightings(memory: MemoryModel) -> list[object]:
    """Everything the public readings show of the document ``gone``."""

    def of(verb: Callable[[], object]) -> list[object]:
        try:
            return [verb()]
        except NotFoundError:
            return []

    return [
        *of(lambda: memory.get("gone")),
        *of(lambda: memory.history("gone")),
        *(document for document in memory.list(limit=1000) if document.id == "gone"),
        *(document for document in memory.list({"kind": "gone"})),
        *(source for source in memory.search("violins", k=50) if source.id == "gone"),
        *(source for source in memory.query("violins").sources if source.id == "gone"),
        *(source for source in memory.context("violins").sources if source.id == "gone"),
        *(name for layer in memory.explain("violins").layers for name in layer.documents if name == "gone"),
        *range(memory.count({"kind": "gone"})),
    ]


@pytest.mark.parametrize("ttl", [AT_ONCE, timedelta(microseconds=1)])
def test_what_expired_is_seen_by_no_reading_and_erased_by_compact(
    tmp_path: Path, ttl: float | timedelta
) -> None:
    secret = "Zyxomma violins were on sale."
    with open_memory(tmp_path / "m", config=BRIEF) as memory:
        memory.add("Violins are made of wood.", id="kept")
        memory.add(secret, id="gone", metadata={"kind": "gone"}, ttl=ttl)
        assert expired_sightings(memory) == []
        assert memory.count() == memory.stats.documents == 1
        memory.compact()
        assert expired_sightings(memory) == []
        assert memory.verify() == ()
        assert memory.get("kept").text == "Violins are made of wood."
    found = [
        path for path in (tmp_path / "m").rglob("*") if path.is_file() and b"Zyxomma" in path.read_bytes()
    ]
    assert found == []


def test_expiry_counts_in_every_open_memory(tmp_path: Path) -> None:
    """No generation changes when time passes: the other memory's bank is as fresh as it can be."""
    with open_memory(tmp_path / "m", config=BRIEF) as one, open_memory(tmp_path / "m", config=BRIEF) as two:
        two.add("Violins are made of wood.", id="kept")
        assert [source.id for source in one.search("violins")] == ["kept"]
        two.add("Violins were on sale.", id="gone", metadata={"kind": "gone"}, ttl=AT_ONCE)
        assert expired_sightings(one) == expired_sightings(two) == []


def test_a_ttl_counts_from_now(memory: MemoryModel) -> None:
    before = datetime.now(UTC)
    seconds = memory.add("One.", ttl=3600).expires_at
    hour = memory.add("Two.", ttl=timedelta(hours=1)).expires_at
    (listed,) = memory.add_many([{"content": "Three.", "ttl": 3600}])
    for found in (seconds, hour, listed.expires_at):
        assert found is not None
        assert before + timedelta(hours=1) <= found <= datetime.now(UTC) + timedelta(hours=1)
    assert memory.count() == 3


async def test_the_twin_takes_a_ttl(memory: MemoryModel) -> None:
    assert (await memory.aadd("One.", ttl=AT_ONCE)).expires_at is not None
    assert memory.count() == 0


@pytest.mark.parametrize(
    "options",
    [
        {"ttl": 0},
        {"ttl": -1},
        {"ttl": float("nan")},
        {"ttl": float("inf")},
        {"ttl": 10**400},
        {"ttl": timedelta(0)},
        {"ttl": timedelta.max},
        {"ttl": True},
        {"ttl": "1h"},
        {"ttl": 5, "expires_at": "2030-01-01"},
    ],
)
def test_a_ttl_that_makes_no_sense_is_named(memory: MemoryModel, options: dict) -> None:
    with pytest.raises(InvalidDocumentError, match="ttl"):
        memory.add("Text.", **options)
    assert memory.count() == 0


def test_an_update_keeps_the_expiry(memory: MemoryModel) -> None:
    note = memory.add("One.", id="x", ttl=3600)
    assert memory.update("x", "Two.").expires_at == note.expires_at
    assert memory.restore("x", 1).expires_at == note.expires_at
