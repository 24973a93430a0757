"""Every hook is documented and tested, and the plugins in the documentation work."""

from pathlib import Path

import pytest
import typer
from openagentmesh import AgentMesh, Host
from openagentmesh.hooks.manager import Plugins
from openagentmesh.hooks.specs import Hooks
from openagentmesh.runtime.config import Config, HostSection, MeshSection
from typer.testing import CliRunner

from tests.support.documents import ROOT, blocks
from tests.support.modules import write

PAGE = "docs/plugins.md"
HOOKS = sorted(name for name in vars(Hooks) if name.startswith("mesh_"))
GREETER = """
from openagentmesh import AgentMesh, AgentSpec
mesh = AgentMesh()

@mesh.agent(AgentSpec(name="greeter", replayable=True))
async def greet(name: str) -> str:
    return f"{name} at {await mesh.call('clock', {})}"
"""
CLOCK = """
from openagentmesh import AgentMesh, AgentSpec
mesh = AgentMesh()

@mesh.agent(AgentSpec(name="clock"))
async def clock(req: dict) -> str:
    return "noon"
"""


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_section_with_its_arguments(hook: str) -> None:
    """A heading of the page has the hook with its arguments, and an example implements it."""
    function = getattr(Hooks, hook)
    arguments = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    headings = [line for line in (ROOT / PAGE).read_text().splitlines() if line.startswith("### ")]
    assert any(f"{hook}({', '.join(arguments)})" in heading for heading in headings)
    assert any(f"def {hook}(" in code for code in blocks(PAGE))


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_implemented_by_a_test(hook: str) -> None:
    """A plugin in another test file implements the hook."""
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path.name != Path(__file__).name]
    assert any(f"def {hook}(" in path.read_text() for path in tests)


async def test_the_documented_plugins_print_the_documented_output(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All plugins of the page, in one host that serves, reloads and stops, print the output below them."""
    write(tmp_path, {f"p{number}.py": code for number, code in enumerate(blocks(PAGE))})
    write(tmp_path / "agents", {"greeter.py": GREETER, "clock.py": CLOCK})
    plugins = [f"./p{number}.py" for number in range(len(blocks(PAGE)))]
    section = HostSection(agents=["agents"], entry_points=False, plugins=plugins)
    config = Config(folder=tmp_path, mesh=MeshSection(url=url), host=section)
    async with Host(config) as host, AgentMesh(url) as mesh:
        assert "you at noon" == await mesh.call("greeter", "you")
        write(tmp_path / "agents", {"clock.py": CLOCK + "\n"})
        await host.reload()
        write(tmp_path / "agents", {"clock.py": "1 / 0"})
        await host.reload()
        (tmp_path / "agents/clock.py").unlink()
        await host.reload()
        await host.wait_retired()
    printed = capsys.readouterr().out.splitlines() + output_of_commands(host.plugins)
    documented = [line for block in blocks(PAGE, "") for line in block.splitlines()]
    assert [] == [line for line in documented if line not in printed]


def output_of_commands(plugins: Plugins) -> list[str]:
    """The output of the command that plugins add to `oam`."""
    app = typer.Typer()
    app.callback()(lambda: None)
    plugins.add_commands(app)
    return CliRunner().invoke(app, ["hello"]).output.splitlines()
