"""Which modules a reload executes again, and which classes and helpers the old and the new version have."""

import asyncio
import shutil

import pytest
from openagentmesh import InvalidInput, NotFound

from tests.support.host_bench import RUN, Bench
from tests.support.modules import MESH, agent

STYLES = {
    "relative": "from ._h import N\n",
    "relative-module": "from . import _h\nN = _h.N\n",
    "absolute": "from _h import N\n",
    "module": "import _h\nN = _h.N\n",
    "star": "from _h import *\n",
    "import_module": "import importlib\nN = importlib.import_module('_h').N\n",
    "import_module-relative": "import importlib\nN = importlib.import_module('._h', __package__).N\n",
    "import_module-from": "from importlib import import_module\nN = import_module('_h').N\n",
    "dunder-import": "N = __import__('_h').N\n",
    "namespace": "from _space.h import N\n",
    "namespace-module": "import _space.h\nN = _space.h.N\n",
    "namespace-from": "from _space import h\nN = h.N\n",
    "package": "from _pack.h import N\n",
    "package-from": "from _pack import h\nN = h.N\n",
    "package-star": "from _pack.h import *\n",
    "package-all": "from _pack import *\nN = h.N\n",
}


@pytest.mark.parametrize("style", STYLES)
async def test_an_edited_helper_reloads_its_importers(bench: Bench, style: str) -> None:
    """An edit of a helper reloads the modules that import it, in any style, and no others."""
    helper = "_space/h.py" if "space" in style else "_pack/h.py" if "pack" in style else "_h.py"
    files = {
        "a.py": RUN + STYLES[style] + MESH + agent(f"{bench.name}.a", "N"),
        "b.py": RUN + MESH + agent(f"{bench.name}.b"),
        helper: RUN + "N = 1\n",
        "_pack/__init__.py": "__all__ = ['h']\n",
    }
    async with bench.serve(files):
        bench.ledger.executed()
        result = await bench.reloaded({helper: RUN + "N = 2\n"})
        assert [f"agents/{helper}"] == result.files
        assert [f"{bench.name}.a 0.1.0"] == result.agents
        assert sorted(["a", helper.removesuffix(".py").replace("/", ".")]) == bench.ledger.executed()
        assert [2, "ok"] == [await bench.call(".a"), await bench.call(".b")]


async def test_an_edit_reloads_indirect_importers(bench: Bench) -> None:
    """Importers of importers are executed again; unchanged modules that they import are not."""
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


async def test_modules_that_import_each_other_are_reloaded_together(bench: Bench) -> None:
    """An edit of one module of an import cycle executes all of it, and no module refers to an old one."""
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


async def test_a_reload_by_name_includes_changed_helpers(bench: Bench) -> None:
    """A reload of one module also executes the changed modules that it imports."""
    async with bench.serve(
        {"a.py": "from _h import N\n" + MESH + agent(bench.name, "N"), "_h.py": "N=1"}
    ) as host:
        bench.write({"_h.py": "N=2"})
        assert await host.reload("a") is not None
        assert 2 == await bench.call()


FORWARD_REFERENCES = """{future}
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
    assert isinstance(req.item, Item), "an item of another version"
    assert all(isinstance(item, Item) for item in req.more)
    return Item.model_validate(req.item)
"""


@pytest.mark.parametrize("future", ["", "from __future__ import annotations"], ids=["evaluated", "strings"])
async def test_forward_references_resolve_to_classes_of_the_same_version(bench: Bench, future: str) -> None:
    """Requests in flight use the old models and new requests the new ones, though their names are equal."""

    def source(size: str) -> str:
        return FORWARD_REFERENCES.format(future=future, mesh=MESH, name=bench.name, size=size)

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


async def test_an_object_of_an_old_class_is_no_instance_of_the_new_one(bench: Bench) -> None:
    """An object that outlives a reload keeps its class, which differs from the new class of that name."""
    source = "import ledger\nfrom _model import M\nif not hasattr(ledger, 'kept'): ledger.kept = M()\n"
    result = "[isinstance(ledger.kept, M), type(ledger.kept).VERSION, M.VERSION]"
    files = {"a.py": source + MESH + agent(bench.name, result), "_model.py": "class M: VERSION = 1\n"}
    async with bench.serve(files):
        assert [True, 1, 1] == await bench.call()
        await bench.reloaded({"_model.py": "class M: VERSION = 2\n"})
        assert [False, 1, 2] == await bench.call()


async def test_a_module_may_become_a_package_and_a_module_again(bench: Bench) -> None:
    """`a.py` and `a/__init__.py` declare the same agent from different files."""
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


async def test_agents_are_added_and_withdrawn_with_their_files(bench: Bench) -> None:
    """A new file adds an agent, a new name replaces one, a deleted file withdraws one from the catalog."""
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
        for suffix in ".a", ".b":
            with pytest.raises(NotFound):
                await bench.call(suffix)
