"""One stream: chunks out with flow control on the host, chunks in on the caller."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

from openagentmesh.agent.client_middleware import EVENT_TIMEOUT_S, ClientOperation
from openagentmesh.protocol import codec
from openagentmesh.protocol.codec import Request
from openagentmesh.protocol.errors import ChunkSequenceError, MeshError, Overloaded
from openagentmesh.protocol.messages import Usage
from openagentmesh.serving.deadline import RequestDeadline
from openagentmesh.serving.resources import Resources
from openagentmesh.transport.nats_client import Message

# Chunks that may be on their way to one reader that grants credit.
WINDOW: Final = 64
# A slow reader grants credit at least this often, so that the host knows that it reads.
_MAX_GRANT_INTERVAL_S: Final = 1.0
# How far a sender that needs no credit may be ahead of its reader.
_MAX_BUFFERED: Final = 65_536
# A producer that needs no credit never waits, so it yields to the event loop this often.
_YIELD_EVERY: Final = 32

Encode = Callable[[Any], bytes]


class FrameWriter:
    """Sends the frames of one stream, or of one publisher's run (protocol §7).

    `seq` is the number of the next frame; a publisher's frames have no request id.
    """

    def __init__(self, resources: Resources, subject: str, request_id: str, encode: Encode) -> None:
        self.seq = 0
        self._connection = resources.connection
        self._subject = subject
        self._prefix = codec.frame_prefix(request_id, resources.instance_id)
        self._encode = encode
        self._reply = ""

    async def send(self, chunk: object) -> None:
        """Send one chunk."""
        await self._yield_to_loop()
        head = codec.frame_headers(self._prefix, self.seq)
        await self._connection.publish(self._subject, self._encode(chunk), head, self._reply)
        self.seq += 1

    async def end(self, usage: Usage | None = None) -> None:
        """Send the end frame, which carries the number of chunks."""
        head = codec.end_headers(self._prefix, self.seq, usage)
        await self._connection.publish(self._subject, b"", head)

    async def _yield_to_loop(self) -> None:
        if self.seq % _YIELD_EVERY == 0:
            await asyncio.sleep(0)


class EventWriter(FrameWriter):
    """Sends the events of one publisher's run, each within the client middlewares."""

    def __init__(self, resources: Resources, subject: str, encode: Encode, seq: int) -> None:
        super().__init__(resources, subject, "", encode)
        self.seq = seq
        self._middlewares = resources.middlewares

    async def send(self, chunk: object) -> None:
        """Send one event."""
        if not self._middlewares:
            await super().send(chunk)
            return
        await self._yield_to_loop()
        event = ClientOperation("publish", self._subject, body=self._encode(chunk))
        async with self._middlewares.around(event, EVENT_TIMEOUT_S):
            head = codec.frame_headers(self._prefix, self.seq, event.headers)
            await self._connection.publish(self._subject, event.body, head)
            self.seq += 1


class ChunkWriter(FrameWriter):
    """Sends the frames of one stream, as many as its reader grants credit for (protocol §10).

    A request that grants no credit has no window. Each chunk restarts the deadline.
    """

    def __init__(
        self, resources: Resources, subject: str, request: Request, encode: Encode, deadline: RequestDeadline
    ) -> None:
        super().__init__(resources, subject, request.request_id, encode)
        self._deadline = deadline
        self._inbox = resources.inbox
        self._credit = request.credit if request.credit > 0 else math.inf
        self._granted = asyncio.Event()
        self._reply = resources.inbox.register(self._receive)

    async def send(self, chunk: object) -> None:
        """Send one chunk; waits until the reader has granted credit for it."""
        if self._credit <= 0 or self._connection.is_recovering:
            self._deadline.extend()
            await self._wait_for_reader()
        self._credit -= 1
        await super().send(chunk)
        self._deadline.restart()

    async def _wait_for_reader(self) -> None:
        while self._credit <= 0:
            self._granted.clear()
            await self._granted.wait()
        if self._connection.is_recovering:
            await self._connection.wait_recovered()  # the reader may not have reconnected yet

    async def end(self, usage: Usage | None = None) -> None:
        """Send the end frame, which carries the number of chunks."""
        if self._connection.is_recovering:
            await self._connection.wait_recovered()
        await super().end(usage)

    def close(self) -> None:
        """Ignore the reader from now on."""
        self._inbox.unregister(self._reply)

    def _receive(self, message: Message) -> None:
        credit = codec.decode_credit(message.head)
        if credit:
            self._credit += credit
            self._granted.set()
        elif not (self._connection.is_recovering and codec.is_no_responders(message.head)):
            self.close()
            self._deadline.abandon(codec.is_timeout_cancel(message.head))


