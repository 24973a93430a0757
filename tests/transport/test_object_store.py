"""Puts, reads and deletions of objects: failures, cancellation and concurrency leave no unused chunks."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import count

import pytest
from nats.js import JetStreamContext
from openagentmesh import MeshError, NotFound
from openagentmesh.protocol.errors import KVConflict
from openagentmesh.protocol.objects import CHUNK_SIZE
from openagentmesh.transport.object_store import ObjectStore
from openagentmesh.transport.tasks import cancel_and_wait

from tests.support.objects import chunk_counts, content_of, in_pieces


async def wait_for_cleanup(objects: ObjectStore) -> None:
    """Wait until cancelled puts have removed their chunks."""
    await asyncio.gather(*objects._shielded)


async def test_a_missing_object_is_not_found(objects: ObjectStore, name: str) -> None:
    """Reading or deleting an object that was never put, or was deleted, raises NotFound with the key."""
    for _ in range(2):
        with pytest.raises(NotFound, match=name):
            await content_of(objects, name)
        with pytest.raises(NotFound, match=name):
            await objects.delete(name)
        await objects.put(name, in_pieces(b"x"))
        await objects.delete(name)


async def test_the_chunks_of_a_replaced_object_are_purged(
    objects: ObjectStore, jetstream: JetStreamContext, name: str
) -> None:
    """A replacement purges the old chunks, a deletion the last ones."""
    await objects.create_missing()
    before = await chunk_counts(jetstream)
    for size in (3 * CHUNK_SIZE, CHUNK_SIZE, 2 * CHUNK_SIZE):
        await objects.put(name, in_pieces(bytes(size)))
        added = (await chunk_counts(jetstream)).items() - before.items()
        assert [size // CHUNK_SIZE] == [chunks for _, chunks in added]
    await objects.delete(name)
    assert before == await chunk_counts(jetstream)


async def test_a_failed_put_changes_nothing(
    objects: ObjectStore, jetstream: JetStreamContext, name: str
) -> None:
    """The exception of the source is raised, the old object stays, and the new chunks are purged."""

    async def failing() -> AsyncGenerator[bytes, None]:
        yield bytes(5 * CHUNK_SIZE)
        raise ZeroDivisionError

    await objects.put(name, in_pieces(b"old"))
    before = await chunk_counts(jetstream)
    with pytest.raises(ZeroDivisionError):
        await objects.put(name, failing())
    assert b"old" == await content_of(objects, name)
    assert before == await chunk_counts(jetstream)


@pytest.mark.parametrize("chunks", [0, 1, 5, 20])
async def test_a_cancelled_put_changes_nothing(
    objects: ObjectStore, jetstream: JetStreamContext, name: str, chunks: int
) -> None:
    """After any number of chunks, and also when it is cancelled again during its cleanup."""
    sent = asyncio.Event()

    async def blocking() -> AsyncGenerator[bytes, None]:
        for _ in range(chunks):
            yield bytes(CHUNK_SIZE)
        sent.set()
        await asyncio.Event().wait()

    await objects.put(name, in_pieces(b"old"))
    before = await chunk_counts(jetstream)
    putting = asyncio.create_task(objects.put(name, blocking()))
    await sent.wait()
    putting.cancel()
    await asyncio.sleep(0)
    await cancel_and_wait(putting)
    await wait_for_cleanup(objects)
    assert putting.cancelled()
    assert b"old" == await content_of(objects, name)
    assert before == await chunk_counts(jetstream)


async def test_a_put_that_is_cancelled_at_its_end_is_complete_or_has_no_effect(
    objects: ObjectStore, jetstream: JetStreamContext, name: str
) -> None:
    """Cancelled at each step, it leaves the old or the new object, readable and without unused chunks."""
    await objects.put(name, in_pieces(b"old"))
    chunks = len(await chunk_counts(jetstream))
    current, replaced = b"old", set[bool]()
    for step in count():
        new = b"new %d" % step
        putting = asyncio.create_task(objects.put(name, in_pieces(new)))
        for _ in range(step):
            await asyncio.sleep(0.0001)
        is_finished = putting.done()
        await cancel_and_wait(putting)
        await wait_for_cleanup(objects)
        found = await content_of(objects, name)
        assert found in {current, new}
        replaced.add(found == new)
        current = found
        assert chunks == len(await chunk_counts(jetstream))
        if step >= 39 and is_finished:
            break
    assert {True, False} == replaced


async def test_one_of_many_concurrent_puts_is_stored(
    objects: ObjectStore, jetstream: JetStreamContext, name: str
) -> None:
    """Of twenty concurrent puts of one object one is stored; the chunks of the others are purged."""
    await objects.create_missing()
    before = await chunk_counts(jetstream)
    contents = [bytes([number]) * (CHUNK_SIZE + number) for number in range(1, 21)]
    await asyncio.gather(*[objects.put(name, in_pieces(content)) for content in contents])
    assert await content_of(objects, name) in contents
    assert [2] == [chunks for _, chunks in (await chunk_counts(jetstream)).items() - before.items()]


async def test_a_put_whose_every_attempt_conflicts_changes_nothing(
    objects: ObjectStore, jetstream: JetStreamContext, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When other clients are always faster, KVConflict is raised, and the new chunks are purged."""
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
async def test_an_object_that_changes_while_it_is_read_raises_an_error(
    objects: ObjectStore, name: str, change: str
) -> None:
    """The reader neither gets chunks of another object nor waits for ever."""
    await objects.put(name, in_pieces(bytes(5 * CHUNK_SIZE)))
    async with asyncio.timeout(2), aclosing(objects.read(name)) as pieces:
        await anext(pieces)
        if change == "replaced":
            await objects.put(name, in_pieces(bytes(5 * CHUNK_SIZE)))
        else:
            await objects.delete(name)
        with pytest.raises(MeshError, match="replaced or deleted while it was read"):
            await anext(pieces)
