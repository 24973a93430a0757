"""What handlers and middlewares get: Call, Endpoint, Middleware, current_call."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal, Self

from openagentmesh.agent.concurrency import Limiter
from openagentmesh.protocol.codec import Request
from openagentmesh.protocol.contract import Verb
from openagentmesh.protocol.errors import MeshError
from openagentmesh.protocol.messages import Usage
from openagentmesh.transport.kv_watch import Entry
from openagentmesh.transport.nats_client import Message

log = logging.getLogger(__name__)

DoneCallback = Callable[[MeshError | None], object]
# What a source delivered: a message of a subject, or a change of a key.
Trigger = Message | Entry


async def _not_a_stream(chunk: object) -> None:
    raise RuntimeError(f"This request is not a stream; {chunk!r} cannot be sent.")


class Caller(str):
    """The caller's identity as a text: the verified subject, otherwise the instance id.

    Attributes:
        instance_id: from the request's header; empty when it has none.
        subject: verified by a plugin; empty when it was not verified.
        scopes: verified permissions.
    """

    __slots__ = ("instance_id", "scopes", "subject")

    instance_id: str
    subject: str
    scopes: frozenset[str]

    def __new__(cls, instance_id: str, subject: str = "", scopes: frozenset[str] = frozenset()) -> Self:
        """A caller with this identity."""
        caller = super().__new__(cls, subject or instance_id)
        caller.instance_id, caller.subject, caller.scopes = instance_id, subject, scopes
        return caller

    @classmethod
    def anonymous(cls, instance_id: str) -> Self:
        """A caller that proved no identity: an empty text, whatever its request states."""
        caller = cls("")
        caller.instance_id = instance_id
        return caller


@dataclass(slots=True)
class Call:
    """One request on its way through an agent.

    Attributes:
        agent: the agent's name.
        request_id: the caller's id of this request; empty when it sent none.
        body: the request's body.
        headers: all headers of the request, the caller's own among them.
        instance_id: the sending instance, as the request states it.
        verb: the caller's verb; `source` for a message or a change of a source.
        subject: the NATS subject it arrived on.
        deadline: when the host cancels the handler, by the event loop's clock in seconds; for a stream
            counted from its last chunk.
        input: the validated input; None when the agent takes none, and before the innermost endpoint.
        send: sends one chunk of a stream; chunks that a streamer yields are passed to it.
        usage: what the handler reported so far.
        identity: the verified caller, set by a plugin.
        is_sequential: one of a series, such as the changes of a key: the next one is delivered after it, and
            it is not repeated, so it waits where other requests are rejected.
        is_abandoned: the caller does not wait for an answer any more.
        handler_started: when its handler began, by `time.monotonic`; None before, also for invalid input.
    """

    agent: str
    request_id: str = ""
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    instance_id: str = ""
    verb: Verb | Literal["source"] = "call"
    subject: str = ""
    deadline: float = math.inf
    input: Any = None
    send: Callable[[Any], Awaitable[None]] = _not_a_stream
    usage: Usage | None = None
    identity: Caller | None = None
    is_sequential: bool = False
    is_abandoned: bool = False
    handler_started: float | None = None
    _done_callbacks: list[DoneCallback] = field(default_factory=list)

    def add_done_callback(self, callback: DoneCallback) -> None:
        """Call a function once the request is answered, with the error or with None.

        Middlewares get what the handler returns or raises; the callback also gets later errors, such as a
        result of the wrong type or above the size limit.
        """
        self._done_callbacks.append(callback)

    @property
    def caller(self) -> Caller:
        """The caller: verified by a plugin, otherwise as the request states it."""
        return self.identity if self.identity is not None else Caller(self.instance_id)

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        try:
            now = asyncio.get_running_loop().time()
        except RuntimeError:  # in the thread of a handler, where the loop's clock is the monotonic one
            now = monotonic()
        return max(0.0, self.deadline - now)


@dataclass(slots=True, kw_only=True)
class ServedCall(Call):
    """A Call with what the host needs to serve it.

    Attributes:
        trigger: what a source delivered; None for a request.
        started: when it arrived, by `time.monotonic`: the clock of uvloop counts whole milliseconds.
        timeout_s: how long it may take; for a stream, from chunk to chunk.
        is_admitted: the limiter counts it.
        is_done: it is answered, so its deadline does not apply any more.
    """

    request: Request
    limiter: Limiter
    trigger: Trigger | None = None
    started: float = 0.0
    timeout_s: float = math.inf
    is_admitted: bool = False
    is_done: bool = False

    def admit(self) -> None:
        """Let the limiter count it until `finish`."""
        self.limiter.admit()
        self.is_admitted = True

    def finish(self, error: MeshError | None) -> None:
        """Release the limiter and run the callbacks."""
        self.is_done = True
        if self.is_admitted:
            self.limiter.release()
        for callback in self._done_callbacks:
            try:
                callback(error)
            # A plugin's code may raise anything; the request is answered already.
            except Exception:
                log.exception("%s: a done callback failed", self.agent)


Endpoint = Callable[[Call], Awaitable[Any]]
Middleware = Callable[[Endpoint], Endpoint]


_current: ContextVar[Call] = ContextVar("current_call")
set_current_call = _current.set
reset_current_call = _current.reset


def current_call() -> Call:
    """The request that the running handler answers.

    Raises:
        RuntimeError: outside a request.
    """
    try:
        return _current.get()
    except LookupError:
        raise RuntimeError("current_call() is for handlers: there is no request here.") from None


def report_usage(usage: Usage) -> None:
    """Report what the running request costs; reports add up, the last model is kept.

    The sum is sent with the reply or with the end of the stream, and as a log event.

    Raises:
        RuntimeError: outside a request.
    """
    call = current_call()
    call.usage = usage if call.usage is None else call.usage.plus(usage)


def within_deadline(timeout: float | None, *, streaming: bool = False) -> float | None:
    """`timeout`, or what is left of the running request's time when that is less; in seconds.

    For a `streaming` request, `timeout` is from chunk to chunk, and so is the time of a running stream
    that forwards the chunks.
    """
    call = _current.get(None)
    # A task that outlives its request keeps the context, but not the deadline.
    if call is None or (isinstance(call, ServedCall) and call.is_done):
        return timeout
    left = call.remaining
    if streaming and isinstance(call, ServedCall) and call.request.streaming:
        left = call.timeout_s
    return min(left, math.inf if timeout is None else timeout)
