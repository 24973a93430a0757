"""Starting and stopping a host: what it serves, which modules fail, and its status."""

import asyncio
import json
import logging
import os
import sys
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Cancelled, ConnectionFailed, Host, MeshError, NotFound
from openagentmesh.runtime.config import (
    AgentSection,
    Config,
    ConfigError,
    HostSection,
    LimitsSection,
    ServerSection,
)

from tests.support.meshes import pending_instance
from tests.support.modules import MESH, NO_SERVER, Configure, agent, write
from tests.support.reloads import reload


def served_agents(host: Host) -> list[str]:
    """The names of the agents of a host."""
    return [found.name for found in host.agents]


async def test_a_host_serves_files_and_packages_with_settings(
    configure: Configure, mesh: AgentMesh, name: str
) -> None:
    """Agents of all modules can be called while the host runs, and are not in the catalog afterwards."""
    source = f"from pydantic import BaseModel\n{MESH}class S(BaseModel):\n    word: str = 'no'\n"
    source += "s = mesh.settings(S)\n"
    config = configure(
        {
            "a.py": source + agent(f"{name}.a", "s.word") + "\nmesh.run()\n",
            "p/__init__.py": MESH + agent(f"{name}.p", "2"),
        },
        settings={"a": {"word": "yes"}},
    )
    async with Host(config) as host:
        assert [f"{name}.a", f"{name}.p"] == served_agents(host)
        assert ["yes", 2] == [await mesh.call(f"{name}.a", {}), await mesh.call(f"{name}.p", {})]
    assert [] == await mesh.catalog(channel=name)
    assert [] == served_agents(host)


async def test_agents_of_a_host_call_each_other(configure: Configure, mesh: AgentMesh, name: str) -> None:
    """In handlers a module's mesh uses the connection of the host."""
    files = {
        "a.py": MESH + agent(f"{name}.a", f"await mesh.call('{name}.b', {{}}) + 1"),
        "b.py": MESH + agent(f"{name}.b", "1"),
    }
    async with Host(configure(files)):
        assert 2 == await mesh.call(f"{name}.a", {})


