"""Reply subjects of our own: one inbox subscription, one receiver a request."""

import asyncio
from itertools import count
from typing import Any, TypeVar

from openagentmesh.bus.client import Message, Receiver
from openagentmesh.bus.connection import Bus
from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.errors import MeshError, MeshTimeout

T = TypeVar("T")


def settle(future: asyncio.Future[T], result: T) -> None:
    """Give a future its result, unless somebody was faster or waits no more."""
    if not future.done():
        future.set_result(result)


def fail(future: asyncio.Future[Any], error: MeshError) -> None:
    """Give a future its error, unless somebody was faster or waits no more."""
    if not future.done():
        future.set_exception(error)


class Inbox:
    """Hands out reply subjects and passes what arrives on one to its receiver."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._prefix = f"_INBOX.{new_id()}."
        self._receivers: dict[str, Receiver] = {}
        self._numbers = count()

    async def open(self) -> None:
        """Subscribe; no reply can arrive before."""
        await self._bus.listen(f"{self._prefix}*", self._receive)

    def expect(self, receiver: Receiver) -> str:
        """A new reply subject; `receiver` is called with each message on it until `forget`."""
        subject = f"{self._prefix}{next(self._numbers):x}"
        self._receivers[subject] = receiver
        return subject

    def redirect(self, subject: str, receiver: Receiver) -> None:
        """Pass to another receiver what still arrives on a subject that was handed out."""
        self._receivers[subject] = receiver

    def forget(self, subject: str) -> None:
        """Pass nothing on for this subject any more."""
        self._receivers.pop(subject, None)

    async def request(self, subject: str, body: bytes = b"", *, timeout: float) -> Message:
        """Send and wait for the first answer, which may be NATS' 503; `timeout` in seconds.

        Raises:
            MeshTimeout: nothing came in time.

        """
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        reply = self.expect(lambda message: settle(answer, message))
        try:
            await self._bus.publish(subject, body, reply=reply)
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError as exc:
            raise MeshTimeout(f"No message on {subject} within {timeout:g}s") from exc
        finally:
            self.forget(reply)

    def _receive(self, message: Message) -> None:
        receiver = self._receivers.get(message.subject)
        if receiver is not None:
            receiver(message)
