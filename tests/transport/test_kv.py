"""KV buckets: concurrent compare-and-set, reads, and watches across restarts of the server."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.js import JetStreamContext
from nats.js.api import ConsumerInfo, KeyValueConfig
from nats.js.errors import BucketNotFoundError
from nats.js.kv import KeyValue
from openagentmesh import AgentMesh, ConnectionFailed, PayloadTooLarge
from openagentmesh.protocol.subjects import CONTEXT_BUCKET, KV_BUCKETS
from openagentmesh.transport.connection import Connection, Target
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.kv import KVBuckets
from openagentmesh.transport.kv_watch import Entry, LatestEntries, Mark, Version
from openagentmesh.transport.server import EmbeddedServer
from openagentmesh.transport.tasks import cancel_and_wait

from tests.support.servers import running_server
from tests.support.waiting import until


@asynccontextmanager
async def opened(url: str, name: str) -> AsyncIterator[tuple[Connection, KVBuckets]]:
    """A connection and its buckets."""
    connection = Connection(Target(url), name)
    await connection.connect()
    inbox = Inbox(connection)
    await inbox.open()
    buckets = KVBuckets(connection, inbox)
    connection.restore = buckets.restore
    try:
        await buckets.create_missing()
        yield connection, buckets
    finally:
        await connection.close()


@pytest.fixture
async def buckets(url: str, name: str) -> AsyncIterator[KVBuckets]:
    """The buckets over a connection of their own."""
    async with opened(url, name) as (_, found):
        yield found


async def test_a_key_is_put_read_and_deleted(buckets: KVBuckets, name: str) -> None:
    """A missing key is None, an empty value is not; deleting a missing key is no error."""
    assert await buckets.get(CONTEXT_BUCKET, name) is None
    await buckets.put(CONTEXT_BUCKET, name, b"")
    assert b"" == await buckets.get(CONTEXT_BUCKET, name)
    await buckets.delete_all(CONTEXT_BUCKET, [name])
    await buckets.delete_all(CONTEXT_BUCKET, [name])
    assert await buckets.get(CONTEXT_BUCKET, name) is None
    assert name not in await buckets.read_all(CONTEXT_BUCKET)


async def test_concurrent_updates_are_all_applied(buckets: KVBuckets, name: str) -> None:
    """Fifty concurrent updates of one key by compare-and-set with jitter lose none of them."""

    async def add(number: int) -> None:
        def append(old: bytes | None) -> bytes:
            return json.dumps([*json.loads(old or b"[]"), number]).encode()

        await buckets.update(CONTEXT_BUCKET, name, append)

    await asyncio.gather(*[add(number) for number in range(50)])
    assert list(range(50)) == sorted(json.loads(await buckets.get(CONTEXT_BUCKET, name) or b""))


async def test_a_too_large_value_raises_payload_too_large(buckets: KVBuckets, name: str) -> None:
    """The library's error is translated, and the connection stays open."""
    with pytest.raises(PayloadTooLarge):
        await buckets.put(CONTEXT_BUCKET, name, b"x" * 2_000_000)
    assert await buckets.get(CONTEXT_BUCKET, name) is None


