"""`oam reload`: load now what has changed on disk, or one module anyway."""

import asyncio
from typing import Annotated, Any

import typer
from pydantic_core import from_json, to_json

from openagentmesh.cli.connecting import connected
from openagentmesh.cli.output import Json, Url, as_json, note, run, say
from openagentmesh.mesh.node import Node
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import MeshError, MeshTimeout, NotFound
from openagentmesh.registry.presence import instances

# A module may take long to load, and a migration as well; in seconds.
_PATIENCE = 60.0


def reload(
    module: Annotated[
        str, typer.Argument(help="A module, as `oam status` names it; else whatever differs from disk.")
    ] = "",
    url: Url = None,
    *,
    json_: Json = False,
) -> None:
    """Let all hosts load what has changed on disk, as they do by themselves where they watch it."""

    async def main() -> None:
        async with connected(url) as node:
            records = await instances(node.buckets)
            found = await asyncio.gather(*[_ask(node, key, module) for key in records])
            where = node.connection.target.display_url
        answers = [answer for answer in found if answer]
        if json_:
            say(as_json(answers))
        else:
            for answer in answers:
                _show(answer)
        if not answers:
            raise NotFound(f"No host answers on {where}. Start one with `oam up`.")
        if refused := _refusals(answers):
            raise MeshError("reload_refused", "; ".join(refused))

    run(main(), json_=json_)


def _refusals(answers: list[dict[str, Any]]) -> list[str]:
    """Why something was not loaded; a module that one host does not have is another one's."""
    outcomes = [answer.get("outcome") or {} for answer in answers]
    unknown = [answer["error"] for answer in answers if "error" in answer]
    refused = [outcome["text"] for outcome in outcomes if outcome.get("error")]
    return refused or (unknown if len(unknown) == len(answers) else [])


async def _ask(node: Node, instance_id: str, module: str) -> dict[str, Any]:
    """What one host did; empty for an instance that is no host, or is gone."""
    body = to_json({"module": module})
    try:
        message = await node.inbox.request(subjects.host(instance_id, "reload"), body, timeout=_PATIENCE)
    except MeshTimeout:
        return {}
    answer = codec.decode_reply(message.head, message.body)
    found: dict[str, Any] = {} if answer.no_responders else from_json(answer.body)
    return found


def _show(answer: dict[str, Any]) -> None:
    outcome = answer.get("outcome")
    if outcome is None:
        text = answer.get("error") or "nothing has changed"
        if waiting := answer.get("not_loaded"):
            text += f"; not loaded: {', '.join(waiting)}"
        note(f"{answer['host']}: {text}")
        return
    say(f"{answer['host']}: {outcome['text']}")
    for line in [*outcome["details"].splitlines(), *outcome["notes"]]:
        say(f"  {line}")
