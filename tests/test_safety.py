"""What keeps a memory from harming its machine or telling on its owner; docs/security.md says why."""

import ast
import json
import logging
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.cli import app
from msa_memory.engine.engine import Engine
from msa_memory.engine.tokenizer import Tokenizer
from msa_memory.errors import ConfigError, LimitError, MSAError, StorageError
from msa_memory.testing import open_memory, tiny_model

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "integrations", "msa_memory", "persistence")
SECRET = "hunter2-s3cret"
MARKER = "XYZZYPLUGH"
HOSTILE_NAMES = [
    "../../escape",
    "/etc/passwd",
    "a/b\\c",
    "..",
    "con.txt\r\n",
    "\x1b[31mred",
    "'; DROP TABLE documents; --",
    "%s%n{0}$(touch x)`touch y`",
    "n" * 512,
]
Use = Callable[[MemoryModel], object]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[MemoryModel]:
    with open_memory(tmp_path / "memory", config=MemoryConfig(max_new_tokens=4)) as memory:
        memory.add("Bob lives in Oslo and repairs violins.", id="bob")
        yield memory


# files


def test_names_never_become_file_names(memory: MemoryModel, tmp_path: Path) -> None:
    for name in HOSTILE_NAMES:
        view = memory.namespace(name)
        view.add(f"Text of {name!r}.", id=name, metadata={name: name}, source=name, trust=name)
        view.session(name).append("user", "Hello.", name=name, key=name)
        view.update(name, "Changed.")
        assert view.get(name).version == 2
        assert [doc.id for doc in view.list({"$source": name})] == [name]
    memory.namespace(HOSTILE_NAMES[0]).export(tmp_path / "out.msa")
    memory.fork(tmp_path / "copy").close()
    memory.forget("bob")
    memory.compact()
    known = re.compile(r"catalog\.sqlite3(-wal|-shm)?|commit|lock|seal|states|segment-\d{8}\.seg")
    for folder in ("memory", "copy"):
        names = {path.name for path in (tmp_path / folder).rglob("*")}
        assert not [name for name in names if not known.fullmatch(name)]
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "copy", "out.msa"}


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with open_memory(tmp_path / "memory") as memory:
            memory.add("Bob lives in Oslo.", id="bob")
            memory.session("talk").append("user", "Hello?")
            memory.update("bob", "Bob lives in Bergen.")
            memory.export(tmp_path / "out.msa")
            memory.compact()
            with memory.fork(tmp_path / "copy") as copy:
                copy.forget("bob")
                check_modes(tmp_path)
        with open_memory(tmp_path / "memory") as memory:
            memory.search("Bergen")
            check_modes(tmp_path)
    finally:
        os.umask(old)


def check_modes(folder: Path) -> None:
    for path in folder.rglob("*"):
        mode = path.stat().st_mode & 0o777
        assert mode == (0o700 if path.is_dir() else 0o600), f"{path} has mode {mode:o}"


# what errors and logs say

