"""Waiting for a state that no event announces."""

import asyncio
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Final

# Far longer than anything takes, so that only what never happens fails a test.
TIMEOUT_S: Final = 15.0
_PERIOD_S: Final = 0.005


async def until(condition: Callable[[], Awaitable[object] | object], timeout: float = TIMEOUT_S) -> None:
    """Wait until a condition is true, plain or async; it is evaluated again and again."""
    async with asyncio.timeout(timeout):
        while True:
            value = condition()
            if await value if isawaitable(value) else value:
                return
            await asyncio.sleep(_PERIOD_S)
