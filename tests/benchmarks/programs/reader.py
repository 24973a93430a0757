"""A client that has just started: `URL COUNT`. Reports how long it took to read a catalog of COUNT agents."""

import sys
from time import monotonic

from openagentmesh import AgentMesh
from openagentmesh.mesh.runner import run

from tests.benchmarks.programs.process import report


async def read(url: str, count: int) -> None:
    """Connect, read, report."""
    began = monotonic()
    async with AgentMesh(url) as mesh:
        entries = await mesh.catalog()
        took = monotonic() - began
    assert len(entries) == count, len(entries)
    report(value=took)


if __name__ == "__main__":
    run(read(sys.argv[1], int(sys.argv[2])))
