"""Imports while requests run, and before a new version serves: each version imports its own helpers."""

import asyncio
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Host

from tests.support.host_bench import Bench
from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import reload, replay_settings


def waiting_agent(name: str, result: str) -> str:
    """The source of an agent whose requests wait at the gate, and then return `result`."""
    return agent(name, f"(await ledger.wait()) or {result}")


LAZY_IMPORTS = {
    "absolute": "from _h import N",
    "relative": "from ._h import N",
    "module": "import _h; N = _h.N",
    "import_module": "import importlib; N = importlib.import_module('_h').N",
    "package": "from _pack.h import N",
    "package-from": "from _pack import h; N = h.N",
    "package-module": "import _pack.h; N = _pack.h.N",
}


@pytest.mark.parametrize("between", [False, True], ids=["helper", "module-then-helper"])
@pytest.mark.parametrize("style", LAZY_IMPORTS)
async def test_a_request_in_flight_imports_the_helper_of_its_version(
    bench: Bench, style: str, *, between: bool
) -> None:
    """An import in a function of an old version finds the old helper, which a later reload replaced.

    With `between`, an earlier reload has replaced the module itself.
    """
    helper = "_pack/h.py" if "pack" in style else "_h.py"
    source = f"import ledger\n{MESH}\ndef lazy():\n    {LAZY_IMPORTS[style]}\n    return N\nlazy()\n"
    source += waiting_agent(bench.name, "lazy()")
    async with bench.serve({"a.py": source, helper: "N = 1\n", "_pack/__init__.py": ""}):
        request = await bench.in_flight()
        if between:
            await bench.reloaded({"a.py": source + "\n"})
        await bench.reloaded({helper: "N = 2\n"})
        bench.ledger.gate.set()
        assert [1, 2] == [await request, await bench.call()]


SUBMODULES = {
    "package": {"a.py": "import _pack.h as h, _pack.h\n", "_pack/__init__.py": "", "_pack/h.py": ""},
    "namespace": {"a.py": "import _pack.h as h, _pack.h\n", "_pack/h.py": ""},
    "own-package": {"a/__init__.py": "from . import h\n", "a/h.py": ""},
}


@pytest.mark.parametrize("style", SUBMODULES)
async def test_a_request_in_flight_keeps_the_submodules_of_its_packages(bench: Bench, style: str) -> None:
    """In old code the attribute of a package is the old submodule, also after a refused reload."""
    entry, *_, helper = SUBMODULES[style]
    result = "h.N" if style == "own-package" else "_pack.h.N"
    files = SUBMODULES[style] | {helper: "N = 1\n"}
    files[entry] += f"import ledger\n{MESH}" + waiting_agent(bench.name, result)
    async with bench.serve(files):
        request = await bench.in_flight()
        await bench.refused({helper: "N = 2\n1/0\n"})
        await bench.reloaded({helper: "N = 2\n"})
        bench.ledger.gate.set()
        assert [1, 2] == [await request, await bench.call()]


async def test_a_request_imports_a_helper_whose_file_is_missing(bench: Bench) -> None:
    """A helper whose file was renamed away is still imported by requests."""
    files = {"a.py": MESH + agent(bench.name, "__import__('_h').N"), "_h.py": "N = 1\n"}
    async with bench.serve(files):
        assert 1 == await bench.call()
        bench.path("_h.py").rename(bench.path("_h.py~"))
        assert 1 == await bench.call()
        assert 1 == await bench.call()
        bench.path("_h.py~").rename(bench.path("_h.py"))
        assert 1 == await bench.call()


@pytest.mark.parametrize("end", ["", "1/0\n"], ids=["completed", "refused"])
async def test_an_import_in_a_request_is_independent_of_a_running_reload(bench: Bench, end: str) -> None:
    """A helper that a request imports first during a load keeps working, even if the load fails."""
    lazy = "def f():\n    import json\n    return 'lazy'\n"
    files = {"a.py": MESH + agent(f"{bench.name}.a"), "_lazy.py": lazy}
    files["b.py"] = MESH + agent(f"{bench.name}.b", "__import__('_lazy').f()")
    async with bench.serve(files) as host:
        bench.write({"a.py": f"import ledger\nledger.started.set()\nledger.go.wait(9)\n{end}"})
        reloading = asyncio.create_task(host.reload())
        assert await asyncio.to_thread(bench.ledger.started.wait, 5)
        assert "lazy" == await bench.call(".b")
        bench.ledger.go.set()
        await reloading
        assert "lazy" == await bench.call(".b")


async def test_an_import_in_a_request_does_not_wait_for_a_load(bench: Bench) -> None:
    """While a helper is slowly loaded again, requests import its old version."""
    files = {"a.py": "import _h\n" + MESH + agent(f"{bench.name}.a"), "_h.py": "N = 1\n"}
    files["b.py"] = MESH + agent(f"{bench.name}.b", "__import__('_h').N")
    async with bench.serve(files) as host:
        bench.write({"_h.py": "import ledger\nledger.started.set()\nledger.go.wait(9)\nN = 2\n"})
        reloading = asyncio.create_task(host.reload())
        assert await asyncio.to_thread(bench.ledger.started.wait, 5)
        async with asyncio.timeout(5):
            assert 1 == await bench.call(".b")
        bench.ledger.go.set()
        await reloading
        assert 2 == await bench.call(".b")


@pytest.mark.parametrize("importer", ["migration", "handler"])
async def test_a_new_version_imports_new_helpers_before_it_serves(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, importer: str
) -> None:
    """A migration, and a handler to which a request is replayed, import the new helpers."""

    def source(version: str) -> str:
        text = MESH + "import _h\nfrom pydantic import BaseModel\nclass Kept(BaseModel):\n    n: int = 0\n"
        text += "@mesh.keep\ndef kept() -> Kept:\n    return Kept()\n@mesh.migrate\n"
        number = "from _h import number" if importer == "migration" else "number = 1"
        text += f"def migrate(old: dict, from_version: str) -> dict:\n    {number}\n"
        text += "    return {'kept': {'n': number}}\n"
        text += f"@mesh.agent(AgentSpec(name={name!r}, version={version!r}, replayable=True))\n"
        text += "async def handler(req: dict) -> object:\n    from _h import number\n"
        return text + "    return [number, kept.n]\n"

    files = {"a.py": source("0.1.0"), "_h.py": "number = 1\n"}
    async with Host(configure(files, **replay_settings())) as host:
        assert [1, 0] == await mesh.call(name, {})
        write(tmp_path / "agents", {"_h.py": "number = 2\n"})
        result = await reload(host, tmp_path, source("0.2.0"))
        assert "" == result.error
        expected = [2, 2 if importer == "migration" else 1]
        assert expected == await mesh.call(name, {})
        assert [f"{name}: {{}} → {str(expected).replace(' ', '')} (was [1,0])"] == result.notes


async def test_two_hosts_of_a_process_stop_in_any_order(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """After the first host has stopped, dynamic imports find helpers in the folder of the second."""
    first = Host(configure({"a.py": MESH + agent(f"{name}.first")}, folder=tmp_path / "first"))
    source = MESH + "import importlib\nH = importlib.import_module('_h')\n"
    files = {"a.py": source + agent(name, "(H.N, 1)"), "_h.py": "N = 'helper'\n"}
    await first.start()
    async with Host(configure(files, folder=tmp_path / "second")) as second:
        await first.stop()
        result = await reload(second, tmp_path / "second", source + agent(name, "(H.N, 2)"))
        assert "" == result.error
        assert ["helper", 2] == await mesh.call(name, {})
