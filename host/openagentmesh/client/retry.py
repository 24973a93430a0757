"""Asking again, for agents that declare that doing a thing twice is as good as once."""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final, TypeVar

from openagentmesh.protocol.errors import AgentDied, InvalidInput, MeshError, NotAvailable, Overloaded
from openagentmesh.registry.directory import Directory

T = TypeVar("T")
# What another instance, or the same one a moment later, may well answer.
_WORTH_IT: Final = (AgentDied, NotAvailable, Overloaded)
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0


async def check(directory: Directory, name: str) -> None:
    """See that an agent may be asked again.

    Raises:
        InvalidInput: it does not declare itself idempotent.
        NotFound: no agent has this name.

    """
    if not (await directory.contract(name)).idempotent:
        raise InvalidInput(
            f"Agent '{name}' does not say that it may be asked twice, so retry= cannot be used. "
            "Its author says so with AgentSpec(..., idempotent=True).",
            agent=name,
        )


async def call(once: Callable[[float | None], Awaitable[T]], retry: int, timeout: float | None) -> T:
    """Ask at most `retry` times more, all within `timeout` seconds."""
    left = _Left(timeout)
    for attempt in range(retry):
        try:
            return await once(left.seconds)
        except _WORTH_IT as exc:
            await left.pause(exc, attempt)
    return await once(left.seconds)


async def stream(
    once: Callable[[float | None], AsyncGenerator[Any, None]], retry: int, total: float | None
) -> AsyncGenerator[Any, None]:
    """Ask at most `retry` times more, as long as nothing has been yielded, all within `total` seconds."""
    left, began = _Left(total), False
    for attempt in range(retry + 1):
        try:
            async with aclosing(once(left.seconds)) as chunks:
                async for chunk in chunks:
                    began = True
                    yield chunk
        except _WORTH_IT as exc:
            if began or attempt == retry:
                raise
            await left.pause(exc, attempt)
        else:
            return


class _Left:
    """What is left of a time to wait."""

    def __init__(self, timeout: float | None) -> None:
        self._until = None if timeout is None else asyncio.get_running_loop().time() + timeout

    @property
    def seconds(self) -> float | None:
        return None if self._until is None else self._until - asyncio.get_running_loop().time()

    async def pause(self, error: MeshError, attempt: int) -> None:
        """Wait as long as the host asks for and a little more; raise `error` when there is no time."""
        asked = error.details.get("retry_after_ms")
        least = asked / 1000 if isinstance(asked, int | float) else 0.0
        # Full jitter: many callers that were refused together do not come back together.
        most = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)
        wait = min(least, _LONGEST_PAUSE) + random.uniform(0, most)  # noqa: S311 - no secret depends on it
        if self.seconds is not None and self.seconds <= wait:
            raise error
        await asyncio.sleep(wait)
