"""KVBuckets: compare-and-set under contention, and watches that outlive the server."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from nats.js import JetStreamContext
from nats.js.api import ConsumerInfo
from openagentmesh import ConnectionFailed, PayloadTooLarge
from openagentmesh.protocol.subjects import CONTEXT_BUCKET, KV_BUCKETS
from openagentmesh.transport.connection import Connection, Target
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.kv import KVBuckets
from openagentmesh.transport.kv_watch import Entry, LatestEntries, Mark, Version
from openagentmesh.transport.server import EmbeddedServer
from openagentmesh.transport.tasks import cancel_and_wait

from tests.support.waiting import until


@pytest.fixture
async def buckets(url: str, name: str) -> AsyncIterator[KVBuckets]:
    connection = Connection(Target(url), name)
    await connection.connect()
    inbox = Inbox(connection)
    await inbox.open()
    buckets = KVBuckets(connection, inbox)
    await buckets.create_missing()
    yield buckets
    await connection.close()


async def test_a_key_comes_and_goes(buckets: KVBuckets, name: str) -> None:
    """A missing key is None, an empty value is not; deleting twice is no error."""
    assert await buckets.get(CONTEXT_BUCKET, name) is None
    await buckets.put(CONTEXT_BUCKET, name, b"")
    assert b"" == await buckets.get(CONTEXT_BUCKET, name)
    await buckets.delete_all(CONTEXT_BUCKET, [name])
    await buckets.delete_all(CONTEXT_BUCKET, [name])
    assert await buckets.get(CONTEXT_BUCKET, name) is None
    assert name not in await buckets.read_all(CONTEXT_BUCKET)


async def test_many_changes_of_one_key_all_count(buckets: KVBuckets, name: str) -> None:
    """Fifty writers at once: compare-and-set with jitter loses none of them."""

    async def add(number: int) -> None:
        def changed(old: bytes | None) -> bytes:
            return json.dumps([*json.loads(old or b"[]"), number]).encode()

        await buckets.update(CONTEXT_BUCKET, name, changed)

    await asyncio.gather(*[add(number) for number in range(50)])
    assert list(range(50)) == sorted(json.loads(await buckets.get(CONTEXT_BUCKET, name) or b""))


async def test_a_value_that_is_too_large_is_a_mesh_error(buckets: KVBuckets, name: str) -> None:
    """The library's own error does not reach anyone, and the connection lives on."""
    with pytest.raises(PayloadTooLarge):
        await buckets.put(CONTEXT_BUCKET, name, b"x" * 2_000_000)
    assert await buckets.get(CONTEXT_BUCKET, name) is None


