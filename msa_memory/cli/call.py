"""One run of the command line: its global options, the memory it opens, where it prints and how it ends.

Knows how commands get registered, not what any of them does.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from msa_memory.cli.output import Output
from msa_memory.config import default_memory_folder
from msa_memory.errors import MSAError, StorageError

if TYPE_CHECKING:
    from msa_memory.memory import MemoryModel

__all__ = ["Call", "Command", "add_command", "add_global_options"]

INTERRUPTED = 130
_PANEL = "Options of every command"

Command = Callable[..., None]
Memory = Annotated[
    Path | None,
    typer.Option(
        "--memory",
        "-m",
        metavar="FOLDER",
        help="The memory's folder; else MSA_MEMORY_PATH, else ./agent-memory.",
        rich_help_panel=_PANEL,
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option(
        "--namespace", "-n", metavar="NAME", help="Which namespace; else 'default'.", rich_help_panel=_PANEL
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="Registered name, folder or hub id; else the one the memory was made with.",
        rich_help_panel=_PANEL,
    ),
]
Json = Annotated[
    bool | None,
    typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=_PANEL),
]
Debug = Annotated[
    bool | None,
    typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_PANEL),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"msa-memory {version('msa-memory')}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
]


@dataclass(frozen=True, slots=True)
class Call:
    """What every command gets first: where the memory is and where to print."""

    folder: Path
    namespace: str
    model: str | None
    out: Output

    def open(self) -> MemoryModel:
        """The memory for reading; StorageError if there is none."""
        self._must_exist()
        return self._open(read_only=True)

    def open_for_changes(self) -> MemoryModel:
        """The memory for changing what it holds; StorageError if there is none."""
        self._must_exist()
        return self._open()

    def open_or_create(self) -> MemoryModel:
        """The memory for adding to it, made if there is none."""
        return self._open()

    def _open(self, *, read_only: bool = False) -> MemoryModel:
        from msa_memory.memory import MemoryModel

        return MemoryModel.open(self.folder, model=self.model, namespace=self.namespace, read_only=read_only)

    def _must_exist(self) -> None:
        try:
            missing = not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir()))
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be read: {error.strerror}") from error
        if missing:
            raise StorageError(
                f"there is no memory at {self.folder}; name another with --memory, or make it by adding "
                f"something: msa-memory --memory {self.folder} add 'some text'"
            )


def add_global_options(app: typer.Typer) -> None:
    """Let the program take the global options before the command's name too, and ``--version``."""
    app.callback()(_start)


def add_command(app: typer.Typer, command: Command, name: str, *, opens_memory: bool = True) -> None:
    """Register ``command(call, ...)``: its parameters are its own options, the global ones are added.

    Args:
        opens_memory: False for a command that takes ``--json`` and ``--debug`` only.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    shared = _shared_options(opens_memory)

    def run(context: typer.Context, **given: Any) -> None:
        late = {option.name: given.pop(option.name) for option in shared}
        early: Mapping[str, Any] = context.find_root().obj
        chosen = {key: late.get(key) if late.get(key) is not None else early[key] for key in early}
        with _ending(chosen):
            command(_call(chosen), **given)

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    options = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in own]
    signature = inspect.Signature([context, *options, *shared])
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {option.name: option.annotation for option in signature.parameters.values()}
    cast(Any, run).__signature__ = signature
    app.command(name)(run)


def _start(
    context: typer.Context,
    memory: Memory = None,
    namespace: Namespace = None,
    model: Model = None,
    json: Json = None,
    debug: Debug = None,
    version: Version = False,
) -> None:
    context.obj = {"memory": memory, "namespace": namespace, "model": model, "json": json, "debug": debug}


def _shared_options(opens_memory: bool) -> list[inspect.Parameter]:
    kinds = {"memory": Memory, "namespace": Namespace, "model": Model} if opens_memory else {}
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in {**kinds, "json": Json, "debug": Debug}.items()
    ]


def _call(options: Mapping[str, Any]) -> Call:
    return Call(
        folder=options["memory"].expanduser() if options["memory"] is not None else default_memory_folder(),
        namespace="default" if options["namespace"] is None else options["namespace"],
        model=options["model"],
        out=Output(json=bool(options["json"])),
    )


@contextmanager
def _ending(options: Mapping[str, Any]) -> Iterator[None]:
    """Errors raised on purpose become one line on stderr and exit code 1; Ctrl-C becomes 130."""
    out = Output(json=bool(options["json"]))
    try:
        yield
    except MSAError as error:
        if options["debug"]:
            out.note(traceback.format_exc())
        out.note(f"error: {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        out.note("interrupted")
        raise typer.Exit(INTERRUPTED) from error
