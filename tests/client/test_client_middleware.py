"""Client middlewares: what they may change, and what happens when they fail or hang."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
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


def plugin_with(middleware: ClientMiddleware) -> object:
    class Outgoing:
        @hookimpl
        def mesh_client_middleware(self) -> ClientMiddleware:
            return middleware

    return Outgoing()


async def test_a_client_middleware_cannot_suppress_an_error(url: str, name: str) -> None:
    """With a middleware that suppresses all errors, calls, streams and sends still fail."""

    @asynccontextmanager
    async def suppressing(operation: ClientOperation) -> AsyncIterator[None]:
        with suppress(Exception):
            yield

    async with mesh_with_plugins(url, name, plugin_with(suppressing)) as mesh:
        with pytest.raises(NotFound):
            await mesh.call(f"{name}.unknown", 1)
        with pytest.raises(InvalidInput):
            _ = [chunk async for chunk in mesh.stream(f"{name}.streamer", "x")]
        with pytest.raises(NotFound):
            await mesh.send(f"{name}.unknown", 1)


async def test_a_client_middleware_that_fails_after_the_answer_is_named(url: str, name: str) -> None:
    """Its exception is a PluginFailed with the plugin's name, after a reply as after an error."""

    @asynccontextmanager
    async def failing(operation: ClientOperation) -> AsyncIterator[None]:
        try:
            yield
        finally:
            raise KeyError("span")

    async with mesh_with_plugins(url, name, plugin_with(failing)) as mesh:
        for agent in ("responder", "unknown"):
            with pytest.raises(PluginFailed, match="'outgoing' failed after the call of"):
                await mesh.call(f"{name}.{agent}", 1)


async def test_a_client_middleware_that_hangs_before_a_call_times_out(url: str, name: str) -> None:
    """After the call's timeout MeshTimeout is raised, with the plugin's name."""

    @asynccontextmanager
    async def hanging(operation: ClientOperation) -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield

    async with mesh_with_plugins(url, name, plugin_with(hanging)) as mesh:
        with pytest.raises(MeshTimeout, match="The plugin 'outgoing' took too long before the call"):
            await mesh.call(f"{name}.responder", 1, timeout=0.1)


async def test_a_client_middleware_may_change_and_reject_events(
    url: str, mesh: AgentMesh, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A published event is sent with the changed body; a rejected one is logged and not delivered."""

    @asynccontextmanager
    async def changing(operation: ClientOperation) -> AsyncIterator[None]:
        if operation.verb == "publish":
            operation.body = operation.body.replace(b"1", b"42")
        elif operation.body == b"13":
            raise PermissionDenied("not this one")
        yield

    async with mesh_with_plugins(url, name, plugin_with(changing)) as guarded:
        reading = await start_reading(guarded, guarded.subscribe(subject=f"{name}.e"), 2)
        for number in (1, 3):
            await mesh.publish(f"{name}.e", "13")
            await flush(mesh)
            await guarded.publish(f"{name}.e", str(number))
        assert ["42", "3"] == [str(each) for each in await reading]
    assert f"event on {name}.e rejected" in caplog.text


async def test_changes_of_a_received_event_reach_the_subscriber(url: str, name: str) -> None:
    """Body and headers may be changed: a plugin may encrypt published and decrypt received events."""

    @asynccontextmanager
    async def inverting(operation: ClientOperation) -> AsyncIterator[None]:
        operation.body = bytes(255 - byte for byte in operation.body)
        operation.headers["X-Verb"] = operation.verb
        yield

    async with mesh_with_plugins(url, name, plugin_with(inverting)) as mesh:
        subject = f"{name}.e"
        reading = asyncio.create_task(_first(mesh, subject))
        while not reading.done():
            await mesh.publish(subject, b"hidden")
            await asyncio.sleep(0)
        event = await reading
    assert b"hidden" == event.data
    assert "receive" == event.headers["X-Verb"]


async def _first(mesh: AgentMesh, subject: str) -> MeshMessage[object]:
    async for message in mesh.subscribe(subject=subject, messages=True):
        return message
    raise AssertionError("the subscription ended")


@asynccontextmanager
async def lingering(operation: ClientOperation) -> AsyncIterator[None]:
    """Wait 0.3 seconds before the operation, and for ever after it."""
    await asyncio.sleep(0.3)
    yield
    await asyncio.Event().wait()


async def test_a_client_middleware_that_hangs_after_the_answer_times_out(url: str, name: str) -> None:
    """After the request's timeout MeshTimeout is raised, with the plugin's name."""
    async with mesh_with_plugins(url, name, plugin_with(lingering)) as mesh, asyncio.timeout(10):
        with pytest.raises(MeshTimeout, match="The plugin 'outgoing' took too long after the call"):
            await mesh.call(f"{name}.responder", 1, timeout=0.5)


async def test_the_total_time_of_a_stream_includes_client_middlewares(url: str, name: str) -> None:
    """The time that middlewares take before the request counts towards `total`."""
    async with mesh_with_plugins(url, name, plugin_with(lingering)) as mesh:
        with pytest.raises(MeshTimeout):
            _ = [chunk async for chunk in mesh.stream(f"{name}.streamer", 1, timeout=1, total=0.2)]


async def test_a_fast_publisher_with_a_client_middleware_yields_to_the_loop(url: str, name: str) -> None:
    """Other tasks run at least once per 1000 events."""

    @asynccontextmanager
    async def passing(operation: ClientOperation) -> AsyncIterator[None]:
        yield

    emitted = 0
    mesh = AgentMesh(url, plugins=[plugin_with(passing)])

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


async def test_a_client_middleware_may_set_the_request_id(url: str, name: str) -> None:
    """A stream is received under the id that the request is sent with, and errors have it, too."""

    @asynccontextmanager
    async def setting(operation: ClientOperation) -> AsyncIterator[None]:
        operation.headers["X-Mesh-Request-Id"] = "chosen"
        yield

    async with mesh_with_plugins(url, name, plugin_with(setting)) as mesh:
        assert [0, 1, 2] == [chunk async for chunk in mesh.stream(f"{name}.streamer", 3, timeout=5)]
        with pytest.raises(InvalidInput) as caught:
            await mesh.call(f"{name}.responder", "x")
        assert "chosen" == caught.value.request_id
