"""Buckets: compare-and-set under contention, and watches that outlive the server."""

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
from openagentmesh.transport.connection import Bus, Target
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.kv import Buckets, Version
from openagentmesh.transport.kv_watch import Entry, Mark, Newest
from openagentmesh.transport.server import EmbeddedServer
from openagentmesh.transport.tasks import end

from tests.registry.test_registry import until


@pytest.fixture
async def buckets(url: str, name: str) -> AsyncIterator[Buckets]:
    bus = Bus(Target(url), name)
    await bus.connect()
    inbox = Inbox(bus)
    await inbox.open()
    buckets = Buckets(bus, inbox)
    await buckets.make()
    yield buckets
    await bus.close()


async def test_a_key_comes_and_goes(buckets: Buckets, name: str) -> None:
    """A missing key is None, an empty value is not; deleting twice is no error."""
    assert await buckets.get(CONTEXT_BUCKET, name) is None
    await buckets.put(CONTEXT_BUCKET, name, b"")
    assert b"" == await buckets.get(CONTEXT_BUCKET, name)
    await buckets.delete_all(CONTEXT_BUCKET, [name])
    await buckets.delete_all(CONTEXT_BUCKET, [name])
    assert await buckets.get(CONTEXT_BUCKET, name) is None
    assert name not in await buckets.read(CONTEXT_BUCKET)


async def test_many_changes_of_one_key_all_count(buckets: Buckets, name: str) -> None:
    """Fifty writers at once: compare-and-set with jitter loses none of them."""

    async def add(number: int) -> None:
        def changed(old: bytes | None) -> bytes:
            return json.dumps([*json.loads(old or b"[]"), number]).encode()

        await buckets.change(CONTEXT_BUCKET, name, changed)

    await asyncio.gather(*[add(number) for number in range(50)])
    assert list(range(50)) == sorted(json.loads(await buckets.get(CONTEXT_BUCKET, name) or b""))


async def test_a_value_that_is_too_large_is_a_mesh_error(buckets: Buckets, name: str) -> None:
    """The library's own error does not reach anyone, and the connection lives on."""
    with pytest.raises(PayloadTooLarge):
        await buckets.put(CONTEXT_BUCKET, name, b"x" * 2_000_000)
    assert await buckets.get(CONTEXT_BUCKET, name) is None


