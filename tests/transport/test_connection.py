"""The connection: connect errors, size limits, buffering during an outage, and reconnects."""

import asyncio
import errno
import os
from pathlib import Path

import pytest
from openagentmesh import ConnectionDenied, ConnectionFailed, PayloadTooLarge
from openagentmesh.protocol.headers import write_headers
from openagentmesh.transport.connection import Connection, Target
from openagentmesh.transport.server import EmbeddedServer

from tests.support.servers import running_server
from tests.support.waiting import until


async def test_an_unreachable_server_is_reported_with_the_reason(name: str) -> None:
    """The error has the address and the system's reason."""
    with pytest.raises(ConnectionFailed) as caught:
        await Connection(Target("nats://127.0.0.1:1"), name).connect()
    assert "nats://127.0.0.1:1" in caught.value.message
    assert os.strerror(errno.ECONNREFUSED) in caught.value.message


async def test_connecting_to_a_port_that_never_answers_times_out(name: str) -> None:
    """A server that accepts the connection and sends nothing fails the connect after the timeout."""

    async def send_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(send_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ConnectionFailed, match=r"within 0\.3s"):
        await Connection(Target(f"nats://127.0.0.1:{port}"), name).connect(timeout=0.3)
    server.close()
    await server.wait_closed()


async def test_a_missing_credentials_file_is_reported(url: str, name: str, tmp_path: Path) -> None:
    """The error has the path of the file."""
    missing = str(tmp_path / "no.creds")
    with pytest.raises(ConnectionFailed, match=missing):
        await Connection(Target(url, creds=missing), name).connect()


async def test_an_invalid_tls_file_is_reported(url: str, name: str, tmp_path: Path) -> None:
    """The error has the path of the file that is not a certificate."""
    (tmp_path / "ca.pem").write_text("nonsense")
    with pytest.raises(ConnectionFailed, match=r"ca\.pem"):
        await Connection(Target(url, tls_ca=str(tmp_path / "ca.pem")), name).connect()


def test_the_displayed_url_has_no_password() -> None:
    """User and password are replaced in the url for messages."""
    assert "nats://***@example.com:4222" == Target("nats://me:secret@example.com:4222").display_url


async def test_rejected_credentials_are_reported(name: str) -> None:
    """When the server requires a password, the error names the credentials used: none."""
    with (
        running_server("--user", "u", "--pass", "p") as url,
        pytest.raises(ConnectionDenied, match="no credentials"),
    ):
        await Connection(Target(url), name).connect()


async def test_a_message_of_the_maximum_size_is_sent(url: str, name: str) -> None:
    """One byte more, of body and headers together, is rejected; the connection stays open."""
    connection = Connection(Target(url), name)
    await connection.connect()
    received: asyncio.Queue[int] = asyncio.Queue()
    await connection.subscribe(name, lambda message: received.put_nowait(len(message.body)))
    head = write_headers({"A": "b"})
    max_body = connection.max_payload - len(head)
    await connection.publish(name, b"x" * max_body, head)
    assert max_body == await received.get()
    with pytest.raises(PayloadTooLarge) as caught:
        await connection.publish(name, b"x" * (max_body + 1), head)
    assert (connection.max_payload + 1, connection.max_payload) == (
        caught.value.details["size"],
        caught.value.details["limit"],
    )
    await connection.publish(name, b"next")
    assert len(b"next") == await received.get()
    assert connection.reconnects == 0
    await connection.close()


async def test_publishing_fails_when_the_buffer_is_full_or_the_connection_closed(name: str) -> None:
    """During an outage messages are buffered up to a limit; a closed connection rejects every operation."""
    server = EmbeddedServer()
    await server.start()
    connection = Connection(Target(server.url), name)
    await connection.connect()
    await server.stop()
    await until(lambda: not connection.connected)
    with pytest.raises(ConnectionFailed, match="buffer"):
        for _ in range(100):
            await connection.publish(name, b"x" * 1_000_000)
    await connection.close()
    with pytest.raises(ConnectionFailed, match="closed"):
        await connection.publish(name, b"x")
    with pytest.raises(ConnectionFailed, match="closed"):
        await connection.subscribe(name, lambda _: None)
    assert connection.closed.is_set()


async def test_messages_published_during_an_outage_are_delivered(name: str, tmp_path: Path) -> None:
    """They are sent after the reconnect, when the subscriptions exist again."""
    server = EmbeddedServer(store=str(tmp_path))
    await server.start()
    connection = Connection(Target(server.url), name)
    await connection.connect()
    received: asyncio.Queue[bytes] = asyncio.Queue()
    await connection.subscribe(name, lambda message: received.put_nowait(message.body))
    restored = asyncio.Event()

    async def restore() -> None:
        restored.set()

    connection.restore = restore
    await server.stop()
    await until(lambda: not connection.connected)
    await connection.publish(name, b"buffered")
    restarted = EmbeddedServer(server.port, store=str(tmp_path))
    await restarted.start()
    async with asyncio.timeout(5):
        assert b"buffered" == await received.get()
        await restored.wait()
    assert 1 == connection.reconnects
    await connection.close()
    await restarted.stop()


async def test_an_outage_is_recorded_while_the_socket_is_being_closed(name: str) -> None:
    """`is_recovering` is set and the loss is in the history as soon as the connection is not connected."""
    server, socket_closed = EmbeddedServer(), asyncio.Event()
    await server.start()
    connection = Connection(Target(server.url), name)
    await connection.connect()
    assert connection._client._transport is not None
    connection._client._transport.wait_closed = socket_closed.wait  # type: ignore[method-assign]
    await server.stop()
    async with asyncio.timeout(10):
        while connection.connected:
            await asyncio.sleep(0)
    assert connection.is_recovering
    assert [f"lost {connection.target.display_url}"] == [event.what for event in connection.history][1:]
    socket_closed.set()
    await connection.close()


async def test_restoring_is_retried_after_any_error(name: str) -> None:
    """When `restore` raises an error of any type after a reconnect, it is called again."""
    server = EmbeddedServer()
    await server.start()
    connection = Connection(Target(server.url), name)
    await connection.connect()
    attempts, restored = 0, asyncio.Event()

    async def restore() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise ValueError
        restored.set()

    connection.restore = restore
    await server.stop()
    restarted = EmbeddedServer(server.port)
    await restarted.start()
    async with asyncio.timeout(10):
        await restored.wait()
    assert 2 == attempts
    await connection.close()
    await restarted.stop()
