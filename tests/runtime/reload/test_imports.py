"""Which modules a reload executes anew, and which classes and helpers old and new code see."""

import asyncio
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from openagentmesh import InvalidInput, NotFound

from tests.support.host_bench import RUN, Bench
from tests.support.modules import MESH, agent, write


def waits(name: str, result: str) -> str:
    """An agent that is in flight until the gate is opened, and returns `result` then."""
    return agent(name, f"(await ledger.wait()) or {result}")


STYLES = {
    "relative": "from ._h import N\n",
    "relative-module": "from . import _h\nN = _h.N\n",
    "absolute": "from _h import N\n",
    "module": "import _h\nN = _h.N\n",
    "star": "from _h import *\n",
    "import_module": "import importlib\nN = importlib.import_module('_h').N\n",
    "import_module-relative": "import importlib\nN = importlib.import_module('._h', __package__).N\n",
    "import_module-from": "from importlib import import_module\nN = import_module('_h').N\n",
    "dunder": "N = __import__('_h').N\n",
    "namespace": "from _space.h import N\n",
    "namespace-module": "import _space.h\nN = _space.h.N\n",
    "namespace-from": "from _space import h\nN = h.N\n",
    "package": "from _pack.h import N\n",
    "package-from": "from _pack import h\nN = h.N\n",
    "package-star": "from _pack.h import *\n",
    "package-all": "from _pack import *\nN = h.N\n",
}


@pytest.mark.parametrize("style", STYLES)
async def test_an_edited_helper_reloads_who_imports_it(bench: Bench, style: str) -> None:
    """However a sibling is imported, its edit reloads the importers, and nobody else."""
    helper = "_space/h.py" if "space" in style else "_pack/h.py" if "pack" in style else "_h.py"
    files = {
        "a.py": RUN + STYLES[style] + MESH + agent(f"{bench.name}.a", "N"),
        "b.py": RUN + MESH + agent(f"{bench.name}.b"),
        helper: RUN + "N = 1\n",
        "_pack/__init__.py": "__all__ = ['h']\n",
    }
    async with bench.serve(files):
        bench.ledger.executed()
        outcome = await bench.reloaded({helper: RUN + "N = 2\n"})
        assert [f"agents/{helper}"] == outcome.files
        assert [f"{bench.name}.a 0.1.0"] == outcome.agents
        assert sorted(["a", helper.removesuffix(".py").replace("/", ".")]) == bench.ledger.executed()
        assert [2, "ok"] == [await bench.call(".a"), await bench.call(".b")]


async def test_an_edit_passes_through_helpers(bench: Bench) -> None:
    """What imports an importer is reloaded with it; what they import and has not changed stays."""
    files = {
        "a.py": RUN + "from _b import N\n" + MESH + agent(f"{bench.name}.a", "N"),
        "z.py": RUN + "import _d\n" + MESH + agent(f"{bench.name}.z", "id(_d)"),
        "_b.py": RUN + "from _c import N\nimport _d\n",
        "_c.py": RUN + "N = 1\n",
        "_d.py": RUN,
    }
    async with bench.serve(files):
        bench.ledger.executed()
        before = await bench.call(".z")
        await bench.reloaded({"_c.py": RUN + "N = 2\n"})
        assert ["_b", "_c", "a"] == bench.ledger.executed()
        assert [2, before] == [await bench.call(".a"), await bench.call(".z")]


async def test_a_circle_of_imports_moves_together(bench: Bench) -> None:
    """An edit of one file of a circle executes all of it, and nobody holds on to the old one."""
    files = {
        "a.py": RUN + "import _b\nN = 1\n" + MESH + agent(bench.name, "_b.across()"),
        "_b.py": RUN + "import a, _c\ndef across(): return [a.N, _c.N, _c.a is a, a._b.across is across]\n",
        "_c.py": RUN + "import a\nN = 1\n",
    }
    async with bench.serve(files):
        bench.ledger.executed()
        await bench.reloaded({"_c.py": RUN + "import a\nN = 2\n"})
        assert ["_b", "_c", "a"] == bench.ledger.executed()
        assert [1, 2, True, True] == await bench.call()


