"""An object's chunks: uploaded with a window, read one by one, and purged."""

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
from nats.js.errors import NotFoundError

from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.errors import ConnectionFailed
from openagentmesh.protocol.objects import CHUNK_SIZE, STREAM, ObjectInfo, chunk_subject, digest_text
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.jetstream import NO_MESSAGE, check_ack
from openagentmesh.transport.nats_client import Message

log = logging.getLogger(__name__)

# Unacknowledged chunks, a MiB; one at a time would cost a round trip per chunk.
_WINDOW: Final = 8
_ACK_TIMEOUT_S: Final = 10.0


async def chunked(pieces: AsyncIterable[bytes | bytearray], size: int) -> AsyncGenerator[bytes, None]:
    """The same bytes in chunks of `size`; the last one may be shorter."""
    chunk = bytearray()
    async for piece in pieces:
        rest = memoryview(piece)
        while rest:
            missing = size - len(chunk)
            chunk += rest[:missing]
            rest = rest[missing:]
            if len(chunk) == size:
                yield bytes(chunk)
                chunk.clear()
    if chunk:
        yield bytes(chunk)


class Upload:
    """Uploads the chunks of one object: `send` each, then `finish`, or `discard` all."""

    def __init__(self, connection: Connection, inbox: Inbox, jetstream: JetStreamContext) -> None:
        self._connection = connection
        self._inbox = inbox
        self._jetstream = jetstream
        # The number of the reconnect after which all chunks were known to be stored.
        self._verified = connection.reconnects
        self._acks: asyncio.Queue[Message] = asyncio.Queue()
        self._reply = inbox.register(self._acks.put_nowait)
        self._unacknowledged = 0
        self._nuid = new_id()
        self._digest = sha256()
        self._chunks = 0
        self.chunk_size = min(CHUNK_SIZE, connection.max_payload)
        self.size = 0

    async def send(self, chunk: bytes) -> None:
        """Send one chunk, once the window allows it; raises also when an earlier one was not stored."""
        if self._unacknowledged == _WINDOW:
            await self._wait_for_ack()
        await self._connection.publish(chunk_subject(self._nuid), chunk, reply=self._reply)
        self._unacknowledged += 1
        self._digest.update(chunk)
        self._chunks += 1
        self.size += len(chunk)

    async def finish(self, key: str) -> ObjectInfo:
        """Wait until every chunk is stored; returns the metadata of the object `key`."""
        while self._unacknowledged:
            await self._wait_for_ack()
        self._inbox.unregister(self._reply)
        return ObjectInfo(
            name=key,
            nuid=self._nuid,
            size=self.size,
            chunks=self._chunks,
            digest=digest_text(self._digest.digest()),
            options={"max_chunk_size": self.chunk_size},
        )

    async def verify(self, key: str) -> None:
        """After a reconnect, maybe to a new server, raise ConnectionFailed unless every chunk is stored."""
        reconnects = self._connection.reconnects
        if reconnects == self._verified:
            return
        subject = chunk_subject(self._nuid)
        info = await self._jetstream.stream_info(STREAM, subjects_filter=subject)
        if (info.state.subjects or {}).get(subject, 0) != self._chunks:
            raise ConnectionFailed(
                f"Writing '{key}' to the workspace failed: the server lost its chunks. Put it again.",
                details={"key": key},
            )
        self._verified = reconnects

    async def discard(self) -> None:
        """Remove the chunks, once none is on its way any more: it would arrive after the purge."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ACK_TIMEOUT_S):
                while self._unacknowledged and self._connection.connected:
                    await self._acks.get()
                    self._unacknowledged -= 1
        self._inbox.unregister(self._reply)
        if self._chunks:
            await purge(self._jetstream, self._nuid)

    async def _wait_for_ack(self) -> None:
        async with asyncio.timeout(_ACK_TIMEOUT_S):
            ack = await self._acks.get()
        self._unacknowledged -= 1
        check_ack(ack)


async def next_chunk(jetstream: JetStreamContext, nuid: str, sequence: int) -> RawStreamMsg | None:
    """The first chunk at `sequence` or later; None for none."""
    # Any replica can answer this quickly; only the leader knows that there is none.
    with suppress(NotFoundError, NoRespondersError):
        return await jetstream.get_msg(STREAM, sequence, chunk_subject(nuid), direct=True, next=True)
    try:
        return await jetstream.get_msg(STREAM, sequence, chunk_subject(nuid), next=True)
    except NotFoundError as exc:
        if exc.err_code != NO_MESSAGE:
            raise
    return None


async def purge(jetstream: JetStreamContext, nuid: str) -> None:
    """Remove all chunks of one put; chunks that remain occupy space and do no other harm."""
    try:
        await jetstream.purge_stream(STREAM, subject=chunk_subject(nuid))
    except (NatsError, TimeoutError) as exc:
        log.warning("unused chunks remain in the workspace: %s", exc)
