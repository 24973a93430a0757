"""An object's chunks: to the server a window of them at once, from it one by one, and purged."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import suppress
from hashlib import sha256
from typing import Final

from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError
from pydantic_core import from_json

from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.errors import ConnectionFailed
from openagentmesh.protocol.objects import CHUNK_SIZE, STREAM, ObjectInfo, chunk_subject, digest_text
from openagentmesh.transport.connection import Bus
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.nats_client import Message

log = logging.getLogger(__name__)

# Chunks; on a far server each would cost a round trip. This is a MiB.
_WINDOW: Final = 8
_ACK_TIMEOUT: Final = 10.0
# The server's own error code; its other 404s say that the bucket is gone.
_NO_MESSAGE: Final = 10037


async def chunked(pieces: AsyncIterable[bytes | bytearray], size: int) -> AsyncGenerator[bytes, None]:
    """The same bytes in chunks of `size`; the last one may be shorter."""
    chunk = bytearray()
    async for piece in pieces:
        rest = memoryview(piece)
        while rest:
            room = size - len(chunk)
            chunk += rest[:room]
            rest = rest[room:]
            if len(chunk) == size:
                yield bytes(chunk)
                chunk.clear()
    if chunk:
        yield bytes(chunk)


class Upload:
    """The chunks of one object on their way: send each, then finish or discard all."""

    def __init__(self, bus: Bus, inbox: Inbox, jetstream: JetStreamContext) -> None:
        self._bus = bus
        self._inbox = inbox
        self._jetstream = jetstream
        # The number of the reconnect after which all that was sent is known to be there.
        self._there = bus.reconnects
        self._acks: asyncio.Queue[Message] = asyncio.Queue()
        self._reply = inbox.expect(self._acks.put_nowait)
        self._unconfirmed = 0
        self._nuid = new_id()
        self._digest = sha256()
        self._chunks = 0
        self.chunk_size = min(CHUNK_SIZE, bus.max_payload)
        self.size = 0

    async def send(self, chunk: bytes) -> None:
        """Send one chunk, once there is room for it in the window.

        Raises:
            NatsError: an earlier one was refused, or nobody stores it.
            TimeoutError: an earlier one was not acknowledged.
            ConnectionFailed: the connection is closed, or the server away for too long.

        """
        if self._unconfirmed == _WINDOW:
            await self._confirmed()
        await self._bus.publish(chunk_subject(self._nuid), chunk, reply=self._reply)
        self._unconfirmed += 1
        self._digest.update(chunk)
        self._chunks += 1
        self.size += len(chunk)

    async def finish(self, key: str) -> ObjectInfo:
        """Wait until every chunk is stored; returns what describes them as the object `key`."""
        while self._unconfirmed:
            await self._confirmed()
        self._inbox.forget(self._reply)
        return ObjectInfo(
            name=key,
            nuid=self._nuid,
            size=self.size,
            chunks=self._chunks,
            digest=digest_text(self._digest.digest()),
            options={"max_chunk_size": self.chunk_size},
        )

    async def check(self, key: str) -> None:
        """See that every confirmed chunk is there, if the server was away meanwhile: it may be a new one.

        Raises:
            ConnectionFailed: some are gone.

        """
        reconnects = self._bus.reconnects
        if reconnects == self._there:
            return
        subject = chunk_subject(self._nuid)
        info = await self._jetstream.stream_info(STREAM, subjects_filter=subject)
        if (info.state.subjects or {}).get(subject, 0) != self._chunks:
            raise ConnectionFailed(
                f"Writing '{key}' to the workspace failed: the server lost what had been sent. Put it again.",
                details={"key": key},
            )
        self._there = reconnects

    async def discard(self) -> None:
        """Remove what was sent, once nothing of it is on its way any more: a purge would overtake it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ACK_TIMEOUT):
                while self._unconfirmed and self._bus.connected:
                    await self._acks.get()
                    self._unconfirmed -= 1
        self._inbox.forget(self._reply)
        if self._chunks:
            await purge(self._jetstream, self._nuid)

    async def _confirmed(self) -> None:
        async with asyncio.timeout(_ACK_TIMEOUT):
            message = await self._acks.get()
        self._unconfirmed -= 1
        if not message.body:
            raise NoStreamResponseError
        ack = from_json(message.body)
        if "error" in ack:
            APIError.from_error(ack["error"])


async def stored(jetstream: JetStreamContext, subject: str, sequence: int = 0) -> RawStreamMsg | None:
    """The last message of a subject, or, with a sequence, its first one there or later."""
    try:
        return await jetstream.get_msg(STREAM, sequence, subject, next=bool(sequence))
    except NotFoundError as exc:
        if exc.err_code != _NO_MESSAGE:
            raise
    return None


async def next_chunk(jetstream: JetStreamContext, nuid: str, sequence: int) -> RawStreamMsg | None:
    """The first chunk at `sequence` or later, None when there is none."""
    # Any replica may answer this, and fast; only the leader knows that there is none.
    with suppress(NotFoundError, NoRespondersError):
        return await jetstream.get_msg(STREAM, sequence, chunk_subject(nuid), direct=True, next=True)
    return await stored(jetstream, chunk_subject(nuid), sequence)


async def purge(jetstream: JetStreamContext, nuid: str) -> None:
    """Remove all chunks of one put; what cannot be removed is in nobody's way."""
    try:
        await jetstream.purge_stream(STREAM, subject=chunk_subject(nuid))
    except (NatsError, TimeoutError) as exc:
        log.warning("chunks that nobody needs any more stay in the workspace: %s", exc)
