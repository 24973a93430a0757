"""Reloads that go back, are tried again, or find things gone: none for ever, none in silence."""

import asyncio
import errno
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
from openagentmesh import AgentMesh, Host, MeshTimeout
from openagentmesh.mesh import reconciler
from openagentmesh.registry.presence import Presence
from openagentmesh.registry.registry import Registry
from openagentmesh.runtime.config import load_config
from openagentmesh.runtime.loading.files import DigestCache
from openagentmesh.runtime.reload import retirement, watcher

from tests.support.host_bench import Bench
from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import reloads_of, replay_settings, until_answers, watched_host
from tests.support.waiting import until


@pytest.fixture
def _brief_probation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retirement, "_PROBATION_S", 0.3)


def watcher_agent(name: str, word: str, body: str) -> str:
    """An agent that runs by itself, and says so."""
    return (
        f"{MESH}import asyncio\nimport ledger\n@mesh.agent(AgentSpec(name={name!r}))\n"
        f"async def tick() -> None:\n    ledger.runs.append({word!r})\n    {body}\n"
    )


@pytest.mark.usefixtures("_brief_probation")
async def test_what_failed_before_and_after_goes_back_once(bench: Bench) -> None:
    """A watcher that fails at once, edited to one that does: back to the first, and no further."""
    async with bench.serve({"a.py": watcher_agent(bench.name, "v1", "raise ValueError(1)")}) as host:
        await bench.reloaded({"a.py": watcher_agent(bench.name, "v2", "raise ValueError(2)")})
        await host.wait_retired()
        failures = [outcome.error for outcome in host.status().reloads if outcome.error]
        assert 1 == len(failures)
        assert "ValueError: 2" in failures[0]
        assert ["v2", "v1"] == [word for word in bench.ledger.runs if word != "v1"] + ["v1"]


@pytest.mark.usefixtures("_brief_probation")
async def test_a_setting_sends_no_code_back(url: str, name: str, tmp_path: Path) -> None:
    """A watcher that fails is not the doing of mesh.toml: what that has disabled stays so."""
    toml = f"mesh.url = {url!r}\nhost.entry_points = false\nhost.drain_timeout = 0.5\n"
    path = tmp_path / "mesh.toml"
    path.write_text(toml)
    failing = (
        f"{MESH}@mesh.agent(AgentSpec(name='{name}.p'))\nasync def tick() -> None:\n    raise ValueError\n"
    )
    write(tmp_path / "agents", {"a.py": failing, "b.py": MESH + agent(f"{name}.b")})
    read = partial(load_config, path)
    async with Host(read(), config_file=path, read_config=read) as host:
        path.write_text(f'{toml}limits.queue = 3\nagents."{name}.b".enabled = false\n')
        await host.reload()
        await host.wait_retired()
        assert [f"{name}.p"] == [each.name for each in host.agents]


@pytest.mark.usefixtures("_brief_probation")
@pytest.mark.parametrize(
    ("files", "first"),
    [
        ({"ns/helper.py": "N = 1\n"}, "from ns import helper\n"),
        ({"_opt.py": "import nothing\n"}, "try:\n    import _opt\nexcept ImportError:\n    _opt = None\n"),
    ],
    ids=["a folder", "an optional import"],
)
async def test_whatever_the_new_version_imports_the_old_one_comes_back(
    bench: Bench, files: dict[str, str], first: str
) -> None:
    """Also when what it imports is a folder without a file, or failed and was caught."""
    old = watcher_agent(bench.name, "old", "await asyncio.sleep(99)")
    async with bench.serve({"a.py": old, **files}) as host:
        await bench.reloaded({"a.py": first + watcher_agent(bench.name, "new", "raise ValueError")})
        await host.wait_retired()
        assert ["old", "new", "old"] == bench.ledger.runs


