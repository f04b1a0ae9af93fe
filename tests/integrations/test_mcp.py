"""The MCP server: its tools in process, over stdio and over HTTP, and what it does not let through."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.errors import ConfigError
from msa_memory.integrations.mcp import build_http_app, build_server
from msa_memory.testing import open_memory, tiny_model

READING = {"search_memory", "ask_memory", "list_memories", "add_memory"}
WRITING = {"update_memory", "forget_memory"}
TOKEN = "a-token-for-tests-only"
PROGRAM = str(Path(sys.executable).with_name("msa-memory"))


@pytest.fixture
def memory() -> Iterator[MemoryModel]:
    with open_memory(config=MemoryConfig(max_new_tokens=12)) as memory:
        memory.add("Bob lives in Oslo and repairs violins.", id="bob", metadata={"year": 2024})
        memory.add("Ann paints lighthouses in Bergen.", id="ann", metadata={"year": 2025})
        yield memory


async def call(client: Client, tool: str, **arguments: Any) -> Any:
    """A tool's result as data; fails where the tool did."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert json.loads(result.content[0].text) == result.structured_content
    return result.structured_content


async def refused(client: Client, tool: str, **arguments: Any) -> str:
    """What a tool says when it refuses."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    return str(result.content[0].text)


# the tools


@pytest.mark.parametrize("allow_write", [False, True])
async def test_which_tools_there_are(memory: MemoryModel, allow_write: bool) -> None:
    async with Client(build_server(memory, allow_write=allow_write)) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == READING | (WRITING if allow_write else set())
    for name, tool in tools.items():
        assert tool.description
        assert tool.output_schema
        assert tool.input_schema["additionalProperties"] is False
        assert all("description" in argument for argument in tool.input_schema["properties"].values())
        assert not {"namespace", "memory", "path", "trust", "source"} & set(tool.input_schema["properties"])
        assert tool.annotations is not None
        assert tool.annotations.read_only_hint is (name not in WRITING | {"add_memory"})
        assert tool.annotations.destructive_hint is (name in WRITING)


@pytest.mark.parametrize("tool", sorted(WRITING))
async def test_changing_needs_permission(memory: MemoryModel, tool: str) -> None:
    async with Client(build_server(memory)) as client:
        assert "Unknown tool" in await refused(client, tool, id="bob", ids=["bob"], text="x")
    assert memory.get("bob").version == 1


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_round_through_all_tools(memory: MemoryModel, mode: str) -> None:
    async with Client(build_server(memory, allow_write=True), mode=mode) as client:
        added = await call(
            client,
            "add_memory",
            text="Eve tunes pianos.",
            id="eve",
            metadata={"year": 2026},
            timestamp="2026-01-31",
        )
        assert added == {"id": "eve", "version": 1, "timestamp": "2026-01-31T00:00:00+00:00"}
        assert memory.get("eve").source == "mcp"

        found = (await call(client, "search_memory", query="repairs violins", k=2))["results"]
        assert [entry["id"] for entry in found] == [
            source.id for source in memory.search("repairs violins", k=2)
        ]
        assert found[0]["text"] == "Bob lives in Oslo and repairs violins."
        assert found[0]["metadata"] == {"year": 2024}

        asked = await call(client, "ask_memory", question="Who repairs violins?", k=1)
        answer = memory.query("Who repairs violins?", k=1)
        assert (asked["answer"], asked["found"]) == (answer.text, True)
        assert [entry["id"] for entry in asked["sources"]] == ["bob"]

        changed = await call(client, "update_memory", id="eve", metadata={"town": "Moss"})
        assert changed["version"] == 2
        assert memory.get("eve").metadata == {"year": 2026, "town": "Moss"}
        assert (await call(client, "update_memory", id="eve", text="Eve tunes organs."))["version"] == 3

        listed = await call(client, "list_memories", where={"town": "Moss"})
        assert [(entry["id"], entry["text"], entry["whole"]) for entry in listed["memories"]] == [
            ("eve", "Eve tunes organs.", True)
        ]
        assert await call(client, "forget_memory", ids=["eve", "ann"]) == {"ids": ["eve", "ann"]}
        assert {document.id for document in memory.list()} == {"bob"}


async def test_listing_goes_page_by_page(memory: MemoryModel) -> None:
    memory.add_many([{"id": f"n{n}", "content": f"Note {n}. " * 60} for n in range(5)])
    seen, cursor = [], None
    async with Client(build_server(memory)) as client:
        for _ in range(4):
            page = await call(client, "list_memories", limit=2, cursor=cursor)
            seen += [entry["id"] for entry in page["memories"]]
            cursor = page["next_cursor"]
        long = next(e for e in (await call(client, "list_memories"))["memories"] if e["id"] == "n0")
    assert cursor is None
    assert seen == [document.id for document in memory.list()]
    assert (len(long["text"]), long["whole"]) == (300, False)


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("add_memory", {"text": " "}, "InvalidDocumentError: content is empty"),
        ("add_memory", {"text": "x", "id": "bob"}, "ConflictError: id 'bob' is taken"),
        ("add_memory", {"text": "x", "timestamp": "soon"}, "ISO 8601"),
        ("add_memory", {"text": "x", "source": "human"}, "source"),
        ("add_memory", {}, "text"),
        ("add_memory", {"text": "x", "metadata": {"_llama_index": {}}}, "['_llama_index'] begin with an"),
        ("update_memory", {"id": "bob", "metadata": {"_x": 1}}, "['_x'] begin with an underscore"),
        ("search_memory", {"query": "x", "k": 0}, "greater than or equal to 1"),
        ("search_memory", {"query": "x", "k": 51}, "less than or equal to 50"),
        ("search_memory", {"query": "x", "where": {"a": {"$like": 1}}}, "InvalidFilterError: '$like'"),
        ("search_memory", {"query": "x", "namespace": "other"}, "namespace"),
        ("ask_memory", {"question": "word " * 5000}, "LimitError"),
        ("list_memories", {"limit": 201}, "less than or equal to 200"),
        ("list_memories", {"cursor": "nonsense"}, "cursor"),
        ("update_memory", {"id": "bob"}, "ConfigError"),
        ("update_memory", {"id": "nobody", "text": "x"}, "NotFoundError: no document 'nobody'"),
        ("forget_memory", {"ids": []}, "at least 1"),
        ("forget_memory", {"ids": ["bob", "nobody"]}, "NotFoundError"),
        ("forget_memory", {}, "ids"),
    ],
)  # fmt: skip
async def test_refusals_say_why_and_change_nothing(
    memory: MemoryModel, tool: str, arguments: dict[str, Any], message: str
) -> None:
    async with Client(build_server(memory, allow_write=True)) as client:
        assert message in await refused(client, tool, **arguments)
    assert {document.id: document.version for document in memory.list()} == {"ann": 1, "bob": 1}


async def test_no_tool_reaches_another_namespace(memory: MemoryModel) -> None:
    other = memory.namespace("other")
    other.add("Carl repairs violins in Paris.", id="carl")
    async with Client(build_server(other, allow_write=True)) as client:
        await call(client, "add_memory", text="Dan repairs violas.", id="bob")
        found = await call(client, "search_memory", query="repairs violins", k=50)
        assert {entry["id"] for entry in found["results"]} == {"carl", "bob"}
        asked = await call(client, "ask_memory", question="Who repairs violins in Oslo?")
        assert {entry["id"] for entry in asked["sources"]} <= {"carl", "bob"}
        listed = await call(client, "list_memories", where={"$or": [{"a": 1}, {"$not": {"a": 1}}]})
        assert {entry["id"] for entry in listed["memories"]} == {"carl", "bob"}
        assert "NotFoundError" in await refused(client, "forget_memory", ids=["ann"])
        assert "NotFoundError" in await refused(client, "update_memory", id="ann", text="x")
        assert "cannot stand here" in await refused(client, "list_memories", where={"$namespace": "default"})
        await call(client, "forget_memory", ids=["bob"])
    assert memory.get("bob").text == "Bob lives in Oslo and repairs violins."


async def test_clients_are_served_together(memory: MemoryModel) -> None:
    """A short question is answered while a long one is under way, and the loop stays free."""
    server = build_server(memory)
    async with Client(server) as one, Client(server) as other:
        answers = await asyncio.gather(
            *(
                call(client, "ask_memory", question=q)
                for client in (one, other)
                for q in ("violins", "lighthouses") * 3
            ),
            call(one, "add_memory", text="New.", id="new"),
        )
    assert len({answer["answer"] for answer in answers[:-1:2]}) == 1
    assert answers[-1]["id"] == "new"


async def test_a_read_only_memory_is_only_read(tmp_path: Path) -> None:
    with open_memory(tmp_path / "m") as memory:
        memory.add("Bob lives in Oslo.", id="bob")
    with open_memory(tmp_path / "m", read_only=True) as memory:
        async with Client(build_server(memory)) as client:
            assert "ReadOnlyError" in await refused(client, "add_memory", text="x")
            assert len((await call(client, "search_memory", query="Bob"))["results"]) == 1


def test_a_short_token_is_refused(memory: MemoryModel) -> None:
    with pytest.raises(ConfigError, match="the token has 5 characters"):
        build_http_app(build_server(memory), token="short", port=8765)


# the program


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def variables(model: Path, folder: Path, **more: str) -> dict[str, str]:
    return {"MSA_MEMORY_MODEL": str(model), "MSA_MEMORY_PATH": str(folder), "OMP_NUM_THREADS": "1", **more}


def over_stdio(model: Path, folder: Path, *options: str) -> StdioServerParameters:
    return StdioServerParameters(command=PROGRAM, args=["mcp", *options], env=variables(model, folder))


@pytest.mark.slow
async def test_stdio_keeps_what_it_was_told(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    async with Client(over_stdio(model, folder, "--namespace", "ann")) as client:
        assert {tool.name for tool in (await client.list_tools()).tools} == READING
        added = await call(client, "add_memory", text="Bob lives in Oslo and repairs violins.")
        assert (await call(client, "ask_memory", question="Who repairs violins?"))["found"]
    async with Client(over_stdio(model, folder, "--namespace", "ann", "--allow-write")) as client:
        assert {tool.name for tool in (await client.list_tools()).tools} == READING | WRITING
        found = await call(client, "search_memory", query="violins")
        assert [entry["id"] for entry in found["results"]] == [added["id"]]
    with open_memory(folder, model=model) as memory:
        assert memory.count() == 0
        assert memory.namespace("ann").get(added["id"]).source == "mcp"


async def told_until_killed(parameters: StdioServerParameters, notes: list[str]) -> psutil.Process:
    """Add notes, then kill -9 the server; the process that was."""
    mine = psutil.Process()
    before = {child.pid for child in mine.children()}
    async with Client(parameters) as client:
        for note in notes:
            await call(client, "add_memory", text=note, id=note)
        [server] = [child for child in mine.children() if child.pid not in before]
        server.kill()
        server.wait(30)
    return server


@pytest.mark.slow
async def test_what_was_acknowledged_survives_a_kill(model: Path, tmp_path: Path) -> None:
    notes = ["one", "two", "three"]
    server = await told_until_killed(over_stdio(model, tmp_path / "kept"), notes)
    assert not server.is_running()
    with open_memory(tmp_path / "kept", model=model) as memory:
        assert {document.id for document in memory.list()} == set(notes)
        assert memory.verify() == ()


@dataclass(frozen=True)
class Served:
    """A running HTTP server."""

    process: subprocess.Popen[str]
    port: int

    def request(self, **headers: str) -> int:
        """The status of a POST of a tools/list request with these headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping"})
        given = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        try:
            connection.request("POST", "/mcp", body, given)
            return connection.getresponse().status
        finally:
            connection.close()


