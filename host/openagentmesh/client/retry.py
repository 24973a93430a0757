"""Retries of requests to agents that declare themselves idempotent."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.stop import stop_base

from openagentmesh.protocol.errors import AgentDied, InvalidInput, NotAvailable, Overloaded
from openagentmesh.registry.directory import Directory
from openagentmesh.transport.backoff import Backoff

T = TypeVar("T")
# Errors after which another instance, or the same one a moment later, may answer.
_RETRYABLE: Final = (AgentDied, NotAvailable, Overloaded)
_FIRST_PAUSE_S: Final = 0.05
_MAX_PAUSE_S: Final = 2.0


async def check_idempotent(directory: Directory, name: str) -> None:
    """Check that requests to an agent may be retried.

    Raises:
        InvalidInput: it does not declare itself idempotent.
        NotFound: there is no agent of this name.
    """
    if not (await directory.contract(name)).idempotent:
        raise InvalidInput(
            f"Agent '{name}' is not declared idempotent, so retry= cannot be used. "
            "Its author declares it with AgentSpec(..., idempotent=True).",
            agent=name,
        )


async def retry_call(once: Callable[[float | None], Awaitable[T]], retries: int, timeout: float | None) -> T:
    """Call once and at most `retries` times more, all within `timeout` seconds.

    `once` gets the seconds that are left.
    """
    budget = _Budget(timeout)
    async for attempt in budget.retrying(retries):
        with attempt:
            return await once(budget.left)
    raise AssertionError("unreachable: the last attempt raises")


async def retry_stream(
    once: Callable[[float | None], AsyncGenerator[Any, None]], retries: int, total: float | None
) -> AsyncGenerator[Any, None]:
    """Stream once and at most `retries` times more before the first chunk, all within `total` seconds."""
    budget = _Budget(total)
    async for attempt in budget.retrying(retries):
        with attempt:
            async with aclosing(once(budget.left)) as chunks:
                async for chunk in chunks:
                    budget.may_retry = False
                    yield chunk


class _Budget:
    """The time for all attempts together."""

    def __init__(self, timeout: float | None) -> None:
        self._deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        self._backoff = Backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S)
        self.may_retry = True

    @property
    def left(self) -> float | None:
        return None if self._deadline is None else self._deadline - asyncio.get_running_loop().time()

    def retrying(self, retries: int) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception(lambda exc: self.may_retry and isinstance(exc, _RETRYABLE)),
            stop=stop_after_attempt(retries + 1) | _StopWhenOverdue(self),
            wait=self._pause,
            reraise=True,
        )

    def _pause(self, state: RetryCallState) -> float:
        """At least the host's `retry_after_ms`, plus jitter."""
        error = state.outcome.exception() if state.outcome else None
        requested = getattr(error, "details", {}).get("retry_after_ms")
        at_least = requested / 1000 if isinstance(requested, int | float) else 0.0
        return min(at_least, _MAX_PAUSE_S) + self._backoff.delay(state.attempt_number)


class _StopWhenOverdue(stop_base):
    """Stop when the next pause is longer than the time that is left."""

    def __init__(self, budget: _Budget) -> None:
        self._budget = budget

    def __call__(self, retry_state: RetryCallState) -> bool:
        left = self._budget.left
        return left is not None and left <= retry_state.upcoming_sleep
