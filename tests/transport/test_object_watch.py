"""Watches of the object store: each change once, across restarts, and without leftover consumers."""

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
from nats.js.object_store import ObjectStore as LibraryStore
from openagentmesh import ConnectionFailed
from openagentmesh.protocol.objects import STREAM, Artifact
from openagentmesh.transport.object_store import ObjectStore
from openagentmesh.transport.server import EmbeddedServer
from openagentmesh.transport.tasks import cancel_and_wait

from tests.support.objects import connected, content_of, in_pieces
from tests.support.waiting import until


async def test_a_watch_yields_each_change_once(
    objects: ObjectStore, library: LibraryStore, name: str
) -> None:
    """First the existing objects, then puts and deletions of all clients, of keys with the prefix only."""
    await objects.put(f"{name}/deleted", in_pieces(b""))
    await objects.delete(f"{name}/deleted")
    await objects.put(f"{name}/existing", in_pieces(b"12"))
    async with aclosing(objects.watch(f"{name}/")) as changes, asyncio.timeout(5):
        found = [await anext(changes)]
        await objects.put(name, in_pieces(b"without the prefix"))
        await library.put(f"{name}/library", b"123")
        await library.delete(f"{name}/library")
        await objects.put(f"{name}/existing", in_pieces(b"12"))
        found += [await anext(changes) for _ in range(3)]
    assert [("existing", 2, False), ("library", 3, False), ("library", 0, True), ("existing", 2, False)] == [
        (artifact.key.removeprefix(f"{name}/"), artifact.size, artifact.deleted) for artifact in found
    ]
    assert sorted(found, key=lambda artifact: artifact.modified) == found


@pytest.mark.parametrize("kept", [True, False], ids=["store-kept", "store-lost"])
async def test_a_watch_survives_a_restart_of_the_server(tmp_path: Path, *, kept: bool) -> None:
    """After a restart it yields every later change, and no object twice."""
    store = str(tmp_path / "store") if kept else ""
    server = EmbeddedServer(store=store)
    await server.start()
    found: asyncio.Queue[Artifact] = asyncio.Queue()
    async with connected(server.url) as (connection, objects):
        await objects.put("before", in_pieces(b"1"))
        await objects.put("replaced", in_pieces(b"1"))

        async def watch() -> None:
            async for artifact in objects.watch():
                found.put_nowait(artifact)

        watching = asyncio.create_task(watch())
        async with asyncio.timeout(15):
            assert {"before", "replaced"} == {(await found.get()).key for _ in range(2)}
            await server.stop()
            restarted = EmbeddedServer(server.port, store)
            await restarted.start()
            await connection.wait_connected()
            await objects.put("replaced", in_pieces(b"12"))
            assert ("replaced", 2) == ((artifact := await found.get()).key, artifact.size)
            await objects.delete("replaced")
            assert ("replaced", True) == ((artifact := await found.get()).key, artifact.deleted)
            assert (["before"] if kept else []) == [artifact.key for artifact in await objects.entries()]
            assert found.empty()
        await cancel_and_wait(watching)
    await restarted.stop()


async def test_a_closed_connection_fails_watches_and_operations(url: str, name: str) -> None:
    """A waiting watch, and every later operation, raise ConnectionFailed."""
    async with connected(url) as (connection, objects):
        await objects.put(name, in_pieces(b"x"))
        async with aclosing(objects.watch(name)) as changes, asyncio.timeout(2):
            await anext(changes)
            waiting = asyncio.ensure_future(anext(changes))
            await asyncio.sleep(0)  # the task begins to wait
            await connection.close()
            with pytest.raises(ConnectionFailed, match="closed"):
                await waiting
            for operation in (
                objects.put(name, in_pieces(b"x")),
                content_of(objects, name),
                objects.delete(name),
                objects.entries(),
            ):
                with pytest.raises(ConnectionFailed, match="closed"):
                    await operation


async def test_consumers_of_lists_and_watches_are_deleted(url: str, name: str) -> None:
    """The server's consumer of a list or watch is deleted at its end, since a stream allows few of them."""
    async with connected(url) as (connection, objects):
        await objects.put(name, in_pieces(b"x"))

        async def consumers() -> set[str]:
            return {consumer.name for consumer in await connection.jetstream().consumers_info(STREAM)}

        before = await consumers()

        async def has_no_new_consumer() -> bool:
            return not await consumers() - before

        async with aclosing(objects.watch(name)) as changes:
            await anext(changes)
            assert 1 == len(await consumers() - before)
        await until(has_no_new_consumer, 3)  # the library's consumers expire after five seconds
        for _ in range(20):
            assert [name] == [artifact.key for artifact in await objects.entries(name)]
        await until(has_no_new_consumer, 3)
