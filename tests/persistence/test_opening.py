"""Opening: new folders, foreign folders, read-only folders, other models, forks, schemas and memory."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from msa_memory.errors import (
    CatalogDamagedError,
    ConfigError,
    ForkedMemoryError,
    MissingExtraError,
    ModelMismatchError,
    ReadOnlyError,
    StorageError,
)
from msa_memory.persistence import Store, database
from msa_memory.persistence.tables import metadata


def test_persistence_needs_no_torch_and_no_engine():
    program = (
        "import sys; from msa_memory.persistence import Store; Store.open(None).close();"
        "print([name for name in sys.modules if name == 'torch' or name.startswith('msa_memory.engine')])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_new_bank_is_private_and_complete(folder, store, new):
    store.add([new(store, "a")])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*")}
    assert modes.pop("states") == 0o700
    assert set(modes.values()) == {0o600}
    assert {"catalog.sqlite3", "commit", "lock", "segment-00000001.seg"} <= modes.keys()


def test_in_memory_touches_no_disk(tmp_path, new, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Store.open(None) as store:
        store.bind_model(model="m", fingerprint="f", info={})
        store.add([new(store, f"d{i}") for i in range(50)])
        store.forget("default", ids=["d1"])
        store.compact()
        assert store.verify() == ()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"catalog_url": "postgresql://h/d"}, {"state_url": "/x"}, {"read_only": True}]
)
def test_in_memory_takes_no_urls(options):
    with pytest.raises(ConfigError, match="give a path"):
        Store.open(None, **options)


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"notes\.txt"):
        Store.open(tmp_path)
    with pytest.raises(StorageError, match="is a file"):
        Store.open(tmp_path / "notes.txt")
    with pytest.raises(StorageError):
        Store.open(tmp_path / "notes.txt" / "below")
    other = tmp_path / "other"
    other.mkdir()
    with sqlite3.connect(other / "catalog.sqlite3") as connection:
        connection.execute("CREATE TABLE cats (name)")
    connection.close()
    with pytest.raises(StorageError, match=r"another application.*cats"):
        Store.open(other)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", "other"]


def test_an_empty_folder_and_an_interrupted_creation_become_a_bank(tmp_path, monkeypatch):
    Store.open(tmp_path).close()
    for function in ("migrate", "reading", "writing", "revision"):
        folder = tmp_path / f"cut-{function}"
        with monkeypatch.context() as patch:
            patch.setattr(
                database.Database, function, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                Store.open(folder)
        with Store.open(folder) as store:
            assert store.generation() == 0
            assert store.verify() == ()


def test_creation_interrupted_before_the_counter(tmp_path):
    Store.open(tmp_path / "bank").close()
    (tmp_path / "bank" / "commit").unlink()
    with Store.open(tmp_path / "bank") as store:
        assert store.verify() == ()


def test_read_only_reads_and_never_writes(folder, store, new, again):
    store.add([new(store, "a")])
    reader = again(read_only=True)
    assert reader.get("default", "a").id == "a"
    assert reader.states(reader.changes(0).added[0])
    assert reader.forget("default", ids=["a"], dry_run=True).counts["documents"] == 1
    document = new(store, "b")
    for write in (
        lambda: reader.add([document]),
        lambda: reader.replace(document),
        lambda: reader.update_metadata("default", "a", {}),
        lambda: reader.forget("default", ids=["a"]),
        lambda: reader.forget_namespace("default", confirm="default"),
        lambda: reader.reserve_numbers(1),
        lambda: reader.compact(),
    ):
        with pytest.raises(ReadOnlyError, match="read-only"):
            write()
    reader.bind_model(model="tiny", fingerprint="f" * 64, info={})
    store.add([document])
    assert reader.count("default") == 2
    assert reader.verify() == ()


def test_read_only_creates_nothing(tmp_path):
    with pytest.raises(StorageError, match="no bank"):
        Store.open(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become a user who may not write")
def test_a_folder_without_write_permission(tmp_path, new):
    """Another user reads a cleanly closed bank; opening it for writing is a named error."""
    folder = tmp_path / "bank"
    with Store.open(folder) as store:
        store.bind_model(model="m", fingerprint="f", info={})
        store.add([new(store, "a")])
    for parent in (tmp_path, *list(tmp_path.parents)[:2]):
        parent.chmod(0o755)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    program = f"""
import os
from pathlib import Path
from msa_memory.errors import StorageError
from msa_memory.persistence import Store
Store.open(None).verify()  # loads what the other user may not be allowed to read
os.setgid(65534); os.setuid(65534)
with Store.open(Path({str(folder)!r}), read_only=True) as store:
    print(store.get("default", "a").text, len(store.states(store.changes(0).added[0])), store.verify())
try:
    Store.open(Path({str(folder)!r})).add([])
