"""Saves of editors and tools while a host watches: only complete files are reloaded."""

import asyncio
import os
import sys
from collections.abc import Callable
from inspect import isawaitable
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Host

from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import reloads_of, until_answers, versioned_agent, watched_host
from tests.support.waiting import until

Save = Callable[[Path, str], object]


def write_in_place(path: Path, text: str) -> None:
    path.write_text(text)


def write_and_rename(path: Path, text: str) -> None:
    """As most editors: a new file is written, and renamed to the old one's name."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def write_with_backup(path: Path, text: str) -> None:
    """As vim: the old file is renamed, a new one written, the backup deleted."""
    backup = path.with_name(f"{path.name}~")
    path.rename(backup)
    path.write_text(text)
    backup.unlink()


def truncate_and_write(path: Path, text: str) -> None:
    path.write_text("")
    path.write_text(text)


def delete_and_write(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def write_with_old_time(path: Path, text: str) -> None:
    """As a tool that restores modification times."""
    before = path.stat()
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def write_slowly(path: Path, text: str) -> None:
    """As a copy over a slow network: with pauses longer than the settle time, while the file is open."""
    with path.open("w") as file:
        for start in range(0, len(text), 120):
            file.write(text[start : start + 120])
            file.flush()
            await asyncio.sleep(0.08 if sys.platform == "linux" else 0.005)


async def truncate_and_write_later(path: Path, text: str) -> None:
    """As an editor that truncates, pauses, and writes until after the time for which a file is unstable."""
    path.write_text("")
    await asyncio.sleep(0.1)
    await write_slowly(path, text)


async def write_ten_times(path: Path, text: str) -> None:
    for number in range(10):
        path.write_text(f"{text}# {number}\n" if number < 9 else text)
        await asyncio.sleep(0.01)


async def until_reloaded(host: Host, count: int) -> None:
    """Wait until a host has had more than `count` reloads."""
    await until(lambda: len(reloads_of(host)) > count)


@pytest.mark.parametrize(
    "save",
    [
        write_in_place,
        write_and_rename,
        write_with_backup,
        truncate_and_write,
        truncate_and_write_later,
        delete_and_write,
        write_with_old_time,
        write_slowly,
        write_ten_times,
    ],
)
async def test_every_way_to_save_serves_the_complete_new_version(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: Save,
) -> None:
    """No incomplete file is loaded or reported as an error, however an editor saves."""
    # On a busy machine a slow save takes longer than any editor's.
    monkeypatch.setattr("openagentmesh.runtime.reload.watcher._MAX_QUIET_S", 10.0)
    path = tmp_path / "agents/a.py"
    async with watched_host(configure, {"a.py": versioned_agent(name, 0)}) as host:
        for number in (1, 2, 3):
            saving = save(path, versioned_agent(name, number))
            if isawaitable(saving):
                await saving
            await until_answers(mesh, name, [number] * 3)
        assert [] == [reload.error for reload in reloads_of(host) if reload.error]


async def test_a_save_without_a_change_is_not_reloaded(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A touch, a save of the same content, and files that are no modules cause no reload."""
    path = tmp_path / "agents/a.py"
    async with watched_host(
        configure, {"a.py": versioned_agent(name, 0), "b.py": versioned_agent(f"{name}.b", 0)}
    ) as host:
        path.touch()
        write_in_place(path, versioned_agent(name, 0))
        write(tmp_path / "agents", {"notes.log": "x", "a.py.swp": "x", "__pycache__/a.pyc": "x"})
        write_in_place(tmp_path / "agents/b.py", versioned_agent(f"{name}.b", 1))
        await until_answers(mesh, f"{name}.b", [1] * 3)
        assert [["agents/b.py"]] == [reload.files for reload in reloads_of(host)]


async def test_no_call_fails_while_files_change(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Each reply comes from one complete version, however files are saved; broken versions never serve."""
    path, stopping, answers = tmp_path / "agents/a.py", asyncio.Event(), list[object]()

    async def keep_calling() -> None:
        while not stopping.is_set():
            answers.append(await mesh.call(name, {}))

    async with watched_host(configure, {"a.py": versioned_agent(name, 0)}) as host:
        callers = [asyncio.create_task(keep_calling()) for _ in range(16)]
        saves = [write_in_place, write_and_rename, write_with_backup, delete_and_write]
        for number in range(1, 13):
            if number % 3 == 0:
                count = len(reloads_of(host))
                write_and_rename(path, "def broken(:\n")
                await until_reloaded(host, count)
            saves[number % 4](path, versioned_agent(name, number))
            await until_answers(mesh, name, [number] * 3)
        stopping.set()
        await asyncio.gather(*callers)
        assert 4 == sum("SyntaxError" in reload.error for reload in reloads_of(host))
    assert [] == [answer for answer in answers if not isinstance(answer, list) or len(set(answer)) != 1]


async def test_an_edit_during_a_reload_is_reloaded_afterwards(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A file that is saved while a version loads slowly is reloaded next; the last save serves."""
    path, marker = tmp_path / "agents/a.py", tmp_path / "loading"
    slow = f"import time\nopen({str(marker)!r}, 'w').close()\ntime.sleep(0.3)\n"
    async with watched_host(configure, {"a.py": versioned_agent(name, 0)}):
        write_and_rename(path, slow + versioned_agent(name, 1))
        await until(marker.exists)
        write_and_rename(path, versioned_agent(name, 2))
        await until_answers(mesh, name, [2] * 3)


async def test_a_file_that_changes_during_its_load_is_loaded_again(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Only the last save of a file that is saved again during its load is a reload."""
    started, path = tmp_path / "started", tmp_path / "agents/a.py"
    slow = f"import time\nopen({str(started)!r}, 'w').close()\ntime.sleep(0.3)\n"
    async with watched_host(configure, {"a.py": MESH + agent(name, "0")}) as host:
        await until_answers(mesh, name, 0)
        path.write_text(slow + MESH + agent(name, "1"))
        await until(started.exists)
        path.write_text(MESH + agent(name, "2"))
        await until_answers(mesh, name, 2)
        assert 1 == len(reloads_of(host))


async def test_a_briefly_missing_file_is_not_deleted(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A file that is missing for a moment keeps its agent, whatever else changes in its folder."""
    path = tmp_path / "agents/a.py"
    async with watched_host(configure, {"a.py": MESH + agent(name, "1")}) as host:
        await until_answers(mesh, name, 1)
        path.rename(tmp_path / "moved")
        for _ in range(10):
            (tmp_path / "agents/4913").touch()
            (tmp_path / "agents/4913").unlink()
            await asyncio.sleep(0.015)
        (tmp_path / "moved").write_text(MESH + agent(name, "2"))
        (tmp_path / "moved").rename(path)
        await until_answers(mesh, name, 2)
        await until(lambda: reloads_of(host))
        assert [f"{name} 0.1.0"] == [text for reload in reloads_of(host) for text in reload.agents]
