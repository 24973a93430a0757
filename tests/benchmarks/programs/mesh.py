"""A mesh, whichever `openagentmesh` is installed: ours, or the published SDK in its own environment."""

import asyncio

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel

from tests.benchmarks.programs.load import COUNT, NAP, SHORTEN
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


def serving(url: str) -> AgentMesh:
    """A mesh with the agents that are measured."""
    mesh = AgentMesh(url)

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

    return mesh


if __name__ == "__main__":
    provide_or_measure(serving, AgentMesh)
