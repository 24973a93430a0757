"""Commands in awkward places: input that is no JSON, readers that go away, ports and pids of others."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.support.commands import (
    OAM,
    UNREACHABLE,
    Process,
    Result,
    Up,
    environment,
    free_port,
    is_closed,
    oam,
    side_by_side,
    until,
)


def kill_server(folder: Path) -> None:
    """Leave nothing running that a failed `mesh up` or `mesh down` left."""
    with suppress(FileNotFoundError, ValueError, ProcessLookupError):
        os.kill(int((folder / ".oam" / "nats" / "server.pid").read_text()), signal.SIGKILL)


def test_what_is_no_json_is_bad_usage(tmp_path: Path) -> None:
    """A payload that is no JSON ends with exit code 2 before anything is sent."""
    call = "agent", "call", "echo", "--url", UNREACHABLE
    for result in side_by_side((*call, "{bad"), (*call, "NaN"), cwd=tmp_path):
        assert (2, "") == (result.code, result.out)
        assert "the input is not JSON" in result.err


def test_chunks_are_printed_as_they_come(hosted: Up) -> None:
    """A chunk is printed before the next one comes; Ctrl-C then ends without a traceback."""
    given = '{"count": 2, "every": 10}'
    with Process("agent", "stream", "time.ticker", given, "--url", hosted.url, cwd=hosted.folder) as stream:
        assert 0 == json.loads(stream.wait_for_line('"number"'))["number"]
        stream.signal(signal.SIGINT)
        result = stream.finish(5)
    assert (130, 1) == (result.code, len(result.out.splitlines()))
    assert "Traceback" not in result.err


def test_a_reader_that_goes_away(hosted: Up) -> None:
    """`oam agent stream … | head -n 1` prints one line and says nothing more."""
    command = f"'{OAM}' agent stream time.ticker --url {hosted.url} | head -n 1"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        input='{"count": 1000, "every": 0.01}',
        env=environment(),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (1, "") == (len(done.stdout.splitlines()), done.stderr)


def test_no_subject_to_listen_on(hosted: Up) -> None:
    """A subject that NATS does not know is bad usage, not a connection lost over and over."""
    with Process("mesh", "listen", "a..b", "--url", hosted.url, cwd=hosted.folder) as listen:
        result = listen.finish(5)
    assert 2 == result.code
    assert "connection lost" not in result.err


def test_a_host_name_that_is_none(tmp_path: Path) -> None:
    """Why a name cannot be resolved is said in words."""
    result = oam("mesh", "catalog", "--url", "nats://no host:4222", cwd=tmp_path)
    assert 1 == result.code
    assert result.err.startswith("Error [connection_failed] ")
    assert "Unknown error" not in result.err


def test_a_wrong_password_is_told_and_not_shown(guarded: str, tmp_path: Path) -> None:
    """A user and password in the url that the server refuses are named as what was used, unreadably."""
    result = oam("mesh", "catalog", "--url", guarded.replace("//", "//u:secret@"), cwd=tmp_path)
    assert 1 == result.code
    assert result.err.startswith("Error [connection_denied] ")
    assert "secret" not in result.err
    assert "no credentials" not in result.err


def test_connect_does_not_show_the_password(guarded: str, tmp_path: Path) -> None:
    """A url with a password is remembered whole, and shown without it."""
    result = oam("mesh", "connect", guarded.replace("//", "//u:geheim@"), cwd=tmp_path)
    assert 0 == result.code
    assert "geheim" in (tmp_path / ".oam-url").read_text()
    assert "geheim" not in result.err


def test_connect_for_programs(tmp_path: Path) -> None:
    """`mesh connect --json` gives the error's envelope, as every command does."""
    result = oam("mesh", "connect", UNREACHABLE, "--json", cwd=tmp_path)
    assert (1, "connection_failed") == (result.code, json.loads(result.err)["code"])


def test_which_address_wins(hosted: Up, tmp_path: Path) -> None:
    """OAM_URL wins over `.oam-url`, which a folder below finds; `--url` wins over both."""
    file, below = tmp_path / ".oam-url", tmp_path / "a" / "b"
    below.mkdir(parents=True)
    call = "agent", "call", "nlp.summarizer", '{"text": "x"}'
    answered = Result(0, '{"summary": "x"}\n', "")
    file.write_text(f'url = "{hosted.url}"\n')
    assert answered == oam(*call, cwd=below)
    file.write_text(f"{UNREACHABLE}\n")
    with (
        Process(*call, cwd=below, env={"OAM_URL": hosted.url}) as by_variable,
        Process(*call, "--url", hosted.url, cwd=below, env={"OAM_URL": UNREACHABLE}) as by_option,
    ):
        assert [answered, answered] == [by_variable.finish(), by_option.finish()]


def test_mesh_up_on_a_port_in_use(hosted: Up, tmp_path: Path) -> None:
    """A server that another one keeps from its port is not running, and nothing is remembered."""
    result = oam("mesh", "up", "-p", hosted.url.rpartition(":")[2], cwd=tmp_path)
    kill_server(tmp_path)
    assert 1 == result.code
    assert "address already in use" in result.err or "is in use" in result.err
    assert not (tmp_path / ".oam-url").exists()


def test_mesh_down_ends_only_its_own_server(tmp_path: Path) -> None:
    """A pid file left behind, whose pid another process has by now, does that one no harm."""
    store = tmp_path / ".oam" / "nats"
    store.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (store / "server.pid").write_text(str(other.pid))
        oam("mesh", "down", cwd=tmp_path)
        other.communicate(b"\n")
    assert 0 == other.returncode


def test_mesh_up_and_down(tmp_path: Path) -> None:
    """`mesh up` leaves a server and `.oam-url`, which folders below use; `mesh down` takes both away."""
    port, below = str(free_port()), tmp_path / "below"
    below.mkdir()
    try:
        assert 0 == oam("mesh", "up", "-p", port, cwd=tmp_path).code
        assert f"nats://127.0.0.1:{port}" == (tmp_path / ".oam-url").read_text().strip()
        assert Result(0, "[]\n", "") == oam("mesh", "catalog", "--json", cwd=below)
        down = oam("mesh", "down", cwd=tmp_path)
        assert (0, "") == (down.code, down.out)
        assert until(lambda: is_closed(f"nats://127.0.0.1:{port}"), 5)
        assert not (tmp_path / ".oam-url").exists()
    finally:
        kill_server(tmp_path)
