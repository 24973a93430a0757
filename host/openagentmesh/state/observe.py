"""Looking at agents at work: their log events, and from which level on they tell (protocol §9)."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final, Protocol

from pydantic import ValidationError

from openagentmesh.client.subscriptions import Events
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import InvalidInput
from openagentmesh.protocol.messages import LOG_LEVELS, LogEvent, LogLevel, ObserveConfig
from openagentmesh.protocol.subjects import GLOBAL_KEY, OBSERVABILITY_BUCKET
from openagentmesh.serving.log_events import EventLog
from openagentmesh.transport.kv import KVBuckets

log = logging.getLogger(__name__)

_EVERYWHERE: Final = ">"


class Observed(Protocol):
    """What is needed of a node."""

    buckets: KVBuckets
    events: Events


class Observe:
    """What happens to agents and their requests, and how much of it they tell."""

    def __init__(self, ready: Callable[[], Awaitable[Observed]]) -> None:
        self._ready = ready

    async def logs(
        self, agent: str | None = None, *, level: LogLevel | None = None
    ) -> AsyncGenerator[LogEvent, None]:
        """The log events of one agent or of all, from `level` on, as they happen."""
        least = LOG_LEVELS.index(_checked_level(level or "debug"))
        events = (await self._ready()).events
        async with aclosing(
            events.on_subject(subjects.logs(agent or _EVERYWHERE), None, endless=True)
        ) as messages:
            async for message in messages:
                try:
                    event = LogEvent.model_validate(message.data)
                except ValidationError:
                    log.debug("what came on %s is no log event", message.subject)
                    continue
                if LOG_LEVELS.index(event.level) >= least:
                    yield event

    async def get(self, agent: str | None = None) -> ObserveConfig:
        """What holds for an agent: its own setting, else the one for all, else the default."""
        buckets = (await self._ready()).buckets
        for key in (agent, GLOBAL_KEY):
            value = await buckets.get(OBSERVABILITY_BUCKET, _checked_name(key)) if key else None
            found = _read(key or "", value)
            if found is not None:
                return found
        return ObserveConfig()

    async def set(self, agent: str, *, log_level: LogLevel) -> None:
        """From which level on this agent's events are told, wherever it runs, from now on."""
        buckets = (await self._ready()).buckets
        config = ObserveConfig(log_level=_checked_level(log_level))
        await buckets.put(OBSERVABILITY_BUCKET, _checked_name(agent), codec.encode(config))

    async def set_global(self, *, log_level: LogLevel) -> None:
        """The same for all agents that have no setting of their own."""
        await self.set(GLOBAL_KEY, log_level=log_level)


async def follow_levels(buckets: KVBuckets, events: EventLog) -> None:
    """Keep an instance's levels as they are set on the mesh; runs until cancelled."""
    async with aclosing(buckets.changes(OBSERVABILITY_BUCKET)) as entries:
        async for entry in entries:
            found = None if entry.operation else _read(entry.key, entry.value)
            events.set_level(entry.key, None if found is None else found.log_level)


def _read(key: str, value: bytes | None) -> ObserveConfig | None:
    """A setting, or None for what is none: anybody may have written there."""
    if not value:
        return None
    try:
        return ObserveConfig.model_validate_json(value)
    except ValidationError:
        log.warning("the log level of '%s' cannot be read and counts as not set: %.100r", key, value)
        return None


def _checked_level(level: str) -> LogLevel:
    for known in LOG_LEVELS:
        if level == known:
            return known
    raise InvalidInput(f"There is no log level {level!r}; there are {', '.join(LOG_LEVELS)}.")


def _checked_name(agent: str) -> str:
    if agent != GLOBAL_KEY and (why := subjects.invalid_name(agent)):
        raise InvalidInput(f"{agent!r} names no agent: {why}.")
    return agent
