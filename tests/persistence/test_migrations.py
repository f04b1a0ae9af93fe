"""The schema from empty and from every older revision, with data, on both databases."""

import hashlib
import json
import sqlite3
import zlib
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import MetaData, Table, insert, select, update

from msa_memory.errors import CatalogDamagedError, StorageError
from msa_memory.persistence import Store, database
from msa_memory.persistence.database import Database
from msa_memory.persistence.tables import metadata

FIRST = ["bank", "documents", "versions", "passages", "attributes", "tombstones", "segments", "erasures"]


def upgrade(target: Database, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    with target.writing() as connection:
        config.attributes.update(connection=connection, version_table=database.VERSION_TABLE)
        command.upgrade(config, revision)


def first_hash(namespace: str, id: str, version: int, text: str, attributes: str) -> str:
    """The row hash of the first schema, which had no salt and covered these five."""
    hashed = hashlib.sha256()
    for part in (namespace, id, str(version), text, attributes):
        hashed.update(len(part.encode()).to_bytes(8, "little"))
        hashed.update(part.encode())
    return hashed.hexdigest()


def write_first_schema(source: Store, target: Database, commit: Path) -> None:
    """The content of an open store as the first release would have stored it."""
    upgrade(target, "0001")
    old = MetaData()
    with target.writing() as into, source._database.reading() as connection:
        names = {}
        for name in FIRST:
            table = Table(name, old, autoload_with=into)
            for row in connection.exec_driver_sql(f"SELECT * FROM {name}").mappings():
                values = {column.name: row[column.name] for column in table.columns}
                if name == "documents":
                    names[row["key"]] = row["namespace"], row["id"]
                if name in ("documents", "versions"):
                    owner = names[row["key" if name == "documents" else "document"]]
                    values["hash"] = first_hash(*owner, row["version"], row["text"], row["metadata"])
                into.execute(insert(table).values(values))
    body = f"msa-memory {source.identity.bank_id} {source.generation():020d}"
    slot = f"{body} {zlib.crc32(body.encode()):08x}\n".encode().ljust(4096, b"\0")
    commit.write_bytes(slot * 2)


def shown(store: Store) -> object:
    states = {
        record.number: {name: bytes(tensor.data) for name, tensor in store.states(record).items()}
        for record in store.changes(0).added
    }
    documents = list(store.list("default", limit=100))
    histories = [store.history("default", document.id) for document in documents]
    return documents, histories, states, store.changes(0), store.list("default", {"i": {"$lt": 3}}).items


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def older(request, store, new, tmp_path):
    """A store at the newest schema, and the options that open the same content at the first one."""
    store.add([new(store, f"d{i}", f"text {i}", parts=2, metadata={"i": i}) for i in range(6)])
    store.replace(new(store, "d1", "another text", metadata={"i": 1}))
    store.update_metadata("default", "d2", {"i": 2, "more": [1]})
    store.forget("default", ids=["d5"])
    folder = tmp_path / "older"
    (folder / "states").mkdir(parents=True)
    for file in (tmp_path / "bank" / "states").iterdir():
        (folder / "states" / file.name).write_bytes(file.read_bytes())
    if request.param == "postgres":
        options = {"catalog_url": request.getfixturevalue("postgres_url")}
        target = Database.server(options["catalog_url"], read_only=False)
    else:
        options = {}
        (folder / "catalog.sqlite3").touch()
        target = Database.at(folder / "catalog.sqlite3", read_only=False, timeout_s=5)
    write_first_schema(store, target, folder / "commit")
    yield store, {"path": folder, **options}, target
    target.close()


def test_the_first_schema_migrates_with_its_data(older, new):
    store, options, _ = older
    with pytest.raises(StorageError, match=r"0001.*read_only"):
        Store.open(**options, read_only=True)
    with Store.open(**options) as migrated:
        assert migrated.verify() == ()
        assert shown(migrated) == shown(store)
        migrated.add([new(migrated, "later")])
        migrated.forget("default", ids=["d0"])
        assert migrated.verify() == ()
        with migrated._database.reading() as connection:
            context = MigrationContext.configure(
                connection, opts={"compare_type": True, "version_table": database.VERSION_TABLE}
            )
            assert compare_metadata(context, metadata) == []
    with Store.open(**options, read_only=True) as again:
        assert again.verify() == ()


def test_migrating_does_not_hide_damage(older):
    """A row that did not fit its old hash does not get a stamp that fits."""
    _, options, target = older
    with target.writing() as connection:
        for name in ("documents", "versions"):
            table = Table(name, MetaData(), autoload_with=connection)
            key = table.c["key" if name == "documents" else "document"]
            value = connection.scalar(select(key).order_by(key).limit(1))
            connection.execute(update(table).where(key == value).values(text="poison"))
    with Store.open(**options) as migrated:
        problems = " ".join(migrated.verify())
        assert "'d0'" in problems
        assert "'d1'" in problems
        with pytest.raises(CatalogDamagedError, match="'d0'"):
            migrated.get("default", "d0")
        with pytest.raises(CatalogDamagedError, match="'d1'"):
            migrated.history("default", "d1")
        assert migrated.get("default", "d3").text == "text 3"


def test_an_interrupted_migration_changes_nothing(older, monkeypatch):
    store, options, target = older
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Store.open(**options)
    assert target.revision() == "0001"
    with Store.open(**options) as migrated:
        assert migrated.verify() == ()
        assert shown(migrated) == shown(store)


def test_an_empty_bank_of_the_first_schema_migrates(tmp_path, new):
    with Store.open(None) as empty:
        folder = tmp_path / "older"
        (folder / "states").mkdir(parents=True)
        (folder / "catalog.sqlite3").touch()
        target = Database.at(folder / "catalog.sqlite3", read_only=False, timeout_s=5)
        write_first_schema(empty, target, folder / "commit")
        target.close()
    with Store.open(folder) as migrated:
        migrated.bind_model(model="m", fingerprint="f", info={})
        migrated.add([new(migrated, "a")])
        assert migrated.verify() == ()
    with sqlite3.connect(folder / "catalog.sqlite3") as connection:
        assert connection.execute(f"SELECT version_num FROM {database.VERSION_TABLE}").fetchall() == [
            (database.REVISIONS[-1],)
        ]
    connection.close()
