"""Fixtures of all tests: one nats-server per run, and unique names for each test."""

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from openagentmesh import AgentMesh
from openagentmesh.runtime.config import Config, HostSection, MeshSection

from tests.support.host_bench import Ledger
from tests.support.modules import Configure, write
from tests.support.servers import running_server

_NUMBERS = count()
# Examples have no deadline: their duration depends on the load of the machine.
settings.register_profile(
    "openagentmesh",
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("openagentmesh")
# With OAM_TEST_LOOP=uvloop all tests run on the event loop of hosts with the extra `fast`.
if os.environ.get("OAM_TEST_LOOP") == "uvloop":
    asyncio.set_event_loop_policy(import_module("uvloop").EventLoopPolicy())


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The URL of the run's server."""
    with (
        tempfile.TemporaryDirectory(prefix="oam-tests-") as store,
        running_server("-js", "-sd", store) as server_url,
    ):
        yield server_url


@pytest.fixture
def name() -> str:
    """A name that no other test uses, for an agent or a channel."""
    return f"t{next(_NUMBERS)}"


@pytest.fixture
def new_mesh(url: str) -> Callable[[], AgentMesh]:
    """Creates meshes that are not connected yet."""
    return lambda: AgentMesh(url)


@pytest.fixture
async def mesh(url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AgentMesh]:
    """A connected mesh that waits for running handlers for a second when it closes."""
    monkeypatch.setattr("openagentmesh.mesh.mesh.DRAIN_TIMEOUT_S", 1.0)
    async with AgentMesh(url) as connected:
        yield connected


@pytest.fixture
def configure(tmp_path: Path, url: str) -> Configure:
    """Writes files below `agents/`, and returns the config of a host that serves them."""

    def configure_(files: Mapping[str, str], *, folder: Path = tmp_path, **more: Any) -> Config:
        write(folder / "agents", files)
        host = {"agents": ["agents"], "entry_points": False, "drain_timeout": 1.0, **more.pop("host", {})}
        return Config(folder=folder, mesh=MeshSection(url=url), host=HostSection(**host), **more)

    return configure_


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """A module that agent files import as `ledger`, and share with the test and with their other versions."""
    created = Ledger()
    monkeypatch.setitem(sys.modules, "ledger", created)
    return created
