"""The object store and other clients: the standard format, malformed metadata, and buckets of others."""

import hashlib
import json
import os
from base64 import urlsafe_b64encode

import nats
import pytest
from nats.js import JetStreamContext
from nats.js.errors import ObjectNotFoundError
from nats.js.object_store import ObjectStore as LibraryStore
from openagentmesh import ConnectionFailed, MeshError, NotFound, PayloadTooLarge
from openagentmesh.protocol.objects import CHUNK_SIZE, STREAM, metadata_subject
from openagentmesh.protocol.subjects import ARTIFACTS_BUCKET
from openagentmesh.transport.object_store import ObjectStore
from openagentmesh.transport.server import EmbeddedServer

from tests.support.objects import chunk_counts, connected, content_of, in_pieces

SIZES = [0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 10 * CHUNK_SIZE + 7]
KEYS = ["plain", "a folder/Größe 2.pdf", "日本/📦.tar gz", "dots.and*>"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", KEYS)
async def test_the_library_reads_our_objects(
    objects: ObjectStore, library: LibraryStore, name: str, key: str, size: int
) -> None:
    """Content, size, digest and number of chunks are as if the library had put the object."""
    content = os.urandom(size)
    put = await objects.put(f"{name}/{key}", in_pieces(content))
    result = await library.get(f"{name}/{key}")
    assert content == result.data
    info = result.info
    digest = "SHA-256=" + urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
    assert (f"{name}/{key}", size, digest) == (put.key, put.size, put.digest)
    assert (put.key, put.size, put.digest) == (info.name, info.size, info.digest)
    assert (info.chunks or 0) == -(-size // CHUNK_SIZE)
    await library.delete(put.key)
    with pytest.raises(NotFound):
        await content_of(objects, put.key)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", KEYS)
async def test_objects_of_the_library_are_read(
    objects: ObjectStore, library: LibraryStore, name: str, key: str, size: int
) -> None:
    """Also when the object replaces one of ours; the library finds that we deleted it."""
    content = os.urandom(size)
    await objects.put(f"{name}/{key}", in_pieces(b"ours"))
    put = await library.put(f"{name}/{key}", content)
    assert content == await content_of(objects, f"{name}/{key}")
    (found,) = await objects.entries(name)
    assert (f"{name}/{key}", size, put.digest, False) == (
        found.key, found.size, found.digest, found.deleted,
    )  # fmt: skip
    await objects.delete(found.key)
    with pytest.raises(ObjectNotFoundError):
        await library.get(found.key)
    assert [] == await objects.entries(name)


async def test_a_damaged_object_raises_an_error(
    objects: ObjectStore, jetstream: JetStreamContext, name: str
) -> None:
    """A wrong digest, a wrong size, missing chunks and links raise an error, after the last piece at most."""
    await objects.put(name, in_pieces(bytes(3 * CHUNK_SIZE)))
    subject = metadata_subject(name)
    valid = json.loads((await jetstream.get_last_msg(STREAM, subject)).data or b"")
    for damaged, message in (
        ({"digest": "SHA-256=" + "A" * 43 + "="}, "damaged"),
        ({"digest": ""}, "damaged"),
        ({"size": 3 * CHUNK_SIZE - 1}, "damaged"),
        ({"size": 3 * CHUNK_SIZE + 1}, "incomplete"),
        ({"nuid": "nothing"}, "incomplete"),
        ({"options": {"link": {"bucket": ARTIFACTS_BUCKET, "name": "other"}}}, "link"),
    ):
        await jetstream.publish(subject, json.dumps(valid | damaged).encode(), headers={"Nats-Rollup": "sub"})
        with pytest.raises(MeshError, match=message):
            await content_of(objects, name)


@pytest.mark.parametrize("metadata", [b"", b"no json", b"[]", b'{"name": 1}', b'{"name": "x", "nuid": ">"}'])
async def test_malformed_metadata_is_ignored(
    objects: ObjectStore, jetstream: JetStreamContext, name: str, metadata: bytes
) -> None:
    """The object counts as missing: it is not found, other objects are listed, and it can be put."""
    await objects.put(f"{name}/good", in_pieces(b"1"))
    await jetstream.publish(metadata_subject(f"{name}/bad"), metadata)
    with pytest.raises(NotFound):
        await content_of(objects, f"{name}/bad")
    assert [f"{name}/good"] == [artifact.key for artifact in await objects.entries(name)]
    await objects.put(f"{name}/bad", in_pieces(b"2"))
    assert b"2" == await content_of(objects, f"{name}/bad")


async def test_a_bucket_with_other_settings_is_usable(name: str) -> None:
    """A bucket without direct reads and with a size limit; a full and a deleted bucket are reported."""
    server = EmbeddedServer()
    await server.start()
    client = await nats.connect(server.url)
    jetstream = client.jetstream()
    await jetstream.create_object_store(ARTIFACTS_BUCKET, max_bytes=10 * CHUNK_SIZE)
    config = (await jetstream.stream_info(STREAM)).config
    await jetstream.update_stream(config.evolve(allow_direct=False))
    async with connected(server.url) as (_, objects):
        content = os.urandom(3 * CHUNK_SIZE)
        await objects.put(name, in_pieces(content))
        before = await chunk_counts(jetstream)
        with pytest.raises(PayloadTooLarge, match="no space"):
            await objects.put(name, in_pieces(bytes(20 * CHUNK_SIZE)))
        assert content == await content_of(objects, name)
        assert before == await chunk_counts(jetstream)
        await jetstream.delete_object_store(ARTIFACTS_BUCKET)
        with pytest.raises(ConnectionFailed, match="stream not found"):  # unlike an unknown object
            await content_of(objects, name)
    await client.close()
    await server.stop()
