"""How commands get to the mesh, and what to do when they do not."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from openagentmesh.cli.plugins import border_here
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.errors import ConnectionFailed
from openagentmesh.transport import address
from openagentmesh.transport.connection import Target


class Misdirected(ConnectionFailed):
    """Where we were sent there is nothing; the message says by whom, and what to do."""

    hint = ""


def advised(error: ConnectionFailed, advice: str) -> ConnectionFailed:
    """An error of an address that nobody answers at, with better advice than its kind has."""
    if "url" not in error.details:
        return error  # of something else
    return Misdirected(f"{error.message} {advice}", details=error.details)


@asynccontextmanager
async def connected(url: str | None) -> AsyncIterator[Node]:
    """A node for one command, which serves nothing."""
    target = _target(url)
    node = Node(target, new_id(), border=border_here())
    try:
        await node.start()
    except ConnectionFailed as exc:
        # At the default address a new `oam up` helps, elsewhere it would not be found.
        if url or target.url == address.DEFAULT_URL:
            raise
        giver = _giver("OAM_URL")
        remedy = "unset it" if giver == "OAM_URL" else "remove the file"
        advice = f"{giver} gives this address: start that server again, or {remedy}, or give --url."
        raise advised(exc, advice) from exc
    try:
        yield node
    finally:
        await node.stop(0)


def _target(url: str | None) -> Target:
    """Where to connect, and with which credentials.

    Raises:
        Misdirected: the credentials file is not there.

    """
    target = Target(address.url_or_default(url), address.creds_or_none())
    if target.creds and not Path(target.creds).is_file():
        raise Misdirected(
            f"The credentials file '{target.creds}' does not exist; {_giver('OAM_CREDS')} names it. "
            "Correct it there, or take it out when the server wants no credentials."
        )
    return target


def _giver(variable: str) -> str:
    """The environment variable, or the file, that says what no option said."""
    if os.environ.get(variable):
        return variable
    here = Path.cwd()
    files = (folder / address.FILE_NAME for folder in (here, *here.parents))
    return str(next((file for file in files if file.is_file()), address.FILE_NAME))
