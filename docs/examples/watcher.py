"""Work in the background: a function without input and output.

It runs once per host. When it raises an exception it is restarted, after a pause that doubles each time.

oam status
"""

import asyncio

from openagentmesh import AgentMesh, AgentSpec

mesh = AgentMesh()
attempts = 0
settled = asyncio.Event()


@mesh.agent(AgentSpec(name="ops.janitor", description="Removes old files; fails the first time."))
async def janitor() -> None:
    global attempts
    attempts += 1
    if attempts == 1:
        raise RuntimeError("the folder is not mounted")
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