@contextmanager
def serving(model: Path, folder: Path) -> Iterator[Served]:
    process = subprocess.Popen(
        [PROGRAM, "mcp", "--http", "--port", "0"],
        env={**os.environ, **variables(model, folder, MSA_MEMORY_MCP_TOKEN=TOKEN)},
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)/mcp\n", line)
        assert address, line
        yield Served(process, int(address[1]))
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(model, tmp_path_factory.mktemp("served") / "kept") as served:
        yield served


async def test_http_serves_holders_of_the_token(served: Served) -> None:
    url = f"http://127.0.0.1:{served.port}/mcp"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60) as http_client,
        Client(streamable_http_client(url, http_client=http_client)) as client,
    ):
        assert {tool.name for tool in (await client.list_tools()).tools} == READING
        await call(client, "add_memory", text="Bob lives in Oslo and repairs violins.", id="bob")
        found = await call(client, "search_memory", query="violins")
        assert [entry["id"] for entry in found["results"]] == ["bob"]


@pytest.mark.parametrize(
    "authorization",
    [
        None, "", TOKEN, "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}",
        f"bearer  {TOKEN}", "Bearer ünïcode",
    ],
)  # fmt: skip
def test_http_is_closed_to_others(served: Served, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode().decode("latin-1")}
    assert served.request(**headers) == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:{port}"}, 421),
        ({"Host": "127.0.0.1:1"}, 421),
        ({"Origin": "http://127.0.0.1:{port}"}, None),
        ({"Origin": "http://localhost:{port}", "Host": "localhost:{port}"}, None),
        ({}, None),
    ],
)
def test_http_checks_host_and_origin(served: Served, headers: dict[str, str], status: int | None) -> None:
    here = {name: value.replace("{port}", str(served.port)) for name, value in headers.items()}
    found = served.request(Authorization=f"Bearer {TOKEN}", **here)
    assert found == status if status else found not in (401, 403, 421)


