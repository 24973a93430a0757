"""Returns its input, for a first test of a mesh, and shows the data of a call."""

from typing import Any

from openagentmesh import AgentMesh, AgentSpec, current_call
from pydantic import BaseModel

mesh = AgentMesh()


class Echo(BaseModel):
    said: Any
    caller: str
    request_id: str
    seconds_left: float


@mesh.agent(AgentSpec(name="echo", description="Returns any JSON input, and the caller."))
async def echo(req: Any) -> Echo:
    call = current_call()
    return Echo(said=req, caller=call.caller, request_id=call.request_id, seconds_left=call.remaining)


if __name__ == "__main__":
    mesh.run()
