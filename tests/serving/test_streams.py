"""Streams: chunks in order, at most a window ahead of the reader, cancelled when the reader closes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from openagentmesh import AgentMesh, AgentSpec, ChunkSequenceError, HandlerError, MeshTimeout, PayloadTooLarge
from openagentmesh.agent.agent import Limits
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.headers import read_headers, write_headers
from openagentmesh.serving.streams import WINDOW, ChunkReader
from openagentmesh.transport.nats_client import Message
from pydantic import BaseModel

from tests.support.meshes import node_of


class CountRequest(BaseModel):
    count: int = 3
    size: int = 1


async def test_chunks_arrive_in_order(mesh: AgentMesh, name: str) -> None:
    """Each chunk of a stream that is longer than the window arrives once."""

    @mesh.agent(AgentSpec(name=name))
    async def count(req: CountRequest) -> AsyncIterator[int]:
        for number in range(req.count):
            yield number

    assert list(range(1000)) == [chunk async for chunk in mesh.stream(name, {"count": 1000})]
    assert [] == [chunk async for chunk in mesh.stream(name, {"count": 0})]


async def test_the_producer_waits_for_a_slow_reader(mesh: AgentMesh, name: str) -> None:
    """The producer is never more than a window ahead of its reader."""
    produced = 0

    @mesh.agent(AgentSpec(name=name))
    async def count(req: CountRequest) -> AsyncIterator[int]:
        nonlocal produced
        for number in range(req.count):
            produced = number + 1
            yield number

    read = 0
    async with aclosing(mesh.stream(name, {"count": 500})) as chunks:
        async for _ in chunks:
            read += 1
            await asyncio.sleep(0)
            assert produced <= read + WINDOW + 1
    assert (500, 500) == (produced, read)


async def test_closing_a_stream_cancels_its_producer(mesh: AgentMesh, name: str) -> None:
    """A reader that closes the stream after ten of a million chunks cancels the handler within a window."""
    produced, cancelled = 0, asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def count(req: CountRequest) -> AsyncIterator[int]:
        nonlocal produced
        try:
            for number in range(req.count):
                produced = number
                yield number
        finally:
            cancelled.set()

    async with aclosing(mesh.stream(name, {"count": 1_000_000})) as chunks:
        assert list(range(10)) == [await anext(chunks) for _ in range(10)]
    await asyncio.wait_for(cancelled.wait(), 5)
    assert produced <= 10 + WINDOW


async def test_a_stream_without_credit_is_cancelled_when_it_has_no_subscriber(
    mesh: AgentMesh, name: str
) -> None:
    """NATS' 503 for a chunk cancels the handler, as for readers with the published SDK."""
    node, cancelled = node_of(mesh), asyncio.Event()
    first_chunk = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def count(req: CountRequest) -> AsyncIterator[int]:
        try:
            for number in range(req.count):
                yield number
        finally:
            cancelled.set()

    await mesh.catalog()
    sid = await node.connection.subscribe(subjects.stream(name), lambda _: first_chunk.set())
    head = write_headers({"X-Mesh-Request-Id": name, "X-Mesh-Stream": "true"})
    await node.connection.publish(subjects.agent(name), b'{"count": 100000000}', head)
    await first_chunk.wait()
    await node.connection.unsubscribe(sid)
    await asyncio.wait_for(cancelled.wait(), 5)


async def test_frames_have_the_headers_of_the_protocol(mesh: AgentMesh, name: str) -> None:
    """Chunks have Seq and End, the end frame the number of chunks, the error frame no Seq."""
    node, frames = node_of(mesh), asyncio.Queue[Message]()

    @mesh.agent(AgentSpec(name=name))
    async def count(req: CountRequest) -> AsyncIterator[int]:
        for number in range(req.count):
            yield number
        if req.size > 1:
            raise ValueError("late")

    await mesh.catalog()
    await node.connection.subscribe(subjects.stream(name), frames.put_nowait)
    head = write_headers({"X-Mesh-Request-Id": name, "X-Mesh-Stream": "true"})
    common = {"X-Mesh-Request-Id": name, "X-Mesh-Instance-Id": mesh.instance_id}
    for body, last, last_body in (
        (b'{"count": 1}', {"X-Mesh-Stream-Seq": "1", "X-Mesh-Stream-End": "true"}, False),
        (b'{"count": 1, "size": 2}', {"X-Mesh-Status": "error", "X-Mesh-Stream-End": "true"}, True),
    ):
        await node.connection.publish(subjects.agent(name), body, head)
        chunk, end = await frames.get(), await frames.get()
        assert common | {"X-Mesh-Stream-Seq": "0", "X-Mesh-Stream-End": "false"} == read_headers(chunk.head)
        assert b"0" == chunk.body
        assert common | last == read_headers(end.head)
        assert last_body == bool(end.body)


