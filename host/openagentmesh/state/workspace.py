"""The shared files of a mesh: objects of any size under names, in the bucket `mesh-artifacts`."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from contextlib import aclosing
from io import BytesIO
from typing import IO, Final

from openagentmesh.protocol.errors import InvalidInput
from openagentmesh.protocol.objects import CHUNK_SIZE, Artifact
from openagentmesh.transport.object_store import ObjectStore, Progress

Data = bytes | bytearray | memoryview | str | IO[bytes] | AsyncIterable[bytes] | Iterable[bytes]
Artifacts = list[Artifact]
# Bytes. In base64 a key is part of a subject, and a protocol line has at most 4096 bytes.
_MAX_KEY: Final = 1024


class Workspace:
    """Files under keys, shared by all participants of the mesh.

    A key is any text, such as `reports/May 2026.pdf`. All methods raise MeshError: NotFound for a missing
    key, InvalidInput for an invalid key or content, PayloadTooLarge, ConnectionFailed.
    """

    def __init__(self, ready: Callable[[], Awaitable[ObjectStore]]) -> None:
        self._ready = ready

    async def put(self, key: str, data: Data, *, progress: Progress | None = None) -> Artifact:
        """Store content under a key, replacing it as a whole or not at all.

        Args:
            key: the key.
            data: bytes; text, stored as UTF-8; or, never whole in memory, a file opened with "rb", or an
                iterator of pieces. A file is read in a thread, from its current position; an iterator that
                waits should be asynchronous.
            progress: called repeatedly with the bytes sent so far.

        Returns:
            The stored object.
        """
        _check(key)
        return await (await self._ready()).put(key, _pieces(key, data), progress)

    async def get(self, key: str, *, limit: int | None = None, progress: Progress | None = None) -> bytes:
        """The whole content under a key; `read` gives it piece by piece.

        Args:
            key: the key.
            limit: bytes; PayloadTooLarge when there are more. None for no limit.
            progress: called repeatedly with the bytes read so far.
        """
        content = BytesIO()  # returns its bytes without a copy
        async with aclosing(self._read(key, limit, progress)) as pieces:
            async for piece in pieces:
                content.write(piece)
        return content.getvalue()

    def read(self, key: str, *, progress: Progress | None = None) -> AsyncGenerator[bytes, None]:
        """The content under a key piece by piece, one in memory at a time.

        Size and digest are verified at the end: MeshError is raised when it is damaged, or was replaced or
        deleted in the meantime. `progress` is called with the bytes read so far.
        """
        return self._read(key, None, progress)

    async def delete(self, key: str) -> None:
        """Delete a key."""
        _check(key)
        await (await self._ready()).delete(key)

    async def list(self, prefix: str = "") -> Artifacts:
        """All keys that begin with `prefix`; one that is replaced at this moment may be left out."""
        _check_prefix(prefix)
        return await (await self._ready()).entries(prefix)

    async def watch(self, prefix: str = "") -> AsyncGenerator[Artifact, None]:
        """All keys that begin with `prefix`, then each change once, for ever and across reconnects.

        Deletions are changes with `deleted`.
        """
        _check_prefix(prefix)
        async with aclosing((await self._ready()).watch(prefix)) as changes:
            async for artifact in changes:
                yield artifact

    async def _read(
        self, key: str, limit: int | None, progress: Progress | None
    ) -> AsyncGenerator[bytes, None]:
        _check(key)
        size = 0
        async with aclosing((await self._ready()).read(key, limit)) as pieces:
            async for piece in pieces:
                size += len(piece)
                if progress is not None:
                    progress(size)
                yield piece


def _check(key: object) -> None:
    if not isinstance(key, str) or not 0 < len(_utf8(key)) <= _MAX_KEY:
        raise InvalidInput(f"{key!r} is not a valid key: text of 1 to {_MAX_KEY} bytes is.")


def _check_prefix(prefix: object) -> None:
    if not isinstance(prefix, str):
        raise InvalidInput(f"{prefix!r} is not a valid prefix: text is.")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInput(f"A text for the workspace cannot be encoded as UTF-8: {exc}.") from exc


async def _pieces(key: str, data: Data) -> AsyncGenerator[bytes | bytearray, None]:
    if isinstance(data, str):
        yield _utf8(data)
    elif isinstance(data, bytes | bytearray | memoryview):
        yield _piece(key, data)
    elif isinstance(data, AsyncIterable):
        async for piece in data:
            yield _piece(key, piece)
    elif hasattr(data, "read"):
        while piece := await asyncio.to_thread(data.read, CHUNK_SIZE):
            yield _piece(key, piece)
    elif isinstance(data, Iterable):
        for piece in data:
            yield _piece(key, piece)
    else:
        raise InvalidInput(f"The content for '{key}' is a {type(data).__name__}, not bytes, text or a file.")


def _piece(key: str, piece: object) -> bytes | bytearray:
    if isinstance(piece, bytes | bytearray):
        return piece
    if isinstance(piece, memoryview):
        return piece.tobytes()
    raise InvalidInput(
        f"The content for '{key}' has a {type(piece).__name__} where bytes are expected. "
        'Encode text, and open files with "rb".'
    )
