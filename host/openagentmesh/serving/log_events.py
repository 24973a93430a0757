"""Log events of agents and requests, published on the mesh (protocol §9)."""

import logging
from datetime import UTC, datetime
from typing import Final

from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import MeshError
from openagentmesh.protocol.headers import write_headers
from openagentmesh.protocol.messages import LOG_LEVELS, LogEvent, LogLevel, ObserveConfig
from openagentmesh.transport.connection import Connection

log = logging.getLogger(__name__)

_RANKS: Final = {level: rank for rank, level in enumerate(LOG_LEVELS)}


class LogPublisher:
    """Publishes one instance's log events, those of each agent from its level on."""

    def __init__(self, connection: Connection, instance_id: str) -> None:
        self._connection = connection
        self._head = write_headers({subjects.INSTANCE_ID: instance_id})
        self._levels: dict[str, int] = {}
        self._default = _RANKS[ObserveConfig().log_level]

    def set_level(self, key: str, level: LogLevel | None) -> None:
        """Set the lowest published level of an agent, or of all agents that have none of their own.

        `key` is the agent's name or `global`; None removes its level.
        """
        if level is not None:
            self._levels[key] = _RANKS[level]
        else:
            self._levels.pop(key, None)

    def is_enabled(self, agent: str, level: LogLevel) -> bool:
        """Whether events of this level are published for this agent."""
        levels = self._levels
        if not levels:
            return _RANKS[level] >= self._default
        return _RANKS[level] >= levels.get(agent, levels.get(subjects.GLOBAL_KEY, self._default))

    async def publish(  # noqa: PLR0913 - one parameter per part of the event
        self,
        level: LogLevel,
        agent: str,
        event: str,
        *,
        request_id: str = "",
        message: str = "",
        data: dict[str, object] | None = None,
    ) -> None:
        """Publish one event, if its level is enabled; a failure is only logged."""
        if not self.is_enabled(agent, level):
            return
        found = LogEvent.model_construct(
            timestamp=datetime.now(UTC).isoformat(),
            level=level,
            agent=agent,
            event=event,
            request_id=request_id,
            message=message,
            data=data or {},
        )
        try:
            await self._connection.publish(subjects.logs(agent), codec.encode(found), self._head)
        except MeshError as exc:
            log.debug("log event %s of %s not published: %s", event, agent, exc)
