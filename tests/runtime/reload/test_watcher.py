"""Files that change on disk, in every way that editors and tools change them, while a host watches."""

import asyncio
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import AgentMesh, Host, NotAvailable, NotFound
from watchfiles import Change, awatch

from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import reloads_of, until_answers, watched_host
from tests.support.waiting import TIMEOUT_S, until

GIT = shutil.which("git") or "git"
Save = Callable[[Path, str], Any]


def in_place(path: Path, text: str) -> None:
    path.write_text(text)


def atomically(path: Path, text: str) -> None:
    """As most editors: written beside it, then renamed."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def with_backup(path: Path, text: str) -> None:
    """As vim: the old file is renamed away, a new one written, the backup deleted."""
    backup = path.with_name(f"{path.name}~")
    path.rename(backup)
    path.write_text(text)
    backup.unlink()


def emptied_first(path: Path, text: str) -> None:
    path.write_text("")
    path.write_text(text)


def deleted_first(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def keeping_its_time(path: Path, text: str) -> None:
    """As a tool that restores modification times."""
    before = path.stat()
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def slowly(path: Path, text: str) -> None:
    """As a copy over a slow line: it pauses for longer than a file has to be quiet, but keeps it open."""
    with path.open("w") as file:
        for start in range(0, len(text), 120):
            file.write(text[start : start + 120])
            file.flush()
            await asyncio.sleep(0.08 if sys.platform == "linux" else 0.005)


async def emptied_before(path: Path, text: str) -> None:
    """As an editor that truncates, thinks, and writes: the write is not over when the doubt would be."""
    path.write_text("")
    await asyncio.sleep(0.1)
    await slowly(path, text)


async def ten_times(path: Path, text: str) -> None:
    for number in range(10):
        path.write_text(f"{text}# {number}\n" if number < 9 else text)
        await asyncio.sleep(0.01)


def version(name: str, number: int) -> str:
    """An agent whose every part says which version it is of."""
    lines = "\n".join(f"PART_{part} = {number}" for part in range(30))
    return f"{MESH}{lines}\n{agent(name, f'[PART_0, PART_29, {number}]')}"


async def until_more(host: Host, than: int) -> None:
    await until(lambda: len(reloads_of(host)) > than)


@pytest.mark.parametrize(
    "save",
    [
        in_place,
        atomically,
        with_backup,
        emptied_first,
        emptied_before,
        deleted_first,
        keeping_its_time,
        slowly,
        ten_times,
    ],
)
async def test_every_way_to_save_is_noticed(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, save: Save
) -> None:
    """The new version answers, whole; no half of it is ever loaded or told as broken."""
    path = tmp_path / "agents/a.py"
    async with watched_host(configure, {"a.py": version(name, 0)}) as host:
        for number in (1, 2, 3):
            saving = save(path, version(name, number))
            if saving is not None:
                await saving
            await until_answers(mesh, name, [number] * 3)
        assert [] == [reload.error for reload in reloads_of(host) if reload.error]


async def test_what_is_saved_without_a_change_is_not_loaded(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A touch, the same content again, and files that are no modules are no reload."""
    path = tmp_path / "agents/a.py"
    async with watched_host(configure, {"a.py": version(name, 0), "b.py": version(f"{name}.b", 0)}) as host:
        path.touch()
        in_place(path, version(name, 0))
        write(tmp_path / "agents", {"notes.log": "x", "a.py.swp": "x", "__pycache__/a.pyc": "x"})
        in_place(tmp_path / "agents/b.py", version(f"{name}.b", 1))
        await until_answers(mesh, f"{name}.b", [1] * 3)
        assert [["agents/b.py"]] == [reload.files for reload in reloads_of(host)]


