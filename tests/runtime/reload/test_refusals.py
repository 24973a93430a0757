"""What a reload refuses and how it says so, what it takes for a change, and what it leaves to others."""

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.host_bench import RUN, Bench
from tests.support.modules import MESH, agent, write


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on `sys.path`, whose modules are forgotten after the test."""
    folder = tmp_path.resolve() / "elsewhere"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


def imported() -> dict[str, object]:
    """Which managed modules there are, and which modules hang at each of them."""
    ours: dict[str, object] = {
        name: module for name, module in sys.modules.items() if name.startswith("oam_")
    }
    hanging = {
        f"{name}: {key}": each
        for name, module in ours.items()
        for key, each in vars(module).items()
        if isinstance(each, ModuleType)
    }
    return ours | hanging


GOOD = "import ledger, _pack.h\nfrom _h import N\n"
BROKEN = {
    "syntax": ("x = 1\ndef f(:\n", 2, "SyntaxError: invalid syntax", "def f(:\n          ^"),
    "import": (
        "import _h, no_such_package\n",
        1,
        "ModuleNotFoundError: No module named 'no_such_package'",
        "",
    ),
    "half": (MESH + "\nx = undefined_name\n", 4, "NameError", "x = undefined_name\n        ^^^^^^^^^^^^^^"),
    "exit": (
        "import sys\nsys.exit(3)\n",
        2,
        "it ends the program while it is imported (sys.exit(3))",
        "sys.exit",
    ),
    "interrupt": ("raise KeyboardInterrupt\n", 1, "KeyboardInterrupt", "raise KeyboardInterrupt"),
    "generator": ("raise GeneratorExit\n", 1, "GeneratorExit", "raise GeneratorExit"),
    "cancelled": ("import asyncio\nraise asyncio.CancelledError\n", 2, "CancelledError", "raise asyncio"),
    "hints": (
        MESH + "@mesh.agent(AgentSpec(name='bad'))\nasync def f(req: 'Nobody') -> str: ...\n",
        3,
        "Nobody",
        "",
    ),
    "new": ("import _new.h, _late\n1/0\n", 2, "ZeroDivisionError", "1/0"),
    "sleep": ("import time\ntime.sleep(60)\n", 2, "too long", "time.sleep(60)"),
    "spin": ("while True: pass\n", 1, "too long", "while True: pass"),
    "spin-caught": (
        "while True:\n  try:\n    while True: pass\n  except Exception: pass\n",
        3,
        "too long",
        "",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("file", ["a.py", "_h.py", "_pack/h.py"])
async def test_a_broken_edit_changes_nothing(bench: Bench, file: str, what: str) -> None:
    """The old version answers during and after it; what is wrong is told; the next good edit is taken."""
    source, number, error, excerpt = BROKEN[what]
    files = {
        "a.py": GOOD + MESH + agent(bench.name, "[N, _pack.h.N]"),
        "_h.py": "N = 1\n",
        "_pack/__init__.py": "",
        "_pack/h.py": "N = 1\n",
        "_new/h.py": "",
        "_late.py": "",
    }
    async with bench.serve(files, load_timeout=0.3) as host:
        before = imported()
        refusing = asyncio.create_task(bench.refused({file: source}))
        answers = 0
        while not refusing.done():
            assert [1, 1] == await bench.call()
            answers += 1
        outcome = await refusing
        assert ([f"agents/{file}"], []) == (outcome.files, outcome.agents)
        assert error in outcome.error
        assert f"{bench.path(file)}:{number}" == outcome.line
        assert excerpt in outcome.details
        assert answers > (2 if error == "too long" else 0)
        assert before == imported()
        assert await host.reload() is None
        await bench.reloaded({file: files[file].replace("N = 1", "N = 2") + "\n"})
        assert [1 + (file == "_h.py"), 1 + (file == "_pack/h.py")] == await bench.call()


async def test_a_broken_edit_taken_back_is_no_reload(bench: Bench) -> None:
    """When the content is again what is served, nothing is executed, and the host is well."""
    good = RUN + MESH + agent(bench.name)
    async with bench.serve({"a.py": good}) as host:
        await bench.refused({"a.py": good + "1/0\n"})
        assert ["outdated"] == [module.state for module in host.modules]
        bench.ledger.executed()
        bench.write({"a.py": good})
        assert await host.reload() is None
        assert ["serving"] == [module.state for module in host.modules]
        assert [] == bench.ledger.executed()


async def test_known_bad_content_is_tried_again_when_what_it_needs_changes(bench: Bench) -> None:
    """A failed load is not repeated for a touch or another file's edit, only for its own files'."""
    good = MESH + agent(f"{bench.name}.a")
    files = {
        "a.py": good,
        "b.py": MESH + agent(f"{bench.name}.b"),
        "_h.py": "N = 0\n",
        "_other.py": "N = 0\n",
    }
    async with bench.serve(files) as host:
        await bench.refused({"a.py": "from _h import N\n" + RUN + "1 / N\n" + good})
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


async def test_an_importer_waits_for_its_broken_helper(bench: Bench) -> None:
    """What would not run from disk is not served in parts: both are taken when the helper is mended."""
    importer = "from _h import N\n" + MESH
    async with bench.serve({"a.py": importer + agent(bench.name, "N"), "_h.py": "N = 1\n"}):
        await bench.refused({"_h.py": "N = 2\n1/0\n"})
        again = await bench.refused({"a.py": importer + agent(bench.name, "[N]")})
        assert f"{bench.path('_h.py')}:2" == again.line
        assert 1 == await bench.call()
        both = await bench.reloaded({"_h.py": "N = 2\n"})
        assert ["agents/_h.py", "agents/a.py"] == both.files
        assert [2] == await bench.call()


async def test_files_that_change_together_are_one_reload(bench: Bench) -> None:
    """All of a set is taken, or nothing of it; who is not concerned is not executed."""

    def versions(number: int, tail: str = "") -> dict[str, str]:
        line = f"{RUN}from _h import N\nassert N == {number}\n{MESH}"
        return {
            "a.py": line + agent(f"{bench.name}.a", str(number)) + tail,
            "b.py": line + agent(f"{bench.name}.b", str(number)),
            "_h.py": f"N = {number}\n",
        }

    async with bench.serve(versions(1) | {"c.py": RUN + MESH + agent(f"{bench.name}.c")}):
        bench.ledger.executed()
        broken = await bench.refused(versions(2, "1/0\n"))
        files = ["agents/_h.py", "agents/a.py", "agents/b.py"]
        assert files == broken.files
        assert [1, 1] == [await bench.call(".a"), await bench.call(".b")]
        assert set(files) >= set((await bench.reloaded(versions(3))).files)
        assert [3, 3] == [await bench.call(".a"), await bench.call(".b")]
        assert "c" not in bench.ledger.executed()


async def test_a_helper_that_is_deleted_refuses_until_nobody_wants_it(bench: Bench) -> None:
    """Who imports a helper goes on with it after it was deleted; an edit that does without is taken."""
    files = {"a.py": "from _h import N\n" + MESH + agent(bench.name, "N"), "_h.py": "N = 1\n"}
    async with bench.serve(files) as host:
        before = imported()
        bench.path("_h.py").unlink()
        outcome = await bench.refused()
        assert (["agents/_h.py"], f"{bench.path('a.py')}:1") == (outcome.files, outcome.line)
        assert "No module named" in outcome.error
        assert before == imported()
        assert await host.reload() is None
        assert 1 == await bench.call()
        await bench.reloaded({"a.py": MESH + agent(bench.name, "2")})
        assert 2 == await bench.call()
        assert await host.reload() is None


async def test_a_name_that_another_file_has_is_refused(bench: Bench) -> None:
    """A new or edited file cannot take an agent's name; the file that has it can give it away."""
    name = bench.name
    async with bench.serve({"a.py": MESH + agent(f"{name}.a", "'first'")}) as host:
        twice = await bench.refused({"b.py": MESH + agent(f"{name}.a", "'second'")})
        assert f"agent '{name}.a' is declared twice" in twice.error
        assert f"{bench.path('b.py')}:4" == twice.line
        assert "first" == await bench.call(".a")
        assert await host.reload() is None
        await bench.reloaded({"a.py": MESH + agent(f"{name}.z")})
        assert "second" == await bench.call(".a")
        await bench.listed(".a", ".z")