async def test_a_module_may_write_what_it_imports(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Each load writes the file anew, which is no save of anybody's: there is an end of reloads."""
    count = tmp_path / "count"
    source = (
        f"from pathlib import Path\nhere = Path(__file__).parent\nwith open({str(count)!r}, 'a') as f:\n"
        "    f.write('x')\n(here / '_gen.py').write_text('N = ' + (here / 'schema.txt').read_text())\n"
        "from _gen import N\n"
    )
    files = {"a.py": source + MESH + agent(name, "N"), "schema.txt": "1\n"}
    async with watched_host(configure, files) as host:
        await until_answers(mesh, name, 1)
        write(tmp_path / "agents", {"schema.txt": "2\n"})
        await until_answers(mesh, name, 2)
        done = len(reloads_of(host))
        write(tmp_path / "agents", {"b.py": MESH + agent(f"{name}.b")})  # looked at after all that
        await until_answers(mesh, f"{name}.b", "ok")
        assert len(reloads_of(host)) <= done + 2
        assert len(count.read_text()) <= 4


async def test_what_could_not_be_made_known_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails while the connection stays is tried again, without a reconnect."""
    monkeypatch.setattr(reconciler, "_FIRST_RETRY_S", 0.05)
    async with bench.serve({"a.py": MESH + agent(f"{bench.name}.a")}) as host:
        real, failed = Presence.restore, list[int]()

        async def once(self: Presence) -> None:
            if not failed:
                failed.append(1)
                raise MeshTimeout("the server took its time")
            await real(self)

        monkeypatch.setattr(Presence, "restore", once)
        await bench.reloaded({"b.py": MESH + agent(f"{bench.name}.b")})
        await until(lambda: f"{bench.name}.b" in host.node.presence._agents)
        assert failed


async def test_a_contract_that_fits_no_message_is_refused(bench: Bench) -> None:
    """It would never be known, and keep those after it from being known."""
    big = f"{MESH}@mesh.agent(AgentSpec(name={bench.name + '.big'!r}, description='x' * 1_200_000))\n"
    big += "async def big(req: dict) -> int:\n    return 1\n"
    async with bench.serve({"a.py": MESH + agent(f"{bench.name}.a")}):
        outcome = await bench.refused(
            {"big.py": f"{MESH}{big}async def big(req: dict) -> int:\n    return 1\n"}
        )
        assert "its contract has 2400" in outcome.error
        assert "the server's max_payload is 1048576" in outcome.error
        await bench.reloaded({"c.py": MESH + agent(f"{bench.name}.c")})
        await bench.listed(".a", ".c")


@pytest.mark.parametrize("more", [5, 8])
async def test_replays_are_of_the_requests_they_are_told_of(bench: Bench, more: int) -> None:
    """Requests that come during a reload are not taken for those that made way for them."""

    def source(note: int) -> str:
        spec = f"@mesh.agent(AgentSpec(name={bench.name!r} + '.{{0}}', replayable=True))\n"
        first = spec.format("a") + "async def a(req: dict) -> object:\n    return req['n'] * 10\n"
        second = spec.format("b") + "async def b(req: dict) -> object:\n    await asyncio.sleep(0.3)\n"
        return f"import asyncio\n{MESH}{first}{second}# {note}\n"

    async with bench.serve({"x.py": source(0)}, **replay_settings()) as host:
        for number in range(5):
            await bench.call(".a", {"n": number})
        await bench.call(".b", {})
        bench.write({"x.py": source(1)})
        reloading = asyncio.create_task(host.reload())
        for number in range(more):
            await bench.call(".a", {"n": 100 + number})
        assert await reloading is not None
        assert [] == (await bench.reloaded({"x.py": source(2)})).notes


async def test_a_large_module_is_the_same_as_itself(bench: Bench) -> None:
    """Of a megabyte or more; looked at again, nothing differs."""
    table = "TABLE = '''" + "x" * 1_100_000 + "'''\n"
    files = {"a.py": "from _table import TABLE\n" + MESH + agent(bench.name), "_table.py": table}
    async with bench.serve(files) as host:
        assert [None, None] == [await host.reload(), await host.reload()]


def no_more_files(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EMFILE, "Too many open files")


def test_a_read_that_fails_once_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a file cannot be read for a moment, it is not taken for one that is gone for good."""
    path, disk = tmp_path / "a.py", DigestCache()
    path.write_text("x = 1")
    with monkeypatch.context() as context:
        context.setattr(Path, "read_bytes", no_more_files)
        assert disk.digest(path) is None
    assert disk.digest(path) is not None


@pytest.mark.parametrize("what", ["find", "look"])
async def test_a_save_that_could_not_be_looked_at_is_found_later(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """Whatever goes wrong in a reload or a look at the disk, the watcher lives on and tries again."""
    async with watched_host(configure, {"a.py": MESH + agent(name, "1")}) as host:
        await until_answers(mesh, name, 1)
        assert host._reloader is not None
        owner: Any = host._reloader._changes if what == "find" else watcher
        attribute = "find" if what == "find" else "_is_busy"
        real: Callable[..., Any] = getattr(owner, attribute)
        failed: list[object] = []

        def once(*args: Any, **named: Any) -> Any:
            if not failed:
                failed.append(args)
                no_more_files()
            return real(*args, **named)

        monkeypatch.setattr(owner, attribute, once)
        (tmp_path / "agents/a.py").write_text(MESH + agent(name, "2"))
        await until_answers(mesh, name, 2)
        assert failed


async def test_a_folder_made_anew_has_its_bell(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `rm -r agents` and a new checkout, a save is noticed at once, not by the regular look only."""
    async with watched_host(configure, {"a.py": MESH + agent(name, "1")}):
        await until_answers(mesh, name, 1)
        shutil.rmtree(tmp_path / "agents")
        write(tmp_path / "agents", {"a.py": MESH + agent(name, "2")})
        await until_answers(mesh, name, 2)
        monkeypatch.setattr(watcher, "_SWEEP_S", 60.0)
        write(tmp_path / "agents", {"a.py": MESH + agent(name, "3")})
        await until_answers(mesh, name, 3)
        write(tmp_path / "agents", {"a.py": MESH + agent(name, "4")})
        await until_answers(mesh, name, 4)


async def test_a_stop_forgets_no_disposal(bench: Bench) -> None:
    """When the host stops while one of an old version runs, the next ones are still called."""
    source = (
        f"import asyncio, ledger\n{MESH}{agent(bench.name)}@mesh.dispose\nasync def first():\n"
        "    ledger.runs.append('first')\n    await asyncio.sleep(60)\n"
        "@mesh.dispose\ndef second():\n    ledger.runs.append('second')\n"
    )
    async with bench.serve({"a.py": source}, drain_timeout=0.1):
        await bench.reloaded({"a.py": MESH + agent(bench.name, "2")})
        async with asyncio.timeout(5):
            while not bench.ledger.runs:
                await asyncio.sleep(0)
    assert ["first", "second"] == bench.ledger.runs


async def test_what_is_gone_is_refused_no_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that is deleted while its contract is compared is not told of as refused."""
    compared, go = asyncio.Event(), asyncio.Event()

    async def elsewhere(_: Presence) -> set[str]:
        return {f"{bench.name}.b"}

    async def conflicts(_: Registry, contracts: Any) -> dict[str, list[str]]:
        names = [contract.name for contract in contracts]
        if names:
            compared.set()
            await go.wait()
        return {name: ["input changed"] for name in names}

    async with bench.serve({"a.py": MESH + agent(f"{bench.name}.a")}, contract="refuse") as host:
        monkeypatch.setattr(Presence, "served_elsewhere", elsewhere)
        monkeypatch.setattr(Registry, "conflicts", conflicts)
        await bench.reloaded({"b.py": MESH + agent(f"{bench.name}.b")})
        await compared.wait()
        bench.path("b.py").unlink()
        await bench.reloaded()
        go.set()
        await host.node.reconciler.wait_idle()
        assert {} == host.node.refused
