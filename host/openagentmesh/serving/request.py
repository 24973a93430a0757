"""Answers one request: from its message to its reply (protocol §7–§9)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from time import monotonic
from typing import Final, Literal, Self

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.agent.call import ServedCall, Trigger, set_current_call
from openagentmesh.agent.concurrency import Limiter
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.codec import Request
from openagentmesh.protocol.contract import Verb
from openagentmesh.protocol.errors import (
    Cancelled,
    HandlerError,
    InvalidInput,
    MeshError,
    MeshTimeout,
    error_text,
)
from openagentmesh.protocol.messages import LogLevel
from openagentmesh.serving.deadline import RequestDeadline
from openagentmesh.serving.keepalive import Keepalive
from openagentmesh.serving.resources import Resources
from openagentmesh.serving.stats import RouteStats
from openagentmesh.serving.streams import ChunkWriter, DiscardingWriter
from openagentmesh.transport.nats_client import Message

log = logging.getLogger(__name__)

Publish = Callable[[str, bytes, bytes], Awaitable[None]]
# Subjects of the mesh and of the server, where others answer.
_RESERVED_PREFIXES: Final = ("mesh.", "$")
# Messages about requests: publishing such messages for each of them would never end.
_OBSERVED_PREFIXES: Final = (subjects.errors(""), subjects.logs(""))
_NO_KEEPALIVE: Final = nullcontext()


@dataclass(slots=True, frozen=True)
class Destination:
    """Where the answer to one request goes, and the verb that follows from it.

    Attributes:
        verb: the caller's verb.
        reply: the subject of the reply; empty when none is wanted.
        chunks: the subject of a streamer's chunks; empty when they are discarded.
        error_is_frame: an error is sent as the last frame of the chunks, not as a reply.
    """

    verb: Verb | Literal["source"]
    reply: str
    chunks: str
    error_is_frame: bool

    @classmethod
    def of(cls, message: Message, request: Request, agent: AgentVersion, *, is_trigger: bool) -> Self:
        """The destination of the answer to a request, or to a message of a source (`is_trigger`)."""
        reply = "" if request.accept == codec.NO_REPLY else message.reply
        if is_trigger:
            # A source may listen where others answer requests; without an output it has nothing to send.
            is_silent = agent.handler.output is None or message.subject.startswith(_RESERVED_PREFIXES)
            reply = "" if is_silent else reply
            return cls("source", reply, reply, error_is_frame=False)
        if request.streaming:
            if not subjects.is_token(request.request_id):  # `_stream` rejects it
                return cls("stream", reply, "", error_is_frame=False)
            return cls("stream", reply, subjects.stream(request.request_id), error_is_frame=True)
        is_call = reply and not request.reply_to and not reply.startswith(subjects.RESULTS)
        return cls("call" if is_call else "send", reply, reply, error_is_frame=False)


def receive(
    message: Message,
    agent: AgentVersion,
    limiter: Limiter,
    trigger: Trigger | None = None,
    *,
    is_sequential: bool = False,
) -> tuple[ServedCall, Destination]:
    """Decode a request, or a message of a source (`trigger`). Never raises."""
    now = asyncio.get_running_loop().time()
    request = codec.decode_request(message.head, message.body)
    timeout = agent.limits.timeout
    if request.timeout is not None:
        timeout = min(timeout, request.timeout)
    to = Destination.of(message, request, agent, is_trigger=trigger is not None)
    call = ServedCall(
        agent.name,
        request.request_id,
        request.body,
        request.headers,
        request.caller,
        to.verb,
        message.subject,
        now + timeout,
        is_sequential=is_sequential,
        request=request,
        limiter=limiter,
        trigger=trigger,
        started=monotonic(),
        timeout_s=timeout,
    )
    return call, to


class Responder:
    """Answers the requests of one agent, and publishes errors, log events and statistics."""

    def __init__(self, agent: str, resources: Resources) -> None:
        self.stats = RouteStats()
        self._agent = agent
        self._resources = resources

    async def answer(self, call: ServedCall, agent: AgentVersion, to: Destination) -> None:
        """Handle one request, from the decoded call to its reply, on one version of the agent."""
        set_current_call(call)
        self.stats.requests += 1
        deadline, error = RequestDeadline(call, agent.limits.timeout), None
        try:
            if self._is_logged(call, "debug"):
                await self._log(call, "debug", "request_received", {})
            with deadline, self._keepalive(call, to, deadline):
                if agent.contract.streaming:
                    await self._stream(call, agent, to, deadline)
                else:
                    body = agent.encode(await agent.outermost(call))
            if not agent.contract.streaming:
                await self._reply(call, to, body)
        # Whatever a handler raises ends its own request and nothing else: a SystemExit that
        # leaves a task would stop the event loop.
        except BaseException as exc:  # noqa: BLE001 - the request ends here, and is answered
            error = _as_mesh_error(exc, agent, call, deadline)
            if not call.is_abandoned:
                await self._fail(call, to, error, self._resources.inbox.deliver)
        else:
            await self._log_completed(call)
        finally:
            call.finish(error)
            self.stats.seconds += monotonic() - call.started

    async def reject(self, call: ServedCall, agent: AgentVersion, to: Destination) -> None:
        """Answer a request above the limits."""
        self.stats.requests += 1
        # Its caller is connected: it has just sent the request through this server.
        await self._fail(call, to, agent.overloaded(), self._resources.connection.publish)

    async def _stream(
        self, call: ServedCall, agent: AgentVersion, to: Destination, deadline: RequestDeadline
    ) -> None:
        if to.verb == "stream" and not to.chunks:
            raise InvalidInput(
                f"A stream needs the header {subjects.REQUEST_ID} with at most 128 letters, digits, '_' and "
                "'-': it becomes part of the chunks' subject."
            )
        writer_class = ChunkWriter if to.chunks else DiscardingWriter
        writer = writer_class(self._resources, to.chunks, call.request, agent.encode, deadline)
        call.send = writer.send
        try:
            await agent.outermost(call)
            await writer.end(call.usage)
        finally:
            writer.close()

    def _keepalive(
        self, call: ServedCall, to: Destination, deadline: RequestDeadline
    ) -> AbstractContextManager[object]:
        if call.request.accept != codec.ACK or not to.reply:
            return _NO_KEEPALIVE
        return closing(Keepalive(self._resources, call.request_id, to.reply, deadline.abandon))

    async def _reply(self, call: ServedCall, to: Destination, body: bytes) -> None:
        if to.reply:
            resources = self._resources
            head = codec.reply_headers(call.request_id, resources.instance_id, call.agent, call.usage)
            await resources.inbox.deliver(to.reply, body, head)

    async def _fail(self, call: ServedCall, to: Destination, error: MeshError, publish: Publish) -> None:
        """Send an error to the caller, and its copy to `mesh.errors`."""
        self.stats.add_error(error)
        resources, name = self._resources, self._agent
        subject = to.chunks if to.error_is_frame else to.reply
        is_observed = call.subject.startswith(_OBSERVED_PREFIXES)
        body = codec.encode_error(error.for_request(agent=name, request_id=call.request_id))
        ids = call.request_id, resources.instance_id
        try:
            if subject:
                await publish(subject, body, codec.error_headers(*ids, frame=to.error_is_frame))
            if not is_observed:
                await resources.connection.publish(subjects.errors(name), body, codec.error_headers(*ids))
        except MeshError as exc:
            log.error("%s: error reply %r not sent: %s", name, error, exc)  # noqa: TRY400 - not a defect of ours
        if is_observed:
            log.warning("%s failed on a message of %s: %s", name, call.subject, error)
            return
        event = "validation_error" if error.code == InvalidInput.code else "request_failed"
        await self._log(call, "warn", event, {"code": error.code}, error.message)

    def _is_logged(self, call: ServedCall, level: LogLevel) -> bool:
        is_enabled = self._resources.logs.is_enabled(self._agent, level)
        return is_enabled and not call.subject.startswith(_OBSERVED_PREFIXES)

    async def _log_completed(self, call: ServedCall) -> None:
        if call.usage is not None and self._is_logged(call, "info"):
            await self._log(call, "info", "usage_reported", call.usage.model_dump(exclude_none=True))
        if self._is_logged(call, "debug"):
            duration_ms = round((monotonic() - call.started) * 1000, 3)
            await self._log(call, "debug", "request_completed", {"duration_ms": duration_ms})

    async def _log(
        self, call: ServedCall, level: LogLevel, event: str, data: dict[str, object], message: str = ""
    ) -> None:
        await self._resources.logs.publish(
            level, self._agent, event, request_id=call.request_id, message=message, data=data
        )


def _as_mesh_error(
    exc: BaseException, agent: AgentVersion, call: ServedCall, deadline: RequestDeadline
) -> MeshError:
    """The error that the caller gets for `exc`."""
    if call.is_abandoned:
        return Cancelled(f"The caller of agent '{call.agent}' has cancelled the request.")
    if isinstance(exc, MeshError):
        return exc
    if isinstance(exc, TimeoutError) and deadline.expired:
        return MeshTimeout(f"Agent '{call.agent}' {deadline.reason} and was stopped.")
    task = asyncio.current_task()
    if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
        return Cancelled(f"Agent '{call.agent}' was stopped before it answered.")
    if plugin := agent.failed_plugin(exc):
        log.error("%s: the plugin '%s' failed", call.agent, plugin, exc_info=exc)
        return HandlerError(f"the plugin '{plugin}' failed: {error_text(exc)}", details={"plugin": plugin})
    log.error("%s: the handler failed", call.agent, exc_info=exc)
    return HandlerError(error_text(exc))
