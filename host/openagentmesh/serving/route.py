"""A route: one agent's place on the mesh. A request's whole path is `Route.answer`."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, Final

from openagentmesh.agent.agent import Agent
from openagentmesh.agent.call import Call, set_current_call
from openagentmesh.agent.sources import Source, SubjectSource
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import MeshError
from openagentmesh.serving.answers import Answers, as_mesh_error
from openagentmesh.serving.background import Background
from openagentmesh.serving.deadline import ANSWER_LATE, Deadline
from openagentmesh.serving.keepalive import Lifeline, leaving
from openagentmesh.serving.reading import chunk_subject, error_subject, reply_subject, verb_of
from openagentmesh.serving.resources import Shared
from openagentmesh.serving.stats import Counts
from openagentmesh.serving.streams import ChunkWriter, NoWriter
from openagentmesh.serving.triggers import Accept, Gate, KVFeed, SubjectFeed
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import cancel_and_wait, cancel_within

log = logging.getLogger(__name__)

# How many requests plugins may be asked about at once, before those are counted that they let through.
_MOST_ASKED: Final = 10_000
# How long a handler may take to clean up after it was cancelled.
_CANCEL_GRACE: Final = 1.0
_NO_LIFELINE: Final = nullcontext()
# How much longer a chunk may take while all return to a restarted server.
_SETTLING: Final = 5.0
_READER_LATE: Final = "had to wait too long for the reader of its stream"


class Route:
    """One agent's place on the mesh: what it points at may change, the place stays."""

    def __init__(self, agent: Agent, shared: Shared) -> None:
        self.agent = agent
        # What sources, gate and background follow; it catches up with `agent` in `follow`.
        self._followed: Agent | None = None
        self.counts = Counts()
        self._answers = Answers(agent.name, shared)
        self.sid: int | None = None
        self.background: Background | None = None
        self.gate: Gate | None = None
        self._shared = shared
        self.is_open = False
        self._feeds: dict[Source, SubjectFeed | KVFeed] = {}
        # Of sources that the agent has no more, until what they have brought is handled.
        self._closing: set[asyncio.Task[None]] = set()
        self._draining: asyncio.Task[int] | None = None
        # Where a publisher goes on that takes over from the version before it.
        self._next_seq = 0
        self._slots = agent.limits.slots()
        # What runs, and on which version.
        self._tasks: dict[asyncio.Task[None], Agent] = {}
        self._freed = asyncio.Event()

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
        condition, shared, before = self.agent.active_when, self._shared, self.gate
        self.gate = None
        if condition is None:
            await self.open()
            return
        self.gate = Gate(
            self.agent, condition, shared.connection, shared.buckets, self._activate, self._deactivate
        )
        await self.gate.start(is_open=self.is_open, before=before)

    async def open(self) -> None:
        """Take requests, listen to sources, run what runs by itself; what is there already stays."""
        agent, shared = self.agent, self._shared
        self.is_open = True
        if agent.contract.invocable and self.sid is None:
            subject, queue = subjects.agent(agent.name), subjects.queue_group(agent.name)
            self.sid = await shared.connection.subscribe(subject, self.receive, queue)
        if agent.handler.shape in {"publisher", "watcher"} and self.background is None:
            self.background = Background(agent, shared, self._next_seq)
            self.background.start()
        for source in agent.sources:
            if source not in self._feeds:
                self._feeds[source] = _feed(source, self, shared)
            await self._feeds[source].open()

    async def close(self, timeout: float) -> None:
        """Follow no gate and no source, and end what runs by itself; requests still come."""
        if self.gate is not None:
            await self.gate.stop()
        await asyncio.gather(*[feed.close(timeout) for feed in self._feeds.values()], *self._closing)
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
        # A publisher's subscribers stay: to them the next version goes on with the same run.
        await self._end_background(for_good=not self.is_open or agent.handler.shape != "publisher")
        if self.is_open and agent.active_when is not None:
            await self.open()
        await self.start()
        for source in self._feeds.keys() - set(agent.sources):
            # Not awaited: what it has brought may wait for all that is being served to be up.
            closing = asyncio.create_task(self._feeds.pop(source).close(old.limits.timeout if old else 0))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
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
        await cancel_and_wait(self._draining)  # what it waits for may go on
        await self.open()
        await self._shared.events.emit("info", self.agent.name, "agent_activated")

    async def _deactivate(self, timeout: float) -> None:
        """Take nothing more; what runs has `timeout` seconds. It stays on the mesh, but is off."""
        self.is_open = False
        await asyncio.gather(*[feed.close(0) for feed in self._feeds.values()])
        await self._end_background()
        await self._leave()
        # Not awaited: it may be turned on again before the last one has finished.
        self._draining = asyncio.create_task(self.finish(timeout))
        await self._shared.events.emit("info", self.agent.name, "agent_deactivated")

    async def _end_background(self, *, for_good: bool = True) -> None:
        background, self.background, self._next_seq = self.background, None, 0
        if background is not None:
            await background.stop(for_good=for_good)
            self._next_seq = background.seq

    async def _leave(self) -> None:
        sid, self.sid = self.sid, None
        if sid is not None:
            await self._shared.connection.drain(sid)

    def receive(self, message: Message) -> None:
        """Take a request off the wire: spawn and return."""
        agent = self.agent
        room = agent.limits.concurrency + agent.limits.queue
        # Who gets the room is for plugins to say, so with them it is counted further in.
        most = max(room, _MOST_ASKED) if agent.layers else room
        full = len(self._tasks) >= most
        self._spawn(self.refuse(message) if full else self.answer(message, agent), agent)

    @property
    def has_room(self) -> bool:
        """Whether one more request may run, or wait for its turn."""
        limits = self.agent.limits
        return len(self._tasks) < limits.concurrency + limits.queue

    async def until_room(self) -> None:
        """Wait until there is room."""
        while not self.has_room:
            self._freed.clear()
            await self._freed.wait()

    def take(self, message: Message, accept: Accept, *, in_turn: bool = False) -> "asyncio.Task[None]":
        """Answer what a source has brought in a task of its own; `accept` reads it."""
        return self._spawn(self.answer(message, self.agent, accept, in_turn=in_turn), self.agent)

    def turn_away(self, message: Message) -> None:
        """Refuse a message of a source."""
        self._spawn(self.refuse(message), self.agent)

    def _spawn(self, walk: Coroutine[Any, Any, None], agent: Agent) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(walk)
        self._tasks[task] = agent
        task.add_done_callback(self._has_ended)
        return task

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._freed.set()

    async def answer(
        self, message: Message, agent: Agent, accept: Accept | None = None, *, in_turn: bool = False
    ) -> None:
        """Walk one request from its message to its reply, all of it on one version of the agent."""
        now = asyncio.get_running_loop().time()
        request = codec.decode_request(message.head, message.body)
        patience = agent.patience(request)
        call = Call(agent.name, request, now + patience, started=now, patience=patience, slots=self._slots)
        deadline, answers, overheard = Deadline(call.deadline), self._answers, accept is not None
        reply = reply_subject(message, request, agent.handler, overheard=overheard)
        call.verb, call.in_turn = "source" if overheard else verb_of(request, reply), in_turn
        call.subject = message.subject
        call.read = partial(accept or Agent.accept, agent, call)
        set_current_call(call)
        self.counts.requests += 1
        noisy = answers.tells(message, "debug")
        error: MeshError | None = None
        try:
            if noisy:
                await answers.received(request)
            with deadline, self._lifeline(call, reply, deadline):
                if agent.contract.streaming:
                    await self._stream(agent, call, reply, deadline)
                else:
                    body = agent.dump(await agent.outermost(call))
            if not agent.contract.streaming:
                await answers.reply(call, reply, body)
        # Whatever a handler raises ends its own request and nothing else: a SystemExit that
        # leaves a task would stop the whole event loop.
        except BaseException as exc:  # noqa: BLE001 - the request ends here, and is answered
            error = as_mesh_error(exc, agent, call, deadline)
            if not call.abandoned:
                where = error_subject(request, reply, overheard=overheard)
                self.counts.add_error(error)
                await answers.failed(message, request, where, error, self._shared.inbox.deliver)
        else:
            if noisy or (call.usage is not None and answers.tells(message, "info")):
                await answers.completed(call)
        finally:
            call.end(error)
            self.counts.seconds += asyncio.get_running_loop().time() - now

    async def refuse(self, message: Message) -> None:
        """Answer a request for which there is no room."""
        agent, error = self.agent, self.agent.overloaded()
        self.counts.requests += 1
        self.counts.add_error(error)
        request = codec.decode_request(message.head, message.body)
        overheard = message.subject != subjects.agent(agent.name)
        reply = reply_subject(message, request, agent.handler, overheard=overheard)
        where = error_subject(request, reply, overheard=overheard)
        # Its caller is there: it has just asked, through this very server.
        await self._answers.failed(message, request, where, error, self._shared.connection.publish)

    async def finish(self, timeout: float, agent: Agent | None = None) -> int:
        """Wait for what is running, or what is on one version; after `timeout` seconds cancel it.

        That answers it. Returns how many requests do not stop.
        """
        running = [task for task, each in self._tasks.items() if agent is None or each is agent]
        if not running:
            return 0
        _, late = await asyncio.wait(running, timeout=timeout)
        if deaf := await cancel_within(_CANCEL_GRACE, late):
            log.error("%s: %d requests do not stop", self.agent.name, len(deaf))
        return len(deaf)

    def _lifeline(self, call: Call, reply: str, deadline: Deadline) -> AbstractContextManager[object]:
        if call.request.accept != codec.ACK or not reply:
            return _NO_LIFELINE
        shared = self._shared
        head = codec.accepted_headers(call.request_id, shared.instance_id)
        return closing(Lifeline(shared.connection, shared.inbox, head, reply, leaving(call, deadline)))

    async def _stream(self, agent: Agent, call: Call, reply: str, deadline: Deadline) -> None:
        shared, request, loop = self._shared, call.request, asyncio.get_running_loop()
        subject = chunk_subject(request, reply)
        start = codec.frame_prefix(request.request_id, shared.instance_id)
        # What was sent without a reply subject is done for its own sake.
        writer_of = ChunkWriter if subject else NoWriter
        writer = writer_of(
            shared.connection, shared.inbox, subject, start, agent.handler.dump, request.credit
        )

        def put_off() -> None:
            # From here on it is others who take their time.
            deadline.move(loop.time() + agent.limits.timeout + _SETTLING)
            deadline.missed = _READER_LATE

        def go_on() -> None:
            # A stream may go on for ever, as long as it goes on.
            call.deadline = loop.time() + call.patience
            deadline.move(call.deadline)
            deadline.missed = ANSWER_LATE

        writer.on_wait, writer.on_sent, writer.on_gone = put_off, go_on, leaving(call, deadline)
        call.send = writer.send
        try:
            await agent.outermost(call)
            await writer.end(call.usage)
        finally:
            writer.close()


def _is_plain(agent: Agent) -> bool:
    return agent.contract.invocable and not agent.sources and agent.active_when is None


def _feed(source: Source, route: Route, shared: Shared) -> SubjectFeed | KVFeed:
    if isinstance(source, SubjectSource):
        return SubjectFeed(source, route.agent.name, route, shared.connection)
    return KVFeed(source, lambda: route.agent, shared.buckets, partial(route.take, in_turn=True))
