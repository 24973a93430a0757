"""Watchdog: reports name the agent that blocks the event loop, and no other agent."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from oam_watchdog import Settings, Watchdog
from openagentmesh import AgentMesh, AgentSpec, Host
from openagentmesh.runtime.config import Config, HostSection, MeshSection

from tests.support.modules import MESH, agent, write
from tests.support.waiting import until

Reports = Callable[[], list[str]]


@pytest.fixture
def reports(caplog: pytest.LogCaptureFixture) -> Reports:
    """The watchdog's log messages so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == "oam_watchdog"]


@pytest.fixture
def watched(url: str) -> Callable[..., AgentMesh]:
    """Creates meshes with a watchdog."""
    return lambda **settings: AgentMesh(url, plugins=[Watchdog(Settings(**settings))])


def report_of(reports: Reports, blocker: str) -> str:
    """The report that something blocks the loop; empty if there is none."""
    return next((text for text in reports() if f" s by {blocker};" in text), "")


async def block_until_reported(reports: Reports, blocker: str) -> None:
    """Block the loop repeatedly until it is reported: on a busy machine the watchdog may be late."""
    while not report_of(reports, blocker):
        time.sleep(0.3)
        await asyncio.sleep(0.05)


async def test_an_agent_that_blocks_is_reported(
    watched: Callable[..., AgentMesh], reports: Reports, name: str
) -> None:
    """Its name and line are reported while it blocks, and the duration afterwards."""
    mesh = watched()
    agent = f"agent '{name}'"
    during = ""

    @mesh.agent(AgentSpec(name=name))
    async def blocks() -> str:
        nonlocal during
        while not during:
            await asyncio.sleep(0.05)
            for _ in range(10):
                time.sleep(0.05)
                during = during or report_of(reports, agent)
        return "done"

    async with mesh:
        assert "done" == await mesh.call(name, timeout=30)
        await until(lambda: any("running again: blocked by agent" in text for text in reports()))
    assert "time.sleep(0.05)" in during
    assert "route.py" not in during  # the stack starts at the handler
    afterwards = next(text for text in reports() if f"running again: blocked by {agent} for" in text)
    assert float(afterwards.split()[-2]) >= 0.3


async def test_only_the_agent_that_blocks_is_reported(
    watched: Callable[..., AgentMesh], reports: Reports, name: str
) -> None:
    """An agent that awaits is not reported, although it runs at the same time as one that blocks."""
    mesh = watched(threshold=0.1)

    @mesh.agent(AgentSpec(name=f"{name}.awaits"))
    async def awaits() -> str:
        await asyncio.sleep(0.4)
        return "awaited"

    def helper() -> None:
        time.sleep(0.3)

    @mesh.agent(AgentSpec(name=f"{name}.blocks"))
    async def blocks() -> str:
        await asyncio.sleep(0.01)
        while not report_of(reports, f"agent '{name}.blocks'"):
            helper()
            await asyncio.sleep(0.05)
        return "blocked"

    async with mesh:
        answers = await asyncio.gather(*[mesh.call(f"{name}.{each}") for each in ("awaits", "blocks")])
    assert ["awaited", "blocked"] == answers
    assert not any(f"{name}.awaits" in text for text in reports())


async def test_nothing_is_reported_without_a_blocked_loop(
    watched: Callable[..., AgentMesh], reports: Reports, name: str
) -> None:
    """Agents that wait in the loop or in a thread, and many concurrent calls, are not reported."""
    mesh = watched(threshold=0.5)

    @mesh.agent(AgentSpec(name=f"{name}.loop"))
    async def on_the_loop() -> str:
        await asyncio.sleep(0.8)
        return "ok"

    @mesh.agent(AgentSpec(name=f"{name}.thread"))
    def in_a_thread() -> str:
        time.sleep(0.8)
        return "ok"

    async with mesh:
        names = [f"{name}.loop", f"{name}.thread"]
        assert ["ok"] * 40 == await asyncio.gather(*[mesh.call(each, timeout=30) for each in names * 20])
    assert not any(name in text for text in reports())


async def test_publishers_and_watchers_are_identified_by_their_code(
    watched: Callable[..., AgentMesh], reports: Reports, name: str
) -> None:
    """A publisher and a watcher run without a request, and are reported by their function."""
    mesh = watched(threshold=0.05)

    @mesh.agent(AgentSpec(name=f"{name}.publisher"))
    async def publisher() -> AsyncIterator[int]:
        await block_until_reported(reports, f"agent '{name}.publisher'")
        yield 1
        await asyncio.Event().wait()

    async with mesh:
        await until(lambda: report_of(reports, f"agent '{name}.publisher'"))

        @mesh.agent(AgentSpec(name=f"{name}.watcher"))
        async def watcher() -> None:
            await block_until_reported(reports, f"agent '{name}.watcher'")

        await until(lambda: report_of(reports, f"agent '{name}.watcher'"))