except StorageError as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "This is what a says. 3 ()", done.stderr
    assert done.stdout.split("\n")[1] == "StorageError", done.stdout


def test_wrong_model_is_named(folder, store, again):
    store.bind_model(model="tiny", fingerprint="f" * 64, info={})
    with pytest.raises(ModelMismatchError, match=r"'tiny'.*'big'.*reencode"):
        again().bind_model(model="big", fingerprint="e" * 64, info={})
    identity = again().identity
    assert (identity.model, identity.fingerprint, identity.model_info) == ("tiny", "f" * 64, {"layers": 2})


def test_adding_needs_a_model(folder, new):
    with Store.open(folder) as store, Store.open(folder) as other:
        document = new(store, "a")
        with pytest.raises(ConfigError, match="bind_model"):
            store.add([document])
        other.bind_model(model="m", fingerprint="f", info={})
        store.add([document])
        assert store.verify() == other.verify() == ()


def test_use_after_close(folder, new):
    store = Store.open(folder)
    document = new(store, "a")
    store.close()
    store.close()
    for use in (store.generation, lambda: store.add([document]), lambda: store.identity, store.verify):
        with pytest.raises(StorageError, match="closed"):
            use()


def test_use_after_fork(store, new):
    store.add([new(store, "a")])
    record = store.changes(0).added[0]
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (
            store.generation,
            lambda: store.states(record),
            lambda: store.add([]),
            lambda: store.reserve_numbers(1),
        ):
            try:
                use()
            except ForkedMemoryError:
                refused += 1
        store.close()
        os.kill(os.getpid(), signal.SIGKILL) if refused != 4 else os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    store.add([new(store, "b")])
    assert store.verify() == ()


def test_migrations_make_exactly_the_tables(folder, store):
    with store._database.reading() as connection:
        options = {"compare_type": True, "version_table": database.VERSION_TABLE}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    assert [revision.revision for revision in script.walk_revisions()][::-1] == list(database.REVISIONS)


def set_revision(folder: Path, revision: str | None) -> None:
    with sqlite3.connect(folder / "catalog.sqlite3") as connection:
        connection.execute(f"UPDATE {database.VERSION_TABLE} SET version_num = ?", (revision,))
    connection.close()


def test_a_newer_schema_is_refused(folder):
    Store.open(folder).close()
    set_revision(folder, "9999")
    for read_only in (False, True):
        with pytest.raises(StorageError, match=r"9999.*upgrade"):
            Store.open(folder, read_only=read_only)


def test_an_older_schema_is_not_migrated_read_only(folder, monkeypatch):
    Store.open(folder).close()
    newer = (*database.REVISIONS, "later")
    monkeypatch.setattr("msa_memory.persistence.opening.REVISIONS", newer)
    with pytest.raises(StorageError, match=rf"{database.REVISIONS[-1]}.*later.*read_only"):
        Store.open(folder, read_only=True)


def test_states_can_lie_elsewhere(tmp_path, new):
    for name, url in (("plain", str(tmp_path / "shared")), ("file", (tmp_path / "with space").as_uri())):
        with Store.open(tmp_path / name, state_url=url) as store:
            store.bind_model(model="m", fingerprint="f", info={})
            store.add([new(store, "a")])
        assert not (tmp_path / name / "states").exists()
        with Store.open(tmp_path / name, state_url=url) as store:
            assert store.verify() == ()
        with pytest.raises(CatalogDamagedError, match="state_url"):
            Store.open(tmp_path / name)
    with pytest.raises(CatalogDamagedError, match="bank"):
        Store.open(tmp_path / "plain", state_url=str(tmp_path / "with space"))
    with pytest.raises(ConfigError, match=r"s3://.*file://"):
        Store.open(tmp_path / "s3", state_url="s3://bucket/x")


def test_catalog_urls_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="mysql"):
        Store.open(tmp_path / "a", catalog_url="mysql://u:secret@h/d")
    with pytest.raises(ConfigError) as caught:
        Store.open(tmp_path / "b", catalog_url="not a url with secret")
    assert "secret" not in str(caught.value)
    with pytest.raises((StorageError, MissingExtraError)) as caught:
        Store.open(tmp_path / "c", catalog_url="postgresql://u:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)


def test_a_large_clock_range(store, new):
    for id, year in (("old", 1), ("new", 9999)):
        moment = datetime(year, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
        assert store.add([new(store, id, timestamp=moment)])[0].timestamp == moment
    local = datetime(2024, 1, 1, tzinfo=UTC).astimezone(tz=None) + timedelta(0)
    assert store.add([new(store, "local", timestamp=local)])[0].timestamp == local
    naive = datetime(2024, 1, 1)
    assert store.add([new(store, "naive", timestamp=naive)])[0].timestamp == naive.replace(tzinfo=UTC)
