"""The command that serves a memory to MCP clients: ``mcp``."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from msa_memory.cli.call import Call
from msa_memory.errors import ConfigError

__all__ = ["serve"]


def serve(
    call: Call,
    allow_write: Annotated[
        bool, typer.Option("--allow-write", help="Offer update_memory and forget_memory too.")
    ] = False,
    http: Annotated[
        bool, typer.Option("--http", help="Serve streamable HTTP on loopback instead of stdio.")
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="With --http; 0 takes a free one.")
    ] = 8765,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MSA_MEMORY_MCP_TOKEN",
            help="With --http: the bearer token that clients must send. Better set as a variable, since "
            "other users of the machine can read a command line.",
        ),
    ] = None,
) -> None:
    """Serve one namespace to MCP clients: over stdio, or over HTTP to holders of a token."""
    from msa_memory.integrations.mcp import LOOPBACK, PATH, build_server, check_token, serve_http

    if not http:
        with call.open_or_create() as memory:
            build_server(memory, allow_write=allow_write).run("stdio")
        return
    if token is None:
        raise ConfigError("--http needs a token that clients must send; set MSA_MEMORY_MCP_TOKEN")
    check_token(token)
    with _listening(LOOPBACK, port) as listener, call.open_or_create() as memory:
        server = build_server(memory, allow_write=allow_write)
        call.out.note(f"listening on http://{LOOPBACK}:{listener.getsockname()[1]}{PATH}")
        serve_http(server, listener, token=token)


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} cannot be had ({error.strerror}); choose another"
        ) from error
