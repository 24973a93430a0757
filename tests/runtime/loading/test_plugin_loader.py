"""Plugins of a host: named in mesh.toml, given their settings, around agents through every reload."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import (
    Agent,
    AgentMesh,
    Call,
    Endpoint,
    Host,
    Middleware,
    PermissionDenied,
    PluginFailed,
    ReloadResult,
    hookimpl,
)
from openagentmesh.protocol.errors import MeshError
from openagentmesh.runtime.config import Config, ConfigError, load_config
from openagentmesh.runtime.loading import plugin_loader as finding

from tests.support.modules import MESH, WORD_PLUGIN, Configure, agent, write
from tests.support.reloads import replay_settings


@pytest.fixture
def toml(tmp_path: Path, url: str) -> Callable[..., Callable[[], Config]]:
    """Write mesh.toml and the plugin beside it; gives what reads it."""

    def write_toml(text: str = "", plugins: str = '["./word.py"]') -> Callable[[], Config]:
        write(tmp_path, {"word.py": WORD_PLUGIN})
        head = f"mesh.url = {url!r}\nhost.entry_points = false\nhost.plugins = {plugins}\n"
        (tmp_path / "mesh.toml").write_text(head + text)
        return partial(load_config, tmp_path / "mesh.toml")

    return write_toml


def hosting(read: Callable[[], Config]) -> Host:
    config = read()
    return Host(config, config_file=config.folder / "mesh.toml", read_config=read)


async def reloaded(host: Host) -> ReloadResult:
    outcome = await host.reload()
    assert outcome is not None
    return outcome


Toml = Callable[..., Callable[[], Config]]


async def test_a_plugin_of_a_file_is_around_all_agents(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A file named in mesh.toml protects every agent, with its settings, before and after a reload."""
    write(tmp_path / "agents", {"a.py": MESH + agent(name)})
    async with hosting(toml("plugins.word.word = 'now'")) as host:
        for _ in range(2):
            with pytest.raises(PermissionDenied):
                await mesh.call(name, {})
            assert "ok" == await mesh.call(name, {}, headers={"word": "now"})
            write(tmp_path / "agents", {"a.py": MESH + agent(name) + "# again\n"})
            await host.reload()
        write(tmp_path / "agents", {"b.py": MESH + agent(f"{name}.b")})
        await reloaded(host)
        await host.node.wait_served()
        with pytest.raises(PermissionDenied):
            await mesh.call(f"{name}.b", {})


async def test_settings_follow_mesh_toml(toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path) -> None:
    """New settings are in force with the reload; refused and unfitting ones change nothing and are told."""
    write(tmp_path / "agents", {"a.py": MESH + agent(name)})
    async with hosting(toml("plugins.word.word = 'one'")) as host:
        toml("plugins.word.word = 'two'")
        assert "" == (await reloaded(host)).error
        assert "ok" == await mesh.call(name, {}, headers={"word": "two"})
        for broken, why in [
            ("plugins.word.word = 'cursed'", "'word' failed in mesh_configure: not this word"),
            ("plugins.word.wrod = 'x'", "plugins.word.wrod"),
        ]:
            toml(broken)
            assert why in (await reloaded(host)).error
            assert "ok" == await mesh.call(name, {}, headers={"word": "two"})
        toml("plugins.word.word = 'three'")
        write(tmp_path / "agents", {"a.py": "1/0"})
        assert "ZeroDivisionError" in (await reloaded(host)).error
        assert "ok" == await mesh.call(name, {}, headers={"word": "two"})


