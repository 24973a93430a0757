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
from openagentmesh.serving.resources import Resources
from openagentmesh.transport.kv_watch import Version
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import cancel_and_wait, retry_forever

log = logging.getLogger(__name__)


class Gate:
    """Follows a condition and turns an agent on and off.

    A failure is logged, and retried with the next change. `activate` and `deactivate` are awaited one at a
    time; `deactivate` gets the seconds that running requests have.

    Attributes:
        is_open: whether the agent is on.
        subject: the subject that it follows; empty when it follows a key.
        last_message: the last message on that subject.
    """

    def __init__(
        self,
        agent: str,
        condition: Condition,
        resources: Resources,
        activate: Callable[[], Awaitable[None]],
        deactivate: Callable[[float], Awaitable[None]],
    ) -> None:
        self.is_open = False
        self.subject = condition.subject if isinstance(condition, SubjectCondition) else ""
        self.last_message: Message | None = None
        self._agent = agent
        self._condition = condition
        self._resources = resources
        self._activate = activate
        self._deactivate = deactivate
        self._wanted = condition.initial
        self._changed = asyncio.Event()
        self._sid: int | None = None
        self._seen: dict[str, Version] = {}
        self._moving = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, *, is_open: bool, previous: "Gate | None" = None) -> None:
        """Move to the current state of the condition, and follow it.

        The last message that the gate `previous` received on the same subject still counts.
        """
        condition, self.is_open = self._condition, is_open
        if isinstance(condition, KVCondition):
            entry = await self._resources.buckets.get_entry(CONTEXT_BUCKET, condition.key)
            if entry is not None:
                self._evaluate_value(entry.value)
                self._seen[condition.key] = (entry.revision, entry.created)  # so that its deletion is noticed
            following = retry_forever(self._follow_key, f"following the key {condition.key}")
            self._tasks.append(asyncio.create_task(following))
        else:
            if previous is not None and previous.subject == condition.subject and previous.last_message:
                self._on_message(previous.last_message)
            self._sid = await self._resources.connection.subscribe(condition.subject, self._on_message)
        await self._move()
        self._tasks.append(asyncio.create_task(self._keep_moving()))

    async def stop(self) -> None:
        """Stop following, once a move in progress is complete; the agent stays as it is."""
        if self._sid is not None:
            await self._resources.connection.unsubscribe(self._sid)
        async with self._moving:
            await cancel_and_wait(*self._tasks)

    async def _follow_key(self) -> None:
        assert isinstance(self._condition, KVCondition)
        changing = self._resources.buckets.changes(CONTEXT_BUCKET, self._condition.key, seen=self._seen)
        async with aclosing(changing) as changes:
            async for entry in changes:
                if entry.operation:  # deleted
                    self._set_wanted(self._condition.initial)
                else:
                    self._evaluate_value(entry.value)

    def _on_message(self, message: Message) -> None:
        frame = codec.decode_reply(message.head, message.body)
        if message.body and not frame.is_error_frame:
            self.last_message = message
            self._evaluate(codec.decode_message(frame.headers, message.body))

    def _evaluate_value(self, value: bytes | None) -> None:
        self._evaluate((value or b"").decode("utf-8", "replace"))

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
