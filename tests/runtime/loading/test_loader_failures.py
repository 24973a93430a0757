"""Modules that fail to load: their errors and tracebacks; other modules serve."""

from collections.abc import Callable
from pathlib import Path

import pytest
from openagentmesh.runtime.loading.loader import Module

from tests.support.modules import MESH, Load, agent, answer, write

WORKING = MESH + agent("working")
INCOMPLETE = MESH + agent("incomplete")
# The main function of a script that runs its own event loop.
LOOP = "import asyncio\nasync def main(): ...\n"
NEVER_AWAITED = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")


@pytest.mark.parametrize(
    ("source", "line", "error"),
    [
        ("x = 1\ndef f(:\n", 2, "SyntaxError: invalid syntax"),
        ("x = 1\n  y = 2\n", 2, "IndentationError: unexpected indent"),
        ("\n\nimport no_such_package\n", 3, "ModuleNotFoundError: No module named 'no_such_package'"),
        ("from openagentmesh import Unknown\n", 1, "ImportError: cannot import name 'Unknown'"),
        (INCOMPLETE + "undefined_name\n", 7, "NameError: name 'undefined_name' is not defined"),
        (
            INCOMPLETE + "import sys\nsys.exit('bye')\n",
            8,
            "it ends the program while it is imported (sys.exit('bye'))",
        ),
        (
            INCOMPLETE + "import sys\nsys.exit()\n",
            8,
            "it ends the program while it is imported (sys.exit(None))",
        ),
        ("import asyncio\nraise asyncio.CancelledError\n", 2, "CancelledError"),
        ("raise GeneratorExit\n", 1, "GeneratorExit"),
        (
            "raise ExceptionGroup('several', [ValueError(1)])\n",
            1,
            "ExceptionGroup: several (1 sub-exception)",
        ),
        (
            "class Unprintable(BaseException):\n    def __str__(self): 1/0\nraise Unprintable\n",
            3,
            "Unprintable: <exception str() failed>",
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
async def test_a_failed_module_does_not_affect_others(load: Load, source: str, line: int, error: str) -> None:
    """It serves nothing; its error is one line, and `line` is the author's file and line."""
    modules = load(
        {"a_working.py": WORKING.replace("working", "first"), "broken.py": source, "z_working.py": WORKING}
    )
    assert ["serving", "failed", "serving"] == [module.state for module in modules.values()]
    assert ["ok", "ok"] == [await answer(modules["a_working.py"]), await answer(modules["z_working.py"])]
    broken = modules["broken.py"]
    assert broken.origin.path is not None
    assert ([], f"{broken.origin.path}:{line}") == (broken.agents, broken.line)
    assert error in broken.error
    assert broken.error == broken.error.strip()
    assert "\n" not in broken.error


def failing_helper(load: Load) -> Module:
    files = {"a.py": "import _b\n" + WORKING, "_b.py": "def f():\n    return 1 / 0\nf()\n"}
    return load(files)["a.py"]


def syntax_error_in_helper(load: Load) -> Module:
    return load({"a.py": "import _b\n" + WORKING, "_b.py": "def f(:\n"})["a.py"]


def chained_exception(load: Load) -> Module:
    source = "try:\n    1 / 0\nexcept ZeroDivisionError as exc:\n    raise ValueError('outer') from exc\n"
    return load({"a.py": source})["a.py"]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (failing_helper, ['a.py", line 1', "import _b", '_b.py", line 3', '_b.py", line 2', "return 1 / 0"]),
        (syntax_error_in_helper, ['a.py", line 1', '_b.py", line 1', "def f(:", "SyntaxError"]),
        (
            chained_exception,
            ["ZeroDivisionError: division by zero", "direct cause", 'a.py", line 4', "ValueError: outer"],
        ),
    ],
)
def test_the_traceback_has_only_frames_of_the_author(
    load: Load, make: Callable[[Load], Module], parts: list[str]
) -> None:
    """It has the author's files and lines in order, and no frame of the loader or importlib."""
    text = make(load).traceback
    places = [text.find(part) for part in parts]
    assert -1 not in places, text
    assert sorted(places) == places
    assert "loader.py" not in text
    assert "importlib" not in text


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
async def test_an_event_loop_in_a_module_is_an_error_with_the_guard(load: Load, start: str) -> None:
    """The error shows the missing `__main__` guard, and `line` where it belongs; a guarded loop is valid."""
    source = LOOP + start + "\n"
    module = load({"a.py": source, "b.py": WORKING})["a.py"]
    assert "failed" == module.state
    assert 'put that under `if __name__ == "__main__":`' in module.error
    assert module.line.startswith(f"{module.origin.path}:")
    guarded = LOOP + WORKING + "if __name__ == '__main__':\n    " + start.replace("\n", "\n    ") + "\n"
    assert "serving" == load({"b.py": guarded})["b.py"].state


def test_a_failed_helper_fails_its_importers(load: Load) -> None:
    """Each module that imports a broken `_common` has its error; other modules serve."""
    files = {
        "a.py": "import _common\n" + WORKING,
        "b.py": "import _common\n",
        "c.py": WORKING,
        "_common.py": "1/0",
    }
    modules = load(files)
    assert ["failed", "failed", "serving"] == [module.state for module in modules.values()]
    assert ["ZeroDivisionError: division by zero"] * 2 == [modules[file].error for file in ("a.py", "b.py")]


def test_agents_of_a_failed_import_are_dropped(load: Load, tmp_path: Path) -> None:
    """When a second import of a module succeeds, its agents are declared once."""
    marker = str(tmp_path / "marker")
    failing_once = (
        f"from pathlib import Path\nm = Path({marker!r})\nif not m.exists():\n    m.touch()\n    1/0\n"
    )
    importer = "try:\n    import b\nexcept ZeroDivisionError:\n    pass\n"
    modules = load({"a.py": importer + MESH + agent("a"), "b.py": MESH + agent("b") + failing_once})
    assert [["a"], ["b"]] == [[found.name for found in module.agents] for module in modules.values()]


def test_ctrl_c_aborts_the_loader(load: Load) -> None:
    """Only KeyboardInterrupt leaves the loader, so that a module that hangs can be aborted."""
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
def test_a_file_that_is_not_text_fails_alone(load: Load, tmp_path: Path, content: bytes, error: str) -> None:
    """Bytes that are no Python source are a syntax error, with the file."""
    write(tmp_path / "agents", {"z.py": WORKING})
    (tmp_path / "agents/a.py").write_bytes(content)
    modules = load({})
    assert ["failed", "serving"] == [module.state for module in modules.values()]
    assert error in modules["a.py"].error
    assert modules["a.py"].line.startswith(str(modules["a.py"].origin.path))
