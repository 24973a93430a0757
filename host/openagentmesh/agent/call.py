"""What a handler is given and what it may ask about: Call, Endpoint, Middleware, current_call."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal, Self

from openagentmesh.agent.concurrency import Slots
from openagentmesh.protocol.codec import Request
from openagentmesh.protocol.contract import Verb
from openagentmesh.protocol.errors import MeshError
from openagentmesh.protocol.messages import Usage

log = logging.getLogger(__name__)

Ending = Callable[[MeshError | None], object]


async def _send_nothing(chunk: object) -> None:
    raise RuntimeError(f"This request is no stream; {chunk!r} cannot be sent.")


def _read_nothing() -> None:
    return


class Caller(str):
    """Who asks, as a text: the proven subject, else the instance id.

    Attributes:
        instance_id: what the request says; empty when it says nothing.
        subject: who it was proven to be, by a plugin; empty when nobody has looked.
        scopes: what else was proven.

    """

    __slots__ = ("instance_id", "scopes", "subject")

    instance_id: str
    subject: str
    scopes: frozenset[str]

    def __new__(cls, instance_id: str, subject: str = "", scopes: frozenset[str] = frozenset()) -> Self:
        """Say who asks."""
        made = super().__new__(cls, subject or instance_id)
        made.instance_id, made.subject, made.scopes = instance_id, subject, scopes
        return made

    @classmethod
    def nobody(cls, instance_id: str) -> Self:
        """Someone who was looked at and proved nothing: an empty text, whatever the request says."""
        made = str.__new__(cls)
        made.instance_id, made.subject, made.scopes = instance_id, "", frozenset()
        return made


@dataclass(slots=True)
class Call:
    """One request on its way through an agent.

    Attributes:
        agent: the agent's name.
        request: the request as it came.
        deadline: when the host stops the handler, in seconds of the event loop's clock;
            a stream's counts from its last chunk.
        input: the validated input; None when the agent takes none.
        send: sends one chunk of a stream; what a streamer yields goes through here.
        usage: what the handler reported so far; None for nothing.
        abandoned: nobody waits for an answer any more.
        over: it is answered, so its deadline is nobody's any more.
        started: when it came, in seconds of the event loop's clock.
        patience: seconds it may take; for a stream, from chunk to chunk.
        verb: what the caller did; `source` for a message or a change that drives the agent.
        in_turn: one of a series, such as the changes of a key: the next one comes when this one is
            over, and nobody would bring it again, so it waits where others are refused.
        subject: the NATS subject that it came on.
        proven: who asks, once a plugin knows.
        slots: limits how many handlers run at once, and how many requests wait for that.
        read: checks the verb and reads the input; called in the innermost endpoint.

    """

    agent: str
    request: Request
    deadline: float
    input: Any = None
    send: Callable[[Any], Awaitable[None]] = _send_nothing
    usage: Usage | None = None
    abandoned: bool = False
    over: bool = False
    started: float = 0.0
    patience: float = math.inf
    verb: Verb | Literal["source"] = "call"
    in_turn: bool = False
    subject: str = ""
    proven: Caller | None = None
    slots: Slots = field(default_factory=Slots)
    read: Callable[[], None] = _read_nothing
    _endings: list[Ending] = field(default_factory=list)

    def when_over(self, ending: Ending) -> None:
        """Have a function called once the request is answered, with the error or with None.

        Middlewares see what the handler returns or raises; that it did not fit its type, was too
        large to be sent, or came too late is known after them.
        """
        self._endings.append(ending)

    def end(self, error: MeshError | None) -> None:
        """Tell who wants to know that it is answered, and how."""
        self.over = True
        for ending in self._endings:
            try:
                ending(error)
            # A plugin's code may raise anything; the request is answered already.
            except Exception:
                log.exception("%s: what was to be called when a request is over failed", self.agent)

    @property
    def request_id(self) -> str:
        """The caller's id of this request; empty when it sent none."""
        return self.request.request_id

    @property
    def headers(self) -> Mapping[str, str]:
        """All headers of the request, the caller's own among them."""
        return self.request.headers

    @property
    def caller(self) -> Caller:
        """Who asks: proven by a plugin, or what the request says of itself."""
        return self.proven if self.proven is not None else Caller(self.request.caller)

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        try:
            now = asyncio.get_running_loop().time()
        except RuntimeError:  # in a thread of a handler, where the loop's clock is the machine's
            now = monotonic()
        return max(0.0, self.deadline - now)


Endpoint = Callable[[Call], Awaitable[Any]]
Middleware = Callable[[Endpoint], Endpoint]


_current: ContextVar[Call] = ContextVar("current_call")
set_current_call = _current.set


def current_call() -> Call:
    """The request that the running handler answers.

    Raises:
        RuntimeError: no request is being answered here.

    """
    try:
        return _current.get()
    except LookupError:
        raise RuntimeError("current_call() is for handlers: no request is being answered here.") from None


def report_usage(usage: Usage) -> None:
    """Tell what the running request costs; several reports add up, the last model counts.

    It travels with the reply, or with the end of the stream, and as a log event.

    Raises:
        RuntimeError: no request is being answered here.

    """
    call = current_call()
    call.usage = usage if call.usage is None else call.usage.plus(usage)


def within_deadline(timeout: float | None, *, streaming: bool = False) -> float | None:
    """`timeout`, or the running request's patience when that is less; in seconds.

    For a request that is `streaming`, `timeout` is from chunk to chunk, and so is the patience
    of a stream that hands the chunks on.
    """
    call = _current.get(None)
    # A task that a handler leaves behind keeps its context, but nobody waits for it.
    if call is None or call.over:
        return timeout
    left = call.patience if streaming and call.request.streaming else call.remaining
    return min(left, math.inf if timeout is None else timeout)
