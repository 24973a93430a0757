"""One of several that serve INTEROP_CHANNEL as one agent; its replies say which it is."""

import asyncio
import os
import sys
from pathlib import Path

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel

mesh = AgentMesh(os.environ["INTEROP_URL"])


class Rest(BaseModel):
    seconds: float = 0
    until: str = ""


class Who(BaseModel):
    who: str


@mesh.agent(AgentSpec(name=os.environ["INTEROP_CHANNEL"], description="Says who it is."))
async def say_who(req: Rest) -> Who:
    await asyncio.sleep(req.seconds)
    if req.until:
        print("holding", file=sys.stderr, flush=True)
        while not Path(req.until).exists():
            await asyncio.sleep(0.01)
    return Who(who=os.environ["INTEROP_WHO"])


mesh.run()
