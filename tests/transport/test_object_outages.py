"""Puts and reads of objects during outages, with servers that lost the store, and without JetStream."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest
from openagentmesh import ConnectionFailed, NotFound
from openagentmesh.protocol.objects import CHUNK_SIZE, ObjectInfo
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.object_chunks import Upload
from openagentmesh.transport.object_store import ObjectStore
from openagentmesh.transport.server import EmbeddedServer

from tests.support.objects import chunk_counts, connected, content_of, in_pieces
from tests.support.waiting import until

LOST = "lost its chunks"


class ReplaceableServer:
    """A server that can be replaced by a new one, with an empty store, at the same address."""

    def __init__(self) -> None:
        self.current = EmbeddedServer()

    async def replace(self, connection: Connection, objects: ObjectStore) -> None:
        """Replace it, and wait until the new one has the bucket."""
        before = connection.reconnects
        await self.current.stop()
        self.current = EmbeddedServer(self.current.port)
        await self.current.start()
        await until(lambda: connection.reconnects > before)
        await objects.create_missing()


async def check_absent(connection: Connection, objects: ObjectStore, name: str) -> None:
    """Check that an object is not listed, not found and has no chunks, and that it can be put."""
    assert [] == await objects.entries()
    with pytest.raises(NotFound):
        await content_of(objects, name)
    assert {} == await chunk_counts(connection.jetstream())
    await objects.put(name, in_pieces(b"new"))
    assert b"new" == await content_of(objects, name)


async def test_a_put_fails_when_its_first_chunks_are_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new server does not have the chunks that the old one acknowledged; objects of others stay."""
    server, uploads = ReplaceableServer(), list[Upload]()

    class RecordedUpload(Upload):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            uploads.append(self)

    monkeypatch.setattr("openagentmesh.transport.object_store.Upload", RecordedUpload)
    await server.current.start()
    async with connected(server.current.url) as (connection, objects), asyncio.timeout(20):

        def is_acknowledged() -> bool:
            return uploads[0]._acks.qsize() == uploads[0]._unacknowledged

        async def pieces() -> AsyncGenerator[bytes, None]:
            yield bytes(10 * CHUNK_SIZE)
            await until(is_acknowledged)
            await server.replace(connection, objects)
            await objects.put(name, in_pieces(b"other"))
            yield bytes(4 * CHUNK_SIZE)

        with pytest.raises(ConnectionFailed, match=LOST):
            await objects.put(name, pieces())
        assert b"other" == await content_of(objects, name)
        await objects.delete(name)
        await check_absent(connection, objects, name)
    await server.current.stop()


async def test_a_put_fails_when_all_its_chunks_are_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata that was written to a new server without the chunks is deleted again."""
    server = ReplaceableServer()
    await server.current.start()
    async with connected(server.current.url) as (connection, objects), asyncio.timeout(20):
        await objects.create_missing()
        last = objects._last

        async def last_before_the_replacement(key: str) -> tuple[ObjectInfo | None, int]:
            found = await last(key)
            monkeypatch.undo()
            await server.replace(connection, objects)
            return found

        monkeypatch.setattr(objects, "_last", last_before_the_replacement)
        with pytest.raises(ConnectionFailed, match=LOST):
            await objects.put(name, in_pieces(bytes(CHUNK_SIZE + 1)))
        await check_absent(connection, objects, name)
    await server.current.stop()


async def test_transfers_survive_a_restart_of_the_server(tmp_path: Path) -> None:
    """A put and a read that are in progress during a restart are complete, without unused chunks."""
    server = EmbeddedServer(store=str(tmp_path / "store"))
    await server.start()
    content, restarted = os.urandom(8 * CHUNK_SIZE), asyncio.Event()

    async def interrupted() -> AsyncGenerator[bytes, None]:
        yield content[: 4 * CHUNK_SIZE]
        await restarted.wait()
        yield content[4 * CHUNK_SIZE :]

    async with connected(server.url) as (connection, objects), asyncio.timeout(15):
        await objects.put("read", in_pieces(content))
        putting = asyncio.create_task(objects.put("put", interrupted()))
        async with aclosing(objects.read("read")) as pieces:
            first = await anext(pieces)
            await server.stop()
            server = EmbeddedServer(server.port, str(tmp_path / "store"))
            await server.start()
            await connection.wait_connected()
            restarted.set()
            await putting
            assert content == first + b"".join([piece async for piece in pieces])
        assert content == await content_of(objects, "put")
        assert [8, 8] == list((await chunk_counts(connection.jetstream())).values())
    await server.stop()


async def test_a_put_to_an_unreachable_server_times_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the server does not return, the put raises ConnectionFailed."""
    monkeypatch.setattr("openagentmesh.transport.object_chunks._ACK_TIMEOUT_S", 0.2)
    server = EmbeddedServer()
    await server.start()

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield bytes(CHUNK_SIZE)
        await server.stop()
        yield bytes(CHUNK_SIZE)

    async with connected(server.url) as (_, objects), asyncio.timeout(10):
        objects._jetstream._timeout = 0.2
        with pytest.raises(ConnectionFailed, match="the server is unreachable"):
            await objects.put(name, pieces())


async def test_a_server_without_jetstream_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation raises ConnectionFailed, which names JetStream."""
    monkeypatch.setattr("openagentmesh.transport.jetstream_errors.TIMEOUT_S", 0.2)
    server = EmbeddedServer()
    server.extra_arguments = ("-js=false",)
    await server.start()
    async with connected(server.url) as (_, objects):
        for operation in (objects.create_missing(), objects.put(name, in_pieces(b"x")), objects.entries()):
            with pytest.raises(ConnectionFailed, match="JetStream"):
                await operation
    await server.stop()
