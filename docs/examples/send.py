"""Send and go on: the reply, if there is one, comes to a function.

oam agent send jobs.render '{"page": 1}'
"""

import asyncio
from typing import Any

from openagentmesh import AgentMesh, AgentSpec, MeshError
from pydantic import BaseModel

mesh = AgentMesh()


class Job(BaseModel):
    page: int


@mesh.agent(AgentSpec(name="jobs.render", description="Renders a page."))
async def render(job: Job) -> str:
    if job.page < 1:
        raise ValueError("pages begin at 1")
    return f"page {job.page}"


async def main() -> None:
    async with mesh.local():
        answers: asyncio.Queue[Any] = asyncio.Queue()

        async def failed(error: MeshError) -> None:
            await answers.put(f"{error.code}: {error.message}")

        for page in (7, 0):
            await mesh.send("jobs.render", Job(page=page), on_reply=answers.put, on_error=failed)
            print(await answers.get())

        await mesh.send("jobs.render", Job(page=8))  # nobody waits for this one
        try:
            await mesh.send("jobs.print", Job(page=9))
        except MeshError as error:
            print(error.code)


if __name__ == "__main__":
    asyncio.run(main())

# prints
# page 7
# handler_error: pages begin at 1
# not_found
