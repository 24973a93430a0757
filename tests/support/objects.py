"""An object store and its content."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from nats.js import JetStreamContext
from openagentmesh.protocol.objects import STREAM
from openagentmesh.protocol.subjects import ARTIFACTS_BUCKET
from openagentmesh.transport.connection import Connection, Target
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.object_store import ObjectStore


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[Connection, ObjectStore]]:
    """A connection and its object store."""
    connection = Connection(Target(url), "objects")
    await connection.connect()
    inbox = Inbox(connection)
    await inbox.open()
    objects = ObjectStore(connection, inbox)
    connection.restore = objects.restore
    try:
        yield connection, objects
    finally:
        await connection.close()


async def in_pieces(content: bytes, size: int = 100_000) -> AsyncGenerator[bytes, None]:
    """Content in pieces of a size."""
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def content_of(objects: ObjectStore, key: str) -> bytes:
    """The content of an object."""
    return b"".join([piece async for piece in objects.read(key)])


async def chunk_counts(jetstream: JetStreamContext) -> dict[str, int]:
    """How many chunks are stored, by the subject of each upload."""
    found = await jetstream.stream_info(STREAM, subjects_filter=f"$O.{ARTIFACTS_BUCKET}.C.>")
    return found.state.subjects or {}
