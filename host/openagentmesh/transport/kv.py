"""KV buckets: created when missing, changed by compare-and-set, watched across reconnects."""

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
from nats.js.errors import BucketNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from openagentmesh.protocol.errors import KVConflict
from openagentmesh.protocol.headers import write_headers
from openagentmesh.protocol.subjects import KV_BUCKETS
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.jetstream import check_ack, last_message, last_revision
from openagentmesh.transport.jetstream_errors import TIMEOUT_S, retrying, translated_errors
from openagentmesh.transport.kv_watch import (
    ChangeFilter,
    Entry,
    LatestEntries,
    Mark,
    Version,
    end_iteration,
    stop_watcher,
)
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import cancel_and_wait

# Bytes: the protocol headers of a put count towards the server's max_payload as well.
HEADER_RESERVE: Final = 1024
_MAX_UNACKNOWLEDGED: Final = 256
_DELETE: Final = write_headers({"KV-Operation": "DEL"})
_DELETED_RE: Final = re.compile(rb"KV-Operation: *(DEL|PURGE)\r\n")
# A restarted server forgets a pull request, so it is repeated this often.
_PULL_S: Final = 5.0
# The position of a group is deleted when none of its members was connected for this long.
_GROUP_EXPIRY_S: Final = 7 * 86_400.0


