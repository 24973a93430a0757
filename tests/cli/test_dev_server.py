"""`oam mesh up` and `oam mesh down`: a server for development."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.commands import Result, Up, free_port, is_closed, oam, run_parallel, until


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder; a server that was started in it is killed afterwards."""
    yield tmp_path
    with suppress(FileNotFoundError, ValueError, ProcessLookupError):
        os.kill(int((tmp_path / ".oam" / "nats" / "server.pid").read_text()), signal.SIGKILL)


def test_mesh_up_starts_a_server_and_mesh_down_stops_it(folder: Path) -> None:
    """`mesh up` writes `.oam-url`, which folders below use; `mesh down` removes it with the server."""
    port, below = str(free_port()), folder / "below"
    below.mkdir()
    assert 0 == oam("mesh", "up", "-p", port, cwd=folder).code
    assert f"nats://127.0.0.1:{port}" == (folder / ".oam-url").read_text().strip()
    assert Result(0, "[]\n", "") == oam("mesh", "catalog", "--json", cwd=below)
    down = oam("mesh", "down", cwd=folder)
    assert (0, "") == (down.code, down.out)
    assert until(lambda: is_closed(f"nats://127.0.0.1:{port}"), 5)
    assert not (folder / ".oam-url").exists()


def test_a_reload_without_a_host_advises_to_start_one(folder: Path) -> None:
    """On a server without hosts `oam reload` fails, without advice about agents."""
    url = f"nats://127.0.0.1:{free_port()}"
    assert 0 == oam("mesh", "up", "-p", url.rpartition(":")[2], cwd=folder).code
    expected = f"Error [not_found] No host answers on {url}. Start one with `oam up`.\n"
    assert Result(1, "", expected) == oam("reload", cwd=folder)
    assert 0 == oam("mesh", "down", cwd=folder).code


def test_a_second_server_in_a_folder_is_refused(folder: Path) -> None:
    """A second `mesh up`, and an `oam up`, name the running server, how to use it and how to stop it."""
    port = str(free_port())
    assert 0 == oam("mesh", "up", "-p", port, cwd=folder).code
    second, host = run_parallel(("mesh", "up"), ("up", "--port", "0"), cwd=folder)
    for result in (second, host):
        assert (1, "") == (result.code, result.out)
        assert f"oam up --url nats://127.0.0.1:{port}`, or stop it with `oam mesh down`" in result.err
    assert "stopped" in oam("mesh", "down", cwd=folder).err


def test_mesh_up_on_a_port_in_use_fails(hosted: Up, folder: Path) -> None:
    """The error names the port, and no `.oam-url` is written."""
    result = oam("mesh", "up", "-p", hosted.url.rpartition(":")[2], cwd=folder)
    assert 1 == result.code
    assert "is in use" in result.err
    assert not (folder / ".oam-url").exists()


def test_mesh_down_without_a_server_names_the_right_folder(tmp_path: Path) -> None:
    """In a folder where no server was started, `mesh down` fails with that advice."""
    result = oam("mesh", "down", cwd=tmp_path)
    assert 1 == result.code
    assert "run this command in its folder" in result.err


def test_mesh_down_stops_no_other_process(tmp_path: Path) -> None:
    """The pid in an outdated file may belong to another process by now, which is not stopped."""
    store = tmp_path / ".oam" / "nats"
    store.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (store / "server.pid").write_text(str(other.pid))
        oam("mesh", "down", cwd=tmp_path)
        other.communicate(b"\n")
    assert 0 == other.returncode
