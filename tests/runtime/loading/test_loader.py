"""Loading agents from files: helpers, packages, shared meshes, settings, and differences to a script."""

import email
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.modules import MESH, NO_SERVER, Load, agent, answer, write


def served_agents(modules: dict[str, Any]) -> dict[str, list[str]]:
    """The agents of each module, none of which has failed."""
    assert {} == {name: module.error for name, module in modules.items() if module.state == "failed"}
    return {name: [found.name for found in module.agents] for name, module in modules.items()}


async def test_a_file_declares_its_agents(load: Load) -> None:
    """Each module has the agents that its file declares, in that order, and they can run."""
    modules = load({"a.py": MESH + agent("one", "1") + agent("two", "2"), "b.py": MESH + agent("three", "3")})
    assert {"a.py": ["one", "two"], "b.py": ["three"]} == served_agents(modules)
    assert [1, 2, 3] == [
        await answer(modules["a.py"]),
        await answer(modules["a.py"], 1),
        await answer(modules["b.py"]),
    ]


def test_a_module_without_agents_is_no_failure(load: Load) -> None:
    """A file of plain functions among the agents is loaded and serves nothing."""
    assert {"tools.py": []} == served_agents(load({"tools.py": "def double(n): return 2 * n\n"}))


@pytest.mark.parametrize("file", ["my-agent.py", "1st.py", "class.py", "agents.py", "naïve.py"])
def test_file_names_need_not_be_identifiers(load: Load, file: str) -> None:
    """A file whose name Python cannot import is loaded."""
    assert {file: ["a"]} == served_agents(load({file: MESH + agent("a")}))


async def test_an_unguarded_run_returns_at_once(load: Load) -> None:
    """In a host `mesh.run()` does nothing, and agents that are declared after it are served."""
    modules = load({"a.py": MESH + agent("one", "1") + "\nmesh.run()\n" + agent("two", "2")})
    assert {"a.py": ["one", "two"]} == served_agents(modules)


def test_a_hosted_file_is_not_main(load: Load) -> None:
    """The block of `if __name__ == "__main__"` is not executed."""
    source = MESH + agent("a") + "\nif __name__ == '__main__':\n    raise SystemExit('executed')\n"
    assert {"a.py": ["a"]} == served_agents(load({"a.py": source}))


async def test_modules_may_share_a_mesh(load: Load) -> None:
    """Agents belong to the file that declares them, whichever file creates the mesh or is imported first."""
    files = {
        "mesh.py": MESH,
        "a.py": "from mesh import mesh, AgentSpec\nimport b\n" + agent("a", "'a of ' + b.NAME"),
        "b.py": "from mesh import mesh, AgentSpec\nNAME = 'b'\n" + agent("b"),
    }
    modules = load(files)
    assert {"a.py": ["a"], "b.py": ["b"], "mesh.py": []} == served_agents(modules)
    assert "a of b" == await answer(modules["a.py"])


def test_modules_may_import_each_other(load: Load) -> None:
    """An import cycle works as in any Python program, and each agent is declared once."""
    files = {"a.py": "import b\n" + MESH + agent("a"), "b.py": "import a\n" + MESH + agent("b")}
    assert {"a.py": ["a"], "b.py": ["b"]} == served_agents(load(files))


IMPORTS = {
    "from": "from _common import NAME\n",
    "import": "import _common\nNAME = _common.NAME\n",
    "as": "import _common as c\nNAME = c.NAME\n",
    "star": "from _common import *\n",
    "nested": "import _lib.deep\nNAME = _lib.deep.NAME\n",
    "nested-from": "from _lib import deep\nNAME = deep.NAME\n",
}


@pytest.mark.parametrize("style", IMPORTS)
async def test_modules_import_helpers_of_their_own_folder(load: Load, style: str) -> None:
    """Each module imports the `_common` of its folder, as when it is run alone."""
    files: dict[str, str] = {}
    for folder in ("", "x/", "y/"):
        files |= {
            f"{folder}m.py": IMPORTS[style] + MESH + agent(f"{folder[:1]}m", "NAME"),
            f"{folder}_common.py": f"NAME = 'of {folder}'\n",
            f"{folder}_lib/__init__.py": "",
            f"{folder}_lib/deep.py": f"NAME = 'of {folder}'\n",
        }
    modules = load(files)
    assert {"m.py": ["m"], "x/m.py": ["xm"], "y/m.py": ["ym"]} == served_agents(modules)
    assert ["of ", "of x/", "of y/"] == [await answer(module) for module in modules.values()]
    assert "_common" not in sys.modules


