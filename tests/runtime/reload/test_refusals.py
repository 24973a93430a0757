"""Refused reloads: the reason, the version that keeps serving, and the edits that are accepted afterwards."""

import asyncio
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from openagentmesh import AgentMesh, Host

from tests.support.host_bench import RUN, Bench
from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import off_loop_threads, reload
from tests.support.waiting import until


def managed_modules() -> dict[str, object]:
    """The managed modules, and the modules that are their attributes."""
    managed: dict[str, object] = {
        name: module for name, module in sys.modules.items() if name.startswith("oam_")
    }
    attributes = {
        f"{name}: {key}": each
        for name, module in managed.items()
        for key, each in vars(module).items()
        if isinstance(each, ModuleType)
    }
    return managed | attributes


IMPORTS = "import ledger, _pack.h\nfrom _h import N\n"
BROKEN = {
    "syntax": ("x = 1\ndef f(:\n", 2, "SyntaxError: invalid syntax", "def f(:\n          ^"),
    "import": (
        "import _h, no_such_package\n",
        1,
        "ModuleNotFoundError: No module named 'no_such_package'",
        "",
    ),
    "half-executed": (
        MESH + "\nx = undefined_name\n",
        4,
        "NameError",
        "x = undefined_name\n        ^^^^^^^^^^^^^^",
    ),
    "system-exit": (
        "import sys\nsys.exit(3)\n",
        2,
        "it ends the program while it is imported (sys.exit(3))",
        "sys.exit",
    ),
    "keyboard-interrupt": ("raise KeyboardInterrupt\n", 1, "KeyboardInterrupt", "raise KeyboardInterrupt"),
    "generator-exit": ("raise GeneratorExit\n", 1, "GeneratorExit", "raise GeneratorExit"),
    "cancelled": ("import asyncio\nraise asyncio.CancelledError\n", 2, "CancelledError", "raise asyncio"),
    "type-hint": (
        MESH + "@mesh.agent(AgentSpec(name='bad'))\nasync def f(req: 'Unknown') -> str: ...\n",
        3,
        "Unknown",
        "",
    ),
    "after-new-helpers": ("import _new.h, _late\n1/0\n", 2, "ZeroDivisionError", "1/0"),
    "sleeping": ("import time\ntime.sleep(1)\n", 2, "too long", "time.sleep(1)"),
    "endless-loop": ("while True: pass\n", 1, "too long", "while True: pass"),
    "endless-loop-that-catches": (
        "while True:\n  try:\n    while True: pass\n  except Exception: pass\n",
        3,
        "too long",
        "",
    ),
}


@pytest.mark.parametrize("defect", BROKEN)
@pytest.mark.parametrize("file", ["a.py", "_h.py", "_pack/h.py"])
async def test_a_broken_edit_is_refused(bench: Bench, file: str, defect: str) -> None:
    """The old version serves on, the error has its line, and the next valid edit is accepted."""
    source, number, error, excerpt = BROKEN[defect]
    files = {
        "a.py": IMPORTS + MESH + agent(bench.name, "[N, _pack.h.N]"),
        "_h.py": "N = 1\n",
        "_pack/__init__.py": "",
        "_pack/h.py": "N = 1\n",
        "_new/h.py": "",
        "_late.py": "",
    }
    threads = off_loop_threads()
    async with bench.serve(files, load_timeout=0.7) as host:
        before = managed_modules()
        refusing = asyncio.create_task(bench.refused({file: source}))
        answers = 0
        while not refusing.done():
            assert [1, 1] == await bench.call()
            answers += 1
        result = await refusing
        assert ([f"agents/{file}"], []) == (result.files, result.agents)
        assert error in result.error
        assert f"{bench.path(file)}:{number}" == result.line
        assert excerpt in result.details
        assert answers > (2 if error == "too long" else 0)
        assert before == managed_modules()
        assert await host.reload() is None
        await bench.reloaded({file: files[file].replace("N = 1", "N = 2") + "\n"})
        await until(lambda: off_loop_threads() <= threads)
        assert [1 + (file == "_h.py"), 1 + (file == "_pack/h.py")] == await bench.call()


