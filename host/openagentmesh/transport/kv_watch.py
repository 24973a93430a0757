"""Watchers of KV buckets, as the library makes them, with their measured defects cured."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Literal

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.kv import KeyValue

from openagentmesh.protocol.errors import MeshError
from openagentmesh.transport.connection import Bus

log = logging.getLogger(__name__)

Entry = KeyValue.Entry
# What a watch yields beside entries: it begins anew, and it has shown all there was.
Mark = Literal["begin", "current"]


async def told(watcher: KeyValue.KeyWatcher) -> AsyncGenerator[Entry | Mark, None]:
    """What a watcher tells, with `current` where it has told all there was.

    The library says so too early when the server has sent everything, but the first of it has
    not arrived, or its own callback has not taken it.
    """
    left, told_any, subscription = 0, False, watcher._sub  # noqa: SLF001 - only it knows
    assert subscription is not None
    async for entry in watcher:
        if entry is None:
            left = 0
            if not told_any:
                # Not what has arrived so far: that may be only the first of it.
                delivered = (await subscription.consumer_info()).delivered
                left = delivered.consumer_seq if delivered else 0
            if not left:
                yield "current"
        else:
            yield entry
            told_any = True
            left -= 1
            if left == 0:
                yield "current"


class Newest:
    """What a watcher tells, kept until it is asked for: of each key the newest state.

    The library drops what a slow reader leaves in its queue; here nothing is lost, and no more
    is kept than there are keys.
    """

    def __init__(self) -> None:
        self._kept: dict[str | None, Entry | Mark] = {}
        self._arrived = asyncio.Event()
        self._ended = False

    async def take_all(self, watcher: KeyValue.KeyWatcher) -> None:
        """Keep what comes until the watcher ends."""
        try:
            async with aclosing(told(watcher)) as entries:
                async for entry in entries:
                    key = entry.key if isinstance(entry, Entry) else None
                    if None not in self._kept:  # what was there at first stays before its end
                        self._kept.pop(key, None)  # the newest comes last
                    self._kept[key] = entry
                    self._arrived.set()
        except (NatsError, TimeoutError):
            log.debug("a watch is begun anew", exc_info=True)
        finally:
            self._ended = True
            self._arrived.set()

    async def next(self) -> Entry | Mark | None:
        """What came first of what is kept; None when there will be no more."""
        while not self._kept:
            if self._ended:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return self._kept.pop(next(iter(self._kept)))


async def end_watcher(watcher: KeyValue.KeyWatcher, bus: Bus) -> None:
    """Stop a watcher, and what the server keeps for it."""
    subscription = watcher._sub  # noqa: SLF001 - only it knows
    with suppress(NatsError):  # the connection may be closed already
        await watcher.stop()
    if subscription is not None:
        await forget_consumer(subscription, bus)


async def forget_consumer(subscription: JetStreamContext.PushSubscription, bus: Bus) -> None:
    """Let the server keep nothing for a subscription that has ended.

    The library leaves its consumer there, for seconds or for five minutes, and the server
    allows a thousand of them a bucket.
    """
    if bus.connected:
        stream, consumer = subscription._stream, subscription._consumer  # noqa: SLF001 - only it knows
        with suppress(MeshError):  # the server has it go by itself, later
            await bus.publish(f"$JS.API.CONSUMER.DELETE.{stream}.{consumer}")


def end_updates(watcher: KeyValue.KeyWatcher) -> None:
    """Let whoever reads a watcher see its end, when the connection is closed for good."""
    updates = watcher._updates  # noqa: SLF001 - only it can end the reading
    while updates.full():
        updates.get_nowait()
    updates.put_nowait(watcher.STOP_ITER)
