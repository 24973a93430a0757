"""NATS service discovery: each agent is a service of the `nats micro` tools (protocol §10, NATS ADR-32)."""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Final

from nats.micro import service as micro
from pydantic_core import to_json

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import MeshError
from openagentmesh.serving.route import Route
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import cancel_and_wait

log = logging.getLogger(__name__)

# Requests that wait for an answer; tools request each service by its id, and further requests are dropped.
_MAX_WAITING: Final = 10_000
# After this many answers, yield to the event loop.
_YIELD_EVERY: Final = 50
_NO_VERSION: Final = "0.0.0"
_NANOSECONDS: Final = 1_000_000_000


class NatsServices:
    """Answers `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`, for all agents, those of a name, or one."""

    def __init__(self, connection: Connection, routes: Iterable[Route], instance_id: str) -> None:
        self._connection = connection
        self._routes = routes
        self._instance_id = instance_id
        self._sid: int | None = None
        # Each with the words of its subject, and its reply subject.
        self._waiting: deque[tuple[list[str], str]] = deque()
        self._answering: asyncio.Task[None] | None = None
        self._verbs = {"PING": self._ping, "INFO": self._info, "STATS": self._stats}

    async def open(self) -> None:
        """Subscribe, once."""
        if self._sid is None:
            self._sid = await self._connection.subscribe(subjects.SERVICES, self._receive)

    async def close(self) -> None:
        """Answer nothing more."""
        sid, self._sid = self._sid, None
        if sid is not None and not self._connection.is_closed:
            await self._connection.unsubscribe(sid)
        self._waiting.clear()
        await cancel_and_wait(self._answering)

    def _receive(self, message: Message) -> None:
        _, *words = message.subject.split(".")
        is_known = words[0] in self._verbs and len(words) <= len(("verb", "name", "id"))
        if not is_known or not message.reply or len(self._waiting) >= _MAX_WAITING:
            return
        self._waiting.append((words, message.reply))
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer_all())

    async def _answer_all(self) -> None:
        while self._waiting:
            (verb, *filters), reply = self._waiting.popleft()
            await self._answer(verb, filters, reply)
            await asyncio.sleep(0)

    async def _answer(self, verb: str, filters: list[str], reply: str) -> None:
        matching = [route for route in self._routes if self._matches(route, *filters)]
        for number, route in enumerate(matching, 1):
            try:
                await self._connection.publish(reply, to_json(self._verbs[verb](route)))
            except MeshError as exc:
                log.warning("%s: service discovery not answered: %s", route.agent.name, exc)
            if not number % _YIELD_EVERY:
                await asyncio.sleep(0)

    def _matches(self, route: Route, name: str = "", id_: str = "") -> bool:
        """Whether a request is about an agent; without a name, or an id, it is about all."""
        agent = route.agent
        return (
            agent.contract.invocable
            and name in {"", service_name(agent.name)}
            and id_ in {"", self._service_id(agent.name)}
        )

    def _service_id(self, agent: str) -> str:
        """An id per agent and instance: names that differ in dots alone have the same service name."""
        return f"{self._instance_id}-{blake2b(agent.encode(), digest_size=4).hexdigest()}"

    def _identity(self, route: Route) -> dict[str, Any]:
        """What every answer contains; the agent's own name and version are in `metadata`."""
        contract = route.agent.contract
        return {
            "id": self._service_id(contract.name),
            "name": service_name(contract.name),
            "version": contract.version if micro.SEMVER_REGEX.fullmatch(contract.version) else _NO_VERSION,
            "metadata": {
                "agent": contract.name,
                "version": contract.version,
                "kind": route.agent.kind,
                "instance_id": self._instance_id,
                "tags": ",".join(contract.tags),
                "active": "yes" if route.gate is None or route.gate.is_open else "no",
            },
        }

    def _ping(self, route: Route) -> dict[str, Any]:
        return micro.ServicePing(**self._identity(route)).to_dict()

    def _info(self, route: Route) -> dict[str, Any]:
        contract = route.agent.contract
        endpoints = [micro.EndpointInfo(**_endpoint(contract.name))]
        described = self._identity(route) | {"description": contract.description, "endpoints": endpoints}
        return micro.ServiceInfo(**described).to_dict()

    def _stats(self, route: Route) -> dict[str, Any]:
        stats = route.stats
        duration = int(stats.seconds * _NANOSECONDS)
        endpoint = micro.EndpointStats(
            **_endpoint(route.agent.name),
            num_requests=stats.requests,
            num_errors=stats.errors,
            processing_time=duration,
            average_processing_time=duration // max(1, stats.requests),
            last_error=stats.last_error,
        )
        started = datetime.fromtimestamp(stats.since, UTC)
        return micro.ServiceStats(**self._identity(route), started=started, endpoints=[endpoint]).to_dict()


def service_name(agent: str) -> str:
    """An agent's name as a service name, which has no dots."""
    name = agent.replace(".", "-")
    assert micro.NAME_REGEX.match(name)
    return name


def _endpoint(agent: str) -> dict[str, Any]:
    return {
        "name": service_name(agent),
        "subject": subjects.agent(agent),
        "queue_group": subjects.queue_group(agent),
    }