async def test_agents_have_settings_of_their_own(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A plugin's table of one agent is for that agent, follows mesh.toml, and is validated by the plugin."""
    write(tmp_path / "agents", {"a.py": MESH + agent(f"{name}.a") + agent(f"{name}.b")})
    table = f"[agents.'{name}.a'.plugins.word]\nfree = "
    async with hosting(toml(table + "true")) as host:
        assert "ok" == await mesh.call(f"{name}.a", {})
        with pytest.raises(PermissionDenied):
            await mesh.call(f"{name}.b", {})
        toml(table + "[]")
        assert f'[agents."{name}.a".plugins.word] is invalid: free' in (await reloaded(host)).error
        toml(table + "false")
        assert [f"{name}.a 0.1.0"] == (await reloaded(host)).agents
        with pytest.raises(PermissionDenied):
            await mesh.call(f"{name}.a", {})


async def test_an_agent_that_cannot_be_protected_does_not_serve(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """At the start its module fails, in a reload the old version goes on; others are not concerned."""
    write(tmp_path / "agents", {"a.py": MESH + agent(name), "b.py": MESH + agent(f"{name}.unwatchable")})
    async with hosting(toml()) as host:
        assert {"agents/a.py": "serving", "agents/b.py": "failed"} == {
            module.origin.display_name: module.state for module in host.modules
        }
        why = "The plugin 'word' failed in mesh_middleware: cannot watch this one"
        assert [why] == [module.error for module in host.modules if module.error]
        write(tmp_path / "agents", {"a.py": MESH + agent(f"{name}.more.unwatchable")})
        assert why == (await reloaded(host)).error
        assert "ok" == await mesh.call(name, {}, headers={"word": "please"})


@pytest.mark.parametrize(
    ("plugins", "text", "why"),
    [
        ('["nope"]', "", "the plugin 'nope' is not installed"),
        ('["./nope.py"]', "", "there is no file"),
        ('["./broken.py"]', "", "ZeroDivisionError"),
        ('["./word.py"]', "plugins.word.word = 5", "plugins.word.word: input should be a valid string"),
        ('["./word.py"]', "plugins.word.word = 'cursed'", "not this word"),
        ('["./quits.py"]', "", "'./quits.py' cannot be loaded: SystemExit"),
        ('["./models.py"]', "", "returned 7 from mesh_settings; expected a pydantic model"),
        ('["./word.py", "./team/word.py"]', "", "two plugins are named 'word'"),
    ],
)
async def test_a_plugin_that_cannot_be_used_stops_the_start(
    toml: Toml, tmp_path: Path, plugins: str, text: str, why: str
) -> None:
    """It is named with the reason, and `check` says the same without a server."""
    models = "from openagentmesh import hookimpl\n@hookimpl\ndef mesh_settings():\n    return 7\n"
    write(tmp_path, {"broken.py": "1/0\n", "quits.py": "raise SystemExit(0)\n", "models.py": models})
    write(tmp_path, {"agents/a.py": MESH})
    host = hosting(toml(text, plugins))
    with pytest.raises((PluginFailed, ConfigError), match=why):
        await host.start()
    with pytest.raises((PluginFailed, ConfigError), match=why):
        await host.check()


async def test_an_installed_plugin_that_lacks_a_package_says_what_to_install(
    toml: Toml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing is named with the extra that brings it."""
    entry = EntryPoint("heavy", "not_installed_at_all:Heavy", finding.GROUP)
    monkeypatch.setattr(finding, "entry_points", lambda **_: [entry])
    with pytest.raises(PluginFailed, match=r"pip install 'openagentmesh\[heavy\]'"):
        await hosting(toml("", '["heavy"]')).start()


async def test_what_is_said_of_no_plugin_is_told(
    toml: Toml, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A table of a plugin that is not enabled is named, so that nobody thinks it protects."""
    write(tmp_path / "agents", {"a.py": MESH + agent(name)})
    async with hosting(toml(f"plugins.auth.x = 1\n[agents.'{name}'.plugins.limit]\nrate = 1")):
        assert "mesh.toml has [plugins.auth], but [host] plugins does not enable it" in caplog.text
        assert f"[agents.{name}.plugins.limit], but [host] plugins does not enable it" in caplog.text


class Recorder:
    """Is told of reloads and of agents that are gone, and fails each time."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    @hookimpl
    def mesh_reloaded(self, result: ReloadResult) -> None:
        self.told.append(("reloaded", result.files))
        raise RuntimeError("a plugin's own failure")

    @hookimpl
    def mesh_reload_failed(self, result: ReloadResult) -> None:
        self.told.append(("failed", result.files))

    @hookimpl
    def mesh_agent_unloaded(self, name: str) -> None:
        self.told.append(("unloaded", name))

    @hookimpl
    def mesh_middleware(self, agent: Agent) -> Middleware:
        def middleware(inner: Endpoint) -> Endpoint:
            async def endpoint(call: Call) -> Any:
                self.told.append(("called", agent.contract.version))
                return await inner(call)

            return endpoint

        return middleware


async def test_plugins_are_told_of_reloads(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Of good and refused ones and of agents that are gone; what they raise then harms nobody."""
    recorder = Recorder()
    async with Host(configure({"a.py": MESH + agent(name)}), plugins=[recorder]) as host:
        write(tmp_path / "agents", {"a.py": MESH + agent(f"{name}.other")})
        assert "" == (await reloaded(host)).error
        await host.wait_retired()
        write(tmp_path / "agents", {"a.py": "1/0"})
        assert (await reloaded(host)).error
        assert [
            ("unloaded", name),
            ("reloaded", ["agents/a.py"]),
            ("failed", ["agents/a.py"]),
        ] == recorder.told
    assert ("unloaded", f"{name}.other") == recorder.told[-1]


async def test_replays_pass_no_plugin(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """What is replayed was let in once, and counts nowhere again."""
    recorder = Recorder()
    source = f"{MESH}@mesh.agent(AgentSpec(name={name!r}, replayable=True))\n"
    source += "async def handler(req: dict) -> int:\n    return 1\n"
    async with Host(configure({"a.py": source}, **replay_settings()), plugins=[recorder]) as host:
        await mesh.call(name, {})
        await mesh.call(name, {})
        write(tmp_path / "agents", {"a.py": source.replace("return 1", "return 2")})
        assert 2 == len((await reloaded(host)).notes)
        assert 2 == recorder.told.count(("called", "0.1.0"))


async def test_plugins_without_settings_take_none(toml: Toml, tmp_path: Path) -> None:
    """A table of a plugin that has no settings is named."""
    write(tmp_path, {"plain.py": "from openagentmesh import hookimpl\n@hookimpl\ndef mesh_cli(app): ...\n"})
    with pytest.raises(MeshError, match="The plugin 'plain' has no settings"):
        await hosting(toml("plugins.plain.x = 1", '["./plain.py"]')).start()


async def test_what_goes_back_is_within_the_plugins_of_now(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A version that comes back because the new one failed at once has today's settings, not its own."""
    source = (
        MESH
        + agent(name)
        + f"""
@mesh.agent(AgentSpec(name="{name}.pub"))
async def pub() -> AsyncIterator[int]:
    FIRST
    await asyncio.sleep(60)
    yield 1
"""
    )
    source = "import asyncio\nfrom collections.abc import AsyncIterator\n" + source
    write(tmp_path, {"agents/a.py": source.replace("FIRST", "pass")})
    table = f"[agents.'{name}'.plugins.word]\nfree = "
    async with hosting(toml(table + "true")) as host:
        assert "ok" == await mesh.call(name, {})
        toml(table + "false")
        write(tmp_path, {"agents/a.py": source.replace("FIRST", "raise ValueError('at once')")})
        await reloaded(host)
        await host.wait_retired()
        assert "so the old version runs again" in [each.error for each in host.status().reloads][-1]
        with pytest.raises(PermissionDenied):
            await mesh.call(name, {})


FILE = """
from pathlib import Path
from pydantic import BaseModel, FilePath
from openagentmesh import hookimpl
from tests.support.reloads import replay_settings
class Settings(BaseModel):
    file: FilePath
@hookimpl
def mesh_settings(): return Settings
@hookimpl
def mesh_configure(settings): settings.file.read_text()
@hookimpl
def mesh_middleware(agent):
    if agent.name.endswith("unwatchable"): raise LookupError("cannot watch this one")
"""


async def test_settings_that_did_not_change_are_not_looked_at(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that a plugin needs and that is away for a moment holds up no reload, nor what goes back."""
    write(tmp_path, {"agents/a.py": MESH + agent(name), "key.py": FILE, "one": "", "two": ""})
    async with hosting(toml(f"plugins.key.file = '{tmp_path}/one'", '["./key.py"]')) as host:
        (tmp_path / "one").unlink()
        write(tmp_path, {"agents/a.py": MESH + agent(name, "'new'")})
        assert "" == (await reloaded(host)).error
        assert "new" == await mesh.call(name, {})
        toml(f"plugins.key.file = '{tmp_path}/two'", '["./key.py"]')
        write(tmp_path, {"agents/a.py": MESH + agent(name) + agent(f"{name}.unwatchable")})
        assert "cannot watch this one" in (await reloaded(host)).error
    assert "previous settings not restored" in caplog.text


async def test_disabled_agents_are_nobodys_business(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """An agent that a plugin cannot take, and that is disabled, keeps its module from nothing."""
    write(tmp_path / "agents", {"a.py": MESH + agent(name) + agent(f"{name}.unwatchable")})
    async with hosting(toml(f"agents.'{name}.unwatchable'.enabled = false")) as host:
        assert ["serving"] == [module.state for module in host.modules]
        assert "ok" == await mesh.call(name, {}, headers={"word": "please"})


async def test_agents_of_refused_versions_are_forgotten(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A plugin that was asked about an agent that never served is told that it does not."""

    class Picky(Recorder):
        @hookimpl
        def mesh_middleware(self, agent: Agent) -> Middleware:
            if agent.name.endswith("bad"):
                raise PermissionDenied("no policy for this one")
            return super().mesh_middleware(agent)

    picky = Picky()
    async with Host(configure({"a.py": MESH + agent(name)}), plugins=[picky]) as host:
        write(tmp_path / "agents", {"a.py": MESH + agent(f"{name}.new") + agent(f"{name}.bad")})
        assert "'picky' failed in mesh_middleware: no policy" in (await reloaded(host)).error
        unloaded = {what for kind, what in picky.told if kind == "unloaded"}
        assert {f"{name}.new", f"{name}.bad"} == unloaded
        assert "ok" == await mesh.call(name, {})


async def test_what_a_module_declares_while_it_runs_goes_with_that_module(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Another file's reload takes it away from nobody; its own does."""
    late = f"""
@mesh.agent(AgentSpec(name="{name}"))
async def boot(req: dict) -> str:
    @mesh.agent(AgentSpec(name="{name}.late"))
    async def late(req: dict) -> str:
        return "late"
    return "booted"
"""
    other = MESH + agent(f"{name}.b")
    async with Host(configure({"a.py": MESH + late, "b.py": other})) as host:
        await mesh.call(name, {})
        await host.node.wait_served()
        write(tmp_path / "agents", {"b.py": other + "# touched"})
        await reloaded(host)
        await host.wait_retired()
        assert "late" == await mesh.call(f"{name}.late", {})
        write(tmp_path / "agents", {"a.py": MESH + late + "# touched"})
        assert f"{name}.late withdrawn" in (await reloaded(host)).agents


async def test_a_module_brings_no_plugin_that_is_not_enabled(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """What it would protect alone is not served unprotected here; enabled in mesh.toml, it is the host's."""
    source = "from openagentmesh import AgentMesh, AgentSpec\nfrom oam_limits import Limits\n"
    source += "mesh = AgentMesh(plugins=[Limits()])\n" + agent(name)
    write(tmp_path / "agents", {"a.py": source})
    async with hosting(toml()) as host:
        [module] = host.modules
        assert "failed" == module.state
        assert "uses the plugin 'limits'" in module.error
        assert "[host] plugins" in module.error
    async with hosting(toml(plugins="['limits']")) as host:
        assert ["serving"] == [module.state for module in host.modules]
        assert name == host.agents[0].name
