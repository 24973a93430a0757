"""Retiring an old version: its requests finish, its publishers and watchers stop before new ones start."""

import asyncio
from functools import partial
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Cancelled, Host
from openagentmesh.protocol import subjects

from tests.support.host_bench import Ledger
from tests.support.meshes import listen
from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import reload
from tests.support.waiting import until

KINDS = pytest.mark.parametrize("kind", ["publisher", "watcher"])
WAITING = """import asyncio, ledger
from collections.abc import AsyncIterator
{mesh}
VERSION = {version!r}

@mesh.agent(AgentSpec(name="{name}.call"))
async def call(req: dict) -> list:
    before = VERSION
    if req:
        ledger.runs.append(before)
        await ledger.gate.wait()
    from _common import LATE
    return [before, VERSION, LATE]

@mesh.agent(AgentSpec(name="{name}.stream"))
async def stream(req: dict) -> AsyncIterator[str]:
    yield VERSION
    if req:
        ledger.runs.append(VERSION)
        await ledger.gate.wait()
    yield VERSION
"""


def waiting_agents(name: str, version: str) -> dict[str, str]:
    """A responder and a streamer that wait at the gate when their input is not empty."""
    return {
        "a.py": WAITING.format(mesh=MESH, version=version, name=name),
        "_common.py": f"LATE = {version!r}\n",
    }


async def test_requests_finish_on_their_version(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, ledger: Ledger
) -> None:
    """Requests and streams in flight use the old version, lazy imports included, and later ones the new."""

    async def stream(payload: dict[str, int]) -> list[str]:
        return [chunk async for chunk in mesh.stream(f"{name}.stream", payload)]

    async with Host(configure(waiting_agents(name, "old"), host={"drain_timeout": 20})) as host:
        assert ["old"] * 3 == await mesh.call(f"{name}.call", {})
        running = [asyncio.create_task(mesh.call(f"{name}.call", {"wait": 1})) for _ in range(3)]
        streaming = asyncio.create_task(stream({"wait": 1}))
        await until(lambda: 4 == len(ledger.runs))
        for number in (1, 2):  # with one and with two retiring versions
            write(tmp_path / "agents", waiting_agents(name, f"new{number}"))
            result = await reload(host, tmp_path)
            assert {1: 4, 2: 0}[number] == result.in_flight
            assert [f"new{number}"] * 3 == await mesh.call(f"{name}.call", {})
            assert [f"new{number}"] * 2 == await stream({})
        assert not any(task.done() for task in (*running, streaming))
        ledger.gate.set()
        assert [["old"] * 3] * 3 == await asyncio.gather(*running)
        assert ["old"] * 2 == await streaming
        del running, streaming
        await host.wait_retired()
        assert [] == [note for result in host.status().reloads for note in result.notes]


@pytest.mark.parametrize("is_removed", [False, True], ids=["replaced", "removed"])
async def test_requests_on_the_old_version_are_cancelled_after_the_drain_timeout(  # noqa: PLR0913 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, ledger: Ledger, *, is_removed: bool
) -> None:
    """Their callers get `Cancelled`, whether the agent was replaced or removed."""
    async with Host(configure(waiting_agents(name, "old"), host={"drain_timeout": 0.05})) as host:
        calls = [asyncio.create_task(mesh.call(f"{name}.call", {"wait": 1})) for _ in range(2)]
        await until(lambda: 2 == len(ledger.runs))
        if is_removed:
            (tmp_path / "agents/a.py").unlink()
        result = await reload(host, tmp_path, None if is_removed else waiting_agents(name, "new")["a.py"])
        assert 2 == result.in_flight
        assert "2 in flight on the old version" in result.text
        for call in calls:
            with pytest.raises(Cancelled, match="was stopped before it answered") as caught:
                await call
            assert (f"{name}.call", True) == (caught.value.agent, bool(caught.value.request_id))
        await host.wait_retired()


def background_agent(name: str, kind: str, body: str, version: str, cleanup: str = "pass") -> str:
    """A publisher or a watcher that records its start and its end, and runs `body` in between."""
    is_publisher = kind == "publisher"
    return f"""import asyncio, ledger
from collections.abc import AsyncIterator
{MESH}
@mesh.agent(AgentSpec(name={name!r}))
async def run() -> {"AsyncIterator[str]" if is_publisher else "None"}:
    ledger.runs.append("+{version}")
    try:
        {"yield " + repr(version) if is_publisher else "pass"}
        {body}
    finally:
        {cleanup}
        ledger.runs.append("-{version}")
"""


