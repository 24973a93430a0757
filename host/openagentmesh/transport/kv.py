"""KV buckets: made when missing, changed by compare-and-set, watched across reconnects."""

import asyncio
import re
from base64 import b64decode
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from hashlib import sha256
from typing import Final

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, DeliverPolicy, KeyValueConfig
from nats.js.errors import (
    BucketNotFoundError,
    KeyWrongLastSequenceError,
)
from nats.js.kv import KeyValue
from pydantic_core import from_json

from openagentmesh.protocol.errors import ConnectionFailed, KVConflict
from openagentmesh.protocol.headers import write_headers
from openagentmesh.protocol.subjects import KV_BUCKETS
from openagentmesh.transport.connection import Bus
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.jetstream import latest, latest_revision
from openagentmesh.transport.jetstream_errors import explained, retrying
from openagentmesh.transport.kv_watch import Entry, Mark, Newest, end_updates, end_watcher
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import end

# When a key was written: revision and time.
Version = tuple[int | None, object]

# A put's own protocol headers count towards the server's limit as well.
ROOM_FOR_HEADERS: Final = 1024
_AT_ONCE: Final = 256
_DELETE: Final = write_headers({"KV-Operation": "DEL"})
_PATIENCE: Final = 30.0
_REMOVED: Final = re.compile(rb"KV-Operation: *(DEL|PURGE)\r\n")
# A pull for changes is renewed this often, in seconds; a restarted server forgets it.
_PULL: Final = 5.0
# Where a group stands is forgotten when none of it was there for this long, in seconds.
_GROUP_KEPT: Final = 7 * 86_400.0


async def _acknowledged(acks: asyncio.Queue[Message]) -> None:
    """Wait for one acknowledgement of a write."""
    async with asyncio.timeout(_PATIENCE):
        message = await acks.get()
    ack = from_json(message.body) if message.body else {"error": "nobody stores this bucket"}
    if "error" in ack:
        raise ConnectionFailed(f"A write to a bucket was refused: {ack['error']}.")


