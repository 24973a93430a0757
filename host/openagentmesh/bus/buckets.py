"""KV buckets: made when missing, changed by compare-and-set, watched across reconnects."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, Literal

from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js.api import KeyValueConfig
from nats.js.errors import BucketNotFoundError, KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from openagentmesh.bus.connection import Bus
from openagentmesh.protocol.errors import ConnectionFailed, PayloadTooLarge
from openagentmesh.protocol.subjects import KV_BUCKETS

Entry = KeyValue.Entry
# What a watch yields beside entries: it begins anew, and it has shown all there was.
Mark = Literal["begin", "current"]

# A put's own protocol headers count towards the server's limit as well.
ROOM_FOR_HEADERS: Final = 1024
_AT_ONCE: Final = 64
_PATIENCE: Final = 30.0


def _retrying(what: type[Exception] | tuple[type[Exception], ...]) -> AsyncRetrying:
    """Full jitter: many hosts that collide once do not collide again."""
    return AsyncRetrying(
        retry=retry_if_exception_type(what),
        wait=wait_random_exponential(multiplier=0.02, max=1.0),
        stop=stop_after_delay(_PATIENCE),
        reraise=True,
    )


@asynccontextmanager
async def _explained(what: str) -> AsyncIterator[None]:
    """Turn the library's errors into ours."""
    try:
        yield
    except MaxPayloadError as exc:
        raise PayloadTooLarge(f"{what} is larger than the server takes.") from exc
    except (NatsError, TimeoutError, asyncio.InvalidStateError) as exc:
        raise ConnectionFailed(
            f"{what} failed: {exc or type(exc).__name__}. "
            "Is JetStream enabled on the server (`nats-server -js`)?"
        ) from exc


class Buckets:
    """The KV buckets of the mesh over one bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._open: dict[str, KeyValue] = {}
        self._watchers: set[KeyValue.KeyWatcher] = set()
        self._gate = asyncio.Semaphore(_AT_ONCE)
        # Clear from when the server is lost until its buckets are known to be there.
        self._ready = asyncio.Event()
        bus.on_lost = self._ready.clear

    async def make(self) -> None:
        """Make the mesh's buckets where they are missing.

        Raises:
            ConnectionFailed: JetStream is not there, or may not be used.

        """
        made = await asyncio.gather(*[self._make(name) for name in KV_BUCKETS])
        self._open = dict(zip(KV_BUCKETS, made, strict=True))
        self._ready.set()

    async def _make(self, bucket: str) -> KeyValue:
        async with _explained(f"Opening the bucket '{bucket}'"):
            # Right after a server's start JetStream may not answer yet.
            async for attempt in _retrying((NatsError, TimeoutError)):
                with attempt:
                    jetstream = self._bus.jetstream()
                    with suppress(BucketNotFoundError):
                        return await jetstream.key_value(bucket)
                    return await jetstream.create_key_value(KeyValueConfig(bucket=bucket))
        raise AssertionError("unreachable: the last attempt raises")

    @asynccontextmanager
    async def _using(self, what: str) -> AsyncIterator[None]:
        async with _explained(what):
            async with asyncio.timeout(_PATIENCE):
                await self._ready.wait()
            yield

    async def get(self, bucket: str, key: str) -> bytes | None:
        """The value of a key, or None."""
        async with self._using(f"Reading '{key}' of '{bucket}'"):
            with suppress(KeyNotFoundError):
                return (await self._open[bucket].get(key)).value or b""
        return None

    async def put(self, bucket: str, key: str, value: bytes) -> None:
        """Set a key; many of these may run at once, a bounded number is under way."""
        async with self._gate, self._using(f"Writing '{key}' of '{bucket}'"):
            await self._open[bucket].put(key, value)

    async def delete(self, bucket: str, key: str) -> None:
        """Remove a key; one that is not there is no error."""
        async with self._gate, self._using(f"Deleting '{key}' of '{bucket}'"):
            await self._open[bucket].delete(key)

    async def change(self, bucket: str, key: str, changed: Callable[[bytes | None], bytes | None]) -> None:
        """Compare-and-set: `changed` maps the old value to the new one, None leaves it."""
        async with self._using(f"Changing '{key}' of '{bucket}'"):
            store = self._open[bucket]
            async for attempt in _retrying(KeyWrongLastSequenceError):
                with attempt:
                    try:
                        entry: Entry | None = await store.get(key)
                    except KeyNotFoundError:
                        entry = None
                    value = changed(entry.value or b"" if entry else None)
                    if value is None:
                        return
                    if entry is None:
                        await store.create(key, value)
                    else:
                        await store.update(key, value, last=entry.revision)

    async def read(self, bucket: str) -> dict[str, bytes]:
        """All keys and values as they are now."""
        found: dict[str, bytes] = {}
        async with self._using(f"Reading all of '{bucket}'"):
            watcher = await self._open[bucket].watch(">", ignore_deletes=True)
            try:
                async with asyncio.timeout(_PATIENCE):
                    async for entry in watcher:
                        if entry is None:
                            break
                        found[entry.key] = entry.value or b""
            finally:
                await watcher.stop()
        return found

    async def watch(self, bucket: str) -> AsyncIterator[Entry | Mark]:
        """Follow a bucket for ever, also across reconnects and new servers.

        Yields `begin`, all keys as they are, `current`, then changes; from `begin` again
        after each reconnect, since changes made meanwhile are not told.
        """
        while True:
            async with self._using(f"Watching '{bucket}'"):
                async for attempt in _retrying((NatsError, TimeoutError)):
                    with attempt:
                        watcher = await self._open[bucket].watch(">")
            self._watchers.add(watcher)
            try:
                yield "begin"
                async for entry in watcher:
                    yield "current" if entry is None else entry
            finally:
                self._watchers.discard(watcher)

    async def restore(self) -> None:
        """After a reconnect, maybe to a new and empty server: make what is missing, watch anew."""
        await self.make()
        for watcher in list(self._watchers):
            await watcher.stop()

    async def last_revision(self, bucket: str) -> int:
        """The revision of the newest change, deletions among them."""
        async with self._using(f"Asking for the state of '{bucket}'"):
            return (await self._open[bucket].status()).stream_info.state.last_seq
