"""Send without waiting: the reply, if one is wanted, is passed to a function.

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
        replies: asyncio.Queue[Any] = asyncio.Queue()

        async def failed(error: MeshError) -> None:
            await replies.put(f"{error.code}: {error.message}")

        for page in (7, 0):
            await mesh.send("jobs.render", Job(page=page), on_reply=replies.put, on_error=failed)
            print(await replies.get())

        await mesh.send("jobs.render", Job(page=8))  # its reply is discarded
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
