"""Gives back what it gets: to see whether the mesh works, and what a call looks like."""

from typing import Any

from openagentmesh import AgentMesh, AgentSpec, current_call
from pydantic import BaseModel

mesh = AgentMesh()


class Echo(BaseModel):
    said: Any
    caller: str
    request_id: str
    seconds_left: float


@mesh.agent(AgentSpec(name="echo", description="Gives back any JSON it gets, and who asked."))
async def echo(req: Any) -> Echo:
    call = current_call()
    return Echo(said=req, caller=call.caller, request_id=call.request_id, seconds_left=call.remaining)


if __name__ == "__main__":
    mesh.run()
