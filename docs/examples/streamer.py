"""One request, many chunks: a reader that closes the stream stops the agent within one window of 64 chunks.

oam agent stream numbers.up '{"to": 3}'
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel

mesh = AgentMesh()
produced = 0
stopped = asyncio.Event()


class Upto(BaseModel):
    to: int


@mesh.agent(AgentSpec(name="numbers.up", description="Counts up, one number per chunk."))
async def up(request: Upto) -> AsyncIterator[int]:
    global produced
    try:
        for number in range(request.to):
            produced += 1
            yield number
    finally:
        stopped.set()


async def main() -> None:
    async with mesh.local():
        print([number async for number in mesh.stream("numbers.up", {"to": 5})])
        stopped.clear()

        async with aclosing(mesh.stream("numbers.up", {"to": 1_000_000})) as numbers:
            async for number in numbers:
                if number == 10:
                    break
        await stopped.wait()
        print("stopped within a window:", produced <= 5 + 11 + 64)


if __name__ == "__main__":
    asyncio.run(main())

# prints
# [0, 1, 2, 3, 4]
# stopped within a window: True
