"""What drives an agent besides requests: its sources, and the gate that turns it on and off."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Final

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from openagentmesh.bus.buckets import Buckets, Entry, Version
from openagentmesh.bus.client import Message
from openagentmesh.bus.connection import Bus
from openagentmesh.bus.tasks import end
from openagentmesh.protocol import codec
from openagentmesh.protocol.errors import MeshError
from openagentmesh.protocol.subjects import CONTEXT_BUCKET
from openagentmesh.serving.agent import Agent
from openagentmesh.serving.call import Call
from openagentmesh.serving.sources import Condition, KVCondition, KVSource, SubjectSource

log = logging.getLogger(__name__)

_LONGEST_PAUSE: Final = 5.0
# A change that an instance of a group took and did not finish goes to another one after the
# agent's timeout and this many seconds.
_GROUP_GRACE: Final = 10.0

Accept = Callable[[Agent, Call], None]
Take = Callable[[Message, Accept], "asyncio.Task[None]"]


class SubjectFeed:
    """The messages of a subject, each of which is answered as a request."""

    def __init__(self, source: SubjectSource, bus: Bus, receive: Callable[[Message, Accept], object]) -> None:
        self._source = source
        self._bus = bus
        self._receive = receive
        self._sid: int | None = None

    async def open(self) -> None:
        """Begin to listen."""
        source = self._source
        self._sid = await self._bus.listen(source.subject, self._on_message, source.queue_group or "")

    async def close(self) -> None:
        """Listen no more."""
        sid, self._sid = self._sid, None
        if sid is not None:
            await self._bus.leave(sid)

    def _on_message(self, message: Message) -> None:
        self._receive(message, lambda agent, call: agent.accept_message(call, message.subject))


class KVFeed:
    """The changes of some keys of the shared state, one after the other.

    What changed while it was closed, or while the server was away, is told afterwards, and
    nothing twice.
    """

    def __init__(self, source: KVSource, agent: Agent, buckets: Buckets, take: Take) -> None:
        self._source = source
        self._agent = agent
        self._buckets = buckets
        self._take = take
        self._seen: dict[str, Version] = {}
        self._opened = False
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to follow the keys."""
        self._task = asyncio.create_task(_persistently(self._follow, f"the keys {self._source.pattern}"))

    async def close(self) -> None:
        """Follow no more; what is being handled goes on."""
        await end(self._task)

    async def _follow(self) -> None:
        async with aclosing(self._changes()) as changes:
            async for entry in changes:
                type_ = self._agent.handler.input
                if entry.operation and type_ is not None and not type_.takes_none:
                    continue  # its handler is for values only
                message = Message(f"$KV.{CONTEXT_BUCKET}.{entry.key}", "", b"", entry.value or b"")
                # In a task of its own, for closing the feed must not stop the handler.
                await asyncio.wait([self._take(message, partial(Agent.accept_entry, entry=entry))])

    def _changes(self) -> AsyncGenerator[Entry, None]:
        source = self._source
        if source.queue_group:
            return self._buckets.shared_changes(
                CONTEXT_BUCKET,
                source.pattern,
                source.queue_group,
                replay=source.on_init == "replay",
                patience=self._agent.limits.timeout + _GROUP_GRACE,
            )
        replay, self._opened = self._opened or source.on_init == "replay", True
        return self._buckets.changes(CONTEXT_BUCKET, source.pattern, replay=replay, seen=self._seen)


class Gate:
    """Turns an agent on and off as its condition says.

    `open_` and `shut` are awaited one at a time; `is_open` tells what was done last.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - a gate stands between all of these
        self,
        agent: Agent,
        condition: Condition,
        bus: Bus,
        buckets: Buckets,
        open_: Callable[[], Awaitable[None]],
        shut: Callable[[float], Awaitable[None]],
    ) -> None:
        self.is_open = False
        self._condition = condition
        self._agent = agent
        self._bus = bus
        self._buckets = buckets
        self._open = open_
        self._shut = shut
        self._wanted = condition.initial
        self._changed = asyncio.Event()
        self._sid: int | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Take the position that the condition has now, and follow it from here on."""
        condition = self._condition
        if isinstance(condition, KVCondition):
            self._decide_by_value(await self._buckets.get(CONTEXT_BUCKET, condition.key))
            following = _persistently(self._follow_key, f"the key {condition.key}")
            self._tasks.append(asyncio.create_task(following))
        else:
            self._sid = await self._bus.listen(condition.subject, self._on_message)
        await self._move()
        self._tasks.append(asyncio.create_task(self._keep_moving()))

    async def stop(self) -> None:
        """Follow no more; the agent stays as it is."""
        if self._sid is not None:
            await self._bus.quit(self._sid)
        await end(*self._tasks)

    async def _follow_key(self) -> None:
        assert isinstance(self._condition, KVCondition)
        async with aclosing(self._buckets.changes(CONTEXT_BUCKET, self._condition.key)) as changes:
            async for entry in changes:
                self._decide_by_value(None if entry.operation else entry.value or b"")

    def _decide_by_value(self, value: bytes | None) -> None:
        if value is None:
            self._want(self._condition.initial)
        else:
            self._decide(value.decode("utf-8", "replace"))

    def _on_message(self, message: Message) -> None:
        headers = codec.read_headers(message.head) if message.head else {}
        self._decide(codec.load_message(headers, message.body))

    def _decide(self, value: Any) -> None:  # noqa: ANN401 - what the predicate takes
        try:
            self._want(bool(self._condition.predicate(value)))
        except Exception:  # the author's predicate ends here, and the gate stays as it is
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
        if self._wanted == self.is_open:
            return
        self.is_open = self._wanted
        if self.is_open:
            await self._open()
        else:
            await self._shut(self._condition.drain_timeout)


async def _persistently(follow: Callable[[], Awaitable[None]], what: str) -> None:
    """Follow for ever: what fails while the server is away is tried again."""

    def failed(state: RetryCallState) -> None:
        log.warning("%s cannot be followed now: %s", what, state.outcome and state.outcome.exception())

    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(MeshError),
        wait=wait_random_exponential(multiplier=0.1, max=_LONGEST_PAUSE),
        before_sleep=failed,
    ):
        with attempt:
            await follow()
