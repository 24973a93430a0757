"""The bus: first connect, sizes, permissions, and coming back."""

import asyncio
import errno
import os
from pathlib import Path

import pytest
from openagentmesh import ConnectionDenied, ConnectionFailed, PayloadTooLarge
from openagentmesh.protocol.headers import write_headers
from openagentmesh.transport.connection import Bus, Target
from openagentmesh.transport.server import EmbeddedServer


async def test_a_refused_first_connect_says_where_and_why(name: str) -> None:
    """Nobody listens there: an error at once, with the address and the system's reason."""
    with pytest.raises(ConnectionFailed) as caught:
        await Bus(Target("nats://127.0.0.1:1"), name).connect()
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
        await Bus(Target(f"nats://127.0.0.1:{port}"), name).connect(timeout=0.3)
    silent.close()
    await silent.wait_closed()


async def test_a_missing_credentials_file_is_named(url: str, name: str, tmp_path: Path) -> None:
    """The path of a credentials file that does not exist is in the message."""
    missing = str(tmp_path / "no.creds")
    with pytest.raises(ConnectionFailed, match=missing):
        await Bus(Target(url, creds=missing), name).connect()


async def test_unusable_tls_files_are_named(url: str, name: str, tmp_path: Path) -> None:
    """A file that is no certificate ends the connect with its path."""
    (tmp_path / "ca.pem").write_text("nonsense")
    with pytest.raises(ConnectionFailed, match=r"ca\.pem"):
        await Bus(Target(url, tls_ca=str(tmp_path / "ca.pem")), name).connect()


def test_a_password_is_not_shown() -> None:
    """Messages name the server without the user and password in its url."""
    assert "nats://***@example.com:4222" == Target("nats://me:secret@example.com:4222").shown


async def test_a_refusal_names_the_credentials_used(name: str) -> None:
    """A server that wants a password: denied, at once, saying that no credentials were used."""
    server = EmbeddedServer()
    server.extra_arguments = ("--user", "u", "--pass", "p")
    await server.start()
    with pytest.raises(ConnectionDenied, match="no credentials"):
        await Bus(Target(server.url), name).connect()
    await server.stop()


async def test_the_largest_message_passes_and_one_byte_more_is_refused(url: str, name: str) -> None:
    """Body and headers together count, exactly to the byte, and the connection lives on."""
    bus = Bus(Target(url), name)
    await bus.connect()
    received: asyncio.Queue[int] = asyncio.Queue()
    await bus.listen(name, lambda message: received.put_nowait(len(message.body)))
    head = write_headers({"A": "b"})
    room = bus.max_payload - len(head)
    await bus.publish(name, b"x" * room, head)
    assert room == await received.get()
    with pytest.raises(PayloadTooLarge) as caught:
        await bus.publish(name, b"x" * (room + 1), head)
    assert (bus.max_payload + 1, bus.max_payload) == (
        caught.value.details["size"],
        caught.value.details["limit"],
    )
    await bus.publish(name, b"still here")
    assert len(b"still here") == await received.get()
    assert bus.reconnects == 0
    await bus.close()


async def test_closed_and_overfull_buses_refuse_to_publish(name: str) -> None:
    """While the server is away a bounded buffer takes messages; then, and when closed, it refuses."""
    server = EmbeddedServer()
    await server.start()
    bus = Bus(Target(server.url), name)
    await bus.connect()
    lost = asyncio.Event()

    async def disconnected() -> None:
        lost.set()

    bus._client._disconnected_cb = disconnected
    await server.stop()
    await lost.wait()
    with pytest.raises(ConnectionFailed, match="buffer"):
        for _ in range(100):
            await bus.publish(name, b"x" * 1_000_000)
    await bus.close()
    with pytest.raises(ConnectionFailed, match="closed"):
        await bus.publish(name, b"x")
    with pytest.raises(ConnectionFailed, match="closed"):
        await bus.listen(name, lambda _: None)
    assert bus.closed.is_set()


async def test_what_is_sent_while_the_server_is_away_arrives(name: str, tmp_path: Path) -> None:
    """Messages wait for the server, and subscriptions are there again before they arrive."""
    server = EmbeddedServer(store=str(tmp_path))
    await server.start()
    bus = Bus(Target(server.url), name)
    await bus.connect()
    received: asyncio.Queue[bytes] = asyncio.Queue()
    await bus.listen(name, lambda message: received.put_nowait(message.body))
    lost, back = asyncio.Event(), asyncio.Event()

    async def disconnected() -> None:
        lost.set()

    async def restore() -> None:
        back.set()

    bus._client._disconnected_cb, bus.restore = disconnected, restore
    await server.stop()
    await lost.wait()
    await bus.publish(name, b"waited")
    again = EmbeddedServer(server.port, store=str(tmp_path))
    await again.start()
    async with asyncio.timeout(5):
        assert b"waited" == await received.get()
        await back.wait()
    assert 1 == bus.reconnects
    await bus.close()
    await again.stop()


async def test_an_absence_is_known_from_its_first_moment(name: str) -> None:
    """Also while the old socket is still being closed: what is sent then waits for the server already."""
    server, closed = EmbeddedServer(), asyncio.Event()
    await server.start()
    bus = Bus(Target(server.url), name)
    await bus.connect()
    assert bus._client._transport is not None
    bus._client._transport.wait_closed = closed.wait  # type: ignore[method-assign]
    await server.stop()
    async with asyncio.timeout(10):
        while bus.connected:
            await asyncio.sleep(0)
    assert bus.unsettled
    assert [f"lost {bus.target.shown}"] == [event.what for event in bus.history][1:]
    closed.set()
    await bus.close()


async def test_whatever_restoring_raises_it_is_tried_again(name: str) -> None:
    """An error of any library does not leave undone what a reconnect needs."""
    server = EmbeddedServer()
    await server.start()
    bus = Bus(Target(server.url), name)
    await bus.connect()
    tries, restored = 0, asyncio.Event()

    async def restore() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ValueError
        restored.set()

    bus.restore = restore
    await server.stop()
    again = EmbeddedServer(server.port)
    await again.start()
    async with asyncio.timeout(10):
        await restored.wait()
    assert 2 == tries
    await bus.close()
    await again.stop()
