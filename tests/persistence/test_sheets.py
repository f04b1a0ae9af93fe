"""Sheets: copies of states in files of their own, which are never trusted, and go with what they copy."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from msa_memory.errors import StateDamagedError, StorageError
from msa_memory.persistence import Store, disk, fork_bank
from msa_memory.persistence.sheets import SheetPages

OTHER = {"model": "tiny", "fingerprint": "e" * 64, "info": {"layers": 2}}


class Failing:
    """Lets a function run ``after`` times, then raises ``error`` at every call."""

    def __init__(self, function: Callable[..., object], after: int, error: BaseException) -> None:
        self.function, self.left, self.error = function, after, error
        self.failed = False

    def __call__(self, *arguments: object) -> object:
        if self.left == 0:
            self.failed = True
            raise self.error
        self.left -= 1
        return self.function(*arguments)


def holding(folder: Path, needles: list[bytes]) -> set[bytes]:
    """Those of the byte strings that stand in any file of the folder."""
    contents = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    return {needle for needle in needles if any(needle in content for content in contents)}


def copied(store: Store, numbers: list[int]) -> dict[str, bytes]:
    """Sections in which every byte string of the passages' states stands."""
    records = store.records(numbers)
    states = [store.states(records[number]) for number in numbers]
    keys = b"".join(bytes(each["keys"].data) for each in states)
    return {"keys": keys * 300, "empty": b"", "values": b"".join(bytes(s["values"].data) for s in states)}


def keep(store: Store, numbers: list[int]) -> SheetPages:
    pages = store.keep_sheet(numbers, copied(store, numbers))
    assert isinstance(pages, SheetPages)
    return pages


def numbers_of(store: Store) -> list[int]:
    return [record.number for record in store.changes(0).added]


def loaded(store: Store) -> list[tuple[int, ...]]:
    return [pages.numbers for pages in store.load().sheets]


@pytest.fixture
def filled(store, new) -> Store:
    store.add([new(store, f"d{i}", f"text {i} " * 20, parts=2) for i in range(8)])
    return store


def test_a_sheet_is_found_again_with_its_bytes(filled, again):
    numbers = numbers_of(filled)
    pages = keep(filled, numbers[:6])
    for store in (filled, again(), again(read_only=True)):
        found = store.load()
        [same] = found.sheets
        assert same.numbers == pages.numbers == tuple(numbers[:6])
        assert found.others == tuple(numbers[6:])
        assert found.generation == store.generation()
        assert {name: bytes(same.section(name)) for name in same.names} == copied(store, numbers[:6])
        assert {number: found.records[number] for number in numbers} == store.records(numbers)
        assert same.intact()
        with pytest.raises(StateDamagedError, match="no section 'other'"):
            same.section("other")
    assert filled.verify() == ()


def test_two_sheets_never_cover_one_passage(filled):
    numbers = numbers_of(filled)
    keep(filled, numbers[:6])
    keep(filled, numbers[8:12])
    keep(filled, numbers[4:10])
    assert loaded(filled) == [tuple(numbers[4:10])]
    keep(filled, numbers[4:10])
    assert loaded(filled) == [tuple(numbers[4:10])]


def test_where_no_sheet_can_be_kept(filled, new, again, folder):
    numbers = numbers_of(filled)
    sections = copied(filled, numbers)
    assert again(read_only=True).keep_sheet(numbers, sections) is None
    assert filled.keep_sheet([*numbers, 10**6], sections) is None
    assert filled.keep_sheet([], sections) is None
    with Store.open(None) as memory:
        memory.bind_model(model="tiny", fingerprint="f" * 64, info={})
        memory.add([new(memory, "a")])
        assert not memory.in_files
        assert memory.keep_sheet(numbers_of(memory), sections) is None
        assert memory.load().others == tuple(numbers_of(memory))
    waiting = again(lock_timeout_s=0.01)
    with filled._writer.locked():
        assert waiting.keep_sheet(numbers, sections) is None
    assert not list((folder / "states").glob("*.sheet"))


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE passages SET checksum = checksum + 1 WHERE number = 3",
        'UPDATE passages SET "end" = "end" + 1 WHERE number = 3',
        "UPDATE passages SET hash = 'x' WHERE number = 3",
        "DELETE FROM passages WHERE number = 3",
        "UPDATE documents SET id = 'other' WHERE id = 'd1'",
    ],
)
def test_rows_that_are_not_what_they_were_untie_a_sheet(filled, change):
    keep(filled, numbers_of(filled)[:8])
    with filled._database.writing() as connection:
        connection.execute(text(change))
    found = filled.load()
    assert found.sheets == ()
    assert set(found.others) == set(numbers_of(filled))


def test_a_sheet_of_another_bank_or_model_does_not_count(filled, new, tmp_path, folder):
    with Store.open(tmp_path / "other") as other:
        other.bind_model(**OTHER)
        other.add([new(other, f"d{i}", f"text {i} " * 20, parts=2) for i in range(8)])
        keep(other, numbers_of(other))
    [foreign] = (tmp_path / "other" / "states").glob("*.sheet")
    (folder / "states" / foreign.name).write_bytes(foreign.read_bytes())
    assert filled.load().sheets == ()


