"""The metrics plugin: `/metrics` agrees with the requests, errors and reloads."""

import asyncio
import socket
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from oam_metrics import Metrics, Settings
from openagentmesh import AgentMesh, AgentSpec, Host, MeshError, PermissionDenied, PluginFailed
from openagentmesh.runtime.config import Config, HostSection, MeshSection
from prometheus_client.parser import text_string_to_metric_families

from tests.support.modules import MESH, agent, write

Samples = dict[tuple[str, ...], float]


async def scraped(metrics: Metrics) -> Samples:
    """All samples, by name and the values of their labels."""
    address = f"http://127.0.0.1:{metrics.port}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(address, timeout=5).read().decode())
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(Settings(port=0))


@pytest.fixture
async def counted(url: str, name: str, metrics: Metrics) -> AsyncIterator[AgentMesh]:
    """A mesh with the plugin: a responder that fails for some inputs, and a streamer."""
    mesh = AgentMesh(url, plugins=[metrics])

    @mesh.agent(AgentSpec(name=f"{name}.responder"))
    async def responder(text: str) -> str:
        if text == "refuse":
            raise PermissionDenied("no")
        if text == "fail":
            raise ValueError("no")
        return text

    @mesh.agent(AgentSpec(name=f"{name}.streamer"))
    async def streamer(number: int) -> AsyncIterator[int]:
        for each in range(number):
            yield each

    async with mesh:
        yield mesh


async def test_counts_agree_with_the_requests(counted: AgentMesh, name: str, metrics: Metrics) -> None:
    """Requests are counted by agent and verb, errors by code, and chunks; also while a scrape runs."""
    responder, streamer = f"{name}.responder", f"{name}.streamer"

    async def call(value: Any) -> None:
        try:
            await counted.call(responder, value)
        except MeshError:
            assert value in {"refuse", "fail", 5}

    values = ["hi"] * 300 + ["refuse"] * 20 + ["fail"] * 7 + [5] * 3
    calls = asyncio.gather(*map(call, values))
    await scraped(metrics)
    await calls
    for number in (3, 4):
        assert number == len([chunk async for chunk in counted.stream(streamer, number)])
    samples = await scraped(metrics)
    assert 330 == samples["oam_requests_total", responder, "call"]
    assert 330 == samples["oam_request_seconds_count", responder, "call"]
    assert 2 == samples["oam_requests_total", streamer, "stream"]
    assert 7 == samples["oam_chunks_total", streamer]
    errors = {labels[2]: value for labels, value in samples.items() if labels[0] == "oam_errors_total"}
    assert {"permission_denied": 20, "handler_error": 7, "invalid_input": 3} == errors
    assert 0 == samples["oam_in_flight", responder]
    assert (1, 0) == (samples["oam_connected",], samples["oam_reconnects_total",])


async def test_error_codes_are_made_valid_labels(url: str, name: str, metrics: Metrics) -> None:
    """In an error code of an author, invalid characters are replaced, and a long code is truncated."""
    mesh = AgentMesh(url, plugins=[metrics])

    @mesh.agent(AgentSpec(name=name))
    async def fail(code: str) -> str:
        error = MeshError("failed")
        error.code = {"surrogate": "a\ud800b", "long": "x" * 10_000}[code]
        raise error

    async with mesh:
        for code in ("surrogate", "long"):
            with pytest.raises(MeshError):
                await mesh.call(name, code)
        samples = await scraped(metrics)
    errors = [labels[2] for labels in samples if labels[0] == "oam_errors_total"]
    assert {"a?b", "x" * 64} == set(errors)


async def test_running_and_waiting_requests_are_counted(url: str, name: str, metrics: Metrics) -> None:
    """Requests in flight are those that run and those that wait for a slot."""
    mesh, release = AgentMesh(url, plugins=[metrics]), asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def hold(req: dict[str, Any]) -> None:
        await release.wait()

    async with mesh:
        calls = [asyncio.create_task(mesh.call(name, {})) for _ in range(130)]
        async with asyncio.timeout(10):
            while (samples := await scraped(metrics))["oam_waiting", name] < 2:
                pass
        assert 130 == samples["oam_in_flight", name]
        release.set()
        await asyncio.gather(*calls)
        assert 0 == (await scraped(metrics))["oam_waiting", name]


