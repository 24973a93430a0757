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
# In base64 a key is part of a subject, and a line to the server has at most 4096 bytes.
_LONGEST_KEY: Final = 1024


class Workspace:
    """Files under names, the same for everybody on the mesh.

    A key is any text, as in `reports/May 2026.pdf`. All methods raise MeshError: NotFound for a
    key that is not there, InvalidInput for a key or content that cannot be one, PayloadTooLarge,
    ConnectionFailed.
    """

    def __init__(self, ready: Callable[[], Awaitable[ObjectStore]]) -> None:
        self._ready = ready

    async def put(self, key: str, data: Data, *, progress: Progress | None = None) -> Artifact:
        """Store content under a key, in place of what was there; all of it or nothing.

        Args:
            key: the key.
            data: bytes; a text, stored as UTF-8; or, never whole in memory, a file opened with
                "rb", or the pieces of an iterator. A file is read in a thread, from where it
                stands; an iterator that waits should be an asynchronous one.
            progress: called with the bytes sent so far, again and again.

        Returns:
            What is stored now.

        """
        _check(key)
        return await (await self._ready()).put(key, _pieces(key, data), progress)

    async def get(self, key: str, *, limit: int | None = None, progress: Progress | None = None) -> bytes:
        """The whole content under a key; `read` gives it piece by piece.

        Args:
            key: the key.
            limit: bytes; PayloadTooLarge when there are more. None: as many as there are.
            progress: called with the bytes read so far, again and again.

        """
        content = BytesIO()  # gives its bytes away without copying them
        async with aclosing(self._read(key, limit, progress)) as pieces:
            async for piece in pieces:
                content.write(piece)
        return content.getvalue()

    def read(self, key: str, *, progress: Progress | None = None) -> AsyncGenerator[bytes, None]:
        """The content under a key piece by piece, one in memory at a time.

        It is whole and unspoilt when the loop over it ends without an error: size and digest are
        checked then, and MeshError is raised for what is not what was put, or was replaced or
        deleted meanwhile. `progress` is called with the bytes read so far.
        """
        return self._read(key, None, progress)

    async def delete(self, key: str) -> None:
        """Remove what is stored under a key."""
        _check(key)
        await (await self._ready()).delete(key)

    async def list(self, prefix: str = "") -> Artifacts:
        """What is there under all keys that begin with `prefix`.

        What somebody replaces at this very moment may be left out.
        """
        _check_prefix(prefix)
        return await (await self._ready()).entries(prefix)

    async def watch(self, prefix: str = "") -> AsyncGenerator[Artifact, None]:
        """What is there under all keys that begin with `prefix`, then each change, for ever.

        Deletions are told too, with `deleted`. Goes on across reconnects and tells nothing twice.
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
    if not isinstance(key, str) or not 0 < len(_utf8(key)) <= _LONGEST_KEY:
        raise InvalidInput(f"{key!r} cannot be a key: it is a text of 1 to {_LONGEST_KEY} bytes.")


def _check_prefix(prefix: object) -> None:
    if not isinstance(prefix, str):
        raise InvalidInput(f"{prefix!r} cannot be the beginning of a key: it is no text.")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInput(f"A text for the workspace cannot be stored as UTF-8: {exc}.") from exc


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
        raise InvalidInput(
            f"What to put under '{key}' is a {type(data).__name__}, not bytes, text or a file."
        )


def _piece(key: str, piece: object) -> bytes | bytearray:
    if isinstance(piece, bytes | bytearray):
        return piece
    if isinstance(piece, memoryview):
        return piece.tobytes()
    raise InvalidInput(
        f"What to put under '{key}' has a {type(piece).__name__} where bytes should be. "
        'Encode texts, and open files with "rb".'
    )
