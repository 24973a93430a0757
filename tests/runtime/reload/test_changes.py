"""What is a change: contents, not times; missing modules that appear, and folders that are missing."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Host
from openagentmesh.runtime.loading.files import DigestCache

from tests.support.host_bench import RUN, Bench
from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import raise_too_many_open_files, reload, until_answers


def write_in_place(path: Path, old: os.stat_result) -> None:
    path.write_text(path.read_text().replace("1111", "2222"))


def write_with_old_time(path: Path, old: os.stat_result) -> None:
    write_in_place(path, old)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def replace_by_rename(path: Path, old: os.stat_result) -> None:
    path.with_suffix(".tmp").write_text(path.read_text().replace("1111", "2222"))
    write_with_old_time(path.with_suffix(".tmp"), old)
    path.with_suffix(".tmp").rename(path)


@pytest.mark.parametrize("save", [write_in_place, write_with_old_time, replace_by_rename])
@pytest.mark.parametrize("file", ["a.py", "_h.py", "prompt.txt"])
async def test_an_edit_of_the_same_size_is_detected(
    bench: Bench, file: str, save: Callable[[Path, os.stat_result], None]
) -> None:
    """Contents are compared: an edit that changes neither size nor modification time is a change."""
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


async def test_a_save_of_the_same_content_is_not_reloaded(bench: Bench) -> None:
    """A touch, and a save of the content that is loaded, execute nothing."""
    files = {"a.py": RUN + "import _h\n" + MESH + agent(bench.name), "_h.py": RUN}
    async with bench.serve(files) as host:
        bench.ledger.executed()
        for file in files:
            bench.path(file).touch()
        assert await host.reload() is None
        bench.write(files)
        assert await host.reload() is None
        assert [] == bench.ledger.executed()


async def test_a_large_unchanged_module_is_not_reloaded(bench: Bench) -> None:
    """A helper of more than a megabyte is no change in later reloads."""
    table = "TABLE = '''" + "x" * 1_100_000 + "'''\n"
    files = {"a.py": "from _table import TABLE\n" + MESH + agent(bench.name), "_table.py": table}
    async with bench.serve(files) as host:
        assert [None, None] == [await host.reload(), await host.reload()]


async def test_a_file_that_its_handler_writes_is_not_reloaded(bench: Bench) -> None:
    """A file that a module reads while loading and its handler writes is data, not an edit."""
    read = "from pathlib import Path\nFILE = Path(__file__).with_name('state.txt')\nTEXT = FILE.read_text()\n"
    files = {"a.py": read + MESH + agent(bench.name, "FILE.write_text(req['text'])"), "state.txt": "1"}
    async with bench.serve(files) as host:
        assert 3 == await bench.call(request={"text": "two"})
        assert await host.reload() is None


def test_a_failed_read_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be read for a moment is read again."""
    path, digests = tmp_path / "a.py", DigestCache()
    path.write_text("x = 1")
    with monkeypatch.context() as context:
        context.setattr(Path, "read_bytes", raise_too_many_open_files)
        assert digests.digest(path) is None
    assert digests.digest(path) is not None


async def test_a_new_file_is_found_in_a_folder_with_an_unchanged_time(bench: Bench) -> None:
    """A helper that appears within one tick of the file system's clock is imported."""
    async with bench.serve({"a.py": MESH + agent(bench.name, "1")}) as host:
        await bench.reloaded({"a.py": "from json import dumps\n" + MESH + agent(bench.name, "1")})
        times = bench.path("").stat()
        bench.write({"_h.py": "N = 2\n", "a.py": "from _h import N\n" + MESH + agent(bench.name, "N")})
        os.utime(bench.path(""), ns=(times.st_atime_ns, times.st_mtime_ns))
        await bench.reloaded()
        assert 2 == await bench.call()
        assert await host.reload() is None


