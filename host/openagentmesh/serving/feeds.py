"""What drives an agent besides requests: its sources, and the gate that turns it on and off."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from contextvars import Context
from functools import partial
from typing import Any, Final, Protocol

from openagentmesh.agent.agent import Agent
from openagentmesh.agent.call import Call
from openagentmesh.agent.sources import (
    Condition,
    KVCondition,
    KVSource,
    SubjectCondition,
    SubjectSource,
)
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import MeshError
from openagentmesh.protocol.subjects import CONTEXT_BUCKET
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.kv import KVBuckets
from openagentmesh.transport.kv_watch import Entry, Version
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import cancel_and_wait, retry_forever

log = logging.getLogger(__name__)

# A change that an instance of a group took and did not finish goes to another one after the
# agent's timeout and this many seconds.
_GROUP_GRACE: Final = 10.0
_LAST_WORD: Final = 0.5
# So many messages of a subject may wait for room, and so many bytes.
_MOST_WAITING: Final = 65_536
_MOST_BYTES: Final = 64 * 1024 * 1024

Accept = Callable[[Agent, Call], None]
Take = Callable[[Message, Accept], "asyncio.Task[None]"]


class Taker(Protocol):
    """Answers what a source brings, as far as there is room."""

    @property
    def has_room(self) -> bool:
        """Whether one more may be taken."""

    async def until_room(self) -> None:
        """Wait until there is room."""

    def take(self, message: Message, accept: Accept) -> object:
        """Answer a message, which `accept` reads."""

    def turn_away(self, message: Message) -> object:
        """Refuse a message."""


class SubjectFeed:
    """The messages of a subject, each of which is answered as a request.

    Nobody would send them again, so those for which there is no room wait.
    """

    def __init__(self, source: SubjectSource, agent: str, taker: Taker, connection: Connection) -> None:
        self._source = source
        self._own = {subjects.errors(agent), subjects.logs(agent)}
        self._taker = taker
        self._connection = connection
        self._sid: int | None = None
        self._waiting: deque[Message] = deque()
        self._bytes = 0
        self._working_off: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to listen, unless it does."""
        source = self._source
        if self._sid is not None:
            return
        self._sid = await self._connection.subscribe(
            source.subject, self._on_message, source.queue_group or ""
        )

    async def close(self, timeout: float) -> None:
        """Listen no more; what waits then has `timeout` seconds for its turn, and is refused after them."""
        sid, self._sid = self._sid, None
        if sid is not None:
            await self._connection.drain(sid)
        if self._working_off is not None:
            await asyncio.wait([self._working_off], timeout=timeout)
            await cancel_and_wait(self._working_off)
        while self._waiting:
            self._taker.turn_away(self._next())

    def _on_message(self, message: Message) -> None:
        frame = codec.decode_reply(message.head, message.body)
        if frame.is_error_frame or (frame.end and not message.body):
            return  # the end of a publisher's run is no event
        if message.subject in self._own:
            return  # an agent that is told of its own failures would go on for ever
        if not self._waiting and self._taker.has_room:
            self._take(message)
        elif len(self._waiting) < _MOST_WAITING and self._bytes + len(message.body) <= _MOST_BYTES:
            self._waiting.append(message)
            self._bytes += len(message.body)
            if self._working_off is None or self._working_off.done():
                self._working_off = asyncio.create_task(self._work_off(), context=Context())
        else:
            self._taker.turn_away(message)

    def _take(self, message: Message) -> None:
        self._taker.take(message, lambda agent, call: agent.accept_message(call, message.subject))

    def _next(self) -> Message:
        message = self._waiting.popleft()
        self._bytes -= len(message.body)
        return message

    async def _work_off(self) -> None:
        while self._waiting:
            await self._taker.until_room()
            self._take(self._next())


