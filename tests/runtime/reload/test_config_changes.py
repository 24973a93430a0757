"""mesh.toml edited while a host runs: what follows, what is refused, what needs a restart."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from openagentmesh import AgentDied, AgentMesh, Host, NotFound
from openagentmesh.hooks.reload_result import ReloadResult
from openagentmesh.runtime.config import load_config

from tests.support.modules import MESH, agent, write
from tests.support.reloads import until_answers

Serve = Callable[..., AbstractAsyncContextManager[Host]]
SETTINGS = """
import ledger
from pydantic import BaseModel
class Settings(BaseModel):
    word: str = "none"
ledger.runs.append(__file__.rpartition("/")[2])
settings = mesh.settings(Settings)
"""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were executed."""
    executed: list[str] = []
    monkeypatch.setitem(sys.modules, "ledger", SimpleNamespace(runs=executed))
    return executed


@pytest.fixture
def serve(tmp_path: Path, url: str) -> Serve:
    """A host that serves `agents/` as its mesh.toml says."""

    @asynccontextmanager
    async def serve_(files: dict[str, str], toml: str = "", *, watch: bool = False) -> AsyncIterator[Host]:
        write(tmp_path / "agents", files)
        (tmp_path / "mesh.toml").write_text(with_url(url, toml))
        read = partial(load_config, tmp_path / "mesh.toml")
        host = Host(read(), config_file=tmp_path / "mesh.toml", read_config=read, watch=watch)
        async with host:
            yield host

    return serve_


def with_url(url: str, toml: str) -> str:
    return f"mesh.url = {url!r}\nhost.entry_points = false\n" + toml


@pytest.fixture
def edit(tmp_path: Path, url: str) -> "Edit":
    """Write mesh.toml anew, and reload."""

    async def edit_(host: Host, toml: str) -> ReloadResult:
        (tmp_path / "mesh.toml").write_text(with_url(url, toml))
        outcome = await host.reload()
        assert outcome is not None
        return outcome

    return edit_


Edit = Callable[[Host, str], Awaitable[ReloadResult]]


async def test_limits_follow(serve: Serve, edit: Edit, name: str) -> None:
    """New limits hold for the agents that they concern, whose files are not executed again."""
    files = {"a.py": MESH + agent(f"{name}.a"), "b.py": MESH + agent(f"{name}.b")}
    async with serve(files, "host.agents = ['agents']") as host:
        outcome = await edit(host, f"[agents.'{name}.a']\nconcurrency = 3\ntimeout = 7\n")
        assert (["mesh.toml"], [f"{name}.a 0.1.0"]) == (outcome.files, outcome.agents)
        limits = {agent.name: agent.limits for agent in host.agents}
        assert (3, 7) == (limits[f"{name}.a"].concurrency, limits[f"{name}.a"].timeout)
        assert (128, 60) == (limits[f"{name}.b"].concurrency, limits[f"{name}.b"].timeout)
        await edit(host, "limits.concurrency = 5\n")
        assert {5} == {agent.limits.concurrency for agent in host.agents}


async def test_an_agent_is_turned_off_and_on(serve: Serve, edit: Edit, mesh: AgentMesh, name: str) -> None:
    """`enabled = false` withdraws an agent like a deleted file, true brings it back; others go on."""
    files = {"a.py": MESH + agent(f"{name}.a") + agent(f"{name}.b")}
    async with serve(files) as host:
        outcome = await edit(host, f"[agents.'{name}.a']\nenabled = false\n")
        assert [f"{name}.a withdrawn"] == outcome.agents
        await host.wait_retired()
        with pytest.raises((NotFound, AgentDied)):
            await mesh.call(f"{name}.a", {})
        assert "ok" == await mesh.call(f"{name}.b", {})
        assert [f"{name}.a 0.1.0 new"] == (await edit(host, "")).agents
        await host.node.wait_served()
        assert "ok" == await mesh.call(f"{name}.a", {})


async def test_settings_reload_the_module_that_has_them(
    serve: Serve, edit: Edit, mesh: AgentMesh, name: str, runs: list[str]
) -> None:
    """New settings execute exactly that module again; those that it does not take change nothing."""
    source = MESH + SETTINGS
    files = {
        "a.py": source + agent(f"{name}.a", "settings.word"),
        "b.py": source + agent(f"{name}.b", "settings.word"),
    }
    async with serve(files, "settings.a.word = 'one'") as host:
        assert ("one", "none") == (await mesh.call(f"{name}.a", {}), await mesh.call(f"{name}.b", {}))
        runs.clear()
        await edit(host, "settings.a.word = 'two'")
        assert (["a.py"], "two") == (runs, await mesh.call(f"{name}.a", {}))
        refused = await edit(host, "settings.a.word = [1]")
        assert "word" in refused.error
        assert ("two", "none") == (await mesh.call(f"{name}.a", {}), await mesh.call(f"{name}.b", {}))
        runs.clear()
        await edit(host, "settings.a.word = 'three'\nsettings.zzz.x = 1")
        assert (["a.py"], "three") == (runs, await mesh.call(f"{name}.a", {}))
        assert ["there is no module 'zzz'" in note for note in host.status().reloads[-1].notes] == [True]