def rewritten(path: Path, old: os.stat_result) -> None:
    path.write_text(path.read_text().replace("1111", "2222"))


def with_its_old_time(path: Path, old: os.stat_result) -> None:
    rewritten(path, old)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def renamed_over(path: Path, old: os.stat_result) -> None:
    path.with_suffix(".tmp").write_text(path.read_text().replace("1111", "2222"))
    with_its_old_time(path.with_suffix(".tmp"), old)
    path.with_suffix(".tmp").rename(path)


@pytest.mark.parametrize("save", [rewritten, with_its_old_time, renamed_over])
@pytest.mark.parametrize("file", ["a.py", "_h.py", "prompt.txt"])
async def test_an_edit_of_the_same_size_is_seen(
    bench: Bench, file: str, save: Callable[[Path, os.stat_result], None]
) -> None:
    """What counts is the content: not its length, nor the second or the time it was saved at."""
    read = "from pathlib import Path\nTEXT = Path(__file__).with_name('prompt.txt').read_text()\n"
    files = {
        "a.py": f"from _h import HELP\n{read}{MESH}" + agent(bench.name, "['1111', HELP, TEXT]"),
        "_h.py": "HELP = '1111'\n",
        "prompt.txt": "1111",
    }
    async with bench.serve(files) as host:
        path = bench.path(file)
        save(path, path.stat())
        assert [f"agents/{file}"] == (await bench.reloaded()).files
        assert ["2222" if file == each else "1111" for each in files] == await bench.call()
        assert await host.reload() is None


