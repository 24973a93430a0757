"""Distributions with a plugin and agents, installed in an environment of their own."""

from pathlib import Path

import pytest

from tests.support.commands import Process, environment
from tests.support.documents import ROOT
from tests.support.modules import write
from tests.support.published_sdk import NotInstalled, install

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{name}"
version = "1"
dependencies = ["openagentmesh"]
[project.entry-points."openagentmesh.{group}"]
{entry}
[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]
"""
PLUGIN = """
from openagentmesh import PermissionDenied, hookimpl
from pydantic import BaseModel

class Settings(BaseModel):
    word: str

class Word:
    @hookimpl
    def mesh_settings(self):
        return Settings

    @hookimpl
    def mesh_configure(self, settings):
        self.word = settings.word

    @hookimpl
    def mesh_middleware(self, agent):
        def middleware(inner):
            async def endpoint(call):
                if call.headers.get("word") != self.word:
                    raise PermissionDenied("the header `word` is missing")
                return await inner(call)
            return endpoint
        return middleware
"""
AGENT = """
from openagentmesh import AgentMesh, AgentSpec
mesh = AgentMesh()

@mesh.agent(AgentSpec(name="packaged"))
async def packaged(name: str) -> str:
    return f"hello {name}"
"""
# Its package has another name than its folder, so that setuptools installs an import hook for it.
EDITABLE = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "edited"
version = "1"
[project.entry-points."openagentmesh.agents"]
edited = "edited"
[tool.setuptools]
packages = ["edited"]
package-dir = { edited = "code" }
"""
EDITED = """
from openagentmesh import AgentMesh, AgentSpec
from edited.words import WORD
mesh = AgentMesh()

@mesh.agent(AgentSpec(name="edited"))
async def edited(name: str) -> str:
    return f"{WORD} {name}"
"""
TOML = """
server.port = 0
server.store = ""
host.plugins = ["word"]
plugins.word.word = "please"
"""
CALL = """
import asyncio, sys
from openagentmesh import AgentMesh, PermissionDenied

async def main():
    async with AgentMesh(sys.argv[1]) as mesh:
        try:
            await mesh.call("packaged", "you")
        except PermissionDenied as exc:
            print(exc.message)
        for name in ("packaged", "edited"):
            print(await mesh.call(name, "you", headers={"word": "please"}))

asyncio.run(main())
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a new environment with all distributions, one of them editable."""
    plugin = PROJECT.format(
        name="word-plugin", group="plugins", entry='word = "word_plugin:Word"', module="word_plugin"
    )
    agent = PROJECT.format(name="an-agent", group="agents", entry='packaged = "an_agent"', module="an_agent")
    write(tmp_path / "plugin", {"pyproject.toml": plugin, "word_plugin.py": PLUGIN})
    write(tmp_path / "agent", {"pyproject.toml": agent, "an_agent.py": AGENT})
    write(
        tmp_path / "editable",
        {"pyproject.toml": EDITABLE, "code/__init__.py": EDITED, "code/words.py": "WORD = 'bye'"},
    )
    more = (tmp_path / "plugin", tmp_path / "agent", "-e", tmp_path / "editable")
    try:
        return install(tmp_path / "venv", ROOT, "import word_plugin, an_agent, edited", 100, *more)
    except NotInstalled as exc:
        pytest.skip(str(exc))


def test_installed_agents_and_plugins_are_loaded(python: Path, tmp_path: Path) -> None:
    """`oam up` serves installed agents with an installed plugin, and reloads an editable distribution."""
    write(tmp_path / "project", {"mesh.toml": TOML, "call.py": CALL})
    folder = tmp_path / "project"

    def results(url: str) -> list[str]:
        script = str(folder / "call.py")
        with Process(script, url, cwd=folder, program=str(python), env=environment()) as call:
            result = call.finish()
        assert not result.err
        return result.out.splitlines()

    with Process("up", cwd=folder, program=str(python.with_name("oam"))) as up:
        url = up.wait_for_line("serving ").rpartition(" on ")[2].strip()
        assert ["the header `word` is missing", "hello you", "bye you"] == results(url)
        write(tmp_path / "editable", {"code/words.py": "WORD = 'good night'"})
        assert "edited" in up.wait_for_line("reloaded ")
        assert ["the header `word` is missing", "hello you", "good night you"] == results(url)