class KVFeed:
    """The changes of some keys of the shared state, one after the other.

    What changed while it was closed, or while the server was away, is told afterwards, and
    nothing twice.
    """

    def __init__(self, source: KVSource, agent: Callable[[], Agent], buckets: KVBuckets, take: Take) -> None:
        self._source = source
        self._agent = agent
        self._buckets = buckets
        self._take = take
        self._seen: dict[str, Version] = {}
        # Set once what was there at first has been told, or skipped.
        self._started = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._handling: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to follow the keys, unless it does."""
        if self._task is None:
            self._closing.clear()
            self._task = asyncio.create_task(
                retry_forever(self._follow, f"following the keys {self._source.pattern}")
            )

    async def close(self, timeout: float) -> None:
        """Follow no more; what is being handled has `timeout` seconds, and then goes on by itself."""
        self._closing.set()
        if self._handling is not None and not self._handling.done() and self._task is not None:
            # What a group shares is then acknowledged as handled.
            await asyncio.wait([self._handling], timeout=timeout)
            await asyncio.wait([self._task], timeout=_LAST_WORD if self._source.queue_group else 0)
        await cancel_and_wait(self._task)
        self._task = None

    async def _follow(self) -> None:
        if self._handling is not None:  # of the time before it was closed
            await asyncio.wait([self._handling])
        async with aclosing(self._changes()) as changes:
            async for entry in changes:
                type_ = self._agent().handler.input
                if entry.operation and type_ is not None and not type_.takes_none:
                    continue  # its handler is for values only
                message = Message(f"$KV.{CONTEXT_BUCKET}.{entry.key}", "", b"", entry.value or b"")
                # In a task of its own, for closing the feed must not stop the handler.
                self._handling = self._take(message, partial(Agent.accept_entry, entry=entry))
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
            ack_timeout=self._agent().limits.timeout + _GROUP_GRACE,
            started=self._started,
            closing=self._closing,
        )


class Gate:
    """Turns an agent on and off as its condition says.

    `open_` and `shut` are awaited one at a time; `is_open` tells what was done last.
    What fails is logged, and tried again with the next change.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - a gate stands between all of these
        self,
        agent: Agent,
        condition: Condition,
        connection: Connection,
        buckets: KVBuckets,
        open_: Callable[[], Awaitable[None]],
        shut: Callable[[float], Awaitable[None]],
    ) -> None:
        self.is_open = False
        self._condition = condition
        self._agent = agent
        self._connection = connection
        self._buckets = buckets
        self._open = open_
        self._shut = shut
        self._wanted = condition.initial
        self._changed = asyncio.Event()
        self._sid: int | None = None
        self._seen: dict[str, Version] = {}
        # What the condition's subject said last, if it said anything.
        self._said: list[Message] = []
        self._moving = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, *, is_open: bool, before: "Gate | None" = None) -> None:
        """Take the position that the condition has now, and follow it from here on.

        What the gate `before` it heard on the same subject still holds.
        """
        condition, self.is_open = self._condition, is_open
        if isinstance(condition, KVCondition):
            entry = await self._buckets.get_entry(CONTEXT_BUCKET, condition.key)
            self._decide_by_value(None if entry is None else entry.value or b"")
            if entry is not None:  # what is deleted from here on is told
                self._seen[condition.key] = (entry.revision, entry.created)
            following = retry_forever(self._follow_key, f"following the key {condition.key}")
            self._tasks.append(asyncio.create_task(following))
        else:
            if before is not None and before.subject == condition.subject:
                for message in before._said:  # noqa: SLF001 - one of us
                    self._on_message(message)
            self._sid = await self._connection.subscribe(condition.subject, self._on_message)
        await self._move()
        self._tasks.append(asyncio.create_task(self._keep_moving()))

    @property
    def subject(self) -> str:
        """Whose messages it follows; empty when it follows a key."""
        return self._condition.subject if isinstance(self._condition, SubjectCondition) else ""

    async def stop(self) -> None:
        """Follow no more; the agent stays as it is, once a move that is under way is done."""
        if self._sid is not None:
            await self._connection.unsubscribe(self._sid)
        async with self._moving:
            await cancel_and_wait(*self._tasks)

    async def _follow_key(self) -> None:
        assert isinstance(self._condition, KVCondition)
        changing = self._buckets.changes(CONTEXT_BUCKET, self._condition.key, seen=self._seen)
        async with aclosing(changing) as changes:
            async for entry in changes:
                self._decide_by_value(None if entry.operation else entry.value or b"")

    def _decide_by_value(self, value: bytes | None) -> None:
        if value is None:
            self._want(self._condition.initial)
        else:
            self._decide(value.decode("utf-8", "replace"))

    def _on_message(self, message: Message) -> None:
        frame = codec.decode_reply(message.head, message.body)
        if message.body and not frame.is_error_frame:
            self._said = [message]
            self._decide(codec.decode_message(frame.headers, message.body))

    def _decide(self, value: Any) -> None:  # noqa: ANN401 - what the predicate takes
        try:
            self._want(bool(self._condition.predicate(value)))
        # The author's predicate ends here, whatever it raises, and the gate stays as it is.
        except BaseException:
            log.exception("%s: its condition failed on %.200r and stays as it was", self._agent.name, value)

    def _want(self, wanted: bool) -> None:  # noqa: FBT001 - the position itself
        self._wanted = wanted
        self._changed.set()

    async def _keep_moving(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._move()

    async def _move(self) -> None:
        async with self._moving:
            wanted = self._wanted
            if wanted == self.is_open:
                return
            try:
                await (self._open() if wanted else self._shut(self._condition.drain_timeout))
                self.is_open = wanted
            # A move ends here, and the next one may go well.
            except Exception as exc:
                position, ours = "on" if wanted else "off", isinstance(exc, MeshError)
                log.warning(
                    "%s could not be turned %s: %s", self._agent.name, position, exc, exc_info=not ours
                )