LAZY = {
    "absolute": "from _h import N",
    "relative": "from ._h import N",
    "module": "import _h; N = _h.N",
    "import_module": "import importlib; N = importlib.import_module('_h').N",
    "package": "from _pack.h import N",
    "package-from": "from _pack import h; N = h.N",
    "package-module": "import _pack.h; N = _pack.h.N",
}


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("style", LAZY)
async def test_an_old_request_imports_what_was_there_in_its_time(
    bench: Bench, style: str, *, between: bool
) -> None:
    """An import inside a function of a request in flight finds the helper that it began with.

    So it does when its own file was replaced `between`, and the helper only after that.
    """
    helper = "_pack/h.py" if "pack" in style else "_h.py"
    source = f"import ledger\n{MESH}\ndef lazy():\n    {LAZY[style]}\n    return N\nlazy()\n"
    source += waits(bench.name, "lazy()")
    async with bench.serve({"a.py": source, helper: "N = 1\n", "_pack/__init__.py": ""}):
        request = await bench.in_flight()
        if between:
            await bench.reloaded({"a.py": source + "\n"})
        await bench.reloaded({helper: "N = 2\n"})
        bench.ledger.gate.set()
        assert [1, 2] == [await request, await bench.call()]


WALKS = {
    "package": {"a.py": "import _pack.h as h, _pack.h\n", "_pack/__init__.py": "", "_pack/h.py": ""},
    "namespace": {"a.py": "import _pack.h as h, _pack.h\n", "_pack/h.py": ""},
    "own": {"a/__init__.py": "from . import h\n", "a/h.py": ""},
}


@pytest.mark.parametrize("style", WALKS)
async def test_an_old_request_keeps_the_modules_of_its_packages(bench: Bench, style: str) -> None:
    """Old code that walks from a package to a module of it arrives at the old one, after a failure too."""
    entry, *_, helper = WALKS[style]
    result = "h.N" if style == "own" else "_pack.h.N"
    files = WALKS[style] | {helper: "N = 1\n"}
    files[entry] += f"import ledger\n{MESH}" + waits(bench.name, result)
    async with bench.serve(files):
        request = await bench.in_flight()
        await bench.refused({helper: "N = 2\n1/0\n"})
        await bench.reloaded({helper: "N = 2\n"})
        bench.ledger.gate.set()
        assert [1, 2] == [await request, await bench.call()]


ABSENT = {
    "absolute": ("from _h import N", "_h.py"),
    "module": ("import _h; N = _h.N", "_h.py"),
    "relative": ("from ._h import N", "_h.py"),
    "relative-from": ("from . import _h; N = _h.N", "_h.py"),
    "import_module": ("import importlib; N = importlib.import_module('_h').N", "_h.py"),
    "package": ("from _h import N", "_h/__init__.py"),
    "in-package": ("from _pack.h import N", "_pack/h.py"),
    "in-package-from": ("from _pack import h; N = h.N", "_pack/h.py"),
    "package-in-package": ("from _pack import h; N = h.N", "_pack/h/__init__.py"),
    "deep": ("from _b import N", "_h.py"),
    "data": ("import pathlib; N = int(pathlib.Path(__file__.replace('a.py', 'n.txt')).read_text())", "n.txt"),
}


@pytest.mark.parametrize("style", ABSENT)
async def test_what_was_missed_is_loaded_when_it_appears(bench: Bench, style: str) -> None:
    """A file that an optional import did not find reloads who looked for it, and again when it goes."""
    line, helper = ABSENT[style]
    optional = f"try:\n    {line}\nexcept (ImportError, OSError):\n    N = 0\n"
    files = {
        "a.py": optional + MESH + agent(f"{bench.name}.a", "N"),
        "b.py": RUN + MESH + agent(f"{bench.name}.b"),
        "_pack/__init__.py": "",
        "_b.py": "from ._h import N\n",
    }
    async with bench.serve(files) as host:
        bench.ledger.executed()
        assert 0 == await bench.call(".a")
        text = "1" if helper == "n.txt" else "N = 1\n"
        assert [f"agents/{helper}"] == (await bench.reloaded({helper: text})).files
        assert 1 == await bench.call(".a")
        assert await host.reload() is None
        bench.path(helper).unlink()
        if helper.endswith("__init__.py"):
            for file in bench.path(helper).parent.rglob("*"):
                file.unlink(missing_ok=True)
            bench.path(helper).parent.rmdir()
        await bench.reloaded()
        assert 0 == await bench.call(".a")
        assert [] == bench.ledger.executed()


