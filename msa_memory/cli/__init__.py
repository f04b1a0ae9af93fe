"""The command line ``msa-memory``: each command parses, calls one method of ``MemoryModel`` and prints.

Results go to stdout; progress, notes and errors to stderr. ``--json`` prints exactly one JSON document per
run. Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 training paused, 130 interrupted. Importing
this, ``--help`` and shell completion load no torch.
"""

from __future__ import annotations

import io
import sys

import typer

from msa_memory.cli.asking import ask, search
from msa_memory.cli.call import Command, add_command, add_global_options
from msa_memory.cli.evaluation import evaluation
from msa_memory.cli.inspecting import inspect
from msa_memory.cli.mcp import serve
from msa_memory.cli.models import fetch_model, list_models
from msa_memory.cli.moving import export, fork, import_file, reencode
from msa_memory.cli.reading import history, list_documents, sessions, show, stats
from msa_memory.cli.training import training
from msa_memory.cli.upkeep import compact, verify
from msa_memory.cli.writing import add, forget, restore, update

__all__ = ["app", "main"]

_COMMANDS: dict[str, Command] = {
    "add": add,
    "ask": ask,
    "search": search,
    "list": list_documents,
    "show": show,
    "update": update,
    "history": history,
    "restore": restore,
    "sessions": sessions,
    "forget": forget,
    "stats": stats,
    "inspect": inspect,
    "verify": verify,
    "compact": compact,
    "export": export,
    "import": import_file,
    "fork": fork,
    "reencode": reencode,
    "mcp": serve,
}

app = typer.Typer(
    name="msa-memory",
    help="A memory for agents, inside the model's own attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
add_global_options(app)
for _name, _command in _COMMANDS.items():
    add_command(app, _command, _name)

_models = typer.Typer(help="The models a memory can live in.", no_args_is_help=True)
add_command(_models, list_models, "list", opens_memory=False)
add_command(_models, fetch_model, "fetch", opens_memory=False)
app.add_typer(_models, name="models")

app.add_typer(training, name="train")
app.add_typer(evaluation, name="eval")


def main() -> None:
    """Run the command line and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a letter is no reason to fail
    app(prog_name="msa-memory")
