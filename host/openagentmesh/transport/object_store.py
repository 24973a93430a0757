"""The workspace's object bucket in the standard format (NATS ADR-20), in bounded memory.

An object is its chunks, under a subject of their own, and a description under its name. That
is written last: until then everybody sees the old object, and nobody the new one. The library's
own store reads through a queue without a bound, waits for ever for a chunk that is gone, and
leaves chunks behind when a put is cancelled or two replace the same object.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import datetime
from hashlib import sha256
from typing import Any, Final, TypeVar

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import DeliverPolicy
from nats.js.errors import APIError, BucketNotFoundError

from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.errors import ConnectionFailed, KVConflict, MeshError, NotFound, PayloadTooLarge
from openagentmesh.protocol.objects import (
    METADATA_SUBJECTS,
    STREAM,
    Artifact,
    ObjectInfo,
    decode_object_info,
    digest_text,
    metadata_subject,
)
from openagentmesh.protocol.subjects import ARTIFACTS_BUCKET
from openagentmesh.transport.connection import Bus
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.jetstream import latest_revision
from openagentmesh.transport.jetstream_errors import explained, retrying
from openagentmesh.transport.kv_watch import forget_consumer
from openagentmesh.transport.object_chunks import Upload, chunked, next_chunk, purge, stored

T = TypeVar("T")
Progress = Callable[[int], object]

_PATIENCE: Final = 30.0
# The server's own error code.
_WRONG_LAST_SEQUENCE: Final = 10071


class Objects:
    """The objects of the workspace, over the mesh's one connection.

    All methods raise ConnectionFailed when the server cannot be reached or has no JetStream.
    """

    def __init__(self, bus: Bus, inbox: Inbox) -> None:
        self._bus = bus
        self._inbox = inbox
        self._jetstream = bus.jetstream()
        self._followers: set[JetStreamContext.PushSubscription] = set()
        self._finishing: set[asyncio.Task[Any]] = set()
        # The number of the reconnect after which the bucket was known to be there.
        self._made: int | None = None

    async def make(self) -> None:
        """Make the bucket if it is missing; else the first use does."""
        async with self._using("Opening the workspace"):
            pass

    async def restore(self) -> None:
        """After a reconnect, maybe to a new and empty server: make the bucket, watch anew."""
        await self.make()
        for follower in list(self._followers):
            with suppress(NatsError):  # it ends by itself
                await follower.unsubscribe()

    async def put(
        self, key: str, pieces: AsyncIterable[bytes | bytearray], progress: Progress | None = None
    ) -> Artifact:
        """Store an object in place of the one of that name; `progress` gets the bytes sent so far.

        When it fails or is cancelled before the last piece is stored, the old object stays.

        Raises:
            PayloadTooLarge: the server has no room for it.
            KVConflict: others replace the same object again and again.
            ConnectionFailed: also when a new server came meanwhile, without what had been sent.

        """
        what = f"Writing '{key}' to the workspace"
        upload = Upload(self._bus, self._inbox, self._jetstream)
        try:
            async with aclosing(chunked(pieces, upload.chunk_size)) as chunks:
                async for chunk in chunks:
                    async with self._using(what):
                        await upload.send(chunk)
                    if progress is not None:
                        progress(upload.size)
            async with self._using(what):
                description = await upload.finish(key)
                await upload.check(key)
        except BaseException:
            await self._to_the_end(upload.discard())
            raise
        async with self._using(what):
            await self._to_the_end(self._place_whole(description, upload))
        return description.artifact(datetime.fromisoformat(description.mtime))

    async def read(self, key: str, limit: int | None = None) -> AsyncGenerator[bytes, None]:
        """The content of an object piece by piece, one in memory at a time.

        It is known to be whole and unspoilt only when the last piece was read without an error.

        Raises:
            NotFound: there is no such object.
            PayloadTooLarge: it has more than `limit` bytes.
            MeshError: it was replaced or deleted meanwhile, or is not what was put.

        """
        what = f"Reading '{key}' of the workspace"
        async with self._using(what):
            found, _ = await self._last(key)
        if found is None:
            raise _missing(key)
        if found.is_link:
            raise MeshError(f"'{key}' of the workspace is a link to another object; read that one.")
        if limit is not None and found.size > limit:
            raise PayloadTooLarge(
                f"'{key}' of the workspace has {found.size} bytes, more than the {limit} allowed.",
                details={"size": found.size, "limit": limit},
            )
        digest, size, sequence = sha256(), 0, 0
        while size < found.size:
            async with self._using(what):
                chunk = await next_chunk(self._jetstream, found.nuid, sequence + 1)
                if chunk is None:
                    raise await self._gone(found)
            piece, sequence = chunk.data or b"", chunk.seq or 0
            digest.update(piece)
            size += len(piece)
            yield piece
        if size != found.size or digest_text(digest.digest()) != found.digest:
            raise MeshError(
                f"'{key}' of the workspace is spoilt: its content does not fit its size and digest.",
                details={"size": size, "expected_size": found.size, "expected_digest": found.digest},
            )

    async def delete(self, key: str) -> None:
        """Remove an object.

        Raises:
            NotFound: there is no such object.
            KVConflict: others replace it again and again.

        """
        async with self._using(f"Deleting '{key}' from the workspace"):
            await self._to_the_end(self._place(ObjectInfo(name=key, nuid=new_id(), deleted=True)))

    async def entries(self, prefix: str = "") -> list[Artifact]:
        """All objects whose names begin with `prefix`."""
        found: dict[str, Artifact] = {}
        async with self._follow() as follower, self._using("Listing the workspace"):
            seen, newest = 0, await latest_revision(self._inbox, STREAM, METADATA_SUBJECTS)
            while seen < newest:
                message = await follower.next_msg(_PATIENCE)
                description = decode_object_info(message.data)
                if description is not None and description.name.startswith(prefix):
                    found.pop(description.name, None)
                    if not description.deleted:
                        found[description.name] = description.artifact(message.metadata.timestamp)
                seen = message.metadata.sequence.stream
                if seen >= newest:  # what was replaced meanwhile comes later
                    newest = await latest_revision(self._inbox, STREAM, METADATA_SUBJECTS)
        return list(found.values())

    async def watch(self, prefix: str = "") -> AsyncGenerator[Artifact, None]:
        """The objects whose names begin with `prefix`, then every put and every deletion of one.

        Goes on across reconnects and new servers, and tells nothing twice.
        """
        told: dict[str, str] = {}
        while True:
            async with self._follow() as follower:
                async for message in follower.messages:
                    description = decode_object_info(message.data)
                    if description is None or not description.name.startswith(prefix):
                        continue
                    before = told.pop(description.name, None)
                    if description.deleted:
                        # Nobody has to hear of the end of what it never heard of.
                        news = before is not None
                    else:
                        told[description.name] = description.nuid
                        news = before != description.nuid
                    if news:
                        yield description.artifact(message.metadata.timestamp)

    @asynccontextmanager
    async def _follow(self) -> AsyncIterator[JetStreamContext.PushSubscription]:
        """All descriptions, then each new one; ends when the connection is closed or restored."""
        async with self._using("Watching the workspace"):
            async for attempt in retrying(self._bus, _PATIENCE, NatsError, TimeoutError):
                with attempt:
                    follower = await self._jetstream.subscribe(
                        METADATA_SUBJECTS,
                        stream=STREAM,
                        ordered_consumer=True,
                        deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
                    )
        self._followers.add(follower)
        try:
            yield follower
        finally:
            self._followers.discard(follower)
            with suppress(NatsError):  # stopped already, or the connection is closed
                await follower.unsubscribe()
            await forget_consumer(follower, self._bus)

    async def _place(self, description: ObjectInfo) -> None:
        """Put a description in the place of the one that is there, and purge what that one described.

        By compare-and-set: of many who replace one object at once, each purges what it replaced.
        """
        try:
            async for attempt in retrying(self._bus, _PATIENCE, KVConflict):
                with attempt:
                    old, sequence = await self._last(description.name)
                    if description.deleted and old is None:
                        raise _missing(description.name)
                    await self._publish(description, sequence)
        except (APIError, KVConflict):
            # It was not stored; after any other error it may have been.
            await purge(self._jetstream, description.nuid)
            raise
        if old is not None:
            await purge(self._jetstream, old.nuid)

    async def _place_whole(self, description: ObjectInfo, upload: Upload) -> None:
        """Place a description, and take it back if a new server without its chunks has got it."""
        await self._place(description)
        try:
            async for attempt in retrying(self._bus, _PATIENCE, NatsError, TimeoutError):
                with attempt:
                    await upload.check(description.name)
        except ConnectionFailed:
            found, sequence = await self._last(description.name)
            if found is not None and found.nuid == description.nuid:
                gone = ObjectInfo(name=description.name, nuid=new_id(), deleted=True)
                with suppress(KVConflict):  # others have replaced it
                    await self._publish(gone, sequence)
            await purge(self._jetstream, description.nuid)
            raise

    async def _publish(self, description: ObjectInfo, sequence: int) -> None:
        """Replace the description that has this sequence."""
        headers = {"Nats-Rollup": "sub", "Nats-Expected-Last-Subject-Sequence": str(sequence)}
        subject, body = metadata_subject(description.name), description.model_dump_json().encode()
        try:
            await self._jetstream.publish(subject, body, headers=headers)
        except APIError as exc:
            if exc.err_code != _WRONG_LAST_SEQUENCE:
                raise
            raise KVConflict(
                f"Others replace '{description.name}' again and again.", details={"key": description.name}
            ) from exc

    async def _last(self, key: str) -> tuple[ObjectInfo | None, int]:
        """The description of an object, None when it is not there; and its sequence, 0 for none."""
        message = await stored(self._jetstream, metadata_subject(key))
        if message is None:
            return None, 0
        found = decode_object_info(message.data)
        return None if found is None or found.deleted else found, message.seq or 0

    async def _gone(self, read: ObjectInfo) -> MeshError:
        """Why a chunk of an object that is being read is not there."""
        now, _ = await self._last(read.name)
        why = "was replaced or deleted while it was read"
        if now is not None and now.nuid == read.nuid:
            why = "is incomplete: some of its content is gone"
        return MeshError(f"'{read.name}' of the workspace {why}.", details={"key": read.name})

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await what must be finished also when whoever waits for it is cancelled."""
        task = asyncio.create_task(work)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        return await asyncio.shield(task)

    @asynccontextmanager
    async def _using(self, what: str) -> AsyncIterator[None]:
        """See to it that the bucket is there, and turn the library's errors into ours."""
        with explained(self._bus, what):
            if self._made != self._bus.reconnects:
                await self._make()
            yield

    async def _make(self) -> None:
        reconnects = self._bus.reconnects
        # Right after a server's start JetStream may not answer yet.
        async for attempt in retrying(self._bus, _PATIENCE, NatsError, TimeoutError):
            with attempt:
                try:
                    await self._jetstream.object_store(ARTIFACTS_BUCKET)
                except BucketNotFoundError:
                    await self._jetstream.create_object_store(ARTIFACTS_BUCKET)
        self._made = reconnects


def _missing(key: str) -> NotFound:
    return NotFound(f"There is no '{key}' in the workspace", details={"key": key})
