"""The workspace's object bucket in the standard format (NATS ADR-20), in bounded memory.

An object is its chunks, all under one subject of their own, and a description under the
object's name, which is written last: until then nobody sees the new object, and everybody the
old one. The library's own store reads through a queue without a bound, waits for ever for a
chunk that is gone, and leaves chunks behind that nobody finds again.
"""

import asyncio
import logging
from base64 import urlsafe_b64encode
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final, TypeVar

from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js import JetStreamContext
from nats.js.api import DeliverPolicy, RawStreamMsg
from nats.js.errors import APIError, BucketNotFoundError, NoStreamResponseError, NotFoundError
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from openagentmesh.bus.client import Message
from openagentmesh.bus.connection import Bus
from openagentmesh.bus.requests import Inbox
from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.errors import ConnectionFailed, KVConflict, MeshError, NotFound, PayloadTooLarge
from openagentmesh.protocol.subjects import ARTIFACTS_BUCKET, TOKEN_RE

log = logging.getLogger(__name__)

T = TypeVar("T")
Progress = Callable[[int], object]

CHUNK: Final = 128 * 1024
_STREAM: Final = f"OBJ_{ARTIFACTS_BUCKET}"
_DESCRIPTIONS: Final = f"$O.{ARTIFACTS_BUCKET}.M."
_CHUNKS: Final = f"$O.{ARTIFACTS_BUCKET}.C."
# So many chunks are on their way at once: on a far server each would cost a round trip.
_WINDOW: Final = 8
_ACK_TIMEOUT: Final = 10.0
_PATIENCE: Final = 30.0
# The server's own error codes.
_NO_MESSAGE: Final = 10037
_WRONG_LAST_SEQUENCE: Final = 10071
_NO_ROOM: Final = frozenset({10002, 10023, 10047, 10054, 10077})


@dataclass(slots=True, frozen=True)
class Artifact:
    """One object of the workspace, without its content.

    Attributes:
        key: its name.
        size: bytes.
        modified: when it was put or deleted, by the server's clock; by ours for one just put.
        digest: `SHA-256=` and the digest in URL-safe base64; empty for a deleted one.
        deleted: whether it is there no more.

    """

    key: str
    size: int
    modified: datetime
    digest: str
    deleted: bool = False


class _Description(BaseModel):
    """An object's description as it is stored; `mtime` is there for readers that need one."""

    name: str
    bucket: str = ARTIFACTS_BUCKET
    nuid: str = Field(pattern=f"^{TOKEN_RE.pattern}$")
    size: int = 0
    mtime: str = Field(default_factory=lambda: datetime.now(UTC).isoformat())
    chunks: int = 0
    digest: str = ""
    deleted: bool = False
    options: dict[str, Any] | None = None

    def artifact(self, modified: datetime) -> Artifact:
        return Artifact(self.name, self.size, modified, self.digest, self.deleted)


def _described(data: bytes | None) -> _Description | None:
    """A stored description; None, and a warning, for what strangers wrote that is none."""
    try:
        return _Description.model_validate_json(data or b"")
    except ValidationError as exc:
        log.warning("an object's description cannot be read: %s", exc.errors(include_url=False)[0])
    return None


def _digest(content: bytes) -> str:
    return f"SHA-256={urlsafe_b64encode(content).decode()}"


async def _chunked(pieces: AsyncIterable[bytes | bytearray], size: int) -> AsyncGenerator[bytes, None]:
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


