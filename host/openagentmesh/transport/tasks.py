"""Tasks that are certain to end, and work that is retried until it succeeds."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from tenacity import AsyncRetrying, retry_if_exception_type

from openagentmesh.protocol.errors import MeshError
from openagentmesh.transport.backoff import jittered_backoff

log = logging.getLogger(__name__)

_CANCEL_INTERVAL_S: Final = 0.1
_MAX_BACKOFF_S: Final = 5.0


async def cancel_and_wait(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks of our own and wait until they are done."""
    running = [task for task in tasks if task is not None and not task.done()]
    # Repeatedly: nats-py while it flushes, and `asyncio.wait_for` before 3.12, can swallow a cancellation.
    while running:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_CANCEL_INTERVAL_S)
        running = [task for task in running if not task.done()]


async def cancel_within(timeout: float, tasks: Iterable[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """Cancel tasks that run authors' code; returns those that still run after `timeout` seconds."""
    running = {task for task in tasks if not task.done()}
    for task in running:
        task.cancel()
    if running:
        _, running = await asyncio.wait(running, timeout=timeout)
    return running


async def retry_forever(work: Callable[[], Awaitable[None]], what: str) -> None:
    """Retry work until it succeeds; `what` names it in the log."""

    def log_failure(exc: BaseException | None) -> None:
        traceback = None if isinstance(exc, MeshError) else exc
        log.warning("%s failed and will be retried: %s", what, exc, exc_info=traceback)

    await retry_with_reports(work, log_failure)


async def retry_with_reports(
    work: Callable[[], Awaitable[None]], on_failure: Callable[[BaseException | None], None]
) -> None:
    """Retry work until it succeeds; `on_failure` is called with each error, those of libraries included."""
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(Exception),
        wait=jittered_backoff(0.1, _MAX_BACKOFF_S),
        before_sleep=lambda state: on_failure(state.outcome.exception() if state.outcome else None),
    ):
        with attempt:
            await work()
