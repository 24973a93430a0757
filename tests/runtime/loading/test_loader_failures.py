"""Modules that cannot be loaded: the others serve, and what went wrong is told where it did."""

from collections.abc import Callable
from pathlib import Path

import pytest
from openagentmesh.runtime.loading.loader import Module

from tests.support.modules import MESH, Load, agent, answer, write

GOOD = MESH + agent("good")
HALF = MESH + agent("half")
# Unguarded event loops: what a script that runs itself has at its end.
LOOP = "import asyncio\nasync def main(): ...\n"
NEVER_AWAITED = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")


@pytest.mark.parametrize(
    ("source", "line", "error"),
    [
        ("x = 1\ndef f(:\n", 2, "SyntaxError: invalid syntax"),
        ("x = 1\n  y = 2\n", 2, "IndentationError: unexpected indent"),
        ("\n\nimport no_such_package\n", 3, "ModuleNotFoundError: No module named 'no_such_package'"),
        ("from openagentmesh import Nothing\n", 1, "ImportError: cannot import name 'Nothing'"),
        (HALF + "undefined_name\n", 7, "NameError: name 'undefined_name' is not defined"),
        (
            HALF + "import sys\nsys.exit('bye')\n",
            8,
            "it ends the program while it is imported (sys.exit('bye'))",
        ),
        (HALF + "import sys\nsys.exit()\n", 8, "it ends the program while it is imported (sys.exit(None))"),
        ("import asyncio\nraise asyncio.CancelledError\n", 2, "CancelledError"),
        ("raise GeneratorExit\n", 1, "GeneratorExit"),
        (
            "raise ExceptionGroup('several', [ValueError(1)])\n",
            1,
            "ExceptionGroup: several (1 sub-exception)",
        ),
        (
            "class Odd(BaseException):\n    def __str__(self): 1/0\nraise Odd\n",
            3,
            "Odd: <exception str() failed>",
        ),
        ("raise ValueError('first\\nsecond')\n", 1, "ValueError: first"),
        ("e = ValueError('real')\ne.add_note('a note')\nraise e\n", 3, "ValueError: real"),
        (
            MESH + "\n@mesh.agent(AgentSpec(name='bad'))\ndef f(req: str) -> str:\n    yield req\n",
            4,
            "The handler 'f' of agent 'bad'",
        ),
    ],
)
async def test_a_broken_module_leaves_the_others_serving(
    load: Load, source: str, line: int, error: str
) -> None:
    """It serves nothing, its reason begins with what happened, and `file:line` is where."""
    modules = load({"a_good.py": GOOD.replace("good", "first"), "broken.py": source, "z_good.py": GOOD})
    assert ["serving", "failed", "serving"] == [module.state for module in modules.values()]
    assert ["ok", "ok"] == [await answer(modules["a_good.py"]), await answer(modules["z_good.py"])]
    broken = modules["broken.py"]
    assert broken.origin.path is not None
    assert ([], f"{broken.origin.path}:{line}") == (broken.agents, broken.line)
    assert error in broken.error
    assert broken.error == broken.error.strip()
    assert "\n" not in broken.error


def deeper(load: Load) -> Module:
    files = {"a.py": "import _b\n" + GOOD, "_b.py": "def f():\n    return 1 / 0\nf()\n"}
    return load(files)["a.py"]


def syntax(load: Load) -> Module:
    return load({"a.py": "import _b\n" + GOOD, "_b.py": "def f(:\n"})["a.py"]


def chained(load: Load) -> Module:
    source = "try:\n    1 / 0\nexcept ZeroDivisionError as exc:\n    raise ValueError('outer') from exc\n"
    return load({"a.py": source})["a.py"]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (deeper, ['a.py", line 1', "import _b", '_b.py", line 3', '_b.py", line 2', "return 1 / 0"]),
        (syntax, ['a.py", line 1', '_b.py", line 1', "def f(:", "SyntaxError"]),
        (
            chained,
            ["ZeroDivisionError: division by zero", "direct cause", 'a.py", line 4', "ValueError: outer"],
        ),
    ],
)
def test_the_traceback_is_the_authors_own(
    load: Load, make: Callable[[Load], Module], parts: list[str]
) -> None:
    """It shows every file and line of the author's in order, and no frame of the loader or of importlib."""
    shown = make(load).traceback
    places = [shown.find(part) for part in parts]
    assert -1 not in places, shown
    assert sorted(places) == places
    assert "loader.py" not in shown
    assert "importlib" not in shown


@NEVER_AWAITED
@pytest.mark.parametrize(
    "start",
    [
        "asyncio.run(main())",
        "asyncio.get_event_loop().run_until_complete(main())",
        "with asyncio.Runner() as runner: runner.run(main())",
        "loop = asyncio.new_event_loop()\ntry: loop.run_until_complete(main())\nfinally: loop.close()",
    ],
)
async def test_a_script_that_starts_its_own_loop_is_told_to_guard_it(load: Load, start: str) -> None:
    """The reason shows the guard to write, and the line where it is missing."""
    source = LOOP + start + "\n"
    module = load({"a.py": source, "b.py": GOOD})["a.py"]
    assert "failed" == module.state
    assert 'put that under `if __name__ == "__main__":`' in module.error
    assert module.line.startswith(f"{module.origin.path}:")
    guarded = LOOP + GOOD + "if __name__ == '__main__':\n    " + start.replace("\n", "\n    ") + "\n"
    assert "serving" == load({"b.py": guarded})["b.py"].state


def test_a_shared_sibling_that_fails_fails_its_importers(load: Load) -> None:
    """Each module that needs a broken `_common` is told; one that does not, serves."""
    files = {"a.py": "import _common\n" + GOOD, "b.py": "import _common\n", "c.py": GOOD, "_common.py": "1/0"}
    modules = load(files)
    assert ["failed", "failed", "serving"] == [module.state for module in modules.values()]
    assert ["ZeroDivisionError: division by zero"] * 2 == [modules[file].error for file in ("a.py", "b.py")]


def test_a_module_that_first_failed_declares_its_agents_once(load: Load, tmp_path: Path) -> None:
    """When its second import succeeds, what the first one had declared is forgotten."""
    marker = str(tmp_path / "marker")
    once = f"from pathlib import Path\nm = Path({marker!r})\nif not m.exists():\n    m.touch()\n    1/0\n"
    importer = "try:\n    import b\nexcept ZeroDivisionError:\n    pass\n"
    modules = load({"a.py": importer + MESH + agent("a"), "b.py": MESH + agent("b") + once})
    assert [["a"], ["b"]] == [[found.name for found in module.agents] for module in modules.values()]


def test_ctrl_c_leaves_the_loader(load: Load) -> None:
    """A module that hangs can be left: only KeyboardInterrupt is raised on."""
    with pytest.raises(KeyboardInterrupt):
        load({"a.py": "raise KeyboardInterrupt\n"})


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"# -*- coding: nope -*-\n", "unknown encoding: nope"),
        (b"x = '\xff'\n", "SyntaxError"),
        (b"x\x00", "null bytes"),
    ],
)
def test_a_file_that_is_no_text_fails_alone(load: Load, tmp_path: Path, content: bytes, error: str) -> None:
    """Bytes that are no Python source are told like any other syntax error."""
    write(tmp_path / "agents", {"z.py": GOOD})
    (tmp_path / "agents/a.py").write_bytes(content)
    modules = load({})
    assert ["failed", "serving"] == [module.state for module in modules.values()]
    assert error in modules["a.py"].error
    assert modules["a.py"].line.startswith(str(modules["a.py"].origin.path))
