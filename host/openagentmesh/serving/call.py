"""What a handler is given and what it may ask about: Call, Endpoint, current_call."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from openagentmesh.protocol.codec import Request


async def _send_nothing(chunk: object) -> None:
    raise RuntimeError(f"This request is no stream; {chunk!r} cannot be sent.")


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
        abandoned: nobody waits for an answer any more.

    """

    agent: str
    request: Request
    deadline: float
    input: Any = None
    send: Callable[[Any], Awaitable[None]] = _send_nothing
    abandoned: bool = False

    @property
    def request_id(self) -> str:
        """The caller's id of this request; empty when it sent none."""
        return self.request.request_id

    @property
    def headers(self) -> Mapping[str, str]:
        """All headers of the request, the caller's own among them."""
        return self.request.headers

    @property
    def caller(self) -> str:
        """The caller's instance id; empty when it sent none."""
        return self.request.caller

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.deadline - asyncio.get_running_loop().time())


Endpoint = Callable[[Call], Awaitable[Any]]

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
