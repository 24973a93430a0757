"""`mesh_check_candidate`: plugins check new versions of agents before they serve."""

import asyncio
from collections.abc import Awaitable, Sequence
from pathlib import Path

import pytest
from openagentmesh import Agent, AgentMesh, Host, MeshError, RecordedRequest, current_call, hookimpl

from tests.support.modules import MESH, Configure, agent
from tests.support.reloads import reload


class Check:
    """Compares the answers of both versions; raises MeshError for the answer 13, anything else for 0."""

    @hookimpl
    def mesh_check_candidate(self, agent: Agent, serving: Agent | None) -> Awaitable[Sequence[str]] | None:
        """Return None for new agents."""
        return None if serving is None else self._compare(agent, serving)

    async def _compare(self, agent: Agent, serving: Agent) -> list[str]:
        request = RecordedRequest(b"{}", {})
        before, after = await serving.answer(request, 5), await agent.answer(request, 5)
        if after == b"13":
            raise MeshError("unlucky", "13 is refused")
        return [f"{1 // int(after)} {before.decode()} → {after.decode()}"]


@pytest.mark.parametrize(
    ("result", "error", "notes"),
    [
        ("2", "", ["0 1 → 2"]),
        ("13", "13 is refused", []),
        ("0", "The plugin 'check' failed in mesh_check_candidate", []),
    ],
    ids=["note", "refused", "failed"],
)
async def test_a_plugin_checks_a_new_version_before_it_serves(  # noqa: PLR0913, PLR0917 - fixtures and parameters
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    result: str,
    error: str,
    notes: list[str],
) -> None:
    """It may run both versions; its notes are part of the result, and its errors refuse the reload."""
    async with Host(configure({"a.py": MESH + agent(name, "1")}), plugins=[Check()]) as host:
        reloaded = await reload(host, tmp_path, MESH + agent(name, result))
        assert (error in reloaded.error, bool(error), notes) == (True, bool(reloaded.error), reloaded.notes)
        assert int(1 if error else result) == await mesh.call(name, {})


class LeakyCheck(Check):
    """Also records whether a call is current after the answers."""

    def __init__(self) -> None:
        self.is_current: list[bool] = []

    async def _compare(self, agent: Agent, serving: Agent) -> list[str]:
        notes = await super()._compare(agent, serving)
        try:
            current_call()
        except RuntimeError:
            self.is_current.append(False)
        else:
            self.is_current.append(True)
        return notes


async def test_an_answer_for_a_check_is_no_call_of_the_check(
    configure: Configure, name: str, tmp_path: Path
) -> None:
    """Neither its identity nor its deadline applies to what the plugin, or the reload, does afterwards."""
    check = LeakyCheck()
    async with Host(configure({"a.py": MESH + agent(name, "1")}), plugins=[check]) as host:
        await reload(host, tmp_path, MESH + agent(name, "2"))
    assert [False] == check.is_current


class HangingCheck(Check):
    """Never ends."""

    async def _compare(self, agent: Agent, serving: Agent) -> list[str]:
        await asyncio.Event().wait()
        return await super()._compare(agent, serving)


async def test_a_check_that_hangs_refuses_the_reload(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """After the load timeout the error names the plugin, and further reloads are possible."""
    config = configure({"a.py": MESH + agent(name, "1")}, host={"load_timeout": 0.5})
    async with Host(config, plugins=[HangingCheck()]) as host:
        for result in ("2", "3"):
            reloaded = await reload(host, tmp_path, MESH + agent(name, result))
            assert "The plugin 'hangingcheck' failed in mesh_check_candidate" in reloaded.error
            assert "load_timeout is 0.5 s" in reloaded.error
        assert 1 == await mesh.call(name, {})
