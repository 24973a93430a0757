"""Buckets: compare-and-set under contention, and watches that outlive the server."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from openagentmesh import ConnectionFailed, PayloadTooLarge
from openagentmesh.bus.buckets import Buckets
from openagentmesh.bus.connection import Bus, Target
from openagentmesh.bus.requests import Inbox
from openagentmesh.bus.server import EmbeddedServer
from openagentmesh.bus.watches import Entry
from openagentmesh.protocol.subjects import CONTEXT_BUCKET, KV_BUCKETS


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
    monkeypatch.setattr("openagentmesh.bus.buckets._PATIENCE", 0.2)
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
