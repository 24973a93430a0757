"""`oam status`: what is running, and why something is not."""

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import typer
from pydantic import ValidationError

from openagentmesh.cli.connecting import connected
from openagentmesh.cli.output import Json, Url, count, note, print_line, run, to_json_text
from openagentmesh.mesh.node import Node
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import MeshTimeout
from openagentmesh.protocol.status import AgentStatus, HistoryEvent, HostStatus, InstanceRecord
from openagentmesh.registry.presence import read_records

_TIMEOUT_S: Final = 2.0
_MAX_EVENTS: Final = 6


@dataclass(slots=True, frozen=True)
class InstanceStatus:
    """One instance: its status; None when it does not answer, or not in this form."""

    instance_id: str
    record: InstanceRecord
    status: HostStatus | None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        if self.status is not None:
            return self.status.model_dump(mode="json")
        record = self.record.model_dump(mode="json")
        return {"instance_id": self.instance_id, "answers": False, "record": record}


def status(url: Url = None, *, json_: Json = False) -> None:
    """Show all hosts: their agents, modules that failed to load, and events of the connection."""

    async def main() -> None:
        async with connected(url) as node:
            records = await read_records(node.buckets)
            found = await asyncio.gather(*[_request(node, key, record) for key, record in records.items()])
            server = node.connection.target.display_url
        if json_:
            print_line(to_json_text([instance.to_dict() for instance in found]))
        elif not found:
            note(f"no instance serves agents on {server}")
        else:
            for instance in found:
                print_line("\n".join(_lines(instance)))

    run(main(), json_=json_)


async def _request(node: Node, instance_id: str, record: InstanceRecord) -> InstanceStatus:
    try:
        message = await node.inbox.request(subjects.host(instance_id, "info"), timeout=_TIMEOUT_S)
        answered = not codec.is_no_responders(message.head)
        found = HostStatus.model_validate_json(message.body) if answered else None
    except (MeshTimeout, ValidationError):
        found = None
    return InstanceStatus(instance_id, record, found)


def _lines(instance: InstanceStatus) -> list[str]:
    host = instance.status
    if host is None:
        name = instance.record.host or instance.instance_id[:8]
        return [
            f"{_red('?')} {name}: recorded with {len(instance.record.agents)} agents, but does not answer"
        ]
    title = f"{_green('●')} {typer.style(host.host or 'a mesh without a host', bold=True)}"
    up = _age(time.time() - host.started_at)
    lines = [f"{title}  pid {host.pid or '?'}  up {up}  {host.connection.url}", *_module_lines(host)]
    width = max((len(agent.name) for agent in host.agents), default=0)
    lines += [f"  {agent.name:<{width}}  {agent.version}  {_activity(agent)}" for agent in host.agents]
    lines += [f"  {_red('✗')} {name}: {reason}" for name, reason in host.refused.items()]
    if host.agent_count > len(host.agents):
        lines.append(f"  and {host.agent_count - len(host.agents)} more agents")
    return lines + [f"  {_clock(event.at)}  {event.what}" for event in _events(host)]


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


def _green(text: str) -> str:
    return typer.style(text, fg=typer.colors.GREEN)


def _red(text: str) -> str:
    return typer.style(text, fg=typer.colors.RED)


def _clock(at: datetime) -> str:
    age = _age((datetime.now(UTC) - at).total_seconds())
    return f"{at.astimezone():%H:%M:%S} ({age} ago)"


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
