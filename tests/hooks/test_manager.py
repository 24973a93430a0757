"""Plugins of a mesh: what their middlewares and lifespans enclose, and invalid or failing plugins."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from openagentmesh import Agent, AgentMesh, AgentSpec, Instance, Middleware, PluginFailed, hookimpl

from tests.support.meshes import start_reading
from tests.support.plugins import Events, Recorder, mesh_with_plugins


class Running:
    """Records its lifespan, or fails to start."""

    def __init__(self, events: Events, *, fails: bool = False) -> None:
        self.events = events
        self.fails = fails

    @hookimpl
    def mesh_lifespan(self, instance: Instance) -> AbstractAsyncContextManager[None]:
        return self._run(instance)

    @asynccontextmanager
    async def _run(self, instance: Instance) -> AsyncIterator[None]:
        if self.fails:
            raise OSError("the port is taken")
        self.events.append(("started", len(instance.status().agents)))
        yield
        self.events.append(("stopped", len(instance.status().agents)))


async def test_the_first_plugin_is_outermost(url: str, name: str) -> None:
    """Requests run through both middlewares in the order of the plugins; added headers arrive."""
    events: Events = []
    agent = f"{name}.responder"
    async with mesh_with_plugins(url, name, Recorder("a", events), Recorder("b", events)) as mesh:
        assert [1, "ab", "b"] == await mesh.call(agent, 1)
        assert [
            ("a", "out", "call", agent),
            ("b", "out", "call", agent),
            ("a", "in", "call", agent),
            ("b", "in", "call", agent),
            ("b", "done", "call", 0),
            ("a", "done", "call", 0),
        ] == events


async def test_middlewares_enclose_streams_and_sends(url: str, name: str) -> None:
    """A stream runs as a whole within them, and its chunks are counted."""
    events: Events = []
    async with mesh_with_plugins(url, name, Recorder("a", events)) as mesh:
        assert [0, 1, 2] == [chunk async for chunk in mesh.stream(f"{name}.streamer", 3)]
        assert ("a", "in", "stream", f"{name}.streamer") in events
        assert ("a", "done", "stream", 3) == events[-1]
        replied: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        await mesh.send(f"{name}.responder", 5, on_reply=replied.set_result)
        assert 5 == (await replied)[0]
        assert ("a", "in", "send", f"{name}.responder") in events


async def test_client_middlewares_enclose_published_and_received_events(
    url: str, mesh: AgentMesh, name: str
) -> None:
    """A published event has the headers that plugins add; each received event runs through them."""
    recorded: Events = []
    async with AgentMesh(url, plugins=[Recorder("a", recorded)]) as plugged:
        subject = f"{name}.events"
        reading = await start_reading(plugged, plugged.subscribe(subject=subject), 1)
        plain = await start_reading(mesh, mesh.subscribe(subject=subject, messages=True), 1)
        await plugged.publish(subject, "hi")
        assert ["a"] == [message.headers["x-tag"] for message in await plain]
        assert ["hi"] == await reading
        assert ("a", "out", "publish", subject) in recorded
        assert ("a", "done", "receive", 0) == recorded[-1]


async def test_client_middlewares_enclose_the_events_of_a_publisher(
    url: str, mesh: AgentMesh, name: str
) -> None:
    """Each event of a publisher has the headers that plugins add."""
    plugged = AgentMesh(url, plugins=[Recorder("a", [])])
    go = asyncio.Event()

    @plugged.agent(AgentSpec(name=name))
    async def publisher() -> AsyncIterator[int]:
        await go.wait()
        yield 7

    async with plugged:
        reading = await start_reading(mesh, mesh.subscribe(agent=name, messages=True), 1)
        go.set()
        assert [(7, "a")] == [(event.data, event.headers["x-tag"]) for event in await reading]


async def test_middlewares_enclose_messages_of_sources(url: str, mesh: AgentMesh, name: str) -> None:
    """A message of a source runs through the middlewares like a request."""
    events: Events = []
    plugged = AgentMesh(url, plugins=[Recorder("a", events)])
    seen: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @plugged.agent(AgentSpec(name=name), sources=[plugged.subject_source(f"{name}.in")])
    async def driven(text: str) -> None:
        seen.set_result(text)

    async with plugged:
        await mesh.publish(f"{name}.in", "hello")
        assert "hello" == await seen
        assert ("a", "in", "source", name) in events


async def test_a_lifespan_encloses_the_serving_of_agents(url: str, name: str) -> None:
    """It is entered before the first agent serves, and exited after the last one."""
    events: Events = []
    async with mesh_with_plugins(url, name, Running(events)):
        assert [("started", 0)] == events
    assert ("stopped", 2) == events[-1]


async def test_a_plugin_that_cannot_start_fails_the_start(url: str, mesh: AgentMesh, name: str) -> None:
    """The error names it, the plugins before it are stopped, and no agent serves."""
    events: Events = []
    with pytest.raises(PluginFailed, match="The plugin 'running-2' cannot start: the port is taken"):
        async with mesh_with_plugins(url, name, Running(events), Running(events, fails=True)):
            pass
    assert ["started", "stopped"] == [event for event, _ in events]
    assert [] == [entry for entry in await mesh.catalog() if entry.name.startswith(name)]


class UnknownHook:
    """Implements a hook that does not exist."""

    @hookimpl
    def mesh_midleware(self) -> None: ...


class UnknownArgument:
    """Takes an argument that its hook does not have."""

    @hookimpl
    def mesh_cli(self, application: object) -> None: ...


class NoHook:
    """Has no @hookimpl."""

    def mesh_cli(self, app: object) -> None: ...


class UnmarkedHook:
    """Has no @hookimpl above one of two hooks."""

    @hookimpl
    def mesh_cli(self, app: object) -> None: ...

    def mesh_middleware(self, agent: Agent) -> None: ...


class AsyncHook:
    """Has a hook that is a coroutine function."""

    @hookimpl
    async def mesh_configure(self, settings: object) -> None: ...


@pytest.mark.parametrize(
    ("plugin", "problem"),
    [
        (UnknownHook, "mesh_midleware"),
        (UnknownArgument, "application"),
        (NoHook, "implements no hook"),
        (dict, "no hook"),
        (UnmarkedHook, "mesh_middleware without @hookimpl"),
        (AsyncHook, "mesh_configure as an `async def`"),
    ],
)
def test_an_invalid_plugin_is_rejected(plugin: Callable[[], object], problem: str) -> None:
    """Unknown hooks and arguments, and plugins without a hook, raise PluginFailed with the problem."""
    with pytest.raises(PluginFailed, match=f"(?s)The plugin '{plugin.__name__.lower()}'.*{problem}"):
        AgentMesh(plugins=[plugin])


@pytest.mark.parametrize(
    ("hook", "problem"),
    [
        (lambda _: 1 / 0, "failed in mesh_middleware: division by zero"),
        (lambda _: lambda _: 1 / 0, "cannot be applied to .*: division by zero"),
        (lambda _: lambda _: None, "cannot be applied to .*: its middleware returned None"),
    ],
)
async def test_an_agent_without_the_middleware_of_a_failing_plugin_does_not_serve(
    url: str, name: str, hook: Callable[[Agent], Middleware], problem: str
) -> None:
    """A plugin whose middleware cannot be applied fails the start: the agent would be unprotected."""

    class Failing:
        @hookimpl
        def mesh_middleware(self, agent: Agent) -> Middleware:
            return hook(agent)

    with pytest.raises(PluginFailed, match=f"The plugin 'failing' {problem}"):
        async with mesh_with_plugins(url, name, Failing()):
            pass


async def test_a_plugin_that_does_not_stop_does_not_block_the_stop(
    url: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lifespans that raise, hang or are cancelled are named in the log, and the mesh is closed."""
    monkeypatch.setattr("openagentmesh.hooks.manager._STOP_TIMEOUT_S", 0.1)

    class Raising:
        @hookimpl
        @asynccontextmanager
        async def mesh_lifespan(self) -> AsyncIterator[None]:
            yield
            raise OSError("failure of a plugin")

    class Hanging:
        @hookimpl
        @asynccontextmanager
        async def mesh_lifespan(self) -> AsyncIterator[None]:
            yield
            await asyncio.Event().wait()

    class Cancelling:
        @hookimpl
        @asynccontextmanager
        async def mesh_lifespan(self) -> AsyncIterator[None]:
            task = asyncio.create_task(asyncio.Event().wait())
            yield
            task.cancel()
            await task

    async with mesh_with_plugins(url, name, Raising(), Hanging(), Cancelling()) as mesh:
        await mesh.call(f"{name}.responder", 1)
    for plugin in ("raising", "hanging", "cancelling"):
        assert f"plugin '{plugin}' did not stop cleanly" in caplog.text
