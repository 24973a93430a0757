"""`oam status`: what is running, and why something is not."""

import asyncio
import time
from functools import partial
from typing import Any, Final

import typer
from pydantic import ValidationError

from openagentmesh.cli.connecting import Connecting
from openagentmesh.cli.output import Json, count, note, print_json, print_line
from openagentmesh.mesh.node import Node
from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import MeshTimeout
from openagentmesh.protocol.status import AgentStatus, HistoryEvent, HostStatus, InstanceRecord
from openagentmesh.registry.presence import read_records

_TIMEOUT_S: Final = 2.0
_MAX_EVENTS: Final = 6
_green = partial(typer.style, fg=typer.colors.GREEN)
_red = partial(typer.style, fg=typer.colors.RED)


async def status(mesh: Connecting, *, json_: Json = False) -> None:
    """Show all hosts: their agents, modules that failed to load, and events of the connection."""
    async with mesh as node:
        records = await read_records(node.buckets)
        hosts = await asyncio.gather(*[_request(node, instance_id) for instance_id in records])
    instances = [(key, records[key], host) for key, host in zip(records, hosts, strict=True)]
    if json_:
        print_json([_document(*instance) for instance in instances])
    elif not instances:
        note(f"no instance serves agents on {node.connection.target.display_url}")
    else:
        for instance in instances:
            print_line("\n".join(_lines(*instance)))


async def _request(node: Node, instance_id: str) -> HostStatus | None:
    """The status of an instance; None when it does not answer, or not in this form."""
    try:
        message = await node.inbox.request(subjects.host(instance_id, "info"), timeout=_TIMEOUT_S)
        return HostStatus.model_validate_json(message.body)  # without responders the body is empty
    except (MeshTimeout, ValidationError):
        return None


def _document(instance_id: str, record: InstanceRecord, host: HostStatus | None) -> dict[str, Any]:
    if host is None:
        return {"instance_id": instance_id, "answers": False, "record": record.model_dump(mode="json")}
    return host.model_dump(mode="json")


def _lines(instance_id: str, record: InstanceRecord, host: HostStatus | None) -> list[str]:
    if host is None:
        name = record.host or instance_id[:8]
        return [
            f"{_red('?')} {name}: recorded with {count(len(record.agents), 'agent')}, but does not answer"
        ]
    title = f"{_green('●')} {typer.style(host.host or 'a mesh without a host', bold=True)}"
    up = _age(time.time() - host.started_at)
    lines = [f"{title}  pid {host.pid or '?'}  up {up}  {host.connection.url}", *_module_lines(host)]
    width = max((len(agent.name) for agent in host.agents), default=0)
    lines += [f"  {agent.name:<{width}}  {agent.version}  {_activity(agent)}" for agent in host.agents]
    lines += [f"  {_red('✗')} {name}: {reason}" for name, reason in host.refused.items()]
    if host.agent_count > len(host.agents):
        lines.append(f"  and {host.agent_count - len(host.agents)} more agents")
    for event in _events(host):
        age = _age(time.time() - event.at.timestamp())
        lines.append(f"  {event.at.astimezone():%H:%M:%S} ({age} ago)  {event.what}")
    return lines


def _module_lines(host: HostStatus) -> list[str]:
    lines = []
    for module in host.modules:
        if module.state != "serving":
            suffix = " (an older version serves)" if module.state == "outdated" else ""
            lines.append(f"  {_red('✗')} {module.origin}: {module.error}{suffix}")
            lines += [f"      {line}" for line in module.traceback.splitlines()]
    return lines


def _events(host: HostStatus) -> list[HistoryEvent]:
    """The last events of connection, embedded server and reloads."""
    events = [*host.connection.history, *(host.embedded_server.history if host.embedded_server else ())]
    events += [HistoryEvent(at=reload.at, what=reload.text) for reload in host.reloads]
    return sorted(events, key=lambda event: event.at)[-_MAX_EVENTS:]


def _activity(agent: AgentStatus) -> str:
    """What an agent does now: its requests, or the state of its background task."""
    background = agent.background
    if not agent.active:
        return "inactive: its condition is false"
    if background is None:
        handled = f"{count(agent.requests, 'request')}  {count(agent.errors, 'error')}"
        return f"{handled}  {agent.in_flight} running"
    text = f"{agent.kind}  {background.state}"
    if background.restarts or background.error:
        text += f"  {count(background.restarts, 'restart')}  {_red(background.error)}"
    return text


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