async def test_the_lag_is_the_longest_of_the_last_minute(
    url: str, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lag of a blocked loop is still shown after further measurements."""
    period_s = 0.02
    monkeypatch.setattr("oam_metrics._LAG_PERIOD_S", period_s)
    async with AgentMesh(url, plugins=[metrics]):
        await asyncio.sleep(period_s / 2)  # within a measurement
        time.sleep(0.3)
        async with asyncio.timeout(10):
            while (longest := (await scraped(metrics))["oam_loop_lag_seconds",]) < 0.2:
                pass
        await asyncio.sleep(5 * period_s)  # within which it is measured again
        assert longest <= (await scraped(metrics))["oam_loop_lag_seconds",]


async def test_series_exist_for_the_verbs_of_an_agent(
    counted: AgentMesh, name: str, metrics: Metrics
) -> None:
    """The series of an agent's own verb exists from the start, others from their first request on."""

    async def verbs() -> dict[tuple[str, ...], float]:
        samples = await scraped(metrics)
        return {labels[1:]: value for labels, value in samples.items() if labels[0] == "oam_requests_total"}

    responder, streamer = f"{name}.responder", f"{name}.streamer"
    assert {(responder, "call"): 0, (streamer, "stream"): 0} == await verbs()
    await counted.send(responder, "hi")
    async with asyncio.timeout(10):
        while (responder, "send") not in (found := await verbs()):
            pass
    assert {(responder, "call"): 0, (responder, "send"): 1, (streamer, "stream"): 0} == found


def host_config(folder: Path, url: str) -> Config:
    section = HostSection(agents=["agents"], entry_points=False)
    return Config(folder=folder, mesh=MeshSection(url=url), host=section, plugins={"metrics": {"port": 0}})


async def test_reloads_are_counted_and_series_of_removed_agents_are_removed(
    url: str, mesh: AgentMesh, name: str, tmp_path: Path, metrics: Metrics
) -> None:
    """A completed and a refused reload are counted; an agent whose file was deleted has no series."""
    write(tmp_path / "agents", {"a.py": MESH + agent(f"{name}.a"), "b.py": MESH + agent(f"{name}.b")})
    async with Host(host_config(tmp_path, url), plugins=[metrics]) as host:
        await mesh.call(f"{name}.b", {})
        write(tmp_path / "agents", {"a.py": "1/0"})
        await host.reload()
        (tmp_path / "agents/b.py").unlink()
        await host.reload()
        await host.wait_retired()
        samples = await scraped(metrics)
        assert (1, 1) == (samples["oam_reloads_total", "done"], samples["oam_reloads_total", "refused"])
        names = {labels[1] for labels in samples if labels[1:2] and labels[1].startswith(name)}
        assert {f"{name}.a"} == names


async def test_a_scrape_does_not_wait_for_a_blocked_loop(
    counted: AgentMesh, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the event loop is blocked, a scrape returns the counts of requests."""
    monkeypatch.setattr("oam_metrics._SCRAPE_TIMEOUT_S", 0.05)
    address = f"http://127.0.0.1:{metrics.port}/metrics"
    # In the loop's own thread, so that the loop is blocked meanwhile.
    text = urllib.request.urlopen(address, timeout=5).read().decode()
    assert "oam_requests_total" in text
    await counted.catalog()


async def test_the_server_closes_with_the_mesh(url: str, metrics: Metrics) -> None:
    """After the mesh has closed, no server listens on the port."""
    async with AgentMesh(url, plugins=[metrics]):
        port = metrics.port
    assert 0 == metrics.port
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port))


async def test_a_port_in_use_fails_the_start(url: str) -> None:
    """The error names the plugin and the address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(PluginFailed, match=f"'metrics' cannot start: /metrics .* 127.0.0.1:{port}"):
            async with AgentMesh(url, plugins=[Metrics(Settings(port=port))]):
                pass


async def test_the_number_of_error_codes_is_limited(
    url: str, name: str, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the maximum number of codes of one agent, further codes are counted as `others`."""
    monkeypatch.setattr("oam_metrics._MAX_CODES", 2)
    mesh = AgentMesh(url, plugins=[metrics])

    @mesh.agent(AgentSpec(name=name))
    async def fail(number: int) -> None:
        error = MeshError("no")
        error.code = f"code_{number}"
        raise error

    async with mesh:
        for number in range(5):
            with pytest.raises(MeshError):
                await mesh.call(name, number)
        samples = await scraped(metrics)
        assert {"code_0": 1, "code_1": 1, "others": 3} == {
            labels[2]: value for labels, value in samples.items() if labels[0] == "oam_errors_total"
        }


async def test_a_late_request_of_a_removed_agent_restores_no_series(
    url: str, name: str, tmp_path: Path, metrics: Metrics
) -> None:
    """A request that fails after the agent's file was deleted creates no new series."""
    source = f"""{MESH}
import asyncio, events_{name} as events
@mesh.agent(AgentSpec(name={name!r}))
async def hold(req: dict) -> None:
    events.started.set()
    await events.release.wait()
    raise ValueError("late")
"""
    events: Any = ModuleType(f"events_{name}")
    events.started, events.release = asyncio.Event(), asyncio.Event()
    write(tmp_path / "agents", {"a.py": source})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, events.__name__, events)
        host_with_metrics = Host(host_config(tmp_path, url), plugins=[metrics])
        async with host_with_metrics as host, AgentMesh(url) as caller:
            calling = asyncio.create_task(caller.call(name, {}))
            await events.started.wait()
            (tmp_path / "agents" / "a.py").unlink()
            await host.reload()
            events.release.set()
            with pytest.raises(MeshError):
                await calling
            await host.wait_retired()
            assert [] == [labels for labels in await scraped(metrics) if name in labels]


async def test_errors_are_counted_by_the_code_of_the_reply(url: str, name: str, metrics: Metrics) -> None:
    """A timeout and an invalid result are counted by the codes that the caller receives."""
    async with AgentMesh(url, plugins=[metrics]) as mesh:

        @mesh.agent(AgentSpec(name=f"{name}.slow"))
        async def slow(req: dict[str, Any]) -> None:
            await asyncio.sleep(60)

        @mesh.agent(AgentSpec(name=f"{name}.invalid"))
        async def invalid(req: dict[str, Any]) -> int:
            return "no number"  # type: ignore[return-value] # an invalid result

        for agent, code in (("slow", "timeout"), ("invalid", "handler_error")):
            with pytest.raises(MeshError):
                await mesh.call(f"{name}.{agent}", {}, timeout=0.3)
            async with asyncio.timeout(10):
                while ("oam_errors_total", f"{name}.{agent}", code) not in await scraped(metrics):
                    await asyncio.sleep(0)
