"""The end of `oam up`: by signals, by its terminal, and when processes are killed."""

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


def running_call(host: Up, name: str, release: Path) -> Process:
    """A call of an agent that answers when the file `release` exists; its handler has started."""
    payload = json.dumps({"until": str(release)})
    caller = Process("agent", "call", name, payload, "--url", host.url, cwd=host.folder)
    host.wait_for_line(f"{name} runs")
    return caller


def catalog_names(url: str, folder: Path) -> set[str]:
    """The names of the agents in the catalog."""
    return {entry["name"] for entry in oam("mesh", "catalog", "--json", "--url", url, cwd=folder).json}


def test_sigterm_drains_running_requests(tmp_path: Path, url: str, name: str) -> None:
    """After SIGTERM a running request is answered, the agents leave the catalog, and the exit code is 0."""
    names = {name, f"{name}_idle"}
    folder = write_project(tmp_path / "p", holding=tuple(names))
    with Up(folder, "--url", url) as host, running_call(host, name, tmp_path / "release") as caller:
        assert names <= catalog_names(url, tmp_path)
        host.signal(signal.SIGTERM)
        host.wait_for_line("stopping: finishing 1 request")
        (tmp_path / "release").touch()
        assert Result(0, '"held"\n', "") == caller.finish()
        result = host.finish()
    assert 0 == result.code
    assert "Traceback" not in result.err
    assert set() == names & catalog_names(url, tmp_path)


def test_a_request_is_cancelled_after_the_drain_timeout(tmp_path: Path) -> None:
    """A request that still runs after `drain_timeout` is cancelled, and its caller gets `cancelled`."""
    folder = write_project(tmp_path / "p", holding=("hold",), toml="drain_timeout = 0.1\n")
    with Up(folder) as host, running_call(host, "hold", tmp_path / "never") as caller:
        host.signal(signal.SIGTERM)
        result = caller.finish()
        assert 0 == host.finish().code
    assert (1, "") == (result.code, result.out)
    assert result.err.startswith("Error [cancelled] ")


def test_a_second_ctrl_c_exits_immediately(tmp_path: Path) -> None:
    """The second SIGINT does not wait for running requests, and stops the embedded server too."""
    folder = write_project(tmp_path / "p", holding=("hold",), toml="drain_timeout = 600\n")
    with Up(folder) as host, running_call(host, "hold", tmp_path / "never"):
        host.signal(signal.SIGINT)
        host.wait_for_line("stopping: finishing 1 request; Ctrl-C again stops at once")
        host.signal(signal.SIGINT)
        assert 130 == host.finish(5).code
        assert until(lambda: is_closed(host.url), 5)


def test_the_server_of_a_killed_host_exits(tmp_path: Path) -> None:
    """When `oam up` is killed with SIGKILL, its nats-server exits within seconds."""
    with Up(write_project(tmp_path / "p", "echo")) as host:
        server = host.status["embedded_server"]["pid"]
        assert not has_exited(server)
        host.signal(signal.SIGKILL)
        host.finish()
        assert until(lambda: has_exited(server), 5)


def test_a_killed_server_is_restarted(tmp_path: Path) -> None:
    """A nats-server that is killed restarts on its port with the same agents; the status has these events."""
    with Up(write_project(tmp_path / "p", "echo", "ticker")) as host:
        before = host.status
        os.kill(before["embedded_server"]["pid"], signal.SIGKILL)
        host.wait_for_line(f"reconnected: {host.url}")
        call, catalog = host.run_all(("agent", "call", "echo", "1"), ("mesh", "catalog", "--json"))
        as_json, as_text = host.run_all(("status", "--json"), ("status",))
    assert '"said": 1' in call.out
    assert ["echo", "time.ticker"] == sorted(entry["name"] for entry in catalog.json)
    [after] = as_json.json
    assert (1, 2) == (before["embedded_server"]["starts"], after["embedded_server"]["starts"])
    assert before["embedded_server"]["url"] == after["embedded_server"]["url"]
    events = f"lost {host.url}", "died with status 137", "restarted on", f"reconnected to {host.url}"
    for event in events:
        assert event in as_text.out


def test_the_agents_of_a_killed_host_are_not_available(tmp_path: Path, url: str, name: str) -> None:
    """A call of its agent gets `not_available`; `oam status` shows that the host does not answer."""
    with Up(write_project(tmp_path / name, holding=(name,)), "--url", url) as host:
        host.signal(signal.SIGKILL)
        host.finish()
    call, status = ("agent", "call", name, "{}", "--url", url), ("status", "--url", url)
    result, shown = run_parallel(call, status, cwd=tmp_path)
    assert 1 == result.code
    assert result.err.startswith(f"Error [not_available] Agent '{name}' is in the catalog, but no instance")
    assert f"{name}: recorded with 1 agent, but does not answer" in shown.out


# Makes the terminal at stdin the controlling terminal, as a terminal emulator does, and runs the arguments.
IN_TERMINAL = """
import fcntl, os, signal, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.parametrize("started_by", ["shell", "nohup"])
def test_a_host_stops_when_its_terminal_is_closed(tmp_path: Path, started_by: str) -> None:
    """A closed terminal stops a host that a shell started; one started with nohup continues."""
    folder, url = write_project(tmp_path / "p", "echo"), f"nats://127.0.0.1:{free_port()}"
    terminal, host_side = os.openpty()
    port = url.rpartition(":")[2]
    command = [sys.executable, "-c", IN_TERMINAL, started_by, OAM, "up", "--port", port]
    with subprocess.Popen(
        command, cwd=folder, stdin=host_side, stdout=host_side, stderr=host_side, env=environment()
    ) as host:
        os.close(host_side)
        try:
            shown = b""
            while b"Ctrl-C" not in shown:
                shown += os.read(terminal, 4096)
            os.close(terminal)
            if started_by == "shell":
                host.wait(10)  # its exit code is that of a write to a closed terminal
            else:
                os.kill(host.pid, signal.SIGHUP)
                assert 0 == oam("agent", "call", "echo", "{}", "--url", url, cwd=folder).code
        finally:
            host.terminate()
    assert until(lambda: is_closed(url), 5)