async def test_a_server_without_jetstream_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Creating the buckets raises ConnectionFailed, which names JetStream."""
    monkeypatch.setattr("openagentmesh.transport.jetstream_errors.TIMEOUT_S", 0.2)
    with running_server() as url, pytest.raises(ConnectionFailed, match="JetStream"):
        async with opened(url, name):
            pass


@pytest.mark.parametrize("kept", [True, False], ids=["store-kept", "store-lost"])
async def test_a_watch_starts_over_after_a_restart_of_the_server(
    tmp_path: Path, name: str, *, kept: bool
) -> None:
    """It yields `reset`, the existing keys and `caught_up` again, then every later change."""
    store = str(tmp_path / "store") if kept else ""
    server = EmbeddedServer(store=store)
    await server.start()
    entries: asyncio.Queue[str] = asyncio.Queue()
    async with opened(server.url, name) as (_, buckets):
        await buckets.put(CONTEXT_BUCKET, "before", b"1")

        async def watch() -> None:
            async for entry in buckets.watch(CONTEXT_BUCKET):
                entries.put_nowait(entry.key if isinstance(entry, Entry) else str(entry))

        watching = asyncio.create_task(watch())
        async with asyncio.timeout(10):
            assert ["reset", "before", "caught_up"] == [await entries.get() for _ in range(3)]
            await server.stop()
            server = EmbeddedServer(server.port, store)
            await server.start()
            assert "reset" == await entries.get()
            existing = ["before"] if kept else []
            assert [*existing, "caught_up"] == [await entries.get() for _ in range(1 + kept)]
            await buckets.put(CONTEXT_BUCKET, "after", b"2")
            assert "after" == await entries.get()
        await cancel_and_wait(watching)
    await server.stop()


async def test_all_buckets_of_the_protocol_are_created(buckets: KVBuckets) -> None:
    """Each bucket of the protocol can be read after `create_missing`."""
    assert [True] * len(KV_BUCKETS) == [
        isinstance(await buckets.read_all(bucket), dict) for bucket in KV_BUCKETS
    ]


async def test_consumers_of_reads_and_watches_are_deleted(url: str, name: str) -> None:
    """The server's consumer of a read or watch is deleted at its end, since a stream allows few of them."""
    async with opened(url, name) as (connection, buckets):
        await buckets.put(CONTEXT_BUCKET, name, b"1")

        async def consumers() -> set[str]:
            found = await connection.jetstream().consumers_info(f"KV_{CONTEXT_BUCKET}")
            return {consumer.name for consumer in found}

        before = await consumers()

        async def has_no_new_consumer() -> bool:
            return not await consumers() - before

        async with aclosing(buckets.watch(CONTEXT_BUCKET, name)) as watch:
            assert "reset" == await anext(watch)
            assert 1 == len(await consumers() - before)
        await until(has_no_new_consumer)
        for _ in range(20):
            assert name in await buckets.read_all(CONTEXT_BUCKET)
            assert [name] == [entry.key for entry in await buckets.entries(CONTEXT_BUCKET, name)]
        await until(has_no_new_consumer)


@pytest.mark.parametrize("early", [0, 3], ids=["none-arrived", "some-arrived"])
async def test_caught_up_follows_all_existing_keys(
    url: str, name: str, monkeypatch: pytest.MonkeyPatch, early: int
) -> None:
    """Also when the server has sent all entries, but none or only the first of them have arrived."""
    keys = {f"{name}.{number}" for number in range(10)}
    info_of = JetStreamContext.PushSubscription.consumer_info
    held_back, delivering = list[Any](), list[asyncio.Task[None]]()
    async with opened(url, name) as (connection, buckets):
        await buckets.put_all(CONTEXT_BUCKET, dict.fromkeys(keys, b"x"))
        client = connection._client
        process = client._process_msg

        async def hold_back(*message: Any) -> None:
            if message[1].startswith(f"$KV.{CONTEXT_BUCKET}.{name}".encode()):
                held_back.append(message)
            else:
                await process(*message)

        async def deliver(messages: list[Any]) -> None:
            for message in messages:
                await process(*message)

        async def deliver_some_first(subscription: JetStreamContext.PushSubscription) -> ConsumerInfo:
            if not delivering:
                await until(lambda: len(held_back) == len(keys))
            found = await info_of(subscription)
            messages = held_back[early:] if delivering else held_back[:early]
            delivering.append(asyncio.create_task(deliver(messages)))
            return found

        monkeypatch.setattr(client, "_process_msg", hold_back)
        monkeypatch.setattr(JetStreamContext.PushSubscription, "consumer_info", deliver_some_first)
        found: set[str] = set()
        async with aclosing(buckets.watch(CONTEXT_BUCKET, f"{name}.*")) as watch:
            async for entry in watch:
                if entry == "caught_up":
                    break
                if isinstance(entry, Entry):
                    found.add(entry.key)
        assert keys == found


