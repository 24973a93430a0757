"""Plugins of a host: enabled and configured in mesh.toml, and applied to agents in every reload."""

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
from openagentmesh.runtime.loading import plugin_loader

from tests.support.modules import MESH, WORD_PLUGIN, Configure, agent, write
from tests.support.reloads import replay_settings

Toml = Callable[..., Callable[[], Config]]


@pytest.fixture
def toml(tmp_path: Path, url: str) -> Toml:
    """Writes mesh.toml and the plugin `word` beside it; returns a function that reads it."""

    def write_toml(text: str = "", plugins: str = '["./word.py"]') -> Callable[[], Config]:
        write(tmp_path, {"word.py": WORD_PLUGIN})
        head = f"mesh.url = {url!r}\nhost.entry_points = false\nhost.plugins = {plugins}\n"
        (tmp_path / "mesh.toml").write_text(head + text)
        return partial(load_config, tmp_path / "mesh.toml")

    return write_toml


def host_of(read: Callable[[], Config]) -> Host:
    """A host with this config, which follows changes of its mesh.toml."""
    config = read()
    return Host(config, config_file=config.folder / "mesh.toml", read_config=read)


async def reloaded(host: Host) -> ReloadResult:
    """Reload a host in which something has changed."""
    result = await host.reload()
    assert result is not None
    return result


