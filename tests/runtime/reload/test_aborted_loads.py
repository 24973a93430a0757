"""Reloads in corners: homes, hosts side by side, loads that were given up, secrets, what is left."""

import asyncio
import threading
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Host

from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import reload, replay_settings, replayable_agent
from tests.support.waiting import until


async def test_a_home_that_is_away_takes_no_agents_with_it(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agents below `~` stay while it is not there, as those of any place that mesh.toml names."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    write(home / "agents", {"a.py": MESH + agent(f"{name}.a")})
    config = configure({"b.py": MESH + agent(f"{name}.b", "1")}, host={"agents": ["~/agents", "agents"]})
    async with Host(config) as host:
        home.rename(tmp_path / "away")
        outcome = await reload(host, tmp_path)
        assert "'~/agents' is neither a folder nor a Python file" in outcome.error
        outcome = await reload(host, tmp_path, MESH + agent(f"{name}.b", "2"), file="b.py")
        assert [f"{name}.b 0.1.0"] == outcome.agents
        assert ("ok", 2) == (await mesh.call(f"{name}.a", {}), await mesh.call(f"{name}.b", {}))


async def test_two_hosts_of_one_process_end_in_any_order(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """The one that stays still finds the siblings of its files by dynamic imports."""
    first = Host(configure({"a.py": MESH + agent(f"{name}.first")}, folder=tmp_path / "first"))
    source = MESH + "import importlib\nH = importlib.import_module('_h')\n"
    files = {"a.py": source + agent(name, "(H.N, 1)"), "_h.py": "N = 'helped'\n"}
    await first.start()
    async with Host(configure(files, folder=tmp_path / "second")) as second:
        await first.stop()
        outcome = await reload(second, tmp_path / "second", source + agent(name, "(H.N, 2)"))
        assert "" == outcome.error
        assert ["helped", 2] == await mesh.call(name, {})


HANGS = "import time\ntime.sleep({seconds})\n"


async def test_of_a_load_that_was_given_up_nothing_more_is_executed(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Once the file that hung has ended, those after it are not loaded, nor watched ever after."""
    files = {"a.py": MESH + agent(f"{name}.a"), "z.py": MESH + agent(f"{name}.z")}
    async with Host(configure(files, host={"load_timeout": 0.2})) as host:
        ran = tmp_path / "ran"
        write(tmp_path / "agents", {"b.py": f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"})
        outcome = await reload(host, tmp_path, HANGS.format(seconds=0.5))
        assert "takes too long" in outcome.error
        await until(lambda: "oam-aside" not in [thread.name for thread in threading.enumerate()])
        assert not ran.exists()
        assert host._reloader is not None
        names = {name.rpartition(".")[2] for name in host._reloader._loader.imports.modules}
        assert {"a", "z"} == names


async def test_a_load_that_is_given_up_is_what_status_tells(
    configure: Configure, name: str, tmp_path: Path
) -> None:
    """A file that failed at the start for one reason, and fails now for another, says the newer one."""
    async with Host(configure({"a.py": "def broken(:\n"}, host={"load_timeout": 0.2})) as host:
        assert "SyntaxError" in host.modules[0].error
        await reload(host, tmp_path, HANGS.format(seconds=0.5))
        assert "takes too long" in host.modules[0].error
        assert host.modules[0].line.endswith("a.py:2")


async def test_what_finishes_on_the_old_version_is_no_measure_of_the_next(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A reply of a version that serves no more is not what a replay is compared with."""
    go = tmp_path / "go"
    wait = f"import asyncio, pathlib\nGO = pathlib.Path({str(go)!r})\nasync def wait(req):\n"
    wait += "    while req and not GO.exists():\n        await asyncio.sleep(0.005)\n"
    source = wait + replayable_agent(name, "await wait(req) or 'old'")
    async with Host(configure({"a.py": source}, **replay_settings())) as host:
        slow = asyncio.create_task(mesh.call(name, {"slow": True}))
        await until(lambda: bool(host.node.router.get(name) and host.status().agents[0].in_flight))
        new = source.replace("'old'", "'new'")
        assert 1 == (await reload(host, tmp_path, new)).in_flight
        go.touch()
        assert "old" == await slow
        assert [] == (await reload(host, tmp_path, f"{new}\n# the same\n")).notes
        assert [f'{name}: {{"slow":true}} → "newer" (was "new")'] == (
            await reload(host, tmp_path, source.replace("'old'", "'newer'"))
        ).notes


@pytest.mark.parametrize("when", ["migrate", "replay"])
async def test_what_a_new_version_imports_before_it_serves_is_new(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, when: str
) -> None:
    """A migration, and a handler that a request is replayed to, import the helpers they were written for."""
    lazily = "from _h import number\n"

    def source(version: str, asked: str) -> str:
        text = MESH + "import _h\nfrom pydantic import BaseModel\nclass Kept(BaseModel):\n    n: int = 0\n"
        text += "@mesh.keep\ndef kept() -> Kept:\n    return Kept()\n@mesh.migrate\n"
        moved = f"    {lazily}" if when == "migrate" else "    number = 1\n"
        text += f"def move(old: dict, from_version: str) -> dict:\n{moved}"
        text += "    return {'kept': {'n': number}}\n"
        text += f"@mesh.agent(AgentSpec(name={name!r}, version={version!r}, replayable=True))\n"
        return text + f"async def handler(req: dict) -> object:\n    {asked}\n    return [number, kept.n]\n"

    asked = lazily.strip() if when == "replay" else "from _h import number"
    files = {"a.py": source("0.1.0", asked), "_h.py": "number = 1\n"}
    async with Host(configure(files, **replay_settings())) as host:
        assert [1, 0] == await mesh.call(name, {})
        write(tmp_path / "agents", {"_h.py": "number = 2\n"})
        outcome = await reload(host, tmp_path, source("0.2.0", asked))
        assert "" == outcome.error
        expected = [2, 2 if when == "migrate" else 1]
        assert expected == await mesh.call(name, {})
        assert [f"{name}: {{}} → {str(expected).replace(' ', '')} (was [1,0])"] == outcome.notes


async def test_secrets_and_deques_are_kept(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """What JSON would mask arrives as it was, wherever it lies."""
    head = MESH + "from collections import deque\nfrom pydantic import BaseModel, SecretBytes, SecretStr\n"
    head += "class Job(BaseModel):\n    token: SecretStr = SecretStr('')\n"
    head += "    raw: SecretBytes = SecretBytes(b'')\n"
    head += "    stars: str = '**********'\n"
    head += "class Kept(BaseModel):\n    jobs: dict[int, list[Job]] = {}\n"
    head += "@mesh.keep\ndef kept() -> Kept:\n    return Kept()\n"
    head += "@mesh.keep\ndef queue() -> deque[Job]:\n    return deque(maxlen=2)\n"
    job = "Job(token=SecretStr('hunter2'), raw=SecretBytes(b'raw'))"
    put = head + agent(name, f"[kept.jobs.update({{7: [{job}]}}), queue.extend([{job}] * 3)]")
    shown = "[each.token.get_secret_value(), each.raw.get_secret_value().decode(), each.stars]"
    get = head + agent(name, f"[{shown} for each in [*kept.jobs[7], *queue]] + [queue.maxlen]")
    async with Host(configure({"a.py": put})) as host:
        await mesh.call(name, {})
        assert "" == (await reload(host, tmp_path, get)).error
        assert [["hunter2", "raw", "*" * 10]] * 3 + [2] == await mesh.call(name, {})


async def test_what_a_refused_version_leaves_behind_is_named(
    configure: Configure, name: str, tmp_path: Path
) -> None:
    """Threads and logging handlers of a version that never served are in nobody's way, but there."""
    begun = "import logging, threading\nclass H(logging.Handler): ...\ndef wait(): over.wait()\n"
    begun += "over = threading.Event()\nthreading.over = over\n"
    begun += f"threading.Thread(target=wait, daemon=True, name='worker-{name}').start()\n"
    begun += f"logging.getLogger({name!r}).addHandler(H())\n"
    async with Host(configure({"a.py": MESH + agent(name)})) as host:
        outcome = await reload(host, tmp_path, MESH + agent(name) + begun + "oops\n")
        vars(threading).pop("over").set()
        assert "NameError" in outcome.error
        assert [
            f"the refused version left behind: the thread worker-{name}",
            f"the refused version left behind: the logging handler H of '{name}'",
        ] == outcome.notes
