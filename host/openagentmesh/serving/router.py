"""All routes of a node, by the names of their agents."""

import asyncio
from collections.abc import Iterator

from openagentmesh.agent.agent import Agent
from openagentmesh.agent.client_middleware import Border
from openagentmesh.serving.log_events import EventLog
from openagentmesh.serving.resources import Shared
from openagentmesh.serving.route import Route
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.kv import KVBuckets
from openagentmesh.transport.nats_client import Message


class Router:
    """The routes of one node."""

    def __init__(
        self, connection: Connection, inbox: Inbox, buckets: KVBuckets, instance_id: str, border: Border
    ) -> None:
        self.events = EventLog(connection, instance_id)
        self._shared = Shared(connection, inbox, buckets, self.events, instance_id, border)
        self._routes: dict[str, Route] = {}
        self._leaving = False

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes.values())

    def __len__(self) -> int:
        return len(self._routes)

    def get(self, name: str) -> Route | None:
        """The route of an agent, if it is served here."""
        return self._routes.get(name)

    async def point(self, agent: Agent) -> None:
        """Serve an agent under its name from now on, in place of another one if there is."""
        route = self._routes.get(agent.name)
        if route is None:
            route = self._routes[agent.name] = Route(agent, self._shared)
        route.swap(agent)
        await route.follow()

    def remove(self, name: str) -> Route | None:
        """Forget the route of an agent; whoever takes it ends it."""
        return self._routes.pop(name, None)

    async def drain(self, timeout: float) -> None:
        """Take nothing more from outside, finish what runs; cancel and answer the rest after `timeout` s."""
        self._leaving = True
        await self._shared.connection.drain(*[route.sid for route in self if route.sid is not None])
        await self.finish(timeout)

    def take_inside(self, name: str, message: Message) -> bool:
        """Take a request of this very node, which has left: what still runs here may ask its neighbours.

        Returns whether it was taken.
        """
        route = self._routes.get(name)
        if not self._leaving or route is None or route.sid is None:
            return False
        route.receive(message)
        return True

    async def finish(self, timeout: float) -> None:
        """Finish what runs; cancel and answer the rest after `timeout` seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        await self._close(timeout)
        # Again, for what runs may ask others here.
        while running := [route for route in self if route.in_flight]:
            left = end - loop.time()
            await asyncio.gather(*[route.finish(max(0.0, left)) for route in running])
            if left <= 0:
                return

    async def _close(self, timeout: float) -> None:
        await asyncio.gather(*[route.close(timeout) for route in self if not route.is_plain])
