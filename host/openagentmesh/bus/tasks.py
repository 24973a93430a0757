"""Ending a task for certain."""

import asyncio
from typing import Any, Final

_AGAIN: Final = 0.1


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks and wait until they are done.

    Once is not enough: nats-py while it flushes, and `asyncio.wait_for` before Python 3.12,
    can swallow a cancellation.
    """
    running = [task for task in tasks if task is not None and not task.done()]
    while running:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_AGAIN)
        running = [task for task in running if not task.done()]
