"""`oam status`: what is running, and why something is not."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import typer
from pydantic_core import from_json

from openagentmesh.cli.connecting import connected
from openagentmesh.cli.output import Json, Url, as_json, count, note, run, say
from openagentmesh.mesh.node import Node
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import MeshTimeout
from openagentmesh.registry.presence import instances

_PATIENCE = 2.0
_RECENT = 6


def status(url: Url = None, *, json_: Json = False) -> None:
    """Show all hosts: their agents, what failed to load, and how the connection fared."""

    async def main() -> None:
        async with connected(url) as node:
            records = await instances(node.buckets)
            hosts = await asyncio.gather(*[_ask(node, key, record) for key, record in records.items()])
            shown = node.connection.target.display_url
        if json_:
            say(as_json(list(hosts)))
        elif not hosts:
            note(f"nobody serves agents on {shown}")
        else:
            for host in hosts:
                say("\n".join(_lines(host)))

    run(main(), json_=json_)


async def _ask(node: Node, instance_id: str, record: dict[str, Any]) -> dict[str, Any]:
    """What one instance says of itself; what is known of it when it does not answer."""
    silent = {"instance_id": instance_id, "silent": True, "record": record}
    try:
        message = await node.inbox.request(subjects.host(instance_id, "info"), timeout=_PATIENCE)
    except MeshTimeout:
        return silent
    answer = codec.decode_reply(message.head, message.body)
    if answer.no_responders:
        return silent
    found: dict[str, Any] = from_json(answer.body)
    return found


def _lines(host: dict[str, Any]) -> list[str]:
    if host.get("silent"):
        record = host["record"]
        name = record.get("host", host["instance_id"][:8])
        return [f"{_bad('?')} {name}: recorded with {len(record['agents'])} agents, but does not answer"]
    connection = host["connection"]
    title = f"{_good('●')} {typer.style(host.get('host', 'a mesh of its own'), bold=True)}"
    up = _ago(time.time() - host["started_at"])
    lines = [f"{title}  pid {host.get('pid', '?')}  up {up}  {connection['url']}"]
    for module in host.get("modules", []):
        if module["state"] != "serving":
            goes_on = " (the version before it goes on)" if module["state"] == "outdated" else ""
            lines.append(f"  {_bad('✗')} {module['origin']}: {module['error']}{goes_on}")
            lines += [f"      {line}" for line in module["traceback"].splitlines()]
    width = max((len(agent["name"]) for agent in host["agents"]), default=0)
    for agent in host["agents"]:
        lines.append(f"  {agent['name']:<{width}}  {agent['version']}  {_doing(agent)}")
    lines += [f"  {_bad('✗')} {name}: {why}" for name, why in host.get("refused", {}).items()]
    if host["agent_count"] > len(host["agents"]):
        lines.append(f"  and {host['agent_count'] - len(host['agents'])} more agents")
    server = host.get("embedded_server") or {"history": []}
    reloads = [{"at": reload["at"], "what": reload["text"]} for reload in host.get("reloads", [])]
    story = sorted(connection["history"] + server["history"] + reloads, key=lambda event: str(event["at"]))
    lines += [f"  {_clock(event['at'])}  {event['what']}" for event in story[-_RECENT:]]
    return lines


def _doing(agent: dict[str, Any]) -> str:
    """What an agent does now: its requests, or how it runs by itself."""
    background = agent.get("background")
    if not agent.get("active", True):
        return "off: its condition does not hold"
    if background is None:
        done = f"{count(agent['requests'], 'request')}  {count(agent['errors'], 'error')}"
        return f"{done}  {agent['in_flight']} running"
    text = f"{agent['kind']}  {background['state']}"
    if background["restarts"] or background["error"]:
        text += f"  {count(background['restarts'], 'restart')}  {_bad(background['error'])}"
    return text


def _good(text: str) -> str:
    return typer.style(text, fg=typer.colors.GREEN)


def _bad(text: str) -> str:
    return typer.style(text, fg=typer.colors.RED)


def _clock(at: str) -> str:
    moment = datetime.fromisoformat(at)
    age = _ago((datetime.now(UTC) - moment).total_seconds())
    return f"{moment.astimezone():%H:%M:%S} ({age} ago)"


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