async def test_an_error_after_chunks_is_raised(mesh: AgentMesh, name: str) -> None:
    """The reader gets the chunks that were sent before the error, then the error."""

    @mesh.agent(AgentSpec(name=name))
    async def count(req: CountRequest) -> AsyncIterator[int]:
        yield 1
        raise ValueError("late")

    chunks = mesh.stream(name, {})
    assert 1 == await anext(chunks)
    with pytest.raises(HandlerError, match="late"):
        await anext(chunks)


async def test_a_chunk_above_the_size_limit_ends_its_stream(mesh: AgentMesh, name: str) -> None:
    """The reader gets PayloadTooLarge, and the next stream works."""

    @mesh.agent(AgentSpec(name=name))
    async def big(req: CountRequest) -> AsyncIterator[str]:
        yield "x" * req.size

    with pytest.raises(PayloadTooLarge):
        [chunk async for chunk in mesh.stream(name, {"size": 2_000_000})]
    assert ["x"] == [chunk async for chunk in mesh.stream(name, {})]


async def test_the_timeout_of_a_stream_restarts_with_each_chunk(mesh: AgentMesh, name: str) -> None:
    """A stream may take longer than its timeout, as long as no single chunk does."""

    @mesh.agent(AgentSpec(name=name))
    async def slow(req: CountRequest) -> AsyncIterator[int]:
        for number in range(req.count):
            await asyncio.sleep(0.15)
            yield number
        await asyncio.sleep(60)

    chunks = mesh.stream(name, {"count": 4}, timeout=0.4)
    assert [0, 1, 2, 3] == [await anext(chunks) for _ in range(4)]
    with pytest.raises(MeshTimeout):
        await anext(chunks)


async def test_a_lost_chunk_raises_an_error() -> None:
    """A gap in the sequence is a ChunkSequenceError with the expected and the received number."""

    async def publish(*_: object) -> None:
        raise AssertionError("no message to the host is expected")

    reader = ChunkReader(publish, "agent", "id")
    for seq in (0, 2):
        head = codec.frame_headers(codec.frame_prefix("id", "i"), seq)
        reader.receive(Message("s", "", head, b"1"))
    await reader.next()
    with pytest.raises(ChunkSequenceError) as caught:
        await reader.next()
    assert {"expected_seq": 1, "got_seq": 2} == caught.value.details


async def test_chunks_without_sequence_numbers_are_accepted() -> None:
    """A sender that does not number its chunks can be read."""

    async def publish(*_: object) -> None:
        raise AssertionError("no message to the host is expected")

    reader = ChunkReader(publish, "agent", "id")
    for body in (b"1", b"2"):
        reader.receive(Message("s", "", b"", body))
    assert [b"1", b"2"] == [(await reader.next()).body for _ in range(2)]


async def test_chunks_are_not_flushed_one_at_a_time(mesh: AgentMesh, name: str) -> None:
    """A stream of a thousand chunks causes no round trips to the server."""

    @mesh.agent(AgentSpec(name=name))
    async def count(req: CountRequest) -> AsyncIterator[int]:
        for number in range(req.count):
            yield number

    assert [0] == [chunk async for chunk in mesh.stream(name, {"count": 1})]
    client = node_of(mesh).connection._client
    pongs = client._pongs_received
    assert 1000 == len([chunk async for chunk in mesh.stream(name, {"count": 1000})])
    assert client._pongs_received - pongs <= 1  # of the keep-alive, at most


async def test_a_slow_reader_may_take_longer_than_the_agents_timeout(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's timeout applies to its handler, not to the time that a reader takes for many chunks."""
    monkeypatch.setattr("openagentmesh.serving.streams._MAX_GRANT_INTERVAL_S", 0.1)
    monkeypatch.setattr("openagentmesh.serving.deadline._RECOVERY_S", 0.3)
    node_of(mesh).prepare = lambda agent: agent.with_limits(Limits(timeout=0.3))

    @mesh.agent(AgentSpec(name=name))
    async def count(req: CountRequest) -> AsyncIterator[int]:
        for number in range(req.count):
            yield number

    read = []
    async for chunk in mesh.stream(name, {"count": 2 * WINDOW}):
        read.append(chunk)
        await asyncio.sleep(0.03)  # a window takes several times the timeout
    assert list(range(2 * WINDOW)) == read


async def test_a_stream_whose_reader_stalls_is_cancelled(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the reader, not the handler, as the cause."""
    monkeypatch.setattr("openagentmesh.serving.deadline._RECOVERY_S", 0.1)
    node_of(mesh).prepare = lambda agent: agent.with_limits(Limits(timeout=0.2))
    cancelled = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def count(req: CountRequest) -> AsyncIterator[int]:
        try:
            for number in range(req.count):
                yield number
        finally:
            cancelled.set()

    async with aclosing(mesh.stream(name, {"count": 10 * WINDOW}, timeout=30)) as chunks:
        assert 0 == await anext(chunks)
        await asyncio.wait_for(cancelled.wait(), 10)
        with pytest.raises(MeshTimeout, match="had to wait too long for the reader of its stream"):
            async for _ in chunks:
                pass