async def test_a_file_is_found_in_a_folder_that_looks_unchanged(bench: Bench) -> None:
    """A helper that appears within the same tick of the file system's clock is not overlooked."""
    async with bench.serve({"a.py": MESH + agent(bench.name, "1")}) as host:
        await bench.reloaded({"a.py": "from json import dumps\n" + MESH + agent(bench.name, "1")})
        times = bench.path("").stat()
        bench.write({"_h.py": "N = 2\n", "a.py": "from _h import N\n" + MESH + agent(bench.name, "N")})
        os.utime(bench.path(""), ns=(times.st_atime_ns, times.st_mtime_ns))
        await bench.reloaded()
        assert 2 == await bench.call()
        assert await host.reload() is None


MODELS = """{future}
import ledger
from pydantic import BaseModel
{mesh}

class Order(BaseModel):
    item: "Item"
    more: "list[Item]" = []

class Item(BaseModel):
    name: str
    size: int{size}

@mesh.agent(AgentSpec(name={name!r}, description="orders"))
async def order(req: Order) -> Item:
    await ledger.wait()
    assert isinstance(req.item, Item), "an item of another generation"
    assert all(isinstance(item, Item) for item in req.more)
    return Item.model_validate(req.item)
"""


@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
async def test_forward_references_mean_the_classes_of_their_own_generation(bench: Bench, future: str) -> None:
    """Old and new models of the same names never meet, in a request in flight or in a new one."""

    def source(size: str) -> str:
        return MODELS.format(future=future, mesh=MESH, name=bench.name, size=size)

    small = {"name": "tea", "size": 1}
    async with bench.serve({"a.py": source("")}):
        old = asyncio.create_task(bench.call(request={"item": small, "more": [small]}))
        await bench.ledger.waiting.wait()
        await bench.reloaded({"a.py": source(" = 5")})
        bench.ledger.gate.set()
        assert small == await old
        assert {"name": "tea", "size": 5} == await bench.call(request={"item": {"name": "tea"}})
        with pytest.raises(InvalidInput):
            await bench.call(request={"item": small, "more": [{"size": 1}]})


async def test_an_old_class_is_not_the_new_one(bench: Bench) -> None:
    """An object that outlives a reload is of its own class still, which is not the new one."""
    keeps = "import ledger\nfrom _model import M\nif not hasattr(ledger, 'kept'): ledger.kept = M()\n"
    result = "[isinstance(ledger.kept, M), type(ledger.kept).VERSION, M.VERSION]"
    files = {"a.py": keeps + MESH + agent(bench.name, result), "_model.py": "class M: VERSION = 1\n"}
    async with bench.serve(files):
        assert [True, 1, 1] == await bench.call()
        await bench.reloaded({"_model.py": "class M: VERSION = 2\n"})
        assert [False, 1, 2] == await bench.call()


async def test_a_module_becomes_a_package_and_a_module_again(bench: Bench) -> None:
    """`a.py` and `a/__init__.py` are the same agent in another place."""
    package = "from ._n import N\n" + MESH + agent(bench.name, "N")
    async with bench.serve({"a.py": MESH + agent(bench.name, "1")}) as host:
        bench.path("a.py").unlink()
        await bench.reloaded({"a/__init__.py": package, "a/_n.py": "N = 2\n"})
        assert ([bench.name], 2) == ([a.name for a in host.agents], await bench.call())
        await bench.reloaded({"a/_n.py": "N = 3\n"})
        assert 3 == await bench.call()
        shutil.rmtree(bench.path("a"))
        await bench.reloaded({"a.py": MESH + agent(bench.name, "4")})
        assert ([bench.name], 4) == ([a.name for a in host.agents], await bench.call())
        assert await host.reload() is None


