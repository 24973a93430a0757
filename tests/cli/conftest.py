"""Servers and hosts that tests of commands share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import Process, Up, write_project
from tests.support.servers import running_server

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
WRITER = """
from openagentmesh import AgentMesh, AgentSpec

mesh = AgentMesh()

@mesh.agent(AgentSpec(name="jobs.write", description="Appends a text to a file."))
async def write(req: dict) -> None:
    with open(req["path"], "a") as file:
        file.write(req["text"])
"""


@pytest.fixture(scope="session")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A running `oam up` with a module that fails to load; tests do not change it."""
    folder = write_project(
        tmp_path_factory.mktemp("hosted") / "dev",
        "echo",
        "summarizer",
        "ticker",
        holding=("hold", "narrow"),
        failing=True,
        broken=True,
        toml="[agents.narrow]\nconcurrency = 1\nqueue = 0\n",
    )
    with Up(folder) as host:
        yield host


@pytest.fixture(scope="session")
def narrow_is_busy(hosted: Up) -> Iterator[None]:
    """The agent `narrow` is at its limit of requests."""
    release = hosted.folder / "release-narrow"
    with Process(
        "agent", "call", "narrow", f'{{"until": "{release}"}}', "--url", hosted.url, cwd=hosted.folder
    ):
        hosted.wait_for_line("narrow runs")
        yield
        release.touch()


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A running `oam up` with examples of docs/; tests change log levels and keys.

    The agent `desk.trade` is inactive at the start and at the end of each test.
    """
    folder = write_project(tmp_path_factory.mktemp("examples"), "echo")
    for name in ("publisher", "watcher", "gates", "observe"):
        shutil.copy(EXAMPLES / f"{name}.py", folder / "agents")
    (folder / "agents" / "writer.py").write_text(WRITER)
    with Up(folder) as host:
        yield host


@pytest.fixture(scope="session")
def protected_url() -> Iterator[str]:
    """The address of a server that requires the user `u` and the password `correct`."""
    with running_server("--user", "u", "--pass", "correct") as found:
        yield found
