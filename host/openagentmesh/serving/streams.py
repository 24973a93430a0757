"""One stream: chunks out with flow control on the host, chunks in on the caller."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

from openagentmesh.agent.client_middleware import EVENT_PATIENCE, Border, Outgoing
from openagentmesh.protocol import codec
from openagentmesh.protocol.errors import ChunkSequenceError, MeshError, Overloaded
from openagentmesh.protocol.messages import Usage
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.nats_client import Message

# The most chunks that are under way to one reader that grants credit.
WINDOW: Final = 64
# A slow reader shows in time that it is still there, in seconds.
_GRANT_WITHIN: Final = 1.0
# A peer that knows no credit may send this far ahead of its reader.
_MOST_WAITING: Final = 65_536
# Without credit nothing makes a producer wait, so it makes way by itself this often.
_YIELD_EVERY: Final = 32


class FrameWriter:
    """Sends the frames of one stream, or of one publisher's run (protocol §7).

    Args:
        connection: the connection.
        subject: where the frames go.
        start: what their headers begin with, see `codec.frame_prefix`.
        dump: makes a chunk into bytes.

    """

    def __init__(
        self, connection: Connection, subject: str, start: bytes, dump: Callable[[Any], bytes]
    ) -> None:
        self.seq = 0
        self._connection = connection
        self._subject = subject
        self._start = start
        self._dump = dump
        self._reply = ""

    async def send(self, chunk: object) -> None:
        """Send one chunk."""
        await self._make_way()
        head = codec.frame_headers(self._start, self.seq)
        await self._connection.publish(self._subject, self._dump(chunk), head, self._reply)
        self.seq += 1

    async def end(self, usage: Usage | None = None) -> None:
        """Send the end frame, which carries the count of chunks."""
        await self._connection.publish(self._subject, b"", codec.end_headers(self._start, self.seq, usage))

    async def _make_way(self) -> None:
        if self.seq % _YIELD_EVERY == 0:
            await asyncio.sleep(0)


class EventWriter(FrameWriter):
    """Sends the events of one publisher's run, each across the plugins' border."""

    def __init__(
        self, connection: Connection, subject: str, start: bytes, dump: Callable[[Any], bytes], border: Border
    ) -> None:
        super().__init__(connection, subject, start, dump)
        self._border = border

    async def send(self, chunk: object) -> None:
        """Send one event."""
        if not self._border:
            await super().send(chunk)
            return
        await self._make_way()
        event = Outgoing("publish", self._subject, body=self._dump(chunk))
        async with self._border.passing(event, EVENT_PATIENCE) as outgoing:
            head = codec.frame_headers(self._start, self.seq, outgoing.headers)
            await self._connection.publish(self._subject, outgoing.body, head)
            self.seq += 1


class ChunkWriter(FrameWriter):
    """Sends the frames of one stream as far as its reader grants credit (§10).

    Without `credit` there is no window.

    Attributes:
        on_wait: called when a chunk has to wait for its reader, or for the server.
        on_sent: called when a chunk has been sent.
        on_gone: called once, from the read loop, when the reader is there no more; with True when
            it waited in vain.

    """

    def __init__(  # noqa: PLR0913, PLR0917 - as many as a stream has parts
        self,
        connection: Connection,
        inbox: Inbox,
        subject: str,
        start: bytes,
        dump: Callable[[Any], bytes],
        credit: int,
    ) -> None:
        super().__init__(connection, subject, start, dump)
        self.on_wait: Callable[[], object] = lambda: None
        self.on_sent: Callable[[], object] = lambda: None
        self.on_gone: Callable[[bool], object] = lambda _late: None
        self._inbox = inbox
        self._credit = credit if credit > 0 else math.inf
        self._granted = asyncio.Event()
        self._reply = inbox.register(self._receive)

    async def send(self, chunk: object) -> None:
        """Send one chunk; waits while the reader has not granted credit for it."""
        if self._credit <= 0 or self._connection.is_recovering:
            self.on_wait()
            await self._until_welcome()
        self._credit -= 1
        await super().send(chunk)
        self.on_sent()

    async def _until_welcome(self) -> None:
        while self._credit <= 0:
            self._granted.clear()
            await self._granted.wait()
        if self._connection.is_recovering:
            await self._connection.wait_recovered()  # its reader may not be back yet

    async def end(self, usage: Usage | None = None) -> None:
        """Send the end frame, which carries the count of chunks."""
        if self._connection.is_recovering:
            await self._connection.wait_recovered()
        await super().end(usage)

    def close(self) -> None:
        """Listen to the reader no more."""
        self._inbox.unregister(self._reply)

    def _receive(self, message: Message) -> None:
        credit = codec.decode_credit(message.head)
        if credit:
            self._credit += credit
            self._granted.set()
        elif not (self._connection.is_recovering and codec.decode_reply(message.head, b"").no_responders):
            self.close()
            self.on_gone(codec.is_timeout_cancel(message.head))


class NoWriter(ChunkWriter):
    """Takes the chunks of a stream that nobody reads."""

    async def send(self, chunk: object) -> None:  # noqa: ARG002 - nobody reads it
        """Make way for others, as every writer does now and then."""
        await self._make_way()
        self.seq += 1
        self.on_sent()

    async def end(self, usage: Usage | None = None) -> None:
        """There is nobody to tell."""


class ChunkReader:
    """Puts the frames of one stream in order for its caller (protocol §7).

    Args:
        publish: sends a message.
        agent: whose stream it is, for messages.
        request_id: the request's id, for messages.
        timeout: seconds to wait for the next frame; None for ever.
        total: seconds from now in which all must have come; None for ever.

    """

    def __init__(
        self,
        publish: Callable[..., Awaitable[None]],
        agent: str,
        request_id: str,
        timeout: float | None = None,
        total: float | None = None,
    ) -> None:
        self.timeout = timeout
        self.ended = False
        self.on_instance: Callable[[str, str], None] = lambda _instance, _control: None
        self._publish = publish
        self._agent = agent
        self._request_id = request_id
        self._last = math.inf if total is None else asyncio.get_running_loop().time() + total
        self._frames: deque[codec.Reply] = deque()
        self._arrived = asyncio.Event()
        self._failed: MeshError | None = None
        self._expected = 0
        self._unacknowledged = 0
        self._granted_at = time.monotonic()
        self._reply = ""

    @property
    def is_over(self) -> bool:
        """Whether the time for all of it has passed."""
        return self._last < math.inf and asyncio.get_running_loop().time() >= self._last

    def receive(self, message: Message) -> None:
        """Take one frame; called from the read loop."""
        frame = codec.decode_frame(message.head, message.body)
        # Whoever sends chunks hears of credit and cancel; till then, whoever accepted it.
        if message.reply and message.reply != self._reply and not (frame.accepted and self._reply):
            if not frame.accepted:
                self._reply = message.reply
            self.on_instance(frame.instance, message.reply)
        if frame.accepted:
            return
        if self._failed is not None:
            return  # what came before it is still read, nothing after a gap
        if len(self._frames) >= _MOST_WAITING:
            self.fail(Overloaded(f"The reader of '{self._agent}' is {_MOST_WAITING} chunks behind."))
            return
        self._frames.append(frame)
        self._arrived.set()

    def fail(self, error: MeshError) -> None:
        """End the stream with an error, after what has arrived."""
        self._failed = self._failed or error
        self._arrived.set()

    async def next(self) -> codec.Reply:
        """The next frame: a chunk, the end, an error or NATS' 503.

        Raises:
            ChunkSequenceError: a chunk is missing.
            TimeoutError: it did not come in time.
            MeshError: the stream failed otherwise.

        """
        if not self._frames:
            await self._wait()
        elif self.is_over:
            raise TimeoutError
        frame = self._frames.popleft()
        self.ended = frame.end or frame.error
        if frame.seq is not None and not frame.error:
            if frame.seq != self._expected:
                raise ChunkSequenceError(
                    f"Agent '{self._agent}' sent chunk {frame.seq}, expected was {self._expected}: "
                    "something between was lost.",
                    agent=self._agent,
                    request_id=self._request_id,
                    details={"expected_seq": self._expected, "got_seq": frame.seq},
                )
            self._expected += 1
        return frame

    async def _wait(self) -> None:
        left = self._last - asyncio.get_running_loop().time()
        async with asyncio.timeout(min(left, math.inf if self.timeout is None else self.timeout)):
            while not self._frames:
                if self._failed is not None:
                    raise self._failed
                self._arrived.clear()
                await self._arrived.wait()

    def took(self) -> bool:
        """Count a chunk as taken; tells whether to `grant`: half a window at a time, or every second."""
        self._unacknowledged += 1
        slow = time.monotonic() - self._granted_at > _GRANT_WITHIN
        return bool(self._reply) and (slow or self._unacknowledged >= WINDOW // 2)

    async def grant(self) -> None:
        """Grant the host credit for what was taken."""
        self._granted_at = time.monotonic()
        granted, self._unacknowledged = self._unacknowledged, 0
        await self._publish(self._reply, b"", codec.credit_headers(granted))
