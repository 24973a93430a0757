"""Reply subjects: one inbox subscription, one callback per request."""

import asyncio
from functools import partial
from itertools import count
from typing import Any, Final, TypeVar

from openagentmesh.protocol import codec
from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.errors import MeshError, MeshTimeout
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.nats_client import Message, MessageCallback

T = TypeVar("T")
# While clients reconnect to a restarted server, a message without responders is sent again after this time.
RECOVERY_RETRY_S: Final = 0.05


def set_result(future: asyncio.Future[T], result: T) -> None:
    """Set a future's result, unless it is done."""
    if not future.done():
        future.set_result(result)


def set_exception(future: asyncio.Future[Any], error: MeshError) -> None:
    """Set a future's exception, unless it is done."""
    if not future.done():
        future.set_exception(error)


class Inbox:
    """Hands out reply subjects and passes each message on one to its callback."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._prefix = f"_INBOX.{new_id()}."
        self._callbacks: dict[str, MessageCallback] = {}
        self._numbers = count()

    async def open(self) -> None:
        """Subscribe; no reply arrives before."""
        await self._connection.subscribe(f"{self._prefix}*", self._dispatch)

    def register(self, callback: MessageCallback) -> str:
        """A new reply subject; `callback` is called with each message on it until `unregister`."""
        subject = f"{self._prefix}{next(self._numbers):x}"
        self._callbacks[subject] = callback
        return subject

    def replace(self, subject: str, callback: MessageCallback) -> None:
        """Replace the callback of a reply subject."""
        self._callbacks[subject] = callback

    def unregister(self, subject: str) -> None:
        """Ignore further messages on a reply subject."""
        self._callbacks.pop(subject, None)

    async def request(self, subject: str, body: bytes = b"", *, timeout: float) -> Message:
        """Publish and return the first reply, maybe NATS' 503; raises MeshTimeout after `timeout` seconds."""
        found: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        reply = self.register(partial(set_result, found))
        try:
            await self._connection.publish(subject, body, reply=reply)
            async with asyncio.timeout(timeout):
                return await found
        except TimeoutError as exc:
            raise MeshTimeout(f"No message on {subject} within {timeout:g}s") from exc
        finally:
            self.unregister(reply)

    async def has_responders(self, subject: str, body: bytes = b"", head: bytes = b"") -> bool:
        """Publish and flush; False when NATS answers that the subject has no subscription.

        True while the server is unreachable: the message is then buffered.
        """
        replies = list[Message]()
        reply = self.register(replies.append)
        try:
            await self._connection.publish(subject, body, head, reply)
            if self._connection.connected:
                await self._connection.flush()  # a 503 arrives before its PONG
        finally:
            self.unregister(reply)
        return not any(codec.is_no_responders(message.head) for message in replies)

    async def deliver(self, subject: str, body: bytes, head: bytes) -> None:
        """Publish an answer; while clients reconnect to a restarted server, until it has a receiver."""
        while self._connection.is_recovering:
            await self._connection.wait_connected()
            if await self.has_responders(subject, body, head):
                return
            await asyncio.sleep(RECOVERY_RETRY_S)
        await self._connection.publish(subject, body, head)

    def _dispatch(self, message: Message) -> None:
        if callback := self._callbacks.get(message.subject):
            callback(message)