def test_http_listens_on_loopback_alone(served: Served) -> None:
    listening = [
        c for c in psutil.Process(served.process.pid).net_connections() if c.status == psutil.CONN_LISTEN
    ]
    assert [(c.laddr.ip, c.laddr.port) for c in listening] == [("127.0.0.1", served.port)]


@pytest.mark.slow
def test_http_ends_when_interrupted(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "kept") as served:
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) in (0, -signal.SIGTERM)
        assert served.process.communicate()[0] == "", "stdout stays clean"


def failing(model: Path, folder: Path, *options: str, **more: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "MSA_MEMORY_MCP_TOKEN"}
    done = subprocess.run(
        [PROGRAM, "mcp", *options], env={**environment, **variables(model, folder, **more)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    return done.stderr


def test_http_needs_a_token(model: Path, tmp_path: Path) -> None:
    assert "set MSA_MEMORY_MCP_TOKEN" in failing(model, tmp_path / "m", "--http", "--port", "0")
    said = failing(model, tmp_path / "m", "--http", "--port", "0", MSA_MEMORY_MCP_TOKEN="short")
    assert "the token has 5 characters" in said


def test_a_port_that_is_taken(served: Served, model: Path, tmp_path: Path) -> None:
    said = failing(model, tmp_path / "m", "--http", "--port", str(served.port), MSA_MEMORY_MCP_TOKEN=TOKEN)
    assert f"port {served.port} of 127.0.0.1 cannot be had" in said
    assert not (tmp_path / "m").exists()
