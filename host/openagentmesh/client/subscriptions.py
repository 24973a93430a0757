"""Events: what publishers emit and anybody publishes (protocol §7)."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

from openagentmesh.agent.client_middleware import EVENT_PATIENCE, Border, Outgoing
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.contract import AgentContract
from openagentmesh.protocol.errors import ConnectionFailed, MeshError, MeshTimeout, Overloaded
from openagentmesh.protocol.messages import MeshMessage
from openagentmesh.registry.directory import Directory
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import set_result
from openagentmesh.transport.nats_client import Message

log = logging.getLogger(__name__)

# A subscriber may be this many events behind, and this many bytes.
_MOST_WAITING: Final = 65_536
_MOST_BYTES: Final = 64 * 1024 * 1024


class Events:
    """Publishes and subscribes over one connection; `own` gives the contract of an agent served here."""

    def __init__(
        self,
        connection: Connection,
        directory: Directory,
        instance_id: str,
        own: Callable[[str], AgentContract | None],
        border: Border,
    ) -> None:
        self._connection = connection
        self._directory = directory
        self._instance_id = instance_id
        self._own = own
        self._border = border
        self._feeds: set[_Feed] = set()

    def fail_all(self) -> None:
        """Let nobody wait for events that cannot come any more."""
        for feed in self._feeds:
            feed.fail(ConnectionFailed("The connection was closed."))

    async def publish(self, subject: str, payload: object, headers: Mapping[str, str] | None) -> None:
        """Send one message to whoever listens to `subject`."""
        if why := subjects.invalid_subject(subject):
            raise ValueError(f"Nothing can be published on {subject!r}: {why}.")
        kind, body = codec.encode_message(payload)
        if not self._border:
            await self._connection.publish(
                subject, body, codec.publish_headers(self._instance_id, kind, headers)
            )
            return
        event = Outgoing("publish", subject, body=body, headers=dict(headers or {}))
        async with self._border.passing(event, EVENT_PATIENCE) as outgoing:
            head = codec.publish_headers(self._instance_id, kind, outgoing.headers)
            await self._connection.publish(subject, outgoing.body, head)

    async def of_agent(self, name: str, timeout: float | None) -> AsyncGenerator[MeshMessage[Any], None]:
        """The events of one publisher until it ends; its failure is raised.

        Raises:
            NotFound: no agent has this name.
            InvocationMismatch: it is no publisher.

        """
        contract = self._own(name) or await self._directory.contract(name)
        contract.check_verb("subscribe")
        async with aclosing(self.on_subject(subjects.events(name), timeout)) as messages:
            async for message in messages:
                yield message

    async def of_channel(self, channel: str, timeout: float | None) -> AsyncGenerator[MeshMessage[Any], None]:
        """The events of all publishers of a channel, whoever of them fails or ends."""
        if why := subjects.invalid_name(channel):
            raise ValueError(f"{channel!r} is no channel: {why}.")
        every = subjects.channel_events(channel)
        async with self._listening(_Feed(every, endless=True, publishers_only=True)) as feed:
            while (message := await self._next(feed, timeout)) is not None:
                yield message

    async def on_subject(
        self, subject: str, timeout: float | None, *, endless: bool = False
    ) -> AsyncGenerator[MeshMessage[Any], None]:
        """What comes on a subject, until a frame says that it is the last; an error is raised.

        On a subject with wildcards many emit, and none of them ends it for the others; nobody
        does with `endless`.
        """
        many = endless or "*" in subject or ">" in subject
        async with self._listening(_Feed(subject, endless=many)) as feed:
            while (message := await self._next(feed, timeout)) is not None:
                yield message

    async def _next(self, feed: "_Feed", timeout: float | None) -> MeshMessage[Any] | None:
        while (taken := await feed.next(timeout)) is not None:
            subject, frame = taken
            if not self._border:
                return _read(subject, frame.headers, frame.body)
            event = Outgoing("receive", subject, body=frame.body, headers=dict(frame.headers))
            try:
                async with self._border.passing(event, EVENT_PATIENCE):
                    pass  # what its receiver does with it is not ours to bracket
            except MeshError as exc:  # one event that a plugin refuses is no end of the others
                log.warning("an event on %s was refused: %s", subject, exc)
            else:
                return _read(subject, event.headers, event.body)
        return None

    @asynccontextmanager
    async def _listening(self, feed: "_Feed") -> AsyncIterator["_Feed"]:
        sid = await self._connection.subscribe(feed.subject, feed.receive)
        self._feeds.add(feed)
        try:
            yield feed
        finally:
            self._feeds.discard(feed)
            if not self._connection.is_closed:
                await self._connection.unsubscribe(sid)


def _read(subject: str, headers: Mapping[str, str], body: bytes) -> MeshMessage[Any]:
    return MeshMessage(subject, codec.decode_message(headers, body), headers)


class _Feed:
    """The messages that one subscriber has not taken yet.

    An `endless` feed goes on whoever of many ends or fails; one of `publishers_only` has their
    events and nothing else that comes on the same subjects.
    """

    def __init__(self, subject: str, *, endless: bool = False, publishers_only: bool = False) -> None:
        self.subject = subject
        self._endless = endless
        self._publishers_only = publishers_only
        self._messages: deque[Message] = deque()
        self._size = 0
        self._waiting: asyncio.Future[None] | None = None
        self._failed: MeshError | None = None
        self._ended = False

    def receive(self, message: Message) -> None:
        """Keep one message; called from the read loop."""
        # Requests to the agents of a channel pass where its events do.
        unwanted = self._publishers_only and not subjects.publisher_of(message.subject)
        if unwanted or self._failed is not None:
            return
        if len(self._messages) >= _MOST_WAITING or self._size >= _MOST_BYTES:
            behind = f"{len(self._messages)} messages of {self._size} bytes behind"
            self.fail(Overloaded(f"The subscriber of {self.subject} is {behind}."))
            return
        self._messages.append(message)
        self._size += len(message.body)
        if self._waiting is not None:
            set_result(self._waiting, None)

    def fail(self, error: MeshError) -> None:
        """End the feed with an error, after what has arrived."""
        self._failed = self._failed or error
        if self._waiting is not None:
            set_result(self._waiting, None)

    async def next(self, timeout: float | None) -> tuple[str, codec.Reply] | None:
        """The next message that carries something, and its subject; None when there will be no more.

        Raises:
            MeshTimeout: there is none within `timeout` seconds.
            MeshError: the publisher failed, or the feed did.

        """
        try:
            async with asyncio.timeout(timeout):
                while not self._ended:
                    await self._until_any()
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
        log.info("an error on %s, the others go on: %s", subject, error)

    async def _until_any(self) -> None:
        while not self._messages:
            if self._failed is not None:
                raise self._failed
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
