"""The metrics plugin: what `/metrics` says agrees with what was done."""

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
    """A mesh with the plugin: a responder that fails where it is told to, and a streamer."""
    mesh = AgentMesh(url, plugins=[metrics])

    @mesh.agent(AgentSpec(name=f"{name}.asked"))
    async def asked(what: str) -> str:
        if what == "refuse":
            raise PermissionDenied("no")
        if what == "fail":
            raise ValueError("no")
        return what

    @mesh.agent(AgentSpec(name=f"{name}.counts"))
    async def counts(number: int) -> AsyncIterator[int]:
        for each in range(number):
            yield each

    async with mesh:
        yield mesh


async def test_the_numbers_agree_with_what_was_sent(counted: AgentMesh, name: str, metrics: Metrics) -> None:
    """Requests by agent and verb, errors by code, chunks; under load, and looked at meanwhile."""
    asked, counts = f"{name}.asked", f"{name}.counts"

    async def ask(what: Any) -> None:
        try:
            await counted.call(asked, what)
        except MeshError:
            assert what in {"refuse", "fail", 5}

    asking = asyncio.gather(*[ask(what) for what in ["hi"] * 300 + ["refuse"] * 20 + ["fail"] * 7 + [5] * 3])
    await scraped(metrics)
    await asking
    for number in (3, 4):
        assert number == len([chunk async for chunk in counted.stream(counts, number)])
    seen = await scraped(metrics)
    assert 330 == seen["oam_requests_total", asked, "call"]
    assert 330 == seen["oam_request_seconds_count", asked, "call"]
    assert 2 == seen["oam_requests_total", counts, "stream"]
    assert 7 == seen["oam_chunks_total", counts]
    errors = {labels[2]: value for labels, value in seen.items() if labels[0] == "oam_errors_total"}
    assert {"permission_denied": 20, "handler_error": 7, "invalid_input": 3} == errors
    assert 0 == seen["oam_in_flight", asked]
    assert (1, 0) == (seen["oam_connected",], seen["oam_reconnects_total",])


async def test_an_odd_code_breaks_no_scrape(url: str, name: str, metrics: Metrics) -> None:
    """An author's error may have any code: what is no text is replaced, and what is long is cut."""
    mesh = AgentMesh(url, plugins=[metrics])

    @mesh.agent(AgentSpec(name=name))
    async def odd(code: str) -> str:
        error = MeshError("odd")
        error.code = {"surrogate": "a\ud800b", "long": "x" * 10_000}[code]
        raise error

    async with mesh:
        for code in ("surrogate", "long"):
            with pytest.raises(MeshError):
                await mesh.call(name, code)
        seen = await scraped(metrics)
    errors = [labels[2] for labels in seen if labels[0] == "oam_errors_total"]
    assert {"a?b", "x" * 64} == set(errors)


async def test_what_is_under_way_and_waits_is_told(url: str, name: str, metrics: Metrics) -> None:
    """In flight are those that run and those that wait for their turn; what has no room is counted."""
    mesh, go = AgentMesh(url, plugins=[metrics]), asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def slow(req: dict[str, Any]) -> None:
        await go.wait()

    async with mesh:
        asking = [asyncio.create_task(mesh.call(name, {})) for _ in range(130)]
        async with asyncio.timeout(10):
            while (seen := await scraped(metrics))["oam_waiting", name] < 2:
                pass
        assert 130 == seen["oam_in_flight", name]
        go.set()
        await asyncio.gather(*asking)
        assert 0 == (await scraped(metrics))["oam_waiting", name]


