"""Each override of the nats-py client, proved against the real server."""

import asyncio
import contextlib

import pytest
from nats.errors import MaxPayloadError
from openagentmesh.transport.nats_client import Message, NatsClient


@pytest.fixture
async def client(url: str) -> NatsClient:
    """A connected client that has no other cure than its own overrides."""
    client = NatsClient()
    await client.connect(url, reconnect_time_wait=0, max_reconnect_attempts=-1)
    return client


async def _answers(client: NatsClient) -> bool:
    """Whether the client still reads what the server sends."""
    return await client.rtt(timeout=5) >= 0


async def test_a_cancelled_flush_leaves_the_client_alive(client: NatsClient) -> None:
    """The late PONG of a cancelled flush is passed over, and the next flush gets its own."""
    for _ in range(20):
        flushing = asyncio.ensure_future(client.flush())
        await asyncio.sleep(0)
        flushing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await flushing
    assert await _answers(client)
    assert not client._pongs
    await client.close()


async def test_flush_is_written_in_order(
    client: NatsClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PING stands behind the SUB before it, so its PONG proves that the server has both."""
    written: list[bytes] = []
    transport = client._transport
    assert transport is not None
    forward = transport.writelines

    def writelines(payload: list[bytes]) -> None:
        written.extend(payload)
        forward(payload)

    monkeypatch.setattr(transport, "writelines", writelines)
    await client.subscribe_callback(name, lambda _: None)
    await client.flush()
    wire = b"".join(written)
    assert wire.index(b"SUB " + name.encode()) < wire.index(b"PING")
    await client.close()


async def test_an_error_of_the_server_does_not_close_for_good(client: NatsClient, name: str) -> None:
    """After an -ERR that ends the connection, the client comes back with its subscriptions."""
    received: list[Message] = []
    back = asyncio.Event()

    async def reconnected() -> None:
        back.set()

    client._reconnected_cb = reconnected
    await client.subscribe_callback(name, received.append)
    await client.flush()
    await client.write(b"SUB  broken..subject>> 9 9 9\r\n")
    async with asyncio.timeout(5):
        await back.wait()
    await client.publish(name, b"again")
    await client.flush()
    assert [b"again"] == [message.body for message in received]
    await client.close()


async def test_headers_count_towards_the_limit(client: NatsClient, name: str) -> None:
    """A body that only its headers make too large is refused here, and the connection lives on."""
    body = b"x" * client.max_payload
    await client.publish(name, body)
    with pytest.raises(MaxPayloadError):
        await client.publish(name, body, headers={"A": "b"})
    assert await _answers(client)
    await client.close()


async def test_an_error_while_reading_reconnects(client: NatsClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the read loop ends of an error, the client starts another one."""
    back = asyncio.Event()

    async def reconnected() -> None:
        back.set()

    async def broken(_: bytes) -> None:
        monkeypatch.undo()
        raise ValueError("a bug in the parser")

    client._reconnected_cb = reconnected
    monkeypatch.setattr(client._ps, "parse", broken)
    client._pending.append(b"PING\r\n")
    await client._flush_pending()
    async with asyncio.timeout(5):
        await back.wait()
    assert await _answers(client)
    await client.close()


async def test_what_a_receiver_raises_ends_its_message_only(
    client: NatsClient, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A message that cannot be taken is logged, also one on a subject that is no text; reading goes on."""

    def raises(_message: Message) -> None:
        raise ValueError("not this one")

    await client.subscribe_callback(f"{name}.>", raises)
    await client.write(f"PUB {name}.".encode() + b"\xff 0\r\n\r\n")
    assert await _answers(client)
    assert "could not be processed" in caplog.text
    await client.close()


async def test_messages_are_dispatched_from_the_read_loop(client: NatsClient, name: str) -> None:
    """A listened subject has no task of its own, and its messages come in order."""
    received: list[bytes] = []
    before = len(asyncio.all_tasks())
    for number in range(100):
        await client.subscribe_callback(f"{name}.{number}", lambda message: received.append(message.body))
    assert before == len(asyncio.all_tasks())
    for number in range(100):
        await client.publish(f"{name}.{number}", str(number).encode())
    await client.flush()
    assert [str(number).encode() for number in range(100)] == received
    await client.close()


async def test_after_leave_messages_under_way_are_still_received(client: NatsClient, name: str) -> None:
    """UNSUB keeps the receiver until it is forgotten, so nothing that was sent to it is lost."""
    received: list[Message] = []
    sid = await client.subscribe_callback(name, received.append, "group")
    await client.publish(name, b"first")
    await client.send_unsubscribe(sid)
    await client.publish(name, b"second")
    await client.flush()
    client.remove_callback(sid)
    assert [b"first"] == [message.body for message in received]
    await client.close()


@pytest.mark.parametrize("before", [b"", b"+OK\r\n", b"PING\r\n"])
async def test_a_message_is_received_behind_anything(client: NatsClient, name: str, before: bytes) -> None:
    """Whichever of the parsers comes to a message, its receiver gets it."""
    received: list[Message] = []
    sid = await client.subscribe_callback(name, received.append)
    await client._ps.parse(before + f"MSG {name} {sid} 5\r\nhello\r\nMSG {name} {sid} 1\r\n".encode())
    await client._ps.parse(b"!\r\n")
    assert [b"hello", b"!"] == [message.body for message in received]
    await client.close()