async def test_folders_come_and_go(
    serve: Serve, edit: Edit, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A folder that is added brings its agents, one that is taken out takes them away."""
    async with serve({"a.py": MESH + agent(f"{name}.a")}) as host:
        write(tmp_path / "more", {"b.py": MESH + agent(f"{name}.b", "'more'")})
        await edit(host, "host.agents = ['agents', 'more']")
        await host.node.wait_served()
        assert "more" == await mesh.call(f"{name}.b", {})
        assert [f"{name}.a withdrawn"] == (await edit(host, "host.agents = ['more']")).agents
        await host.wait_retired()
        assert [f"{name}.b"] == [agent.name for agent in host.agents]


INVALID = {
    "syntax": ("[host\n", "is not TOML"),
    "unknown": ("host.nam = 'x'", "host.nam: unknown key; did you mean 'name'?"),
    "type": ("limits.timeout = 'soon'", "limits.timeout"),
    "variable": ("host.name = '${OAM_TEST_IS_NOT_SET}'", "OAM_TEST_IS_NOT_SET"),
    "folder": ("host.agents = ['nowhere']", "nowhere"),
}


@pytest.mark.parametrize("what", INVALID)
async def test_one_that_cannot_be_used_changes_nothing_and_is_told_once(
    serve: Serve, edit: Edit, mesh: AgentMesh, name: str, what: str
) -> None:
    """What was in force goes on; files are reloaded meanwhile; told again only when it comes again."""
    toml, why = INVALID[what]
    async with serve({"a.py": MESH + agent(name)}, "limits.queue = 7") as host:
        assert why in (await edit(host, toml)).error
        assert await host.reload() is None
        assert 7 == host.agents[0].limits.queue
        assert "ok" == await mesh.call(name, {})
        await edit(host, "limits.queue = 8")
        assert 8 == host.agents[0].limits.queue
        assert why in (await edit(host, toml)).error


async def test_one_that_is_deleted_and_made_again(serve: Serve, tmp_path: Path, url: str, name: str) -> None:
    """Without mesh.toml the last one is in force, and what is wrong is told; a new one is followed."""
    async with serve({"a.py": MESH + agent(name)}, "limits.queue = 7") as host:
        (tmp_path / "mesh.toml").unlink()
        outcome = await host.reload()
        assert outcome is not None
        assert "mesh.toml cannot be read" in outcome.error
        assert 7 == host.agents[0].limits.queue
        (tmp_path / "mesh.toml").write_text(with_url(url, "limits.queue = 9"))
        outcome = await host.reload()
        assert outcome is not None
        assert ("", 9) == (outcome.error, host.agents[0].limits.queue)


async def test_what_needs_a_restart_is_said(serve: Serve, edit: Edit, name: str) -> None:
    """Keys that a running host does not follow are named while they differ from those it started with."""
    async with serve({"a.py": MESH + agent(name)}) as host:
        outcome = await edit(host, "server.port = 5\nhost.name = 'other'\nhost.drain_timeout = 3")
        assert ["mesh.toml: restart the host to apply [server] port, [host] name"] == outcome.notes
        assert 3 == host.config.host.drain_timeout
        assert [] == (await edit(host, "host.drain_timeout = 4")).notes


async def test_the_contract_policy_follows(
    serve: Serve, edit: Edit, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """What a breaking contract comes to is what mesh.toml says when the file is saved."""
    breaking = {"a.py": (MESH + agent(name)).replace("req: dict", "req: list[int]")}
    async with serve({"a.py": MESH + agent(name)}, "host.contract = 'refuse'") as host:
        write(tmp_path / "agents", breaking)
        outcome = await host.reload()
        assert outcome is not None
        assert "callers would break" in outcome.error
        outcome = await edit(host, "host.contract = 'warn'")
        assert "" == outcome.error
        assert [f"{name} breaks callers" in note for note in outcome.notes]
        assert "ok" == await mesh.call(name, [1])


async def test_the_watcher_follows_mesh_toml(
    serve: Serve, mesh: AgentMesh, name: str, tmp_path: Path, url: str
) -> None:
    """Saved mesh.toml is followed without a word, and so are files in a folder that it has added."""
    async with serve({"a.py": MESH + agent(f"{name}.a")}, watch=True):
        write(tmp_path / "more", {"b.py": MESH + agent(f"{name}.b", "1")})
        (tmp_path / "mesh.toml").write_text(with_url(url, "host.agents = ['agents', 'more']"))
        await until_answers(mesh, f"{name}.b", 1)
        write(tmp_path / "more", {"b.py": MESH + agent(f"{name}.b", "2")})
        await until_answers(mesh, f"{name}.b", 2)