RUN_FOREVER = "await asyncio.Event().wait()"


@KINDS
async def test_a_new_background_agent_starts_after_the_old_one_has_ended(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, ledger: Ledger, kind: str
) -> None:
    """Publishers and watchers of two versions never run at the same time; clean-up included."""
    cleanup = "await asyncio.sleep(0.01)"
    async with Host(configure({"a.py": background_agent(name, kind, RUN_FOREVER, "0", cleanup)})) as host:
        for number in range(1, 6):
            await until(partial(ledger.runs.__contains__, f"+{number - 1}"))
            await reload(host, tmp_path, background_agent(name, kind, RUN_FOREVER, str(number), cleanup))
        await until(lambda: "+5" in ledger.runs)
    assert [f"{sign}{number}" for number in range(6) for sign in "+-"] == ledger.runs


IGNORE_CANCELLATION = """
        while not ledger.gate.is_set():
            try:
                await ledger.gate.wait()
            except asyncio.CancelledError:
                ledger.runs.append("cancelled")
"""


@KINDS
async def test_a_background_agent_that_ignores_its_cancellation_is_reported(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    name: str,
    tmp_path: Path,
    ledger: Ledger,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The new one starts after the grace period, and the reload's notes name the task that still runs."""
    monkeypatch.setattr("openagentmesh.serving.background._CANCEL_GRACE_S", 0.05)
    monkeypatch.setattr("openagentmesh.runtime.reload.retirement._PROBATION_S", 0.05)
    async with Host(
        configure({"a.py": background_agent(name, kind, IGNORE_CANCELLATION.strip(), "old")})
    ) as host:
        await until(lambda: ledger.runs)
        result = await reload(host, tmp_path, background_agent(name, kind, RUN_FOREVER, "new"))
        await until(lambda: "+new" in ledger.runs)
        assert ["+old", "cancelled", "+new"] == ledger.runs
        await host.wait_retired()
        (note,) = result.notes
        assert note.startswith("the task ")
        assert note.endswith("(run)")
        assert f"{name} did not stop within 0.05s and is left running" in caplog.messages
        ledger.gate.set()
        await until(lambda: "-old" in ledger.runs)


async def test_a_publisher_that_ignores_its_cancellation_publishes_nothing(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, ledger: Ledger
) -> None:
    """It is ended at its next event, which is not published."""
    events = await listen(mesh, subjects.events(name))
    body = """while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                yield "late"
"""
    async with Host(configure({"a.py": background_agent(name, "publisher", body, "old")})) as host:
        await until(lambda: ledger.runs)
        await reload(host, tmp_path, background_agent(name, "publisher", RUN_FOREVER, "new"))
        await until(lambda: "+new" in ledger.runs)
        assert ["+old", "-old", "+new"] == ledger.runs
        assert [b'"old"', b'"new"'] == [(await events.get()).body for _ in range(2)]


@KINDS
async def test_a_background_agent_that_fails_at_once_is_rolled_back(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, ledger: Ledger, kind: str
) -> None:
    """The old version serves again with its contract, and the reload is reported as refused."""
    spec, with_version = f"name={name!r}", f"name={name!r}, version='9.0.0'"
    async with Host(configure({"a.py": background_agent(name, kind, RUN_FOREVER, "old")})) as host:
        await until(lambda: ledger.runs)
        broken = background_agent(name, kind, "raise ValueError('not today')", "new").replace(
            spec, with_version
        )
        await reload(host, tmp_path, broken)
        await until(lambda: 5 == len(ledger.runs))
        await host.wait_retired()
        assert ["+old", "-old", "+new", "-new", "+old"] == ledger.runs
        error = f"{name} failed at once (ValueError: not today), so the old version runs again"
        assert [("outdated", error)] == [(module.state, module.error) for module in host.modules]
        assert error == host.status().reloads[-1].error
        assert "0.1.0" == (await mesh.contract(name)).version
        write(tmp_path / "agents", {"other.py": MESH + agent(f"{name}.other")})
        result = await host.reload()
        assert result is not None
        assert [f"{name}.other 0.1.0 new"] == result.agents
        assert 5 == len(ledger.runs)
        fixed = background_agent(name, kind, RUN_FOREVER, "fixed").replace(spec, with_version)
        assert f"{name} 0.1.0 → 9.0.0" in (await reload(host, tmp_path, fixed)).text
        await until(lambda: "+fixed" in ledger.runs)
        assert "9.0.0" == (await mesh.contract(name)).version
    assert ["-old", "+fixed", "-fixed"] == ledger.runs[5:]
