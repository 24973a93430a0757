"""The programs and settings of the documentation work as it says."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Host
from openagentmesh.hooks.manager import Plugins
from openagentmesh.runtime.config import Config, HostSection, MeshSection, load_config
from openagentmesh.runtime.loading.plugin_loader import installed_plugins

from tests.support.documents import BLOCK, ROOT, blocks


def programs() -> list[tuple[str, str]]:
    """Each complete program of docs/agents.md, with the output that follows it."""
    found = BLOCK.findall((ROOT / "docs/agents.md").read_text())
    return [(code, output) for (kind, code), (_, output) in pairwise(found) if kind == "python"]


@pytest.mark.parametrize(("code", "output"), programs(), ids=range(len(programs())))
def test_programs_print_the_documented_output(code: str, output: str, tmp_path: Path) -> None:
    """Each program of docs/agents.md prints the output that follows it."""
    (tmp_path / "program.py").write_text(code)
    ran = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30
    )
    assert (output, 0) == (ran.stdout, ran.returncode), ran.stderr


def test_the_recipe_runs_as_two_processes(tmp_path: Path, url: str) -> None:
    """The consumer of docs/multi-process.md calls the provider by name, and prints the documented output."""
    provider, consumer = (
        code.replace("AgentMesh()", f"AgentMesh({url!r})") for code in blocks("docs/multi-process.md")
    )
    (tmp_path / "provider.py").write_text(
        provider.replace("mesh.run()", 'print("up", flush=True)\nmesh.run()')
    )
    (tmp_path / "consumer.py").write_text(
        consumer.replace("in await mesh.catalog()", 'in await mesh.catalog(channel="nlp")')
    )
    process = subprocess.Popen([sys.executable, tmp_path / "provider.py"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "up\n" == process.stdout.readline()
        wait = (
            "import asyncio, sys; from openagentmesh import AgentMesh, MeshError\n"
            "async def main():\n"
            f"    async with AgentMesh({url!r}) as mesh:\n"
            "        async with asyncio.timeout(20):\n"
            "            while not await mesh.catalog(channel='nlp'): await asyncio.sleep(0.05)\n"
            "asyncio.run(main())"
        )
        subprocess.run([sys.executable, "-c", wait], check=True, timeout=30)
        ran = subprocess.run(
            [sys.executable, tmp_path / "consumer.py"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    finally:
        process.terminate()
        process.communicate(timeout=30)
    [output] = blocks("docs/multi-process.md", "")
    assert output == ran.stdout, ran.stderr


def test_the_configuration_in_the_docs_is_valid(tmp_path: Path) -> None:
    """The mesh.toml of docs/mesh-toml.md can be loaded, and its values are the defaults."""
    [text] = blocks("docs/mesh-toml.md", "toml")
    (tmp_path / "mesh.toml").write_text(text)
    documented = load_config(tmp_path / "mesh.toml", {})
    default = Config()
    assert (default.server, default.limits) == (documented.server, documented.limits)
    assert default.host == documented.host.model_copy(update={"name": "", "agents": None})


def test_the_readme_has_the_commands_to_start_and_to_test() -> None:
    """Both commands are in the README exactly once; CI runs the test command from there."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.count("    pip install uv && uv run oam up") == 1
    assert lines.count("    pip install uv && uv run pytest") == 1


def test_the_programs_of_the_readme_run(tmp_path: Path) -> None:
    """The agent of the README, and the code that calls it, run as one program."""
    agent, _, use = blocks("README.md")
    program = agent.partition('\n\nif __name__ == "__main__"')[0] + (
        "\n\nasync def main():\n    " + use.replace("\n", "\n    ") + "\n    print('fine')\n"
        "import asyncio\nasyncio.run(main())\n"
    )
    (tmp_path / "tour.py").write_text(program)
    ran = subprocess.run(
        [sys.executable, tmp_path / "tour.py"], capture_output=True, text=True, check=False, timeout=30
    )
    assert "fine\n" == ran.stdout, ran.stderr


async def test_state_is_kept_as_documented(tmp_path: Path, url: str) -> None:
    """A reload from the first version in docs/reloading.md to the second answers as documented."""
    first, second = blocks("docs/reloading.md")
    [answer] = blocks("docs/reloading.md", "json")
    path = tmp_path / "agents" / "counter.py"
    path.parent.mkdir()
    path.write_text(first)
    config = Config(
        folder=tmp_path, mesh=MeshSection(url=url), host=HostSection(agents=["agents"], entry_points=False)
    )
    async with Host(config) as host, AgentMesh(url) as mesh:
        for _ in range(2):
            await mesh.call("counter")
        path.write_text(second)
        await host.reload()
        assert json.loads(answer) == await mesh.call("counter")


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "plugins").glob("*.md")), ids=lambda page: page.stem)
def test_the_settings_on_the_page_of_a_plugin_are_valid(page: Path, tmp_path: Path) -> None:
    """The mesh.toml on each page of docs/plugins enables the plugin, and has valid settings of it."""
    [text] = blocks(f"docs/plugins/{page.name}", "toml")
    (tmp_path / "mesh.toml").write_text(text)
    config = load_config(tmp_path / "mesh.toml", {})
    assert page.stem in config.host.plugins
    plugins = Plugins({name: installed_plugins()[name].load() for name in config.host.plugins})
    for plugin in plugins.all:
        plugins.validated(plugin, config.plugins.get(plugin.name, {}))
        for agent, settings in config.agents.items():
            plugins.agent_settings(plugin, agent, settings.plugins.get(plugin.name, {}))
