"""Changes of mesh.toml while a host runs: what is applied, what is refused, what needs a restart."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from openagentmesh import AgentDied, AgentMesh, Host, NotFound
from openagentmesh.hooks.reload_result import ReloadResult
from openagentmesh.runtime.config import load_config

from tests.support.host_bench import RUN, Ledger
from tests.support.modules import MESH, agent, write
from tests.support.reloads import until_answers

Serve = Callable[..., AbstractAsyncContextManager[Host]]
Edit = Callable[[Host, str], Awaitable[ReloadResult]]
SETTINGS = """
import ledger
from pydantic import BaseModel
class Settings(BaseModel):
    word: str = "none"
ledger.runs.append(__file__.rpartition("/")[2])
settings = mesh.settings(Settings)
"""


@pytest.fixture
def serve(tmp_path: Path, url: str) -> Serve:
    """A host that serves `agents/` with this mesh.toml."""

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
    """The text of a mesh.toml."""
    return f"mesh.url = {url!r}\nhost.entry_points = false\n" + toml


@pytest.fixture
def edit(tmp_path: Path, url: str) -> Edit:
    """Writes mesh.toml, and reloads."""

    async def edit_(host: Host, toml: str) -> ReloadResult:
        (tmp_path / "mesh.toml").write_text(with_url(url, toml))
        result = await host.reload()
        assert result is not None
        return result

    return edit_


async def test_new_limits_are_applied_without_executing_files(
    serve: Serve, edit: Edit, name: str, ledger: Ledger
) -> None:
    """New limits apply to the agents concerned, whose files are not executed again."""
    files = {"a.py": RUN + MESH + agent(f"{name}.a"), "b.py": RUN + MESH + agent(f"{name}.b")}
    async with serve(files, "host.agents = ['agents']") as host:
        assert ["a", "b"] == ledger.executed()
        result = await edit(host, f"[agents.'{name}.a']\nconcurrency = 3\ntimeout = 7\n")
        assert (["mesh.toml"], [f"{name}.a 0.1.0"]) == (result.files, result.agents)
        limits = {agent.name: agent.limits for agent in host.agents}
        assert (3, 7) == (limits[f"{name}.a"].concurrency, limits[f"{name}.a"].timeout)
        assert (128, 60) == (limits[f"{name}.b"].concurrency, limits[f"{name}.b"].timeout)
        await edit(host, "limits.concurrency = 5\n")
        assert {5} == {agent.limits.concurrency for agent in host.agents}
        assert [] == ledger.executed()


async def test_an_agent_is_disabled_and_enabled(serve: Serve, edit: Edit, mesh: AgentMesh, name: str) -> None:
    """`enabled = false` withdraws an agent like a deleted file, `true` serves it again."""
    files = {"a.py": MESH + agent(f"{name}.a") + agent(f"{name}.b")}
    async with serve(files) as host:
        result = await edit(host, f"[agents.'{name}.a']\nenabled = false\n")
        assert [f"{name}.a withdrawn"] == result.agents
        await host.wait_retired()
        with pytest.raises((NotFound, AgentDied)):
            await mesh.call(f"{name}.a", {})
        assert "ok" == await mesh.call(f"{name}.b", {})
        assert [f"{name}.a 0.1.0 new"] == (await edit(host, "")).agents
        await host.node.wait_served()
        assert "ok" == await mesh.call(f"{name}.a", {})


async def test_new_settings_reload_their_module(
    serve: Serve, edit: Edit, mesh: AgentMesh, name: str, ledger: Ledger
) -> None:
    """New settings execute their module only; invalid ones are refused."""
    source = MESH + SETTINGS
    files = {
        "a.py": source + agent(f"{name}.a", "settings.word"),
        "b.py": source + agent(f"{name}.b", "settings.word"),
    }
    async with serve(files, "settings.a.word = 'one'") as host:
        assert ("one", "none") == (await mesh.call(f"{name}.a", {}), await mesh.call(f"{name}.b", {}))
        ledger.runs.clear()
        await edit(host, "settings.a.word = 'two'")
        assert (["a.py"], "two") == (ledger.runs, await mesh.call(f"{name}.a", {}))
        refused = await edit(host, "settings.a.word = [1]")
        assert "word" in refused.error
        assert ("two", "none") == (await mesh.call(f"{name}.a", {}), await mesh.call(f"{name}.b", {}))
        ledger.runs.clear()
        await edit(host, "settings.a.word = 'three'\nsettings.zzz.x = 1")
        assert (["a.py"], "three") == (ledger.runs, await mesh.call(f"{name}.a", {}))
        assert [True] == ["there is no module 'zzz'" in note for note in host.status().reloads[-1].notes]


async def test_folders_are_added_and_removed(
    serve: Serve, edit: Edit, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """The agents of an added folder serve, those of a removed one are withdrawn."""
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
    "unknown-key": ("host.nam = 'x'", "host.nam: unknown key; did you mean 'name'?"),
    "wrong-type": ("limits.timeout = 'soon'", "limits.timeout"),
    "missing-variable": ("host.name = '${OAM_TEST_IS_NOT_SET}'", "OAM_TEST_IS_NOT_SET"),
    "missing-folder": ("host.agents = ['nowhere']", "nowhere"),
}


@pytest.mark.parametrize("defect", INVALID)
async def test_an_invalid_file_is_refused_and_reported_once(
    serve: Serve, edit: Edit, mesh: AgentMesh, name: str, defect: str
) -> None:
    """The previous settings stay in force; the error is reported again only after a valid file."""
    toml, error = INVALID[defect]
    async with serve({"a.py": MESH + agent(name)}, "limits.queue = 7") as host:
        assert error in (await edit(host, toml)).error
        assert await host.reload() is None
        assert 7 == host.agents[0].limits.queue
        assert "ok" == await mesh.call(name, {})
        await edit(host, "limits.queue = 8")
        assert 8 == host.agents[0].limits.queue
        assert error in (await edit(host, toml)).error


async def test_a_deleted_file_is_an_error_until_it_is_written_again(
    serve: Serve, tmp_path: Path, url: str, name: str
) -> None:
    """Without mesh.toml the previous settings stay in force, and a new file is applied."""
    async with serve({"a.py": MESH + agent(name)}, "limits.queue = 7") as host:
        (tmp_path / "mesh.toml").unlink()
        result = await host.reload()
        assert result is not None
        assert "mesh.toml cannot be read" in result.error
        assert 7 == host.agents[0].limits.queue
        (tmp_path / "mesh.toml").write_text(with_url(url, "limits.queue = 9"))
        result = await host.reload()
        assert result is not None
        assert ("", 9) == (result.error, host.agents[0].limits.queue)


async def test_settings_that_need_a_restart_are_reported(serve: Serve, edit: Edit, name: str) -> None:
    """Keys that a running host cannot apply are named while they differ from those at its start."""
    async with serve({"a.py": MESH + agent(name)}) as host:
        result = await edit(host, "server.port = 5\nhost.name = 'other'\nhost.drain_timeout = 3")
        assert ["mesh.toml: restart the host to apply [server] port, [host] name"] == result.notes
        assert 3 == host.config.host.drain_timeout
        assert [] == (await edit(host, "host.drain_timeout = 4")).notes


async def test_a_new_contract_policy_is_applied(
    serve: Serve, edit: Edit, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A breaking change that was refused is served after the policy has changed."""
    breaking = {"a.py": (MESH + agent(name)).replace("req: dict", "req: list[int]")}
    async with serve({"a.py": MESH + agent(name)}, "host.contract = 'refuse'") as host:
        write(tmp_path / "agents", breaking)
        result = await host.reload()
        assert result is not None
        assert "callers would break" in result.error
        result = await edit(host, "host.contract = 'warn'")
        assert "" == result.error
        [note] = result.notes
        assert note.startswith(f"{name} breaks callers: ")
        assert "ok" == await mesh.call(name, [1])