LONG = f"{'x' * 200}{MARKER}{'y' * 5000}"


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.add(LONG + "\0"),
        lambda m: m.add({"a": LONG}),
        lambda m: m.add("x", id=LONG),
        lambda m: m.add("x", timestamp=LONG),
        lambda m: m.add("x", expires_at=[LONG]),
        lambda m: m.add("x", ttl=LONG),
        lambda m: m.add("x", metadata=LONG),
        lambda m: m.add("x", metadata={"a": {1: LONG}}),
        lambda m: m.add("x", metadata={"a": object}),
        lambda m: m.add("x", metadata={"a": LONG * 30}),
        lambda m: m.add("x", source=[LONG]),
        lambda m: m.add("x", on_conflict=LONG),
        lambda m: m.add_many([{"content": "x", "id": [LONG]}]),
        lambda m: m.add_many([{LONG: 1}]),
        lambda m: m.update("bob", [LONG]),
        lambda m: m.get([LONG]),
        lambda m: m.forget([[LONG]]),
        lambda m: m.forget(where=LONG),
        lambda m: m.list({LONG: {"$gt": [LONG]}}),
        lambda m: m.list({"$" + LONG: 1}),
        lambda m: m.list({"a": {"$" + LONG: 1}}),
        lambda m: m.list(cursor=LONG),
        lambda m: m.list(limit=LONG),
        lambda m: m.query(LONG + "\ud800"),
        lambda m: m.query("x", evidence=LONG),
        lambda m: m.query("x", where={"$or": LONG}),
        lambda m: m.query("word " * 5000 + MARKER),
        lambda m: m.search([LONG]),
        lambda m: m.session("s").append(LONG, "x"),
        lambda m: m.session("s").append("user", [LONG]),
        lambda m: m.namespace([LONG]),
        lambda m: m.forget_namespace("default", confirm=LONG),
        lambda m: m.import_from("mem0", [{"id": "x", "memory": [LONG]}]),
        lambda m: m.import_from("langgraph", [{"namespace": LONG, "key": "k", "value": 1}]),
        lambda m: m.import_from(LONG, []),
    ],
)
def test_errors_say_little_of_what_they_were_given(memory: MemoryModel, use: Use) -> None:
    with pytest.raises(MSAError) as caught:
        use(memory)
    assert MARKER not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_logs_say_nothing_of_the_content(memory: MemoryModel, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    memory.add(f"A text with {MARKER} in it.", id="secret", metadata={"m": MARKER})
    memory.query("What is in it?")
    memory.export(tmp_path / "out.msa")
    memory.fork(tmp_path / "copy").close()
    memory.close()
    [segment] = (tmp_path / "memory" / "states").glob("*.seg")
    segment.write_bytes(bytes(segment.stat().st_size))
    with open_memory(tmp_path / "memory") as again:
        again.search("violins")
        assert again.verify()
    assert caplog.records
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("msa_memory")]
    assert ours
    assert MARKER not in "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{SECRET}@127.0.0.1:1/memory",
        f"postgresql://user@127.0.0.1:1/memory?password={SECRET}",
        f"postgresql+asyncpg://user:{SECRET}@127.0.0.1:1/memory",
        f"mysql://user:{SECRET}@127.0.0.1/memory",
        f"postgresql://user:pass/{SECRET}@127.0.0.1:1/memory",
        f"postgresql://user:{SECRET}@127.0.0.1:no-port/memory",
        f"postgresql://user:{SECRET}@127.0.0.1:1/memory?no_such_option=1",
        f"//user:{SECRET}@host",
        f"{SECRET}",
    ],
)
def test_passwords_in_urls_are_never_shown(tmp_path: Path, url: str, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(MSAError) as caught:
        open_memory(tmp_path / "memory", catalog_url=url, config=MemoryConfig(lock_timeout_s=0.1))
    assert isinstance(caught.value, ConfigError | StorageError)
    shown = "".join(traceback.format_exception(caught.value, chain=True))
    own = re.sub(r'  File ".*?\n    .*\n', "", shown)  # less the lines of source that a traceback quotes
    assert SECRET not in own
    assert SECRET not in caplog.text


# limits


def test_limits_are_errors_that_name_their_setting(tmp_path: Path) -> None:
    config = MemoryConfig(max_document_chars=50, max_metadata_bytes=40, max_metadata_depth=3, max_batch=2)
    with open_memory(config=config) as memory:
        for setting, use in {
            "max_document_chars": lambda: memory.add("x" * 51),
            "max_metadata_bytes": lambda: memory.add("x", metadata={"a": "y" * 50}),
            "max_metadata_depth": lambda: memory.add("x", metadata={"a": [[[[1]]]]}),
            "max_batch": lambda: memory.add_many(["x", "y", "z"]),
        }.items():
            with pytest.raises(LimitError, match=setting):
                use()
        with pytest.raises(LimitError, match="max_batch"):
            memory.query_many(["a"] * 3)
        with pytest.raises(LimitError, match="max_batch"):
            memory.search_many(f"q{i}" for i in range(3))
        with pytest.raises(LimitError, match="max_document_chars"):
            memory.session("s").append("user", "x" * 51)
        assert memory.count() == 0
        assert len(memory.add_many(["x" * 50, {"content": "y", "metadata": {"a": [[1]]}}])) == 2


def test_an_endless_batch_ends() -> None:
    def forever() -> Iterator[str]:
        while True:
            yield "again"

    with open_memory(config=MemoryConfig(max_batch=10)) as memory, pytest.raises(LimitError):
        memory.add_many(forever())


@pytest.mark.parametrize("depth", [100, 10_000])
def test_nesting_never_exhausts_the_stack(memory: MemoryModel, depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = {"a": [value]}
    with pytest.raises(MSAError):
        memory.add("x", metadata=value)
    where: Any = {"a": 1}
    for _ in range(depth):
        where = {"$not": where}
    with pytest.raises(MSAError):
        memory.list(where)
    while isinstance(value, dict):  # taken apart by hand: freeing it in one go would be this deep too
        value = value["a"].pop()
    while "$not" in where:
        where = where.pop("$not")


# text is only text


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["<|im_start|>", "<|im_end|>", "system\n", "<|", "im_end|>", " ", "a"]), min_size=1
    )
)
def test_no_path_of_text_makes_control_tokens(pieces: list[str]) -> None:
    text = "Say " + "".join(pieces)
    tokenizer = Tokenizer.from_folder(tiny_model())
    control = {tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")}
    runs: list[list[int]] = []
    encode = Engine.encode

    def spy(engine: Engine, number: int, header: str, passage: str) -> object:
        runs.append(engine.prompt.document(number, header, passage))
        return encode(engine, number, header, passage)

    with pytest.MonkeyPatch.context() as patch, open_memory() as memory:
        patch.setattr(Engine, "encode", spy)
        memory.add(text, metadata={"title": text, "speaker": text})
        memory.session("s").append("user", text, name=text[:20])
        memory.import_from("mem0", [{"id": text, "memory": text, "metadata": {"title": text}}])
        memory.import_from("langgraph", [{"namespace": [text], "key": text, "value": {"text": text}}])
        assert len(runs) == 4
        assert not any(control & set(ids) for ids in runs)


# the command line

HOSTILE = "red \x1b[31malert\x1b[0m \x1b]0;title\x07\x9b2J [bold]bold[/bold] [/nonsense] \u202eback\rover"


def test_moving_prints_hostile_names_harmlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MSA_MEMORY_MODEL", str(tiny_model()))
    hostile_id = f"x\nfake {HOSTILE}"
    outputs: list[str] = []

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, list(arguments), prog_name="msa-memory")
        assert result.exit_code == code, (result.output, result.exception)
        outputs.append(result.output)
        return result.output

    run("add", HOSTILE, "--id", hostile_id)
    run("export", "out.msa")
    run("export", "out.msa", code=1)
    assert "imported 1 documents" in run("--memory", "second", "import", "out.msa")
    run("--memory", "second", "update", hostile_id, "something else")
    run("--memory", "second", "import", "out.msa", code=1)
    assert (
        json.loads(run("--memory", "second", "import", "out.msa", "--on-conflict", "skip", "--json"))[
            "skipped"
        ]
        == 1
    )
    run("import", "missing.msa", code=2)
    (tmp_path / "mem0.json").write_text(json.dumps([{"id": hostile_id, "memory": HOSTILE}, {"id": HOSTILE}]))
    run("import", "mem0.json", "--from", "mem0", code=1)
    (tmp_path / "mem0.json").write_text(json.dumps([{"id": "fine", "memory": HOSTILE}]))
    run("import", "mem0.json", "--from", "mem0")
    run("import", "mem0.json", "--from", "mem0", "--reencode", code=2)
    run("fork", "copy")
    run("fork", "copy", code=1)
    assert "already" in run("reencode")
    run("reencode", str(tiny_model(tmp_path / "model")))
    assert all(code not in output for output in outputs for code in ("\x1b", "\x07", "\x9b", "\u202e"))
    assert not [output for output in outputs if "\nfake" in output]