async def test_a_task_of_a_handler_is_identified_by_its_file(
    watched: Callable[..., AgentMesh], reports: Reports, name: str
) -> None:
    """A task that outlives its request is reported with the agents of its file."""
    mesh = watched(threshold=0.05)
    tasks: list[asyncio.Task[None]] = []

    async def later() -> None:
        await block_until_reported(reports, f"the code of agent '{name}'")

    @mesh.agent(AgentSpec(name=name))
    async def starts_a_task() -> str:
        tasks.append(asyncio.create_task(later()))
        return "ok"

    async with mesh:
        assert "ok" == await mesh.call(name)
        await until(lambda: report_of(reports, f"the code of agent '{name}'"))


PROGRAM = """
import asyncio, importlib, logging, sys, time
from oam_watchdog import Watchdog
from openagentmesh import AgentMesh, AgentSpec

mesh = AgentMesh(sys.argv[1], plugins=[Watchdog()])

@mesh.agent(AgentSpec(name=sys.argv[2]))
async def idle() -> None: ...

async def main():
    async with mesh:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        loop.call_later(0.1, time.sleep, 0.5)
        loop.call_later(1.0, done.set)
        await done.wait()

logging.basicConfig(stream=sys.stdout)
importlib.import_module(sys.argv[3]).run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_the_program_that_runs_the_loop_is_not_reported(
    url: str, name: str, tmp_path: Path, loop: str
) -> None:
    """Frames of the program that runs the loop do not identify an agent of the same file."""
    pytest.importorskip(loop)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), url, name, loop]
    ran = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, check=True
    )
    assert " s by code outside of all agents;" in ran.stdout
    assert name not in ran.stdout


def refuse(_self: object) -> Any:
    raise RuntimeError("working outside of a request")


# Web frameworks have such proxies of the current request.
Proxy = type("Proxy", (), {"__class__": property(refuse)})


async def test_any_object_on_a_stack_is_tolerated(
    watched: Callable[..., AgentMesh], reports: Reports, name: str
) -> None:
    """A local variable `call` of an author may be an object that raises when it is inspected."""
    mesh = watched(threshold=0.1)

    @mesh.agent(AgentSpec(name=name))
    async def blocks() -> str:
        call: object = Proxy()
        await block_until_reported(reports, f"agent '{name}'")
        return str(id(call))

    async with mesh:
        await mesh.call(name, timeout=30)
        assert ["oam-watchdog"] == [t.name for t in threading.enumerate() if t.name == "oam-watchdog"]


async def test_the_number_of_reports_per_minute_is_limited(
    watched: Callable[..., AgentMesh], reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than `reports` are logged per minute; the next report has the number of skipped ones."""
    mesh = watched(threshold=0.02, reports=2)

    async def block_until(count: int) -> None:
        while len(reports()) < 2 * count:  # each report is two messages
            time.sleep(0.1)
            await asyncio.sleep(0.1)

    async with mesh:
        await block_until(2)
        for _ in range(3):
            time.sleep(0.1)
            await asyncio.sleep(0.1)
        assert 4 == len(reports())
        monkeypatch.setattr("oam_watchdog._MINUTE_S", 0.0)
        await block_until(3)
    assert "reports skipped.)" in reports()[4]


async def test_a_changed_threshold_applies_and_the_thread_ends_with_the_host(
    url: str, mesh: AgentMesh, reports: Reports, name: str, tmp_path: Path
) -> None:
    """A shorter threshold applies from the next check on; no thread is left after the host has stopped."""
    write(tmp_path / "agents", {"a.py": "import time\n" + MESH + agent(name, "time.sleep(0.3)")})
    config = Config(
        folder=tmp_path,
        mesh=MeshSection(url=url),
        host=HostSection(agents=["agents"], entry_points=False),
        plugins={"watchdog": {"threshold": 2}},
    )
    async with Host(config, plugins=[Watchdog()]) as host:
        await mesh.call(name, {})
        assert [] == reports()
        host.plugins.configure({"watchdog": {"threshold": 0.05}}, tmp_path)
        while not report_of(reports, f"agent '{name}'"):  # until the running check has ended
            await mesh.call(name, {})
    await until(lambda: not [t for t in threading.enumerate() if t.name == "oam-watchdog"])
