"""Agents on a mesh, and messages as they are on the wire.

Internal state that has no public access is read here, so that few tests depend on it.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from datetime import datetime
from typing import Any

from openagentmesh import AgentMesh, AgentSpec
from openagentmesh.agent.agent import Limits
from openagentmesh.agent.sources import Source
from openagentmesh.mesh.node import Node
from openagentmesh.protocol import subjects
from openagentmesh.protocol.headers import read_headers, write_headers
from openagentmesh.serving.background import Background
from openagentmesh.serving.feeds import KVFeed
from openagentmesh.serving.route import Route
from openagentmesh.transport.nats_client import Message
from pydantic import BaseModel

from tests.support.waiting import until

LOG_KEYS = ["timestamp", "level", "agent", "event", "request_id", "message", "data"]


class Text(BaseModel):
    """An input and output type."""

    text: str = ""


class Number(BaseModel):
    """An input and output type."""

    value: int = 0


def node_of(mesh: AgentMesh) -> Node:
    """The node of a connected mesh."""
    assert mesh._node is not None
    return mesh._node


def route_of(mesh: AgentMesh, name: str) -> Route:
    """The route of an agent that a mesh serves."""
    route = node_of(mesh).router.get(name)
    assert route is not None
    return route


async def flush(mesh: AgentMesh) -> None:
    """Wait until the server has processed what a mesh sent."""
    await node_of(mesh).connection.flush()


def reconnects(mesh: AgentMesh) -> int:
    """How often the connection of a mesh was re-established."""
    return node_of(mesh).connection.reconnects


async def listen(mesh: AgentMesh, subject: str) -> asyncio.Queue[Message]:
    """All messages on a subject from now on, as they are on the wire."""
    messages: asyncio.Queue[Message] = asyncio.Queue()
    await node_of(mesh).connection.subscribe(subject, messages.put_nowait)
    await flush(mesh)
    return messages


async def send_raw(
    mesh: AgentMesh,
    subject: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    reply: str = "",
) -> None:
    """Publish a message as it is on the wire, and wait until the server has processed it."""
    await node_of(mesh).connection.publish(subject, write_headers(headers) if headers else b"", body, reply)
    await flush(mesh)


async def is_subscribed(mesh: AgentMesh, subject: str) -> bool:
    """Whether a subject has a subscription, as the server reports it."""
    answers: asyncio.Queue[Message] = asyncio.Queue()
    node = node_of(mesh)
    await node.connection.publish(subject, b"", b"", node.inbox.register(answers.put_nowait))
    await flush(mesh)
    return answers.empty()


async def next_frame(messages: asyncio.Queue[Message]) -> tuple[dict[str, str], bytes]:
    """Headers and body of the next message."""
    async with asyncio.timeout(10):
        message = await messages.get()
    return read_headers(message.head), message.body


async def next_log_event(messages: asyncio.Queue[Message]) -> dict[str, Any]:
    """The next log event, with all its keys."""
    async with asyncio.timeout(10):
        event: dict[str, Any] = json.loads((await messages.get()).body)
    assert LOG_KEYS == list(event)
    assert datetime.fromisoformat(event["timestamp"]).utcoffset() is not None
    return event


async def errors_of(mesh: AgentMesh, name: str) -> asyncio.Queue[Message]:
    """The errors that an agent publishes from now on; registers the agent."""
    errors = await listen(mesh, subjects.errors(name))
    await mesh.catalog()
    return errors


def serve(mesh: AgentMesh, name: str, answer: str = "ok", **spec: object) -> None:
    """Declare an agent that answers with a fixed text."""

    @mesh.agent(AgentSpec.model_validate({"name": name, "description": "d"} | spec))
    async def handler(req: Text) -> Text:
        return Text(text=answer)


def declare_driven(mesh: AgentMesh, name: str, hint: Any, *sources: Source) -> asyncio.Queue[Any]:
    """Declare an agent with sources whose handler takes `hint`, or nothing for None; returns its inputs."""
    inputs: asyncio.Queue[Any] = asyncio.Queue()

    async def without_input() -> None:
        inputs.put_nowait(None)

    async def handler(value: Any) -> None:
        inputs.put_nowait(value)

    handler.__annotations__["value"] = hint
    mesh.agent(AgentSpec(name=name), sources=sources)(without_input if hint is None else handler)
    return inputs


async def take(items: asyncio.Queue[Any], count: int = 1) -> list[Any]:
    """The next items of a queue."""
    async with asyncio.timeout(5):
        return [await items.get() for _ in range(count)]


async def take_next(items: AsyncGenerator[str, None]) -> str:
    """The next item of a generator."""
    async with asyncio.timeout(20):
        return await anext(items)


async def sources_started(mesh: AgentMesh, name: str) -> None:
    """Wait until an agent's KV sources have delivered all existing keys."""
    for feed in route_of(mesh, name)._feeds.values():
        if isinstance(feed, KVFeed):
            await feed._started.wait()


def declare_background(mesh: AgentMesh, name: str, kind: str, run: Callable[[], object]) -> None:
    """Declare a publisher or a watcher that awaits the result of `run`."""
    if kind == "publisher":

        @mesh.agent(AgentSpec(name=name))
        async def publisher() -> AsyncIterator[int]:
            yield 0
            await run()  # type: ignore[misc]

    else:

        @mesh.agent(AgentSpec(name=name))
        async def watcher() -> None:
            await run()  # type: ignore[misc]


def restart_soon(mesh: AgentMesh, pause: float = 0.01, max_pause: float = 0.05) -> None:
    """Restart failed publishers and watchers after short pauses, in seconds."""
    limits = Limits(restart_pause=pause, restart_pause_max=max_pause)
    node_of(mesh).prepare = lambda agent: agent.with_limits(limits)


def background_of(mesh: AgentMesh, name: str) -> Background:
    """The background task of a publisher or a watcher."""
    background = route_of(mesh, name).background
    assert background is not None
    return background


async def run_forever() -> None:
    """Wait until cancelled."""
    await asyncio.Event().wait()


class Publisher:
    """A publisher of the events that a test passes to `emit`; None ends its run, an exception fails it."""

    def __init__(self, mesh: AgentMesh, name: str) -> None:
        self._events: asyncio.Queue[int | Exception | None] = asyncio.Queue()

        @mesh.agent(AgentSpec(name=name))
        async def publisher() -> AsyncIterator[int]:
            while (event := await self._events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event

    def emit(self, *events: int | Exception | None) -> None:
        """Emit these events."""
        for event in events:
            self._events.put_nowait(event)


async def read(events: AsyncGenerator[Any, None], count: int = 1_000_000) -> list[Any]:
    """The next events, or all until the end."""
    found: list[Any] = []
    async with asyncio.timeout(20), aclosing(events):
        while len(found) < count:
            try:
                found.append(await anext(events))
            except StopAsyncIteration:
                break
    return found


async def start_reading(mesh: AgentMesh, events: AsyncGenerator[Any, None], count: int = 1_000_000) -> Any:
    """Read events in a task; the subscription exists when this returns."""
    subscriptions = node_of(mesh).events._subscriptions
    before, task = len(subscriptions), asyncio.create_task(read(events, count))
    await until(lambda: len(subscriptions) > before or task.done())
    await flush(mesh)
    return task


async def pending_instance(mesh: AgentMesh) -> str:
    """The instance that handles the pending request of a mesh; waits until it is known."""
    requests = node_of(mesh).pending._pending
    await until(lambda: any(request.instance for request in requests))
    return next(request.instance for request in requests if request.instance)
