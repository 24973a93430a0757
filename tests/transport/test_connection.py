"""The connection: first connect, sizes, permissions, and coming back."""

import asyncio
import errno
import os
from pathlib import Path

import pytest
from openagentmesh import ConnectionDenied, ConnectionFailed, PayloadTooLarge
from openagentmesh.protocol.headers import write_headers
from openagentmesh.transport.connection import Connection, Target
from openagentmesh.transport.server import EmbeddedServer


async def test_a_refused_first_connect_says_where_and_why(name: str) -> None:
    """Nobody listens there: an error at once, with the address and the system's reason."""
    with pytest.raises(ConnectionFailed) as caught:
        await Connection(Target("nats://127.0.0.1:1"), name).connect()
    assert "nats://127.0.0.1:1" in caught.value.message
    assert os.strerror(errno.ECONNREFUSED) in caught.value.message


async def test_a_silent_server_bounds_the_first_connect(name: str) -> None:
    """A port that accepts and says nothing ends the connect after the timeout."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    with pytest.raises(ConnectionFailed, match=r"within 0\.3s"):
        await Connection(Target(f"nats://127.0.0.1:{port}"), name).connect(timeout=0.3)
    silent.close()
    await silent.wait_closed()


async def test_a_missing_credentials_file_is_named(url: str, name: str, tmp_path: Path) -> None:
    """The path of a credentials file that does not exist is in the message."""
    missing = str(tmp_path / "no.creds")
    with pytest.raises(ConnectionFailed, match=missing):
        await Connection(Target(url, creds=missing), name).connect()


async def test_unusable_tls_files_are_named(url: str, name: str, tmp_path: Path) -> None:
    """A file that is no certificate ends the connect with its path."""
    (tmp_path / "ca.pem").write_text("nonsense")
    with pytest.raises(ConnectionFailed, match=r"ca\.pem"):
        await Connection(Target(url, tls_ca=str(tmp_path / "ca.pem")), name).connect()


def test_a_password_is_not_shown() -> None:
    """Messages name the server without the user and password in its url."""
    assert "nats://***@example.com:4222" == Target("nats://me:secret@example.com:4222").display_url


async def test_a_refusal_names_the_credentials_used(name: str) -> None:
    """A server that wants a password: denied, at once, saying that no credentials were used."""
    server = EmbeddedServer()
    server.extra_arguments = ("--user", "u", "--pass", "p")
    await server.start()
    with pytest.raises(ConnectionDenied, match="no credentials"):
        await Connection(Target(server.url), name).connect()
    await server.stop()


async def test_the_largest_message_passes_and_one_byte_more_is_refused(url: str, name: str) -> None:
    """Body and headers together count, exactly to the byte, and the connection lives on."""
    connection = Connection(Target(url), name)
    await connection.connect()
    received: asyncio.Queue[int] = asyncio.Queue()
    await connection.subscribe(name, lambda message: received.put_nowait(len(message.body)))
    head = write_headers({"A": "b"})
    room = connection.max_payload - len(head)
    await connection.publish(name, b"x" * room, head)
    assert room == await received.get()
    with pytest.raises(PayloadTooLarge) as caught:
        await connection.publish(name, b"x" * (room + 1), head)
    assert (connection.max_payload + 1, connection.max_payload) == (
        caught.value.details["size"],
        caught.value.details["limit"],
    )
    await connection.publish(name, b"still here")
    assert len(b"still here") == await received.get()
    assert connection.reconnects == 0
    await connection.close()


async def test_closed_and_overfull_buses_refuse_to_publish(name: str) -> None:
    """While the server is unreachable a bounded buffer takes messages; then, and when closed, it refuses."""
    server = EmbeddedServer()
    await server.start()
    connection = Connection(Target(server.url), name)
    await connection.connect()
    lost = asyncio.Event()

    async def disconnected() -> None:
        lost.set()

    connection._client._disconnected_cb = disconnected
    await server.stop()
    await lost.wait()
    with pytest.raises(ConnectionFailed, match="buffer"):
        for _ in range(100):
            await connection.publish(name, b"x" * 1_000_000)
    await connection.close()
    with pytest.raises(ConnectionFailed, match="closed"):
        await connection.publish(name, b"x")
    with pytest.raises(ConnectionFailed, match="closed"):
        await connection.subscribe(name, lambda _: None)
    assert connection.closed.is_set()


async def test_what_is_sent_while_the_server_is_away_arrives(name: str, tmp_path: Path) -> None:
    """Messages wait for the server, and subscriptions are there again before they arrive."""
    server = EmbeddedServer(store=str(tmp_path))
    await server.start()
    connection = Connection(Target(server.url), name)
    await connection.connect()
    received: asyncio.Queue[bytes] = asyncio.Queue()
    await connection.subscribe(name, lambda message: received.put_nowait(message.body))
    lost, back = asyncio.Event(), asyncio.Event()

    async def disconnected() -> None:
        lost.set()

    async def restore() -> None:
        back.set()

    connection._client._disconnected_cb, connection.restore = disconnected, restore
    await server.stop()
    await lost.wait()
    await connection.publish(name, b"waited")
    again = EmbeddedServer(server.port, store=str(tmp_path))
    await again.start()
    async with asyncio.timeout(5):
        assert b"waited" == await received.get()
        await back.wait()
    assert 1 == connection.reconnects
    await connection.close()
    await again.stop()


async def test_an_absence_is_known_from_its_first_moment(name: str) -> None:
    """Also while the old socket is still being closed: what is sent then waits for the server already."""
    server, closed = EmbeddedServer(), asyncio.Event()
    await server.start()
    connection = Connection(Target(server.url), name)
    await connection.connect()
    assert connection._client._transport is not None
    connection._client._transport.wait_closed = closed.wait  # type: ignore[method-assign]
    await server.stop()
    async with asyncio.timeout(10):
        while connection.connected:
            await asyncio.sleep(0)
    assert connection.is_recovering
    assert [f"lost {connection.target.display_url}"] == [event.what for event in connection.history][1:]
    closed.set()
    await connection.close()


async def test_whatever_restoring_raises_it_is_tried_again(name: str) -> None:
    """An error of any library does not leave undone what a reconnect needs."""
    server = EmbeddedServer()
    await server.start()
    connection = Connection(Target(server.url), name)
    await connection.connect()
    tries, restored = 0, asyncio.Event()

    async def restore() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ValueError
        restored.set()

    connection.restore = restore
    await server.stop()
    again = EmbeddedServer(server.port)
    await again.start()
    async with asyncio.timeout(10):
        await restored.wait()
    assert 2 == tries
    await connection.close()
    await again.stop()
