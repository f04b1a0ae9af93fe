"""Random damage to every file of a bank: each is named, or harmless because every read is unchanged."""

import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from msa_memory.errors import MSAError, StateDamagedError
from msa_memory.persistence import PassageRecord, Store

IDS = [f"doc{i}" for i in range(12)]
PARTIAL = ("changes", "passages", "states")
"""Reads that go on with what is there where the store has said that something is lost."""
WHERES = [{"even": True}, {"i": {"$gte": 6}}, {"tags": "odd"}, {"$source": "chat"}]


def placeless(record: PassageRecord) -> PassageRecord:
    """Without the place of its states: a wrong one is named when it is followed, which ``states`` does."""
    return replace(record, segment="", offset=0)


def reads() -> dict[str, Callable[[Store], object]]:
    """Every public read with its arguments, by a name for the failure's message."""

    def states(store: Store) -> object:
        return {
            record.number: {name: bytes(tensor.data) for name, tensor in store.states(record).items()}
            for record in store.changes(0).added
        }

    def changes(store: Store) -> object:
        """Without document ids, which are checked with the text, and rows whose states are refused."""
        return {astuple(replace(placeless(record), document_id="")) for record in store.changes(0).added
                if record.checksum >= 0}  # fmt: skip

    def passages(store: Store) -> object:
        found = store.passages(store.visible("default").tolist())
        return {number: replace(each, record=placeless(each.record)) for number, each in found.items()}

    found: dict[str, Callable[[Store], object]] = {
        "identity": lambda store: store.identity,
        "changes": changes,
        "list": lambda store: list(store.list("default")),
        "pages": lambda store: list(store.list("default", limit=5)),
        "count": lambda store: store.count("default"),
        "exists": lambda store: store.exists("default", [*IDS, "none"]),
        "other": lambda store: list(store.list("other")),
        "namespaces": lambda store: store.namespaces(),
        "passages": passages,
        "states": states,
        "stats": lambda store: (store.stats("default").passages, store.stats("default").tokens),
    }
    for id in IDS:
        found[f"get {id}"] = lambda store, id=id: store.get("default", id)
        found[f"history {id}"] = lambda store, id=id: store.history("default", id)
    for where in WHERES:
        found[f"list {where}"] = lambda store, where=where: list(store.list("default", where))
        found[f"visible {where}"] = lambda store, where=where: store.visible("default", where).tolist()
    return found


def outcome(read: Callable[[Store], object], store: Store) -> object:
    """What a read gives; one of our errors is as good as an answer, a foreign one is not."""
    try:
        return read(store)
    except MSAError as error:
        return type(error)


def is_part(found: object, expected: object) -> bool:
    """Whether an answer holds nothing that the undamaged one does not."""
    if isinstance(found, dict):
        return all(expected.get(key) == found[key] for key in found)
    return isinstance(found, type) or set(found) <= set(expected)


def fill(folder: Path, new: Callable[..., object], close: bool) -> Store:
    store = Store.open(folder)
    store.bind_model(model="tiny", fingerprint="f" * 64, info={"layers": 2})
    store.add(
        [
            new(
                store, id, f"the unmistakable text {i} " * (1 + i % 3), parts=2,
                source=["chat", "mail"][i % 2],
                metadata={"i": i, "even": i % 2 == 0, "tags": ["odd"] if i % 2 else []},
            )
            for i, id in enumerate(IDS)
        ]
    )  # fmt: skip
    store.replace(new(store, "doc9", "doc9 once more"))
    store.update_metadata("default", "doc3", {"i": 3, "even": False})
    store.add([new(store, "doc0", "of another namespace", namespace="other"), new(store, "gone")])
    store.forget("default", ids=["gone"])
    if close:
        store.close()
    return store


def damage(file: Path, generator: random.Random) -> str:
    """Flip one byte, cut the file off, or delete one byte of it."""
    data = bytearray(file.read_bytes())
    place = generator.randrange(len(data))
    kind = generator.choice(["flip", "flip", "flip", "truncate", "delete"])
    if kind == "flip":
        data[place] ^= 1 << generator.randrange(8) if generator.random() < 0.5 else 0xFF
    elif kind == "truncate":
        del data[place:]
    else:
        del data[place]
    file.write_bytes(data)
    return f"{kind} at byte {place} of {file.name}"


