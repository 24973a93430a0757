"""ObjectStore: the standard format both ways, nothing lost, nothing left behind, nothing in the way."""

import asyncio
import hashlib
import json
import os
from base64 import urlsafe_b64encode
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import nats
import pytest
from nats.js import JetStreamContext
from nats.js.errors import ObjectNotFoundError
from nats.js.object_store import ObjectStore as LibraryStore
from openagentmesh import ConnectionFailed, MeshError, NotFound, PayloadTooLarge
from openagentmesh.protocol.errors import KVConflict
from openagentmesh.protocol.objects import CHUNK_SIZE, STREAM, Artifact, metadata_subject
from openagentmesh.protocol.subjects import ARTIFACTS_BUCKET
from openagentmesh.transport.object_store import ObjectStore
from openagentmesh.transport.server import EmbeddedServer
from openagentmesh.transport.tasks import cancel_and_wait

from tests.support.objects import chunk_counts, connected, content_of, in_pieces

SIZES = [0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 10 * CHUNK_SIZE + 7]


@pytest.fixture
async def objects(url: str) -> AsyncIterator[ObjectStore]:
    async with connected(url) as (_, found):
        yield found


@pytest.fixture
async def jetstream(url: str) -> AsyncIterator[JetStreamContext]:
    """The library over a connection of its own, as any other client."""
    client = await nats.connect(url)
    yield client.jetstream()
    await client.close()


@pytest.fixture
async def library(objects: ObjectStore, jetstream: JetStreamContext) -> LibraryStore:
    await objects.create_missing()
    return await jetstream.object_store(ARTIFACTS_BUCKET)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", ["plain", "a folder/Größe 2.pdf", "日本/📦.tar gz", "dots.and*>"])