async def test_a_namespace_package_is_imported(load: Load) -> None:
    """A helper folder without `__init__.py` is a namespace package, as in any script."""
    modules = load(
        {"a.py": "from _tools.clean import NAME\n" + MESH + agent("a", "NAME"), "_tools/clean.py": "NAME = 1"}
    )
    assert {"a.py": ["a"]} == served_agents(modules)
    assert 1 == await answer(modules["a.py"])


async def test_a_handler_imports_helpers_of_its_folder(load: Load) -> None:
    """An import in a function works after loading, in each folder for its own helper."""
    source = MESH + "def name():\n    from _late import NAME\n    return NAME\n"
    files = {
        "x/a.py": source + agent("x", "name()"),
        "x/_late.py": "NAME = 'x'",
        "y/a.py": source + agent("y", "name()"),
        "y/_late.py": "NAME = 'y'",
    }
    modules = load(files)
    assert ["x", "y"] == [await answer(module) for module in modules.values()]


async def test_a_package_is_one_module(load: Load) -> None:
    """Relative and absolute imports within a package work, and all its agents belong to the package."""
    modules = load(
        {
            "team/__init__.py": "from ._mesh import mesh\nfrom . import first\nimport team.sub.second\n",
            "team/_mesh.py": MESH,
            "team/first.py": "from ._mesh import mesh, AgentSpec\nfrom _common import N\n"
            + agent("first", "N"),
            "team/sub/__init__.py": "",
            "team/sub/second.py": "from .._mesh import mesh, AgentSpec\n" + agent("second", "2"),
            "_common.py": "N = 1\n",
        }
    )
    assert {"team": ["first", "second"]} == served_agents(modules)
    assert [1, 2] == [await answer(modules["team"]), await answer(modules["team"], 1)]


async def test_a_file_may_have_the_name_of_a_standard_module(load: Load) -> None:
    """An agent `email.py` serves, and all other modules import the standard `email`."""
    modules = load(
        {
            "email.py": MESH + agent("mail", "__name__"),
            "other.py": "import smtplib, logging.handlers\n"
            + MESH
            + agent("other", "smtplib.email.message.__name__"),
            "sub/third.py": "import email.message\n" + MESH + agent("third", "email.message.__name__"),
        }
    )
    assert {"email.py": ["mail"], "other.py": ["other"], "sub/third.py": ["third"]} == served_agents(modules)
    assert ["email.message", "email.message"] == [
        await answer(modules[f]) for f in ("other.py", "sub/third.py")
    ]
    assert email is sys.modules["email"]


async def test_two_loaders_of_a_process_are_independent(load: Load, tmp_path: Path) -> None:
    """A second loader loads its own files, even if the first one has loaded files of the same names."""
    first = load({"a.py": "from _c import N\n" + MESH + agent("first", "N"), "_c.py": "N = 1"})
    write(tmp_path / "agents", {"a.py": "from _c import N\n" + MESH + agent("second", "N"), "_c.py": "N = 2"})
    second = load({})
    assert [{"a.py": ["first"]}, {"a.py": ["second"]}] == [served_agents(first), served_agents(second)]
    assert [1, 2] == [await answer(first["a.py"]), await answer(second["a.py"])]


async def test_stale_bytecode_is_not_used(load: Load) -> None:
    """An edit of the same length within the same second is loaded."""
    first = load({"x/a.py": MESH + agent("a", "1")})
    for name in [name for name in sys.modules if name.startswith("oam_x")]:
        del sys.modules[name]
    second = load({"x/a.py": MESH + agent("a", "2")})
    assert [1, 2] == [await answer(first["x/a.py"]), await answer(second["x/a.py"])]


SETTINGS = f"""
from pydantic import BaseModel
{MESH}
class S(BaseModel):
    model: str = "small"
    tries: int = 3
settings = mesh.settings(S)
{agent("a", "[settings.model, settings.tries]")}
"""


