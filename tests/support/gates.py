"""Agents with a gate, and waiting until it activates or deactivates them."""

import asyncio
from typing import Any

from openagentmesh import AgentMesh, AgentSpec, Condition, MeshError
from openagentmesh.transport.nats_client import Message

from tests.support.meshes import next_log_event, route_of
from tests.support.waiting import until


def declare_gated(mesh: AgentMesh, name: str, condition: Condition) -> None:
    """Declare an agent that is active while a condition is true; it answers with the id of its instance."""

    @mesh.agent(AgentSpec(name=name), active_when=condition)
    async def agent() -> str:
        return mesh.instance_id


async def wait_for_event(events: asyncio.Queue[Message], event: str) -> None:
    """Wait for a log event of the level `info`, and skip others."""
    found: dict[str, Any] = {}
    while ("info", event) != (found.get("level"), found.get("event")):
        found = await next_log_event(events)


def is_active(mesh: AgentMesh, name: str) -> bool:
    """Whether an agent that a mesh serves is active."""
    return route_of(mesh, name).status().active


async def wait_until(mesh: AgentMesh, name: str, *, active: bool) -> None:
    """Wait until an agent is active, or inactive."""
    await until(lambda: is_active(mesh, name) == active)


async def call_when_active(mesh: AgentMesh, name: str) -> Any:
    """Wait until an agent is active, and call it until it answers."""
    await mesh.catalog()
    await wait_until(mesh, name, active=True)
    async with asyncio.timeout(20):
        while True:
            try:
                return await mesh.call(name)
            except MeshError:
                await asyncio.sleep(0.02)