def check(folder: Path, expected: dict[str, object], done: str) -> bool:
    """Whether the damage was named by any read; asserts that no read gives another answer."""
    try:
        store = Store.open(folder, read_only=True)
    except MSAError:
        return True
    with store:
        named = 0
        for name, read in reads().items():
            found = outcome(read, store)
            if name == "changes" or (store.damage and (name in PARTIAL or name.startswith("visible"))):
                assert is_part(found, expected[name]), f"{done}: {name} gives {found!r:.300}"
            elif found != expected[name]:
                assert isinstance(found, type), f"{done}: {name} gives {found!r:.300}"
                assert issubclass(found, MSAError), done
                named += 1
        assert store.verify() or not (named or store.damage), f"{done}: verify finds nothing"
        return bool(named or store.damage)


@pytest.mark.parametrize(
    ("column", "value"), [("segment", "segme\udc91t-00000001.seg"), ("segment", "../lock"), ("offset", 3)]
)
def test_a_wrong_place_is_named_when_it_is_followed(tmp_path, new, column, value):
    """The one part of a passage's row that its stamp does not cover."""
    fill(tmp_path / "bank", new, close=True)
    with sqlite3.connect(tmp_path / "bank" / "catalog.sqlite3") as catalog:
        data = value.encode(errors="surrogateescape") if isinstance(value, str) else value
        changed = f"UPDATE passages SET {column} = CAST(? AS TEXT) WHERE number = 4"
        catalog.execute(
            changed if isinstance(value, str) else changed.replace("CAST(? AS TEXT)", "?"), (data,)
        )
    catalog.close()
    with Store.open(tmp_path / "bank") as store:
        record = next(record for record in store.changes(0).added if record.number == 4)
        with pytest.raises(StateDamagedError, match=r"'doc2'.*passage 4") as damage:
            store.states(record)
        (problem,) = store.verify()
        assert problem == str(damage.value)
        assert problem.encode().decode() == problem, "it can be printed"
        for other in store.changes(0).added:
            if other.number != 4:
                store.states(other)


def test_an_id_spelled_otherwise_anywhere_in_the_catalog_is_named_or_harmless(tmp_path, new):
    """In the rows, and in the indexes that some reads are answered from."""
    fill(tmp_path / "bank", new, close=True)
    with Store.open(tmp_path / "bank", read_only=True) as whole:
        expected = {name: outcome(read, whole) for name, read in reads().items()}
    data = (tmp_path / "bank" / "catalog.sqlite3").read_bytes()
    places = [match.start() for match in re.finditer(b"doc2", data)]
    assert len(places) > 1
    named = 0
    for place in places:
        copy = tmp_path / f"copy{place}"
        shutil.copytree(tmp_path / "bank", copy)
        (copy / "catalog.sqlite3").write_bytes(data[:place] + b"dok2" + data[place + 4 :])
        named += check(copy, expected, f"dok2 at byte {place}")
        shutil.rmtree(copy)
    assert named == len(places)


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize(
    "count", [pytest.param(100, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.soak)]
)
def test_random_damage_is_named_or_harmless(tmp_path, new, closed, count):
    """Flips, cuts and lost bytes in a bank that was closed, and in one whose process died."""
    original = tmp_path / "original"
    store = fill(original, new, closed)
    pristine = tmp_path / "pristine"
    shutil.copytree(original, pristine)
    store.close()
    with Store.open(pristine, read_only=True) as whole:
        expected = {name: outcome(read, whole) for name, read in reads().items()}
        assert not [name for name, found in expected.items() if isinstance(found, type)]
    generator = random.Random(count + closed)
    files = sorted(
        file.relative_to(pristine) for file in pristine.rglob("*") if file.is_file() and file.stat().st_size
    )
    assert {"catalog.sqlite3", "commit"} <= {file.name for file in files}
    named = 0
    for i in range(count):
        copy = tmp_path / f"copy{i}"
        shutil.copytree(pristine, copy)
        name = generator.choice([*files, *[file for file in files if file.name.startswith("catalog")] * 3])
        named += check(copy, expected, damage(copy / name, generator))
        shutil.rmtree(copy)
    print(f"{count} damages: {named} named, {count - named} harmless")
    assert named > 10
