"""A mesh, whichever `openagentmesh` is installed: ours, or the published SDK in its own environment."""

import asyncio
import os
from collections.abc import Sequence
from time import monotonic

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel

from tests.benchmarks.programs.load import COUNT, GO, HANG, NAP, SHORTEN, STOPPED, TICKS
from tests.benchmarks.programs.process import provide_or_measure


class Text(BaseModel):
    text: str
    length: int


class Short(BaseModel):
    short: str


class Nap(BaseModel):
    seconds: float


class Numbers(BaseModel):
    count: int


class Number(BaseModel):
    number: int


class Stopped(BaseModel):
    seconds: float
    pid: int


def serving(url: str, plugins: Sequence[object] = ()) -> AgentMesh:  # noqa: C901 - one function an agent
    """A mesh with the agents that are measured; only ours takes plugins."""
    mesh = AgentMesh(url, plugins=plugins) if plugins else AgentMesh(url)

    @mesh.agent(AgentSpec(name=SHORTEN, description="Shortens a text."))
    async def shorten(req: Text) -> Short:
        return Short(short=req.text[: req.length])

    @mesh.agent(AgentSpec(name=NAP, description="Sleeps."))
    async def nap(req: Nap) -> Nap:
        await asyncio.sleep(req.seconds)
        return req

    @mesh.agent(AgentSpec(name=COUNT, description="Streams numbers."))
    async def count(req: Numbers) -> Number:  # type: ignore[misc] # the chunk's type, as both read it
        for number in range(req.count):
            yield Number(number=number)

    runs: asyncio.Queue[int] = asyncio.Queue()

    @mesh.agent(AgentSpec(name=GO, description="Lets the publisher emit."))
    async def go(req: Numbers) -> Numbers:
        runs.put_nowait(req.count)
        return req

    @mesh.agent(AgentSpec(name=TICKS, description="Emits as many numbers as it receives."))
    async def ticks() -> Number:  # type: ignore[misc] # the event's type, as both read it
        while True:
            for number in range(await runs.get()):
                yield Number(number=number)

    stopped = Stopped(seconds=0, pid=os.getpid())

    @mesh.agent(AgentSpec(name=HANG, description="Waits until it is stopped."))
    async def hang(req: Nap) -> Nap:
        try:
            await asyncio.sleep(req.seconds)
        finally:
            stopped.seconds = monotonic()
        return req

    @mesh.agent(AgentSpec(name=STOPPED, description="Returns when a handler was cancelled last."))
    async def when_stopped(req: dict[str, int]) -> Stopped:
        return stopped

    return mesh


if __name__ == "__main__":
    provide_or_measure(serving, AgentMesh)
