"""Packages and libraries on `sys.path`: which of them are reloaded, and how new ones are imported."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.support.host_bench import RUN, Bench
from tests.support.modules import MESH, agent, write


@pytest.fixture
def library_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on `sys.path`; what was imported from it is removed after the test."""
    folder = tmp_path.resolve() / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


PACKAGE = {
    "__init__.py": "",
    "agents.py": RUN + "from sample_package.sub import N\nfrom .helper import M\n" + MESH,
    "helper.py": RUN + "M = 1\n",
    "sub/__init__.py": RUN + "N = 1\n",
    "unused.py": RUN,
}


@pytest.mark.parametrize("place", ["sample_package.agents", "entry point"], ids=["module", "entry-point"])
async def test_an_editable_package_is_reloaded(bench: Bench, library_folder: Path, place: str) -> None:
    """Edits of a package's modules reload its agents, named by module or by entry point."""
    package = library_folder / "sample_package"
    write(package, PACKAGE)
    write(package, {"agents.py": PACKAGE["agents.py"] + agent(bench.name, "[M, N]")})
    more: dict[str, Any] = {"agents": [place]}
    if place == "entry point":
        write(
            library_folder / "sample_package-1.dist-info",
            {
                "METADATA": "Metadata-Version: 2.1\nName: sample_package\nVersion: 1\n",
                "entry_points.txt": "[openagentmesh.agents]\nsample = sample_package.agents\n",
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


async def test_an_installed_package_is_never_reloaded(
    bench: Bench, library_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agents of a package in a folder of installed packages are served, but its edits are ignored."""
    monkeypatch.setattr("openagentmesh.runtime.loading.imports.INSTALLED", (str(library_folder),))
    monkeypatch.setattr("openagentmesh.runtime.loading.modules.INSTALLED", (str(library_folder),))
    write(library_folder / "sample_package", {"__init__.py": MESH + agent(bench.name, "1")})
    async with bench.serve({}, agents=["sample_package"]) as host:
        write(library_folder / "sample_package", {"__init__.py": MESH + agent(bench.name, "2") + "\n"})
        assert await host.reload() is None
        assert 1 == await bench.call()


async def test_a_package_in_a_namespace_package_is_reloaded(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package of the agents and its helpers are reloaded, other packages of the namespace are not."""
    company = f"company_{uuid4().hex}"
    monkeypatch.syspath_prepend(str(tmp_path / "others"))
    monkeypatch.syspath_prepend(str(tmp_path / "ours"))
    imports = (
        f"import {company}.ours.helper, {company}.theirs\n"
        f"from {company} import ours\nfrom {company}.ours import helper\n"
    )
    numbers = f"[helper.N, {company}.ours.helper.N, ours.helper.N, {company}.theirs.N]"
    write(tmp_path / f"others/{company}", {"theirs/__init__.py": "N = 0\n"})
    ours = tmp_path / f"ours/{company}/ours"
    files = {"__init__.py": "", "agents.py": f"{imports}{MESH}{agent(bench.name, numbers)}"}
    write(ours, files | {"helper.py": "N = 1\n"})
    async with bench.serve({}, agents=[f"{company}.ours.agents"]):
        assert [1, 1, 1, 0] == await bench.call()
        write(tmp_path / f"others/{company}", {"theirs/__init__.py": "N = 9\n"})
        assert await bench.host.reload() is None
        write(ours, {"helper.py": "N = 2\n"})
        assert [f"{bench.name} 0.1.0"] == (await bench.reloaded()).agents
        assert [2, 2, 2, 0] == await bench.call()
        write(ours, {"helper.py": "N = \n"})
        assert "SyntaxError" in (await bench.refused()).error
        assert [2, 2, 2, 0] == await bench.call()
        write(ours, {"helper.py": "N = 3\n"})
        await bench.reloaded()
        assert [3, 3, 3, 0] == await bench.call()
    for name in [name for name in sys.modules if name.startswith(company)]:
        del sys.modules[name]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes an unmanaged module that any file can import; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    name = f"library_{uuid4().hex}"

    def write_library(source: str) -> str:
        write(tmp_path / "library", {f"{name}.py": source})
        return name

    yield write_library
    sys.modules.pop(name, None)


async def test_agents_of_a_library_survive_reloads_of_its_importers(
    bench: Bench, library: Callable[[str], str]
) -> None:
    """A library is not executed again: its agents keep serving, and are disposed of at the stop."""
    disposal = "@mesh.dispose\ndef dispose():\n    ledger.runs.append('disposed')\n"
    imported = library(f"import ledger\n{MESH}{agent(f'{bench.name}.lib')}{disposal}")
    helper = f"import {imported}\n"
    async with bench.serve({"a.py": f"import _h\n{MESH}{agent(f'{bench.name}.a')}", "_h.py": helper}):
        for number in (1, 2):
            source = f"import _h\n{MESH}{agent(f'{bench.name}.a', str(number))}"
            result = await bench.reloaded({"a.py": source, "_h.py": f"{helper}# {number}\n"})
            assert [f"{bench.name}.a 0.1.0"] == result.agents
            await bench.host.node.reconciler.wait_idle()
            assert ["ok", number] == [await bench.call(".lib"), await bench.call(".a")]
        assert [] == bench.ledger.runs
    assert ["disposed"] == bench.ledger.runs


async def test_a_library_function_is_an_agent_of_the_module_that_declares_it(
    bench: Bench, library: Callable[[str], str]
) -> None:
    """An agent is withdrawn with its declaration, even if its handler is defined in a library."""
    imported = library("async def handler(req: dict) -> str:\n    return 'from a library'\n")
    declared = f"mesh.agent(AgentSpec(name='{bench.name}.b'))({imported}.handler)\n"
    source = f"import {imported}\n{MESH}{agent(f'{bench.name}.a')}"
    async with bench.serve({"a.py": source + declared}):
        assert "from a library" == await bench.call(".b")
        result = await bench.reloaded({"a.py": source})
        assert [f"{bench.name}.a 0.1.0", f"{bench.name}.b withdrawn"] == result.agents
        await bench.listed(".a")


SLOW_PACKAGE = """
import ledger, time
ledger.runs.append("slow")
assert ledger.runs.count("slow") == 1, "executed twice, which many packages do not support"
ledger.started.set()
assert ledger.go.wait(20), "the event loop was blocked"
"""
IMPORTERS = {
    "direct": {"a.py": "import slow_package\n"},
    "subpackage": {"a.py": "from slow_package.deep import er\n"},
    "import_module": {"a.py": "import importlib\nimportlib.import_module('slow_package')\n"},
    "new-helper": {"a.py": "import _new\n", "_new.py": "import slow_package\n"},
    "relative-helper": {"a.py": "from . import _new\n", "_new.py": "import slow_package\n"},
    "optional": {
        "a.py": "import _new\nassert _new.slow_package\n",
        "_new.py": "try:\n    import slow_package\nexcept:\n    slow_package = None\n",
    },
}


@pytest.mark.parametrize("style", IMPORTERS)
async def test_unmanaged_packages_are_imported_off_the_loop(
    bench: Bench, library_folder: Path, style: str
) -> None:
    """A package that takes long to import is executed once, and requests are answered meanwhile."""
    (library_folder / "slow_package").mkdir()
    (library_folder / "slow_package/__init__.py").write_text(SLOW_PACKAGE)
    (library_folder / "slow_package/deep").mkdir()
    (library_folder / "slow_package/deep/er.py").write_text("")
    async with bench.serve({"a.py": MESH + agent(bench.name, "1")}):
        files = IMPORTERS[style] | {"a.py": IMPORTERS[style]["a.py"] + MESH + agent(bench.name, "2")}
        reloading = asyncio.create_task(bench.reloaded(files))
        assert await asyncio.to_thread(bench.ledger.started.wait, 10)
        assert 1 == await bench.call()
        bench.ledger.go.set()
        await reloading
        assert 2 == await bench.call()


async def test_a_module_is_loaded_in_its_own_context(bench: Bench) -> None:
    """A context variable that a file sets while it is loaded is unchanged for the caller of the reload."""
    source = "import ledger\nledger.variable.set('set')\n" + MESH + agent(bench.name)
    async with bench.serve({"a.py": source}):
        assert "untouched" == bench.ledger.variable.get()
        await bench.reloaded({"a.py": source + "\n"})
        assert "untouched" == bench.ledger.variable.get()
