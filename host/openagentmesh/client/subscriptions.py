"""Events: published by publishers and by `publish()`, received by subscriptions (protocol §7)."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final

from openagentmesh.agent.client_middleware import EVENT_TIMEOUT_S, ClientMiddlewares, ClientOperation
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import ConnectionFailed, MeshError, MeshTimeout, Overloaded
from openagentmesh.protocol.messages import MeshMessage
from openagentmesh.registry.directory import Directory, OwnContracts
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.nats_client import Message

log = logging.getLogger(__name__)

# How many events, and bytes, a subscriber may be behind.
_MAX_BUFFERED: Final = 65_536
_MAX_BYTES: Final = 64 * 1024 * 1024


class EventClient:
    """Publishes and subscribes."""

    def __init__(
        self,
        connection: Connection,
        directory: Directory,
        instance_id: str,
        own: OwnContracts,
        middlewares: ClientMiddlewares,
    ) -> None:
        self._connection = connection
        self._directory = directory
        self._instance_id = instance_id
        self._own = own
        self._middlewares = middlewares
        self._subscriptions: set[_Subscription] = set()

    def fail_all(self) -> None:
        """End all subscriptions: the connection is closed."""
        for subscription in self._subscriptions:
            subscription.fail(ConnectionFailed("The connection was closed."))

    async def publish(self, subject: str, payload: object, headers: Mapping[str, str] | None) -> None:
        """Publish one message."""
        if reason := subjects.invalid_subject(subject):
            raise ValueError(f"{subject!r} cannot be published to: {reason}.")
        kind, body = codec.encode_message(payload)
        if not self._middlewares:
            head = codec.publish_headers(self._instance_id, kind, headers)
            await self._connection.publish(subject, body, head)
            return
        event = ClientOperation("publish", subject, body=body, headers=dict(headers or {}))
        async with self._middlewares.around(event, EVENT_TIMEOUT_S):
            head = codec.publish_headers(self._instance_id, kind, event.headers)
            await self._connection.publish(subject, event.body, head)

    async def of_agent(self, name: str, timeout: float | None) -> AsyncGenerator[MeshMessage[Any], None]:
        """The events of one publisher until its run ends; its failure is raised."""
        contract = self._own(name) or await self._directory.contract(name)
        contract.check_verb("subscribe")
        async with aclosing(self.on_subject(subjects.events(name), timeout)) as messages:
            async for message in messages:
                yield message

    def of_channel(self, channel: str, timeout: float | None) -> AsyncGenerator[MeshMessage[Any], None]:
        """The events of all publishers of a channel; one that fails or ends does not end the others."""
        if reason := subjects.invalid_name(channel):
            raise ValueError(f"{channel!r} is not a channel: {reason}.")
        pattern = subjects.channel_events(channel)
        return self._received(_Subscription(pattern, endless=True, publishers_only=True), timeout)

    def on_subject(
        self, subject: str, timeout: float | None, *, endless: bool = False
    ) -> AsyncGenerator[MeshMessage[Any], None]:
        """The messages of a subject until an end frame; an error frame is raised.

        On a subject with wildcards, or with `endless`, frames of one publisher do not end the others.
        """
        has_many = endless or "*" in subject or ">" in subject
        return self._received(_Subscription(subject, endless=has_many), timeout)

    async def _received(
        self, subscription: "_Subscription", timeout: float | None
    ) -> AsyncGenerator[MeshMessage[Any], None]:
        sid = await self._connection.subscribe(subscription.subject, subscription.receive)
        self._subscriptions.add(subscription)
        try:
            while (received := await subscription.next(timeout)) is not None:
                subject, headers, body = received[0], received[1].headers, received[1].body
                if self._middlewares:
                    event = ClientOperation("receive", subject, body=body, headers=dict(headers))
                    if not await self._is_accepted(event):
                        continue
                    headers, body = event.headers, event.body
                yield MeshMessage(subject, codec.decode_message(headers, body), headers)
        finally:
            self._subscriptions.discard(subscription)
            if not self._connection.is_closed:
                await self._connection.unsubscribe(sid)

    async def _is_accepted(self, event: ClientOperation) -> bool:
        try:
            async with self._middlewares.around(event, EVENT_TIMEOUT_S):
                return True  # the subscriber's own work is outside of the middlewares
        except MeshError as exc:  # a rejected event does not end the subscription
            log.warning("event on %s rejected: %s", event.target, exc)
            return False


class _Subscription:
    """The messages that one subscriber has not read yet.

    With `endless`, one of many publishers that fails or ends does not end it; with `publishers_only`,
    messages that are no events are ignored.
    """

    def __init__(self, subject: str, *, endless: bool = False, publishers_only: bool = False) -> None:
        self.subject = subject
        self._endless = endless
        self._publishers_only = publishers_only
        self._messages: deque[Message] = deque()
        self._size = 0
        self._changed = asyncio.Event()
        self._error: MeshError | None = None
        self._ended = False

    def receive(self, message: Message) -> None:
        """Buffer one message; called from the read loop."""
        # Requests to the agents of a channel match its pattern, too.
        is_ignored = self._publishers_only and not subjects.publisher_of(message.subject)
        if is_ignored or self._error is not None:
            return
        if len(self._messages) >= _MAX_BUFFERED or self._size >= _MAX_BYTES:
            behind = f"{len(self._messages)} messages of {self._size} bytes behind"
            self.fail(Overloaded(f"The subscriber of {self.subject} is {behind}."))
            return
        self._messages.append(message)
        self._size += len(message.body)
        self._changed.set()

    def fail(self, error: MeshError) -> None:
        """End the subscription with an error, after the messages that have arrived."""
        self._error = self._error or error
        self._changed.set()

    async def next(self, timeout: float | None) -> tuple[str, codec.Reply] | None:
        """The subject and the frame of the next message with a body; None after the end frame."""
        try:
            async with asyncio.timeout(timeout):
                while not self._ended:
                    await self._wait()
                    message = self._messages.popleft()
                    self._size -= len(message.body)
                    frame = codec.decode_reply(message.head, message.body)
                    self._ended = frame.end and not self._endless
                    if frame.is_error_frame:
                        self._on_error(message.subject, frame)
                    elif frame.body:
                        return message.subject, frame
        except TimeoutError:
            raise MeshTimeout(
                f"No message on {self.subject} within {timeout}s",
                details={"subject": self.subject, "timeout": timeout},
            ) from None
        return None

    def _on_error(self, subject: str, frame: codec.Reply) -> None:
        error = codec.decode_error(frame.body)
        if not self._endless:
            raise error
        log.info("error on %s, the subscription continues: %s", subject, error)

    async def _wait(self) -> None:
        while not self._messages:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
