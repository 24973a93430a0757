"""ObjectStore that are put while the server is lost and a new, empty one comes."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from openagentmesh import ConnectionFailed, NotFound
from openagentmesh.protocol.objects import CHUNK_SIZE, STREAM, ObjectInfo
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.object_chunks import Upload
from openagentmesh.transport.object_store import ObjectStore
from openagentmesh.transport.server import EmbeddedServer

from tests.support.objects import chunk_counts, connected, content_of, in_pieces
from tests.support.waiting import until

LOST = "lost its chunks"


class Servers:
    """Servers of one address, one after the other, each of them empty."""

    def __init__(self) -> None:
        self.now = EmbeddedServer()

    async def change(self, connection: Connection, objects: ObjectStore) -> None:
        """Another one comes; ends when it has the bucket."""
        before = connection.reconnects
        await self.now.stop()
        self.now = EmbeddedServer(self.now.port)
        await self.now.start()

        async def made() -> bool:
            return before < connection.reconnects == objects._created

        await until(made)


async def is_nowhere(connection: Connection, objects: ObjectStore, name: str) -> None:
    """Nobody can take it for stored, and nothing of it is left; putting it again works."""
    assert [] == await objects.entries()
    with pytest.raises(NotFound):
        await content_of(objects, name)
    assert {} == await chunk_counts(connection.jetstream())
    await objects.put(name, in_pieces(b"again"))
    assert b"again" == await content_of(objects, name)


async def test_a_put_whose_server_is_replaced_half_way_fails(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first server had confirmed is not on the second one; what others put there stays."""
    servers, uploads = Servers(), list[Upload]()

    class Known(Upload):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            uploads.append(self)

    monkeypatch.setattr("openagentmesh.transport.object_store.Upload", Known)
    await servers.now.start()
    async with connected(servers.now.url) as (connection, objects), asyncio.timeout(20):

        async def confirmed() -> bool:
            return uploads[0]._acks.qsize() == uploads[0]._unacknowledged

        async def pieces() -> AsyncGenerator[bytes, None]:
            yield bytes(10 * CHUNK_SIZE)
            await until(confirmed)
            await servers.change(connection, objects)
            await objects.put(name, in_pieces(b"theirs"))
            yield bytes(4 * CHUNK_SIZE)

        with pytest.raises(ConnectionFailed, match=LOST):
            await objects.put(name, pieces())
        assert b"theirs" == await content_of(objects, name)
        await objects.delete(name)
        await is_nowhere(connection, objects, name)
    await servers.now.stop()


async def test_a_put_whose_server_is_replaced_at_its_end_fails(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A description that alone has reached the new server is taken back."""
    servers = Servers()
    await servers.now.start()
    async with connected(servers.now.url) as (connection, objects), asyncio.timeout(20):
        await objects.create_missing()
        last = objects._last

        async def last_before(key: str) -> tuple[ObjectInfo | None, int]:
            found = await last(key)
            monkeypatch.undo()
            await servers.change(connection, objects)
            return found

        monkeypatch.setattr(objects, "_last", last_before)
        with pytest.raises(ConnectionFailed, match=LOST):
            await objects.put(name, in_pieces(bytes(CHUNK_SIZE + 1)))
        await is_nowhere(connection, objects, name)
    await servers.now.stop()


async def test_listing_and_watching_leave_nothing_on_the_server(url: str, name: str) -> None:
    """The consumer of a list, and that of a watch that is over, are gone at once; the server allows few."""
    async with connected(url) as (connection, objects):
        await objects.put(name, in_pieces(b"x"))

        async def consumers() -> set[str]:
            return {consumer.name for consumer in await connection.jetstream().consumers_info(STREAM)}

        before = await consumers()

        async def as_before() -> bool:
            return not await consumers() - before

        async with aclosing(objects.watch(name)) as changes:
            await anext(changes)
            assert 1 == len(await consumers() - before)
        await until(as_before, 3)  # the library's are there for five seconds
        for _ in range(20):
            assert [name] == [artifact.key for artifact in await objects.entries(name)]
        await until(as_before, 3)