async def test_the_watcher_reloads_mesh_toml(
    serve: Serve, mesh: AgentMesh, name: str, tmp_path: Path, url: str
) -> None:
    """A saved mesh.toml is applied, and files in a folder that it adds are watched."""
    async with serve({"a.py": MESH + agent(f"{name}.a")}, watch=True):
        write(tmp_path / "more", {"b.py": MESH + agent(f"{name}.b", "1")})
        (tmp_path / "mesh.toml").write_text(with_url(url, "host.agents = ['agents', 'more']"))
        await until_answers(mesh, f"{name}.b", 1)
        write(tmp_path / "more", {"b.py": MESH + agent(f"{name}.b", "2")})
        await until_answers(mesh, f"{name}.b", 2)


async def test_a_reload_by_name_does_not_apply_mesh_toml(
    tmp_path: Path, url: str, name: str, mesh: AgentMesh
) -> None:
    """Changes of mesh.toml are not applied with one module, but by the next reload."""
    toml = f"mesh.url = {url!r}\nhost.entry_points = false\n"
    (tmp_path / "mesh.toml").write_text(toml)
    write(tmp_path / "agents", {"a.py": MESH + agent(name)})
    read = partial(load_config, tmp_path / "mesh.toml")
    async with Host(read(), config_file=tmp_path / "mesh.toml", read_config=read) as host:
        (tmp_path / "mesh.toml").write_text(toml + "limits.queue = 3\n")
        await host.reload("a")
        assert 256 == host.agents[0].limits.queue
        await host.reload()
        assert 3 == host.agents[0].limits.queue