async def test_agents_come_and_go_with_their_files(bench: Bench) -> None:
    """A new file is a new agent, a renamed one two changes, a deleted one is withdrawn from everywhere."""
    name = bench.name
    async with bench.serve({"a.py": MESH + agent(f"{name}.a", "1")}):
        assert [f"{name}.b 0.1.0 new"] == (await bench.reloaded({"b.py": MESH + agent(f"{name}.b")})).agents
        await bench.listed(".a", ".b")
        renamed = await bench.reloaded({"a.py": MESH + agent(f"{name}.c", "2")})
        assert [f"{name}.c 0.1.0 new", f"{name}.a withdrawn"] == renamed.agents
        await bench.listed(".b", ".c")
        assert 2 == await bench.call(".c")
        bench.path("b.py").unlink()
        assert [f"{name}.b withdrawn"] == (await bench.reloaded()).agents
        await bench.listed(".c")
        for gone in ".a", ".b":
            with pytest.raises(NotFound):
                await bench.call(gone)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Puts a module that no host manages where everybody can import it; gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    name = f"library_{uuid4().hex}"

    def written(source: str) -> str:
        write(tmp_path / "library", {f"{name}.py": source})
        return name

    yield written
    sys.modules.pop(name, None)


async def test_what_a_library_declares_outlives_an_edit(bench: Bench, library: Callable[[str], str]) -> None:
    """A library is not executed again when who imports it is edited: its agents go on, undisposed."""
    disposal = "@mesh.dispose\ndef gone():\n    ledger.runs.append('disposed')\n"
    lib = library(f"import ledger\n{MESH}{agent(f'{bench.name}.lib')}{disposal}")
    helper = f"import {lib}\n"
    async with bench.serve({"a.py": f"import _h\n{MESH}{agent(f'{bench.name}.a')}", "_h.py": helper}):
        for number in (1, 2):
            source = f"import _h\n{MESH}{agent(f'{bench.name}.a', str(number))}"
            outcome = await bench.reloaded({"a.py": source, "_h.py": f"{helper}# {number}\n"})
            assert [f"{bench.name}.a 0.1.0"] == outcome.agents
            await bench.host.node.reconciler.wait_idle()
            assert ["ok", number] == [await bench.call(".lib"), await bench.call(".a")]
        assert [] == bench.ledger.runs
    assert ["disposed"] == bench.ledger.runs


async def test_a_librarys_function_is_the_agent_of_who_declares_it(
    bench: Bench, library: Callable[[str], str]
) -> None:
    """Where the handler comes from does not matter: without its declaration the agent is gone."""
    lib = library("async def handler(req: dict) -> str:\n    return 'from a library'\n")
    declared = f"mesh.agent(AgentSpec(name='{bench.name}.b'))({lib}.handler)\n"
    source = f"import {lib}\n{MESH}{agent(f'{bench.name}.a')}"
    async with bench.serve({"a.py": source + declared}):
        assert "from a library" == await bench.call(".b")
        outcome = await bench.reloaded({"a.py": source})
        assert [f"{bench.name}.a 0.1.0", f"{bench.name}.b withdrawn"] == outcome.agents
        await bench.listed(".a")


async def test_a_package_in_a_namespace_is_reloaded(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder without `__init__`: it and its helpers are, packages of others there are not."""
    company = f"company_{uuid4().hex}"
    monkeypatch.syspath_prepend(str(tmp_path / "others"))
    monkeypatch.syspath_prepend(str(tmp_path / "ours"))
    imports = (
        f"import {company}.ours.helper, {company}.theirs\n"
        f"from {company} import ours\nfrom {company}.ours import helper\n"
    )
    asked = f"[helper.N, {company}.ours.helper.N, ours.helper.N, {company}.theirs.N]"
    write(tmp_path / f"others/{company}", {"theirs/__init__.py": "N = 0\n"})
    ours = tmp_path / f"ours/{company}/ours"
    files = {"__init__.py": "", "agents.py": f"{imports}{MESH}{agent(bench.name, asked)}"}
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