async def test_the_library_reads_what_we_put(
    objects: ObjectStore, library: LibraryStore, name: str, key: str, size: int
) -> None:
    """Content, size, digest, number of chunks: as if the library itself had put it."""
    content = os.urandom(size)
    put = await objects.put(f"{name}/{key}", in_pieces(content))
    theirs = await library.get(f"{name}/{key}")
    assert content == theirs.data
    info = theirs.info
    digest = "SHA-256=" + urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
    assert (f"{name}/{key}", size, digest) == (put.key, put.size, put.digest)
    assert (put.key, put.size, put.digest) == (info.name, info.size, info.digest)
    assert (info.chunks or 0) == -(-size // CHUNK_SIZE)
    await library.delete(put.key)
    with pytest.raises(NotFound):
        await content_of(objects, put.key)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", ["plain", "a folder/Größe 2.pdf", "日本/📦.tar gz", "dots.and*>"])
async def test_we_read_what_the_library_puts(
    objects: ObjectStore, library: LibraryStore, name: str, key: str, size: int
) -> None:
    """Also after both have replaced each other's object; and the library sees what we delete."""
    content = os.urandom(size)
    await objects.put(f"{name}/{key}", in_pieces(b"ours"))
    theirs = await library.put(f"{name}/{key}", content)
    assert content == await content_of(objects, f"{name}/{key}")
    (found,) = await objects.entries(name)
    assert (f"{name}/{key}", size, theirs.digest, False) == (
        found.key, found.size, found.digest, found.deleted,
    )  # fmt: skip
    await objects.delete(found.key)
    with pytest.raises(ObjectNotFoundError):
        await library.get(found.key)
    assert [] == await objects.entries(name)


async def test_what_is_not_there_is_not_found(objects: ObjectStore, name: str) -> None:
    """Never put, or deleted already: an error that names the key."""
    for _ in range(2):
        with pytest.raises(NotFound, match=name):
            await content_of(objects, name)
        with pytest.raises(NotFound, match=name):
            await objects.delete(name)
        await objects.put(name, in_pieces(b"x"))
        await objects.delete(name)


async def test_a_replaced_object_leaves_nothing_behind(
    objects: ObjectStore, jetstream: JetStreamContext, name: str
) -> None:
    """The old chunks are purged with the replacement, and the last ones with the deletion."""
    await objects.create_missing()
    before = await chunk_counts(jetstream)
    for size in (3 * CHUNK_SIZE, CHUNK_SIZE, 2 * CHUNK_SIZE):
        await objects.put(name, in_pieces(bytes(size)))
        added = (await chunk_counts(jetstream)).items() - before.items()
        assert [size // CHUNK_SIZE] == [count for _, count in added]
    await objects.delete(name)
    assert before == await chunk_counts(jetstream)


async def test_a_put_that_fails_changes_nothing(
    objects: ObjectStore, jetstream: JetStreamContext, name: str
) -> None:
    """The source's own error comes out, the old object stays, the new chunks go."""

    async def breaking() -> AsyncGenerator[bytes, None]:
        yield bytes(5 * CHUNK_SIZE)
        raise ZeroDivisionError

    await objects.put(name, in_pieces(b"old"))
    before = await chunk_counts(jetstream)
    with pytest.raises(ZeroDivisionError):
        await objects.put(name, breaking())
    assert b"old" == await content_of(objects, name)
    assert before == await chunk_counts(jetstream)


@pytest.mark.parametrize("sent", [0, 1, 5, 20])
async def test_a_cancelled_put_changes_nothing(
    objects: ObjectStore, jetstream: JetStreamContext, name: str, sent: int
) -> None:
    """Wherever it stands, and also when it is cancelled again while it cleans up."""
    stuck = asyncio.Event()

    async def stopping() -> AsyncGenerator[bytes, None]:
        for _ in range(sent):
            yield bytes(CHUNK_SIZE)
        stuck.set()
        await asyncio.Event().wait()

    await objects.put(name, in_pieces(b"old"))
    before = await chunk_counts(jetstream)
    putting = asyncio.create_task(objects.put(name, stopping()))
    await stuck.wait()
    putting.cancel()
    await asyncio.sleep(0)
    await cancel_and_wait(putting)
    await asyncio.gather(*objects._shielded)
    assert putting.cancelled()
    assert b"old" == await content_of(objects, name)
    assert before == await chunk_counts(jetstream)


async def test_a_put_cancelled_at_its_very_end_is_whole_or_not_there(
    objects: ObjectStore, jetstream: JetStreamContext, name: str
) -> None:
    """Cancelled at each of its steps: old or new, always readable, with no chunk too many."""
    await objects.put(name, in_pieces(b"old"))
    chunks = len(await chunk_counts(jetstream))
    old, outcomes = b"old", set()
    for step in range(40):
        new = b"new %d" % step
        putting = asyncio.create_task(objects.put(name, in_pieces(new)))
        for _ in range(step):
            await asyncio.sleep(0.0001)
        await cancel_and_wait(putting)
        await asyncio.gather(*objects._shielded)
        found = await content_of(objects, name)
        assert found in {old, new}
        outcomes.add(found == new)
        old = found
        assert chunks == len(await chunk_counts(jetstream))
    assert {True, False} == outcomes


async def test_of_many_puts_at_once_one_remains(
    objects: ObjectStore, jetstream: JetStreamContext, name: str
) -> None:
    """Twenty put one object: it is one of theirs, and the other nineteen leave nothing behind."""
    await objects.create_missing()
    before = await chunk_counts(jetstream)
    contents = [bytes([number]) * (CHUNK_SIZE + number) for number in range(1, 21)]
    await asyncio.gather(*[objects.put(name, in_pieces(content)) for content in contents])
    assert await content_of(objects, name) in contents
    assert [2] == [count for _, count in (await chunk_counts(jetstream)).items() - before.items()]


async def test_a_put_that_is_refused_at_its_end_changes_nothing(
    objects: ObjectStore, jetstream: JetStreamContext, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When others are faster again and again, the old object stays and the new chunks go."""
    await objects.put(name, in_pieces(b"old"))
    before = await chunk_counts(jetstream)

    async def outdated(_: str) -> tuple[None, int]:
        return None, 0

    with monkeypatch.context() as patch:
        patch.setattr("openagentmesh.transport.jetstream_errors.TIMEOUT_S", 0.1)
        patch.setattr(objects, "_last", outdated)
        with pytest.raises(KVConflict, match=name):
            await objects.put(name, in_pieces(b"new"))
    assert b"old" == await content_of(objects, name)
    assert before == await chunk_counts(jetstream)


@pytest.mark.parametrize("change", ["replaced", "deleted"])
async def test_a_reader_of_what_is_replaced_is_told(objects: ObjectStore, name: str, change: str) -> None:
    """It gets neither the rest of another object nor a wait without an end."""
    await objects.put(name, in_pieces(bytes(5 * CHUNK_SIZE)))
    async with asyncio.timeout(2), aclosing(objects.read(name)) as pieces:
        await anext(pieces)
        if change == "replaced":
            await objects.put(name, in_pieces(bytes(5 * CHUNK_SIZE)))
        else:
            await objects.delete(name)
        with pytest.raises(MeshError, match="replaced or deleted while it was read"):
            await anext(pieces)


async def test_damaged_objects_are_told_from_good_ones(
    objects: ObjectStore, jetstream: JetStreamContext, name: str
) -> None:
    """Wrong digest, wrong size, lost chunks: an error after the last piece at the latest."""
    await objects.put(name, in_pieces(bytes(3 * CHUNK_SIZE)))
    subject = metadata_subject(name)
    good = json.loads((await jetstream.get_last_msg(STREAM, subject)).data or b"")
    for damaged, message in (
        ({"digest": "SHA-256=" + "A" * 43 + "="}, "damaged"),
        ({"digest": ""}, "damaged"),
        ({"size": 3 * CHUNK_SIZE - 1}, "damaged"),
        ({"size": 3 * CHUNK_SIZE + 1}, "incomplete"),
        ({"nuid": "nothing"}, "incomplete"),
        ({"options": {"link": {"bucket": ARTIFACTS_BUCKET, "name": "other"}}}, "link"),
    ):
        await jetstream.publish(subject, json.dumps(good | damaged).encode(), headers={"Nats-Rollup": "sub"})
        with pytest.raises(MeshError, match=message):
            await content_of(objects, name)


@pytest.mark.parametrize("garbage", [b"", b"no json", b"[]", b'{"name": 1}', b'{"name": "x", "nuid": ">"}'])
async def test_what_is_no_description_is_in_nobodys_way(
    objects: ObjectStore, jetstream: JetStreamContext, name: str, garbage: bytes
) -> None:
    """It is as if the object were not there; others are listed, and it can be put."""
    await objects.put(f"{name}/good", in_pieces(b"1"))
    await jetstream.publish(metadata_subject(f"{name}/bad"), garbage)
    with pytest.raises(NotFound):
        await content_of(objects, f"{name}/bad")
    assert [f"{name}/good"] == [artifact.key for artifact in await objects.entries(name)]
    await objects.put(f"{name}/bad", in_pieces(b"2"))
    assert b"2" == await content_of(objects, f"{name}/bad")


async def test_a_bucket_of_any_making_is_read_and_its_limit_explained(name: str) -> None:
    """One that allows no direct reads, and has little room."""
    server = EmbeddedServer()
    await server.start()
    client = await nats.connect(server.url)
    jetstream = client.jetstream()
    await jetstream.create_object_store(ARTIFACTS_BUCKET, max_bytes=10 * CHUNK_SIZE)
    config = (await jetstream.stream_info(STREAM)).config
    await jetstream.update_stream(config.evolve(allow_direct=False))
    async with connected(server.url) as (_, objects):
        content = os.urandom(3 * CHUNK_SIZE)
        await objects.put(name, in_pieces(content))
        before = await chunk_counts(jetstream)
        with pytest.raises(PayloadTooLarge, match="no space"):
            await objects.put(name, in_pieces(bytes(20 * CHUNK_SIZE)))
        assert content == await content_of(objects, name)
        assert before == await chunk_counts(jetstream)
        await jetstream.delete_object_store(ARTIFACTS_BUCKET)
        with pytest.raises(ConnectionFailed, match="stream not found"):  # which is not: no such object
            await content_of(objects, name)
    await client.close()
    await server.stop()


async def test_a_server_without_jetstream_is_explained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every use fails with what to do about it."""
    monkeypatch.setattr("openagentmesh.transport.jetstream_errors.TIMEOUT_S", 0.2)
    server = EmbeddedServer()
    server.extra_arguments = ("-js=false",)
    await server.start()
    async with connected(server.url) as (_, objects):
        for use in (objects.create_missing(), objects.put(name, in_pieces(b"x")), objects.entries()):
            with pytest.raises(ConnectionFailed, match="JetStream"):
                await use
    await server.stop()


async def test_a_closed_connection_is_told_at_once(url: str, name: str) -> None:
    """Also to who watches."""
    async with connected(url) as (connection, objects):
        await objects.put(name, in_pieces(b"x"))
        async with aclosing(objects.watch(name)) as changes, asyncio.timeout(2):
            await anext(changes)
            waiting = asyncio.ensure_future(anext(changes))
            await asyncio.sleep(0.05)
            await connection.close()
            with pytest.raises(ConnectionFailed, match="closed"):
                await waiting
            for use in (
                objects.put(name, in_pieces(b"x")),
                content_of(objects, name),
                objects.delete(name),
                objects.entries(),
            ):
                with pytest.raises(ConnectionFailed, match="closed"):
                    await use


async def test_a_watch_tells_every_change_once(
    objects: ObjectStore, library: LibraryStore, name: str
) -> None:
    """First what is there, then what anybody puts and deletes; other prefixes are left out."""
    await objects.put(f"{name}/deleted", in_pieces(b""))
    await objects.delete(f"{name}/deleted")
    await objects.put(f"{name}/there", in_pieces(b"12"))
    async with aclosing(objects.watch(f"{name}/")) as changes, asyncio.timeout(5):
        told = [await anext(changes)]
        await objects.put(name, in_pieces(b"out of sight"))
        await library.put(f"{name}/theirs", b"123")
        await library.delete(f"{name}/theirs")
        await objects.put(f"{name}/there", in_pieces(b"12"))
        told += [await anext(changes) for _ in range(3)]
    assert [("there", 2, False), ("theirs", 3, False), ("theirs", 0, True), ("there", 2, False)] == [
        (artifact.key.removeprefix(f"{name}/"), artifact.size, artifact.deleted) for artifact in told
    ]
    assert sorted(told, key=lambda artifact: artifact.modified) == told


@pytest.mark.parametrize("kept", [True, False], ids=["store-kept", "store-thrown-away"])
async def test_a_watch_outlives_a_new_server(kept: bool, tmp_path: Path) -> None:
    """After a restart it repeats nothing, and hears of every later change at once."""
    store = str(tmp_path / "store") if kept else ""
    server = EmbeddedServer(store=store)
    await server.start()
    told: asyncio.Queue[Artifact] = asyncio.Queue()
    async with connected(server.url) as (connection, objects):
        await objects.put("before", in_pieces(b"1"))
        await objects.put("replaced", in_pieces(b"1"))

        async def watch() -> None:
            async for artifact in objects.watch():
                told.put_nowait(artifact)

        watching = asyncio.create_task(watch())
        async with asyncio.timeout(15):
            assert {"before", "replaced"} == {(await told.get()).key for _ in range(2)}
            await server.stop()
            again = EmbeddedServer(server.port, store)
            await again.start()
            await connection.wait_connected()
            await objects.put("replaced", in_pieces(b"12"))
            assert ("replaced", 2) == ((found := await told.get()).key, found.size)
            await objects.delete("replaced")
            assert ("replaced", True) == ((found := await told.get()).key, found.deleted)
            assert (["before"] if kept else []) == [artifact.key for artifact in await objects.entries()]
            assert told.empty()
        await cancel_and_wait(watching)
    await again.stop()


async def test_transfers_outlive_a_short_absence_of_the_server(tmp_path: Path) -> None:
    """A put and a read that go on while it restarts are whole; nothing is left behind."""
    server = EmbeddedServer(store=str(tmp_path / "store"))
    await server.start()
    content, pause = os.urandom(8 * CHUNK_SIZE), asyncio.Event()

    async def pausing() -> AsyncGenerator[bytes, None]:
        yield content[: 4 * CHUNK_SIZE]
        await pause.wait()
        yield content[4 * CHUNK_SIZE :]

    async with connected(server.url) as (connection, objects), asyncio.timeout(15):
        await objects.put("read", in_pieces(content))
        putting = asyncio.create_task(objects.put("put", pausing()))
        async with aclosing(objects.read("read")) as pieces:
            read = await anext(pieces)
            await server.stop()
            again = EmbeddedServer(server.port, str(tmp_path / "store"))
            await again.start()
            await connection.wait_connected()
            pause.set()
            await putting
            assert content == read + b"".join([piece async for piece in pieces])
        assert content == await content_of(objects, "put")
        assert [8, 8] == list((await chunk_counts(connection.jetstream())).values())
    await again.stop()


async def test_a_put_to_a_server_that_stays_away_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an error that says so."""
    monkeypatch.setattr("openagentmesh.transport.object_chunks._ACK_TIMEOUT_S", 0.2)
    server = EmbeddedServer()
    await server.start()

    async def leaving() -> AsyncGenerator[bytes, None]:
        yield bytes(CHUNK_SIZE)
        await server.stop()
        yield bytes(CHUNK_SIZE)

    async with connected(server.url) as (_, objects), asyncio.timeout(10):
        objects._jetstream._timeout = 0.2
        with pytest.raises(ConnectionFailed, match="the server is unreachable"):
            await objects.put(name, leaving())
