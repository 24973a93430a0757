"""A plugin that records requests and operations, and a mesh with plugins."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from openagentmesh import (
    Agent,
    AgentMesh,
    AgentSpec,
    Call,
    Caller,
    ClientMiddleware,
    ClientOperation,
    Endpoint,
    Middleware,
    PermissionDenied,
    current_call,
    hookimpl,
)

Events = list[Any]


class Recorder:
    """Records requests and operations; fails for the tag in the headers `raises`, `refuses` and `stops`."""

    def __init__(self, tag: str, events: Events) -> None:
        self.tag = tag
        self.events = events

    @hookimpl
    def mesh_middleware(self, agent: Agent) -> Middleware:
        """Return a middleware that records requests."""

        def middleware(inner: Endpoint) -> Endpoint:
            async def endpoint(call: Call) -> Any:
                self.events.append((self.tag, "in", call.verb, agent.name))
                if call.headers.get("raises") == self.tag:
                    raise ValueError("failure of a plugin")
                if call.headers.get("refuses") == self.tag:
                    raise PermissionDenied("not permitted")
                call.identity = Caller(call.caller.instance_id, subject=self.tag)
                return await inner(call)

            return endpoint

        return middleware

    @hookimpl
    def mesh_client_middleware(self) -> ClientMiddleware:
        """Return a client middleware that records operations."""

        @asynccontextmanager
        async def middleware(operation: ClientOperation) -> AsyncIterator[None]:
            self.events.append((self.tag, "out", operation.verb, operation.target))
            operation.headers["x-tag"] = operation.headers.get("x-tag", "") + self.tag
            if operation.headers.get("stops") == self.tag:
                raise KeyError("failure of a plugin")
            yield
            self.events.append((self.tag, "done", operation.verb, operation.chunks))

        return middleware


@asynccontextmanager
async def mesh_with_plugins(url: str, name: str, *plugins: object) -> AsyncIterator[AgentMesh]:
    """A mesh with a responder that returns its headers and caller, and a streamer."""
    mesh = AgentMesh(url, plugins=plugins)

    @mesh.agent(AgentSpec(name=f"{name}.responder"))
    async def responder(number: int) -> list[Any]:
        call = current_call()
        return [number, call.headers.get("x-tag"), str(call.caller)]

    @mesh.agent(AgentSpec(name=f"{name}.streamer"))
    async def streamer(number: int) -> AsyncIterator[int]:
        for each in range(number):
            yield each

    async with mesh:
        yield mesh
