"""Limits: how many requests one caller may send to an agent, per second and at once.

A caller is the verified identity, otherwise the instance id that the request states. The rates are kept
in memory by throttled-py's GCRA; the least recently used callers are dropped first.
"""

import math
from collections.abc import Sequence
from datetime import timedelta
from fractions import Fraction
from time import monotonic
from typing import Annotated, Any, Final

from openagentmesh import Agent, Call, Endpoint, Middleware, Overloaded, hookimpl
from pydantic import BaseModel, ConfigDict, Field
from throttled import MemoryStore, Quota, Rate, RateLimiterRegistry

# Callers choose their instance ids: longer ones are cut, and then share a limit.
_MAX_NAME: Final = 128
# The duration assumed for an agent that has not answered yet.
_FIRST_ESTIMATE_S: Final = 0.25
# The weight of the latest request in the average duration.
_WEIGHT: Final = 0.2
_MAX_AGENTS: Final = 100_000
# Rates above this are no limit.
_MAX_RATE: Final = 1_000_000
_DAY: Final = 86_400

# Requests per second, at least one a day; `inf` is no limit.
PerSecond = Annotated[float, Field(ge=1 / _DAY)]
Burst = Annotated[int, Field(ge=1, le=1_000_000)]
Share = Annotated[float, Field(gt=0, le=1)]


