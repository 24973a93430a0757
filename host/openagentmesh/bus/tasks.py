"""Ending tasks."""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

_AGAIN: Final = 0.1


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks of our own and wait until they are done.

    Once is not enough: nats-py while it flushes, and `asyncio.wait_for` before Python 3.12,
    can swallow a cancellation.
    """
    running = [task for task in tasks if task is not None and not task.done()]
    while running:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_AGAIN)
        running = [task for task in running if not task.done()]


async def end_within(seconds: float, tasks: Iterable[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """Cancel tasks that run an author's code, and give them `seconds`; returns those that stay."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if not running:
        return set()
    _, deaf = await asyncio.wait(running, timeout=seconds)
    return deaf
