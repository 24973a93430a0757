"""Timeouts and cancellation: nested calls get the time that is left, and a cancelled call stops its handler.

oam agent call relay '"hello"' --timeout 5
"""

import asyncio

from openagentmesh import AgentMesh, AgentSpec, current_call

mesh = AgentMesh()
started, stopped = asyncio.Event(), asyncio.Event()


@mesh.agent(AgentSpec(name="inner", description="Returns whether at most five seconds are left."))
async def inner(text: str) -> bool:
    return current_call().remaining <= 5


@mesh.agent(AgentSpec(name="relay", description="Calls another agent within the timeout of its own caller."))
async def relay(text: str) -> bool:
    return bool(await mesh.call("inner", text, timeout=60))


@mesh.agent(AgentSpec(name="sleeper", description="Sleeps until its caller cancels."))
async def sleeper() -> str:
    try:
        started.set()
        await asyncio.sleep(3600)
    finally:
        stopped.set()
    return "never"


async def main() -> None:
    async with mesh.local():
        print("within the caller's five seconds:", await mesh.call("relay", "hello", timeout=5))

        call = asyncio.create_task(mesh.call("sleeper"))
        await started.wait()
        call.cancel()
        await stopped.wait()
        print("the handler stopped with its caller")


if __name__ == "__main__":
    asyncio.run(main())

# prints
# within the caller's five seconds: True
# the handler stopped with its caller
