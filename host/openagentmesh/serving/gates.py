"""The gate of an agent with a condition: turns it on and off."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from openagentmesh.agent.sources import Condition, KVCondition, SubjectCondition
from openagentmesh.protocol import codec
from openagentmesh.protocol.errors import MeshError
from openagentmesh.protocol.subjects import CONTEXT_BUCKET
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.kv import KVBuckets
from openagentmesh.transport.kv_watch import Version
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import cancel_and_wait, retry_forever

log = logging.getLogger(__name__)


class Gate:
    """Follows a condition and turns an agent on and off.

    A failure is logged, and tried again with the next change.

    Args:
        agent: the agent's name, for the log.
        condition: the condition.
        connection: the connection.
        buckets: the KV buckets.
        activate: turns it on; awaited one at a time with `deactivate`.
        deactivate: turns it off; gets the seconds that running requests have.

    Attributes:
        is_open: the result of the last move.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - everything that it connects
        self,
        agent: str,
        condition: Condition,
        connection: Connection,
        buckets: KVBuckets,
        activate: Callable[[], Awaitable[None]],
        deactivate: Callable[[float], Awaitable[None]],
    ) -> None:
        self.is_open = False
        self._agent = agent
        self._condition = condition
        self._connection = connection
        self._buckets = buckets
        self._activate = activate
        self._deactivate = deactivate
        self._wanted = condition.initial
        self._changed = asyncio.Event()
        self._sid: int | None = None
        self._seen: dict[str, Version] = {}
        self._last_message: Message | None = None
        self._moving = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, *, is_open: bool, previous: "Gate | None" = None) -> None:
        """Move to the current state of the condition, and follow it.

        The last message that the gate `previous` received on the same subject still counts.
        """
        condition, self.is_open = self._condition, is_open
        if isinstance(condition, KVCondition):
            entry = await self._buckets.get_entry(CONTEXT_BUCKET, condition.key)
            self._on_value(None if entry is None else entry.value or b"")
            if entry is not None:  # so that its deletion is noticed
                self._seen[condition.key] = (entry.revision, entry.created)
            following = retry_forever(self._follow_key, f"following the key {condition.key}")
            self._tasks.append(asyncio.create_task(following))
        else:
            if previous is not None and previous.subject == condition.subject and previous.last_message:
                self._on_message(previous.last_message)
            self._sid = await self._connection.subscribe(condition.subject, self._on_message)
        await self._move()
        self._tasks.append(asyncio.create_task(self._keep_moving()))

    @property
    def subject(self) -> str:
        """The subject that it follows; empty when it follows a key."""
        return self._condition.subject if isinstance(self._condition, SubjectCondition) else ""

    @property
    def last_message(self) -> Message | None:
        """The last message on the condition's subject."""
        return self._last_message

    async def stop(self) -> None:
        """Stop following, once a move in progress is complete; the agent stays as it is."""
        if self._sid is not None:
            await self._connection.unsubscribe(self._sid)
        async with self._moving:
            await cancel_and_wait(*self._tasks)

    async def _follow_key(self) -> None:
        assert isinstance(self._condition, KVCondition)
        changing = self._buckets.changes(CONTEXT_BUCKET, self._condition.key, seen=self._seen)
        async with aclosing(changing) as changes:
            async for entry in changes:
                self._on_value(None if entry.operation else entry.value or b"")

    def _on_value(self, value: bytes | None) -> None:
        if value is None:
            self._set_wanted(self._condition.initial)
        else:
            self._evaluate(value.decode("utf-8", "replace"))

    def _on_message(self, message: Message) -> None:
        frame = codec.decode_reply(message.head, message.body)
        if message.body and not frame.is_error_frame:
            self._last_message = message
            self._evaluate(codec.decode_message(frame.headers, message.body))

    def _evaluate(self, value: Any) -> None:  # noqa: ANN401 - the predicate's argument
        try:
            self._set_wanted(bool(self._condition.predicate(value)))
        # The author's predicate may raise anything; the gate stays as it is.
        except BaseException:
            log.exception("%s: condition failed on %.200r; the state is unchanged", self._agent, value)

    def _set_wanted(self, wanted: bool) -> None:  # noqa: FBT001 - the state itself
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
                await (self._activate() if wanted else self._deactivate(self._condition.drain_timeout))
                self.is_open = wanted
            # The move ends here; the next one may succeed.
            except Exception as exc:
                action, traceback = "activated" if wanted else "deactivated", not isinstance(exc, MeshError)
                log.warning("%s could not be %s: %s", self._agent, action, exc, exc_info=traceback)