async def test_a_reverted_broken_edit_is_not_reloaded(bench: Bench) -> None:
    """When the file matches the serving version again, nothing is executed, and the error is cleared."""
    working = RUN + MESH + agent(bench.name)
    async with bench.serve({"a.py": working}) as host:
        await bench.refused({"a.py": working + "1/0\n"})
        assert ["outdated"] == [module.state for module in host.modules]
        bench.ledger.executed()
        bench.write({"a.py": working})
        assert await host.reload() is None
        assert ["serving"] == [module.state for module in host.modules]
        assert [] == bench.ledger.executed()


async def test_a_refused_edit_is_retried_when_its_dependency_changes(bench: Bench) -> None:
    """A failed load is repeated for a change of its own files, not for a touch or other files."""
    working = MESH + agent(f"{bench.name}.a")
    files = {
        "a.py": working,
        "b.py": MESH + agent(f"{bench.name}.b"),
        "_h.py": "N = 0\n",
        "_other.py": "N = 0\n",
    }
    async with bench.serve(files) as host:
        await bench.refused({"a.py": "from _h import N\n" + RUN + "1 / N\n" + working})
        bench.ledger.executed()
        bench.path("a.py").touch()
        assert await host.reload() is None
        bench.write({"_other.py": "N = 1\n"})
        assert await host.reload() is None
        assert ["agents/b.py"] == (await bench.reloaded({"b.py": files["b.py"] + "\n"})).files
        assert [] == bench.ledger.executed()
        assert "agents/a.py" in (await bench.reloaded({"_h.py": "N = 1\n"})).files
        assert ["a"] == bench.ledger.executed()
        assert ["ok", "ok"] == [await bench.call(".a"), await bench.call(".b")]


async def test_an_edit_of_an_importer_is_refused_until_its_helper_loads(bench: Bench) -> None:
    """The importer's edit is refused with the helper's error; both are reloaded when the helper is fixed."""
    importer = "from _h import N\n" + MESH
    async with bench.serve({"a.py": importer + agent(bench.name, "N"), "_h.py": "N = 1\n"}):
        await bench.refused({"_h.py": "N = 2\n1/0\n"})
        refused = await bench.refused({"a.py": importer + agent(bench.name, "[N]")})
        assert f"{bench.path('_h.py')}:2" == refused.line
        assert 1 == await bench.call()
        both = await bench.reloaded({"_h.py": "N = 2\n"})
        assert ["agents/_h.py", "agents/a.py"] == both.files
        assert [2] == await bench.call()


async def test_files_that_change_together_are_one_reload(bench: Bench) -> None:
    """Either all changed files are reloaded or none; other modules are not executed."""

    def versions(number: int, tail: str = "") -> dict[str, str]:
        line = f"{RUN}from _h import N\nassert N == {number}\n{MESH}"
        return {
            "a.py": line + agent(f"{bench.name}.a", str(number)) + tail,
            "b.py": line + agent(f"{bench.name}.b", str(number)),
            "_h.py": f"N = {number}\n",
        }

    async with bench.serve(versions(1) | {"c.py": RUN + MESH + agent(f"{bench.name}.c")}):
        bench.ledger.executed()
        refused = await bench.refused(versions(2, "1/0\n"))
        files = ["agents/_h.py", "agents/a.py", "agents/b.py"]
        assert files == refused.files
        assert [1, 1] == [await bench.call(".a"), await bench.call(".b")]
        assert set(files) >= set((await bench.reloaded(versions(3))).files)
        assert [3, 3] == [await bench.call(".a"), await bench.call(".b")]
        assert "c" not in bench.ledger.executed()


