"""`oam plugins`, `oam check`, and what plugins add to commands."""

import json
from pathlib import Path

from tests.support.commands import Up, oam
from tests.support.modules import MESH, WORD_PLUGIN, agent, write

CARRY = """
from contextlib import asynccontextmanager
from openagentmesh import hookimpl

@hookimpl
def mesh_client_middleware():
    @asynccontextmanager
    async def saying(outgoing):
        outgoing.headers["word"] = "please"
        yield
    return saying

@hookimpl
def mesh_cli(app):
    @app.command()
    def hello() -> None:
        print("hello from a plugin")
"""
TOML = """
host.plugins = ["./word.py", "./carry.py"]
host.entry_points = false
server.port = 0
server.store = ""
"""


def project(folder: Path, toml: str = TOML) -> None:
    write(
        folder,
        {"mesh.toml": toml, "word.py": WORD_PLUGIN, "carry.py": CARRY, "agents/a.py": MESH + agent("a")},
    )


def test_commands_use_the_plugins_of_the_folder(tmp_path: Path) -> None:
    """A call from the project's folder carries what its plugins add; one from elsewhere does not."""
    project(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with Up(tmp_path) as up:
        refused = oam("agent", "call", "a", "{}", "--url", up.url, cwd=tmp_path / "elsewhere")
        assert (1, True) == (refused.code, "permission_denied" in refused.err)
        called = oam("agent", "call", "a", "{}", "--url", up.url, cwd=tmp_path)
        assert (0, '"ok"') == (called.code, called.out.strip())


def test_plugins_are_listed_and_add_commands(tmp_path: Path) -> None:
    """In their order, with hooks and settings; a command of a plugin is one of `oam`."""
    project(tmp_path)
    word, carry, *_ = json.loads(oam("plugins", "--json", cwd=tmp_path).out)
    assert ("word", "carry") == (word["name"], carry["name"])
    assert {"word": "please"} == word["settings"]
    assert ["mesh_cli", "mesh_client_middleware"] == carry["hooks"]
    assert "hello from a plugin" == oam("hello", cwd=tmp_path).out.strip()
    assert "mesh_configure" in oam("plugins", cwd=tmp_path).out


def test_check_says_what_would_fail(tmp_path: Path) -> None:
    """Nothing, a module, a plugin's settings: with the exit code, and nothing is started."""
    project(tmp_path)
    fine = oam("check", cwd=tmp_path)
    assert (0, "no problems: 1 module, 2 plugins") == (fine.code, fine.err.strip())
    write(tmp_path, {"agents/b.py": "1/0"})
    failing = oam("check", cwd=tmp_path)
    assert (1, True) == (failing.code, failing.out.startswith("agents/b.py: ZeroDivisionError"))
    project(tmp_path, TOML + "plugins.word.wrod = 1")
    wrong = oam("check", cwd=tmp_path)
    assert (1, True) == (wrong.code, "plugins.word.wrod: unknown key; did you mean 'word'?" in wrong.err)


def test_a_command_goes_on_without_plugins_that_cannot_be_used(tmp_path: Path) -> None:
    """It says so in a line: to find out what is wrong must be possible then too."""
    project(tmp_path)
    with Up(tmp_path) as up:
        write(tmp_path, {"word.py": "1/0"})
        status = oam("status", "--url", up.url, cwd=tmp_path)
        assert (0, True) == (status.code, "the plugins of mesh.toml are not used" in status.err)
        assert "a" in status.out