def test_a_flipped_byte_is_named_and_mended(filled, folder, states_of):
    """Wherever it is: no section is read with it, and ``repair`` takes the file away."""
    numbers = numbers_of(filled)
    keep(filled, numbers)
    expected = copied(filled, numbers)
    [file] = (folder / "states").glob("*.sheet")
    whole = file.read_bytes()
    places = [*range(0, 400, 7), *range(4096, len(whole), 997)]
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        for pages in filled.load().sheets:
            for name in pages.names:
                with suppress(StateDamagedError):
                    assert pages.section(name) == expected[name]
    file.write_bytes(whole[: len(whole) // 2])
    assert filled.load().sheets == ()
    [problem] = filled.verify()
    assert file.name in problem
    repair = filled.repair(lambda passage: states_of(passage.record.number))
    assert repair.repaired == (problem,)
    assert not file.exists()
    assert filled.verify() == ()


@pytest.mark.parametrize("action", ["forget", "replace", "expire", "compact", "namespace"])
def test_nothing_of_what_goes_stays_in_a_sheet(filled, folder, new, states_of, action):
    """Its bytes are nowhere; who has it mapped can tell; sheets that it is not in stay."""
    numbers = numbers_of(filled)
    gone, other = keep(filled, numbers[:6]), keep(filled, numbers[8:])
    needles = [bytes(states_of(number)["keys"].data) for number in numbers[:2]]
    assert holding(folder, needles) == set(needles)
    if action == "forget":
        filled.forget("default", ids=["d0"])
    elif action == "replace":
        filled.replace(new(filled, "d0", "another text", parts=1))
    elif action == "expire":
        filled.set_expiry("default", ["d0"], filled.get("default", "d0").created_at)
        filled.forget_expired("default")
    elif action == "namespace":
        filled.forget_namespace("default", confirm="default")
    else:
        filled.forget("default", ids=["d0"])
        keep(filled, numbers[2:6])
        filled.forget("default", ids=["d5", "d6", "d7"])
        filled.compact()
    assert holding(folder, needles) == set()
    assert not gone.intact()
    assert set(gone.section("empty")) == set()
    left = [] if action in ("compact", "namespace") else [tuple(numbers[8:])]
    assert loaded(filled) == left
    assert other.intact() == bool(left)
    assert filled.verify() == ()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "unlink"])
def test_an_interrupted_forget_is_finished_by_the_next_write(
    filled, folder, new, states_of, monkeypatch, call
):
    for after in range(10):
        id = f"secret{after}"
        document = new(filled, id)
        filled.add([document])
        numbers = [number for number in numbers_of(filled) if number >= document.passages[0].number - 4]
        keep(filled, numbers)
        needles = [bytes(states_of(document.passages[0].number)["keys"].data)]
        failing = Failing(getattr(os, call), after, OSError(5, "Input/output error"))
        with monkeypatch.context() as patch:
            patch.setattr(disk.os, call, failing)
            with suppress(StorageError):
                filled.forget("default", ids=[id])
        filled.add([new(filled, f"next{after}")])
        if not filled.exists("default", [id]):
            assert holding(folder, needles) == set()
        assert filled.verify() == ()
        if not failing.failed:
            return
    pytest.fail("it never came to an end")


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "rename", "fsync", "open"])
def test_a_sheet_that_could_not_be_written_leaves_the_bank_as_it_was(
    filled, folder, new, states_of, monkeypatch, call
):
    numbers = numbers_of(filled)
    sections = copied(filled, numbers)
    before = filled.changes(0)
    for after in range(20):
        failing = Failing(getattr(os, call), after, OSError(28, "No space left on device"))
        with monkeypatch.context() as patch:
            patch.setattr(disk.os, call, failing)
            kept = filled.keep_sheet(numbers, sections)
        assert (kept is None) == failing.failed
        assert filled.changes(0) == before
        assert all(
            bytes(s) == sections[n] for p in filled.load().sheets for n in p.names for s in [p.section(n)]
        )
        if not failing.failed:
            break
    else:
        pytest.fail("it never came to an end")
    unfinished = folder / "states" / "sheet"
    assert not unfinished.exists()
    unfinished.write_bytes(needle := bytes(states_of(numbers[0])["keys"].data))  # as a crash may leave it
    filled.forget("default", ids=["d0"])
    assert not holding(folder, [needle])
    assert not unfinished.exists()


FORGET = """
import sys
from pathlib import Path
from msa_memory.persistence import Store
with Store.open(Path(sys.argv[1])) as store:
    store.forget("default", ids=["d1"])
"""


def test_another_process_takes_it_away(filled, folder):
    """What is mapped reads as zeros from its first byte on; nothing is torn from under its reader."""
    pages = keep(filled, numbers_of(filled))
    section = pages.section("keys")
    assert any(section)
    subprocess.run([sys.executable, "-c", FORGET, str(folder)], check=True)
    assert not pages.intact()
    assert not any(section)
    assert filled.load().sheets == ()


def test_a_fork_has_none_and_leaves_the_first_banks_alone(filled, tmp_path, states_of):
    numbers = numbers_of(filled)
    pages = keep(filled, numbers)
    fork_bank(filled, tmp_path / "fork")
    with Store.open(tmp_path / "fork") as fork:
        assert fork.load().sheets == ()
        keep(fork, numbers)
        fork.forget("default", ids=["d0"])
        assert fork.load().sheets == ()
    assert pages.intact()
    assert loaded(filled) == [tuple(numbers)]
    linked = tmp_path / "linked"
    linked.hardlink_to(pages.path)
    before = linked.read_bytes()
    filled.forget("default", ids=["d0"])
    assert linked.read_bytes() == before, "a file that somebody else holds too is not written to"


def test_records_are_made_when_asked_for(filled):
    records: Any = filled.load().records
    numbers = numbers_of(filled)
    assert list(records) == numbers
    assert len(records) == len(numbers)
    assert records.get(10**6) is None
    assert records.keys() - set(numbers[1:]) == {numbers[0]}
    first = records[numbers[0]]
    assert records[numbers[0]] is first
    del records[numbers[0]]
    assert numbers[0] not in records
    records[numbers[0]] = first
    assert records[numbers[0]] is first
