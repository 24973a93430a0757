"""Shared files of any size: large ones are written and read piece by piece.

oam agent call report.write '{"lines": 3}'
"""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

from openagentmesh import AgentMesh, AgentSpec, NotFound
from pydantic import BaseModel

mesh = AgentMesh()


class Report(BaseModel):
    lines: int


@mesh.agent(AgentSpec(name="report.write", description="Writes a report and returns its key."))
async def write(report: Report) -> str:
    def lines() -> Iterator[bytes]:
        for number in range(report.lines):
            yield f"line {number}\n".encode()

    await mesh.workspace.put("reports/latest.txt", lines())
    return "reports/latest.txt"


async def main() -> None:
    async with mesh.local():
        key = await mesh.call("report.write", Report(lines=3), returns=str)
        print((await mesh.workspace.get(key)).decode().splitlines())

        await mesh.call("report.write", Report(lines=200_000))
        size = 0
        async with aclosing(mesh.workspace.read(key)) as pieces:
            async for piece in pieces:
                size += len(piece)
        print([(artifact.key, artifact.size == size) for artifact in await mesh.workspace.list("reports/")])

        await mesh.workspace.delete(key)
        try:
            await mesh.workspace.get(key)
        except NotFound as error:
            print(error.code)


if __name__ == "__main__":
    asyncio.run(main())

# prints
# ['line 0', 'line 1', 'line 2']
# [('reports/latest.txt', True)]
# not_found