MISSING = {
    "absolute": ("from _h import N", "_h.py"),
    "module": ("import _h; N = _h.N", "_h.py"),
    "relative": ("from ._h import N", "_h.py"),
    "relative-from": ("from . import _h; N = _h.N", "_h.py"),
    "import_module": ("import importlib; N = importlib.import_module('_h').N", "_h.py"),
    "package": ("from _h import N", "_h/__init__.py"),
    "module-in-package": ("from _pack.h import N", "_pack/h.py"),
    "module-in-package-from": ("from _pack import h; N = h.N", "_pack/h.py"),
    "package-in-package": ("from _pack import h; N = h.N", "_pack/h/__init__.py"),
    "indirect": ("from _b import N", "_h.py"),
    "data-file": (
        "import pathlib; N = int(pathlib.Path(__file__.replace('a.py', 'n.txt')).read_text())",
        "n.txt",
    ),
}


@pytest.mark.parametrize("style", MISSING)
async def test_an_optional_import_is_reloaded_when_its_file_appears(bench: Bench, style: str) -> None:
    """A file that an optional import did not find reloads the importer when it appears or is deleted."""
    line, helper = MISSING[style]
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


async def test_a_missing_dotted_module_is_loaded_when_it_appears(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two dotted modules that failed to load, the one whose file is written is loaded alone."""
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path, {f"{name}_a.py": "1/0"})
    names = [f"{name}_a", f"{name}_b"]
    async with Host(configure({}, host={"agents": names})) as host:
        assert ["failed", "failed"] == [module.state for module in host.modules]
        write(tmp_path, {f"{name}_b.py": MESH + agent(f"{name}.b")})
        result = await host.reload()
        assert result is not None
        assert ([names[1]], "") == (result.files, result.error)
        await host.node.wait_served()
        assert "ok" == await mesh.call(f"{name}.b", {})
    for each in names:
        sys.modules.pop(each, None)


async def test_a_missing_folder_does_not_block_other_reloads(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """The missing folder is reported once, its agents keep serving, and other files are reloaded."""
    write(tmp_path / "more", {"m.py": MESH + agent(f"{name}.m")})
    config = configure({"a.py": MESH + agent(f"{name}.a")}, host={"agents": ["agents", "./more"]})
    async with Host(config) as host:
        (tmp_path / "more/m.py").unlink()
        (tmp_path / "more").rmdir()
        result = await host.reload()
        assert result is not None
        assert "neither a folder" in result.error
        assert await host.reload() is None
        write(tmp_path / "agents", {"a.py": MESH + agent(f"{name}.a", "2")})
        await host.reload()
        assert [2, "ok"] == [await mesh.call(f"{name}.a", {}), await mesh.call(f"{name}.m", {})]


async def test_agents_of_a_missing_home_folder_keep_serving(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing folder below `~` is reported, its agents keep serving, and other files are reloaded."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    write(home / "agents", {"a.py": MESH + agent(f"{name}.a")})
    config = configure({"b.py": MESH + agent(f"{name}.b", "1")}, host={"agents": ["~/agents", "agents"]})
    async with Host(config) as host:
        home.rename(tmp_path / "moved")
        result = await reload(host, tmp_path)
        assert "'~/agents' is neither a folder nor a Python file" in result.error
        result = await reload(host, tmp_path, MESH + agent(f"{name}.b", "2"), file="b.py")
        assert [f"{name}.b 0.1.0"] == result.agents
        assert ("ok", 2) == (await mesh.call(f"{name}.a", {}), await mesh.call(f"{name}.b", {}))


@pytest.mark.parametrize(
    "links", [{"one": ".", "two": "."}, {"x/to": "../y", "y/to": "../x"}], ids=["parent", "each-other"]
)
async def test_cyclic_symlinks_are_not_followed(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, links: dict[str, str]
) -> None:
    """Each file of a folder with symlinks to itself is loaded once, and its edits are reloaded."""
    config = configure({"a.py": MESH + agent(name), "x/_.py": "", "y/_.py": ""})
    for link, target in links.items():
        (tmp_path / "agents" / link).symlink_to(target)
    async with asyncio.timeout(10), Host(config, watch=True) as host:
        assert ["agents/a.py"] == [module.origin.display_name for module in host.modules]
        write(tmp_path / "agents", {"a.py": MESH + agent(name, "2")})
        await until_answers(mesh, name, 2)
