"""The border that all that leaves a mesh passes: what its middlewares change, and when they fail or hang."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from itertools import pairwise

import pytest
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    ClientMiddleware,
    ClientOperation,
    InvalidInput,
    MeshMessage,
    MeshTimeout,
    NotFound,
    PermissionDenied,
    PluginFailed,
    hookimpl,
)

from tests.support.meshes import flush, start_reading
from tests.support.plugins import mesh_with_plugins

Leaving = Callable[[ClientOperation], AbstractAsyncContextManager[object]]


def at_the_border(middleware: Leaving) -> object:
    class Leaver:
        @hookimpl
        def mesh_client_middleware(self) -> ClientMiddleware:
            return middleware

    return Leaver()


async def test_a_client_middleware_makes_no_success_of_a_failure(url: str, name: str) -> None:
    """One that swallows what passes it changes nothing: calls, streams and sends fail as they did."""

    @asynccontextmanager
    async def swallowing(outgoing: ClientOperation) -> AsyncIterator[None]:
        with suppress(Exception):
            yield

    async with mesh_with_plugins(url, name, at_the_border(swallowing)) as mesh:
        with pytest.raises(NotFound):
            await mesh.call(f"{name}.nobody", 1)
        with pytest.raises(InvalidInput):
            _ = [chunk async for chunk in mesh.stream(f"{name}.counts", "x")]
        with pytest.raises(NotFound):
            await mesh.send(f"{name}.nobody", 1)


async def test_a_client_middleware_that_fails_afterwards_is_named(url: str, name: str) -> None:
    """What it raises when the answer is there is a MeshError with its name; so is a failing answer's."""

    @asynccontextmanager
    async def failing(outgoing: ClientOperation) -> AsyncIterator[None]:
        try:
            yield
        finally:
            raise KeyError("span")

    async with mesh_with_plugins(url, name, at_the_border(failing)) as mesh:
        for agent in ("asked", "nobody"):
            with pytest.raises(PluginFailed, match="'leaver' failed after the call of"):
                await mesh.call(f"{name}.{agent}", 1)


async def test_a_client_middleware_that_hangs_is_out_of_time(url: str, name: str) -> None:
    """It has as long as the call has, and is named then."""

    @asynccontextmanager
    async def hanging(outgoing: ClientOperation) -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield

    async with mesh_with_plugins(url, name, at_the_border(hanging)) as mesh:
        with pytest.raises(MeshTimeout, match="The plugin 'leaver' took too long before the call"):
            await mesh.call(f"{name}.asked", 1, timeout=0.1)


async def test_events_may_be_changed_and_refused_at_the_border(
    url: str, mesh: AgentMesh, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed body is what is sent; a subscriber misses what is refused, and gets the next one."""

    @asynccontextmanager
    async def changing(outgoing: ClientOperation) -> AsyncIterator[None]:
        if outgoing.verb == "publish":
            outgoing.body = outgoing.body.replace(b"1", b"42")
        elif outgoing.body == b"13":
            raise PermissionDenied("not this one")
        yield

    async with mesh_with_plugins(url, name, at_the_border(changing)) as guarded:
        reading = await start_reading(guarded, guarded.subscribe(subject=f"{name}.e"), 2)
        for number in (1, 3):
            await mesh.publish(f"{name}.e", "13")
            await flush(mesh)
            await guarded.publish(f"{name}.e", str(number))
        assert ["42", "3"] == [str(each) for each in await reading]
    assert f"event on {name}.e rejected" in caplog.text


async def test_what_is_changed_on_an_event_that_comes_is_what_is_read(url: str, name: str) -> None:
    """Body and headers: a plugin that decrypts events gives its subscribers what was encrypted."""

    @asynccontextmanager
    async def crypt(outgoing: ClientOperation) -> AsyncIterator[None]:
        outgoing.body = bytes(255 - byte for byte in outgoing.body)
        outgoing.headers["X-Seen"] = outgoing.verb
        yield

    async with mesh_with_plugins(url, name, at_the_border(crypt)) as mesh:
        subject = f"{name}.e"
        reading = asyncio.create_task(_first(mesh, subject))
        while not reading.done():
            await mesh.publish(subject, b"hidden")
            await asyncio.sleep(0)
        event = await reading
    assert b"hidden" == event.data
    assert "receive" == event.headers["X-Seen"]


async def _first(mesh: AgentMesh, subject: str) -> MeshMessage[object]:
    async for message in mesh.subscribe(subject=subject, messages=True):
        return message
    raise AssertionError("it ended")


@asynccontextmanager
async def lingering(outgoing: ClientOperation) -> AsyncIterator[None]:
    """Takes its time before and after what leaves."""
    await asyncio.sleep(0.3)
    yield
    await asyncio.Event().wait()


async def test_what_a_client_middleware_does_afterwards_is_bounded(url: str, name: str) -> None:
    """By the request's timeout, too; then it is named."""
    async with mesh_with_plugins(url, name, at_the_border(lingering)) as mesh, asyncio.timeout(10):
        with pytest.raises(MeshTimeout, match="The plugin 'leaver' took too long after the call"):
            await mesh.call(f"{name}.asked", 1, timeout=0.5)


async def test_the_time_for_all_of_a_stream_begins_before_the_border(url: str, name: str) -> None:
    """What middlewares take of `total` is gone for the stream."""
    async with mesh_with_plugins(url, name, at_the_border(lingering)) as mesh:
        with pytest.raises(MeshTimeout):
            _ = [chunk async for chunk in mesh.stream(f"{name}.counts", 1, timeout=1, total=0.2)]


async def test_a_publisher_makes_way_within_a_client_middleware(url: str, name: str) -> None:
    """However fast it yields, others in its host have their turn."""

    @asynccontextmanager
    async def passing(outgoing: ClientOperation) -> AsyncIterator[None]:
        yield

    emitted = 0
    mesh = AgentMesh(url, plugins=[at_the_border(passing)])

    @mesh.agent(AgentSpec(name=f"{name}.ticks"))
    async def ticks() -> AsyncIterator[int]:
        nonlocal emitted
        for number in range(20_000):
            yield number
            emitted += 1

    seen: list[int] = []
    async with mesh:
        while len(seen) < 100:
            await asyncio.sleep(0)
            if emitted:
                seen.append(emitted)
    assert 0 < max(later - before for before, later in pairwise(seen)) < 1000
