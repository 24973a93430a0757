"""Fixtures of the transport's tests: the object store, and the library's view of it."""

from collections.abc import AsyncIterator

import nats
import pytest
from nats.js import JetStreamContext
from nats.js.object_store import ObjectStore as LibraryStore
from openagentmesh.protocol.subjects import ARTIFACTS_BUCKET
from openagentmesh.transport.object_store import ObjectStore

from tests.support.objects import connected


@pytest.fixture
async def objects(url: str) -> AsyncIterator[ObjectStore]:
    """The object store over a connection of its own."""
    async with connected(url) as (_, store):
        yield store


@pytest.fixture
async def jetstream(url: str) -> AsyncIterator[JetStreamContext]:
    """The library's JetStream context over a connection of its own, as another client has it."""
    client = await nats.connect(url)
    yield client.jetstream()
    await client.close()


@pytest.fixture
async def library(objects: ObjectStore, jetstream: JetStreamContext) -> LibraryStore:
    """The library's store of the same bucket."""
    await objects.create_missing()
    return await jetstream.object_store(ARTIFACTS_BUCKET)
