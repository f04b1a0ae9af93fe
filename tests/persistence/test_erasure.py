"""What is left of the forgotten: no byte in any file, and a bank as if it had never been there."""

import json
from pathlib import Path

import pytest
from sqlalchemy import text

from msa_memory.persistence import NewDocument, NewPassage, Store
from msa_memory.persistence.segments import FileSegments


def data_folder(store: Store) -> Path | None:
    """Where the server keeps this database, if the tests may read it."""
    with store._database.reading() as connection:
        folder = Path(str(connection.scalar(text("SHOW data_directory"))))
    return folder if folder.exists() else None


def files_with(folder: Path, needles: list[bytes]) -> list[tuple[str, bytes]]:
    found = []
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            found += [(file.name, needle) for needle in needles if needle in content]
    return found


def secret_document(store: Store, states_of, version: str) -> NewDocument:
    """Long enough for pages of its own, with everything that a document can carry."""
    body = f"SECRET-TEXT-{version} " + " ".join(f"{version}{i:05d}" for i in range(1500))
    numbers = store.reserve_numbers(3)
    return NewDocument(
        id="SECRET-ID",
        namespace="SECRET-SPACE",
        text=body,
        metadata={f"SECRET-KEY-{version}": f"SECRET-VALUE-{version}", "list": ["SECRET-MEMBER"]},
        source="SECRET-SOURCE",
        trust="SECRET-TRUST",
        passages=[
            NewPassage(start=i, end=i + 9, tokens=9, number=number, states=states_of(number),
                       header=f"SECRET-HEADER-{version}")
            for i, number in enumerate(numbers)
        ],
    )  # fmt: skip


def bury_a_secret(store: Store, new, states_of) -> list[bytes]:
    """Fill a bank, add a secret twice over, forget it; the byte strings that may not be found any more."""
    store.add([new(store, f"filler-{i}", f"filler {i} " * 40, metadata={"i": i}) for i in range(200)])
    first = secret_document(store, states_of, "ONE")
    second = secret_document(store, states_of, "TWO")
    store.add([first])
    store.replace(second)
    store.add([new(store, f"later-{i}", metadata={"i": i}) for i in range(20)])
    states = [bytes(states_of(p.number)["keys"].data) for each in (first, second) for p in each.passages]
    return [b"SECRET", b"ONE00777", b"TWO00777", *states]


def test_no_trace_in_any_file_of_the_folder(folder, store, new, states_of):
    needles = bury_a_secret(store, new, states_of)
    assert len({needle for _, needle in files_with(folder, needles)}) == len(needles) - 3
    receipt = store.forget_namespace("SECRET-SPACE", confirm="SECRET-SPACE")
    assert receipt.erased_at is not None
    assert files_with(folder, needles) == []
    assert store.verify() == ()
    store.close()
    assert files_with(folder, needles) == []


@pytest.mark.postgres
def test_no_trace_in_the_servers_tables_after_compacting(tmp_path, postgres_url, new, states_of):
    with Store.open(tmp_path / "bank", catalog_url=postgres_url) as store:
        store.bind_model(model="m", fingerprint="f", info={})
        needles = bury_a_secret(store, new, states_of)
        server = data_folder(store)
        if server is None:
            pytest.skip("the server's data folder cannot be read from here")
        with store._database.reading() as connection:
            base = server / "base" / str(connection.scalar(
                text("SELECT oid FROM pg_database WHERE datname = current_database()")))  # fmt: skip
        checkpoint(store)
        assert b"SECRET" in {needle for _, needle in files_with(base, needles)}
        receipt = store.forget_namespace("SECRET-SPACE", confirm="SECRET-SPACE")
        assert receipt.erased_at is None
        assert "VACUUM FULL" in receipt.beyond_reach[0]
        assert any("replicas" in place for place in receipt.beyond_reach)
        assert files_with(tmp_path / "bank", needles) == []
        store.compact()
        checkpoint(store)
        assert files_with(base, needles) == []
        assert store.verify() == ()
        again = store.forget("default", ids=["later-3"])
        assert again.erased_at is None
        assert store.count("default") == 219


def checkpoint(store: Store) -> None:
    connection = store._database.engine.raw_connection()
    try:
        connection.dbapi_connection.autocommit = True
        connection.cursor().execute("CHECKPOINT")
    finally:
        connection.close()


