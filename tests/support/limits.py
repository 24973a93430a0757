"""The plugin `limits`: its clock, verified callers, and requests of which some are refused."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from openagentmesh import AgentMesh, AgentSpec, Call, Caller, Host, Middleware, Overloaded, hookimpl

Limited = Callable[..., AgentMesh]
Serve = Callable[..., AbstractAsyncContextManager[Host]]


class Clock:
    """A clock that a test advances; each reading adds a microsecond, and it starts far from 0."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class Identity:
    """Verifies callers by a header with their subject."""

    @hookimpl
    def mesh_middleware(self) -> Middleware:
        """Return a middleware that sets the identity of each call."""

        def middleware(endpoint: Callable[[Call], Awaitable[Any]]) -> Callable[[Call], Awaitable[Any]]:
            async def with_identity(call: Call) -> Any:
                if "X-Subject" in call.headers:
                    call.identity = Caller(call.caller.instance_id, call.headers["X-Subject"])
                return await endpoint(call)

            return with_identity

        return middleware


async def outcomes(mesh: AgentMesh, name: str, count: int, **more: Any) -> list[Any]:
    """The results of concurrent calls: answers and errors."""
    return await asyncio.gather(*[mesh.call(name, **more) for _ in range(count)], return_exceptions=True)


def refused(outcomes: list[Any]) -> list[Overloaded]:
    """The errors of refused calls."""
    return [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]


def serve_echo(mesh: AgentMesh, name: str) -> None:
    """Declare an agent that answers `ok`."""

    @mesh.agent(AgentSpec(name=name))
    async def echo() -> str:
        return "ok"
