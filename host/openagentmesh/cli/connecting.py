"""How commands connect to the mesh, and advice when they cannot."""

import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import update_wrapper
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any

import typer

from openagentmesh.cli.output import Json, Url, run
from openagentmesh.cli.plugins import local_client_middlewares
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.errors import ConnectionFailed
from openagentmesh.transport import address
from openagentmesh.transport.connection import Target

# The mesh for one command: connected in the `async with` block.
Connecting = AbstractAsyncContextManager[Node]
Main = Callable[..., Coroutine[Any, Any, None]]


def mesh_command(app: typer.Typer, name: str | None = None) -> Callable[[Main], Main]:
    """Make a coroutine function a command of `app`, with the further options --url and --json.

    The first argument of the function is a `Connecting`; it receives `json_` if it has that parameter.
    """

    def register(main: Main) -> Main:
        [_, *own] = signature(main).parameters.values()

        def command(*, url: Url = None, json_: Json = False, **given: Any) -> None:  # noqa: ANN401 - any option
            if "json_" in signature(main).parameters:
                given["json_"] = json_
            run(main(connected(url), **given), json_=json_)

        [*shared, _] = signature(command).parameters.values()
        options = [option.replace(kind=Parameter.KEYWORD_ONLY) for option in own if option.name != "json_"]
        update_wrapper(command, main)
        command.__signature__ = Signature([*options, *shared])  # type: ignore[attr-defined]
        app.command(name)(command)
        return main

    return register


class WrongAddress(ConnectionFailed):
    """A configured address does not work; the message contains its origin and a remedy."""

    hint = ""


def with_advice(error: ConnectionFailed, advice: str) -> ConnectionFailed:
    """An error of an unreachable address with specific advice; other errors are unchanged."""
    if "url" not in error.details:
        return error
    return WrongAddress(f"{error.message} {advice}", details=error.details)


@asynccontextmanager
async def connected(url: str | None) -> AsyncIterator[Node]:
    """A node for one command, which serves nothing."""
    target = _target(url)
    node = Node(target, new_id(), middlewares=local_client_middlewares())
    try:
        await node.start()
    except ConnectionFailed as exc:
        # At the default address the advice is to start `oam up`; elsewhere that would not help.
        if url or target.url == address.DEFAULT_URL:
            raise
        source = _source("OAM_URL")
        remedy = "unset it" if source == "OAM_URL" else "remove the file"
        advice = f"The address comes from {source}: start that server, or {remedy}, or give --url."
        raise with_advice(exc, advice) from exc
    try:
        yield node
    finally:
        await node.stop(0)


def _target(url: str | None) -> Target:
    """The server and its credentials; raises WrongAddress if the credentials file does not exist."""
    target = Target(address.url_or_default(url), address.creds_or_none())
    if target.creds and not Path(target.creds).is_file():
        raise WrongAddress(
            f"The credentials file '{target.creds}' from {_source('OAM_CREDS')} does not exist. "
            "Correct the path there, or remove it when the server needs no credentials."
        )
    return target


def _source(variable: str) -> str:
    """The environment variable, or the file, that an address comes from."""
    if os.environ.get(variable):
        return variable
    here = Path.cwd()
    files = (folder / address.FILE_NAME for folder in (here, *here.parents))
    return str(next((file for file in files if file.is_file()), address.FILE_NAME))
