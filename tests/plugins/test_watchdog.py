"""Watchdog: who blocks the event loop is named, and nobody else."""

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

Told = Callable[[], list[str]]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    """What the watchdog said so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == "oam_watchdog"]


@pytest.fixture
def watched(url: str) -> Callable[..., AgentMesh]:
    """Makes meshes with a watchdog."""
    return lambda **settings: AgentMesh(url, plugins=[Watchdog(Settings(**settings))])


def named(told: Told, who: str) -> str:
    """The report that `who` blocks the loop; empty when there is none."""
    return next((text for text in told() if f" s by {who};" in text), "")


async def stand_still(told: Told, who: str) -> None:
    """Block the loop until it is said who does: again and again, for a busy machine may do so, too."""
    while not named(told, who):
        time.sleep(0.3)
        await asyncio.sleep(0.05)


async def test_an_agent_that_blocks_is_named(
    watched: Callable[..., AgentMesh], told: Told, name: str
) -> None:
    """Its name and the line where it stands are told while it stands there, and in the end for how long."""
    mesh = watched()
    agent = f"agent '{name}'"
    during = ""

    @mesh.agent(AgentSpec(name=name))
    async def sleepy() -> str:
        nonlocal during
        while not during:
            await asyncio.sleep(0.05)
            for _ in range(10):
                time.sleep(0.05)
                during = during or named(told, agent)
        return "awake"

    async with mesh:
        assert "awake" == await mesh.call(name, timeout=30)
        await until(lambda: any("running again: blocked by agent" in text for text in told()))
    assert "time.sleep(0.05)" in during
    assert "route.py" not in during  # from the handler on
    over = next(text for text in told() if f"running again: blocked by {agent} for" in text)
    assert float(over.split()[-2]) >= 0.3


async def test_of_two_agents_the_one_that_blocks_is_named(
    watched: Callable[..., AgentMesh], told: Told, name: str
) -> None:
    """Who waits as one should is never told of, though it is at work at the same time."""
    mesh = watched(threshold=0.1)

    @mesh.agent(AgentSpec(name=f"{name}.good"))
    async def good() -> str:
        await asyncio.sleep(0.4)
        return "good"

    def helper() -> None:
        time.sleep(0.3)

    @mesh.agent(AgentSpec(name=f"{name}.bad"))
    async def bad() -> str:
        await asyncio.sleep(0.01)
        while not named(told, f"agent '{name}.bad'"):
            helper()
            await asyncio.sleep(0.05)
        return "bad"

    async with mesh:
        answers = await asyncio.gather(*[mesh.call(f"{name}.{each}") for each in ("good", "bad")])
    assert ["good", "bad"] == answers
    assert not any("good" in text for text in told())


async def test_nobody_is_named_when_nobody_blocks(
    watched: Callable[..., AgentMesh], told: Told, name: str
) -> None:
    """Agents that wait, in the loop or in a thread, and many calls, are no reason for a word."""
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
    assert not any(name in text for text in told())


async def test_who_runs_by_itself_is_named(watched: Callable[..., AgentMesh], told: Told, name: str) -> None:
    """A publisher and a watcher that block have no request, and are found by their code."""
    mesh = watched(threshold=0.05)

    @mesh.agent(AgentSpec(name=f"{name}.publisher"))
    async def publishes() -> AsyncIterator[int]:
        await stand_still(told, f"agent '{name}.publisher'")
        yield 1
        await asyncio.Event().wait()

    async with mesh:
        await until(lambda: named(told, f"agent '{name}.publisher'"))

        @mesh.agent(AgentSpec(name=f"{name}.watcher"))
        async def watches() -> None:
            await stand_still(told, f"agent '{name}.watcher'")

        await until(lambda: named(told, f"agent '{name}.watcher'"))


async def test_a_task_that_a_handler_leaves_is_found_by_its_file(
    watched: Callable[..., AgentMesh], told: Told, name: str
) -> None:
    """Nothing but its code says whose it is, so the agents of that file are named."""
    mesh = watched(threshold=0.05)
    left: list[asyncio.Task[None]] = []

    async def later() -> None:
        await stand_still(told, f"the code of agent '{name}'")

    @mesh.agent(AgentSpec(name=name))
    async def leaves() -> str:
        left.append(asyncio.create_task(later()))
        return "ok"

    async with mesh:
        assert "ok" == await mesh.call(name)
        await until(lambda: named(told, f"the code of agent '{name}'"))


PROGRAM = """
import asyncio, importlib, logging, sys, time
from oam_watchdog import Watchdog
from openagentmesh import AgentMesh, AgentSpec