async def test_the_same_content_is_no_reload(bench: Bench) -> None:
    """A touch, or a save of what is there already, executes nothing."""
    files = {"a.py": RUN + "import _h\n" + MESH + agent(bench.name), "_h.py": RUN}
    async with bench.serve(files) as host:
        bench.ledger.executed()
        for file in files:
            bench.path(file).touch()
        assert await host.reload() is None
        bench.write(files)
        assert await host.reload() is None
        assert [] == bench.ledger.executed()


SLOW = """
import ledger, time
ledger.runs.append("slow")
assert ledger.runs.count("slow") == 1, "executed twice, which many packages do not survive"
ledger.started.set()
assert ledger.go.wait(20), "the event loop stood still"
"""
IMPORTERS = {
    "direct": {"a.py": "import slow_package\n"},
    "sub": {"a.py": "from slow_package.deep import er\n"},
    "import_module": {"a.py": "import importlib\nimportlib.import_module('slow_package')\n"},
    "new-helper": {"a.py": "import _new\n", "_new.py": "import slow_package\n"},
    "relative-helper": {"a.py": "from . import _new\n", "_new.py": "import slow_package\n"},
    "optional": {
        "a.py": "import _new\nassert _new.slow_package\n",
        "_new.py": "try:\n    import slow_package\nexcept:\n    slow_package = None\n",
    },
}


