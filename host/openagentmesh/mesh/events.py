"""Events: what publishers emit and anybody publishes (protocol §7)."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final

from openagentmesh.bus.client import Message
from openagentmesh.bus.connection import Bus
from openagentmesh.bus.requests import fail, settle
from openagentmesh.mesh.discovery import Directory
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.contract import AgentContract
from openagentmesh.protocol.errors import ConnectionFailed, MeshError, MeshTimeout, Overloaded
from openagentmesh.protocol.messages import MeshMessage

log = logging.getLogger(__name__)

# A subscriber may be this many events behind.
_MOST_WAITING: Final = 65_536


class Events:
    """Publishes and subscribes over one bus; `own` gives the contract of an agent served here."""

    def __init__(
        self, bus: Bus, directory: Directory, instance_id: str, own: Callable[[str], AgentContract | None]
    ) -> None:
        self._bus = bus
        self._directory = directory
        self._instance_id = instance_id
        self._own = own
        self._feeds: set[_Feed] = set()

    def fail_all(self) -> None:
        """Let nobody wait for events that cannot come any more."""
        for feed in self._feeds:
            feed.fail(ConnectionFailed("The connection was closed."))

    async def publish(self, subject: str, payload: object, headers: Mapping[str, str] | None) -> None:
        """Send one message to whoever listens to `subject`."""
        if subjects.invalid_pattern(subject) or "*" in subject or ">" in subject:
            raise ValueError(
                f"Nothing can be published on {subject!r}: "
                "a subject is words joined by single dots, without wildcards and blanks."
            )
        head, body = codec.publish_headers(self._instance_id, payload, headers)
        await self._bus.publish(subject, body, head)

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
        async with aclosing(self._frames(subjects.channel_events(channel), timeout)) as frames:
            async for subject, frame in frames:
                # Requests to the agents of the channel pass here as well.
                publisher = subjects.publisher_of(subject)
                if publisher and frame.error:
                    log.info("%s failed, the others go on: %s", publisher, codec.read_error(frame.body))
                elif publisher and frame.body:
                    yield _message(subject, frame)

    async def on_subject(self, subject: str, timeout: float | None) -> AsyncGenerator[MeshMessage[Any], None]:
        """What comes on a subject, until a frame says that it is the last; an error is raised."""
        async with aclosing(self._frames(subject, timeout)) as frames:
            async for found, frame in frames:
                if frame.error:
                    raise codec.read_error(frame.body)
                if frame.body:
                    yield _message(found, frame)
                if frame.end:
                    return

    async def _frames(
        self, subject: str, timeout: float | None
    ) -> AsyncGenerator[tuple[str, codec.Answer], None]:
        feed = _Feed(subject)
        self._feeds.add(feed)
        sid = await self._bus.listen(subject, feed.receive)
        try:
            while True:
                message = await feed.next(timeout)
                yield message.subject, codec.read_answer(message.head, message.body)
        finally:
            self._feeds.discard(feed)
            if not self._bus.is_closed:
                await self._bus.quit(sid)


def _message(subject: str, frame: codec.Answer) -> MeshMessage[Any]:
    return MeshMessage(subject, codec.load_message(frame.headers, frame.body), frame.headers)


class _Feed:
    """The messages of one subscriber that it has not taken yet."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._messages: deque[Message] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._failed: MeshError | None = None

    def receive(self, message: Message) -> None:
        """Keep one message; called from the read loop."""
        if len(self._messages) >= _MOST_WAITING:
            self.fail(Overloaded(f"The subscriber of {self._subject} is {_MOST_WAITING} messages behind."))
            return
        self._messages.append(message)
        if self._waiting is not None:
            settle(self._waiting, None)

    def fail(self, error: MeshError) -> None:
        """End the feed with an error, after what has arrived."""
        self._failed = self._failed or error
        if self._waiting is not None:
            fail(self._waiting, self._failed)

    async def next(self, timeout: float | None) -> Message:
        """The next message.

        Raises:
            MeshTimeout: none came within `timeout` seconds.

        """
        if not self._messages:
            if self._failed is not None:
                raise self._failed
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout):
                    await self._waiting
            except TimeoutError:
                raise MeshTimeout(
                    f"No message on {self._subject} within {timeout}s",
                    details={"subject": self._subject, "timeout": timeout},
                ) from None
        return self._messages.popleft()