async def test_a_checkout_is_one_reload(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Fifty files that git changes at once are loaded once, together."""
    folder = tmp_path / "agents"

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run([GIT, *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    names = [f"{name}.a{number}" for number in range(50)]
    write(folder, {f"a{number}.py": version(each, 0) for number, each in enumerate(names)})
    git("init", "-q")
    git("add", "agents")
    git("commit", "-qm", "one")
    write(folder, {f"a{number}.py": version(each, 1) for number, each in enumerate(names)})
    git("commit", "-qam", "two")
    git("checkout", "-q", "HEAD~1")
    async with watched_host(configure, {}) as host:
        assert 50 == len(host.agents)
        git("checkout", "-q", "-")
        await until_answers(mesh, names[-1], [1] * 3)
        await until_answers(mesh, names[0], [1] * 3)
        assert [50] == [len(reload.files) for reload in reloads_of(host)]


async def test_folders_come_and_go(configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path) -> None:
    """A tree made in a burst, one moved in and out, and the root itself deleted and made again."""
    folder, elsewhere = tmp_path / "agents", tmp_path / "elsewhere"
    async with watched_host(configure, {"a.py": version(f"{name}.a", 0)}) as host:
        write(folder, {"new/deep/er/b.py": version(f"{name}.b", 0)})
        await until_answers(mesh, f"{name}.b", [0] * 3)
        (folder / "new").rename(elsewhere)
        await until_gone(mesh, f"{name}.b")
        elsewhere.rename(folder / "again")
        await until_answers(mesh, f"{name}.b", [0] * 3)
        shutil.rmtree(folder)  # agents go on without their folder: who names it is to decide
        await until(lambda: "neither a folder" in reloads_of(host)[-1].error)
        assert [0] * 3 == await mesh.call(f"{name}.a", {})
        write(folder, {"a.py": version(f"{name}.a", 1)})
        await until_answers(mesh, f"{name}.a", [1] * 3)


async def until_gone(mesh: AgentMesh, name: str) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while name in {entry.name for entry in await mesh.catalog()}:
            await asyncio.sleep(0.02)


async def test_links_are_followed(configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path) -> None:
    """A linked file's target is edited, or the link points elsewhere; a circle of links hurts nobody."""
    folder, target, other = tmp_path / "agents", tmp_path / "target.py", tmp_path / "other.py"
    folder.mkdir()
    (folder / "circle").symlink_to(folder)
    target.write_text(version(name, 0))
    other.write_text(version(name, 2))
    (folder / "a.py").symlink_to(target)
    async with watched_host(configure, {}, host={"agents": ["agents/a.py", "agents"][:1]}):
        target.write_text(version(name, 1))
        await until_answers(mesh, name, [1] * 3)
        (folder / "b.py").symlink_to(other)
        (folder / "b.py").replace(folder / "a.py")
        await until_answers(mesh, name, [2] * 3)


async def test_without_the_systems_watcher_files_are_still_noticed(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Where it has no room for another watch, that is said once, and the regular look finds what changed."""

    async def full(*_folders: Path, **_options: object) -> AsyncIterator[set[tuple[Change, str]]]:
        raise OSError(28, "inotify watch limit reached")
        yield set()

    monkeypatch.setattr("openagentmesh.runtime.reload.watcher.awatch", full)
    with caplog.at_level(logging.WARNING):
        async with watched_host(configure, {"a.py": version(name, 0)}):
            in_place(tmp_path / "agents/a.py", version(name, 1))
            await until_answers(mesh, name, [1] * 3)
    assert 1 == sum("inotify watch limit reached" in record.getMessage() for record in caplog.records)


async def test_who_edits_is_heard_sooner(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody edits the system's watcher is asked more often, and as seldom as before afterwards."""
    asked: asyncio.Queue[int] = asyncio.Queue()

    def noted(*folders: Path, step: int, **options: Any) -> AsyncIterator[set[tuple[Change, str]]]:
        asked.put_nowait(step)
        return awatch(*folders, step=step, rust_timeout=100, **options)

    monkeypatch.setattr("openagentmesh.runtime.reload.watcher.awatch", noted)
    async with watched_host(configure, {"a.py": version(name, 0)}):
        calm = await asked.get()
        in_place(tmp_path / "agents/a.py", version(name, 1))
        await until_answers(mesh, name, [1] * 3)
        assert await asked.get() < calm
        monkeypatch.setattr("openagentmesh.runtime.reload.watcher._SESSION_S", 0.0)
        async with asyncio.timeout(TIMEOUT_S):
            assert calm == await asked.get()


async def test_no_call_fails_while_files_change(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Callers at work get an answer of one version each, whatever is saved; what is broken is not served."""
    path, stopping, answers = tmp_path / "agents/a.py", asyncio.Event(), list[object]()

    async def keep_calling() -> None:
        while not stopping.is_set():
            answers.append(await mesh.call(name, {}))

    async with watched_host(configure, {"a.py": version(name, 0)}) as host:
        callers = [asyncio.create_task(keep_calling()) for _ in range(16)]
        saves = [in_place, atomically, with_backup, deleted_first]
        for number in range(1, 13):
            if number % 3 == 0:
                before = len(reloads_of(host))
                atomically(path, "def broken(:\n")
                await until_more(host, before)
            saves[number % 4](path, version(name, number))
            await until_answers(mesh, name, [number] * 3)
        stopping.set()
        await asyncio.gather(*callers)
        assert 4 == sum("SyntaxError" in reload.error for reload in reloads_of(host))
    assert [] == [answer for answer in answers if not isinstance(answer, list) or len(set(answer)) != 1]


async def test_an_edit_during_a_reload_is_loaded_after_it(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """What is saved while a version loads slowly is the next one; the last save is what serves."""
    path, marker = tmp_path / "agents/a.py", tmp_path / "loading"
    slow = f"import time\nopen({str(marker)!r}, 'w').close()\ntime.sleep(0.3)\n"
    async with watched_host(configure, {"a.py": version(name, 0)}):
        atomically(path, slow + version(name, 1))
        await until(marker.exists)
        atomically(path, version(name, 2))
        await until_answers(mesh, name, [2] * 3)


async def test_an_agent_that_is_deleted_answers_what_it_has(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Calls under way when its file is deleted are answered; later ones are told that it is gone."""
    source = "import asyncio\n" + MESH + agent(name, "await asyncio.sleep(0.2, 'done')")
    async with watched_host(configure, {"a.py": source}) as host:
        calls = [asyncio.create_task(mesh.call(name, {})) for _ in range(10)]
        await until(lambda: sum(route.in_flight for route in host.node.router) == 10)
        (tmp_path / "agents/a.py").unlink()
        await until(lambda: not host.agents)
        assert ["done"] * 10 == await asyncio.gather(*calls)
        await until_gone(mesh, name)
        with pytest.raises((NotFound, NotAvailable)):
            await mesh.call(name, {}, timeout=5)