async def test_a_deleted_helper_is_refused_while_it_is_imported(bench: Bench) -> None:
    """The importer keeps serving with the deleted helper, until an edit no longer imports it."""
    files = {"a.py": "from _h import N\n" + MESH + agent(bench.name, "N"), "_h.py": "N = 1\n"}
    async with bench.serve(files) as host:
        before = managed_modules()
        bench.path("_h.py").unlink()
        result = await bench.refused()
        assert (["agents/_h.py"], f"{bench.path('a.py')}:1") == (result.files, result.line)
        assert "No module named" in result.error
        assert before == managed_modules()
        assert await host.reload() is None
        assert 1 == await bench.call()
        await bench.reloaded({"a.py": MESH + agent(bench.name, "2")})
        assert 2 == await bench.call()
        assert await host.reload() is None


async def test_an_agent_name_of_another_file_is_refused(bench: Bench) -> None:
    """A new file cannot declare the agent of another file, until that file has renamed its agent."""
    name = bench.name
    async with bench.serve({"a.py": MESH + agent(f"{name}.a", "'first'")}) as host:
        refused = await bench.refused({"b.py": MESH + agent(f"{name}.a", "'second'")})
        assert f"agent '{name}.a' is declared twice" in refused.error
        assert f"{bench.path('b.py')}:4" == refused.line
        assert "first" == await bench.call(".a")
        assert await host.reload() is None
        await bench.reloaded({"a.py": MESH + agent(f"{name}.z")})
        assert "second" == await bench.call(".a")
        await bench.listed(".a", ".z")


async def test_a_new_file_cannot_take_the_name_of_a_serving_agent(bench: Bench) -> None:
    """A new file that declares a serving agent is refused, though its path sorts first."""
    name = bench.name
    async with bench.serve({"b.py": MESH + agent(f"{name}.x") + agent(f"{name}.y")}):
        refused = await bench.refused({"a.py": MESH + agent(f"{name}.x", "'second'")})
        assert "is declared twice" in refused.error
        assert ["ok", "ok"] == [await bench.call(".x"), await bench.call(".y")]


async def test_a_module_that_declines_reloads_is_not_reloaded(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Its reason is the reload's error, also for a change of a helper; other modules are reloaded."""
    files = {
        "_common.py": "WORD = 'old'\n",
        "a.py": f"from _common import WORD\n{MESH}mesh.reload.decline('it owns the port')\n"
        + agent(f"{name}.a", "WORD"),
        "b.py": MESH + agent(f"{name}.b", "'old'"),
    }
    async with Host(configure(files)) as host:
        for file in ("_common.py", "a.py"):
            result = await reload(host, tmp_path, files[file] + "WORD = 'new'\n", file)
            assert "a.py declines to be reloaded: it owns the port. Restart the host" == result.error
            write(tmp_path / "agents", {file: files[file]})
        assert not (await reload(host, tmp_path, MESH + agent(f"{name}.b", "'new'"), "b.py")).error
        assert ["old", "new"] == [await mesh.call(f"{name}.{x}", {}) for x in "ab"]


async def test_leftovers_of_a_refused_version_are_reported(
    configure: Configure, name: str, tmp_path: Path
) -> None:
    """The notes name threads and logging handlers of a version that never served."""
    leaving = "import logging, threading\nclass H(logging.Handler): ...\ndef wait(): stop.wait()\n"
    leaving += "stop = threading.Event()\nthreading.stop = stop\n"
    leaving += f"threading.Thread(target=wait, daemon=True, name='worker-{name}').start()\n"
    leaving += f"logging.getLogger({name!r}).addHandler(H())\n"
    async with Host(configure({"a.py": MESH + agent(name)})) as host:
        result = await reload(host, tmp_path, MESH + agent(name) + leaving + "oops\n")
        vars(threading).pop("stop").set()
        assert "NameError" in result.error
        assert [
            f"the refused version left behind: the thread worker-{name}",
            f"the refused version left behind: the logging handler H of '{name}'",
        ] == result.notes
