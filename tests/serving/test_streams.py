"""Streams: in order, never more than a window ahead, and stopped when nobody reads."""

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


class Wanted(BaseModel):
    count: int = 3
    size: int = 1


async def test_chunks_come_in_order_and_end(mesh: AgentMesh, name: str) -> None:
    """All chunks of a stream far longer than the window arrive, each once."""

    @mesh.agent(AgentSpec(name=name))
    async def count(req: Wanted) -> AsyncIterator[int]:
        for number in range(req.count):
            yield number

    assert list(range(1000)) == [chunk async for chunk in mesh.stream(name, {"count": 1000})]
    assert [] == [chunk async for chunk in mesh.stream(name, {"count": 0})]


async def test_a_slow_reader_holds_the_producer(mesh: AgentMesh, name: str) -> None:
    """The producer is never more than a window ahead of its reader."""
    made = 0

    @mesh.agent(AgentSpec(name=name))
    async def count(req: Wanted) -> AsyncIterator[int]:
        nonlocal made
        for number in range(req.count):
            made = number + 1
            yield number

    read = 0
    async with aclosing(mesh.stream(name, {"count": 500})) as chunks:
        async for _ in chunks:
            read += 1
            await asyncio.sleep(0)
            assert made <= read + WINDOW + 1
    assert (500, 500) == (made, read)


async def test_an_abandoned_stream_stops_its_producer(mesh: AgentMesh, name: str) -> None:
    """A reader that leaves after ten of a million chunks stops the handler within one window."""
    made, stopped = 0, asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def count(req: Wanted) -> AsyncIterator[int]:
        nonlocal made
        try:
            for number in range(req.count):
                made = number
                yield number
        finally:
            stopped.set()

    async with aclosing(mesh.stream(name, {"count": 1_000_000})) as chunks:
        assert list(range(10)) == [await anext(chunks) for _ in range(10)]
    async with asyncio.timeout(5):
        await stopped.wait()
    assert made <= 10 + WINDOW


async def test_a_stock_readers_abandoned_stream_is_noticed(mesh: AgentMesh, name: str) -> None:
    """Without credit, NATS' own word that nobody listens stops the handler."""
    node, stopped = node_of(mesh), asyncio.Event()
    first: asyncio.Event = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def count(req: Wanted) -> AsyncIterator[int]:
        try:
            for number in range(req.count):
                yield number
        finally:
            stopped.set()

    await mesh.catalog()
    sid = await node.connection.subscribe(subjects.stream(name), lambda _: first.set())
    head = write_headers({"X-Mesh-Request-Id": name, "X-Mesh-Stream": "true"})
    await node.connection.publish(subjects.agent(name), b'{"count": 100000000}', head)
    await first.wait()
    await node.connection.unsubscribe(sid)
    async with asyncio.timeout(5):
        assert await stopped.wait()


async def test_frames_are_as_the_protocol_says(mesh: AgentMesh, name: str) -> None:
    """Chunks carry Seq and End, the end frame the count, the error frame no Seq."""
    node, frames = node_of(mesh), asyncio.Queue[Message]()

    @mesh.agent(AgentSpec(name=name))
    async def count(req: Wanted) -> AsyncIterator[int]:
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


async def test_an_error_in_the_middle_is_raised(mesh: AgentMesh, name: str) -> None:
    """The reader gets the chunks before the error, then the error."""

    @mesh.agent(AgentSpec(name=name))
    async def count(req: Wanted) -> AsyncIterator[int]:
        yield 1
        raise ValueError("late")

    chunks = mesh.stream(name, {})
    assert 1 == await anext(chunks)
    with pytest.raises(HandlerError, match="late"):
        await anext(chunks)


async def test_a_chunk_that_is_too_large(mesh: AgentMesh, name: str) -> None:
    """A large chunk ends its stream with the sizes; the next stream works."""

    @mesh.agent(AgentSpec(name=name))
    async def big(req: Wanted) -> AsyncIterator[str]:
        yield "x" * req.size

    with pytest.raises(PayloadTooLarge):
        [chunk async for chunk in mesh.stream(name, {"size": 2_000_000})]
    assert ["x"] == [chunk async for chunk in mesh.stream(name, {})]


