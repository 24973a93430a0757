"""Watchers of KV buckets: the library's, with their measured defects corrected."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Literal

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.kv import KeyValue

from openagentmesh.protocol.errors import MeshError
from openagentmesh.transport.connection import Connection

log = logging.getLogger(__name__)

Entry = KeyValue.Entry
# What a watch yields beside entries: it starts over; it has yielded all existing keys.
Mark = Literal["reset", "caught_up"]
# When a key was written: revision and time. A new server may count from 1 again.
Version = tuple[int | None, object]


async def entries_with_marks(watcher: KeyValue.KeyWatcher) -> AsyncGenerator[Entry | Mark, None]:
    """The entries of a watcher, with `caught_up` after the last existing key.

    The library announces that too early when the server has sent everything, but the first entry
    has not arrived or its own callback has not run.
    """
    remaining, any_yielded, subscription = 0, False, watcher._sub  # noqa: SLF001 - no public access
    assert subscription is not None
    async for entry in watcher:
        if entry is None:
            remaining = 0
            if not any_yielded:
                # Not the number that arrived so far: that may be the first of them only.
                delivered = (await subscription.consumer_info()).delivered
                remaining = delivered.consumer_seq if delivered else 0
            if not remaining:
                yield "caught_up"
        else:
            yield entry
            any_yielded = True
            remaining -= 1
            if remaining == 0:
                yield "caught_up"


class LatestEntries:
    """Buffers a watcher's entries: the latest of each key.

    The library's queue drops entries when its reader is slow; this buffer holds at most one entry per key.
    """

    def __init__(self) -> None:
        self._entries: dict[str | None, Entry | Mark] = {}
        self._changed = asyncio.Event()
        self._ended = False

    async def read_all(self, watcher: KeyValue.KeyWatcher) -> None:
        """Buffer entries until the watcher ends."""
        try:
            async with aclosing(entries_with_marks(watcher)) as entries:
                async for entry in entries:
                    key = entry.key if isinstance(entry, Entry) else None
                    if None not in self._entries:  # existing keys stay before the mark
                        self._entries.pop(key, None)  # the latest comes last
                    self._entries[key] = entry
                    self._changed.set()
        except (NatsError, TimeoutError):
            log.debug("a watch is restarted", exc_info=True)
        finally:
            self._ended = True
            self._changed.set()

    async def next(self) -> Entry | Mark | None:
        """The oldest buffered entry; None after the last one."""
        while not self._entries:
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._entries.pop(next(iter(self._entries)))


class ChangeFilter:
    """Selects the entries of a watch that are changes, also across restarts of the watch.

    `seen`, the version of each known key, is kept up to date. With `replay` existing keys count as changes.
    """

    def __init__(self, seen: dict[str, Version], *, replay: bool) -> None:
        self._seen = seen
        self._replay = replay
        self._present: set[str] | None = None

    def reset(self) -> None:
        """The watch starts over: existing keys follow."""
        self._present = set()

    def missing(self) -> set[str]:
        """Known keys that the restarted watch has not yielded."""
        return self._seen.keys() - (self._present or set())

    def caught_up(self) -> None:
        """All existing keys have been yielded; from now on every entry is new."""
        self._present, self._replay = None, True

    def deleted(self, bucket: str, key: str) -> Entry:
        """Forget a missing key; the deletion as an entry."""
        return Entry(bucket, key, None, self._seen.pop(key)[0], None, None, "DEL")

    def is_change(self, entry: Entry) -> bool:
        """Whether an entry is a change; remembers its version."""
        if entry.operation:
            return self._seen.pop(entry.key, None) is not None and self._replay
        if self._present is not None:
            self._present.add(entry.key)
        version = (entry.revision, entry.created)
        is_known, self._seen[entry.key] = self._seen.get(entry.key) == version, version
        return self._replay and not is_known


async def stop_watcher(watcher: KeyValue.KeyWatcher, connection: Connection) -> None:
    """Stop a watcher and delete its consumer."""
    subscription = watcher._sub  # noqa: SLF001 - no public access
    with suppress(NatsError):  # the connection may be closed already
        await watcher.stop()
    if subscription is not None:
        await delete_consumer(subscription, connection)


async def delete_consumer(subscription: JetStreamContext.PushSubscription, connection: Connection) -> None:
    """Delete the server's consumer of a subscription that has ended.

    The library leaves it there for seconds or for five minutes, and a bucket allows a thousand.
    """
    if connection.connected:
        stream, consumer = subscription._stream, subscription._consumer  # noqa: SLF001 - no public access
        with suppress(MeshError):  # the server expires it later
            await connection.publish(f"$JS.API.CONSUMER.DELETE.{stream}.{consumer}")


def end_iteration(watcher: KeyValue.KeyWatcher) -> None:
    """End the iteration over a watcher when the connection is closed for good."""
    updates = watcher._updates  # noqa: SLF001 - no public access
    while updates.full():
        updates.get_nowait()
    updates.put_nowait(watcher.STOP_ITER)