async def test_existing_keys_are_found_while_they_are_replaced(buckets: KVBuckets, name: str) -> None:
    """Neither a read nor a watch finds the bucket empty while its keys are written concurrently."""
    keys = [f"{name}.{number}" for number in range(30)]
    written = asyncio.Event()

    async def write() -> None:
        while True:
            for key in keys:
                await buckets.put(CONTEXT_BUCKET, key, b"x")
            written.set()

    writing = asyncio.create_task(write())
    await written.wait()
    for _ in range(150):
        assert await buckets.entries(CONTEXT_BUCKET, f"{name}.*")
        async with aclosing(buckets.watch(CONTEXT_BUCKET, f"{name}.*")) as watch:
            assert ("reset", True) == (await anext(watch), isinstance(await anext(watch), Entry))
    await cancel_and_wait(writing)


async def test_a_slow_reader_gets_all_existing_keys_before_caught_up(
    buckets: KVBuckets, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a key that is replaced before it is read; after the mark the reader would take it for deleted."""
    keys, created = [f"{name}.a", f"{name}.b"], list[LatestEntries]()

    class RecordedEntries(LatestEntries):
        def __init__(self) -> None:
            super().__init__()
            created.append(self)

    def is_caught_up() -> bool:
        return None in created[0]._entries

    def is_replaced() -> bool:
        buffered = created[0]._entries.get(keys[1])
        return isinstance(buffered, Entry) and buffered.value == b"2"

    monkeypatch.setattr("openagentmesh.transport.kv.LatestEntries", RecordedEntries)
    for key in keys:
        await buckets.put(CONTEXT_BUCKET, key, b"1")
    async with aclosing(buckets.watch(CONTEXT_BUCKET, f"{name}.*")) as watch:
        assert "reset" == await anext(watch)
        await until(is_caught_up)
        await buckets.put(CONTEXT_BUCKET, keys[1], b"2")
        await until(is_replaced)
        entries = [await anext(watch) for _ in range(3)]
    assert [(keys[0], b"1"), (keys[1], b"2"), "caught_up"] == [
        (entry.key, entry.value) if isinstance(entry, Entry) else entry for entry in entries
    ]


async def test_a_key_that_is_replaced_while_a_watch_starts_is_not_deleted(
    buckets: KVBuckets, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is delivered after the mark; a deletion is yielded only for a key that does not exist."""
    replaced, deleted = f"{name}.replaced", f"{name}.deleted"
    revision = await buckets.put(CONTEXT_BUCKET, replaced, b"new")

    async def watch(*_: str) -> AsyncGenerator[Entry | Mark, None]:
        yield "reset"
        yield "caught_up"
        yield Entry(CONTEXT_BUCKET, replaced, b"new", revision, None, None, None)

    monkeypatch.setattr(buckets, "watch", watch)
    old: Version = (revision - 1, None)
    seen = {replaced: old, deleted: old}
    changes = buckets.changes(CONTEXT_BUCKET, f"{name}.*", seen=seen)
    found = [(entry.key, entry.value, entry.operation) async for entry in changes]
    assert [(deleted, None, "DEL"), (replaced, b"new", None)] == found


async def test_a_bucket_that_a_peer_creates_at_the_same_time_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A peer that creates the bucket with another configuration, after it was looked up, fails no start."""
    key_value, created = JetStreamContext.key_value, list[str]()

    async def raced(self: JetStreamContext, bucket: str) -> KeyValue:
        try:
            return await key_value(self, bucket)
        except BucketNotFoundError:
            if bucket not in created:
                created.append(bucket)
                await self.create_key_value(KeyValueConfig(bucket=bucket, history=5))
            raise

    monkeypatch.setattr(JetStreamContext, "key_value", raced)
    with running_server("-js", "-sd", str(tmp_path)) as url:
        async with AgentMesh(url) as mesh:
            await mesh.kv.put("key", "value")
            assert "value" == await mesh.kv.get("key")
    assert CONTEXT_BUCKET in created
