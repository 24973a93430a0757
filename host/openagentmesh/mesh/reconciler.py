"""Serves the wanted agents: one task applies all changes."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Final

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.protocol.errors import ConnectionFailed
from openagentmesh.serving.route import Route
from openagentmesh.serving.router import Router
from openagentmesh.transport.backoff import Backoff
from openagentmesh.transport.tasks import cancel_and_wait

log = logging.getLogger(__name__)

_FIRST_RETRY_S: Final = 2.0
_MAX_RETRY_S: Final = 60.0


class Reconciler:
    """Makes the router serve the wanted agents.

    `serve` serves agents by their names; it reads `wanted` again whenever it has awaited something.
    """

    def __init__(self, router: Router, serve: Callable[[Collection[str]], Awaitable[None]]) -> None:
        # The agents that are served, about to be, or refused.
        self.wanted: dict[str, AgentVersion] = {}
        self._router = router
        self._serve = serve
        # Names in order; one that is being served may be pending once more.
        self._pending: dict[str, None] = {}
        self._current: dict[str, None] = {}
        self._task: asyncio.Task[None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._backoff = Backoff(_FIRST_RETRY_S, _MAX_RETRY_S)
        self._is_started = False

    @property
    def is_done(self) -> bool:
        """Whether all wanted agents are served."""
        return self._task is None and not self._pending

    def add(self, agent: AgentVersion) -> None:
        """Serve an agent, in place of the one of the same name."""
        self.wanted[agent.name] = agent
        self._pending[agent.name] = None
        self._begin()

    def replace(self, agents: Iterable[AgentVersion]) -> None:
        """Swap all of these versions at once, from the very next request on.

        New agents are served, and changed contracts published, afterwards.
        """
        for agent in agents:
            route = self._router.get(agent.name)
            is_same = route is not None and agent.contract.equals(route.agent.contract)
            self.wanted[agent.name] = agent
            if route is not None:
                route.swap(agent)
            if not is_same or (route is not None and not route.is_synchronized):
                self._pending[agent.name] = None
        self._begin()

    def remove(self, names: Iterable[str]) -> list[Route]:
        """Serve these agents no longer; returns their routes."""
        for name in names:
            self.wanted.pop(name, None)
            self._pending.pop(name, None)
        return [route for name in names if (route := self._router.remove(name))]

    def start(self) -> None:
        """Begin to serve the wanted agents."""
        self._is_started = True
        self._begin()

    async def stop(self) -> None:
        """Stop serving new agents and versions."""
        self._is_started = False
        if self._retry is not None:
            self._retry.cancel()
        await cancel_and_wait(self._task)

    async def wait(self, names: Collection[str] | None = None) -> None:
        """Wait until all wanted agents are served, or these; raises the error that prevents it."""
        self._begin()  # failed ones are retried
        while (task := self._task) is not None:
            if names is not None and not (self._pending.keys() | self._current.keys()).intersection(names):
                return
            await asyncio.wait([task])
            if task.cancelled():
                raise ConnectionFailed("This mesh is being closed.")
            if exc := task.exception():
                raise exc

    async def wait_idle(self) -> None:
        """Wait until the current task ends, whatever its result."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def _begin(self) -> None:
        if self._pending and self._is_started and self._task is None:
            self._task = asyncio.create_task(self._serve_pending())
            self._task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """Retry after a failure; a reconnect does not wait for that."""
        exc = None if task.cancelled() else task.exception()
        if exc is None:
            self._backoff.reset()
            return
        log.warning("not all agents are served yet: %s", exc)
        if self._is_started:
            self._retry = asyncio.get_running_loop().call_later(self._backoff.next(), self._begin)

    async def _serve_pending(self) -> None:
        try:
            while self._pending:
                self._current, self._pending = self._pending, {}
                try:
                    await self._serve(self._current)
                except BaseException:
                    unserved = {name: None for name in self._current if name in self.wanted}
                    self._pending = unserved | self._pending
                    raise
        finally:
            self._task, self._current = None, {}