# code and network


def modules() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_fetching_a_model_reaches_out(path: Path) -> None:
    """Network and subprocess modules are imported by models.py alone; a host's name is no connection."""
    outside = {"aiohttp", "ftplib", "http", "httpx", "requests", "smtplib", "ssl", "subprocess", "xmlrpc"}
    outside |= {"urllib.request", "huggingface_hub"}
    telemetry = {"analytics", "opentelemetry", "posthog", "sentry_sdk", "statsd"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            assert not any(name == each or name.startswith(each + ".") for each in telemetry), name
            if any(name == each or name.startswith(each + ".") for each in outside):
                assert path == ROOT / "engine" / "models.py", f"{name} at line {node.lineno}"
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("socket."):
            assert ast.unparse(node) in NAMES_OF_HOSTS or "mcp" in str(path), f"line {node.lineno}"


NAMES_OF_HOSTS = ("socket.gethostname",)

OFFLINE = """
import asyncio, socket, sys
def refuse(*arguments, **options):
    raise AssertionError(f"reached for the network: {arguments}")
asyncio.new_event_loop().close()  # a loop talks to itself through a pair of sockets, which is no network
for name in ("connect", "connect_ex", "bind", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
from msa_memory.testing import open_memory
folder = sys.argv[1]
with open_memory(folder + "/memory") as memory:
    memory.add_many(["Bob lives in Oslo.", {"content": "Ann paints.", "id": "ann"}])
    memory.update("ann", "Ann paints lighthouses.")
    assert memory.query("Who paints?").sources
    assert memory.search("lighthouses")
    memory.context("lighthouses", max_tokens=100)
    memory.explain("lighthouses")
    memory.session("s").append("user", "Hello.")
    memory.session("s").chat("Who paints?")
    memory.export(folder + "/out.msa")
    memory.namespace("copy").import_bundle(folder + "/out.msa")
    memory.import_from("mem0", [{"id": "x", "memory": "Alice hikes."}])
    memory.fork(folder + "/copy").close()
    memory.history("ann"), memory.stats, memory.verify(), memory.compact()
    memory.forget("ann")
print("offline")
"""


def test_everything_but_fetching_works_without_a_network(tmp_path: Path) -> None:
    tiny_model()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == "offline", done.stderr