async def test_a_standstill_is_seen_by_whoever_looks_later(
    url: str, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst lag of the last minute, not only of the last measurement."""
    beat = 0.02
    monkeypatch.setattr("oam_metrics._LAG_PERIOD_S", beat)
    async with AgentMesh(url, plugins=[metrics]):
        await asyncio.sleep(beat / 2)  # within a measurement
        time.sleep(0.3)
        async with asyncio.timeout(10):
            while (worst := (await scraped(metrics))["oam_loop_lag_seconds",]) < 0.2:
                pass
        await asyncio.sleep(5 * beat)  # within which it is measured again
        assert worst <= (await scraped(metrics))["oam_loop_lag_seconds",]


async def test_series_are_made_for_what_an_agent_does(
    counted: AgentMesh, name: str, metrics: Metrics
) -> None:
    """From the start those of its own verb; others once somebody comes with them."""

    async def verbs() -> dict[tuple[str, ...], float]:
        seen = await scraped(metrics)
        return {labels[1:]: value for labels, value in seen.items() if labels[0] == "oam_requests_total"}

    asked, counts = f"{name}.asked", f"{name}.counts"
    assert {(asked, "call"): 0, (counts, "stream"): 0} == await verbs()
    await counted.send(asked, "hi")
    async with asyncio.timeout(10):
        while (asked, "send") not in (seen := await verbs()):
            pass
    assert {(asked, "call"): 0, (asked, "send"): 1, (counts, "stream"): 0} == seen


async def test_reloads_are_counted_and_series_of_agents_that_are_gone_are_not(
    url: str, mesh: AgentMesh, name: str, tmp_path: Path, metrics: Metrics
) -> None:
    """A reload that was carried out, one that was refused, and an agent that was deleted."""
    write(tmp_path / "agents", {"a.py": MESH + agent(f"{name}.a"), "b.py": MESH + agent(f"{name}.b")})
    section = HostSection(agents=["agents"], entry_points=False)
    config = Config(
        folder=tmp_path, mesh=MeshSection(url=url), host=section, plugins={"metrics": {"port": 0}}
    )
    async with Host(config, plugins=[metrics]) as host:
        await mesh.call(f"{name}.b", {})
        write(tmp_path / "agents", {"a.py": "1/0"})
        await host.reload()
        (tmp_path / "agents/b.py").unlink()
        await host.reload()
        await host.wait_retired()
        seen = await scraped(metrics)
        assert (1, 1) == (seen["oam_reloads_total", "done"], seen["oam_reloads_total", "refused"])
        assert {f"{name}.a"} == {labels[1] for labels in seen if labels[1:2] and labels[1].startswith(name)}


async def test_a_scrape_does_not_wait_for_a_blocked_loop(
    counted: AgentMesh, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the event loop stands still the counts of requests are there all the same."""
    monkeypatch.setattr("oam_metrics._SCRAPE_TIMEOUT_S", 0.05)
    address = f"http://127.0.0.1:{metrics.port}/metrics"
    # On the loop's own thread: nothing else runs on it meanwhile.
    text = urllib.request.urlopen(address, timeout=5).read().decode()
    assert "oam_requests_total" in text
    await counted.catalog()


async def test_the_server_ends_with_the_mesh(url: str, metrics: Metrics) -> None:
    """Nothing listens before and after."""
    async with AgentMesh(url, plugins=[metrics]):
        port = metrics.port
    assert 0 == metrics.port
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port))


async def test_a_port_that_is_taken_stops_the_start(url: str) -> None:
    """It is named, with the plugin."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PluginFailed, match=f"'metrics' cannot start: /metrics .* 127.0.0.1:{port}"):
            async with AgentMesh(url, plugins=[Metrics(Settings(port=port))]):
                pass


async def test_kinds_of_errors_are_bounded(
    url: str, name: str, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that makes up codes fills no memory: from some number on they are counted together."""
    monkeypatch.setattr("oam_metrics._MAX_CODES", 2)
    mesh = AgentMesh(url, plugins=[metrics])

    @mesh.agent(AgentSpec(name=name))
    async def inventive(number: int) -> None:
        error = MeshError("no")
        error.code = f"code_{number}"
        raise error

    async with mesh:
        for number in range(5):
            with pytest.raises(MeshError):
                await mesh.call(name, number)
        seen = await scraped(metrics)
        assert {"code_0": 1, "code_1": 1, "others": 3} == {
            labels[2]: value for labels, value in seen.items() if labels[0] == "oam_errors_total"
        }


async def test_a_request_of_an_agent_that_is_gone_brings_no_series_back(
    url: str, name: str, tmp_path: Path, metrics: Metrics
) -> None:
    """Its file is deleted while it runs, and then it fails."""
    source = f"""{MESH}
import asyncio, ledger_{name} as ledger
@mesh.agent(AgentSpec(name={name!r}))
async def gone(req: dict) -> None:
    ledger.runs.set()
    await ledger.go.wait()
    raise ValueError("late")
"""
    ledger: Any = ModuleType(f"ledger_{name}")
    ledger.runs, ledger.go = asyncio.Event(), asyncio.Event()
    write(tmp_path / "agents", {"a.py": source})
    section = HostSection(agents=["agents"], entry_points=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, ledger.__name__, ledger)
        config = Config(
            folder=tmp_path, mesh=MeshSection(url=url), host=section, plugins={"metrics": {"port": 0}}
        )
        async with Host(config, plugins=[metrics]) as host, AgentMesh(url) as caller:
            asking = asyncio.create_task(caller.call(name, {}))
            await ledger.runs.wait()
            (tmp_path / "agents" / "a.py").unlink()
            await host.reload()
            ledger.go.set()
            with pytest.raises(MeshError):
                await asking
            await host.wait_retired()
            assert [] == [labels for labels in await scraped(metrics) if name in labels]


async def test_a_timeout_is_no_cancellation(url: str, name: str, metrics: Metrics) -> None:
    """Errors are counted by the code that the caller is told, and a reader that leaves makes none."""
    async with AgentMesh(url, plugins=[metrics]) as mesh:

        @mesh.agent(AgentSpec(name=f"{name}.naps"))
        async def naps(req: dict[str, Any]) -> None:
            await asyncio.sleep(60)

        @mesh.agent(AgentSpec(name=f"{name}.wrong"))
        async def wrong(req: dict[str, Any]) -> int:
            return "no number"  # type: ignore[return-value] # what is tested

        for agent, code in (("naps", "timeout"), ("wrong", "handler_error")):
            with pytest.raises(MeshError):
                await mesh.call(f"{name}.{agent}", {}, timeout=0.3)
            async with asyncio.timeout(10):
                while ("oam_errors_total", f"{name}.{agent}", code) not in await scraped(metrics):
                    await asyncio.sleep(0)