@pytest.mark.parametrize("how", IMPORTERS)
async def test_what_others_wrote_is_imported_beside_the_event_loop(
    bench: Bench, elsewhere: Path, how: str
) -> None:
    """A package that takes long to import is executed once, and requests are answered meanwhile."""
    (elsewhere / "slow_package").mkdir()
    (elsewhere / "slow_package/__init__.py").write_text(SLOW)
    (elsewhere / "slow_package/deep").mkdir()
    (elsewhere / "slow_package/deep/er.py").write_text("")
    async with bench.serve({"a.py": MESH + agent(bench.name, "1")}):
        files = IMPORTERS[how] | {"a.py": IMPORTERS[how]["a.py"] + MESH + agent(bench.name, "2")}
        reloading = asyncio.create_task(bench.reloaded(files))
        assert await asyncio.to_thread(bench.ledger.started.wait, 10)
        assert 1 == await bench.call()
        bench.ledger.go.set()
        await reloading
        assert 2 == await bench.call()


async def test_what_a_module_sets_in_its_context_is_gone_with_it(bench: Bench) -> None:
    """A context variable that is set while a file is loaded is not set for whoever reloads."""
    source = "import ledger\nledger.variable.set('set')\n" + MESH + agent(bench.name)
    async with bench.serve({"a.py": source}):
        assert "untouched" == bench.ledger.variable.get()
        await bench.reloaded({"a.py": source + "\n"})
        assert "untouched" == bench.ledger.variable.get()


PACKAGE = {
    "__init__.py": "",
    "agents.py": RUN + "from openmesh_sample.sub import N\nfrom .helper import M\n" + MESH,
    "helper.py": RUN + "M = 1\n",
    "sub/__init__.py": RUN + "N = 1\n",
    "unused.py": RUN,
}


@pytest.mark.parametrize("place", ["openmesh_sample.agents", "entry point"])
async def test_a_package_that_is_edited_where_it_lies_is_reloaded(
    bench: Bench, elsewhere: Path, place: str
) -> None:
    """Agents of a package by its dotted name, or its entry point, follow its modules' edits."""
    package = elsewhere / "openmesh_sample"
    write(package, PACKAGE)
    write(package, {"agents.py": PACKAGE["agents.py"] + agent(bench.name, "[M, N]")})
    more: dict[str, Any] = {"agents": [place]}
    if place == "entry point":
        write(
            elsewhere / "openmesh_sample-1.dist-info",
            {
                "METADATA": "Metadata-Version: 2.1\nName: openmesh_sample\nVersion: 1\n",
                "entry_points.txt": "[openagentmesh.agents]\nsample = openmesh_sample.agents\n",
            },
        )
        more = {"agents": [], "entry_points": ["sample"]}
    async with bench.serve({}, **more) as host:
        assert [1, 1] == await bench.call()
        bench.ledger.runs.clear()
        write(package, {"helper.py": PACKAGE["helper.py"].replace("1", "2")})
        await bench.reloaded()
        assert [2, 1] == await bench.call()
        assert ["agents", "helper"] == bench.ledger.executed()
        write(package, {"sub/__init__.py": "N = 2\n1/0\n"})
        assert "ZeroDivisionError" in (await bench.refused()).error
        write(package, {"sub/__init__.py": "N = 2\n"})
        await bench.reloaded()
        assert [2, 2] == await bench.call()
        write(package, {"agents.py": PACKAGE["agents.py"] + agent(bench.name, "'edited'")})
        await bench.reloaded()
        assert "edited" == await bench.call()
        assert await host.reload() is None


async def test_an_installed_package_is_nobodys_to_edit(
    bench: Bench, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies where packages are installed is served, but never reloaded."""
    monkeypatch.setattr("openagentmesh.runtime.loading.imports.INSTALLED", (str(elsewhere),))
    monkeypatch.setattr("openagentmesh.runtime.loading.modules.INSTALLED", (str(elsewhere),))
    write(elsewhere / "openmesh_sample", {"__init__.py": MESH + agent(bench.name, "1")})
    async with bench.serve({}, agents=["openmesh_sample"]) as host:
        write(elsewhere / "openmesh_sample", {"__init__.py": MESH + agent(bench.name, "2") + "\n"})
        assert await host.reload() is None
        assert 1 == await bench.call()
