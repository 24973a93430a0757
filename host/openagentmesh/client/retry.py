"""Retries of requests to agents that declare themselves idempotent."""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, stop_before_delay

from openagentmesh.client.requests import time_left
from openagentmesh.protocol.errors import AgentDied, InvalidInput, NotAvailable, Overloaded
from openagentmesh.registry.directory import Directory
from openagentmesh.transport.backoff import Backoff

T = TypeVar("T")
_FIRST_PAUSE_S: Final = 0.05
_MAX_PAUSE_S: Final = 2.0


async def check_idempotent(directory: Directory, name: str) -> None:
    """Raise InvalidInput unless an agent declares that requests to it may be retried."""
    if not (await directory.contract(name)).idempotent:
        raise InvalidInput(
            f"Agent '{name}' is not declared idempotent, so retry= cannot be used. "
            "Its author declares it with AgentSpec(..., idempotent=True).",
            agent=name,
        )


async def retry_call(once: Callable[[float | None], Awaitable[T]], retries: int, timeout: float | None) -> T:
    """Call `once`, with the seconds left of `timeout`, and at most `retries` times more."""
    began = asyncio.get_running_loop().time()
    async for attempt in _attempts(retries, timeout, _is_retryable):
        with attempt:
            return await once(time_left(timeout, began))
    raise AssertionError("unreachable: the last attempt raises")


async def retry_stream(
    once: Callable[[float | None], AsyncGenerator[Any, None]], retries: int, total: float | None
) -> AsyncGenerator[Any, None]:
    """Stream `once`, with the seconds left of `total`, and before its first chunk `retries` times more."""
    began = asyncio.get_running_loop().time()
    has_chunks = False

    def is_retryable(exc: BaseException) -> bool:
        return not has_chunks and _is_retryable(exc)

    async for attempt in _attempts(retries, total, is_retryable):
        with attempt:
            async with aclosing(once(time_left(total, began))) as chunks:
                async for chunk in chunks:
                    has_chunks = True
                    yield chunk


def _is_retryable(exc: BaseException) -> bool:
    """Whether another instance, or the same one a moment later, may answer."""
    return isinstance(exc, AgentDied | NotAvailable | Overloaded)


def _attempts(
    retries: int, timeout: float | None, is_retryable: Callable[[BaseException], bool]
) -> AsyncRetrying:
    backoff = Backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S)

    def pause(state: RetryCallState) -> float:
        """At least the host's `retry_after_ms`, plus jitter."""
        error = state.outcome.exception() if state.outcome else None
        requested = getattr(error, "details", {}).get("retry_after_ms")
        at_least = requested / 1000 if isinstance(requested, int | float) else 0.0
        return min(at_least, _MAX_PAUSE_S) + backoff.delay(state.attempt_number)

    stop = stop_after_attempt(retries + 1) | stop_before_delay(math.inf if timeout is None else timeout)
    return AsyncRetrying(retry=retry_if_exception(is_retryable), stop=stop, wait=pause, reraise=True)