class DiscardingWriter(ChunkWriter):
    """Discards the chunks of a stream that has no reader."""

    async def send(self, chunk: object) -> None:  # noqa: ARG002 - discarded
        """Count one chunk."""
        await self._yield_to_loop()
        self.seq += 1
        self._deadline.restart()

    async def end(self, usage: Usage | None = None) -> None:
        """Send nothing."""


class ChunkReader:
    """Receives the frames of one stream and checks their order (protocol §7).

    It waits `timeout` seconds for each frame, and `total` seconds from now for all of them; None is for ever.

    Attributes:
        ended: whether the last frame was read.
        on_instance: called with the instance that sends the stream, and where it receives a cancel.
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
        self._deadline = math.inf if total is None else asyncio.get_running_loop().time() + total
        self._frames: deque[codec.Reply] = deque()
        self._changed = asyncio.Event()
        self._error: MeshError | None = None
        self._next_seq = 0
        self._unacknowledged = 0
        self._granted_at = time.monotonic()
        self._reply = ""

    @property
    def is_overdue(self) -> bool:
        """Whether the total time has passed."""
        return self._deadline < math.inf and asyncio.get_running_loop().time() >= self._deadline

    def receive(self, message: Message) -> None:
        """Take one frame; called from the read loop."""
        frame = codec.decode_frame(message.head, message.body)
        # Credit and cancel go to the sender of the chunks; before the first one, to the accepting instance.
        if message.reply and message.reply != self._reply and not (frame.accepted and self._reply):
            if not frame.accepted:
                self._reply = message.reply
            self.on_instance(frame.instance, message.reply)
        if frame.accepted or self._error is not None:  # nothing is read after an error
            return
        if len(self._frames) >= _MAX_BUFFERED:
            self.fail(Overloaded(f"The reader of '{self._agent}' is {_MAX_BUFFERED} chunks behind."))
            return
        self._frames.append(frame)
        self._changed.set()

    def fail(self, error: MeshError) -> None:
        """End the stream with an error, after the frames that have arrived."""
        self._error = self._error or error
        self._changed.set()

    async def next(self) -> codec.Reply:
        """The next frame: a chunk, the end, an error or NATS' 503.

        Raises:
            ChunkSequenceError: a chunk is missing.
            TimeoutError: it did not arrive in time.
            MeshError: the stream failed otherwise.
        """
        if not self._frames:
            await self._wait()
        elif self.is_overdue:
            raise TimeoutError
        frame = self._frames.popleft()
        self.ended = frame.end or frame.error
        if frame.seq is not None and not frame.error:
            agent, expected = self._agent, self._next_seq
            if frame.seq != expected:
                raise ChunkSequenceError(
                    f"Agent '{agent}' sent chunk {frame.seq}, expected {expected}: chunks were lost.",
                    agent=agent,
                    request_id=self._request_id,
                    details={"expected_seq": expected, "got_seq": frame.seq},
                )
            self._next_seq += 1
        return frame

    async def _wait(self) -> None:
        left = self._deadline - asyncio.get_running_loop().time()
        async with asyncio.timeout(min(left, math.inf if self.timeout is None else self.timeout)):
            while not self._frames:
                if self._error is not None:
                    raise self._error
                self._changed.clear()
                await self._changed.wait()

    def acknowledge(self) -> bool:
        """Count a chunk as read; returns whether to `grant`: after half a window, or every second."""
        self._unacknowledged += 1
        is_due = time.monotonic() - self._granted_at > _MAX_GRANT_INTERVAL_S
        return bool(self._reply) and (is_due or self._unacknowledged >= WINDOW // 2)

    async def grant(self) -> None:
        """Grant the host credit for the chunks that were read."""
        self._granted_at = time.monotonic()
        credit, self._unacknowledged = self._unacknowledged, 0
        await self._publish(self._reply, b"", codec.credit_headers(credit))
