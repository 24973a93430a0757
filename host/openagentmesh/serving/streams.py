"""One stream: chunks out with flow control on the host, chunks in on the caller."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

from openagentmesh.bus.client import Message
from openagentmesh.bus.connection import Bus
from openagentmesh.bus.requests import Inbox
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.codec import Request
from openagentmesh.protocol.errors import ChunkSequenceError, MeshError, Overloaded

# The most chunks that are under way to one reader that grants credit.
WINDOW: Final = 64
# A slow reader shows in time that it is still there, in seconds.
_GRANT_WITHIN: Final = 1.0
# A peer that knows no credit may send this far ahead of its reader.
_MOST_WAITING: Final = 65_536
# Without credit nothing makes a producer wait, so it makes way by itself this often.
_YIELD_EVERY: Final = 32


class ChunkWriter:
    """Sends the frames of one stream (protocol §7, credit of §10).

    `gone` is called once, from the read loop, when the reader is there no more.
    """

    def __init__(
        self, bus: Bus, inbox: Inbox, instance_id: str, request: Request, dump: Callable[[Any], bytes]
    ) -> None:
        self.subject = subjects.stream(request.request_id)
        self.seq = 0
        self.gone: Callable[[], object] = lambda: None
        self._bus = bus
        self._inbox = inbox
        self._instance_id = instance_id
        self._request_id = request.request_id
        self._dump = dump
        self._bounded = request.credit > 0
        self._credit = request.credit
        self._granted = asyncio.Event()
        self._reply = inbox.expect(self._receive)

    async def send(self, chunk: object) -> None:
        """Send one chunk; waits while the reader has not granted credit for it."""
        if not self._bounded:
            if self.seq % _YIELD_EVERY == 0:
                await asyncio.sleep(0)
        else:
            while self._credit <= 0:
                self._granted.clear()
                await self._granted.wait()
            self._credit -= 1
        head = codec.frame_headers(self._request_id, self._instance_id, self.seq, end=False)
        await self._bus.publish(self.subject, self._dump(chunk), head, self._reply)
        self.seq += 1

    async def end(self) -> None:
        """Send the end frame, which carries the count of chunks."""
        head = codec.frame_headers(self._request_id, self._instance_id, self.seq, end=True)
        await self._bus.publish(self.subject, b"", head)

    def close(self) -> None:
        """Listen to the reader no more."""
        self._inbox.forget(self._reply)

    def _receive(self, message: Message) -> None:
        credit = codec.read_credit(message.head)
        if credit:
            self._credit += credit
            self._granted.set()
        else:
            self.close()
            self.gone()


class ChunkReader:
    """Puts the frames of one stream in order for its caller (protocol §7)."""

    def __init__(self, publish: Callable[..., Awaitable[None]], agent: str, request_id: str) -> None:
        self.ended = False
        self._publish = publish
        self._agent = agent
        self._request_id = request_id
        self._frames: deque[codec.Answer] = deque()
        self._arrived = asyncio.Event()
        self._failed: MeshError | None = None
        self._expected = 0
        self._unacknowledged = 0
        self._granted_at = time.monotonic()
        self._reply = ""

    def receive(self, message: Message) -> None:
        """Take one frame; called from the read loop."""
        answer = codec.read_answer(message.head, message.body)
        if message.reply:
            self._reply = message.reply
        if len(self._frames) >= _MOST_WAITING:
            self.fail(Overloaded(f"The reader of '{self._agent}' is {_MOST_WAITING} chunks behind."))
            return
        self._frames.append(answer)
        self._arrived.set()

    def fail(self, error: MeshError) -> None:
        """End the stream with an error, after what has arrived."""
        self._failed = self._failed or error
        self._arrived.set()

    async def next(self) -> codec.Answer:
        """The next frame: a chunk, the end, an error or NATS' 503.

        Raises:
            ChunkSequenceError: a chunk is missing.
            MeshError: the stream failed otherwise.

        """
        while not self._frames:
            if self._failed is not None:
                raise self._failed
            self._arrived.clear()
            await self._arrived.wait()
        frame = self._frames.popleft()
        self.ended = frame.end or frame.nobody
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

    async def consumed(self) -> None:
        """Grant the host credit for what was taken: half a window at a time, or every second."""
        self._unacknowledged += 1
        now = time.monotonic()
        slow = now - self._granted_at > _GRANT_WITHIN
        if self._reply and (slow or self._unacknowledged >= WINDOW // 2):
            self._granted_at = now
            granted, self._unacknowledged = self._unacknowledged, 0
            await self._publish(self._reply, b"", codec.credit_headers(granted))

    async def abandon(self) -> None:
        """Tell the host to stop, when the stream did not end by itself."""
        if not self.ended and self._reply:
            await self._publish(self._reply, b"", codec.credit_headers(0))
