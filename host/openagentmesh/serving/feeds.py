"""What a source delivers to an agent: messages of a subject, changes of keys."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context
from typing import Final, Protocol

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.agent.call import Trigger
from openagentmesh.agent.concurrency import Limiter
from openagentmesh.agent.sources import KVSource, SubjectSource
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.subjects import CONTEXT_BUCKET
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.kv import KVBuckets
from openagentmesh.transport.kv_watch import Entry, Version
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import cancel_and_wait, retry_forever

log = logging.getLogger(__name__)

# An unfinished change goes to another member of the group after the agent's timeout and this many seconds.
_GROUP_GRACE_S: Final = 10.0
_LAST_ACK_S: Final = 0.5
# Messages of one subject that may wait for capacity, and their bytes.
_MAX_WAITING: Final = 65_536
_MAX_BYTES: Final = 64 * 1024 * 1024


class _Route(Protocol):
    """What feeds use of their route."""

    agent: AgentVersion
    limiter: Limiter

    def trigger(
        self, message: Message, trigger: Trigger, *, is_sequential: bool = False
    ) -> "asyncio.Task[None]": ...
    def reject(self, message: Message) -> None: ...


class SubjectFeed:
    """Delivers the messages of a subject, each as a request.

    Messages are not sent again, so those above the agent's capacity wait.
    """

    def __init__(self, source: SubjectSource, route: _Route, connection: Connection) -> None:
        self._source = source
        self._route = route
        self._own_subjects = {subjects.errors(route.agent.name), subjects.logs(route.agent.name)}
        self._connection = connection
        self._sid: int | None = None
        self._waiting: deque[Message] = deque()
        self._bytes = 0
        self._delivering: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Subscribe, unless that is done already."""
        if self._sid is None:
            queue = self._source.queue_group or ""
            self._sid = await self._connection.subscribe(self._source.subject, self._on_message, queue)

    async def close(self, timeout: float) -> None:
        """Unsubscribe; messages that wait are delivered within `timeout` seconds, or rejected."""
        sid, self._sid = self._sid, None
        if sid is not None:
            await self._connection.drain(sid)
        if self._delivering is not None:
            await asyncio.wait([self._delivering], timeout=timeout)
            await cancel_and_wait(self._delivering)
        while self._waiting:
            self._route.reject(self._pop())

    def _on_message(self, message: Message) -> None:
        if message.subject in self._own_subjects or _is_end_of_run(message):
            return  # an agent that reads its own errors would run for ever
        if not self._waiting and not self._route.limiter.is_full:
            self._route.trigger(message, message)
        elif len(self._waiting) < _MAX_WAITING and self._bytes + len(message.body) <= _MAX_BYTES:
            self._waiting.append(message)
            self._bytes += len(message.body)
            if self._delivering is None or self._delivering.done():
                self._delivering = asyncio.create_task(self._deliver_waiting(), context=Context())
        else:
            self._route.reject(message)

    def _pop(self) -> Message:
        message = self._waiting.popleft()
        self._bytes -= len(message.body)
        return message

    async def _deliver_waiting(self) -> None:
        while self._waiting:
            await self._route.limiter.wait_for_capacity()
            message = self._pop()
            self._route.trigger(message, message)


def _is_end_of_run(message: Message) -> bool:
    """Whether it is the last frame of a publisher's run, which is not an event."""
    frame = codec.decode_reply(message.head, message.body)
    return frame.is_error_frame or (frame.end and not message.body)


class KVFeed:
    """Delivers the changes of some keys of the shared state, one after the other.

    Changes while it was closed, or while the server was unreachable, are delivered afterwards, each once.
    """

    def __init__(self, source: KVSource, route: _Route, buckets: KVBuckets) -> None:
        self._source = source
        self._route = route
        self._buckets = buckets
        self._seen: dict[str, Version] = {}
        # Set once all existing keys were delivered or skipped.
        self._started = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._handling: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to follow the keys, unless that is done already."""
        if self._task is None:
            self._closing.clear()
            following = retry_forever(self._follow, f"following the keys {self._source.pattern}")
            self._task = asyncio.create_task(following)

    async def close(self, timeout: float) -> None:
        """Stop following; a running handler has `timeout` seconds, and then continues on its own."""
        self._closing.set()
        if self._handling is not None and not self._handling.done() and self._task is not None:
            # A change of a group is acknowledged after its handler.
            await asyncio.wait([self._handling], timeout=timeout)
            await asyncio.wait([self._task], timeout=_LAST_ACK_S if self._source.queue_group else 0)
        await cancel_and_wait(self._task)
        self._task = None

    async def _follow(self) -> None:
        if self._handling is not None:  # from before it was closed
            await asyncio.wait([self._handling])
        async with aclosing(self._changes()) as changes:
            async for entry in changes:
                input_type = self._route.agent.handler.input
                if entry.operation and input_type is not None and not input_type.accepts_none:
                    continue  # the handler takes values only
                message = Message(f"$KV.{CONTEXT_BUCKET}.{entry.key}", "", b"", entry.value or b"")
                # In a task of its own: closing the feed must not stop the handler.
                self._handling = self._route.trigger(message, entry, is_sequential=True)
                await asyncio.wait([self._handling])

    def _changes(self) -> AsyncGenerator[Entry, None]:
        source = self._source
        replay = self._started.is_set() or source.on_init == "replay"
        if not source.queue_group:
            return self._buckets.changes(
                CONTEXT_BUCKET, source.pattern, replay=replay, seen=self._seen, started=self._started
            )
        return self._buckets.group_changes(
            CONTEXT_BUCKET,
            source.pattern,
            source.queue_group,
            replay=replay,
            ack_timeout=self._route.agent.limits.timeout + _GROUP_GRACE_S,
            started=self._started,
            closing=self._closing,
        )
