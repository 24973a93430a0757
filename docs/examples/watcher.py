"""Work in the background: a function that takes nothing and gives nothing back.

It runs once per host, and is started again with growing pauses when it raises.

oam status
"""

import asyncio

from openagentmesh import AgentMesh, AgentSpec

mesh = AgentMesh()
attempts = 0
settled = asyncio.Event()


@mesh.agent(AgentSpec(name="ops.janitor", description="Tidies up; fails the first time."))
async def janitor() -> None:
    global attempts
    attempts += 1
    if attempts == 1:
        raise RuntimeError("the broom is not there yet")
    settled.set()
    await asyncio.sleep(3600)


async def main() -> None:
    async with mesh.local():
        await settled.wait()
        print("attempts:", attempts)


if __name__ == "__main__":
    asyncio.run(main())

# prints
# attempts: 2
