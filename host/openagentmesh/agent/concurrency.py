"""The limiter of one agent: how many requests run at once, and how many more may wait."""

import asyncio
from collections import deque


class Limiter:
    """Lets `concurrency` requests run at once, in the order of admission; `queue` more may wait.

    A request is admitted, entered with `async with` while its handler runs, and released when it is
    answered. Unlike `asyncio.Semaphore` it can be resized, so that all versions of an agent share it.
    """

    def __init__(self, concurrency: int, queue: int) -> None:
        self._concurrency = concurrency
        self._capacity = concurrency + queue
        self._admitted = 0
        self._running = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._released = asyncio.Event()

    def resize(self, concurrency: int, queue: int) -> None:
        """Change the limits; what runs and waits already does so still."""
        self._concurrency = concurrency
        self._capacity = concurrency + queue
        self._start_waiters()
        self._released.set()

    @property
    def is_full(self) -> bool:
        """Whether the capacity is used up."""
        return self._admitted >= self._capacity

    @property
    def waiting(self) -> int:
        """How many admitted requests wait for a slot."""
        return len(self._waiters)

    def admit(self) -> None:
        """Count one request; the caller checks `is_full`."""
        self._admitted += 1

    def release(self) -> None:
        """Count one request less."""
        self._admitted -= 1
        self._released.set()

    async def wait_for_capacity(self) -> None:
        """Wait until one more request may be admitted."""
        while self.is_full:
            self._released.clear()
            await self._released.wait()

    async def __aenter__(self) -> None:
        if self._running < self._concurrency and not self._waiters:
            self._running += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.cancelled():  # it got the slot before its task was cancelled
                self._leave()
            raise

    async def __aexit__(self, kind: object, exc: object, traceback: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._running -= 1
        self._start_waiters()

    def _start_waiters(self) -> None:
        while self._waiters and self._running < self._concurrency:
            waiter = self._waiters.popleft()
            if not waiter.done():  # a cancelled one
                self._running += 1
                waiter.set_result(None)