def test_a_removed_segment_is_overwritten_first(folder, store, new, monkeypatch):
    """The bytes of a deleted file stay on the medium: they are zeros by then."""
    store.add([new(store, f"d{i}", parts=2) for i in range(6)])
    removed = []

    def look(path: Path) -> None:
        removed.append((path.name, path.read_bytes()))
        path.unlink()

    monkeypatch.setattr("msa_memory.persistence.segments.remove", look)
    store.forget("default", ids=[f"d{i}" for i in range(5)])
    store.compact()
    assert [name for name, _ in removed] == ["segment-00000001.seg"]
    assert not any(removed[0][1])


def test_erasing_spares_a_file_that_another_bank_holds(folder, store, new, tmp_path):
    """A hard link, as a fork makes: neither erasing, appending nor cutting writes to it."""
    store.add([new(store, f"d{i}", parts=2) for i in range(6)])
    [segment] = (folder / "states").iterdir()
    linked = tmp_path / "linked"
    linked.hardlink_to(segment)
    before = linked.read_bytes()
    records = store.changes(0).added
    kept = {record.number: store.states(record) for record in records[2:]}
    store.add([new(store, "more")])
    assert [file.name for file in sorted((folder / "states").iterdir())][1] == "segment-00000002.seg"
    store.forget("default", ids=["d0"])
    assert linked.read_bytes() == before
    assert segment.stat().st_nlink == 1
    assert segment.read_bytes()[: records[1].offset] != before[: records[1].offset]
    assert {number: store.states(r) for r in records[2:] for number in [r.number]} == kept
    linked.unlink()
    linked.hardlink_to(segment)
    with segment.open("ab"):
        pass
    store._segments.cut({segment.name: 100, "segment-00000002.seg": 10**6})
    assert linked.stat().st_size > segment.stat().st_size == 100


def test_a_bank_after_forgetting_is_one_that_never_knew(tmp_path, new, states_of):
    """Same remaining documents with the same numbers: same rows, same states, same filters, bit for bit."""

    def numbered(id: str, first: int) -> NewDocument:
        body = f"{id} says this and that"
        return NewDocument(
            id=id,
            namespace="default",
            text=body,
            metadata={"of": id},
            passages=[
                NewPassage(start=i, end=i + 5, tokens=5, number=first + i, states=states_of(first + i))
                for i in range(2)
            ],
        )

    ids = [f"d{i}" for i in range(12)]
    gone = ids[::3]
    banks = []
    for name, added in (("forgot", ids), ("never", [id for id in ids if id not in gone])):
        store = Store.open(tmp_path / name)
        store.bind_model(model="m", fingerprint="f", info={})
        store.reserve_numbers(100)
        store.add([numbered(id, 2 * ids.index(id)) for id in added])
        banks.append(store)
    forgot, never = banks
    forgot.forget("default", ids=gone)
    for _ in range(2):
        assert seen(forgot) == seen(never)
        assert forgot.verify() == never.verify() == ()
        forgot.compact()
        never.compact()
    for store in banks:
        store.close()


def seen(store: Store) -> object:
    records = store.changes(0).added
    stamped = {"created_at", "updated_at", "timestamp"}
    return (
        [(r.number, r.document_id, r.ordinal, r.start, r.end, r.tokens) for r in records],
        [{name: (t.dtype, t.shape, bytes(t.data)) for name, t in store.states(r).items()} for r in records],
        [json.loads(document.model_dump_json(exclude=stamped)) for document in store.list("default")],
        store.visible("default").tolist(),
        store.visible("default", {"of": {"$in": ["d1", "d2", "d3"]}}).tolist(),
    )


def test_staged_states_are_stored_and_leave_no_file(folder, store, new, states_of):
    """States set aside on disk while a long document is encoded: the same bank as without, no file left."""
    numbers = store.reserve_numbers(40)
    staged = [store.stage(number, states_of(number)) for number in numbers]
    assert [file.name for file in (folder / "states").iterdir()] == []
    document = NewDocument(
        id="long",
        namespace="default",
        text="x" * 40,
        passages=[
            NewPassage(start=i, end=i + 1, tokens=1, number=number, states=states)
            for i, (number, states) in enumerate(zip(numbers, staged, strict=True))
        ],
    )
    store.add([document])
    for record in store.changes(0).added:
        found = {name: bytes(tensor.data) for name, tensor in store.states(record).items()}
        assert found == {name: bytes(tensor.data) for name, tensor in states_of(record.number).items()}
    assert store._spool._end == 0
    assert isinstance(store._segments, FileSegments)
    assert [file.name for file in (folder / "states").iterdir()] == ["segment-00000001.seg"]
    assert store.verify() == ()
