"""Requests that the plugin `replay` repeats with a new version."""

import asyncio
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Host

from tests.support.host_bench import Bench
from tests.support.modules import MESH, Configure
from tests.support.reloads import reload, replay_settings, replayable_agent
from tests.support.waiting import until


async def test_replies_of_a_retired_version_are_not_compared(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Later versions are compared with the serving version's reply, though a retired one had answered."""
    finish = tmp_path / "finish"
    wait = f"import asyncio, pathlib\nFINISH = pathlib.Path({str(finish)!r})\nasync def wait(req):\n"
    wait += "    while req and not FINISH.exists():\n        await asyncio.sleep(0.005)\n"
    source = wait + replayable_agent(name, "await wait(req) or 'old'")
    async with Host(configure({"a.py": source}, **replay_settings())) as host:
        request = asyncio.create_task(mesh.call(name, {"slow": True}))
        await until(lambda: host.status().agents[0].in_flight)
        new = source.replace("'old'", "'new'")
        assert 1 == (await reload(host, tmp_path, new)).in_flight
        finish.touch()
        assert "old" == await request
        assert [] == (await reload(host, tmp_path, f"{new}\n# comment\n")).notes
        assert [f'{name}: {{"slow":true}} → "newer" (was "new")'] == (
            await reload(host, tmp_path, source.replace("'old'", "'newer'"))
        ).notes


@pytest.mark.parametrize("count", [5, 8])
async def test_replies_are_compared_with_their_own_requests(bench: Bench, count: int) -> None:
    """Requests that arrive during a reload and displace recorded ones are not mistaken for them."""

    def source(number: int) -> str:
        spec = f"@mesh.agent(AgentSpec(name={bench.name!r} + '.{{0}}', replayable=True))\n"
        first = spec.format("a") + "async def a(req: dict) -> object:\n    return req['n'] * 10\n"
        second = spec.format("b") + "async def b(req: dict) -> object:\n    await asyncio.sleep(0.3)\n"
        return f"import asyncio\n{MESH}{first}{second}# {number}\n"

    async with bench.serve({"x.py": source(0)}, **replay_settings()) as host:
        for number in range(5):
            await bench.call(".a", {"n": number})
        await bench.call(".b", {})
        bench.write({"x.py": source(1)})
        reloading = asyncio.create_task(host.reload())
        for number in range(count):
            await bench.call(".a", {"n": 100 + number})
        assert await reloading is not None
        assert [] == (await bench.reloaded({"x.py": source(2)})).notes
