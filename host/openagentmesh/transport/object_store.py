"""The workspace's object bucket in the standard format (NATS ADR-20), in bounded memory.

An object is its chunks, under a subject of their own, and its metadata, under its name. The metadata is
written last: until then readers get the old object. The library's own store reads through an unbounded
queue, waits for ever for a missing chunk, and does not remove the chunks of a cancelled put or of one of two
puts of the same object.
"""

import asyncio
from base64 import b64decode
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
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.jetstream import last_message, last_revision
from openagentmesh.transport.jetstream_errors import TIMEOUT_S, retrying, translated_errors
from openagentmesh.transport.kv_watch import delete_consumer
from openagentmesh.transport.object_chunks import Upload, chunked, next_chunk, purge

T = TypeVar("T")
Progress = Callable[[int], object]

# The server's error code.
_WRONG_LAST_SEQUENCE: Final = 10071


class ObjectStore:
    """The objects of the workspace.

    All methods raise ConnectionFailed when the server is unreachable or has no JetStream.
    """

    def __init__(self, connection: Connection, inbox: Inbox) -> None:
        self._connection = connection
        self._inbox = inbox
        self._jetstream = connection.jetstream()
        self._subscriptions: set[JetStreamContext.PushSubscription] = set()
        self._shielded: set[asyncio.Task[Any]] = set()
        # The number of the reconnect after which the bucket was known to exist.
        self._created: int | None = None

    async def create_missing(self) -> None:
        """Create the bucket if it does not exist; otherwise the first operation does."""
        async with self._operation("Opening the workspace"):
            pass

    async def restore(self) -> None:
        """After a reconnect, maybe to an empty server: create the bucket, restart watches."""
        await self.create_missing()
        for subscription in list(self._subscriptions):
            with suppress(NatsError):  # it may have ended already
                await subscription.unsubscribe()

    async def put(
        self, key: str, pieces: AsyncIterable[bytes | bytearray], progress: Progress | None = None
    ) -> Artifact:
        """Store an object in place of the one of that name; `progress` gets the bytes sent so far.

        The old object stays when it fails or is cancelled before the last piece is stored. Raises
        PayloadTooLarge if the server has no space, KVConflict while other clients replace the object.
        """
        action = f"Writing '{key}' to the workspace"
        upload = Upload(self._connection, self._inbox, self._jetstream)
        try:
            async with aclosing(chunked(pieces, upload.chunk_size)) as chunks:
                async for chunk in chunks:
                    async with self._operation(action):
                        await upload.send(chunk)
                    if progress is not None:
                        progress(upload.size)
            async with self._operation(action):
                info = await upload.finish(key)
                await upload.verify(key)
        except BaseException:
            await self._shield(upload.discard())
            raise
        async with self._operation(action):
            await self._shield(self._commit(info, upload))
        return info.artifact(datetime.fromisoformat(info.mtime))

    async def read(self, key: str, limit: int | None = None) -> AsyncGenerator[bytes, None]:
        """The content of an object piece by piece, one in memory at a time.

        Raises NotFound; PayloadTooLarge if it has more than `limit` bytes; and MeshError if it is replaced or
        deleted in the meantime or, after the last piece, if its size or digest is wrong.
        """
        action = f"Reading '{key}' of the workspace"
        async with self._operation(action):
            found, _ = await self._last(key)
        if found is None:
            raise _not_found(key)
        _check_readable(found, limit)
        digest, size, sequence = sha256(), 0, 0
        while size < found.size:
            async with self._operation(action):
                chunk = await next_chunk(self._jetstream, found.nuid, sequence + 1)
                if chunk is None:
                    raise await self._missing_chunk(found)
            piece, sequence = chunk.data or b"", chunk.seq or 0
            digest.update(piece)
            size += len(piece)
            yield piece
        if size != found.size or digest_text(digest.digest()) != found.digest:
            raise MeshError(
                f"'{key}' of the workspace is damaged: its content does not match its size and digest.",
                details={"size": size, "expected_size": found.size, "expected_digest": found.digest},
            )

    async def delete(self, key: str) -> None:
        """Delete an object; raises NotFound if there is none, KVConflict while other clients replace it."""
        async with self._operation(f"Deleting '{key}' from the workspace"):
            await self._shield(self._replace(ObjectInfo(name=key, nuid=new_id(), deleted=True)))

    async def entries(self, prefix: str = "") -> list[Artifact]:
        """All objects whose names begin with `prefix`."""
        found: dict[str, Artifact] = {}
        async with self._metadata() as subscription, self._operation("Listing the workspace"):
            seen, newest = 0, await last_revision(self._inbox, STREAM, METADATA_SUBJECTS)
            while seen < newest:
                message = await subscription.next_msg(TIMEOUT_S)
                info = decode_object_info(message.data)
                if info is not None and info.name.startswith(prefix):
                    found.pop(info.name, None)
                    if not info.deleted:
                        found[info.name] = info.artifact(message.metadata.timestamp)
                seen = message.metadata.sequence.stream
                if seen >= newest:  # objects replaced in the meantime follow
                    newest = await last_revision(self._inbox, STREAM, METADATA_SUBJECTS)
        return list(found.values())

    async def watch(self, prefix: str = "") -> AsyncGenerator[Artifact, None]:
        """The objects whose names begin with `prefix`, then every put and deletion of one, each once.

        Continues across reconnects and new servers.
        """
        seen: dict[str, str] = {}
        while True:
            async with self._metadata() as subscription:
                async for message in subscription.messages:
                    info = decode_object_info(message.data)
                    if info is None or not info.name.startswith(prefix):
                        continue
                    previous, current = seen.pop(info.name, None), None if info.deleted else info.nuid
                    if current is not None:
                        seen[info.name] = current
                    if current != previous:
                        yield info.artifact(message.metadata.timestamp)

    @asynccontextmanager
    async def _metadata(self) -> AsyncIterator[JetStreamContext.PushSubscription]:
        """All metadata, then each new message; ends when the connection is closed or restored."""
        async with self._operation("Watching the workspace"):
            subscription: JetStreamContext.PushSubscription = await retrying(self._connection)(
                self._jetstream.subscribe,
                METADATA_SUBJECTS,
                stream=STREAM,
                ordered_consumer=True,
                deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
            )
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
            with suppress(NatsError):  # stopped already, or the connection is closed
                await subscription.unsubscribe()
            await delete_consumer(subscription, self._connection)

    async def _replace(self, info: ObjectInfo) -> None:
        """Replace the metadata of an object, then purge the chunks of the old one.

        By compare-and-set: of many clients that replace one object, each purges what it replaced.
        """
        try:
            async for attempt in retrying(self._connection, KVConflict):
                with attempt:
                    old, sequence = await self._last(info.name)
                    if info.deleted and old is None:
                        raise _not_found(info.name)
                    await self._publish(info, sequence)
        except (APIError, KVConflict):
            # It was not stored; after any other error it may have been.
            await purge(self._jetstream, info.nuid)
            raise
        if old is not None:
            await purge(self._jetstream, old.nuid)

    async def _commit(self, info: ObjectInfo, upload: Upload) -> None:
        """Write the metadata, and delete it again if a new server does not have the chunks."""
        await self._replace(info)
        try:
            await retrying(self._connection)(upload.verify, info.name)
        except ConnectionFailed:
            found, sequence = await self._last(info.name)
            if found is not None and found.nuid == info.nuid:
                deleted = ObjectInfo(name=info.name, nuid=new_id(), deleted=True)
                with suppress(KVConflict):  # replaced by others
                    await self._publish(deleted, sequence)
            await purge(self._jetstream, info.nuid)
            raise

    async def _publish(self, info: ObjectInfo, sequence: int) -> None:
        """Replace the metadata that has this sequence."""
        headers = {"Nats-Rollup": "sub", "Nats-Expected-Last-Subject-Sequence": str(sequence)}
        subject, body = metadata_subject(info.name), info.model_dump_json().encode()
        try:
            await self._jetstream.publish(subject, body, headers=headers)
        except APIError as exc:
            if exc.err_code != _WRONG_LAST_SEQUENCE:
                raise
            raise KVConflict(
                f"'{info.name}' was replaced by others at each attempt.", details={"key": info.name}
            ) from exc

    async def _last(self, key: str) -> tuple[ObjectInfo | None, int]:
        """The metadata of an object, None when it does not exist; and its sequence, 0 for none."""
        message = await last_message(self._inbox, STREAM, metadata_subject(key))
        if message is None:
            return None, 0
        found = decode_object_info(b64decode(message.get("data", "")))
        return None if found is None or found.deleted else found, message["seq"]

    async def _missing_chunk(self, reading: ObjectInfo) -> MeshError:
        """Why a chunk of an object that is being read does not exist."""
        current, _ = await self._last(reading.name)
        reason = "was replaced or deleted while it was read"
        if current is not None and current.nuid == reading.nuid:
            reason = "is incomplete: chunks are missing"
        return MeshError(f"'{reading.name}' of the workspace {reason}.", details={"key": reading.name})

    async def _shield(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work that must finish even when its caller is cancelled."""
        task = asyncio.create_task(work)
        self._shielded.add(task)
        task.add_done_callback(self._shielded.discard)
        return await asyncio.shield(task)

    @asynccontextmanager
    async def _operation(self, action: str) -> AsyncIterator[None]:
        """Make sure that the bucket exists, and translate the library's errors."""
        with translated_errors(self._connection, action):
            if self._created != self._connection.reconnects:
                await self._open_or_create()
            yield

    async def _open_or_create(self) -> None:
        reconnects = self._connection.reconnects
        # Right after a server's start JetStream may not answer yet.
        async for attempt in retrying(self._connection):
            with attempt:
                try:
                    await self._jetstream.object_store(ARTIFACTS_BUCKET)
                except BucketNotFoundError:
                    await self._jetstream.create_object_store(ARTIFACTS_BUCKET)
        self._created = reconnects


def _check_readable(info: ObjectInfo, limit: int | None) -> None:
    if info.is_link:
        raise MeshError(f"'{info.name}' of the workspace is a link to another object; read that one.")
    if limit is not None and info.size > limit:
        raise PayloadTooLarge(
            f"'{info.name}' of the workspace has {info.size} bytes, more than the {limit} allowed.",
            details={"size": info.size, "limit": limit},
        )


def _not_found(key: str) -> NotFound:
    return NotFound(f"There is no '{key}' in the workspace", details={"key": key})
