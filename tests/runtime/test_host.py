"""The host: what it serves, what it refuses, and what it leaves behind."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, ConnectionFailed, Host, MeshError, NotFound
from openagentmesh.runtime.config import (
    AgentSection,
    Config,
    ConfigError,
    HostSection,
    LimitsSection,
    ServerSection,
)

from tests.support.modules import MESH, Configure, agent, write


def served(host: Host) -> list[str]:
    return [found.name for found in host.agents]


async def test_a_host_serves_files_packages_and_settings(
    configure: Configure, mesh: AgentMesh, name: str
) -> None:
    """Agents of all modules are called by name while the host is up, and are gone after it."""
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
        assert [f"{name}.a", f"{name}.p"] == served(host)
        assert ["yes", 2] == [await mesh.call(f"{name}.a", {}), await mesh.call(f"{name}.p", {})]
    assert [] == await mesh.catalog(channel=name)
    assert [] == served(host)


async def test_agents_of_one_host_call_each_other(configure: Configure, mesh: AgentMesh, name: str) -> None:
    """A hosted module's mesh is the host's, so its verbs work in handlers."""
    files = {
        "a.py": MESH + agent(f"{name}.a", f"await mesh.call('{name}.b', {{}}) + 1"),
        "b.py": MESH + agent(f"{name}.b", "1"),
    }
    async with Host(configure(files)):
        assert 2 == await mesh.call(f"{name}.a", {})


async def test_a_failing_module_leaves_the_others_serving(
    configure: Configure, mesh: AgentMesh, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The host is up with the rest; what failed is in the log with its traceback, and in `describe`."""
    half = MESH + agent(f"{name}.half") + "\nundefined_name\n"
    async with Host(configure({"a.py": half, "b.py": MESH + agent(f"{name}.b")})) as host:
        assert [f"{name}.b"] == served(host)
        assert "ok" == await mesh.call(f"{name}.b", {})
        with pytest.raises(NotFound):
            await mesh.call(f"{name}.half", {})
        failed, fine = host.status().modules
    assert ("agents/a.py", "failed", 0, "NameError: name 'undefined_name' is not defined") == (
        failed.origin, failed.state, failed.agents, failed.error,
    )  # fmt: skip
    assert failed.line.endswith("agents/a.py:8")
    assert ("agents/b.py", "serving", 1, "") == (
        fine.origin, fine.state, fine.agents, fine.error,
    )  # fmt: skip
    (logged,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "agents/a.py failed to load: NameError" in logged
    assert "Traceback" in logged


async def test_a_name_claimed_twice_belongs_to_the_first(
    configure: Configure, mesh: AgentMesh, name: str
) -> None:
    """The later module is refused whole, and the message names agent, both files and the remedy."""
    files = {
        "a.py": MESH + agent(name, "'first'"),
        "b.py": MESH + agent(f"{name}.other") + agent(name, "'second'"),
        "c.py": MESH + agent(f"{name}.c"),
    }
    config = configure(files)
    async with Host(config) as host:
        assert [name, f"{name}.c"] == served(host)
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
    """`strict` names every failed module with file and line, and nothing was served meanwhile."""
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
    assert [] == served(host)
    assert [] == await mesh.catalog(channel=name)


async def test_a_strict_host_starts_when_all_is_well(configure: Configure, name: str) -> None:
    """`strict` alone stops nothing."""
    async with Host(configure({"a.py": MESH + agent(name)}, host={"strict": True})) as host:
        assert [name] == served(host)


async def test_an_agent_that_is_not_enabled_is_not_served(
    configure: Configure, mesh: AgentMesh, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`[agents.x] enabled = false` keeps one agent of a module off; one that nobody declares is a warning."""
    config = configure(
        {"a.py": MESH + agent(f"{name}.on") + agent(f"{name}.off")},
        agents={f"{name}.off": AgentSection(enabled=False), f"{name}.typo": AgentSection(queue=1)},
    )
    async with Host(config) as host:
        assert [f"{name}.on"] == served(host)
        assert [f"{name}.on"] == [entry.name for entry in await mesh.catalog(channel=name)]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [f'mesh.toml has [agents."{name}.typo"], but no loaded module declares that agent'] == warnings


async def test_limits_of_the_config_reach_the_agents(configure: Configure, name: str) -> None:
    """Each agent has `[limits]` with its own changes."""
    config = configure(
        {"a.py": MESH + agent(f"{name}.a") + agent(f"{name}.b")},
        limits=LimitsSection(concurrency=3, queue=4, timeout=5, restart_pause=1, restart_pause_max=2),
        agents={f"{name}.b": AgentSection(queue=9)},
    )
    async with Host(config) as host:
        limits = {found.name: found.limits for found in host.status().agents}
    common = {"concurrency": 3, "timeout": 5, "restart_pause": 1, "restart_pause_max": 2}
    assert {f"{name}.a": common | {"queue": 4}, f"{name}.b": common | {"queue": 9}} == limits


async def test_what_a_host_tells_of_itself_is_json(configure: Configure, mesh: AgentMesh, name: str) -> None:
    """`describe` is plain JSON with host, process, modules, agents and connection."""
    config = configure({"a.py": MESH + agent(name), "b.py": "1/0"}, host={"name": "dev"})
    async with Host(config) as host:
        await mesh.call(name, {})
        told = json.loads(host.status().model_dump_json())
    assert ("dev", os.getpid(), None) == (told["host"], told["pid"], told["embedded_server"])
    (only,) = told["agents"]
    assert (name, 1, 0) == (only["name"], only["requests"], only["errors"])
    assert only["source"].endswith("agents/a.py:4")
    assert mesh.url == told["connection"]["url"]
    assert ["failed", "serving"] == sorted(module["state"] for module in told["modules"])


@pytest.mark.parametrize("named", [True, False])
def test_a_host_is_named_after_its_config_or_its_folder(tmp_path: Path, *, named: bool) -> None:
    """`[host] name`, else the folder of mesh.toml."""
    config = Config(folder=tmp_path / "shop", host=HostSection(name="dev" if named else ""))
    assert ("dev" if named else "shop") == Host(config).name


async def test_without_a_url_the_host_brings_its_server(tmp_path: Path, name: str) -> None:
    """An embedded server starts with the host and is gone with it."""
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
    assert not alive(host.server.pid)


async def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """A server that was started for it is stopped, and imports are as they were."""
    write(tmp_path / "agents", {"a.py": "1/0\n"})
    section = HostSection(strict=True, entry_points=False)
    host = Host(Config(folder=tmp_path, server=ServerSection(port=0, store=""), host=section))
    finders = list(sys.meta_path)
    with pytest.raises(MeshError, match="1 of 1 modules failed"):
        await host.start()
    assert host.server is not None
    assert host.server.pid > 0
    assert not alive(host.server.pid)
    assert finders == sys.meta_path


async def test_a_server_that_is_not_there_is_told_and_can_be_tried_again(
    configure: Configure, name: str
) -> None:
    """ConnectionFailed names the address; another host of the same files starts afterwards."""
    config = configure({"a.py": MESH + agent(name)})
    nowhere = config.model_copy(update={"mesh": config.mesh.model_copy(update={"url": "nats://127.0.0.1:1"})})
    finders = list(sys.meta_path)
    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1"):
        await Host(nowhere).start()
    assert finders == sys.meta_path
    async with Host(config) as host:
        assert [name] == served(host)


async def test_a_missing_place_is_told_before_anything_starts(configure: Configure) -> None:
    """A folder that mesh.toml names and that is not there stops the start, with its key."""
    with pytest.raises(ConfigError, match=r"host\.agents: 'nowhere/agents'"):
        await Host(configure({}, host={"agents": ["nowhere/agents"]})).start()


async def test_two_modules_of_one_name_in_two_folders_serve(
    configure: Configure, mesh: AgentMesh, name: str
) -> None:
    """File names may repeat across folders; only agents' names may not."""
    source = "from _common import WORD\n" + MESH
    files = {
        "x/a.py": source + agent(f"{name}.x", "WORD"),
        "x/_common.py": "WORD = 'x'",
        "y/a.py": source + agent(f"{name}.y", "WORD"),
        "y/_common.py": "WORD = 'y'",
    }
    async with Host(configure(files)):
        assert ["x", "y"] == [await mesh.call(f"{name}.{letter}", {}) for letter in "xy"]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
