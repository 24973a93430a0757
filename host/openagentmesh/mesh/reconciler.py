"""What a node is to serve, and getting it there: one task that binds what is wanted."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Final

from openagentmesh.agent.agent import Agent
from openagentmesh.protocol.errors import ConnectionFailed
from openagentmesh.serving.route import Route
from openagentmesh.serving.router import Router
from openagentmesh.transport.tasks import cancel_and_wait

log = logging.getLogger(__name__)

# What could not be bound is tried again after this many seconds, then after twice as many, and so on.
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0


class Binding:
    """Gets agents onto the mesh, all that are wanted at once.

    Args:
        router: where they are served.
        serve: brings agents up, by their names; asks `wanted` for the version whenever others had their turn.

    Attributes:
        wanted: the agents that are served, about to be, or refused.

    """

    def __init__(self, router: Router, serve: Callable[[Collection[str]], Awaitable[None]]) -> None:
        self.wanted: dict[str, Agent] = {}
        self._router = router
        self._serve = serve
        # Names in their order; what is being bound may be wanted anew meanwhile.
        self._waiting: dict[str, None] = {}
        self._current: dict[str, None] = {}
        self._task: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._pause = _FIRST_PAUSE
        self._started = False

    def want(self, agent: Agent) -> None:
        """Have an agent served, in place of one of the same name."""
        self.wanted[agent.name] = agent
        self._waiting[agent.name] = None
        self._begin()

    def replace(self, agents: Iterable[Agent]) -> None:
        """Serve these versions from the very next request on, all of them at once.

        Agents that are new here, and what others must learn of the changed ones, follow.
        """
        for agent in agents:
            route = self._router.get(agent.name)
            same = route is not None and agent.contract.equals(route.agent.contract)
            self.wanted[agent.name] = agent
            if route is not None:
                route.swap(agent)
            if not same or (route is not None and not route.is_settled):
                self._waiting[agent.name] = None
        self._begin()

    def drop(self, names: Iterable[str]) -> list[Route]:
        """Want these agents no more; returns the routes they had."""
        for name in names:
            self.wanted.pop(name, None)
            self._waiting.pop(name, None)
        return [route for name in names if (route := self._router.remove(name))]

    def start(self) -> None:
        """Begin with what is wanted."""
        self._started = True
        self._begin()

    async def stop(self) -> None:
        """Bind nothing more."""
        self._started = False
        if self._again is not None:
            self._again.cancel()
        await cancel_and_wait(self._task)

    async def settled(self, names: Collection[str] | None = None) -> None:
        """Wait until everything wanted so far is up, or these; raises what kept them from that."""
        self._begin()  # what failed before is tried again
        while (task := self._task) is not None:
            if names is not None and not (self._waiting.keys() | self._current.keys()).intersection(names):
                return
            await asyncio.wait([task])
            if task.cancelled():
                raise ConnectionFailed("This mesh is being left.")
            if exc := task.exception():
                raise exc

    async def idle(self) -> None:
        """Wait until nothing is being bound, whatever came of it."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def _begin(self) -> None:
        if self._waiting and self._started and self._task is None:
            self._task = asyncio.create_task(self._bind())
            self._task.add_done_callback(self._has_ended)

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        """Try again what failed, after pauses that grow; a reconnect does not wait for them."""
        exc = None if task.cancelled() else task.exception()
        if exc is None:
            self._pause = _FIRST_PAUSE
            return
        log.warning("not all agents are up yet: %s", exc)
        if self._started:
            self._again = asyncio.get_running_loop().call_later(self._pause, self._begin)
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    async def _bind(self) -> None:
        try:
            while self._waiting:
                self._current, self._waiting = self._waiting, {}
                try:
                    await self._serve(self._current)
                except BaseException:
                    again = {name: None for name in self._current if name in self.wanted}
                    self._waiting = again | self._waiting
                    raise
        finally:
            self._task, self._current = None, {}
