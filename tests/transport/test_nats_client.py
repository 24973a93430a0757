"""Each override of the nats-py client, tested with a real server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from nats.errors import MaxPayloadError
from openagentmesh.transport.nats_client import Message, NatsClient


@pytest.fixture
def reconnected() -> asyncio.Event:
    """Set when the client has reconnected."""
    return asyncio.Event()


@pytest.fixture
async def client(url: str, reconnected: asyncio.Event) -> AsyncIterator[NatsClient]:
    """A connected client, without a `Connection` around it, which could hide its defects."""

    async def on_reconnected() -> None:
        reconnected.set()

    client = NatsClient()
    await client.connect(url, reconnect_time_wait=0, max_reconnect_attempts=-1, reconnected_cb=on_reconnected)
    yield client
    await client.close()


async def is_reading(client: NatsClient) -> bool:
    """Whether the client still reads data of the server."""
    return await client.rtt(timeout=5) >= 0


async def test_the_pong_of_a_cancelled_flush_is_ignored(client: NatsClient) -> None:
    """The client continues to read, and the next flush gets its own PONG."""
    for _ in range(20):
        flushing = asyncio.ensure_future(client.flush())
        await asyncio.sleep(0)
        flushing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await flushing
    assert await is_reading(client)
    assert not client._pongs


async def test_a_flush_is_written_after_queued_commands(
    client: NatsClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The PING follows an earlier SUB, so its PONG proves that the server has the subscription."""
    written: list[bytes] = []
    transport = client._transport
    assert transport is not None
    write = transport.writelines

    def writelines(payload: list[bytes]) -> None:
        written.extend(payload)
        write(payload)

    monkeypatch.setattr(transport, "writelines", writelines)
    await client.subscribe_callback(name, lambda _: None)
    await client.flush()
    data = b"".join(written)
    assert data.index(b"SUB " + name.encode()) < data.index(b"PING")


async def test_the_client_reconnects_after_an_error_of_the_server(
    client: NatsClient, reconnected: asyncio.Event, name: str
) -> None:
    """After an -ERR that closes the connection, the client reconnects and restores its subscriptions."""
    received: list[Message] = []
    await client.subscribe_callback(name, received.append)
    await client.flush()
    await client.write(b"SUB  broken..subject>> 9 9 9\r\n")
    async with asyncio.timeout(5):
        await reconnected.wait()
    await client.publish(name, b"after")
    await client.flush()
    assert [b"after"] == [message.body for message in received]


async def test_headers_count_towards_the_size_limit(client: NatsClient, name: str) -> None:
    """A message that is too large because of its headers is not sent; the connection stays open."""
    body = b"x" * client.max_payload
    await client.publish(name, body)
    with pytest.raises(MaxPayloadError):
        await client.publish(name, body, headers={"A": "b"})
    assert await is_reading(client)


async def test_the_client_reconnects_after_an_error_while_reading(
    client: NatsClient, reconnected: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the read loop ends with an error, the client reconnects and starts another one."""

    async def failing(_: bytes) -> None:
        monkeypatch.undo()
        raise ValueError("a bug in the parser")

    monkeypatch.setattr(client._ps, "parse", failing)
    await client.write(b"PING\r\n")
    async with asyncio.timeout(5):
        await reconnected.wait()
    assert await is_reading(client)


async def test_an_exception_in_a_callback_is_logged(
    client: NatsClient, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client continues to read; also for a message on a subject that is not UTF-8."""

    def failing(_message: Message) -> None:
        raise ValueError("a bug in the callback")

    await client.subscribe_callback(f"{name}.>", failing)
    await client.write(f"PUB {name}.".encode() + b"\xff 0\r\n\r\n")
    assert await is_reading(client)
    assert "could not be processed" in caplog.text


async def test_messages_are_dispatched_from_the_read_loop(client: NatsClient, name: str) -> None:
    """Subscriptions have no tasks of their own, and messages arrive in order."""
    received: list[bytes] = []
    before = len(asyncio.all_tasks())
    for number in range(100):
        await client.subscribe_callback(f"{name}.{number}", lambda message: received.append(message.body))
    assert before == len(asyncio.all_tasks())
    for number in range(100):
        await client.publish(f"{name}.{number}", str(number).encode())
    await client.flush()
    assert [str(number).encode() for number in range(100)] == received


async def test_messages_sent_before_unsub_are_dispatched(client: NatsClient, name: str) -> None:
    """The callback stays after UNSUB until it is removed, so that no message on its way is lost."""
    received: list[Message] = []
    sid = await client.subscribe_callback(name, received.append, "group")
    await client.publish(name, b"first")
    await client.send_unsubscribe(sid)
    await client.publish(name, b"second")
    await client.flush()
    client.remove_callback(sid)
    assert [b"first"] == [message.body for message in received]


@pytest.mark.parametrize("before", [b"", b"+OK\r\n", b"PING\r\n"], ids=["message", "ok", "ping"])
async def test_messages_are_dispatched_by_both_parsers(client: NatsClient, name: str, before: bytes) -> None:
    """The callback gets a message whether the library's parser or our own one parses it."""
    received: list[Message] = []
    sid = await client.subscribe_callback(name, received.append)
    await client._ps.parse(before + f"MSG {name} {sid} 5\r\nhello\r\nMSG {name} {sid} 1\r\n".encode())
    await client._ps.parse(b"!\r\n")
    assert [b"hello", b"!"] == [message.body for message in received]
