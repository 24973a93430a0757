"""Projects on disk, and one `oam up` for all tests that only ask."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.processes import Process, Up
from tests.servers import running_server

SAMPLES = Path(__file__).parents[2] / "agents"

ODD = """
import asyncio, sys
from pathlib import Path
from openagentmesh import AgentMesh, AgentSpec, MeshError

mesh = AgentMesh()

@mesh.agent(AgentSpec(name="fail", description="Fails."))
async def fail(req: dict) -> str:
    raise ValueError("something odd")

@mesh.agent(AgentSpec(name="quota", description="Fails with a code of its own."))
async def quota(req: dict) -> str:
    raise MeshError("quota_used_up", "Try again tomorrow")
"""

HOLD = """
@mesh.agent(AgentSpec(name="{name}", description="Answers when the file is there."))
async def {name}(req: dict) -> str:
    print("{name} runs", file=sys.stderr, flush=True)
    while not Path(req["until"]).exists():
        await asyncio.sleep(0.01)
    return "held"
"""

BROKEN = """from openagentmesh import AgentMesh

raise ValueError("not today")
"""


def write_project(
    folder: Path, *samples: str, holds: tuple[str, ...] = (), broken: bool = False, toml: str = ""
) -> Path:
    """A mesh.toml with a throw-away server on any free port, and agents: samples, odd ones, broken ones."""
    agents = folder / "agents"
    agents.mkdir(parents=True)
    for sample in samples:
        shutil.copy(SAMPLES / f"{sample}.py", agents)
    if holds:
        (agents / "odd.py").write_text(ODD + "".join(HOLD.format(name=name) for name in holds))
    if broken:
        (agents / "broken.py").write_text(BROKEN)
    (folder / "mesh.toml").write_text(
        '[server]\nport = 0\nstore = ""\n'
        f'[host]\nname = "{folder.name}"\nagents = ["agents"]\nentry_points = false\n{toml}'
    )
    return folder


@pytest.fixture(scope="session")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A running `oam up`; tests only ask it."""
    folder = write_project(
        tmp_path_factory.mktemp("hosted") / "dev",
        "echo",
        "summarizer",
        "ticker",
        holds=("hold", "narrow"),
        broken=True,
        toml="[agents.narrow]\nconcurrency = 1\nqueue = 0\n",
    )
    with Up(folder) as host:
        yield host


@pytest.fixture(scope="session")
def narrow_is_busy(hosted: Up) -> Iterator[None]:
    """The agent `narrow` has as many requests as it takes."""
    release = hosted.folder / "release-narrow"
    with Process(
        "agent", "call", "narrow", f'{{"until": "{release}"}}', "--url", hosted.url, cwd=hosted.folder
    ):
        hosted.said("narrow runs")
        yield
        release.touch()


@pytest.fixture(scope="session")
def guarded() -> Iterator[str]:
    """The address of a server that wants the user `u` with the password `geheim`."""
    with running_server("--user", "u", "--pass", "geheim") as found:
        yield found
