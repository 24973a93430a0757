"""Publishers, as a program for the published SDK; requests end them, or let them fail."""

import asyncio
import os

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel

CHANNEL = os.environ["INTEROP_CHANNEL"]

mesh = AgentMesh(os.environ["INTEROP_URL"])
finishing = asyncio.Event()
breaking = asyncio.Event()


class Tick(BaseModel):
    number: int
    last: bool = False


def spec(name: str, description: str) -> AgentSpec:
    return AgentSpec(name=f"{CHANNEL}.{name}", description=description)


@mesh.agent(spec("finish", "Ends `ticks`."))
async def finish(req: str) -> str:
    finishing.set()
    return req


@mesh.agent(spec("break", "Lets `fragile` fail."))
async def break_it(req: str) -> str:
    breaking.set()
    return req


@mesh.agent(spec("feed.mark", "Takes requests in the channel of a publisher."))
async def mark(req: str) -> str:
    return req


@mesh.agent(spec("feed.clock", "Ticks forever."))
async def clock() -> Tick:  # type: ignore[misc] # the published SDK expects the type of an event
    number = 0
    while True:
        yield Tick(number=number)
        number += 1
        await asyncio.sleep(0.01)


@mesh.agent(spec("ticks", "Ticks until `finish` is called."))
async def ticks() -> Tick:  # type: ignore[misc] # as above
    number = 0
    while not finishing.is_set():
        yield Tick(number=number)
        number += 1
        await asyncio.sleep(0.01)
    yield Tick(number=number, last=True)


@mesh.agent(spec("fragile", "Ticks until `break` is called, then fails."))
async def fragile() -> Tick:  # type: ignore[misc] # as above
    while not breaking.is_set():
        yield Tick(number=0)
        await asyncio.sleep(0.01)
    raise ValueError("broken")


mesh.run()