async def test_a_plugin_in_a_file_wraps_all_agents(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A file named in mesh.toml protects every agent, with its settings, before and after a reload."""
    write(tmp_path / "agents", {"a.py": MESH + agent(name)})
    async with host_of(toml("plugins.word.word = 'now'")) as host:
        for _ in range(2):
            with pytest.raises(PermissionDenied):
                await mesh.call(name, {})
            assert "ok" == await mesh.call(name, {}, headers={"word": "now"})
            write(tmp_path / "agents", {"a.py": MESH + agent(name) + "# comment\n"})
            await host.reload()
        write(tmp_path / "agents", {"b.py": MESH + agent(f"{name}.b")})
        await reloaded(host)
        await host.node.wait_served()
        with pytest.raises(PermissionDenied):
            await mesh.call(f"{name}.b", {})


async def test_new_settings_are_applied(toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path) -> None:
    """New settings are in force after the reload; invalid and refused ones change nothing."""
    write(tmp_path / "agents", {"a.py": MESH + agent(name)})
    async with host_of(toml("plugins.word.word = 'one'")) as host:
        toml("plugins.word.word = 'two'")
        assert "" == (await reloaded(host)).error
        assert "ok" == await mesh.call(name, {}, headers={"word": "two"})
        for invalid, error in [
            ("plugins.word.word = 'invalid'", "'word' failed in mesh_configure: invalid word"),
            ("plugins.word.wrod = 'x'", "plugins.word.wrod"),
        ]:
            toml(invalid)
            assert error in (await reloaded(host)).error
            assert "ok" == await mesh.call(name, {}, headers={"word": "two"})
        toml("plugins.word.word = 'three'")
        write(tmp_path / "agents", {"a.py": "1/0"})
        assert "ZeroDivisionError" in (await reloaded(host)).error
        assert "ok" == await mesh.call(name, {}, headers={"word": "two"})


async def test_a_plugin_has_settings_per_agent(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A plugin's table of one agent is validated by the plugin, applies to that agent, and can be changed."""
    write(tmp_path / "agents", {"a.py": MESH + agent(f"{name}.a") + agent(f"{name}.b")})
    table = f"[agents.'{name}.a'.plugins.word]\nfree = "
    async with host_of(toml(table + "true")) as host:
        assert "ok" == await mesh.call(f"{name}.a", {})
        with pytest.raises(PermissionDenied):
            await mesh.call(f"{name}.b", {})
        toml(table + "[]")
        assert f'[agents."{name}.a".plugins.word] is invalid: free' in (await reloaded(host)).error
        toml(table + "false")
        assert [f"{name}.a 0.1.0"] == (await reloaded(host)).agents
        with pytest.raises(PermissionDenied):
            await mesh.call(f"{name}.a", {})


async def test_an_agent_without_its_middleware_does_not_serve(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A failing middleware hook fails the module at the start, and refuses the edit in a reload."""
    write(tmp_path / "agents", {"a.py": MESH + agent(name), "b.py": MESH + agent(f"{name}.unsupported")})
    async with host_of(toml()) as host:
        assert {"agents/a.py": "serving", "agents/b.py": "failed"} == {
            module.origin.display_name: module.state for module in host.modules
        }
        error = "The plugin 'word' failed in mesh_middleware: unsupported agent"
        assert [error] == [module.error for module in host.modules if module.error]
        write(tmp_path / "agents", {"a.py": MESH + agent(f"{name}.more.unsupported")})
        assert error == (await reloaded(host)).error
        assert "ok" == await mesh.call(name, {}, headers={"word": "please"})


@pytest.mark.parametrize(
    ("plugins", "settings", "error"),
    [
        ('["nope"]', "", "the plugin 'nope' is not installed"),
        ('["./nope.py"]', "", "there is no file"),
        ('["./broken.py"]', "", "ZeroDivisionError"),
        ('["./word.py"]', "plugins.word.word = 5", "plugins.word.word: input should be a valid string"),
        ('["./word.py"]', "plugins.word.word = 'invalid'", "invalid word"),
        ('["./quits.py"]', "", "'./quits.py' cannot be loaded: SystemExit"),
        ('["./models.py"]', "", "returned 7 from mesh_settings; expected a pydantic model"),
        ('["./word.py", "./team/word.py"]', "", "two plugins are named 'word'"),
    ],
    ids=[
        "not-installed",
        "missing-file",
        "failing-import",
        "invalid-settings",
        "failing-configuration",
        "exit",
        "invalid-settings-model",
        "duplicate-name",
    ],
)
async def test_an_unusable_plugin_fails_the_start(
    toml: Toml, tmp_path: Path, plugins: str, settings: str, error: str
) -> None:
    """The error names the plugin and the reason; `check` raises the same without a server."""
    models = "from openagentmesh import hookimpl\n@hookimpl\ndef mesh_settings():\n    return 7\n"
    write(tmp_path, {"broken.py": "1/0\n", "quits.py": "raise SystemExit(0)\n", "models.py": models})
    write(tmp_path, {"agents/a.py": MESH})
    host = host_of(toml(settings, plugins))
    with pytest.raises((PluginFailed, ConfigError), match=error):
        await host.start()
    with pytest.raises((PluginFailed, ConfigError), match=error):
        await host.check()


async def test_a_plugin_without_its_dependency_names_the_extra_to_install(
    toml: Toml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the command that installs the missing package."""
    entry = EntryPoint("heavy", "not_installed_at_all:Heavy", plugin_loader.GROUP)
    monkeypatch.setattr(plugin_loader, "entry_points", lambda **_: [entry])
    with pytest.raises(PluginFailed, match=r"pip install 'openagentmesh\[heavy\]'"):
        await host_of(toml("", '["heavy"]')).start()


async def test_settings_of_disabled_plugins_are_warnings(
    toml: Toml, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A table of a plugin that is not enabled is logged, because it has no effect."""
    write(tmp_path / "agents", {"a.py": MESH + agent(name)})
    async with host_of(toml(f"plugins.auth.x = 1\n[agents.'{name}'.plugins.limit]\nrate = 1")):
        assert "mesh.toml has [plugins.auth], but [host] plugins does not enable it" in caplog.text
        assert f"[agents.{name}.plugins.limit], but [host] plugins does not enable it" in caplog.text


class Recorder:
    """Records hook calls and requests; its hook for completed reloads fails."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    @hookimpl
    def mesh_reloaded(self, result: ReloadResult) -> None:
        self.events.append(("reloaded", result.files))
        raise RuntimeError("a plugin's own failure")

    @hookimpl
    def mesh_reload_failed(self, result: ReloadResult) -> None:
        self.events.append(("failed", result.files))

    @hookimpl
    def mesh_agent_unloaded(self, name: str) -> None:
        self.events.append(("unloaded", name))

    @hookimpl
    def mesh_middleware(self, agent: Agent) -> Middleware:
        def middleware(inner: Endpoint) -> Endpoint:
            async def endpoint(call: Call) -> Any:
                self.events.append(("called", agent.contract.version))
                return await inner(call)

            return endpoint

        return middleware


async def test_plugins_are_notified_of_reloads(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Hooks are called for reloads, refusals and removed agents; their exceptions do not affect the host."""
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
        ] == recorder.events
    assert ("unloaded", f"{name}.other") == recorder.events[-1]


async def test_replayed_requests_bypass_plugins(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Replayed requests were authorized and counted when they were received."""
    recorder = Recorder()
    source = f"{MESH}@mesh.agent(AgentSpec(name={name!r}, replayable=True))\n"
    source += "async def handler(req: dict) -> int:\n    return 1\n"
    async with Host(configure({"a.py": source}, **replay_settings()), plugins=[recorder]) as host:
        await mesh.call(name, {})
        await mesh.call(name, {})
        write(tmp_path / "agents", {"a.py": source.replace("return 1", "return 2")})
        assert 2 == len((await reloaded(host)).notes)
        assert 2 == recorder.events.count(("called", "0.1.0"))


async def test_settings_of_a_plugin_without_settings_are_an_error(toml: Toml, tmp_path: Path) -> None:
    """A table of a plugin that has no settings is rejected with its name."""
    write(tmp_path, {"plain.py": "from openagentmesh import hookimpl\n@hookimpl\ndef mesh_cli(app): ...\n"})
    with pytest.raises(MeshError, match="The plugin 'plain' has no settings"):
        await host_of(toml("plugins.plain.x = 1", '["./plain.py"]')).start()


async def test_a_rolled_back_version_has_the_current_plugin_settings(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A version that is restored by a rollback gets the settings in force, not those of its first start."""
    source = f"""import asyncio
from collections.abc import AsyncIterator
{MESH}{agent(name)}
@mesh.agent(AgentSpec(name="{name}.pub"))
async def pub() -> AsyncIterator[int]:
    START
    await asyncio.sleep(60)
    yield 1
"""
    write(tmp_path, {"agents/a.py": source.replace("START", "pass")})
    table = f"[agents.'{name}'.plugins.word]\nfree = "
    async with host_of(toml(table + "true")) as host:
        assert "ok" == await mesh.call(name, {})
        toml(table + "false")
        write(tmp_path, {"agents/a.py": source.replace("START", "raise ValueError('failure')")})
        await reloaded(host)
        await host.wait_retired()
        assert "so the old version runs again" in host.status().reloads[-1].error
        with pytest.raises(PermissionDenied):
            await mesh.call(name, {})


FILE_PLUGIN = """
from pathlib import Path
from pydantic import BaseModel, FilePath
from openagentmesh import hookimpl
class Settings(BaseModel):
    file: FilePath
@hookimpl
def mesh_settings(): return Settings
@hookimpl
def mesh_configure(settings): settings.file.read_text()
@hookimpl
def mesh_middleware(agent):
    if agent.name.endswith("unsupported"): raise LookupError("unsupported agent")
"""


async def test_unchanged_settings_are_not_validated_again(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing file in unchanged settings blocks no reload; when they cannot be restored, that is logged."""
    write(tmp_path, {"agents/a.py": MESH + agent(name), "key.py": FILE_PLUGIN, "one": "", "two": ""})
    async with host_of(toml(f"plugins.key.file = '{tmp_path}/one'", '["./key.py"]')) as host:
        (tmp_path / "one").unlink()
        write(tmp_path, {"agents/a.py": MESH + agent(name, "'new'")})
        assert "" == (await reloaded(host)).error
        assert "new" == await mesh.call(name, {})
        toml(f"plugins.key.file = '{tmp_path}/two'", '["./key.py"]')
        write(tmp_path, {"agents/a.py": MESH + agent(name) + agent(f"{name}.unsupported")})
        assert "unsupported agent" in (await reloaded(host)).error
    assert "previous settings not restored" in caplog.text


async def test_disabled_agents_need_no_middleware(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A disabled agent that a plugin does not support does not fail its module."""
    write(tmp_path / "agents", {"a.py": MESH + agent(name) + agent(f"{name}.unsupported")})
    async with host_of(toml(f"agents.'{name}.unsupported'.enabled = false")) as host:
        assert ["serving"] == [module.state for module in host.modules]
        assert "ok" == await mesh.call(name, {}, headers={"word": "please"})


async def test_plugins_are_notified_of_agents_of_refused_versions(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """`mesh_agent_unloaded` is called for agents of a refused version, which have never served."""

    class Rejecting(Recorder):
        @hookimpl
        def mesh_middleware(self, agent: Agent) -> Middleware:
            if agent.name.endswith("rejected"):
                raise PermissionDenied("no policy for this agent")
            return super().mesh_middleware(agent)

    plugin = Rejecting()
    async with Host(configure({"a.py": MESH + agent(name)}), plugins=[plugin]) as host:
        write(tmp_path / "agents", {"a.py": MESH + agent(f"{name}.new") + agent(f"{name}.rejected")})
        assert "'rejecting' failed in mesh_middleware: no policy" in (await reloaded(host)).error
        unloaded = {agent_name for event, agent_name in plugin.events if event == "unloaded"}
        assert {f"{name}.new", f"{name}.rejected"} == unloaded
        assert "ok" == await mesh.call(name, {})


async def test_agents_declared_at_runtime_belong_to_their_module(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Their agents are withdrawn by a reload of their own module, not of another."""
    late = f"""
@mesh.agent(AgentSpec(name="{name}"))
async def starter(req: dict) -> str:
    @mesh.agent(AgentSpec(name="{name}.late"))
    async def late(req: dict) -> str:
        return "late"
    return "started"
"""
    other = MESH + agent(f"{name}.b")
    async with Host(configure({"a.py": MESH + late, "b.py": other})) as host:
        await mesh.call(name, {})
        await host.node.wait_served()
        write(tmp_path / "agents", {"b.py": other + "# comment"})
        await reloaded(host)
        await host.wait_retired()
        assert "late" == await mesh.call(f"{name}.late", {})
        write(tmp_path / "agents", {"a.py": MESH + late + "# comment"})
        assert f"{name}.late withdrawn" in (await reloaded(host)).agents


async def test_a_module_with_a_plugin_that_is_not_enabled_fails(
    toml: Toml, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A module that enables a plugin for itself is not served without it; enabled in mesh.toml, it is."""
    source = "from openagentmesh import AgentMesh, AgentSpec\nfrom oam_limits import Limits\n"
    source += "mesh = AgentMesh(plugins=[Limits()])\n" + agent(name)
    write(tmp_path / "agents", {"a.py": source})
    async with host_of(toml()) as host:
        [module] = host.modules
        assert "failed" == module.state
        assert "uses the plugin 'limits'" in module.error
        assert "[host] plugins" in module.error
    async with host_of(toml(plugins="['limits']")) as host:
        assert ["serving"] == [module.state for module in host.modules]
        assert name == host.agents[0].name
