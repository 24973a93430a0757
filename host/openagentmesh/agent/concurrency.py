"""Turns at an agent: how many requests run at once, and whether one more may wait."""

import asyncio
from types import TracebackType


class Slots:
    """Lets so many in at once; entered with `async with`, left when that is done.

    Args:
        running: how many may be in at once.
        waiting: how many may wait until they are let in; whoever enters has looked at `full` before.

    """

    def __init__(self, running: int = 1, waiting: int = 0) -> None:
        self._turns = asyncio.Semaphore(running)
        self._running = running
        self._most = running + waiting
        self._there = 0

    @property
    def full(self) -> bool:
        """Whether as many are in and wait as may."""
        return self._there >= self._most

    @property
    def waiting(self) -> int:
        """How many wait until they are let in."""
        return max(0, self._there - self._running)

    async def __aenter__(self) -> None:
        self._there += 1
        try:
            await self._turns.acquire()
        except BaseException:
            self._there -= 1
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._there -= 1
        self._turns.release()
