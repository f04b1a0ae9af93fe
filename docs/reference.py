"""Writes ``reference.md`` beside it from the package's own docstrings, signatures and command help.

python docs/reference.py           write it
python docs/reference.py --check   only say whether it is up to date, by the exit code
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from typer.main import get_command

from msa_memory import cli, errors, inspection, testing, types
from msa_memory.config import MemoryConfig
from msa_memory.memory import MemoryModel
from msa_memory.session import Session

TARGET = Path(__file__).with_name("reference.md")
INTEGRATIONS = {
    "langchain": ["ChatMSA", "MSARetriever", "MSAMemoryMiddleware"],
    "langgraph": ["MSAStore"],
    "llama_index": ["MSAIndex", "MSAQueryEngine", "MSARetriever", "MSALLM", "MSAMemoryBlock"],
}
_SECTION = re.compile(r"(Args|Raises|Returns|Yields):\n")


def reference() -> str:
    """The whole page."""
    parts = [
        "# Reference",
        "Made by `python docs/reference.py` from the docstrings; a test keeps it up to date. Every verb of "
        "`MemoryModel` and `Session` has an async twin with prefix `a` that takes the same arguments.",
        *_class(MemoryModel, methods=True),
        *_class(Session, methods=True),
        *_class(MemoryConfig),
        "## Values",
        *(part for name in sorted(types.__all__) if name != "TensorBytes" for part in _value(name)),
        "## Errors",
        "```\n" + (inspect.getdoc(errors) or "").replace("``", "'") + "\n```",
        *_module(inspection),
        *_module(testing),
        "## Integrations",
        *(part for package, names in INTEGRATIONS.items() for part in _integration(package, names)),
        "## Commands",
        *_commands(),
    ]
    return "\n\n".join(parts) + "\n"


def _class(found: type, *, methods: bool = False) -> Iterator[str]:
    yield f"## {found.__name__}"
    yield _prose(found)
    yield from _fields(found)
    if methods:
        names = sorted(name for name in dir(found) if not name.startswith("_"))
        twins = {name for name in names if name[0] == "a" and name[1:] in names}
        for name in [name for name in names if name not in twins]:
            yield from _member(found, name)


def _member(owner: type, name: str) -> Iterator[str]:
    found = inspect.getattr_static(owner, name)
    if isinstance(found, property):
        yield f"### {owner.__name__}.{name}"
        yield _prose(found)
    elif isinstance(found, classmethod) or inspect.isfunction(found):
        yield f"### {owner.__name__}.{name}"
        yield _signature(name, getattr(owner, name))
        yield _prose(found)


def _value(name: str) -> Iterator[str]:
    found = getattr(types, name)
    yield f"### {name}"
    yield _prose(found)
    yield from _fields(found)


def _module(module: ModuleType) -> Iterator[str]:
    yield f"## {module.__name__}"
    yield _prose(module)
    for name in module.__all__:
        found = getattr(module, name)
        if inspect.isfunction(found):
            yield f"### {name}"
            yield _signature(name, found)
            yield _prose(found)


def _integration(package: str, names: list[str]) -> Iterator[str]:
    module = importlib.import_module(f"msa_memory.integrations.{package}")
    yield f"### msa_memory.integrations.{package}"
    yield _prose(module)
    for name in names:
        found = getattr(module, name)
        yield f"#### {name}"
        if not hasattr(found, "model_fields"):
            yield _signature(name, found)
        yield _prose(found)
        yield from _fields(found)


class _Written:
    """An annotation that shows as it is written in the source, without quotes."""

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation

    def __repr__(self) -> str:
        is_text = isinstance(self._annotation, str)
        return self._annotation if is_text else inspect.formatannotation(self._annotation)


def _signature(name: str, found: Any) -> str:
    """The call as Python, one argument a line where it is long."""
    signature = inspect.signature(found)
    parameters = [
        one.replace(annotation=_Written(one.annotation))
        for one in signature.parameters.values()
        if one.name not in ("self", "cls")
    ]
    signature = signature.replace(
        parameters=parameters, return_annotation=_Written(signature.return_annotation)
    )
    text = f"{name}{signature}".replace("builtins.", "")
    if len(text) > 100:
        result = text.rpartition(") -> ")[2]
        arguments = str(signature.replace(return_annotation=inspect.Signature.empty))[1:-1]
        text = f"{name}(\n    {_broken(arguments)}\n) -> {result}".replace("builtins.", "")
    return f"```\n{text}\n```"


def _broken(arguments: str) -> str:
    """Arguments one a line, cut at the commas that stand outside all brackets."""
    lines, depth = [""], 0
    for character in arguments:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            lines[-1] += ","
            lines.append("")
        else:
            lines[-1] += character
    return "\n    ".join(line.strip() for line in lines)


def _fields(found: type) -> Iterator[str]:
    """A model's fields with type, default and what is said below them in the source."""
    fields = getattr(found, "model_fields", None)
    if not fields or found.__module__.split(".")[0] != "msa_memory":
        return
    said = _said_below(found)
    lines = []
    for name in found.__annotations__:
        if name not in fields or name.startswith("_"):
            continue
        field = fields[name]
        annotation = inspect.formatannotation(field.annotation).replace("msa_memory.types.", "")
        default = "" if field.is_required() else f" = {field.get_default(call_default_factory=False)!r}"
        if field.default_factory is not None:
            default = " = {}" if field.default_factory is dict else " = ..."
        lines.append(f"- `{name}: {annotation}{default}`{' ' + said[name] if name in said else ''}")
    if lines:
        yield "\n".join(lines)


