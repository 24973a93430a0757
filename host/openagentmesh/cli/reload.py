"""`oam reload`: load what has changed on disk, or one module in any case."""

import asyncio
from typing import Annotated, Final

import typer
from pydantic import ValidationError
from pydantic_core import to_json

from openagentmesh.cli.connecting import Connecting
from openagentmesh.cli.output import Json, note, print_json, print_line
from openagentmesh.mesh.node import Node
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import MeshError, MeshTimeout, NotFound
from openagentmesh.protocol.status import ReloadReply
from openagentmesh.registry.presence import read_records

# A module may take long to load, and so may a migration.
_TIMEOUT_S: Final = 60.0


async def reload(
    mesh: Connecting,
    module: Annotated[
        str, typer.Argument(help="A module, by its name in `oam status`; without it everything that changed.")
    ] = "",
    *,
    find_references: Annotated[
        bool,
        typer.Option(
            "--find-references", help="Report what keeps the old version in memory; agents pause meanwhile."
        ),
    ] = False,
    json_: Json = False,
) -> None:
    """Let all hosts load what has changed on disk, as they do on their own while they watch it."""
    async with mesh as node:
        records = await read_records(node.buckets)
        body = to_json({"module": module, "find_references": find_references})
        found = await asyncio.gather(*[_request(node, key, body) for key in records])
    replies = [reply for reply in found if reply]
    if json_:
        print_json([reply.model_dump(mode="json") for reply in replies])
    else:
        for reply in replies:
            _print(reply)
    if not replies:
        # Without the hint of NotFound, which is about agents.
        server = node.connection.target.display_url
        raise MeshError(NotFound.code, f"No host answers on {server}. Start one with `oam up`.")
    if refusals := _refusals(replies):
        raise MeshError("reload_refused", "; ".join(refusals))


def _refusals(replies: list[ReloadReply]) -> list[str]:
    """Why something was not loaded; a module that one host does not have may be another one's."""
    errors = [reply.error for reply in replies if reply.error]
    refused = [reply.reload.text for reply in replies if reply.reload and reply.reload.error]
    return refused or (errors if len(errors) == len(replies) else [])


async def _request(node: Node, instance_id: str, body: bytes) -> ReloadReply | None:
    """The reply of one host; None for an instance that is not a host, or does not answer."""
    try:
        message = await node.inbox.request(subjects.host(instance_id, "reload"), body, timeout=_TIMEOUT_S)
        if codec.is_no_responders(message.head) or message.body == b"{}":
            return None
        return ReloadReply.model_validate_json(message.body)
    except MeshTimeout:
        return None
    except ValidationError as exc:
        return ReloadReply(host=instance_id[:8], error=f"malformed reply: {exc.errors()[0]['msg']}")


def _print(reply: ReloadReply) -> None:
    result = reply.reload
    if result is None:
        text = reply.error or "nothing has changed"
        if reply.not_loaded:
            text += f"; not loaded: {', '.join(reply.not_loaded)}"
        note(f"{reply.host}: {text}")
        return
    print_line(f"{reply.host}: {result.text}")
    for line in [*result.details.splitlines(), *result.notes]:
        print_line(f"  {line}")
