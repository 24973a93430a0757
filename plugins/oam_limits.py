"""Limits: how often, and how much at once, one caller may ask an agent, so that nobody starves the others.

A caller is who was proven to be asking, else the instance id that the request names. What keeps the
rates is throttled-py's GCRA, in memory; the least recently used callers are forgotten first.
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

# Strangers choose their names: what is longer than this is cut, and shares a limit.
_LONGEST_NAME: Final = 128
# Seconds that an agent is taken to need before it has answered anything.
_FIRST_GUESS: Final = 0.25
# How much of the seconds an agent takes is what the last request took.
_WEIGHT: Final = 0.2
_MOST_AGENTS: Final = 100_000
# So many requests a second are no limit.
_FASTEST: Final = 1_000_000

_DAY: Final = 86_400

# Requests a second; `inf` is no limit. One a day is the least.
PerSecond = Annotated[float, Field(ge=1 / _DAY)]
Burst = Annotated[int, Field(ge=1, le=1_000_000)]
Share = Annotated[float, Field(gt=0, le=1)]


class Settings(BaseModel):
    """`[plugins.limits]`: what holds for every agent.

    Attributes:
        rate: requests a second that one caller may make to one agent.
        burst: how many of them may come at once; None for those of one second.
        total_rate: requests a second that all callers together may make to one agent; without a
            `rate` one of them may make its `share` of these.
        total_burst: how many of them may come at once; None for those of one second.
        share: the part of an agent's `concurrency` that one caller may hold, running and waiting; and
            of its `total_rate`, where there is no `rate`.
        callers: how many callers of agents are remembered; the least recently used go.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: PerSecond = math.inf
    burst: Burst | None = None
    total_rate: PerSecond = math.inf
    total_burst: Burst | None = None
    share: Share = 0.5
    callers: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000


class AgentSettings(BaseModel):
    """`[agents."name".plugins.limits]`: what is left out is as in `[plugins.limits]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: PerSecond | None = None
    burst: Burst | None = None
    total_rate: PerSecond | None = None
    total_burst: Burst | None = None
    share: Share | None = None


class Occupancy:
    """Who holds how much of one agent now, and for how long as a rule; outlives the agent's versions."""

    def __init__(self) -> None:
        # When the requests under way came, of each caller that has any.
        self.held: dict[str, list[float]] = {}
        self.usual_seconds = _FIRST_GUESS

    def take(self, caller: str) -> float:
        """Count a request of a caller that begins; gives what `give_back` takes."""
        began = monotonic()
        self.held.setdefault(caller, []).append(began)
        return began

    def give_back(self, caller: str, began: float) -> None:
        """Count a request no more that is over."""
        self.usual_seconds += _WEIGHT * (monotonic() - began - self.usual_seconds)
        held = self.held[caller]
        held.remove(began)
        if not held:
            del self.held[caller]

    def until_less(self, caller: str) -> float:
        """Seconds until the oldest request of a caller is over, if it takes as long as others did."""
        held, usual = self.held[caller], self.usual_seconds
        return max(held[0] + usual - monotonic(), usual * _WEIGHT)


class Meter:
    """One rate of one agent. All that it remembers is in the store, by the keys it is asked about.

    Args:
        rate: requests a second.
        burst: how many may come at once; None for those of one second.
        store: keeps when each key has used up what.

    """

    def __init__(self, rate: float, burst: int | None, store: MemoryStore) -> None:
        self._rate, self._burst = rate, burst or math.ceil(rate)
        # The library counts whole requests in whole seconds: 2.5 a second are 5 in 2.
        limit, seconds = Fraction(rate).limit_denominator(_DAY).as_integer_ratio()
        self._quota = Quota(Rate(timedelta(seconds=seconds), limit), self._burst)
        self._limiter = RateLimiterRegistry.get("gcra")(self._quota, store)

    def wait(self, key: str) -> float:
        """Seconds until there is room for one more request; 0 for now."""
        state = self._limiter.peek(self._own(key))
        if state.remaining:
            return 0.0
        # Not its `retry_after`, which the library reckons one request too short when it peeks.
        return state.reset_after - (self._burst - 1) * self._quota.emission_interval

    def spend(self, key: str) -> float:
        """Count one request if there is room for it, and give 0; else as `wait`."""
        result = self._limiter.limit(self._own(key))
        return result.state.retry_after if result.limited else 0.0

    def _own(self, key: str) -> str:
        # What is remembered is when all will have come back, at this rate: at another it may be a day off.
        return f"{self._rate} {key}"