async def test_the_timeout_counts_from_the_last_chunk(mesh: AgentMesh, name: str) -> None:
    """A stream may take longer than its timeout, as long as no single chunk does."""

    @mesh.agent(AgentSpec(name=name))
    async def slow(req: Wanted) -> AsyncIterator[int]:
        for number in range(req.count):
            await asyncio.sleep(0.15)
            yield number
        await asyncio.sleep(60)

    chunks = mesh.stream(name, {"count": 4}, timeout=0.4)
    assert [0, 1, 2, 3] == [await anext(chunks) for _ in range(4)]
    with pytest.raises(MeshTimeout):
        await anext(chunks)


async def test_a_lost_chunk_is_noticed() -> None:
    """A gap in the sequence is an error that names both numbers."""

    async def publish(*_: object) -> None:
        raise AssertionError("nothing to say to the host")

    reader = ChunkReader(publish, "agent", "id")
    for seq in (0, 2):
        head = codec.frame_headers(codec.frame_prefix("id", "i"), seq)
        reader.receive(Message("s", "", head, b"1"))
    await reader.next()
    with pytest.raises(ChunkSequenceError) as caught:
        await reader.next()
    assert {"expected_seq": 1, "got_seq": 2} == caught.value.details


async def test_frames_without_a_sequence_are_tolerated() -> None:
    """A peer that numbers nothing is read all the same."""

    async def publish(*_: object) -> None:
        raise AssertionError("nothing to say to the host")

    reader = ChunkReader(publish, "agent", "id")
    for body in (b"1", b"2"):
        reader.receive(Message("s", "", b"", body))
    assert [b"1", b"2"] == [(await reader.next()).body for _ in range(2)]


async def test_chunks_are_not_flushed_one_by_one(mesh: AgentMesh, name: str) -> None:
    """A thousand chunks cost no round trip each: the host asks the server for no answer meanwhile."""

    @mesh.agent(AgentSpec(name=name))
    async def count(req: Wanted) -> AsyncIterator[int]:
        for number in range(req.count):
            yield number

    assert [0] == [chunk async for chunk in mesh.stream(name, {"count": 1})]
    client = node_of(mesh).connection._client
    pongs = client._pongs_received
    assert 1000 == len([chunk async for chunk in mesh.stream(name, {"count": 1000})])
    assert client._pongs_received - pongs <= 1  # the keep-alive may fall into it


async def test_a_slow_reader_keeps_its_stream(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's patience is for the handler: a reader may take longer than that over many chunks."""
    monkeypatch.setattr("openagentmesh.serving.streams._MAX_GRANT_INTERVAL_S", 0.1)
    node_of(mesh).prepare = lambda agent: agent.with_limits(Limits(timeout=0.5))

    @mesh.agent(AgentSpec(name=name))
    async def count(req: Wanted) -> AsyncIterator[int]:
        for number in range(req.count):
            yield number

    read = []
    async for chunk in mesh.stream(name, {"count": 2 * WINDOW}):
        read.append(chunk)
        await asyncio.sleep(0.02)  # the whole takes five times the limit
    assert list(range(2 * WINDOW)) == read


async def test_a_reader_that_takes_nothing_is_named(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler is stopped in the end, and it is not said that it was too slow."""
    monkeypatch.setattr("openagentmesh.serving.deadline._RECOVERY_S", 0.1)
    node_of(mesh).prepare = lambda agent: agent.with_limits(Limits(timeout=0.2))
    stopped = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def count(req: Wanted) -> AsyncIterator[int]:
        try:
            for number in range(req.count):
                yield number
        finally:
            stopped.set()

    async with aclosing(mesh.stream(name, {"count": 10 * WINDOW}, timeout=30)) as chunks:
        assert 0 == await anext(chunks)
        await asyncio.wait_for(stopped.wait(), 10)
        with pytest.raises(MeshTimeout, match="had to wait too long for the reader of its stream"):
            async for _ in chunks:
                pass
