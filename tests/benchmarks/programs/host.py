"""A host that loads one folder: `URL FOLDER`. Says when it began and when it had started."""

import sys
from pathlib import Path
from time import monotonic

from openagentmesh import Host
from openagentmesh.mesh.runner import run
from openagentmesh.runtime.config import Config, HostSection, MeshSection

from tests.benchmarks.programs.process import next_line, report


async def serve(url: str, folder: Path) -> None:
    """Serve what is in the folder until the runner is done."""
    loaded = HostSection(agents=["."], entry_points=False, strict=True)
    host = Host(Config(folder=folder, mesh=MeshSection(url=url), host=loaded))
    began = monotonic()
    async with host:
        report(began=began, started=monotonic(), agents=len(host.agents))
        await next_line()


if __name__ == "__main__":
    run(serve(sys.argv[1], Path(sys.argv[2])))
