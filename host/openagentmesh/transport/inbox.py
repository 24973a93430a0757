"""Reply subjects of our own: one inbox subscription, one receiver a request."""

import asyncio
from functools import partial
from itertools import count
from typing import Any, Final, TypeVar

from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.errors import MeshError, MeshTimeout
from openagentmesh.transport.connection import Bus
from openagentmesh.transport.nats_client import Message, Receiver

T = TypeVar("T")
# What reached nobody while all return to a restarted server is sent again after this many seconds.
RETURNING: Final = 0.05


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

    async def deliver(self, subject: str, body: bytes, head: bytes) -> None:
        """Send an answer; again while whoever waits for it may not be back from the server's absence."""
        while self._bus.unsettled:
            await self._bus.until_connected()
            nobody: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
            reply = self.expect(partial(settle, nobody))
            try:
                await self._bus.publish(subject, body, head, reply)
                await self._bus.flush()  # NATS' word that nobody is there comes before it
            finally:
                self.forget(reply)
            if not nobody.done():
                return
            await asyncio.sleep(RETURNING)
        await self._bus.publish(subject, body, head)

    def _receive(self, message: Message) -> None:
        receiver = self._receivers.get(message.subject)
        if receiver is not None:
            receiver(message)
