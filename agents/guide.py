"""Finds other agents in the catalog and calls them by name: no imports, no addresses."""

from typing import Any

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel

mesh = AgentMesh()


class Question(BaseModel):
    text: str
    tag: str = "text"


class Answers(BaseModel):
    called: list[str]
    answers: dict[str, Any]


@mesh.agent(AgentSpec(name="guide", description="Calls every agent with a tag, with the same text."))
async def guide(req: Question) -> Answers:
    found = await mesh.catalog(tags=[req.tag], invocable=True, streaming=False)
    answers = {entry.name: await mesh.call(entry.name, {"text": req.text}) for entry in found}
    return Answers(called=[entry.name for entry in found], answers=answers)


if __name__ == "__main__":
    mesh.run()
