"""A running `oam up`: how it stops, how it is killed, and what it survives."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import (
    OAM,
    Process,
    Result,
    Up,
    environment,
    free_port,
    has_exited,
    is_closed,
    oam,
    run_parallel,
    until,
    write_project,
)


def holding(host: Up, name: str, release: Path) -> Process:
    """A call of an agent that answers when the file `release` is there; its handler runs."""
    given = json.dumps({"until": str(release)})
    caller = Process("agent", "call", name, given, "--url", host.url, cwd=host.folder)
    host.wait_for_line(f"{name} runs")
    return caller


def test_sigterm_lets_requests_finish(tmp_path: Path, url: str, name: str) -> None:
    """After SIGTERM a running request is answered; then the agents leave the catalog, exit code 0."""
    folder = write_project(tmp_path / "p", holding=(name,))
    with Up(folder, "--url", url) as host, holding(host, name, tmp_path / "release") as caller:
        assert name in oam("mesh", "catalog", "--url", url, cwd=tmp_path).out
        host.signal(signal.SIGTERM)
        host.wait_for_line("stopping: finishing 1 request")
        (tmp_path / "release").touch()
        assert Result(0, '"held"\n', "") == caller.finish()
        result = host.finish()
    assert 0 == result.code
    assert "Traceback" not in result.err
    entries = oam("mesh", "catalog", "--json", "--url", url, cwd=tmp_path).json
    assert set() == {entry["name"] for entry in entries} & {name, "fail", "quota"}


def test_a_stop_that_takes_too_long(tmp_path: Path) -> None:
    """A request still running after `drain_timeout` is cancelled; its caller is told so."""
    folder = write_project(tmp_path / "p", holding=("hold",), toml="drain_timeout = 0.1\n")
    with Up(folder) as host, holding(host, "hold", tmp_path / "never") as caller:
        host.signal(signal.SIGTERM)
        told = caller.finish()
        assert 0 == host.finish().code
    assert (1, "") == (told.code, told.out)
    assert told.err.startswith("Error [cancelled] ")


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """The second SIGINT does not wait for what runs, and takes the server with it."""
    folder = write_project(tmp_path / "p", holding=("hold",), toml="drain_timeout = 600\n")
    with Up(folder) as host, holding(host, "hold", tmp_path / "never"):
        host.signal(signal.SIGINT)
        host.wait_for_line("stopping: finishing 1 request; Ctrl-C again stops at once")
        host.signal(signal.SIGINT)
        assert 130 == host.finish(5).code
        assert until(lambda: is_closed(host.url), 5)


def test_a_killed_host_takes_its_server_along(tmp_path: Path) -> None:
    """When `oam up` is killed with SIGKILL, its nats-server ends within seconds."""
    with Up(write_project(tmp_path / "p", "echo")) as host:
        server = host.status["embedded_server"]["pid"]
        assert not has_exited(server)
        host.signal(signal.SIGKILL)
        host.finish()
        assert until(lambda: has_exited(server), 5)


def test_a_killed_server_comes_back(tmp_path: Path) -> None:
    """A nats-server that dies is back on its port with the same agents, and the status tells it."""
    with Up(write_project(tmp_path / "p", "echo", "ticker")) as host:
        before = host.status
        os.kill(before["embedded_server"]["pid"], signal.SIGKILL)
        host.wait_for_line(f"reconnected: {host.url}")
        call, catalog = host.run_all(("agent", "call", "echo", "1"), ("mesh", "catalog", "--json"))
        told, shown = host.run_all(("status", "--json"), ("status",))
    assert '"said": 1' in call.out
    assert ["echo", "time.ticker"] == sorted(entry["name"] for entry in catalog.json)
    [after] = told.json
    assert (1, 2) == (before["embedded_server"]["starts"], after["embedded_server"]["starts"])
    assert before["embedded_server"]["url"] == after["embedded_server"]["url"]
    story = f"lost {host.url}", "died with status 137", "is back on", f"reconnected to {host.url}"
    for event in story:
        assert event in shown.out


def test_a_host_that_vanished(tmp_path: Path, url: str, name: str) -> None:
    """What a killed host leaves behind is told as such: `not_available`, and a host that does not answer."""
    with Up(write_project(tmp_path / name, holding=(name,)), "--url", url) as host:
        host.signal(signal.SIGKILL)
        host.finish()
    call, status = ("agent", "call", name, "{}", "--url", url), ("status", "--url", url)
    result, shown = run_parallel(call, status, cwd=tmp_path)
    assert 1 == result.code
    assert result.err.startswith(f"Error [not_available] Agent '{name}' is in the catalog, but no instance")
    assert f"{name}: recorded with 1 agent, but does not answer" in shown.out


# Makes the terminal at its input the one that controls it, as in a new window, and runs the rest.
IN_TERMINAL = """
import fcntl, os, signal, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.parametrize("started_by", ["shell", "nohup"])
def test_a_terminal_that_is_closed_takes_its_host_along(tmp_path: Path, started_by: str) -> None:
    """But not one that was started with nohup, which only looks for changes then."""
    folder, port = write_project(tmp_path / "p", "echo"), free_port()
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", IN_TERMINAL, started_by, OAM, "up", "--port", str(port)]
    with subprocess.Popen(
        command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment()
    ) as host:
        os.close(theirs)
        try:
            shown = b""
            while b"Ctrl-C" not in shown:
                shown += os.read(ours, 4096)
            os.close(ours)
            if started_by == "shell":
                host.wait(10)  # its code is that of an output nobody reads
            else:
                os.kill(host.pid, signal.SIGHUP)
                assert (
                    0
                    == oam(
                        "agent", "call", "echo", "{}", "--url", f"nats://127.0.0.1:{port}", cwd=folder
                    ).code
                )
        finally:
            host.terminate()
    assert until(lambda: is_closed(f"nats://127.0.0.1:{port}"), 5)
