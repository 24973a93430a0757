"""Streams: each `yield` is a chunk that reaches the caller at once."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel, Field

mesh = AgentMesh()


class Ticks(BaseModel):
    count: int = Field(default=5, ge=1, le=1_000_000)
    every: float = Field(default=0.2, ge=0, le=10, description="seconds")


class Tick(BaseModel):
    number: int
    at: datetime


@mesh.agent(AgentSpec(name="time.ticker", description="Streams numbered ticks with their time."))
async def tick(req: Ticks) -> AsyncIterator[Tick]:
    for number in range(req.count):
        yield Tick(number=number, at=datetime.now(UTC))
        await asyncio.sleep(req.every)


if __name__ == "__main__":
    mesh.run()
