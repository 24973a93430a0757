"""`oam plugins`, `oam check`, and plugins that extend commands."""

import json
from pathlib import Path

from tests.support.commands import Up, oam
from tests.support.modules import MESH, WORD_PLUGIN, agent, write

CLIENT_PLUGIN = """
from contextlib import asynccontextmanager
from openagentmesh import hookimpl

@hookimpl
def mesh_client_middleware():
    @asynccontextmanager
    async def add_header(outgoing):
        outgoing.headers["word"] = "please"
        yield
    return add_header

@hookimpl
def mesh_cli(app):
    @app.command()
    def hello() -> None:
        print("hello from a plugin")
"""
TOML = """
host.plugins = ["./word.py", "./client.py"]
host.entry_points = false
server.port = 0
server.store = ""
"""


def write_plugins(folder: Path, toml: str = TOML) -> None:
    """Write a project with an agent, a plugin that requires a header, and one that adds it to requests."""
    agents = {"agents/a.py": MESH + agent("a")}
    write(folder, {"mesh.toml": toml, "word.py": WORD_PLUGIN, "client.py": CLIENT_PLUGIN, **agents})


def test_a_call_uses_the_plugins_of_the_working_folder(tmp_path: Path) -> None:
    """A call from the project's folder has the header that its plugin adds; one from elsewhere has not."""
    write_plugins(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with Up(tmp_path) as up:
        refused = oam("agent", "call", "a", "{}", "--url", up.url, cwd=tmp_path / "elsewhere")
        assert (1, True) == (refused.code, "permission_denied" in refused.err)
        called = oam("agent", "call", "a", "{}", "--url", up.url, cwd=tmp_path)
        assert (0, '"ok"') == (called.code, called.out.strip())


def test_plugins_are_listed_and_add_commands(tmp_path: Path) -> None:
    """`oam plugins` lists them in order with hooks and settings; the command of a plugin runs."""
    write_plugins(tmp_path)
    word, client, *_ = json.loads(oam("plugins", "--json", cwd=tmp_path).out)
    assert ("word", "client") == (word["name"], client["name"])
    assert {"word": "please"} == word["settings"]
    assert ["mesh_cli", "mesh_client_middleware"] == client["hooks"]
    assert "hello from a plugin" == oam("hello", cwd=tmp_path).out.strip()
    assert "mesh_configure" in oam("plugins", cwd=tmp_path).out


def test_check_reports_what_would_fail_at_a_start(tmp_path: Path) -> None:
    """`oam check` has exit code 0 without problems, and 1 for a module or a plugin's settings that fail."""
    write_plugins(tmp_path)
    valid = oam("check", cwd=tmp_path)
    assert (0, "no problems: 1 module, 2 plugins") == (valid.code, valid.err.strip())
    write(tmp_path, {"agents/b.py": "1/0"})
    failing = oam("check", cwd=tmp_path)
    assert (1, True) == (failing.code, failing.out.startswith("agents/b.py: ZeroDivisionError"))
    write_plugins(tmp_path, TOML + "plugins.word.wrod = 1")
    invalid = oam("check", cwd=tmp_path)
    assert (1, True) == (invalid.code, "plugins.word.wrod: unknown key; did you mean 'word'?" in invalid.err)


def test_a_command_runs_without_plugins_that_fail_to_load(tmp_path: Path) -> None:
    """`oam status` reports the failed plugins in a line and works without them, to find the problem."""
    write_plugins(tmp_path)
    with Up(tmp_path) as up:
        write(tmp_path, {"word.py": "1/0"})
        status = oam("status", "--url", up.url, cwd=tmp_path)
        assert (0, True) == (status.code, "the plugins of mesh.toml are not used" in status.err)
        assert "a" in status.out
