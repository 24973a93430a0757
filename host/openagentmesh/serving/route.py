"""A route: one agent's place on the mesh. A request's whole path is `Route.answer`."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

from openagentmesh.bus.buckets import Buckets
from openagentmesh.bus.client import Message
from openagentmesh.bus.connection import Bus
from openagentmesh.bus.requests import Inbox
from openagentmesh.bus.tasks import end, end_within
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.codec import Request
from openagentmesh.protocol.errors import (
    Cancelled,
    HandlerError,
    InvalidInput,
    MeshError,
    MeshTimeout,
    text_of,
)
from openagentmesh.protocol.messages import LogLevel
from openagentmesh.serving.agent import Agent
from openagentmesh.serving.background import Background
from openagentmesh.serving.call import Call, set_current_call
from openagentmesh.serving.counts import Counts
from openagentmesh.serving.deadline import Deadline
from openagentmesh.serving.eventlog import EventLog
from openagentmesh.serving.lifeline import Lifeline, leaving
from openagentmesh.serving.outgoing import Border
from openagentmesh.serving.reading import chunk_subject, error_subject, reply_subject, verb_of
from openagentmesh.serving.sources import Source, SubjectSource
from openagentmesh.serving.streams import ChunkWriter, NoWriter
from openagentmesh.serving.triggers import Accept, Gate, KVFeed, SubjectFeed

log = logging.getLogger(__name__)

# How many requests plugins may be asked about at once, before those are counted that they let through.
_MOST_ASKED: Final = 10_000
# How long a handler may take to clean up after it was cancelled.
_CANCEL_GRACE: Final = 1.0
_NO_LIFELINE: Final = nullcontext()
# How much longer a chunk may take while all return to a restarted server.
_SETTLING: Final = 5.0

Send = Callable[[str, bytes, bytes], Awaitable[None]]


@dataclass(slots=True, frozen=True)
class Shared:
    """What all routes of a node share."""

    bus: Bus
    inbox: Inbox
    buckets: Buckets
    events: EventLog
    instance_id: str
    border: Border


class Route:
    """One agent's place on the mesh: what it points at may change, the place stays."""

    def __init__(self, agent: Agent, shared: Shared) -> None:
        self.agent = agent
        # What sources, gate and background follow; it catches up with `agent` in `follow`.
        self._followed: Agent | None = None
        self.counts = Counts()
        self.sid: int | None = None
        self.background: Background | None = None
        self.gate: Gate | None = None
        self._shared = shared
        self.is_open = False
        self._feeds: dict[Source, SubjectFeed | KVFeed] = {}
        self._draining: asyncio.Task[int] | None = None
        self._slots = agent.limits.slots()
        # What runs, and on which version.
        self._tasks: dict[asyncio.Task[None], Agent] = {}

    @property
    def in_flight(self) -> int:
        """Requests being answered, waiting ones among them."""
        return len(self._tasks)

    def description(self) -> dict[str, Any]:
        """What the agent does, for `oam status`; JSON."""
        agent, background = self.agent, self.background
        return {
            "name": agent.name,
            "version": agent.contract.version,
            "kind": agent.handler.shape,
            "source": agent.source,
            "in_flight": self.in_flight,
            "waiting": self._slots.waiting,
            **asdict(self.counts),
            "limits": asdict(agent.limits),
            "active": self.gate is None or self.gate.is_open,
            "background": background and background.description(),
        }

    async def start(self) -> None:
        """Begin to serve; a gated agent when its condition says so."""
        condition, shared = self.agent.active_when, self._shared
        if condition is None:
            await self.open()
            return
        self.gate = Gate(self.agent, condition, shared.bus, shared.buckets, self._activate, self._rest)
        await self.gate.start(is_open=self.is_open)

    async def open(self) -> None:
        """Take requests, listen to sources, run what runs by itself; what is there already stays."""
        agent, shared = self.agent, self._shared
        self.is_open = True
        if agent.contract.invocable and self.sid is None:
            subject, queue = subjects.agent(agent.name), subjects.queue_group(agent.name)
            self.sid = await shared.bus.listen(subject, self.receive, queue)
        if agent.handler.shape in {"publisher", "watcher"} and self.background is None:
            self.background = Background(agent, shared.bus, shared.events, shared.instance_id, shared.border)
            self.background.start()
        for source in agent.sources:
            if source not in self._feeds:
                self._feeds[source] = _feed(source, self, shared)
            await self._feeds[source].open()

    async def close(self, timeout: float) -> None:
        """Follow no gate and no source, and end what runs by itself; requests still come."""
        if self.gate is not None:
            await self.gate.stop()
        await asyncio.gather(*[feed.close(timeout) for feed in self._feeds.values()])
        await self._end_background()

    def swap(self, agent: Agent) -> None:
        """Point at another agent, from the next request on; those under way finish on the old one.

        Unless it `is_settled` then, `follow` has to be called.
        """
        old, new = self.agent.limits, agent.limits
        if (old.concurrency, old.queue) != (new.concurrency, new.queue):
            self._slots = agent.limits.slots()
        self.agent = agent
        if self.is_settled:
            self._followed = agent  # nothing else is to hold the old one

    async def follow(self) -> None:
        """Let all that drives the agent besides requests follow what `swap` has done.

        Who goes on taking requests, or messages of a source, misses none meanwhile.
        """
        old, agent = self._followed, self.agent
        if self.is_settled:
            return
        if self.gate is not None:
            await self.gate.stop()
            self.gate = None
        await self._end_background()
        if self.is_open and agent.active_when is not None:
            await self.open()
        await self.start()
        for source in self._feeds.keys() - set(agent.sources):
            await self._feeds.pop(source).close(old.limits.timeout if old else 0)
        if self.sid is not None and not agent.contract.invocable:
            await self._leave()
        self._followed = agent  # only now: what fails is tried again

    async def end(self, timeout: float) -> None:
        """Serve no more: leave, finish what runs; after `timeout` seconds cancel and answer it."""
        await self.close(timeout)
        await self._leave()
        await self.finish(timeout)

    def running_on(self, agent: Agent) -> int:
        """Requests under way on one version of the agent."""
        return sum(each is agent for each in self._tasks.values())

    @property
    def is_settled(self) -> bool:
        """Whether all that drives the agent belongs to the version that the route points at."""
        old = self._followed
        return old is self.agent or (old is not None and _is_plain(old) and self.is_plain)

    @property
    def is_plain(self) -> bool:
        """Whether it takes requests and nothing else, so that it is swapped without a pause."""
        return _is_plain(self.agent)

    async def _activate(self) -> None:
        await end(self._draining)  # what it waits for may go on
        await self.open()
        await self._shared.events.emit("info", self.agent.name, "agent_activated")

    async def _rest(self, timeout: float) -> None:
        """Take nothing more; what runs has `timeout` seconds. It stays on the mesh, but is off."""
        self.is_open = False
        await asyncio.gather(*[feed.close(0) for feed in self._feeds.values()])
        await self._end_background()
        await self._leave()
        # Not awaited: it may be turned on again before the last one has finished.
        self._draining = asyncio.create_task(self.finish(timeout))
        await self._shared.events.emit("info", self.agent.name, "agent_deactivated")

    async def _end_background(self) -> None:
        background, self.background = self.background, None
        if background is not None:
            await background.stop()

    async def _leave(self) -> None:
        sid, self.sid = self.sid, None
        if sid is not None:
            await self._shared.bus.leave(sid)

    def receive(self, message: Message, accept: Accept | None = None) -> None:
        """Take a request off the wire: spawn and return. `accept` reads it when it is a source's."""
        agent = self.agent
        room = agent.limits.concurrency + agent.limits.queue
        # Who gets the room is for plugins to say, so with them it is counted further in.
        most = max(room, _MOST_ASKED) if agent.layers else room
        full = len(self._tasks) >= most
        self._spawn(self.refuse(message) if full else self.answer(message, agent, accept), agent)

    def take(self, message: Message, accept: Accept) -> "asyncio.Task[None]":
        """Answer one of a series in a task of its own, however many requests there are."""
        return self._spawn(self.answer(message, self.agent, accept, in_turn=True), self.agent)

    def _spawn(self, walk: Coroutine[Any, Any, None], agent: Agent) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(walk)
        self._tasks[task] = agent
        task.add_done_callback(self._tasks.pop)
        return task

    async def answer(
        self, message: Message, agent: Agent, accept: Accept | None = None, *, in_turn: bool = False
    ) -> None:
        """Walk one request from its message to its reply, all of it on one version of the agent."""
        now = asyncio.get_running_loop().time()
        request = codec.read_request(message.head, message.body)
        patience = agent.patience(request)
        call = Call(agent.name, request, now + patience, started=now, patience=patience, slots=self._slots)
        deadline = Deadline(call.deadline)
        reply = reply_subject(message, request, overheard=accept is not None)
        call.verb, call.in_turn = "source" if accept else verb_of(request, reply), in_turn
        call.subject = message.subject
        call.read = partial(accept or Agent.accept, agent, call)
        set_current_call(call)
        self.counts.requests += 1
        noisy = self._shared.events.wants(agent.name, "debug")
        error: MeshError | None = None
        try:
            if noisy:
                await self._tell(request, "debug", "request_received")
            with deadline, self._lifeline(call, reply, deadline):
                if agent.contract.streaming:
                    await self._stream(agent, call, reply, deadline)
                else:
                    body = agent.dump(await agent.outermost(call))
            if not agent.contract.streaming:
                await self._reply(call, reply, body)
        # Whatever a handler raises ends its own request and nothing else: a SystemExit that
        # leaves a task would stop the whole event loop.
        except BaseException as exc:  # noqa: BLE001 - the request ends here, and is answered
            error = _as_mesh_error(exc, agent, call, deadline)
            if not call.abandoned:
                where = error_subject(request, reply, overheard=accept is not None)
                await self._reply_error(request, where, error, self._shared.inbox.deliver)
        else:
            if noisy or call.usage is not None:
                await self._tell_completed(call)
        finally:
            call.end(error)
            self.counts.seconds += asyncio.get_running_loop().time() - now

    async def refuse(self, message: Message) -> None:
        """Answer a request for which there is no room."""
        agent = self.agent
        self.counts.requests += 1
        request = codec.read_request(message.head, message.body)
        overheard = message.subject != subjects.agent(agent.name)
        where = error_subject(
            request, reply_subject(message, request, overheard=overheard), overheard=overheard
        )
        # Its caller is there: it has just asked, through this very server.
        await self._reply_error(request, where, agent.overloaded(), self._shared.bus.publish)

    async def finish(self, timeout: float, agent: Agent | None = None) -> int:
        """Wait for what is running, or what is on one version; after `timeout` seconds cancel it.

        That answers it. Returns how many requests do not stop.
        """
        running = [task for task, each in self._tasks.items() if agent is None or each is agent]
        if not running:
            return 0
        _, late = await asyncio.wait(running, timeout=timeout)
        if deaf := await end_within(_CANCEL_GRACE, late):
            log.error("%s: %d requests do not stop", self.agent.name, len(deaf))
        return len(deaf)

    def _lifeline(self, call: Call, reply: str, deadline: Deadline) -> AbstractContextManager[object]:
        if call.request.accept != codec.ACK or not reply:
            return _NO_LIFELINE
        shared = self._shared
        head = codec.accepted_headers(call.request_id, shared.instance_id)
        return closing(Lifeline(shared.bus, shared.inbox, head, reply, leaving(call, deadline)))

    async def _stream(self, agent: Agent, call: Call, reply: str, deadline: Deadline) -> None:
        shared, request, loop = self._shared, call.request, asyncio.get_running_loop()
        subject = chunk_subject(request, reply)
        start = codec.frame_start(request.request_id, shared.instance_id)
        # What was sent without a reply subject is done for its own sake.
        writer_of = ChunkWriter if subject else NoWriter
        writer = writer_of(shared.bus, shared.inbox, subject, start, agent.handler.dump, request.credit)

        def put_off() -> None:
            # From here on it is others who take their time.
            deadline.move(loop.time() + agent.limits.timeout + _SETTLING)

        def go_on() -> None:
            # A stream may go on for ever, as long as it goes on.
            call.deadline = loop.time() + call.patience
            deadline.move(call.deadline)

        writer.on_wait, writer.on_sent, writer.on_gone = put_off, go_on, leaving(call, deadline)
        call.send = writer.send
        try:
            await agent.outermost(call)
            await writer.end(call.usage)
        finally:
            writer.close()

    async def _reply(self, call: Call, reply: str, body: bytes) -> None:
        if reply:
            shared = self._shared
            head = codec.reply_headers(call.request_id, shared.instance_id, call.agent, call.usage)
            await shared.inbox.deliver(reply, body, head)

    async def _reply_error(self, request: Request, where: str, error: MeshError, send: Send) -> None:
        bus, instance_id, name = self._shared.bus, self._shared.instance_id, self.agent.name
        self.counts.add_error(error)
        error = error.located(agent=name, request_id=request.request_id)
        body = codec.error_body(error)
        head = codec.error_headers(request.request_id, instance_id)
        try:
            if where:
                frame = request.streaming and subjects.is_token(request.request_id)
                await send(where, body, codec.error_headers(request.request_id, instance_id, frame=frame))
            await bus.publish(subjects.errors(name), body, head)
        except MeshError as exc:
            log.error("%s: the caller could not be told of %r: %s", name, error, exc)  # noqa: TRY400 - no bug of ours
        event = "validation_error" if error.code == InvalidInput.code else "request_failed"
        await self._tell(request, "warn", event, error.message, {"code": error.code})

    async def _tell(
        self,
        request: Request,
        level: LogLevel,
        event: str,
        message: str = "",
        data: dict[str, object] | None = None,
    ) -> None:
        events, request_id = self._shared.events, request.request_id
        await events.emit(level, self.agent.name, event, request_id=request_id, message=message, data=data)

    async def _tell_completed(self, call: Call) -> None:
        if call.usage is not None:
            usage = call.usage.model_dump(exclude_none=True)
            await self._tell(call.request, "info", "usage_reported", data=usage)
        seconds = asyncio.get_running_loop().time() - call.started
        took: dict[str, object] = {"duration_ms": round(seconds * 1000, 3)}
        await self._tell(call.request, "debug", "request_completed", data=took)


