"""The workspace: forms of content, limits, bounded memory, and errors."""

import asyncio
import io
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import InvalidInput, NotFound, PayloadTooLarge
from openagentmesh.protocol.objects import CHUNK_SIZE
from openagentmesh.state.workspace import Workspace
from openagentmesh.transport.connection import Connection, Target
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.object_store import ObjectStore
from openagentmesh.transport.tasks import cancel_and_wait

CONTENT = bytes(range(256)) * 2_000

MIB = 2**20


@pytest.fixture
async def workspace(url: str) -> AsyncIterator[Workspace]:
    connection = Connection(Target(url), "workspace")
    await connection.connect()
    inbox = Inbox(connection)
    await inbox.open()
    objects = ObjectStore(connection, inbox)

    async def ready() -> ObjectStore:
        return objects

    yield Workspace(ready)
    await connection.close()


async def async_pieces(size: int) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(CONTENT), size):
        yield CONTENT[start : start + size]


def pieces(size: int) -> Iterator[bytes]:
    return (CONTENT[start : start + size] for start in range(0, len(CONTENT), size))


@pytest.mark.parametrize(
    "data",
    [
        lambda: CONTENT,
        lambda: bytearray(CONTENT),
        lambda: memoryview(CONTENT),
        lambda: memoryview(CONTENT + CONTENT[::-1])[: len(CONTENT)],
        lambda: io.BytesIO(CONTENT),
        lambda: async_pieces(1_000),
        lambda: async_pieces(200_000),
        lambda: pieces(100),
        lambda: [CONTENT],
        lambda: [b"", CONTENT, b""],
    ],
    ids=[
        "bytes",
        "bytearray",
        "memoryview",
        "slice",
        "file",
        "async-iterator",
        "async-iterator-large",
        "iterator",
        "list",
        "empty-pieces",
    ],
)
async def test_every_form_of_content_is_stored(workspace: Workspace, name: str, data: Any) -> None:
    """Bytes, files, and iterators of both kinds are read as bytes."""
    put = await workspace.put(name, data())
    assert (name, len(CONTENT)) == (put.key, put.size)
    assert CONTENT == await workspace.get(name)
    assert CONTENT == b"".join([piece async for piece in workspace.read(name)])


@pytest.mark.parametrize("text", ["", "Grüße, 世界 📦"])
async def test_a_text_is_stored_as_utf8(workspace: Workspace, name: str, text: str) -> None:
    """The content is the text's bytes in UTF-8, also of an empty one."""
    await workspace.put(name, text)
    assert text.encode() == await workspace.get(name)


async def test_a_file_is_stored_from_its_position(workspace: Workspace, name: str, tmp_path: Path) -> None:
    """The content begins at the file's current position, and the file stays open."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with path.open("rb") as file:
        file.seek(300_000)
        await workspace.put(name, file)
        assert not file.closed
    assert CONTENT[300_000:] == await workspace.get(name)


@pytest.mark.parametrize(
    "data",
    [None, 7, io.StringIO("text"), ["text"], [1], {"a": 1}, "\ud800", object()],
    ids=["none", "number", "text-file", "texts", "numbers", "dict", "surrogate", "object"],
)
async def test_content_that_cannot_be_stored_is_rejected(workspace: Workspace, name: str, data: Any) -> None:
    """It raises InvalidInput, and the stored content stays."""
    await workspace.put(name, b"old")
    with pytest.raises(InvalidInput):
        await workspace.put(name, data)
    assert b"old" == await workspace.get(name)


@pytest.mark.parametrize("key", ["", None, 7, b"bytes", "x" * 1025, "\ud800"])
async def test_an_invalid_key_is_rejected(workspace: Workspace, key: Any) -> None:
    """All methods raise InvalidInput for an invalid key or prefix."""
    for use in (
        workspace.put(key, b"x"),
        workspace.get(key),
        workspace.delete(key),
        anext(workspace.read(key)),
    ):
        with pytest.raises(InvalidInput):
            await use
    with pytest.raises(InvalidInput):
        await workspace.list(7)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(InvalidInput):
        await anext(workspace.watch(7))  # type: ignore[arg-type]  # what is tested


async def test_a_key_of_the_maximum_length_is_usable(workspace: Workspace) -> None:
    """It is written, read and deleted."""
    key = "ü" * 512
    await workspace.put(key, b"x")
    assert b"x" == await workspace.get(key)
    await workspace.delete(key)


async def test_progress_is_reported_in_bytes(workspace: Workspace, name: str) -> None:
    """`put`, `get` and `read` report the bytes so far after each chunk, up to the size."""
    put: list[int] = []
    got: list[int] = []
    read: list[int] = []
    await workspace.put(name, async_pieces(1_000), progress=put.append)
    await workspace.get(name, progress=got.append)
    async for _ in workspace.read(name, progress=read.append):
        pass
    assert [*range(CHUNK_SIZE, len(CONTENT), CHUNK_SIZE), len(CONTENT)] == put == got == read


async def test_content_above_the_limit_is_not_read(workspace: Workspace, name: str) -> None:
    """Content of exactly the limit is read; for larger content PayloadTooLarge is raised before any of it."""
    await workspace.put(name, CONTENT)
    assert CONTENT == await workspace.get(name, limit=len(CONTENT))
    read: list[int] = []
    with pytest.raises(PayloadTooLarge) as caught:
        await workspace.get(name, limit=len(CONTENT) - 1, progress=read.append)
    assert {"size": len(CONTENT), "limit": len(CONTENT) - 1} == caught.value.details
    assert [] == read


async def test_a_key_that_is_being_replaced_is_listed_once(workspace: Workspace, name: str) -> None:
    """A key that exists all the time is in every list, once, while it is replaced concurrently."""
    keys = [f"{name}/{number}" for number in range(5)]

    async def replace_all() -> None:
        while True:
            await asyncio.gather(*[workspace.put(key, "new") for key in keys])

    await asyncio.gather(*[workspace.put(key, "old") for key in keys])
    replacing = asyncio.create_task(replace_all())
    for _ in range(40):
        assert keys == sorted(each.key for each in await workspace.list(f"{name}/"))
    await cancel_and_wait(replacing)


async def test_the_workspace_is_listed_and_watched(workspace: Workspace, name: str) -> None:
    """Both take a prefix; a watch also yields deletions."""
    for key in ("a/1", "a/2", "b"):
        await workspace.put(f"{name}/{key}", key)
    assert [f"{name}/a/1", f"{name}/a/2"] == sorted(found.key for found in await workspace.list(f"{name}/a/"))
    changes = workspace.watch(f"{name}/b")
    assert (f"{name}/b", 1, False) == ((found := await anext(changes)).key, found.size, found.deleted)
    await workspace.delete(f"{name}/b")
    assert (f"{name}/b", True) == ((found := await anext(changes)).key, found.deleted)
    await changes.aclose()
    with pytest.raises(NotFound, match=f"{name}/b"):
        await workspace.get(f"{name}/b")


async def test_content_of_64_mib_is_transferred_in_bounded_memory(workspace: Workspace, name: str) -> None:
    """`put` of an iterator and `read` take a few MiB; `get` has the content in memory once."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        await workspace.put(name, (bytes(MIB) for _ in range(64)))
        assert 64 * MIB == sum([len(piece) async for piece in workspace.read(name)])
        _, streamed = tracemalloc.get_traced_memory()
        assert 64 * MIB == len(await workspace.get(name))
        _, whole = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert streamed - before < 8 * MIB
    assert whole - before < (64 + 16) * MIB
    await workspace.delete(name)
