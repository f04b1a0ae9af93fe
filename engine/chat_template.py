"""A checkpoint's chat template, rendered the way Hugging Face renders it.

Templates come with downloaded files, so they run in Jinja's immutable sandbox: no attribute tricks, no
changes to the values passed in. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from msa_memory.errors import CheckpointError, ConfigError

__all__ = ["ChatTemplate"]


class _Refused(Exception):
    """The template itself called ``raise_exception``."""


class _GenerationTag(Extension):
    """Accepts ``{% generation %}...{% endgeneration %}``, which marks assistant text for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    return environment


class ChatTemplate:
    """One compiled template with the checkpoint's special tokens (``bos_token`` and so on).

    Raises:
        CheckpointError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the checkpoint's chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as one prompt text; ``variables`` reach the template under their names.

        Raises:
            ConfigError: the template refused these messages (``raise_exception``).
            CheckpointError: the template failed or tried something the sandbox forbids.
        """
        values: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens}
        values |= variables or {}
        values["messages"] = [dict(message) for message in messages]
        values["add_generation_prompt"] = add_generation_prompt
        try:
            return self._template.render(values)
        except _Refused as error:
            raise ConfigError(f"the checkpoint's chat template refused these messages: {error}") from error
        except Exception as error:  # a template is foreign code: whatever it raises is the checkpoint's fault
            raise CheckpointError(
                f"the checkpoint's chat template failed: {type(error).__name__}: {error}"
            ) from error