class Buckets:
    """The KV buckets of the mesh over one bus."""

    def __init__(self, bus: Bus, inbox: Inbox) -> None:
        self._bus = bus
        self._inbox = inbox
        self._open: dict[str, KeyValue] = {}
        self._watchers: set[KeyValue.KeyWatcher] = set()
        self._pulls: set[asyncio.Task[list[Msg]]] = set()
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
        with explained(self._bus, f"Opening the bucket '{bucket}'"):
            # Right after a server's start JetStream may not answer yet.
            async for attempt in retrying(self._bus, _PATIENCE, NatsError, TimeoutError):
                with attempt:
                    jetstream = self._bus.jetstream()
                    with suppress(BucketNotFoundError):
                        return await jetstream.key_value(bucket)
                    return await jetstream.create_key_value(KeyValueConfig(bucket=bucket))
        raise AssertionError("unreachable: the last attempt raises")

    @asynccontextmanager
    async def _using(self, what: str) -> AsyncIterator[None]:
        with explained(self._bus, what):
            if not self._ready.is_set():
                async with asyncio.timeout(_PATIENCE):
                    await self._ready.wait()
            yield

    async def get(self, bucket: str, key: str) -> bytes | None:
        """The value of a key, or None."""
        entry = await self.entry(bucket, key)
        return None if entry is None else entry.value or b""

    async def entry(self, bucket: str, key: str) -> Entry | None:
        """A key's value with its revision, or None."""
        async with self._using(f"Reading '{key}' of '{bucket}'"):
            found = await latest(self._inbox, f"KV_{bucket}", f"$KV.{bucket}.{key}")
        if found is None or _REMOVED.search(b64decode(found.get("hdrs", ""))):
            return None
        value = b64decode(found.get("data", ""))
        return Entry(bucket, key, value, found["seq"], delta=None, created=None, operation=None)

    async def put(self, bucket: str, key: str, value: bytes) -> int:
        """Set a key; returns its revision."""
        async with self._using(f"Writing '{key}' of '{bucket}'"):
            return await self._open[bucket].put(key, value)

    async def put_if(self, bucket: str, key: str, value: bytes, revision: int | None) -> int | None:
        """Set a key that still has `revision`, or, with None, is not there; returns its new one.

        Returns None when somebody else was faster.
        """
        async with self._using(f"Writing '{key}' of '{bucket}'"):
            store = self._open[bucket]
            with suppress(KeyWrongLastSequenceError):
                if revision is None:
                    return await store.create(key, value)
                return await store.update(key, value, last=revision)
        return None

    async def put_all(self, bucket: str, values: Mapping[str, bytes]) -> None:
        """Set many keys, a bounded number of them under way at once."""
        await self._write(bucket, values, b"")

    async def delete_all(self, bucket: str, keys: Iterable[str]) -> None:
        """Remove keys; one that is not there is no error."""
        await self._write(bucket, dict.fromkeys(keys, b""), _DELETE)

    async def _write(self, bucket: str, values: Mapping[str, bytes], head: bytes) -> None:
        """Publish all values with one reply subject, and count the stream's acknowledgements.

        The library's own way takes four times as long, which 10,000 contracts would feel.
        """
        async with self._using(f"Writing to '{bucket}'"):
            acks: asyncio.Queue[Message] = asyncio.Queue()
            reply = self._inbox.expect(acks.put_nowait)
            try:
                for number, (key, value) in enumerate(values.items()):
                    if number >= _AT_ONCE:
                        await _acknowledged(acks)
                    await self._bus.publish(f"$KV.{bucket}.{key}", value, head, reply)
                for _ in range(min(_AT_ONCE, len(values))):
                    await _acknowledged(acks)
            finally:
                self._inbox.forget(reply)

    async def change(self, bucket: str, key: str, changed: Callable[[bytes | None], bytes | None]) -> None:
        """Compare-and-set: `changed` maps the old value to the new one, None leaves it."""
        async with self._using(f"Changing '{key}' of '{bucket}'"):
            async for attempt in retrying(self._bus, _PATIENCE, KVConflict):
                with attempt:
                    entry = await self.entry(bucket, key)
                    value = changed(entry.value or b"" if entry else None)
                    if value is None:
                        return
                    revision = entry.revision if entry else None
                    if await self.put_if(bucket, key, value, revision) is None:
                        raise KVConflict(f"Others change '{key}' of '{bucket}' again and again.")

    async def read(self, bucket: str) -> dict[str, bytes]:
        """All keys and values as they are now."""
        return {entry.key: entry.value or b"" for entry in await self.entries(bucket)}

    async def entries(self, bucket: str, keys: str = ">") -> list[Entry]:
        """All keys as they are now, or those of a pattern."""
        found: dict[str, Entry] = {}
        revision = partial(latest_revision, self._inbox, f"KV_{bucket}", f"$KV.{bucket}.{keys}")
        async with self._using(f"Reading all of '{bucket}'"):
            watcher = await self._open[bucket].watch(keys)
            try:
                async with asyncio.timeout(_PATIENCE):
                    seen, newest = 0, await revision()
                    while seen < newest:
                        entry = await anext(watcher)
                        if entry is None:  # that was not all: what was replaced meanwhile comes later
                            continue
                        found.pop(entry.key, None)
                        if not entry.operation:
                            found[entry.key] = entry
                        seen = entry.revision or 0
                        if seen >= newest:
                            newest = await revision()
            finally:
                await end_watcher(watcher, self._bus)
        return list(found.values())

    async def watch(self, bucket: str, keys: str = ">") -> AsyncGenerator[Entry | Mark, None]:
        """Follow a bucket's keys for ever, also across reconnects and new servers.

        Yields `begin`, all keys as they are, `current`, then changes; from `begin` again
        after each reconnect, since changes made meanwhile are not told. A `keys` pattern may
        have wildcards.
        """
        while True:
            async with self._using(f"Watching '{keys}' of '{bucket}'"):
                async for attempt in retrying(self._bus, _PATIENCE, NatsError, TimeoutError):
                    with attempt:
                        watcher = await self._open[bucket].watch(keys)
            self._watchers.add(watcher)
            newest = Newest()
            pumping = asyncio.create_task(newest.take_all(watcher))
            try:
                yield "begin"
                while (entry := await newest.next()) is not None:
                    yield entry
            finally:
                self._watchers.discard(watcher)
                await end(pumping)
                await end_watcher(watcher, self._bus)

    async def changes(  # noqa: C901 - one loop over all that a watch may tell
        self,
        bucket: str,
        keys: str = ">",
        *,
        replay: bool = True,
        seen: dict[str, Version] | None = None,
        started: asyncio.Event | None = None,
    ) -> AsyncGenerator[Entry, None]:
        """Changes of these keys, none twice, also across reconnects; `replay` begins with what is there.

        Of one key's that come faster than they are asked for, only the last is sure to be told.
        Deletions come too, as entries with an operation; also of keys that are not there any
        more on a server that lost them. Who goes on later where it left off gives the same
        `seen` again; `started` is set when all that was there has been told or skipped.
        """
        seen = {} if seen is None else seen
        present: set[str] | None = None
        async with aclosing(self.watch(bucket, keys)) as entries:
            async for entry in entries:
                if entry == "begin":
                    present = set()
                elif entry == "current":
                    for key in seen.keys() - (present or set()):
                        # What is replaced at this very moment is told after this mark only.
                        if await self.get(bucket, key) is None:
                            yield Entry(bucket, key, None, seen.pop(key)[0], None, None, "DEL")
                    present, replay = None, True  # what is new from here on is new to us
                    if started is not None:
                        started.set()
                elif isinstance(entry, Entry) and entry.operation:
                    if seen.pop(entry.key, None) and replay:
                        yield entry
                elif isinstance(entry, Entry):
                    if present is not None:
                        present.add(entry.key)
                    # A new server may count anew, so the revision alone tells nothing.
                    version = (entry.revision, entry.created)
                    known, seen[entry.key] = seen.get(entry.key) == version, version
                    if replay and not known:
                        yield entry

    async def shared_changes(  # noqa: PLR0913 - what a group agrees on
        self,
        bucket: str,
        keys: str,
        group: str,
        *,
        replay: bool,
        patience: float,
        started: asyncio.Event,
        closing: asyncio.Event,
    ) -> AsyncGenerator[Entry, None]:
        """Every change of these keys to one member of a group, at least once, whoever is away.

        Who took a change is done with it when it asks for the next one; after `patience`
        seconds another member gets it. `started` is set when changes are kept for the group,
        and after `closing` no more are taken.
        """
        durable = f"{group}-{sha256(keys.encode()).hexdigest()[:12]}"
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.LAST_PER_SUBJECT if replay else DeliverPolicy.NEW,
            ack_wait=patience,
            inactive_threshold=_GROUP_KEPT,
        )
        prefix = f"$KV.{bucket}."
        async with self._using(f"Following '{keys}' of '{bucket}' as '{group}'"):
            jetstream, stream = self._bus.jetstream(), f"KV_{bucket}"
            pull = await jetstream.pull_subscribe(prefix + keys, durable, stream, config=config)
            # A group that is there already keeps where it stands, but not how long it waits.
            group_now = (await jetstream.consumer_info(stream, durable)).config
            await jetstream.add_consumer(stream, group_now.evolve(ack_wait=patience))
            started.set()
            try:
                while not closing.is_set():
                    message = await self._pulled(pull)
                    if message is None:
                        continue
                    sequence, headers = message.metadata.sequence, message.headers or {}
                    yield Entry(
                        bucket=bucket,
                        key=message.subject.removeprefix(prefix),
                        value=message.data,
                        revision=sequence.stream,
                        delta=None,
                        created=None,
                        operation=headers.get("KV-Operation"),
                    )
                    await message.ack()
            finally:
                with suppress(NatsError):  # the connection may be closed already
                    await pull.unsubscribe()

    async def _pulled(self, pull: JetStreamContext.PullSubscription) -> Msg | None:
        """The next change for a group; None when there was none for a while, or it has to be asked anew."""
        fetching = asyncio.create_task(pull.fetch(1, timeout=_PULL))
        self._pulls.add(fetching)
        try:
            await asyncio.wait([fetching])
            return None if fetching.cancelled() else fetching.result()[0]
        except TimeoutError:
            return None
        finally:
            self._pulls.discard(fetching)
            await end(fetching)

    async def restore(self) -> None:
        """After a reconnect, maybe to a new and empty server: make what is missing, watch anew."""
        await self.make()
        for fetching in self._pulls:
            fetching.cancel()  # a server that was restarted does not know of it
        for watcher in list(self._watchers):
            with suppress(NatsError):  # its reader may not have seen yet that it was stopped before
                await watcher.stop()

    def fail_all(self) -> None:
        """Let nobody wait for a server that does not come any more."""
        self._ready.set()
        for watcher in self._watchers:
            end_updates(watcher)

    async def last_revision(self, bucket: str) -> int:
        """The revision of the newest change, deletions among them."""
        async with self._using(f"Asking for the state of '{bucket}'"):
            return (await self._open[bucket].status()).stream_info.state.last_seq