class KVBuckets:
    """The KV buckets of the mesh."""

    def __init__(self, connection: Connection, inbox: Inbox) -> None:
        self._connection = connection
        self._inbox = inbox
        self._open: dict[str, KeyValue] = {}
        self._watchers: set[KeyValue.KeyWatcher] = set()
        self._pulls: set[asyncio.Task[list[Msg]]] = set()
        # Clear from the loss of the server until its buckets are known to exist.
        self._ready = asyncio.Event()
        connection.on_disconnected = self._ready.clear

    async def create_missing(self) -> None:
        """Create the mesh's buckets that do not exist; raises ConnectionFailed without JetStream."""
        opened = await asyncio.gather(*[self._open_or_create(name) for name in KV_BUCKETS])
        self._open = dict(zip(KV_BUCKETS, opened, strict=True))
        self._ready.set()

    async def _open_or_create(self, bucket: str) -> KeyValue:
        with translated_errors(self._connection, f"Opening the bucket '{bucket}'"):
            async for attempt in retrying(self._connection):
                with attempt:
                    jetstream = self._connection.jetstream()
                    with suppress(BucketNotFoundError):
                        return await jetstream.key_value(bucket)
                    return await jetstream.create_key_value(KeyValueConfig(bucket=bucket))
        raise AssertionError("unreachable: the last attempt raises")

    @asynccontextmanager
    async def _operation(self, action: str) -> AsyncIterator[None]:
        with translated_errors(self._connection, action):
            if not self._ready.is_set():
                async with asyncio.timeout(TIMEOUT_S):
                    await self._ready.wait()
            yield

    async def get(self, bucket: str, key: str) -> bytes | None:
        """The value of a key; None when it does not exist."""
        entry = await self.get_entry(bucket, key)
        return None if entry is None else entry.value or b""

    async def get_entry(self, bucket: str, key: str) -> Entry | None:
        """The value and revision of a key; None when it does not exist."""
        async with self._operation(f"Reading '{key}' of '{bucket}'"):
            found = await last_message(self._inbox, f"KV_{bucket}", f"$KV.{bucket}.{key}")
        if found is None or _DELETED_RE.search(b64decode(found.get("hdrs", ""))):
            return None
        value = b64decode(found.get("data", ""))
        return Entry(bucket, key, value, found["seq"], None, None, None)

    async def put(self, bucket: str, key: str, value: bytes) -> int:
        """Set a key; returns its revision."""
        async with self._operation(f"Writing '{key}' of '{bucket}'"):
            return await self._open[bucket].put(key, value)

    async def compare_and_set(self, bucket: str, key: str, value: bytes, revision: int | None) -> int | None:
        """Set a key if it has this revision, with None create it; returns the new revision, else None."""
        async with self._operation(f"Writing '{key}' of '{bucket}'"):
            store = self._open[bucket]
            with suppress(KeyWrongLastSequenceError):
                if revision is None:
                    return await store.create(key, value)
                return await store.update(key, value, last=revision)
        return None

    async def delete_all(self, bucket: str, keys: Iterable[str]) -> None:
        """Delete keys; one that does not exist is no error."""
        await self.put_all(bucket, dict.fromkeys(keys, b""), _DELETE)

    async def put_all(self, bucket: str, values: Mapping[str, bytes], head: bytes = b"") -> None:
        """Set many keys, with a bounded number of unacknowledged messages.

        The library's own way takes four times as long, which matters for 10,000 contracts.
        """
        async with self._operation(f"Writing to '{bucket}'"):
            acks: asyncio.Queue[Message] = asyncio.Queue()
            reply = self._inbox.register(acks.put_nowait)
            try:
                for number, (key, value) in enumerate(values.items()):
                    if number >= _MAX_UNACKNOWLEDGED:
                        await _wait_for_ack(acks)
                    await self._connection.publish(f"$KV.{bucket}.{key}", value, head, reply)
                for _ in range(min(_MAX_UNACKNOWLEDGED, len(values))):
                    await _wait_for_ack(acks)
            finally:
                self._inbox.unregister(reply)

    async def update(self, bucket: str, key: str, update: Callable[[bytes | None], bytes | None]) -> None:
        """Change a key by compare-and-set; `update` maps the old value to the new one, None to keep it."""
        async with self._operation(f"Changing '{key}' of '{bucket}'"):
            async for attempt in retrying(self._connection, KVConflict):
                with attempt:
                    entry = await self.get_entry(bucket, key)
                    value = update(entry.value or b"" if entry else None)
                    if value is None:
                        return
                    revision = entry.revision if entry else None
                    if await self.compare_and_set(bucket, key, value, revision) is None:
                        raise KVConflict(f"'{key}' of '{bucket}' was changed by others at each attempt.")

    async def read_all(self, bucket: str) -> dict[str, bytes]:
        """All keys with their values."""
        return {entry.key: entry.value or b"" for entry in await self.entries(bucket)}

    async def entries(self, bucket: str, keys: str = ">") -> list[Entry]:
        """The entries of all keys that match a pattern."""
        found: dict[str, Entry] = {}
        revision = partial(last_revision, self._inbox, f"KV_{bucket}", f"$KV.{bucket}.{keys}")
        async with self._operation(f"Reading all of '{bucket}'"):
            watcher = await self._open[bucket].watch(keys)
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    seen, newest = 0, await revision()
                    while seen < newest:
                        entry = await anext(watcher)
                        if entry is None:  # not the end: keys replaced in the meantime follow
                            continue
                        found.pop(entry.key, None)
                        if not entry.operation:
                            found[entry.key] = entry
                        seen = entry.revision or 0
                        if seen >= newest:
                            newest = await revision()
            finally:
                await stop_watcher(watcher, self._connection)
        return list(found.values())

    async def watch(self, bucket: str, keys: str = ">") -> AsyncGenerator[Entry | Mark, None]:
        """Watch a bucket's keys for ever, also across reconnects and new servers.

        Yields `reset`, all existing keys, `caught_up`, then changes; from `reset` again after each
        reconnect, since changes during the outage are not delivered. `keys` may have wildcards.
        """
        while True:
            async with self._operation(f"Watching '{keys}' of '{bucket}'"):
                watcher: KeyValue.KeyWatcher = await retrying(self._connection)(
                    self._open[bucket].watch, keys
                )
            self._watchers.add(watcher)
            latest = LatestEntries()
            reading = asyncio.create_task(latest.read_all(watcher))
            try:
                yield "reset"
                while (entry := await latest.next()) is not None:
                    yield entry
            finally:
                self._watchers.discard(watcher)
                await cancel_and_wait(reading)
                await stop_watcher(watcher, self._connection)

    async def changes(
        self,
        bucket: str,
        keys: str = ">",
        *,
        replay: bool = True,
        seen: dict[str, Version] | None = None,
        started: asyncio.Event | None = None,
    ) -> AsyncGenerator[Entry, None]:
        """Changes of these keys, each at most once, also across reconnects.

        Of several changes of one key at least the last one is yielded. Deletions are entries with an
        operation, also those of keys that a new server does not have. With `replay` it begins with the
        existing keys. `seen` holds the versions yielded so far: pass the same dict to resume. `started` is
        set when all existing keys were yielded or skipped.
        """
        changes = ChangeFilter({} if seen is None else seen, replay=replay)
        async with aclosing(self.watch(bucket, keys)) as entries:
            async for entry in entries:
                if entry == "reset":
                    changes.reset()
                elif entry == "caught_up":
                    for key in changes.missing():
                        # A key that is replaced at this moment is delivered after the mark.
                        if await self.get(bucket, key) is None:
                            yield changes.deleted(bucket, key)
                    changes.caught_up()
                    if started is not None:
                        started.set()
                elif isinstance(entry, Entry) and changes.is_change(entry):
                    yield entry

    async def group_changes(  # noqa: PLR0913 - what a group agrees on
        self,
        bucket: str,
        keys: str,
        group: str,
        *,
        replay: bool,
        ack_timeout: float,
        started: asyncio.Event,
        closing: asyncio.Event,
    ) -> AsyncGenerator[Entry, None]:
        """Every change of these keys, once for a group: for one member, also after none was connected.

        A change is acknowledged when the next one is requested; after `ack_timeout` seconds another member
        receives it. `started` is set when the group's consumer exists; after `closing` there are no more.
        """
        durable = f"{group}-{sha256(keys.encode()).hexdigest()[:12]}"
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.LAST_PER_SUBJECT if replay else DeliverPolicy.NEW,
            ack_wait=ack_timeout,
            inactive_threshold=_GROUP_EXPIRY_S,
        )
        prefix = f"$KV.{bucket}."
        async with self._operation(f"Following '{keys}' of '{bucket}' as '{group}'"):
            jetstream, stream = self._connection.jetstream(), f"KV_{bucket}"
            pull = await jetstream.pull_subscribe(prefix + keys, durable, stream, config=config)
            # An existing group keeps its position; its ack_wait is updated.
            current = (await jetstream.consumer_info(stream, durable)).config
            await jetstream.add_consumer(stream, current.evolve(ack_wait=ack_timeout))
            started.set()
            try:
                while not closing.is_set():
                    message = await self._pull_one(pull)
                    if message is None:
                        continue
                    key, revision = message.subject.removeprefix(prefix), message.metadata.sequence.stream
                    operation = (message.headers or {}).get("KV-Operation")
                    yield Entry(bucket, key, message.data, revision, None, None, operation)
                    await message.ack()
            finally:
                with suppress(NatsError):  # the connection may be closed already
                    await pull.unsubscribe()

    async def _pull_one(self, pull: JetStreamContext.PullSubscription) -> Msg | None:
        """The next change of a group; None when there was none for a while, or the pull was cancelled."""
        fetching = asyncio.create_task(pull.fetch(1, timeout=_PULL_S))
        self._pulls.add(fetching)
        try:
            await asyncio.wait([fetching])
            return None if fetching.cancelled() else fetching.result()[0]
        except TimeoutError:
            return None
        finally:
            self._pulls.discard(fetching)
            await cancel_and_wait(fetching)

    async def restore(self) -> None:
        """After a reconnect, maybe to an empty server: create missing buckets, restart watches."""
        await self.create_missing()
        for fetching in self._pulls:
            fetching.cancel()  # a restarted server has forgotten it
        for watcher in list(self._watchers):
            with suppress(NatsError):  # it may be stopped already
                await watcher.stop()

    def fail_pending(self) -> None:
        """Release everything that waits, when the connection is closed for good."""
        self._ready.set()
        for watcher in self._watchers:
            end_iteration(watcher)

    async def last_revision(self, bucket: str) -> int:
        """The revision of the latest change, deletions included."""
        async with self._operation(f"Reading the state of '{bucket}'"):
            return (await self._open[bucket].status()).stream_info.state.last_seq


async def _wait_for_ack(acks: asyncio.Queue[Message]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        check_ack(await acks.get())