async def test_a_failed_module_does_not_affect_others(
    configure: Configure, mesh: AgentMesh, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is in the log with its traceback, and in the status with file and line."""
    incomplete = MESH + agent(f"{name}.incomplete") + "\nundefined_name\n"
    async with Host(configure({"a.py": incomplete, "b.py": MESH + agent(f"{name}.b")})) as host:
        assert [f"{name}.b"] == served_agents(host)
        assert "ok" == await mesh.call(f"{name}.b", {})
        with pytest.raises(NotFound):
            await mesh.call(f"{name}.incomplete", {})
        failed, working = host.status().modules
    assert ("agents/a.py", "failed", 0, "NameError: name 'undefined_name' is not defined") == (
        failed.origin, failed.state, failed.agents, failed.error,
    )  # fmt: skip
    assert failed.line.endswith("agents/a.py:8")
    assert ("agents/b.py", "serving", 1, "") == (
        working.origin, working.state, working.agents, working.error,
    )  # fmt: skip
    [logged] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "agents/a.py failed to load: NameError" in logged
    assert "Traceback" in logged


async def test_a_duplicate_agent_name_fails_the_later_module(
    configure: Configure, mesh: AgentMesh, name: str
) -> None:
    """No agent of the later module serves, and the error names the agent and both places."""
    files = {
        "a.py": MESH + agent(name, "'first'"),
        "b.py": MESH + agent(f"{name}.other") + agent(name, "'second'"),
        "c.py": MESH + agent(f"{name}.c"),
    }
    config = configure(files)
    async with Host(config) as host:
        assert [name, f"{name}.c"] == served_agents(host)
        assert "first" == await mesh.call(name, {})
        second = host.modules[1]
    folder = config.folder / "agents"
    assert (
        f"agent '{name}' is declared twice: {folder}/a.py:4 has it, so {folder}/b.py:8 is refused"
        in second.error
    )
    assert ("failed", f"{folder}/b.py:8") == (second.state, second.line)


async def test_a_strict_host_does_not_start_with_a_failed_module(
    configure: Configure, mesh: AgentMesh, name: str
) -> None:
    """The error names every failed module with file and line, and no agent was served."""
    files = {
        "a.py": "import no_such_package\n",
        "b.py": MESH + agent(name),
        "c.py": "x = 1\n1 / 0\n",
        "d.py": MESH + agent(name),
    }
    host = Host(configure(files, host={"strict": True}))
    with pytest.raises(MeshError) as caught:
        await host.start()
    message = caught.value.message
    assert "start_failed" == caught.value.code
    assert "3 of 4 modules failed to load" in message
    for part in ("agents/a.py: ModuleNotFoundError", "a.py:1)", "agents/c.py: ZeroDivisionError", "c.py:2)"):
        assert part in message
    assert f"agents/d.py: agent '{name}' is declared twice" in message
    assert [] == served_agents(host)
    assert [] == await mesh.catalog(channel=name)


async def test_a_strict_host_starts_without_failed_modules(configure: Configure, name: str) -> None:
    """`strict` alone prevents no start."""
    async with Host(configure({"a.py": MESH + agent(name)}, host={"strict": True})) as host:
        assert [name] == served_agents(host)


async def test_a_disabled_agent_is_not_served(
    configure: Configure, mesh: AgentMesh, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`enabled = false` disables one agent of a module; settings of an unknown agent are a warning."""
    config = configure(
        {"a.py": MESH + agent(f"{name}.on") + agent(f"{name}.off")},
        agents={f"{name}.off": AgentSection(enabled=False), f"{name}.typo": AgentSection(queue=1)},
    )
    async with Host(config) as host:
        assert [f"{name}.on"] == served_agents(host)
        assert [f"{name}.on"] == [entry.name for entry in await mesh.catalog(channel=name)]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [f'mesh.toml has [agents."{name}.typo"], but no loaded module declares that agent'] == warnings


async def test_agents_have_the_limits_of_the_config(configure: Configure, name: str) -> None:
    """Each agent has the values of `[limits]`, overridden by those of its own section."""
    config = configure(
        {"a.py": MESH + agent(f"{name}.a") + agent(f"{name}.b")},
        limits=LimitsSection(concurrency=3, queue=4, timeout=5, restart_pause=1, restart_pause_max=2),
        agents={f"{name}.b": AgentSection(queue=9)},
    )
    async with Host(config) as host:
        limits = {found.name: found.limits for found in host.status().agents}
    common = {"concurrency": 3, "timeout": 5, "restart_pause": 1, "restart_pause_max": 2}
    assert {f"{name}.a": common | {"queue": 4}, f"{name}.b": common | {"queue": 9}} == limits


async def test_the_status_is_json(configure: Configure, mesh: AgentMesh, name: str) -> None:
    """The status has host, process, modules, agents and connection as JSON."""
    config = configure({"a.py": MESH + agent(name), "b.py": "1/0"}, host={"name": "dev"})
    async with Host(config) as host:
        await mesh.call(name, {})
        status = json.loads(host.status().model_dump_json())
    assert ("dev", os.getpid(), None) == (status["host"], status["pid"], status["embedded_server"])
    [served] = status["agents"]
    assert (name, 1, 0) == (served["name"], served["requests"], served["errors"])
    assert served["source"].endswith("agents/a.py:4")
    assert mesh.url == status["connection"]["url"]
    assert ["failed", "serving"] == sorted(module["state"] for module in status["modules"])


@pytest.mark.parametrize("has_name", [True, False], ids=["configured", "default"])
def test_the_default_name_of_a_host_is_that_of_its_folder(tmp_path: Path, *, has_name: bool) -> None:
    """The name is `[host] name`, or else the name of the folder of mesh.toml."""
    config = Config(folder=tmp_path / "shop", host=HostSection(name="dev" if has_name else ""))
    assert ("dev" if has_name else "shop") == Host(config).name


async def test_without_a_url_the_host_starts_an_embedded_server(tmp_path: Path, name: str) -> None:
    """The server runs as long as the host."""
    write(tmp_path / "agents", {"a.py": MESH + agent(name)})
    host = Host(
        Config(folder=tmp_path, server=ServerSection(port=0, store=""), host=HostSection(entry_points=False))
    )
    async with host:
        assert host.server is not None
        async with AgentMesh(host.server.url) as mesh:
            assert "ok" == await mesh.call(name, {})
        assert (server := host.status().embedded_server) is not None
        assert host.server.pid == server.pid
        host.status().model_dump_json()
    assert not is_alive(host.server.pid)


async def test_a_failed_start_stops_the_server_and_restores_imports(tmp_path: Path) -> None:
    """The embedded server is stopped, and the import hooks are removed."""
    write(tmp_path / "agents", {"a.py": "1/0\n"})
    section = HostSection(strict=True, entry_points=False)
    host = Host(Config(folder=tmp_path, server=ServerSection(port=0, store=""), host=section))
    finders = list(sys.meta_path)
    with pytest.raises(MeshError, match="1 of 1 modules failed"):
        await host.start()
    assert host.server is not None
    assert host.server.pid > 0
    assert not is_alive(host.server.pid)
    assert finders == sys.meta_path


async def test_a_start_without_a_server_fails_and_can_be_repeated(configure: Configure, name: str) -> None:
    """`ConnectionFailed` names the address; a second host of the same files can start."""
    config = configure({"a.py": MESH + agent(name)})
    unreachable = config.model_copy(update={"mesh": config.mesh.model_copy(update={"url": NO_SERVER})})
    finders = list(sys.meta_path)
    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1"):
        await Host(unreachable).start()
    assert finders == sys.meta_path
    async with Host(config) as host:
        assert [name] == served_agents(host)


async def test_a_missing_folder_fails_the_start(configure: Configure) -> None:
    """A missing folder of `host.agents` is an error with its key."""
    with pytest.raises(ConfigError, match=r"host\.agents: 'nowhere/agents'"):
        await Host(configure({}, host={"agents": ["nowhere/agents"]})).start()


async def test_files_in_different_folders_may_have_the_same_name(
    configure: Configure, mesh: AgentMesh, name: str
) -> None:
    """Modules and helpers of equal names in two folders serve side by side."""
    source = "from _common import WORD\n" + MESH
    files = {
        "x/a.py": source + agent(f"{name}.x", "WORD"),
        "x/_common.py": "WORD = 'x'",
        "y/a.py": source + agent(f"{name}.y", "WORD"),
        "y/_common.py": "WORD = 'y'",
    }
    async with Host(configure(files)):
        assert ["x", "y"] == [await mesh.call(f"{name}.{letter}", {}) for letter in "xy"]


def is_alive(pid: int) -> bool:
    """Whether a process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_errors_that_are_not_valid_unicode_are_reported(
    configure: Configure, name: str, tmp_path: Path
) -> None:
    """The status has the error of a module, and of a reload, that JSON cannot contain as it is."""
    odd = "raise ValueError('odd \\udcff name')\n"
    async with Host(configure({"a.py": odd, "b.py": MESH + agent(name)})) as host:
        await reload(host, tmp_path, odd, "b.py")
        status = json.loads(host.status().model_dump_json())
    assert ["ValueError: odd ? name"] * 2 == [module["error"] for module in status["modules"]]
    assert "odd ? name" in status["reloads"][-1]["error"]


async def test_a_reload_by_request_does_not_wait_for_long_requests(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `find_references` the reply says so when requests still run on the old version."""
    monkeypatch.setattr("openagentmesh.runtime.host._FIND_TIMEOUT_S", 0.1)
    source = MESH + "import asyncio\n" + agent(name, "await asyncio.sleep(60)")
    async with Host(configure({"a.py": source}, host={"drain_timeout": 0.5})) as host:
        call = asyncio.create_task(mesh.call(name, {}))
        assert host.node.instance_id == await pending_instance(mesh)
        write(tmp_path / "agents", {"a.py": source + "# changed\n"})
        reply = json.loads(await host.node.controls["reload"](b'{"find_references": true}'))
        assert any("requests still run on the old version" in note for note in reply["reload"]["notes"])
        with pytest.raises(Cancelled):
            await call
