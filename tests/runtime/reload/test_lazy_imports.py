"""Reloads at awkward moments: half-bound agents, stops, imports in requests, names that clash."""

import asyncio
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import AgentMesh, Host
from openagentmesh.mesh.node import Node
from openagentmesh.runtime.config import load_config

from tests.support.host_bench import Bench
from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import reloads_of, until_answers, watched_host
from tests.support.waiting import until

KEPT = """
from pydantic import BaseModel
class Job(BaseModel):
    number: int = 0
{more}
@mesh.keep
def jobs() -> dict[str, Job]:
    return {{}}
"""


@pytest.fixture
def slow_binding(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Whoever binds an agent waits for this, once it has looked at what others serve."""
    go, conflicts = asyncio.Event(), Node._check_conflicts

    async def waiting(self: Node, names: Any) -> None:
        await conflicts(self, names)
        await go.wait()

    monkeypatch.setattr(Node, "_check_conflicts", waiting)
    return go


async def test_a_version_that_is_being_bound_does_not_come_back(
    bench: Bench, slow_binding: asyncio.Event
) -> None:
    """While a new contract is made known a newer version of the code is saved: that one stays."""
    slow_binding.set()

    def version(result: int, number: str) -> dict[str, str]:
        return {
            "a.py": f"{MESH}@mesh.agent(AgentSpec(name={bench.name!r}, version={number!r}))\n"
            f"async def handler(req: dict) -> int:\n    return {result}\n"
        }

    async with bench.serve(version(1, "1.0.0")) as host:
        slow_binding.clear()
        await bench.reloaded(version(2, "2.0.0"))
        await asyncio.sleep(0)
        await bench.reloaded(version(3, "2.0.0"))
        slow_binding.set()
        await host.node.wait_served()
        assert 3 == await bench.call()


async def test_an_agent_that_goes_and_comes_while_it_is_bound(
    bench: Bench, slow_binding: asyncio.Event
) -> None:
    """New, deleted and restored before the first could be made known: it serves in the end."""
    files = {"a.py": MESH + agent(f"{bench.name}.a")}
    slow_binding.set()
    async with bench.serve({"z.py": MESH + agent(f"{bench.name}.z")}) as host:
        slow_binding.clear()
        await bench.reloaded(files)
        await asyncio.sleep(0)
        bench.path("a.py").unlink()
        await bench.reloaded()
        await bench.reloaded(files)
        slow_binding.set()
        await host.node.wait_served()
        await host.wait_retired()
        assert "ok" == await bench.call(".a")


async def test_a_new_file_takes_no_name_from_one_that_serves(bench: Bench) -> None:
    """Wherever it stands in the order of files: the new one is refused, the other serves all it had."""
    name = bench.name
    async with bench.serve({"b.py": MESH + agent(f"{name}.x") + agent(f"{name}.y")}):
        assert (
            "is declared twice"
            in (await bench.refused({"a.py": MESH + agent(f"{name}.x", "'stolen'")})).error
        )
        assert ["ok", "ok"] == [await bench.call(".x"), await bench.call(".y")]


async def test_a_migration_may_change_what_it_is_given(bench: Bench) -> None:
    """It works on a copy of its own, so changing that in place and returning it is as good as any way."""
    source = f"{MESH}{KEPT.format(more='')}{agent(bench.name, 'len(jobs)')}"
    fill = source.replace("return len(jobs)", "jobs['a'] = Job(number=1)\n    return len(jobs)")
    moving = source.replace("number", "count") + (
        "@mesh.migrate\n"
        "def move(old, version):\n"
        "    for job in old['jobs'].values():\n"
        "        job['count'] = job.pop('number')\n"
        "    return old\n"
    )
    async with bench.serve({"a.py": fill}):
        await bench.call()
        await bench.reloaded({"a.py": moving.replace("len(jobs)", "jobs['a'].count")})
        assert 1 == await bench.call()


async def test_collections_of_a_modules_own_models_are_made_anew(bench: Bench) -> None:
    """What a kept dict is said to hold is of the new class after a reload, not of the old one."""
    source = f"{MESH}{KEPT}{agent(f'{bench.name}.put', 'jobs.update(a=Job(number=4))')}"
    source += agent(f"{bench.name}.get", "[isinstance(jobs['a'], Job), jobs['a'].number, jobs['a'].{read}]")
    async with bench.serve({"a.py": source.format(more="", read="number")}):
        await bench.call(".put")
        await bench.reloaded({"a.py": source.format(more="    size: int = 7", read="size")})
        assert [True, 4, 7] == await bench.call(".get")


async def test_a_stop_ends_a_reload(bench: Bench) -> None:
    """A load that hangs does not hold up the stop, and nothing of it is left."""
    bench.ledger.go.clear()
    async with bench.serve({"a.py": MESH + agent(bench.name)}) as host:
        bench.write({"a.py": "import ledger\nledger.started.set()\nledger.go.wait(20)\n"})
        reloading = asyncio.create_task(host.reload())
        await asyncio.to_thread(bench.ledger.started.wait, 5)
    assert reloading.cancelled()
    bench.ledger.go.set()
    assert not [name for name in sys.modules if name.startswith("oam_agents")]


async def test_what_is_let_go_of_at_a_stop_is_disposed_of(
    configure: Configure, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each version once, though the old one had no time to finish."""
    told: list[int] = []
    monkeypatch.setattr(asyncio, "told", told, raising=False)
    source = (
        f"import asyncio\n{MESH}@mesh.agent(AgentSpec(name={name!r}))\n"
        "async def publisher() -> int:\n    while True:\n"
        "        yield NUMBER\n        await asyncio.sleep(9)\n"
        "@mesh.dispose\ndef over():\n    asyncio.told.append(NUMBER)\n"
    )
    async with Host(configure({"a.py": source.replace("NUMBER", "1")}, host={"drain_timeout": 0})) as host:
        write(tmp_path / "agents", {"a.py": source.replace("NUMBER", "2")})
        assert (await host.reload()) is not None
    assert [1, 2] == told


@pytest.mark.parametrize("wrong", ["sys.exit('no')", "raise KeyboardInterrupt"])
async def test_a_model_that_ends_the_program_is_refused(bench: Bench, wrong: str) -> None:
    """A validator of what is kept may raise anything; the old version goes on."""
    source = f"import sys\n{MESH}{KEPT.format(more='')}{agent(bench.name, 'jobs.update(a=Job())')}"
    bad = source.replace(
        "number: int = 0", "number: int = 0\n    def model_post_init(self, _):\n        " + wrong
    )
    async with bench.serve({"a.py": source}):
        await bench.call()
        assert (await bench.refused({"a.py": bad})).error
        assert {} == await bench.call()


async def test_old_code_imports_what_is_not_on_disk_for_a_moment(bench: Bench) -> None:
    """A helper whose file is taken away is there for code that imports it in a request."""
    files = {"a.py": MESH + agent(bench.name, "__import__('_h').N"), "_h.py": "N = 1\n"}
    async with bench.serve(files):
        assert 1 == await bench.call()
        bench.path("_h.py").rename(bench.path("_h.py~"))
        assert 1 == await bench.call()
        assert 1 == await bench.call()
        bench.path("_h.py~").rename(bench.path("_h.py"))
        assert 1 == await bench.call()


@pytest.mark.parametrize("ends", ["", "1/0\n"])
async def test_an_import_of_a_request_is_no_part_of_a_reload(bench: Bench, ends: str) -> None:
    """What a request imports first while others load goes on working, whatever becomes of the load."""
    lazy = "def f():\n    import json\n    return 'lazy'\n"
    files = {"a.py": MESH + agent(f"{bench.name}.a"), "_lazy.py": lazy}
    files["b.py"] = MESH + agent(f"{bench.name}.b", "__import__('_lazy').f()")
    async with bench.serve(files) as host:
        bench.ledger.go.clear()
        bench.write({"a.py": f"import ledger\nledger.started.set()\nledger.go.wait(9)\n{ends}"})
        reloading = asyncio.create_task(host.reload())
        await asyncio.to_thread(bench.ledger.started.wait, 5)
        assert "lazy" == await bench.call(".b")
        bench.ledger.go.set()
        await reloading
        assert "lazy" == await bench.call(".b")


async def test_an_import_of_a_request_does_not_wait_for_a_load(bench: Bench) -> None:
    """A helper that is just loaded anew, and takes long, is there in its old version for others."""
    files = {"a.py": "import _h\n" + MESH + agent(f"{bench.name}.a"), "_h.py": "N = 1\n"}
    files["b.py"] = MESH + agent(f"{bench.name}.b", "__import__('_h').N")
    async with bench.serve(files) as host:
        bench.ledger.go.clear()
        bench.write({"_h.py": "import ledger\nledger.started.set()\nledger.go.wait(9)\nN = 2\n"})
        reloading = asyncio.create_task(host.reload())
        await asyncio.to_thread(bench.ledger.started.wait, 5)
        async with asyncio.timeout(5):
            assert 1 == await bench.call(".b")
        bench.ledger.go.set()
        await reloading
        assert 2 == await bench.call(".b")


async def test_a_load_that_is_given_up_loads_nothing_more(bench: Bench) -> None:
    """The files after the one that hangs are not executed behind anybody's back, and can be mended."""
    async with bench.serve({"z.py": MESH + agent(f"{bench.name}.z")}, load_timeout=0.2) as host:
        hanging = "import time\nfor _ in range(400): time.sleep(0.01)\n"
        await bench.refused({"a.py": hanging, "b.py": MESH + agent(f"{bench.name}.b") + "\nimport ledger\n"})
        assert {"failed"} == {m.state for m in host.modules if m.origin.display_name != "agents/z.py"}
        bench.path("a.py").unlink()
        await bench.reloaded({"b.py": MESH + agent(f"{bench.name}.b", "'mended'")})
        await host.node.wait_served()
        assert "mended" == await bench.call(".b")


async def test_what_a_handler_writes_reloads_nothing(bench: Bench) -> None:
    """A file that a module reads while loading and its handler writes is its own, no edit."""
    read = "from pathlib import Path\nFILE = Path(__file__).with_name('state.txt')\nTEXT = FILE.read_text()\n"
    files = {"a.py": read + MESH + agent(bench.name, "FILE.write_text(req['text'])"), "state.txt": "1"}
    async with bench.serve(files) as host:
        assert 3 == await bench.call(request={"text": "two"})
        assert await host.reload() is None


async def test_by_name_a_module_gets_the_helpers_that_are_on_disk(bench: Bench) -> None:
    """`oam reload a` executes what has changed of all that `a` imports."""
    async with bench.serve(
        {"a.py": "from _h import N\n" + MESH + agent(bench.name, "N"), "_h.py": "N=1"}
    ) as host:
        bench.write({"_h.py": "N=2"})
        outcome = await host.reload("a")
        assert outcome is not None
        assert 2 == await bench.call()


async def test_a_module_that_was_missing_is_loaded_when_it_appears(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two dotted modules that cannot be loaded, each is mended by itself."""
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path, {f"{name}_a.py": "1/0"})
    names = [f"{name}_a", f"{name}_b"]
    async with Host(configure({}, host={"agents": names})) as host:
        assert ["failed", "failed"] == [module.state for module in host.modules]
        write(tmp_path, {f"{name}_b.py": MESH + agent(f"{name}.b")})
        outcome = await host.reload()
        assert outcome is not None
        assert ([names[1]], "") == (outcome.files, outcome.error)
        await host.node.wait_served()
        assert "ok" == await mesh.call(f"{name}.b", {})
    for each in names:
        sys.modules.pop(each, None)


async def test_a_folder_that_is_gone_stops_no_other_reloads(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """It is told once; its agents go on, and files elsewhere are reloaded."""
    write(tmp_path / "more", {"m.py": MESH + agent(f"{name}.m")})
    config = configure({"a.py": MESH + agent(f"{name}.a")}, host={"agents": ["agents", "./more"]})
    async with Host(config) as host:
        (tmp_path / "more/m.py").unlink()
        (tmp_path / "more").rmdir()
        outcome = await host.reload()
        assert outcome is not None
        assert "neither a folder" in outcome.error
        assert await host.reload() is None
        write(tmp_path / "agents", {"a.py": MESH + agent(f"{name}.a", "2")})
        await host.reload()
        assert [2, "ok"] == [await mesh.call(f"{name}.a", {}), await mesh.call(f"{name}.m", {})]


async def test_doubt_is_not_ended_by_others(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A file that is gone for a moment is no deletion, whatever else happens in its folder."""
    path = tmp_path / "agents/a.py"
    async with watched_host(configure, {"a.py": MESH + agent(name, "1")}) as host:
        await until_answers(mesh, name, 1)
        path.rename(tmp_path / "aside")
        for _ in range(10):
            (tmp_path / "agents/4913").touch()
            (tmp_path / "agents/4913").unlink()
            await asyncio.sleep(0.015)
        (tmp_path / "aside").write_text(MESH + agent(name, "2"))
        (tmp_path / "aside").rename(path)
        await until_answers(mesh, name, 2)
        await until(lambda: reloads_of(host))
        assert [f"{name} 0.1.0"] == [text for reload in reloads_of(host) for text in reload.agents]


@pytest.mark.parametrize("links", [{"one": ".", "two": "."}, {"x/to": "../y", "y/to": "../x"}])
async def test_links_that_lead_back_are_not_followed(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, links: dict[str, str]
) -> None:
    """The folder is looked at once, however often it contains itself."""
    config = configure({"a.py": MESH + agent(name), "x/_.py": "", "y/_.py": ""})
    for link, target in links.items():
        (tmp_path / "agents" / link).symlink_to(target)
    async with asyncio.timeout(10), Host(config, watch=True) as host:
        assert ["agents/a.py"] == [module.origin.display_name for module in host.modules]
        write(tmp_path / "agents", {"a.py": MESH + agent(name, "2")})
        await until_answers(mesh, name, 2)


async def test_a_reload_by_name_leaves_mesh_toml_for_later(
    tmp_path: Path, url: str, name: str, mesh: AgentMesh
) -> None:
    """What else mesh.toml says is not taken with one module, and is not lost either."""
    toml = f"mesh.url = {url!r}\nhost.entry_points = false\n"
    (tmp_path / "mesh.toml").write_text(toml)
    write(tmp_path / "agents", {"a.py": MESH + agent(name)})
    read = partial(load_config, tmp_path / "mesh.toml")
    async with Host(read(), config_file=tmp_path / "mesh.toml", read_config=read) as host:
        (tmp_path / "mesh.toml").write_text(toml + "limits.queue = 3\n")
        await host.reload("a")
        assert 256 == host.agents[0].limits.queue
        await host.reload()
        assert 3 == host.agents[0].limits.queue


async def test_what_is_written_while_it_is_read_does_not_serve(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A file that is saved again while it is loaded is looked at again; only the last save is a reload."""
    started, path = tmp_path / "started", tmp_path / "agents/a.py"
    slow = f"import time\nopen({str(started)!r}, 'w').close()\ntime.sleep(0.3)\n"
    async with watched_host(configure, {"a.py": MESH + agent(name, "0")}) as host:
        await until_answers(mesh, name, 0)
        path.write_text(slow + MESH + agent(name, "1"))
        await until(started.exists)
        path.write_text(MESH + agent(name, "2"))
        await until_answers(mesh, name, 2)
        assert 1 == len(reloads_of(host))