def _said_below(found: type) -> dict[str, str]:
    """The strings that stand below a class's fields, by the field's name."""
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(found))).body
    assert isinstance(tree, ast.ClassDef)
    said = {}
    for before, after in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and is_text:
            said[before.target.id] = _clean(" ".join(str(after.value.value).split()))
    return said


def _commands() -> Iterator[str]:
    program = get_command(cli.app)
    context = click.Context(program, info_name="msa-memory")
    for name, command in _below(program, context, ""):
        yield f"### msa-memory {name}"
        yield _clean(inspect.cleandoc(command.help or ""))
        lines = []
        for parameter in command.params:
            names = [f"`{name}`" for name in parameter.opts if name.startswith("-")]
            shown = ", ".join(names) or (parameter.name or "").upper()
            if parameter.name not in ("memory", "namespace", "model", "json", "debug"):
                lines.append(f"- {shown}: {getattr(parameter, 'help', None) or ''}")
        if lines:
            yield "\n".join(lines)


def _below(group: Any, context: click.Context, path: str) -> Iterator[tuple[str, Any]]:
    for name in sorted(group.list_commands(context)):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from _below(command, context, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


def _prose(found: object) -> str:
    """A docstring as Markdown: its sections become lists."""
    text = inspect.getdoc(found) or ""
    first, *sections = _SECTION.split(text)
    parts = [_clean(first.strip())]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        parts.append(f"{title}:\n\n" + "\n".join(_entries(body)))
    return "\n\n".join(part for part in parts if part)


def _entries(body: str) -> Iterator[str]:
    entry = ""
    for line in textwrap.dedent(body).strip("\n").splitlines():
        if line.startswith(" ") or not line:
            entry = f"{entry} {line.strip()}".rstrip()
            continue
        if entry:
            yield f"- {_clean(entry)}"
        entry = line
    if entry:
        yield f"- {_clean(entry)}"


def _clean(text: str) -> str:
    """Names as Markdown marks them; what is fenced is an excerpt, not a program of its own."""
    return re.sub(r"(?<!`)``(?!`)", "`", text.replace("```python", "```"))


if __name__ == "__main__":
    page = reference()
    if sys.argv[1:] == ["--check"]:
        sys.exit(TARGET.read_text(encoding="utf-8") != page)
    TARGET.write_text(page, encoding="utf-8")