async def test_a_server_without_jetstream_is_explained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the buckets fails with what to do about it."""
    monkeypatch.setattr("openagentmesh.transport.jetstream_errors.TIMEOUT_S", 0.2)
    server = EmbeddedServer()
    server.extra_arguments = ("-js=false",)
    await server.start()
    connection = Connection(Target(server.url), name)
    await connection.connect()
    with pytest.raises(ConnectionFailed, match="JetStream"):
        await KVBuckets(connection, Inbox(connection)).create_missing()
    await connection.close()
    await server.stop()


@pytest.mark.parametrize("kept", [True, False], ids=["store-kept", "store-thrown-away"])
async def test_a_watch_outlives_a_new_server(kept: bool, tmp_path: Path, name: str) -> None:
    """After a restart a watch begins anew with what is there, and hears of every later change."""
    store = str(tmp_path / "store") if kept else ""
    server = EmbeddedServer(store=store)
    await server.start()
    connection = Connection(Target(server.url), name)
    await connection.connect()
    inbox = Inbox(connection)
    await inbox.open()
    buckets = KVBuckets(connection, inbox)
    connection.restore = buckets.restore
    await buckets.create_missing()
    await buckets.put(CONTEXT_BUCKET, "before", b"1")
    seen: asyncio.Queue[str] = asyncio.Queue()

    async def watch() -> None:
        async for entry in buckets.watch(CONTEXT_BUCKET):
            seen.put_nowait(entry.key if isinstance(entry, Entry) else str(entry))

    watching = asyncio.create_task(watch())
    async with asyncio.timeout(10):
        assert ["reset", "before", "caught_up"] == [await seen.get() for _ in range(3)]
        await server.stop()
        again = EmbeddedServer(server.port, store)
        await again.start()
        assert "reset" == await seen.get()
        assert (["before"] if kept else []) + ["caught_up"] == [await seen.get() for _ in range(1 + kept)]
        await buckets.put(CONTEXT_BUCKET, "after", b"2")
        assert "after" == await seen.get()
    watching.cancel()
    await asyncio.wait([watching])
    await connection.close()
    await again.stop()


async def test_all_buckets_of_the_protocol_are_made(buckets: KVBuckets) -> None:
    """Each bucket of the protocol can be read once the mesh is up."""
    assert [True] * len(KV_BUCKETS) == [
        isinstance(await buckets.read_all(bucket), dict) for bucket in KV_BUCKETS
    ]


async def consumers(buckets: KVBuckets) -> set[str]:
    """What the server keeps for readers of the context bucket."""
    found = await buckets._connection.jetstream().consumers_info(f"KV_{CONTEXT_BUCKET}")
    return {consumer.name for consumer in found}


async def test_reading_leaves_nothing_on_the_server(buckets: KVBuckets, name: str) -> None:
    """The consumer of a read, and that of a watch that is over, are gone at once; the server allows few."""
    await buckets.put(CONTEXT_BUCKET, name, b"1")
    before = await consumers(buckets)

    async def as_before() -> bool:
        return not await consumers(buckets) - before

    async with aclosing(buckets.watch(CONTEXT_BUCKET, name)) as watch:
        assert "reset" == await anext(watch)
        assert 1 == len(await consumers(buckets) - before)
    await until(as_before)
    for _ in range(20):
        assert name in await buckets.read_all(CONTEXT_BUCKET)
        assert [name] == [entry.key for entry in await buckets.entries(CONTEXT_BUCKET, name)]
    await until(as_before)


@pytest.mark.parametrize("early", [0, 3])
async def test_a_watch_waits_for_all_that_the_server_has_sent(
    buckets: KVBuckets, name: str, monkeypatch: pytest.MonkeyPatch, early: int
) -> None:
    """When the server says that it has sent all, nothing or only the first of it may have arrived."""
    keys = {f"{name}.{number}" for number in range(10)}
    await buckets.put_all(CONTEXT_BUCKET, dict.fromkeys(keys, b"x"))
    client, info_of = buckets._connection._client, JetStreamContext.PushSubscription.consumer_info
    process, under_way, arriving = client._process_msg, list[Any](), list[asyncio.Task[None]]()

    async def keep(*message: Any) -> None:
        if message[1].startswith(f"$KV.{CONTEXT_BUCKET}.{name}".encode()):
            under_way.append(message)
        else:
            await process(*message)

    async def arrive(messages: list[Any]) -> None:
        for message in messages:
            await process(*message)

    async def sent() -> bool:
        return len(under_way) == len(keys)

    async def info(subscription: JetStreamContext.PushSubscription) -> ConsumerInfo:
        if not arriving:
            await until(sent)
        found = await info_of(subscription)
        arriving.append(asyncio.create_task(arrive(under_way[early:] if arriving else under_way[:early])))
        return found

    monkeypatch.setattr(client, "_process_msg", keep)
    monkeypatch.setattr(JetStreamContext.PushSubscription, "consumer_info", info)
    told: list[Entry | Mark] = []
    async with aclosing(buckets.watch(CONTEXT_BUCKET, f"{name}.*")) as watch:
        async for entry in watch:
            told.append(entry)
            if entry == "caught_up":
                break
    assert keys == {entry.key for entry in told if isinstance(entry, Entry)}


async def test_a_full_bucket_is_never_empty_while_others_write(buckets: KVBuckets, name: str) -> None:
    """Neither to a read nor to a watch, which says `current` only when it has told what there is."""
    keys = [f"{name}.{number}" for number in range(30)]
    writing = asyncio.Event()

    async def write() -> None:
        while True:
            for key in keys:
                await buckets.put(CONTEXT_BUCKET, key, b"x")
            writing.set()

    writer = asyncio.create_task(write())
    await writing.wait()
    for _ in range(150):
        assert await buckets.entries(CONTEXT_BUCKET, f"{name}.*")
        async with aclosing(buckets.watch(CONTEXT_BUCKET, f"{name}.*")) as watch:
            assert ("reset", True) == (await anext(watch), isinstance(await anext(watch), Entry))
    await cancel_and_wait(writer)


async def test_a_slow_reader_is_told_all_that_there_is_before_current(
    buckets: KVBuckets, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what changes before it comes to it: who misses it there takes it for deleted."""
    keys, made = [f"{name}.a", f"{name}.b"], list[LatestEntries]()

    class Known(LatestEntries):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    async def has_all() -> bool:
        return None in made[0]._entries

    async def has_last() -> bool:
        kept = made[0]._entries.get(keys[1])
        return isinstance(kept, Entry) and kept.value == b"2"

    monkeypatch.setattr("openagentmesh.transport.kv.LatestEntries", Known)
    for key in keys:
        await buckets.put(CONTEXT_BUCKET, key, b"1")
    async with aclosing(buckets.watch(CONTEXT_BUCKET, f"{name}.*")) as watch:
        assert "reset" == await anext(watch)  # and now it is busy
        await until(has_all)
        await buckets.put(CONTEXT_BUCKET, keys[1], b"2")
        await until(has_last)
        told = [await anext(watch) for _ in range(3)]
    assert [(keys[0], b"1"), (keys[1], b"2"), "caught_up"] == [
        (entry.key, entry.value) if isinstance(entry, Entry) else entry for entry in told
    ]


async def test_what_is_replaced_while_a_watch_begins_is_not_deleted(
    buckets: KVBuckets, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server leaves it out of what there is at first; only what is really gone is told."""
    there, gone = f"{name}.there", f"{name}.gone"
    revision = await buckets.put(CONTEXT_BUCKET, there, b"new")

    async def watch(*_: str) -> AsyncGenerator[Entry | Mark, None]:
        yield "reset"
        yield "caught_up"
        yield Entry(CONTEXT_BUCKET, there, b"new", revision, None, None, None)

    monkeypatch.setattr(buckets, "watch", watch)
    seen: dict[str, Version] = {there: (1, None), gone: (1, None)}
    changes = buckets.changes(CONTEXT_BUCKET, f"{name}.*", seen=seen)
    told = [(entry.key, entry.value, entry.operation) async for entry in changes]
    assert [(gone, None, "DEL"), (there, b"new", None)] == told