class Limits:
    """The plugin: refuses as `overloaded` what is more than one caller's part.

    Args:
        settings: for `AgentMesh(plugins=[Limits(Settings(...))])`; a host gives those of mesh.toml.

    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        self._callers = _store(self._settings.callers)
        self._totals = _store(_MOST_AGENTS)
        self._occupancies: dict[str, Occupancy] = {}

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
        """Take new settings; what callers have used up stays used up."""
        if settings.callers != self._settings.callers:
            self._callers = _store(settings.callers)
        self._settings = settings

    @hookimpl
    def mesh_agent_unloaded(self, name: str) -> None:
        """Forget an agent."""
        self._occupancies.pop(name, None)

    @hookimpl
    def mesh_middleware(self, agent: Agent, settings: AgentSettings | None) -> Middleware:
        """What counts one agent's requests."""
        own = settings.model_dump(exclude_none=True) if settings else {}
        rules = self._settings.model_copy(update=own)
        occupancy = self._occupancies.setdefault(agent.name, Occupancy())
        most = _part(rules.share, agent.limits.concurrency)
        each = _meter(*_of_each(rules), self._callers)
        total = _meter(rules.total_rate, rules.total_burst, self._totals)
        name, longest = agent.name, agent.limits.timeout

        def middleware(endpoint: Endpoint) -> Endpoint:
            async def limited(call: Call) -> Any:  # noqa: ANN401 - whatever the handler returns
                if call.in_turn:  # one after the other, which is limit enough
                    return await endpoint(call)
                caller = caller_of(call)
                if len(occupancy.held.get(caller, ())) >= most:
                    why = f"has {most} requests at agent '{name}', which is its share"
                    raise _refusal(caller, why, min(occupancy.until_less(caller), longest))
                metered = [*[(m, f"{name} {caller}") for m in each], *[(m, name) for m in total]]
                if wait := _spend(metered):
                    raise _refusal(caller, f"asks agent '{name}' too often", wait)
                began = occupancy.take(caller)
                try:
                    return await endpoint(call)
                finally:
                    occupancy.give_back(caller, began)

            return limited

        return middleware


def caller_of(call: Call) -> str:
    """Whose limit a request counts against; those who say nothing of themselves are one caller.

    Whoever names an instance never shares with the proven subject of that name.
    """
    caller = call.caller
    if caller.subject:
        return f"subject {caller.subject}"
    if caller.instance_id:
        return f"instance {caller.instance_id[:_LONGEST_NAME]}"
    return "source" if call.verb == "source" else "anonymous"


def _part(share: float, concurrency: int) -> int:
    """How many requests a share is, at least one: 0.29 of 100 are 29, though 0.29 * 100 is less."""
    return max(1, int(Fraction(str(share)) * concurrency))


def _of_each(rules: Settings) -> tuple[float, int | None]:
    """The rate and the burst of one caller, which without a rate has its share of the total.

    Whoever takes all that there is would leave nothing to those who come back when they are told.
    """
    if rules.rate < math.inf or rules.total_rate == math.inf:
        return rules.rate, rules.burst
    total_burst = rules.total_burst or math.ceil(rules.total_rate)
    burst = rules.burst or math.ceil(rules.share * total_burst)
    return max(rules.share * rules.total_rate, 1 / _DAY), burst


def _spend(metered: Sequence[tuple[Meter, str]]) -> float:
    """Count one request by all meters, or by none: then it gives the seconds until all have room."""
    if len(metered) > 1 and (wait := max(meter.wait(key) for meter, key in metered)):
        return wait
    return max([meter.spend(key) for meter, key in metered], default=0.0)


def _refusal(caller: str, why: str, wait: float) -> Overloaded:
    """The refusal, with the next whole millisecond after `wait` seconds."""
    milliseconds = int(wait * 1000) + 1
    return Overloaded(
        f"The caller ({caller}) {why}. Try again in {milliseconds} ms.",
        details={"retry_after_ms": milliseconds},
    )


def _store(most: int) -> MemoryStore:
    return MemoryStore(options={"MAX_SIZE": most})


def _meter(rate: float, burst: int | None, store: MemoryStore) -> list[Meter]:
    """A meter for a rate, none for no limit."""
    return [Meter(rate, burst, store)] if rate <= _FASTEST else []
