"""`mesh.dispose` releases the resources of a version, once, when its last request has ended."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import AgentMesh, Host

from tests.support.host_bench import Bench, Ledger
from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import reload
from tests.support.waiting import until

DISPOSE = """
@mesh.dispose
{kind} dispose():
    with open({path!r}, "a") as file:
        file.write({text!r})
    {last}
"""


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("last", ["pass", "1 / 0", "raise SystemExit"], ids=["completes", "raises", "exits"])
async def test_a_version_is_disposed_of_once_after_its_last_request(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    kind: str,
    last: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a reload and at the stop, always after the last request; a failure is logged."""
    events = tmp_path / "events"

    def source(text: str) -> str:
        handler = f"""
@mesh.agent(AgentSpec(name={name!r}))
async def handler(req: dict) -> str:
    import asyncio, pathlib
    path = pathlib.Path({str(tmp_path)!r}) / req["wait_for"]
    path.with_suffix(".started").touch()
    while not path.exists():
        await asyncio.sleep(0.001)
    with open({str(events)!r}, "a") as file:
        file.write("r")
    return {text!r}
"""
        return MESH + DISPOSE.format(kind=kind, path=str(events), text=text, last=last) + handler

    async def start_request(file: str) -> "asyncio.Task[Any]":
        task = asyncio.create_task(mesh.call(name, {"wait_for": file}))
        await until((tmp_path / file).with_suffix(".started").exists)
        return task

    host = Host(configure({"a.py": source("1")}))
    async with host:
        first = await start_request("one")
        assert 1 == (await reload(host, tmp_path, source("2"))).in_flight
        assert not events.exists()
        (tmp_path / "one").touch()
        assert "1" == await first
        await host.wait_retired()
        assert "r1" == events.read_text()
        second = await start_request("two")
        (tmp_path / "two").touch()
        assert "2" == await second
    assert "r1r2" == events.read_text()
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert (0 if last == "pass" else 2) == len(errors)
    assert all("disposal function dispose failed" in record.getMessage() for record in errors)


async def test_a_stop_disposes_of_retiring_versions(
    configure: Configure, name: str, tmp_path: Path, ledger: Ledger
) -> None:
    """Each version is disposed of once, even if the old one was still draining."""
    source = (
        f"import asyncio, ledger\n{MESH}@mesh.agent(AgentSpec(name={name!r}))\n"
        "async def publisher() -> int:\n    while True:\n"
        "        yield NUMBER\n        await asyncio.sleep(9)\n"
        "@mesh.dispose\ndef dispose():\n    ledger.runs.append('NUMBER')\n"
    )
    async with Host(configure({"a.py": source.replace("NUMBER", "1")}, host={"drain_timeout": 0})) as host:
        write(tmp_path / "agents", {"a.py": source.replace("NUMBER", "2")})
        assert (await host.reload()) is not None
    assert ["1", "2"] == ledger.runs


async def test_a_stop_during_a_disposal_calls_the_remaining_functions(bench: Bench) -> None:
    """The stop cancels a running disposal function and calls the next ones."""
    source = (
        f"import asyncio, ledger\n{MESH}{agent(bench.name)}@mesh.dispose\nasync def first():\n"
        "    ledger.runs.append('first')\n    await asyncio.sleep(60)\n"
        "@mesh.dispose\ndef second():\n    ledger.runs.append('second')\n"
    )
    async with bench.serve({"a.py": source}, drain_timeout=0.1):
        await bench.reloaded({"a.py": MESH + agent(bench.name, "2")})
        await until(lambda: bench.ledger.runs)
    assert ["first", "second"] == bench.ledger.runs
