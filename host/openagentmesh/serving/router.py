"""Routes: one subject's slot each. A request's whole path is `Route.answer`."""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from openagentmesh.bus.client import Message
from openagentmesh.bus.connection import Bus
from openagentmesh.bus.requests import Inbox
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.codec import Request
from openagentmesh.protocol.errors import (
    Cancelled,
    HandlerError,
    InvalidInput,
    MeshError,
    MeshTimeout,
    Overloaded,
    text_of,
)
from openagentmesh.serving.agent import Agent
from openagentmesh.serving.call import Call, set_current_call
from openagentmesh.serving.streams import ChunkWriter

log = logging.getLogger(__name__)

# What an overloaded agent tells its callers to wait.
_RETRY_AFTER_MS: Final = 250
# How long a handler may take to clean up after it was cancelled.
_CANCEL_GRACE: Final = 1.0


@dataclass(slots=True)
class Counts:
    """What a route has done since it was made."""

    requests: int = 0
    errors: int = 0
    refused: int = 0


class Route:
    """One agent's place on the mesh: what it points at may change, the place stays."""

    def __init__(self, agent: Agent, router: "Router") -> None:
        self.agent = agent
        self.counts = Counts()
        self.sid: int | None = None
        self._router = router
        self._slots = asyncio.Semaphore(agent.limits.concurrency)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def in_flight(self) -> int:
        """Requests being answered, waiting ones among them."""
        return len(self._tasks)

    def swap(self, agent: Agent) -> None:
        """Point at another agent; requests under way finish on the old one."""
        if agent.limits.concurrency != self.agent.limits.concurrency:
            self._slots = asyncio.Semaphore(agent.limits.concurrency)
        self.agent = agent

    def receive(self, message: Message) -> None:
        """Take a request off the wire: spawn and return."""
        limits = self.agent.limits
        full = len(self._tasks) >= limits.concurrency + limits.queue
        walk = self.refuse(message) if full else self.answer(message)
        task = asyncio.get_running_loop().create_task(walk)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def answer(self, message: Message) -> None:
        """Walk one request from its message to its reply."""
        agent, loop = self.agent, asyncio.get_running_loop()
        request = codec.read_request(message.head, message.body)
        call = Call(agent.name, request, loop.time() + agent.patience(request))
        deadline = asyncio.timeout_at(call.deadline)
        set_current_call(call)
        self.counts.requests += 1
        try:
            async with deadline, self._slots:
                agent.accept(call)
                if request.streaming:
                    await self._stream(agent, call, deadline)
                else:
                    result = await agent.endpoint(call)
                    await self._reply(message, request, agent.dump(result))
        # Whatever a handler raises ends its own request and nothing else: a SystemExit that
        # leaves a task would stop the whole event loop.
        except BaseException as exc:  # noqa: BLE001 - the request ends here, and is answered
            if not call.abandoned:
                await self._reply_error(message, request, _as_mesh_error(exc, call, deadline))

    async def refuse(self, message: Message) -> None:
        """Answer a request for which there is no room."""
        agent = self.agent
        self.counts.refused += 1
        error = Overloaded(
            f"Agent '{agent.name}' has {agent.limits.concurrency} requests running and "
            f"{agent.limits.queue} waiting. Try again later.",
            details={"retry_after_ms": _RETRY_AFTER_MS},
        )
        await self._reply_error(message, codec.read_request(message.head, message.body), error)

    async def finish(self, timeout: float) -> None:
        """Wait for what is running; after `timeout` seconds cancel it, which answers it."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=timeout)
        for task in late:
            task.cancel()
        if late:
            _, deaf = await asyncio.wait(late, timeout=_CANCEL_GRACE)
            if deaf:
                log.error("%s: %d requests do not stop", self.agent.name, len(deaf))

    async def _stream(self, agent: Agent, call: Call, deadline: asyncio.Timeout) -> None:
        router, request, task = self._router, call.request, asyncio.current_task()
        if not subjects.is_token(request.request_id):
            raise InvalidInput(
                f"A stream needs the header {subjects.REQUEST_ID}: "
                "at most 128 letters, digits, '_' and '-', for they name the chunks' subject."
            )
        writer = ChunkWriter(router.bus, router.inbox, router.instance_id, request, agent.dump)

        loop = asyncio.get_running_loop()

        async def send(chunk: object) -> None:
            # From here on it is the reader who takes its time.
            deadline.reschedule(loop.time() + agent.limits.timeout)
            await writer.send(chunk)
            # A stream may go on for ever, as long as it goes on.
            call.deadline = loop.time() + agent.patience(request)
            deadline.reschedule(call.deadline)

        def gone() -> None:
            call.abandoned = True
            if task is not None:
                task.cancel()

        call.send, writer.gone = send, gone
        try:
            await agent.endpoint(call)
            await writer.end()
        finally:
            writer.close()

    async def _reply(self, message: Message, request: Request, body: bytes) -> None:
        if message.reply:
            router = self._router
            head = codec.reply_headers(request.request_id, router.instance_id, self.agent.name)
            await router.bus.publish(message.reply, body, head)

    async def _reply_error(self, message: Message, request: Request, error: MeshError) -> None:
        self.counts.errors += 1
        bus, instance_id, name = self._router.bus, self._router.instance_id, self.agent.name
        error = error.located(agent=name, request_id=request.request_id)
        body = codec.error_body(error)
        if len(body) > codec.MAX_ERROR_BODY:
            body = codec.short_error_body(error)
        head = codec.error_headers(request.request_id, instance_id)
        try:
            if request.streaming and subjects.is_token(request.request_id):
                frame = codec.error_headers(request.request_id, instance_id, frame=True)
                await bus.publish(subjects.stream(request.request_id), body, frame)
            elif message.reply:
                await bus.publish(message.reply, body, head)
            await bus.publish(subjects.errors(name), body, head)
        except MeshError as exc:
            log.error("%s: the caller could not be told of %r: %s", name, error, exc)  # noqa: TRY400 - no bug of ours


def _as_mesh_error(exc: BaseException, call: Call, deadline: asyncio.Timeout) -> MeshError:
    """What the caller is told of `exc`."""
    if isinstance(exc, MeshError):
        return exc
    if isinstance(exc, TimeoutError) and deadline.expired():
        return MeshTimeout(f"Agent '{call.agent}' did not answer in time and was stopped.")
    task = asyncio.current_task()
    if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
        return Cancelled(f"Agent '{call.agent}' was stopped before it had answered.")
    log.error("%s: the handler failed", call.agent, exc_info=exc)
    return HandlerError(text_of(exc))


class Router:
    """The routes of one node."""

    def __init__(self, bus: Bus, inbox: Inbox, instance_id: str) -> None:
        self.bus = bus
        self.inbox = inbox
        self.instance_id = instance_id
        self._routes: dict[str, Route] = {}

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes.values())

    def __len__(self) -> int:
        return len(self._routes)

    def get(self, name: str) -> Route | None:
        """The route of an agent, if it is served here."""
        return self._routes.get(name)

    async def point(self, agent: Agent) -> None:
        """Serve an agent under its name from now on, in place of another one if there is."""
        route = self._routes.get(agent.name)
        if route is not None:
            route.swap(agent)
            return
        route = self._routes[agent.name] = Route(agent, self)
        subject, queue = subjects.agent(agent.name), subjects.queue_group(agent.name)
        route.sid = await self.bus.listen(subject, route.receive, queue)

    async def drain(self, timeout: float) -> None:
        """Take nothing more, finish what runs; cancel and answer the rest after `timeout` s."""
        await self.bus.leave(*[route.sid for route in self if route.sid is not None])
        await self.finish(timeout)

    async def finish(self, timeout: float) -> None:
        """Finish what runs; cancel and answer the rest after `timeout` seconds."""
        await asyncio.gather(*[route.finish(timeout) for route in self])
