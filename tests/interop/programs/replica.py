"""A replica of the agent INTEROP_CHANNEL; its replies contain the replica's name."""

import asyncio
import os
import sys
from pathlib import Path

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel

mesh = AgentMesh(os.environ["INTEROP_URL"])


class Delay(BaseModel):
    seconds: float = 0
    until: str = ""


class Reply(BaseModel):
    replica: str


@mesh.agent(AgentSpec(name=os.environ["INTEROP_CHANNEL"], description="Returns the name of its replica."))
async def name_of_replica(req: Delay) -> Reply:
    await asyncio.sleep(req.seconds)
    if req.until:
        print("holding", file=sys.stderr, flush=True)
        while not Path(req.until).exists():
            await asyncio.sleep(0.01)
    return Reply(replica=os.environ["INTEROP_REPLICA"])


mesh.run()