class Settings(BaseModel):
    """`[plugins.limits]`: the limits of every agent.

    Attributes:
        rate: requests per second from one caller to one agent.
        burst: how many of them at once; None for those of one second.
        total_rate: requests per second from all callers together to one agent; without `rate`, one
            caller may send its `share` of them.
        total_burst: how many of them at once; None for those of one second.
        share: the part of an agent's `concurrency` that one caller may use, waiting requests included;
            without `rate` also of its `total_rate`.
        callers: how many pairs of a caller and an agent are remembered; the least recently used are
            dropped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: PerSecond = math.inf
    burst: Burst | None = None
    total_rate: PerSecond = math.inf
    total_burst: Burst | None = None
    share: Share = 0.5
    callers: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000


class AgentSettings(BaseModel):
    """`[agents."name".plugins.limits]`: missing keys are as in `[plugins.limits]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: PerSecond | None = None
    burst: Burst | None = None
    total_rate: PerSecond | None = None
    total_burst: Burst | None = None
    share: Share | None = None


class RunningRequests:
    """The requests that run at one agent, by caller; kept when a new version replaces the agent."""

    def __init__(self) -> None:
        # The start times of each caller's requests.
        self._started: dict[str, list[float]] = {}
        self._average_s = _FIRST_ESTIMATE_S

    def count(self, caller: str) -> int:
        """How many requests of a caller run."""
        return len(self._started.get(caller, ()))

    def start(self, caller: str) -> float:
        """Add a request of a caller; returns its start time, for `end`."""
        started = monotonic()
        self._started.setdefault(caller, []).append(started)
        return started

    def end(self, caller: str, started: float) -> None:
        """Remove a request."""
        self._average_s += _WEIGHT * (monotonic() - started - self._average_s)
        running = self._started[caller]
        running.remove(started)
        if not running:
            del self._started[caller]

    def next_end(self, caller: str) -> float:
        """Seconds until a caller's oldest request ends, if it takes the average duration."""
        oldest, average = self._started[caller][0], self._average_s
        return max(oldest + average - monotonic(), average * _WEIGHT)


class RateLimit:
    """`rate` requests per second, `burst` of them at once; the state of each key is in the store."""

    def __init__(self, rate: float, burst: int | None, store: MemoryStore) -> None:
        self._rate, self._burst = rate, burst or math.ceil(rate)
        # The library counts whole requests in whole seconds: 2.5 per second are 5 in 2.
        limit, seconds = Fraction(rate).limit_denominator(_DAY).as_integer_ratio()
        self._quota = Quota(Rate(timedelta(seconds=seconds), limit), self._burst)
        self._limiter = RateLimiterRegistry.get("gcra")(self._quota, store)

    def wait(self, key: str) -> float:
        """Seconds until one more request is permitted; 0 for now."""
        state = self._limiter.peek(self._key(key))
        if state.remaining:
            return 0.0
        # Not its `retry_after`, which is one request too short after `peek`.
        return state.reset_after - (self._burst - 1) * self._quota.emission_interval

    def acquire(self, key: str) -> float:
        """Count one request and return 0; if none is permitted now, return what `wait` does."""
        result = self._limiter.limit(self._key(key))
        return result.state.retry_after if result.limited else 0.0

    def _key(self, key: str) -> str:
        # The state depends on the rate: after a change of the rate it would be wrong by up to a day.
        return f"{self._rate} {key}"


class Limits:
    """The plugin: rejects requests above a caller's limits as `overloaded`.

    Args:
        settings: for `AgentMesh(plugins=[Limits(Settings(...))])`; a host passes those of mesh.toml.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        self._callers = _store(self._settings.callers)
        self._totals = _store(_MAX_AGENTS)
        self._running: dict[str, RunningRequests] = {}

    @hookimpl
    def mesh_settings(self) -> type[Settings]:
        """The table of all agents."""
        return Settings

    @hookimpl
    def mesh_agent_settings(self) -> type[AgentSettings]:
        """The table of one agent."""
        return AgentSettings

    @hookimpl
    def mesh_configure(self, settings: Settings) -> None:
        """Apply new settings; requests so far still count."""
        if settings.callers != self._settings.callers:
            self._callers = _store(settings.callers)
        self._settings = settings

    @hookimpl
    def mesh_agent_unloaded(self, name: str) -> None:
        """Drop the requests of a removed agent."""
        self._running.pop(name, None)

    @hookimpl
    def mesh_middleware(self, agent: Agent, settings: AgentSettings | None) -> Middleware:
        """The middleware of one agent."""
        own = settings.model_dump(exclude_none=True) if settings else {}
        rules = self._settings.model_copy(update=own)
        running = self._running.setdefault(agent.name, RunningRequests())
        share = _share(rules.share, agent.limits.concurrency)
        per_caller = _rate_limit(*_caller_rate(rules), self._callers)
        total = _rate_limit(rules.total_rate, rules.total_burst, self._totals)
        name, timeout = agent.name, agent.limits.timeout

        def middleware(endpoint: Endpoint) -> Endpoint:
            async def limited(call: Call) -> Any:  # noqa: ANN401 - the handler's result
                if call.is_sequential:  # limited to one at a time already
                    return await endpoint(call)
                caller = caller_of(call)
                if running.count(caller) >= share:
                    reason = f"has {share} requests at agent '{name}', which is its share"
                    raise _overloaded(caller, reason, min(running.next_end(caller), timeout))
                limits = [*[(each, f"{name} {caller}") for each in per_caller], *[(t, name) for t in total]]
                if wait := _acquire(limits):
                    raise _overloaded(caller, f"sends too many requests to agent '{name}'", wait)
                started = running.start(caller)
                try:
                    return await endpoint(call)
                finally:
                    running.end(caller, started)

            return limited

        return middleware


def caller_of(call: Call) -> str:
    """The caller that a request counts for; all anonymous callers are one.

    An instance never shares a limit with a verified subject of the same name.
    """
    caller = call.caller
    if caller.subject:
        return f"subject {caller.subject}"
    if caller.instance_id:
        return f"instance {caller.instance_id[:_MAX_NAME]}"
    return "source" if call.verb == "source" else "anonymous"


def _share(share: float, concurrency: int) -> int:
    """How many requests a share is, at least one: 0.29 of 100 is 29, though 0.29 * 100 is less."""
    return max(1, int(Fraction(str(share)) * concurrency))


def _caller_rate(rules: Settings) -> tuple[float, int | None]:
    """The rate and the burst of one caller; without `rate` its share of the total.

    Otherwise one caller could use the whole total, and the others would retry in vain.
    """
    if rules.rate < math.inf or rules.total_rate == math.inf:
        return rules.rate, rules.burst
    total_burst = rules.total_burst or math.ceil(rules.total_rate)
    burst = rules.burst or math.ceil(rules.share * total_burst)
    return max(rules.share * rules.total_rate, 1 / _DAY), burst


def _acquire(limits: Sequence[tuple[RateLimit, str]]) -> float:
    """Count one request in all limits, or in none; returns the seconds until all permit it."""
    if len(limits) > 1 and (wait := max(limit.wait(key) for limit, key in limits)):
        return wait
    return max([limit.acquire(key) for limit, key in limits], default=0.0)


def _overloaded(caller: str, reason: str, wait: float) -> Overloaded:
    """The error, with `wait` seconds rounded up to a millisecond."""
    milliseconds = int(wait * 1000) + 1
    return Overloaded(
        f"The caller ({caller}) {reason}. Try again in {milliseconds} ms.",
        details={"retry_after_ms": milliseconds},
    )


def _store(max_keys: int) -> MemoryStore:
    return MemoryStore(options={"MAX_SIZE": max_keys})


def _rate_limit(rate: float, burst: int | None, store: MemoryStore) -> list[RateLimit]:
    """One rate limit, or none if the rate is no limit."""
    return [RateLimit(rate, burst, store)] if rate <= _MAX_RATE else []