async def test_a_server_without_jetstream_is_explained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the buckets fails with what to do about it."""
    monkeypatch.setattr("openagentmesh.transport.kv._PATIENCE", 0.2)
    server = EmbeddedServer()
    server.jetstream = False
    await server.start()
    bus = Bus(Target(server.url), name)
    await bus.connect()
    with pytest.raises(ConnectionFailed, match="JetStream"):
        await Buckets(bus, Inbox(bus)).make()
    await bus.close()
    await server.stop()


@pytest.mark.parametrize("kept", [True, False], ids=["store-kept", "store-thrown-away"])
async def test_a_watch_outlives_a_new_server(kept: bool, tmp_path: Path, name: str) -> None:
    """After a restart a watch begins anew with what is there, and hears of every later change."""
    store = str(tmp_path / "store") if kept else ""
    server = EmbeddedServer(store=store)
    await server.start()
    bus = Bus(Target(server.url), name)
    await bus.connect()
    inbox = Inbox(bus)
    await inbox.open()
    buckets = Buckets(bus, inbox)
    bus.restore = buckets.restore
    await buckets.make()
    await buckets.put(CONTEXT_BUCKET, "before", b"1")
    seen: asyncio.Queue[str] = asyncio.Queue()

    async def watch() -> None:
        async for entry in buckets.watch(CONTEXT_BUCKET):
            seen.put_nowait(entry.key if isinstance(entry, Entry) else str(entry))

    watching = asyncio.create_task(watch())
    async with asyncio.timeout(10):
        assert ["begin", "before", "current"] == [await seen.get() for _ in range(3)]
        await server.stop()
        again = EmbeddedServer(server.port, store)
        await again.start()
        assert "begin" == await seen.get()
        assert (["before"] if kept else []) + ["current"] == [await seen.get() for _ in range(1 + kept)]
        await buckets.put(CONTEXT_BUCKET, "after", b"2")
        assert "after" == await seen.get()
    watching.cancel()
    await asyncio.wait([watching])
    await bus.close()
    await again.stop()


async def test_all_buckets_of_the_protocol_are_made(buckets: Buckets) -> None:
    """Each bucket of the protocol can be read once the mesh is up."""
    assert [True] * len(KV_BUCKETS) == [isinstance(await buckets.read(bucket), dict) for bucket in KV_BUCKETS]


async def consumers(buckets: Buckets) -> set[str]:
    """What the server keeps for readers of the context bucket."""
    found = await buckets._bus.jetstream().consumers_info(f"KV_{CONTEXT_BUCKET}")
    return {consumer.name for consumer in found}


async def test_reading_leaves_nothing_on_the_server(buckets: Buckets, name: str) -> None:
    """The consumer of a read, and that of a watch that is over, are gone at once; the server allows few."""
    await buckets.put(CONTEXT_BUCKET, name, b"1")
    before = await consumers(buckets)

    async def as_before() -> bool:
        return not await consumers(buckets) - before

    async with aclosing(buckets.watch(CONTEXT_BUCKET, name)) as watch:
        assert "begin" == await anext(watch)
        assert 1 == len(await consumers(buckets) - before)
    await until(as_before)
    for _ in range(20):
        assert name in await buckets.read(CONTEXT_BUCKET)
        assert [name] == [entry.key for entry in await buckets.entries(CONTEXT_BUCKET, name)]
    await until(as_before)


@pytest.mark.parametrize("early", [0, 3])
async def test_a_watch_waits_for_all_that_the_server_has_sent(
    buckets: Buckets, name: str, monkeypatch: pytest.MonkeyPatch, early: int
) -> None:
    """When the server says that it has sent all, nothing or only the first of it may have arrived."""
    keys = {f"{name}.{number}" for number in range(10)}
    await buckets.put_all(CONTEXT_BUCKET, dict.fromkeys(keys, b"x"))
    client, info_of = buckets._bus._client, JetStreamContext.PushSubscription.consumer_info
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
            if entry == "current":
                break
    assert keys == {entry.key for entry in told if isinstance(entry, Entry)}


async def test_a_full_bucket_is_never_empty_while_others_write(buckets: Buckets, name: str) -> None:
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
            assert ("begin", True) == (await anext(watch), isinstance(await anext(watch), Entry))
    await end(writer)


async def test_a_slow_reader_is_told_all_that_there_is_before_current(
    buckets: Buckets, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what changes before it comes to it: who misses it there takes it for deleted."""
    keys, made = [f"{name}.a", f"{name}.b"], list[Newest]()

    class Known(Newest):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    async def has_all() -> bool:
        return None in made[0]._kept

    async def has_last() -> bool:
        kept = made[0]._kept.get(keys[1])
        return isinstance(kept, Entry) and kept.value == b"2"

    monkeypatch.setattr("openagentmesh.transport.kv.Newest", Known)
    for key in keys:
        await buckets.put(CONTEXT_BUCKET, key, b"1")
    async with aclosing(buckets.watch(CONTEXT_BUCKET, f"{name}.*")) as watch:
        assert "begin" == await anext(watch)  # and now it is busy
        await until(has_all)
        await buckets.put(CONTEXT_BUCKET, keys[1], b"2")
        await until(has_last)
        told = [await anext(watch) for _ in range(3)]
    assert [(keys[0], b"1"), (keys[1], b"2"), "current"] == [
        (entry.key, entry.value) if isinstance(entry, Entry) else entry for entry in told
    ]


async def test_what_is_replaced_while_a_watch_begins_is_not_deleted(
    buckets: Buckets, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server leaves it out of what there is at first; only what is really gone is told."""
    there, gone = f"{name}.there", f"{name}.gone"
    revision = await buckets.put(CONTEXT_BUCKET, there, b"new")

    async def watch(*_: str) -> AsyncGenerator[Entry | Mark, None]:
        yield "begin"
        yield "current"
        yield Entry(CONTEXT_BUCKET, there, b"new", revision, None, None, None)

    monkeypatch.setattr(buckets, "watch", watch)
    seen: dict[str, Version] = {there: (1, None), gone: (1, None)}
    changes = buckets.changes(CONTEXT_BUCKET, f"{name}.*", seen=seen)
    told = [(entry.key, entry.value, entry.operation) async for entry in changes]
    assert [(gone, None, "DEL"), (there, b"new", None)] == told
