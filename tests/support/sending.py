"""The callbacks of `send`, and a streamer to send to."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel


class Callbacks:
    """The callbacks of one `send`, and what they were called with, in order."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()

    async def send(
        self,
        mesh: AgentMesh,
        name: str,
        payload: object,
        timeout: float | None = 60,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Send a request with these callbacks."""
        put = self.queue.put_nowait
        await mesh.send(name, payload, on_reply=put, on_error=put, timeout=timeout, headers=headers)

    def so_far(self) -> list[Any]:
        """The values received and not taken yet."""
        return [self.queue.get_nowait() for _ in range(self.queue.qsize())]

    async def next(self) -> Any:
        """The next value."""
        async with asyncio.timeout(10):
            return await self.queue.get()


class Count(BaseModel):
    """The input of `streamer`: it waits before each chunk, and fails after the last one if `fails`."""

    count: int = 3
    fails: bool = False
    waits: float = 0


def streamer(mesh: AgentMesh, name: str) -> asyncio.Queue[str]:
    """Declare a streamer that counts; returns a queue of how its runs ended."""
    ends: asyncio.Queue[str] = asyncio.Queue()

    @mesh.agent(AgentSpec(name=name))
    async def stream(req: Count) -> AsyncIterator[int]:
        is_complete = False
        try:
            for number in range(req.count):
                await asyncio.sleep(req.waits)
                yield number
            if req.fails:
                raise ValueError("late")
            is_complete = True
        finally:
            ends.put_nowait("complete" if is_complete else "stopped")

    return ends
