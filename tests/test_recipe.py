"""The recipe of docs/multi-process.md, in one process."""

import asyncio

import pytest
from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel

TEXT = "AgentMesh connects agents over NATS. Agents register, discover, and invoke each other at runtime."


class SummarizeInput(BaseModel):
    text: str
    max_length: int = 200


class SummarizeOutput(BaseModel):
    summary: str


async def main(mesh: AgentMesh) -> None:
    """Register an agent on a connected mesh, read the catalog, call the agent by name."""

    @mesh.agent(AgentSpec(name="nlp.summarizer", description="Summarizes text to a target length."))
    async def summarize(req: SummarizeInput) -> SummarizeOutput:
        return SummarizeOutput(summary=req.text[: req.max_length])

    for entry in await mesh.catalog():
        print(f"{entry.name} - {entry.description}")
    result = await mesh.call("nlp.summarizer", SummarizeInput(text=TEXT, max_length=40))
    print(f"\nResult: {result['summary']}")


async def test_the_recipe_prints_the_catalog_and_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    """With provider and consumer in one process, it prints the catalog and the result, and leaves no task."""
    async with AgentMesh.local() as mesh:
        await main(mesh)
    assert (
        "nlp.summarizer - Summarizes text to a target length.\n\n"
        "Result: AgentMesh connects agents over NATS. Age\n"
    ) == capsys.readouterr().out
    assert [] == [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
