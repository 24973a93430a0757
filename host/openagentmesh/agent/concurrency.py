"""The limiter of one agent: how many requests run at once, and how many more may wait."""

import asyncio


class Limiter:
    """Lets `concurrency` requests run at once, in the order of admission; `queue` more may wait.

    A request is admitted, entered with `async with` while its handler runs, and released when it is
    answered.
    """

    def __init__(self, concurrency: int, queue: int) -> None:
        self._slots = asyncio.Semaphore(concurrency)
        self._concurrency = concurrency
        self._capacity = concurrency + queue
        self._admitted = 0
        self._released = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether the capacity is used up."""
        return self._admitted >= self._capacity

    @property
    def waiting(self) -> int:
        """How many admitted requests wait for a slot."""
        return max(0, self._admitted - self._concurrency)

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
        await self._slots.acquire()

    async def __aexit__(self, kind: object, exc: object, traceback: object) -> None:
        self._slots.release()
