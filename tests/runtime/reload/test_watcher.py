"""The file watcher: folders, links and many files, and what happens when it fails."""

import asyncio
import logging
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import AgentMesh, NotAvailable, NotFound
from openagentmesh.runtime.reload import watcher
from watchfiles import Change, awatch

from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import (
    raise_too_many_open_files,
    reloads_of,
    until_answers,
    versioned_agent,
    watched_host,
)
from tests.support.waiting import TIMEOUT_S, until

GIT = shutil.which("git") or "git"


async def until_withdrawn(mesh: AgentMesh, name: str) -> None:
    """Wait until an agent is not in the catalog."""

    async def is_withdrawn() -> bool:
        return name not in {entry.name for entry in await mesh.catalog()}

    await until(is_withdrawn)


async def test_a_git_checkout_is_one_reload(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Fifty files that git changes are reloaded together, once."""
    folder = tmp_path / "agents"

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run([GIT, *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    names = [f"{name}.a{number}" for number in range(50)]
    write(folder, {f"a{number}.py": versioned_agent(each, 0) for number, each in enumerate(names)})
    git("init", "-q")
    git("add", "agents")
    git("commit", "-qm", "one")
    write(folder, {f"a{number}.py": versioned_agent(each, 1) for number, each in enumerate(names)})
    git("commit", "-qam", "two")
    git("checkout", "-q", "HEAD~1")
    async with watched_host(configure, {}) as host:
        assert 50 == len(host.agents)
        git("checkout", "-q", "-")
        await until_answers(mesh, names[-1], [1] * 3)
        await until_answers(mesh, names[0], [1] * 3)
        assert [50] == [len(reload.files) for reload in reloads_of(host)]


async def test_folders_may_appear_move_and_disappear(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A new folder tree, one that is moved away and back, and an agents folder that is deleted."""
    folder, moved = tmp_path / "agents", tmp_path / "moved"
    async with watched_host(configure, {"a.py": versioned_agent(f"{name}.a", 0)}) as host:
        write(folder, {"new/deep/er/b.py": versioned_agent(f"{name}.b", 0)})
        await until_answers(mesh, f"{name}.b", [0] * 3)
        (folder / "new").rename(moved)
        await until_withdrawn(mesh, f"{name}.b")
        moved.rename(folder / "again")
        await until_answers(mesh, f"{name}.b", [0] * 3)
        shutil.rmtree(folder)  # the agents of a missing folder keep serving
        await until(lambda: "neither a folder" in reloads_of(host)[-1].error)
        assert [0] * 3 == await mesh.call(f"{name}.a", {})
        write(folder, {"a.py": versioned_agent(f"{name}.a", 1)})
        await until_answers(mesh, f"{name}.a", [1] * 3)


async def test_symlinks_are_followed(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """An edit of a symlink's target is reloaded, and so is a symlink with a new target."""
    folder, target, other = tmp_path / "agents", tmp_path / "target.py", tmp_path / "other.py"
    folder.mkdir()
    target.write_text(versioned_agent(name, 0))
    other.write_text(versioned_agent(name, 2))
    (folder / "a.py").symlink_to(target)
    async with watched_host(configure, {}, host={"agents": ["agents/a.py"]}):
        target.write_text(versioned_agent(name, 1))
        await until_answers(mesh, name, [1] * 3)
        (folder / "b.py").symlink_to(other)
        (folder / "b.py").replace(folder / "a.py")
        await until_answers(mesh, name, [2] * 3)


async def test_requests_of_a_deleted_agent_are_answered(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Requests in flight when the file is deleted are answered; later ones fail with an error."""
    source = "import asyncio\n" + MESH + agent(name, "await asyncio.sleep(0.2, 'done')")
    async with watched_host(configure, {"a.py": source}) as host:
        calls = [asyncio.create_task(mesh.call(name, {})) for _ in range(10)]
        await until(lambda: 10 == sum(each.in_flight for each in host.status().agents))
        (tmp_path / "agents/a.py").unlink()
        await until(lambda: not host.agents)
        assert ["done"] * 10 == await asyncio.gather(*calls)
        await until_withdrawn(mesh, name)
        with pytest.raises((NotFound, NotAvailable)):
            await mesh.call(name, {}, timeout=5)


async def test_changes_are_found_without_the_system_watcher(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Without watches of the system, one warning is logged, and the regular scan finds changes."""

    async def fail(*_folders: Path, **_options: object) -> AsyncIterator[set[tuple[Change, str]]]:
        raise OSError(28, "inotify watch limit reached")
        yield set()

    monkeypatch.setattr("openagentmesh.runtime.reload.watcher.awatch", fail)
    with caplog.at_level(logging.WARNING):
        async with watched_host(configure, {"a.py": versioned_agent(name, 0)}):
            (tmp_path / "agents/a.py").write_text(versioned_agent(name, 1))
            await until_answers(mesh, name, [1] * 3)
    assert 1 == sum("inotify watch limit reached" in record.getMessage() for record in caplog.records)


async def test_the_watcher_polls_faster_during_an_editing_session(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit shortens the poll interval of the system's watcher, the end of the session restores it."""
    steps: asyncio.Queue[int] = asyncio.Queue()

    def record(*folders: Path, step: int, **options: Any) -> AsyncIterator[set[tuple[Change, str]]]:
        steps.put_nowait(step)
        return awatch(*folders, step=step, rust_timeout=100, **options)

    monkeypatch.setattr("openagentmesh.runtime.reload.watcher.awatch", record)
    async with watched_host(configure, {"a.py": versioned_agent(name, 0)}):
        idle = await steps.get()
        (tmp_path / "agents/a.py").write_text(versioned_agent(name, 1))
        await until_answers(mesh, name, [1] * 3)
        assert await steps.get() < idle
        monkeypatch.setattr("openagentmesh.runtime.reload.watcher._SESSION_S", 0.0)
        async with asyncio.timeout(TIMEOUT_S):
            assert idle == await steps.get()


async def test_a_module_that_writes_a_file_it_imports_is_not_reloaded_endlessly(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Each load writes the file again, which is not an edit."""
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
        reloads = len(reloads_of(host))
        write(tmp_path / "agents", {"b.py": MESH + agent(f"{name}.b")})  # reloaded after all of these
        await until_answers(mesh, f"{name}.b", "ok")
        assert len(reloads_of(host)) <= reloads + 2
        assert len(count.read_text()) <= 4


@pytest.mark.parametrize("failing", ["reload", "scan"])
async def test_a_failed_scan_or_reload_is_retried(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    """An unexpected error does not stop the watcher, and the next scan repeats what failed."""
    async with watched_host(configure, {"a.py": MESH + agent(name, "1")}) as host:
        await until_answers(mesh, name, 1)
        assert host._reloader is not None
        owner: Any = host._reloader._changes if failing == "reload" else watcher
        attribute = "find" if failing == "reload" else "_is_busy"
        original: Callable[..., Any] = getattr(owner, attribute)
        failures: list[object] = []

        def fail_once(*args: Any, **named: Any) -> Any:
            if not failures:
                failures.append(args)
                raise_too_many_open_files()
            return original(*args, **named)

        monkeypatch.setattr(owner, attribute, fail_once)
        (tmp_path / "agents/a.py").write_text(MESH + agent(name, "2"))
        await until_answers(mesh, name, 2)
        assert failures


async def test_a_recreated_folder_is_watched(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `rm -r agents` and a new checkout, the system's watcher reports saves again."""
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
