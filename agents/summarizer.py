"""Summarizes text: the smallest useful agent."""

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel, Field

mesh = AgentMesh()


class SummarizeInput(BaseModel):
    text: str
    max_length: int = Field(default=200, ge=1)


class SummarizeOutput(BaseModel):
    summary: str


@mesh.agent(
    AgentSpec(
        name="nlp.summarizer",
        description="Summarizes text to a target length. Input: raw text and optional max_length.",
        tags=["text"],
    )
)
async def summarize(req: SummarizeInput) -> SummarizeOutput:
    return SummarizeOutput(summary=req.text[: req.max_length].rstrip())


if __name__ == "__main__":
    mesh.run()
