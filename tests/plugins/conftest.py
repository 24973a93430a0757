"""Fixtures for meshes and hosts with the plugin `limits`, and for a mesh with the plugin `tracing`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import oam_limits
import pytest
from oam_limits import Limits, Settings
from oam_tracing import Tracing
from openagentmesh import AgentMesh, AgentSpec, Host, PermissionDenied, Usage, report_usage
from openagentmesh.runtime.config import load_config
from opentelemetry import trace

from tests.support.limits import Clock, Identity, Limited, Serve
from tests.support.modules import write
from tests.support.tracing import Spans


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the plugin and of its rate limiter."""
    clock = Clock()
    monkeypatch.setattr("throttled.utils.now_mono_f", clock)
    monkeypatch.setattr(oam_limits, "monotonic", clock)
    return clock


@pytest.fixture
def limited(url: str) -> Limited:
    """Creates meshes with the plugin."""
    return lambda *plugins, **settings: AgentMesh(url, plugins=[*plugins, Limits(Settings(**settings))])


@pytest.fixture
def configure_limits(tmp_path: Path, url: str) -> Callable[[str], None]:
    """Writes a mesh.toml that ends with these settings."""

    def configure_(toml: str) -> None:
        text = f"mesh.url = {url!r}\nhost.entry_points = false\nhost.drain_timeout = 1\n{toml}"
        (tmp_path / "mesh.toml").write_text(text)

    return configure_


@pytest.fixture
def serve_limited(tmp_path: Path, configure_limits: Callable[[str], None]) -> Serve:
    """A host with the plugin, that serves `agents/` with the settings of its mesh.toml."""

    @asynccontextmanager
    async def serve_(files: dict[str, str], toml: str) -> AsyncIterator[Host]:
        write(tmp_path / "agents", files)
        configure_limits(toml)
        read = partial(load_config, tmp_path / "mesh.toml")
        host = Host(
            read(), config_file=tmp_path / "mesh.toml", read_config=read, plugins=[Identity(), Limits()]
        )
        async with host:
            yield host

    return serve_


@pytest.fixture
def spans() -> Spans:
    """The spans of a provider of the test's own."""
    return Spans()


@pytest.fixture
async def traced(url: str, name: str, spans: Spans) -> AsyncIterator[AgentMesh]:
    """A mesh with the plugin and with agents of several kinds, some of which call another one."""
    mesh = AgentMesh(url, plugins=[Tracing(spans.provider)])

    @mesh.agent(AgentSpec(name=f"{name}.responder", version="1.2.3"))
    async def responder(text: str) -> str:
        if text == "refuse":
            raise PermissionDenied("refused")
        if text == "fail":
            raise ValueError("no")
        if text == "hang":
            await asyncio.sleep(30)
        report_usage(Usage(input_tokens=3, output_tokens=5, model="m"))
        return text

    @mesh.agent(AgentSpec(name=f"{name}.nested"))
    async def nested(text: str) -> str:
        return str(await mesh.call(f"{name}.responder", text))

    @mesh.agent(AgentSpec(name=f"{name}.streamer"))
    async def streamer(number: int) -> AsyncIterator[str]:
        for each in range(number):
            yield await mesh.call(f"{name}.responder", str(each))

    @mesh.agent(AgentSpec(name=f"{name}.threaded"))
    def threaded(text: str) -> str:
        return format(trace.get_current_span().get_span_context().trace_id, "032x")

    @mesh.agent(AgentSpec(name=f"{name}.messages"), sources=[mesh.subject_source(f"{name}.news")])
    async def messages(text: str) -> None:
        await mesh.call(f"{name}.responder", text)

    async with mesh:
        yield mesh
