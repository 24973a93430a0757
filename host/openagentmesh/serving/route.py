"""A route: one agent as the mesh reaches it. It stays while the version it points at changes."""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any, Final

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.agent.call import Trigger
from openagentmesh.agent.sources import Source, SubjectSource
from openagentmesh.protocol import subjects
from openagentmesh.protocol.status import AgentStatus
from openagentmesh.serving import request
from openagentmesh.serving.background import Background
from openagentmesh.serving.feeds import KVFeed, SubjectFeed
from openagentmesh.serving.gates import Gate
from openagentmesh.serving.request import Responder
from openagentmesh.serving.resources import Resources
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import cancel_and_wait, cancel_within

log = logging.getLogger(__name__)

# Running requests besides those within the agent's own limits, which apply behind the middlewares.
_MAX_IN_MIDDLEWARES: Final = 10_000
# How long a cancelled handler may take to clean up.
_CANCEL_GRACE_S: Final = 1.0


class Route:
    """One agent's subscription, its current version, what triggers it, and its running requests.

    Attributes:
        agent: the version for the next request.
        limiter: of all its versions.
        sid: of its subscription; None while it has none.
        is_open: it takes requests, unless its condition is false.
        background: runs a publisher or watcher.
        gate: turns it on and off.
    """

    def __init__(self, agent: AgentVersion, resources: Resources) -> None:
        self.agent = agent
        self.limiter = agent.limits.limiter()
        self.sid: int | None = None
        self.is_open = False
        self.background: Background | None = None
        self.gate: Gate | None = None
        # The version that triggers, gate and background task belong to; `synchronize` updates it.
        self._synchronized: AgentVersion | None = None
        self._resources = resources
        self._responder = Responder(agent.name, resources)
        self.stats = self._responder.stats
        self._feeds: dict[Source, SubjectFeed | KVFeed] = {}
        # Feeds of removed sources, until everything that they delivered is handled.
        self._closing: set[asyncio.Task[None]] = set()
        self._draining: asyncio.Task[int] | None = None
        # The first frame's number of a publisher that replaces an older version.
        self._next_seq = 0
        # Running requests, and on which version.
        self._tasks: dict[asyncio.Task[None], AgentVersion] = {}

    @property
    def in_flight(self) -> int:
        """Requests being answered, waiting ones included."""
        return len(self._tasks)

    def status(self) -> AgentStatus:
        """Its state, for `oam status`."""
        agent, background = self.agent, self.background
        return AgentStatus(
            name=agent.name,
            version=agent.contract.version,
            kind=agent.kind,
            source=agent.source,
            in_flight=self.in_flight,
            waiting=self.limiter.waiting,
            limits=asdict(agent.limits),
            active=self.gate is None or self.gate.is_open,
            background=background.status() if background else None,
            **asdict(self.stats),
        )

    def receive(self, message: Message) -> None:
        """Take a request: spawn and return."""
        agent, limiter = self.agent, self.limiter
        call, to = request.receive(message, agent, limiter)
        if agent.middlewares:
            # They may reject requests, so the limiter counts behind them.
            is_full = len(self._tasks) >= _MAX_IN_MIDDLEWARES + agent.limits.concurrency + agent.limits.queue
        else:
            is_full = limiter.is_full
            if not is_full:
                call.admit()
        respond = self._responder.reject if is_full else self._responder.answer
        self._spawn(respond(call, agent, to), agent)

    def trigger(
        self, message: Message, trigger: Trigger, *, is_sequential: bool = False
    ) -> "asyncio.Task[None]":
        """Handle what a source delivered in a task of its own."""
        agent = self.agent
        call, to = request.receive(message, agent, self.limiter, trigger, is_sequential=is_sequential)
        call.admit()
        return self._spawn(self._responder.answer(call, agent, to), agent)

    def reject(self, message: Message) -> None:
        """Reject a message of a source."""
        call, to = request.receive(message, self.agent, self.limiter, message)
        self._spawn(self._responder.reject(call, self.agent, to), self.agent)

    def _spawn(self, responding: Coroutine[Any, Any, None], agent: AgentVersion) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(responding)
        self._tasks[task] = agent
        task.add_done_callback(self._tasks.pop)
        return task

    async def start(self) -> None:
        """Begin to serve; an agent with a condition when that is true."""
        agent, condition, previous = self.agent.name, self.agent.active_when, self.gate
        self.gate = None
        if condition is None:
            await self.open()
            return
        self.gate = Gate(agent, condition, self._resources, self._activate, self._deactivate)
        await self.gate.start(is_open=self.is_open, previous=previous)

    async def open(self) -> None:
        """Subscribe, open the sources, start the background task, unless that is done already."""
        agent, resources = self.agent, self._resources
        self.is_open = True
        if agent.contract.invocable and self.sid is None:
            subject, queue = subjects.agent(agent.name), subjects.queue_group(agent.name)
            self.sid = await resources.connection.subscribe(subject, self.receive, queue)
        if agent.kind in {"publisher", "watcher"} and self.background is None:
            self.background = Background(agent, resources, self._next_seq)
            self.background.start()
        for source in agent.sources:
            if source not in self._feeds:
                self._feeds[source] = self._feed(source)
            await self._feeds[source].open()

    def _feed(self, source: Source) -> SubjectFeed | KVFeed:
        if isinstance(source, SubjectSource):
            return SubjectFeed(source, self, self._resources.connection)
        return KVFeed(source, self, self._resources.buckets)

    def swap(self, agent: AgentVersion) -> None:
        """Point at another version, from the next request on; running requests finish on theirs.

        Unless it `is_synchronized` then, `synchronize` must follow.
        """
        self.limiter.resize(agent.limits.concurrency, agent.limits.queue)
        self.agent = agent
        if self.is_synchronized:
            self._synchronized = agent  # releases the old version

    @property
    def is_synchronized(self) -> bool:
        """Whether everything that triggers the agent belongs to its current version."""
        old, agent = self._synchronized, self.agent
        return old is agent or (old is not None and old.is_request_only and agent.is_request_only)

    async def synchronize(self) -> None:
        """Update everything that triggers the agent to the current version.

        No request and no message of a source that stays is missed meanwhile.
        """
        old, agent = self._synchronized, self.agent
        if self.is_synchronized:
            return
        if self.gate is not None:
            await self.gate.stop()
        # A publisher's subscribers stay subscribed: to them the new version continues the run.
        await self._stop_background(is_final=not self.is_open or agent.kind != "publisher")
        if self.is_open and agent.active_when is not None:
            await self.open()
        await self.start()
        for source in self._feeds.keys() - set(agent.sources):
            # Not awaited: a running handler may wait until this version serves.
            closing = asyncio.create_task(self._feeds.pop(source).close(old.limits.timeout if old else 0))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        if self.sid is not None and not agent.contract.invocable:
            await self._unsubscribe()
        self._synchronized = agent  # only now: after a failure this is retried

    async def stop_triggers(self, timeout: float) -> None:
        """Stop gate, sources and background task; requests are still received."""
        if self.gate is not None:
            await self.gate.stop()
        await asyncio.gather(*[feed.close(timeout) for feed in self._feeds.values()], *self._closing)
        await self._stop_background()

    async def close(self, timeout: float) -> None:
        """Unsubscribe; finish running requests, or cancel and answer them after `timeout` seconds."""
        await self.stop_triggers(timeout)
        await self._unsubscribe()
        await self.finish(timeout)

    async def finish(self, timeout: float, agent: AgentVersion | None = None) -> int:
        """Finish running requests, or those on one version; cancel and answer them after `timeout` seconds.

        Returns how many do not stop.
        """
        running = [task for task, each in self._tasks.items() if agent is None or each is agent]
        if not running:
            return 0
        _, late = await asyncio.wait(running, timeout=timeout)
        if still_running := await cancel_within(_CANCEL_GRACE_S, late):
            log.error("%s: %d requests do not stop", self.agent.name, len(still_running))
        return len(still_running)

    def running_on(self, agent: AgentVersion) -> int:
        """How many requests run on one version."""
        return sum(each is agent for each in self._tasks.values())

    async def _activate(self) -> None:
        await cancel_and_wait(self._draining)  # the requests that it waits for may continue
        await self.open()
        await self._resources.logs.publish("info", self.agent.name, "agent_activated")

    async def _deactivate(self, timeout: float) -> None:
        """Stop taking requests; running ones have `timeout` seconds. The agent stays registered."""
        self.is_open = False
        await asyncio.gather(*[feed.close(0) for feed in self._feeds.values()])
        await self._stop_background()
        await self._unsubscribe()
        # Not awaited: it may be activated again before the last request has finished.
        self._draining = asyncio.create_task(self.finish(timeout))
        await self._resources.logs.publish("info", self.agent.name, "agent_deactivated")

    async def _stop_background(self, *, is_final: bool = True) -> None:
        background, self.background, self._next_seq = self.background, None, 0
        if background is not None:
            await background.stop(is_final=is_final)
            self._next_seq = background.seq

    async def _unsubscribe(self) -> None:
        sid, self.sid = self.sid, None
        if sid is not None:
            await self._resources.connection.drain(sid)