@pytest.mark.parametrize(
    ("file", "table", "expected"),
    [
        ("greeter.py", {"greeter": {"model": "large", "tries": "5"}}, ["large", 5]),
        ("greeter.py", {"other": {"model": "large"}}, ["small", 3]),
        ("greeter.py", {}, ["small", 3]),
        ("sub/greeter.py", {"greeter": {"tries": 1}}, ["small", 1]),
        ("greeter/__init__.py", {"greeter": {"tries": 1}}, ["small", 1]),
    ],
)
async def test_a_module_has_its_settings_table(
    load: Load, file: str, table: dict[str, dict[str, Any]], expected: list[object]
) -> None:
    """`mesh.settings(Model)` returns the validated `[settings.<module>]`, or the model's defaults."""
    (module,) = load({file: SETTINGS}, settings=table).values()
    assert expected == await answer(module)


def test_invalid_settings_fail_the_module(load: Load) -> None:
    """The error has one line with the key and the reason."""
    module = load({"greeter.py": SETTINGS}, settings={"greeter": {"tries": "many"}})["greeter.py"]
    assert "failed" == module.state
    assert "tries" in module.error
    assert "valid integer" in module.error
    assert "\n" not in module.error


@pytest.mark.parametrize(
    ("url", "is_different"),
    [
        ("nats://elsewhere:4222", True),
        ("nats://u:secret@elsewhere:4222", True),
        (NO_SERVER, False),
        ("nats://localhost:4222", False),
    ],
    ids=["different", "different-with-password", "same", "default"],
)
def test_a_different_url_is_a_warning(
    load: Load, caplog: pytest.LogCaptureFixture, url: str, *, is_different: bool
) -> None:
    """The warning names the file and both addresses without passwords; the default URL is no difference."""
    source = MESH.replace("AgentMesh()", f"AgentMesh({url!r})")
    with caplog.at_level(logging.WARNING):
        modules = load({"a.py": source + agent("a")})
    assert {"a.py": ["a"]} == served_agents(modules)
    assert is_different == bool(caplog.messages)
    for message in caplog.messages:
        assert all(part in message for part in ("a.py", "elsewhere:4222", NO_SERVER))
        assert "secret" not in message


SCRIPT = """
import logging
from openagentmesh import AgentMesh, AgentSpec
from _common import greet

logging.basicConfig(level=logging.INFO)
mesh = AgentMesh({url!r})


@mesh.agent(AgentSpec(name={name!r}))
async def greeter(req: str) -> str:
    return greet(req)

mesh.run()
"""


def test_a_script_runs_hosted_and_alone(load: Load, url: str, name: str, tmp_path: Path) -> None:
    """Hosted, a script declares its agent; alone it serves, drains and exits with code 0."""
    modules = load(
        {"a.py": SCRIPT.format(url=url, name=name), "_common.py": "def greet(n): return f'hi {n}'"}
    )
    assert {"a.py": [name]} == served_agents(modules)
    command = [sys.executable, str(tmp_path / "agents/a.py")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stderr is not None
        started = next(line for line in process.stderr if "serving" in line or "Error" in line)
        assert f"serving 1 agent on {url}" in started
        caller = f"""
import asyncio
from openagentmesh import AgentMesh
async def main():
    async with AgentMesh({url!r}) as mesh:
        print(await mesh.call({name!r}, "you"))
asyncio.run(main())
"""
        answer = subprocess.run([sys.executable, "-c", caller], capture_output=True, text=True, check=False)
        process.terminate()
        assert ("hi you\n", "") == (answer.stdout, answer.stderr)
        assert 0 == process.wait(10)


def test_agents_of_a_helper_belong_to_its_importer(load: Load) -> None:
    """Agents in helper files are served once, with the module that imports them."""
    modules = load(
        {
            "main.py": "from _mesh import mesh\nimport _handlers\nfrom openagentmesh import AgentSpec\n"
            + agent("split.a"),
            "_mesh.py": MESH,
            "_handlers.py": "from _mesh import mesh\nfrom openagentmesh import AgentSpec\n"
            + agent("split.b"),
        }
    )
    assert {"main.py": ["split.a", "split.b"]} == {
        module: sorted(names) for module, names in served_agents(modules).items()
    }


async def test_a_duplicate_name_in_a_file_is_a_warning(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """The last declaration serves, as in a mesh alone, and the warning names both places."""
    [module] = load({"a.py": MESH + agent("twice", "1") + agent("twice", "2")}).values()
    assert [2] == [await answer(module, number) for number in range(len(module.agents))]
    assert "agents/a.py declares the agent 'twice' twice: the one at " in caplog.text
    assert "a.py:8 serves, not the one at " in caplog.text
    assert "a.py:4" in caplog.text