class _Upload:
    """The chunks of one object on their way to the server, a window of them at once."""

    def __init__(self, bus: Bus, inbox: Inbox) -> None:
        self._bus = bus
        self._inbox = inbox
        self._acks: asyncio.Queue[Message] = asyncio.Queue()
        self._reply = inbox.expect(self._acks.put_nowait)
        self._unconfirmed = 0
        self._digest = sha256()
        self.nuid = new_id()
        self.size = 0
        self.chunks = 0

    @property
    def digest(self) -> str:
        return _digest(self._digest.digest())

    async def send(self, chunk: bytes) -> None:
        if self._unconfirmed == _WINDOW:
            await self._confirmed()
        await self._bus.publish(_CHUNKS + self.nuid, chunk, reply=self._reply)
        self._unconfirmed += 1
        self._digest.update(chunk)
        self.size += len(chunk)
        self.chunks += 1

    async def finish(self) -> None:
        """Wait until every chunk is stored."""
        while self._unconfirmed:
            await self._confirmed()
        self._inbox.forget(self._reply)

    async def settle(self) -> None:
        """Wait until no chunk is on its way any more: one could arrive after all are purged."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ACK_TIMEOUT):
                for _ in range(self._unconfirmed):
                    await self._acks.get()
        self._inbox.forget(self._reply)

    async def _confirmed(self) -> None:
        async with asyncio.timeout(_ACK_TIMEOUT):
            message = await self._acks.get()
        self._unconfirmed -= 1
        if not message.body:
            raise NoStreamResponseError
        ack = from_json(message.body)
        if "error" in ack:
            APIError.from_error(ack["error"])


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
        """Make the bucket if it is missing."""
        reconnects = self._bus.reconnects
        async with self._explained("Opening the workspace"):
            async for attempt in self._retrying():
                with attempt:
                    try:
                        await self._jetstream.object_store(ARTIFACTS_BUCKET)
                    except BucketNotFoundError:
                        await self._jetstream.create_object_store(ARTIFACTS_BUCKET)
        self._made = reconnects

    async def restore(self) -> None:
        """After a reconnect, maybe to a new and empty server: make the bucket, watch anew."""
        await self.make()
        for follower in list(self._followers):
            await follower.unsubscribe()

    async def put(
        self, key: str, pieces: AsyncIterable[bytes | bytearray], progress: Progress | None = None
    ) -> Artifact:
        """Store an object in place of the one of that name; `progress` gets the bytes sent so far.

        When it fails or is cancelled before the last piece is stored, the old object stays.

        Raises:
            PayloadTooLarge: the server has no room for it.
            KVConflict: others replace the same object again and again.

        """
        await self._ready()
        what = f"Writing '{key}' to the workspace"
        upload = _Upload(self._bus, self._inbox)
        size = min(CHUNK, self._bus.max_payload)
        try:
            async with aclosing(_chunked(pieces, size)) as chunks:
                async for chunk in chunks:
                    async with self._explained(what):
                        await upload.send(chunk)
                    if progress is not None:
                        progress(upload.size)
            async with self._explained(what):
                await upload.finish()
        except BaseException:
            await self._to_the_end(self._discard(upload))
            raise
        description = _Description(
            name=key,
            nuid=upload.nuid,
            size=upload.size,
            chunks=upload.chunks,
            digest=upload.digest,
            options={"max_chunk_size": size},
        )
        async with self._explained(what):
            await self._to_the_end(self._place(description))
        return description.artifact(datetime.fromisoformat(description.mtime))

    async def read(self, key: str, limit: int | None = None) -> AsyncGenerator[bytes, None]:
        """The content of an object piece by piece, one in memory at a time.

        It is known to be whole and unspoilt only when the last piece was read without an error.

        Raises:
            NotFound: there is no such object.
            PayloadTooLarge: it has more than `limit` bytes.
            MeshError: it was replaced or deleted meanwhile, or is not what was put.

        """
        await self._ready()
        what = f"Reading '{key}' of the workspace"
        async with self._explained(what):
            found = await self._existing(key)
        if (found.options or {}).get("link"):
            raise MeshError(f"'{key}' of the workspace is a link to another object; read that one.")
        if limit is not None and found.size > limit:
            raise PayloadTooLarge(
                f"'{key}' of the workspace has {found.size} bytes, more than the {limit} asked for at most.",
                details={"size": found.size, "limit": limit},
            )
        digest, size, sequence = sha256(), 0, 0
        while size < found.size:
            async with self._explained(what):
                chunk = await self._chunk(found, sequence + 1)
            piece, sequence = chunk.data or b"", chunk.seq or 0
            digest.update(piece)
            size += len(piece)
            yield piece
        if size != found.size or _digest(digest.digest()) != found.digest:
            raise MeshError(
                f"'{key}' of the workspace is spoilt: its content does not fit its size and digest.",
                details={"size": size, "digest": _digest(digest.digest()), "expected": found.digest},
            )

    async def delete(self, key: str) -> None:
        """Remove an object.

        Raises:
            NotFound: there is no such object.

        """
        await self._ready()
        async with self._explained(f"Deleting '{key}' from the workspace"):
            await self._to_the_end(self._place(_Description(name=key, nuid=new_id(), deleted=True)))

    async def entries(self, prefix: str = "") -> list[Artifact]:
        """All objects whose names begin with `prefix`."""
        found = []
        async with self._follow() as follower, self._explained("Listing the workspace"):
            info = await follower.consumer_info()
            # What was delivered already waits in the follower.
            left = (info.num_pending or 0) + (info.delivered.consumer_seq if info.delivered else 0)
            while left:
                message = await follower.next_msg(_PATIENCE)
                left = message.metadata.num_pending
                description = _described(message.data)
                if description and not description.deleted and description.name.startswith(prefix):
                    found.append(description.artifact(message.metadata.timestamp))
        return found

    async def watch(self, prefix: str = "") -> AsyncGenerator[Artifact, None]:
        """The objects whose names begin with `prefix`, then every put and every deletion of one.

        Goes on across reconnects and new servers, and tells nothing twice.
        """
        seen: dict[str, str] = {}
        while True:
            async with self._follow() as follower:
                async for message in follower.messages:
                    description = _described(message.data)
                    if description is None or not description.name.startswith(prefix):
                        continue
                    key, nuid = description.name, description.nuid
                    known = seen.pop(key, None)
                    if not description.deleted:
                        seen[key] = nuid
                    # Nobody has to hear of the end of what it was never told of.
                    if known is not None if description.deleted else known != nuid:
                        yield description.artifact(message.metadata.timestamp)

    @asynccontextmanager
    async def _follow(self) -> AsyncIterator[JetStreamContext.PushSubscription]:
        """All descriptions, then each new one; ends when the connection does."""
        await self._ready()
        async with self._explained("Watching the workspace"):
            async for attempt in self._retrying():
                with attempt:
                    follower = await self._jetstream.subscribe(
                        f"{_DESCRIPTIONS}>",
                        stream=_STREAM,
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

    async def _place(self, description: _Description) -> None:
        """Put a description in the place of the one that is there, and purge what that one described.

        Compare-and-set, so that of many who replace one object each purges what it replaced.
        """
        try:
            async for attempt in self._retrying(KVConflict):
                with attempt:
                    old, sequence = await self._last(description.name)
                    if description.deleted and old is None:
                        raise _missing(description.name)
                    await self._publish(description, sequence)
        except (APIError, KVConflict):
            # After any other error it may have been stored all the same.
            await self._purge(description.nuid)
            raise
        if old is not None:
            await self._purge(old.nuid)

    async def _publish(self, description: _Description, sequence: int) -> None:
        headers = {"Nats-Rollup": "sub", "Nats-Expected-Last-Subject-Sequence": str(sequence)}
        try:
            await self._jetstream.publish(
                _subject(description.name), description.model_dump_json().encode(), headers=headers
            )
        except APIError as exc:
            if exc.err_code != _WRONG_LAST_SEQUENCE:
                raise
            raise KVConflict(f"Others replace '{description.name}' again and again.") from exc

    async def _last(self, key: str) -> tuple[_Description | None, int]:
        """The description of an object, None when it is not there; and its sequence, 0 for none."""
        message = await self._stored(_subject(key))
        if message is None:
            return None, 0
        description = _described(message.data)
        return None if description is None or description.deleted else description, message.seq or 0

    async def _existing(self, key: str) -> _Description:
        description, _ = await self._last(key)
        if description is None:
            raise _missing(key)
        return description

    async def _chunk(self, of: _Description, sequence: int) -> RawStreamMsg:
        """The first chunk at `sequence` or later."""
        subject = _CHUNKS + of.nuid
        # Asking any replica is fast; whether there is none only the leader knows for certain.
        with suppress(NotFoundError, NoRespondersError):
            return await self._jetstream.get_msg(
                _STREAM, seq=sequence, subject=subject, direct=True, next=True
            )
        message = await self._stored(subject, sequence)
        if message is not None:
            return message
        now, _ = await self._last(of.name)
        if now is not None and now.nuid == of.nuid:
            raise MeshError(f"'{of.name}' of the workspace is incomplete: some of its content is gone.")
        raise MeshError(f"'{of.name}' of the workspace was replaced or deleted while it was read.")

    async def _stored(self, subject: str, sequence: int = 0) -> RawStreamMsg | None:
        """The last message of a subject, or its first one at `sequence` or later."""
        try:
            return await self._jetstream.get_msg(_STREAM, seq=sequence, subject=subject, next=bool(sequence))
        except NotFoundError as exc:
            if exc.err_code != _NO_MESSAGE:
                raise  # the bucket itself is gone
        return None

    async def _discard(self, upload: _Upload) -> None:
        await upload.settle()
        await self._purge(upload.nuid)

    async def _purge(self, nuid: str) -> None:
        try:
            await self._jetstream.purge_stream(_STREAM, subject=_CHUNKS + nuid)
        except (NatsError, TimeoutError) as exc:
            log.warning("chunks that nobody needs any more stay in the workspace: %s", exc)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await what must be finished also when who waits for it is cancelled."""
        task = asyncio.create_task(work)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        return await asyncio.shield(task)

    async def _ready(self) -> None:
        if self._made != self._bus.reconnects:
            await self.make()

    def _retrying(self, what: type[Exception] | None = None) -> AsyncRetrying:
        """Try again for a while; with full jitter, for many that collide once would again."""

        def passes(exc: BaseException) -> bool:
            # Right after a server's start JetStream may not answer yet.
            return isinstance(exc, what or (NatsError, TimeoutError)) and not self._bus.is_closed

        return AsyncRetrying(
            retry=retry_if_exception(passes),
            wait=wait_random_exponential(multiplier=0.02, max=1.0),
            stop=stop_after_delay(_PATIENCE),
            reraise=True,
        )

    @asynccontextmanager
    async def _explained(self, what: str) -> AsyncIterator[None]:
        """Turn the library's errors into ours."""
        try:
            yield
        except (NatsError, TimeoutError, asyncio.InvalidStateError) as exc:
            if isinstance(exc, APIError) and exc.err_code in _NO_ROOM:
                raise PayloadTooLarge(f"{what} failed: no room on the server ({exc.description}).") from exc
            if self._bus.is_closed:
                raise ConnectionFailed(
                    f"{what} failed: the connection to {self._bus.target.shown} is closed."
                ) from exc
            raise ConnectionFailed(
                f"{what} failed: {exc or type(exc).__name__}. "
                "Is JetStream enabled on the server (`nats-server -js`)?"
            ) from exc


def _subject(key: str) -> str:
    """Where an object's description is stored."""
    return _DESCRIPTIONS + urlsafe_b64encode(key.encode()).decode()


def _missing(key: str) -> NotFound:
    return NotFound(f"There is no '{key}' in the workspace", details={"key": key})
