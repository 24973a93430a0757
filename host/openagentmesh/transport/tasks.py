"""Tasks that are ended for certain, and tasks that go on."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from openagentmesh.protocol.errors import MeshError

log = logging.getLogger(__name__)

_AGAIN: Final = 0.1
_LONGEST_PAUSE: Final = 5.0


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


async def persistently(work: Callable[[], Awaitable[None]], what: str) -> None:
    """Do work until it is done: what fails is tried again, for nobody else would."""

    def failed(state: RetryCallState) -> None:
        exc = state.outcome.exception() if state.outcome else None
        ours = isinstance(exc, MeshError)
        log.warning("%s does not work now and is tried again: %s", what, exc, exc_info=None if ours else exc)

    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(Exception),
        wait=wait_random_exponential(multiplier=0.1, max=_LONGEST_PAUSE),
        before_sleep=failed,
    ):
        with attempt:
            await work()
