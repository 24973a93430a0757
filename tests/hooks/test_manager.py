"""Plugins of a mesh of its own: what they are put around, and what happens when they fail."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from openagentmesh import (
    Agent,
    AgentMesh,
    AgentSpec,
    Instance,
    MeshMessage,
    Middleware,
    PluginFailed,
    hookimpl,
)

from tests.support.plugins import Events, Recorder, mesh_with_plugins


class Running:
    """Runs beside the agents, and may refuse to start."""

    def __init__(self, told: Events, *, fails: bool = False) -> None:
        self.told = told
        self.fails = fails

    @hookimpl
    def mesh_lifespan(self, instance: Instance) -> AbstractAsyncContextManager[None]:
        return self._run(instance)

    @asynccontextmanager
    async def _run(self, instance: Instance) -> AsyncIterator[None]:
        if self.fails:
            raise OSError("the port is taken")
        self.told.append(("started", len(instance.status().agents)))
        yield
        self.told.append(("stopped", len(instance.status().agents)))


async def test_the_first_plugin_is_outermost(url: str, name: str) -> None:
    """In and out, requests pass plugins in their order; what they add arrives, and who is proven is seen."""
    told: Events = []
    asked = f"{name}.asked"
    async with mesh_with_plugins(url, name, Recorder("a", told), Recorder("b", told)) as mesh:
        assert [1, "ab", "b"] == await mesh.call(asked, 1)
        assert [
            ("a", "out", "call", asked),
            ("b", "out", "call", asked),
            ("a", "in", "call", asked),
            ("b", "in", "call", asked),
            ("b", "done", "call", 0),
            ("a", "done", "call", 0),
        ] == told


async def test_streams_and_sends_pass_too(url: str, name: str) -> None:
    """A stream is bracketed as a whole and its chunks are counted; a send passes once it is out."""
    told: Events = []
    async with mesh_with_plugins(url, name, Recorder("a", told)) as mesh:
        assert [0, 1, 2] == [chunk async for chunk in mesh.stream(f"{name}.counts", 3)]
        assert ("a", "in", "stream", f"{name}.counts") in told
        assert ("a", "done", "stream", 3) == told[-1]
        replied: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        await mesh.send(f"{name}.asked", 5, on_reply=replied.set_result)
        assert 5 == (await replied)[0]
        assert ("a", "in", "send", f"{name}.asked") in told


async def test_events_pass_when_they_leave_and_when_they_come(url: str, mesh: AgentMesh, name: str) -> None:
    """What is published carries what plugins add, and each received event passes their border."""
    told: Events = []
    async with AgentMesh(url, plugins=[Recorder("a", told)]) as plugged:
        events = plugged.subscribe(subject=f"{name}.events", messages=True)
        next_event: asyncio.Task[MeshMessage[Any]] = asyncio.ensure_future(anext(events))
        plain = mesh.subscribe(subject=f"{name}.events", messages=True)
        next_plain: asyncio.Task[MeshMessage[Any]] = asyncio.ensure_future(anext(plain))
        await asyncio.sleep(0)
        await mesh.kv.put(f"{name}.flush", "")  # both listen once the server has answered this
        await plugged.kv.put(f"{name}.flush", "")
        await plugged.publish(f"{name}.events", "hi")
        assert "a" == (await next_plain).headers["x-tag"]
        assert "hi" == (await next_event).data
        assert ("a", "out", "publish", f"{name}.events") in told
        assert ("a", "done", "receive", 0) == told[-1]
        await events.aclose()
        await plain.aclose()


async def test_a_publishers_events_pass(url: str, mesh: AgentMesh, name: str) -> None:
    """Each event of a publisher carries what plugins add, and stays an event."""
    plugged = AgentMesh(url, plugins=[Recorder("a", [])])
    go = asyncio.Event()

    @plugged.agent(AgentSpec(name=name))
    async def publisher() -> AsyncIterator[int]:
        await go.wait()
        yield 7

    async with plugged:
        events = mesh.subscribe(agent=name, messages=True)
        first: asyncio.Task[MeshMessage[Any]] = asyncio.ensure_future(anext(events))
        await mesh.contract(name)
        await mesh.kv.put(f"{name}.flush", "")
        go.set()
        event = await first
        assert (7, "a") == (event.data, event.headers["x-tag"])
        await events.aclose()


async def test_sources_pass(url: str, mesh: AgentMesh, name: str) -> None:
    """A message that drives an agent passes its plugins like a request."""
    told: Events = []
    plugged = AgentMesh(url, plugins=[Recorder("a", told)])
    seen: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @plugged.agent(AgentSpec(name=name), sources=[plugged.subject_source(f"{name}.in")])
    async def driven(text: str) -> None:
        seen.set_result(text)

    async with plugged:
        await mesh.publish(f"{name}.in", "hello")
        assert "hello" == await seen
        assert ("a", "in", "source", name) in told


async def test_what_runs_beside_the_agents(url: str, name: str) -> None:
    """A lifespan begins before the first agent serves, and ends after the last one."""
    told: Events = []
    async with mesh_with_plugins(url, name, Running(told)):
        assert [("started", 0)] == told
    assert ("stopped", 2) == told[-1]


async def test_a_plugin_that_cannot_start_stops_the_start(url: str, mesh: AgentMesh, name: str) -> None:
    """It is named, those before it are stopped, and nothing serves."""
    told: Events = []
    with pytest.raises(PluginFailed, match="The plugin 'running-2' cannot start: the port is taken"):
        async with mesh_with_plugins(url, name, Running(told), Running(told, fails=True)):
            pass
    assert ["started", "stopped"] == [what for what, _ in told]
    assert [] == [entry for entry in await mesh.catalog() if entry.name.startswith(name)]


class Misspelt:
    """Implements a hook that there is not."""

    @hookimpl
    def mesh_midleware(self) -> None: ...


class Greedy:
    """Wants an argument that its hook does not have."""

    @hookimpl
    def mesh_cli(self, application: object) -> None: ...


class Empty:
    """Forgot @hookimpl."""

    def mesh_cli(self, app: object) -> None: ...


class Forgetful:
    """Forgot @hookimpl above one of two hooks."""

    @hookimpl
    def mesh_cli(self, app: object) -> None: ...

    def mesh_middleware(self, agent: Agent) -> None: ...


class Waiting:
    """Has a hook that would have to be awaited, and is not."""

    @hookimpl
    async def mesh_configure(self, settings: object) -> None: ...


@pytest.mark.parametrize(
    ("plugin", "why"),
    [
        (Misspelt, "mesh_midleware"),
        (Greedy, "application"),
        (Empty, "implements no hook"),
        (dict, "no hook"),
        (Forgetful, "mesh_middleware without @hookimpl"),
        (Waiting, "mesh_configure as an `async def`"),
    ],
)
def test_what_is_no_plugin_is_refused(plugin: Callable[[], object], why: str) -> None:
    """Unknown hooks and arguments, and plugins without any, are named instead of ignored."""
    with pytest.raises(PluginFailed, match=f"(?s)The plugin '{plugin.__name__.lower()}'.*{why}"):
        AgentMesh(plugins=[plugin])


@pytest.mark.parametrize(
    ("hook", "why"),
    [
        (lambda _: 1 / 0, "failed in mesh_middleware: division by zero"),
        (lambda _: lambda _: 1 / 0, "cannot be applied to .*: division by zero"),
        (lambda _: lambda _: None, "cannot be applied to .*: its middleware returned None"),
    ],
)
async def test_an_agent_that_a_plugin_cannot_take_does_not_serve(
    url: str, name: str, hook: Callable[[Agent], Middleware], why: str
) -> None:
    """A plugin that fails while it looks at an agent leaves it unserved rather than unprotected."""

    class Picky:
        @hookimpl
        def mesh_middleware(self, agent: Agent) -> Middleware:
            return hook(agent)

    with pytest.raises(PluginFailed, match=f"The plugin 'picky' {why}"):
        async with mesh_with_plugins(url, name, Picky()):
            pass


async def test_a_plugin_that_fails_to_stop_holds_up_nothing(
    url: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that raises and one that hangs are named; the mesh is left all the same."""
    monkeypatch.setattr("openagentmesh.hooks.manager._STOP_TIMEOUT_S", 0.1)

    class Raising:
        @hookimpl
        @asynccontextmanager
        async def mesh_lifespan(self) -> AsyncIterator[None]:
            yield
            raise OSError("it is stuck")

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
        await mesh.call(f"{name}.asked", 1)
    assert "plugin 'raising' did not stop cleanly" in caplog.text
    assert "plugin 'hanging' did not stop cleanly" in caplog.text
