"""Answers to the questions of NATS' own tools: each agent is one of its micro services (protocol §10).

NATS' ADR-32 has the format, and its client the types.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Final

from nats.micro.service import (
    NAME_REGEX,
    SEMVER_REGEX,
    EndpointInfo,
    EndpointStats,
    ServiceInfo,
    ServicePing,
    ServiceStats,
)
from pydantic_core import to_json

from openagentmesh.bus.client import Message
from openagentmesh.bus.connection import Bus
from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import MeshError
from openagentmesh.serving.route import Route

log = logging.getLogger(__name__)

# Questions that are answered at a time; more go unanswered, for strangers ask them.
_MOST_ASKED: Final = 16
# After so many answers others have their turn.
_AT_ONCE: Final = 50
# Bytes of an error that are told.
_LONGEST_ERROR: Final = 500
_NO_VERSION: Final = "0.0.0"
_NANOSECONDS: Final = 1_000_000_000


class Micro:
    """Answers `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`, for all agents, those of a name, or one.

    Args:
        bus: where the questions come from.
        routes: the agents that are served.
        instance_id: the id of all of them.
        started_at: since when, in seconds since 1970.

    """

    def __init__(self, bus: Bus, routes: Iterable[Route], instance_id: str, started_at: float) -> None:
        self._bus = bus
        self._routes = routes
        self._instance_id = instance_id
        self._started = datetime.fromtimestamp(started_at, UTC)
        self._answering: set[asyncio.Task[None]] = set()
        self._questions: dict[str, Callable[[Route], dict[str, Any]]] = {
            "PING": self._ping,
            "INFO": self._info,
            "STATS": self._stats,
        }

    async def open(self) -> None:
        """Listen to the questions."""
        await self._bus.listen(subjects.MICRO, self._receive)

    def _receive(self, message: Message) -> None:
        if not message.reply or len(self._answering) >= _MOST_ASKED:
            return
        _, verb, *about = message.subject.split(".")
        if verb in self._questions and len(about) <= len(("name", "id")):
            task = asyncio.create_task(self._answer(message.reply, self._questions[verb], about))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer(self, reply: str, told: Callable[[Route], dict[str, Any]], about: list[str]) -> None:
        asked = [route for route in self._routes if self._is_asked(route, *about)]
        try:
            for number, route in enumerate(asked, 1):
                await self._bus.publish(reply, to_json(told(route)))
                if not number % _AT_ONCE:
                    await asyncio.sleep(0)
        except MeshError as exc:
            log.warning("a question of NATS' tools could not be answered: %s", exc)

    def _is_asked(self, route: Route, name: str = "", id_: str = "") -> bool:
        """Whether a question is about an agent; without a name, or an id, it is about all."""
        return (
            route.agent.contract.invocable
            and name in {"", service_name(route.agent.name)}
            and id_ in {"", self._instance_id}
        )

    def _identity(self, route: Route) -> dict[str, Any]:
        """What every answer says: who; the agent's own name and version are below `metadata`."""
        contract = route.agent.contract
        is_version = SEMVER_REGEX.match(contract.version)
        return {
            "id": self._instance_id,
            "name": service_name(contract.name),
            "version": contract.version if is_version else _NO_VERSION,
            "metadata": {
                "agent": contract.name,
                "version": contract.version,
                "kind": route.agent.handler.shape,
                "tags": ",".join(contract.tags),
                "active": "yes" if route.gate is None or route.gate.is_open else "no",
            },
        }

    def _ping(self, route: Route) -> dict[str, Any]:
        return ServicePing(**self._identity(route)).to_dict()

    def _info(self, route: Route) -> dict[str, Any]:
        contract = route.agent.contract
        endpoint = EndpointInfo(**_endpoint(contract.name))
        described = ServiceInfo(
            **self._identity(route), description=contract.description, endpoints=[endpoint]
        )
        return described.to_dict()

    def _stats(self, route: Route) -> dict[str, Any]:
        counts = route.counts
        took = int(counts.seconds * _NANOSECONDS)
        endpoint = EndpointStats(
            **_endpoint(route.agent.name),
            num_requests=counts.requests,
            num_errors=counts.errors,
            processing_time=took,
            average_processing_time=took // max(1, counts.requests),
            last_error=counts.last_error[:_LONGEST_ERROR],
        )
        return ServiceStats(**self._identity(route), started=self._started, endpoints=[endpoint]).to_dict()


def service_name(agent: str) -> str:
    """An agent's name as NATS allows those of services, which have no dots."""
    name = agent.replace(".", "-")
    assert NAME_REGEX.match(name)
    return name


def _endpoint(agent: str) -> dict[str, Any]:
    return {
        "name": service_name(agent),
        "subject": subjects.agent(agent),
        "queue_group": subjects.queue_group(agent),
    }