def _is_plain(agent: Agent) -> bool:
    return agent.contract.invocable and not agent.sources and agent.active_when is None


def _feed(source: Source, route: Route, shared: Shared) -> SubjectFeed | KVFeed:
    if isinstance(source, SubjectSource):
        return SubjectFeed(source, route.agent.name, shared.bus, route.receive)
    return KVFeed(source, lambda: route.agent, shared.buckets, route.take)


def _as_mesh_error(exc: BaseException, agent: Agent, call: Call, deadline: Deadline) -> MeshError:
    """What the caller is told of `exc`."""
    if call.abandoned:
        return Cancelled(f"Nobody waits for agent '{call.agent}' any more.")
    if isinstance(exc, MeshError):
        return exc
    if isinstance(exc, TimeoutError) and deadline.expired:
        return MeshTimeout(f"Agent '{call.agent}' did not answer in time and was stopped.")
    task = asyncio.current_task()
    if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
        return Cancelled(f"Agent '{call.agent}' was stopped before it had answered.")
    if plugin := agent.plugin_that_raised(exc):
        log.error("%s: the plugin '%s' failed", call.agent, plugin, exc_info=exc)
        return HandlerError(f"the plugin '{plugin}' failed: {text_of(exc)}", details={"plugin": plugin})
    log.error("%s: the handler failed", call.agent, exc_info=exc)
    return HandlerError(text_of(exc))
