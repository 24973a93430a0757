"""All routes of a node, by the names of their agents."""

import asyncio
from collections.abc import Iterator

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.agent.client_middleware import ClientMiddlewares
from openagentmesh.serving.log_events import LogPublisher
from openagentmesh.serving.resources import Resources
from openagentmesh.serving.route import Route
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.kv import KVBuckets
from openagentmesh.transport.nats_client import Message


class Router:
    """The routes of one node; while it `is_draining`, it receives no requests from outside."""

    def __init__(
        self,
        connection: Connection,
        inbox: Inbox,
        buckets: KVBuckets,
        instance_id: str,
        middlewares: ClientMiddlewares,
    ) -> None:
        self.logs = LogPublisher(connection, instance_id)
        self.is_draining = False
        self._resources = Resources(connection, inbox, buckets, self.logs, instance_id, middlewares)
        self._routes: dict[str, Route] = {}

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes.values())

    def __len__(self) -> int:
        return len(self._routes)

    def get(self, name: str) -> Route | None:
        """The route of an agent; None when it is not served here."""
        return self._routes.get(name)

    async def serve(self, agent: AgentVersion) -> None:
        """Serve an agent, in place of the one of the same name."""
        route = self._routes.get(agent.name)
        if route is None:
            route = self._routes[agent.name] = Route(agent, self._resources)
        route.swap(agent)
        await route.synchronize()

    def remove(self, name: str) -> Route | None:
        """Remove the route of an agent; closing it is up to the caller."""
        return self._routes.pop(name, None)

    async def drain(self, timeout: float) -> None:
        """Drain the subscriptions and `finish` running requests."""
        self.is_draining = True
        sids = [route.sid for route in self if route.sid is not None]
        await self._resources.connection.drain(*sids)
        await self.finish(timeout)

    def receive_local(self, name: str, message: Message) -> bool:
        """While draining, receive a request from this node: running handlers may still call its agents.

        Returns whether it was received.
        """
        route = self._routes.get(name)
        if not self.is_draining or route is None or route.sid is None:
            return False
        route.receive(message)
        return True

    async def finish(self, timeout: float) -> None:
        """Finish running requests, or cancel and answer them after `timeout` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        triggered = [route for route in self if not route.agent.is_request_only]
        await asyncio.gather(*[route.stop_triggers(timeout) for route in triggered])
        # Repeatedly, because running handlers may call other agents here.
        while running := [route for route in self if route.in_flight]:
            left = deadline - loop.time()
            await asyncio.gather(*[route.finish(max(0.0, left)) for route in running])
            if left <= 0:
                return
