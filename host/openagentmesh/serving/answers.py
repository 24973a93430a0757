"""What is told of a request: its reply, its error, and what becomes of it (protocol §7–§9)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from openagentmesh.agent.agent import Agent
from openagentmesh.agent.call import Call
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.codec import Request
from openagentmesh.protocol.errors import (
    Cancelled,
    HandlerError,
    InvalidInput,
    MeshError,
    MeshTimeout,
    error_text,
)
from openagentmesh.protocol.messages import LogLevel
from openagentmesh.serving.deadline import Deadline
from openagentmesh.serving.resources import Shared
from openagentmesh.transport.nats_client import Message

log = logging.getLogger(__name__)

Send = Callable[[str, bytes, bytes], Awaitable[None]]
# Messages about requests: to tell everybody of these as well would never end.
_TOLD = (subjects.errors(""), subjects.logs(""))


class Answers:
    """Tells the callers of one agent, and everybody who wants to know, what becomes of its requests."""

    def __init__(self, agent: str, shared: Shared) -> None:
        self._agent = agent
        self._shared = shared

    def tells(self, message: Message, level: LogLevel) -> bool:
        """Whether everybody is told of what happens to this request."""
        return self._shared.events.wants(self._agent, level) and not message.subject.startswith(_TOLD)

    async def received(self, request: Request) -> None:
        """Tell everybody that it has come."""
        await self._tell(request, "debug", "request_received")

    async def reply(self, call: Call, reply: str, body: bytes) -> None:
        """Tell its caller what came of it, if that wants to know."""
        if reply:
            shared = self._shared
            head = codec.reply_headers(call.request_id, shared.instance_id, call.agent, call.usage)
            await shared.inbox.deliver(reply, body, head)

    async def completed(self, call: Call) -> None:
        """Tell everybody what it has cost."""
        if call.usage is not None:
            usage = call.usage.model_dump(exclude_none=True)
            await self._tell(call.request, "info", "usage_reported", data=usage)
        seconds = asyncio.get_running_loop().time() - call.started
        took: dict[str, object] = {"duration_ms": round(seconds * 1000, 3)}
        await self._tell(call.request, "debug", "request_completed", data=took)

    async def failed(
        self, message: Message, request: Request, where: str, error: MeshError, send: Send
    ) -> None:
        """Tell its caller, at `where`, and everybody that it failed."""
        connection, instance_id, name = self._shared.connection, self._shared.instance_id, self._agent
        error = error.for_request(agent=name, request_id=request.request_id)
        body = codec.encode_error(error)
        head = codec.error_headers(request.request_id, instance_id)
        about_requests = message.subject.startswith(_TOLD)
        try:
            if where:
                frame = request.streaming and subjects.is_token(request.request_id)
                await send(where, body, codec.error_headers(request.request_id, instance_id, frame=frame))
            if not about_requests:
                await connection.publish(subjects.errors(name), body, head)
        except MeshError as exc:
            log.error("%s: the caller could not be told of %r: %s", name, error, exc)  # noqa: TRY400 - no bug of ours
        if about_requests:
            log.warning("%s failed on what it heard on %s: %s", name, message.subject, error)
            return
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
        await events.emit(level, self._agent, event, request_id=request_id, message=message, data=data)


def as_mesh_error(exc: BaseException, agent: Agent, call: Call, deadline: Deadline) -> MeshError:
    """What the caller is told of `exc`."""
    if call.abandoned:
        return Cancelled(f"Nobody waits for agent '{call.agent}' any more.")
    if isinstance(exc, MeshError):
        return exc
    if isinstance(exc, TimeoutError) and deadline.expired:
        return MeshTimeout(f"Agent '{call.agent}' {deadline.missed} and was stopped.")
    task = asyncio.current_task()
    if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
        return Cancelled(f"Agent '{call.agent}' was stopped before it had answered.")
    if plugin := agent.plugin_that_raised(exc):
        log.error("%s: the plugin '%s' failed", call.agent, plugin, exc_info=exc)
        return HandlerError(f"the plugin '{plugin}' failed: {error_text(exc)}", details={"plugin": plugin})
    log.error("%s: the handler failed", call.agent, exc_info=exc)
    return HandlerError(error_text(exc))
