"""Observing agents: their log events, and the lowest level that they publish (protocol §9)."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final, Protocol

from pydantic import ValidationError

from openagentmesh.client.subscriptions import EventClient
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import InvalidInput
from openagentmesh.protocol.messages import LOG_LEVELS, LogEvent, LogLevel, ObserveConfig
from openagentmesh.protocol.subjects import GLOBAL_KEY, OBSERVABILITY_BUCKET
from openagentmesh.serving.log_events import LogPublisher
from openagentmesh.transport.kv import KVBuckets

log = logging.getLogger(__name__)

_ALL_AGENTS: Final = ">"


class Observed(Protocol):
    """The parts of a node that are used here."""

    buckets: KVBuckets
    events: EventClient


class Observe:
    """Log events of agents and their requests, and the levels from which they are published."""

    def __init__(self, ready: Callable[[], Awaitable[Observed]]) -> None:
        self._ready = ready

    async def logs(
        self, agent: str | None = None, *, level: LogLevel | None = None
    ) -> AsyncGenerator[LogEvent, None]:
        """The log events of one agent or of all, from `level` on, as they are published."""
        lowest = LOG_LEVELS.index(_checked_level(level or "debug"))
        events, subject = (await self._ready()).events, subjects.logs(agent or _ALL_AGENTS)
        async with aclosing(events.on_subject(subject, None, endless=True)) as messages:
            async for message in messages:
                try:
                    event = LogEvent.model_validate(message.data)
                except ValidationError:
                    log.debug("malformed log event on %s", message.subject)
                    continue
                if LOG_LEVELS.index(event.level) >= lowest:
                    yield event

    async def get(self, agent: str | None = None) -> ObserveConfig:
        """The setting of an agent: its own, else the one for all agents, else the default."""
        buckets = (await self._ready()).buckets
        for key in (agent, GLOBAL_KEY) if agent else (GLOBAL_KEY,):
            if found := _decode(key, await buckets.get(OBSERVABILITY_BUCKET, _checked_name(key))):
                return found
        return ObserveConfig()

    async def set(self, agent: str, *, log_level: LogLevel) -> None:
        """Set the lowest published level of an agent, on all its instances and at once."""
        buckets = (await self._ready()).buckets
        config = ObserveConfig(log_level=_checked_level(log_level))
        await buckets.put(OBSERVABILITY_BUCKET, _checked_name(agent), codec.encode(config))

    async def set_global(self, *, log_level: LogLevel) -> None:
        """Set the lowest published level of all agents without a setting of their own."""
        await self.set(GLOBAL_KEY, log_level=log_level)


async def follow_levels(buckets: KVBuckets, logs: LogPublisher) -> None:
    """Apply the levels that are set on the mesh to this instance; runs until cancelled."""
    async with aclosing(buckets.changes(OBSERVABILITY_BUCKET)) as entries:
        async for entry in entries:
            found = None if entry.operation else _decode(entry.key, entry.value)
            logs.set_level(entry.key, None if found is None else found.log_level)


def _decode(key: str, value: bytes | None) -> ObserveConfig | None:
    """A setting; None when it is missing or malformed."""
    if not value:
        return None
    try:
        return ObserveConfig.model_validate_json(value)
    except ValidationError:
        log.warning("malformed log level of '%s' is ignored: %.100r", key, value)
        return None


def _checked_level(level: str) -> LogLevel:
    for known in LOG_LEVELS:
        if level == known:
            return known
    raise InvalidInput(f"Unknown log level {level!r}; expected one of {', '.join(LOG_LEVELS)}.")


def _checked_name(agent: str) -> str:
    if agent != GLOBAL_KEY and (reason := subjects.invalid_name(agent)):
        raise InvalidInput(f"{agent!r} is not an agent's name: {reason}.")
    return agent