mesh = AgentMesh(sys.argv[1], plugins=[Watchdog()])

@mesh.agent(AgentSpec(name=sys.argv[2]))
async def innocent() -> None: ...

async def main():
    async with mesh:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        loop.call_later(0.1, time.sleep, 0.5)
        loop.call_later(1.0, over.set)
        await over.wait()

logging.basicConfig(stream=sys.stdout)
importlib.import_module(sys.argv[3]).run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_the_program_that_runs_the_loop_is_not_blamed(
    url: str, name: str, tmp_path: Path, loop: str
) -> None:
    """In one file with agents, it stands below all that happens, also when something else blocks."""
    pytest.importorskip(loop)
    (tmp_path / "program.py").write_text(PROGRAM)
    run = [sys.executable, str(tmp_path / "program.py"), url, name, loop]
    done = await asyncio.to_thread(
        subprocess.run, run, capture_output=True, text=True, timeout=60, check=True
    )
    assert " s by code outside of all agents;" in done.stdout
    assert name not in done.stdout


def refuse(_self: object) -> Any:
    raise RuntimeError("working outside of a request")


# As those of web frameworks.
Proxy = type("Proxy", (), {"__class__": property(refuse)})


async def test_whatever_lies_on_a_stack_it_goes_on_watching(
    watched: Callable[..., AgentMesh], told: Told, name: str
) -> None:
    """An author's local may be called as one of ours, and be something that nobody can look at."""
    mesh = watched(threshold=0.1)

    @mesh.agent(AgentSpec(name=name))
    async def blocks() -> str:
        call: object = Proxy()
        await stand_still(told, f"agent '{name}'")
        return str(id(call))

    async with mesh:
        await mesh.call(name, timeout=30)
        assert ["oam-watchdog"] == [t.name for t in threading.enumerate() if t.name == "oam-watchdog"]


async def test_no_more_reports_than_there_may_be(
    watched: Callable[..., AgentMesh], told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are told; a minute later the next one says how many were not."""
    mesh = watched(threshold=0.02, reports=2)

    async def stand_still_for_reports(number: int) -> None:
        while len(told()) < 2 * number:  # each has an end, too
            time.sleep(0.1)
            await asyncio.sleep(0.1)

    async with mesh:
        await stand_still_for_reports(2)
        for _ in range(3):
            time.sleep(0.1)
            await asyncio.sleep(0.1)
        assert 4 == len(told())
        monkeypatch.setattr("oam_watchdog._MINUTE_S", 0.0)
        await stand_still_for_reports(3)
    assert "reports skipped.)" in told()[4]


async def test_its_threshold_follows_and_its_thread_ends(
    url: str, mesh: AgentMesh, told: Told, name: str, tmp_path: Path
) -> None:
    """What is long depends on the settings in force; the thread ends with its host."""
    write(tmp_path / "agents", {"a.py": "import time\n" + MESH + agent(name, "time.sleep(0.3)")})
    config = Config(
        folder=tmp_path,
        mesh=MeshSection(url=url),
        host=HostSection(agents=["agents"], entry_points=False),
        plugins={"watchdog": {"threshold": 2}},
    )
    async with Host(config, plugins=[Watchdog()]) as host:
        await mesh.call(name, {})
        assert [] == told()
        host.plugins.configure({"watchdog": {"threshold": 0.05}}, tmp_path)
        while not named(told, f"agent '{name}'"):  # the look that is under way is not long any more
            await mesh.call(name, {})
    await until(lambda: not [t for t in threading.enumerate() if t.name == "oam-watchdog"])
