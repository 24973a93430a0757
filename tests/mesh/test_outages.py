"""Absences of the server: nothing that was there stays away, and nobody hears of a death that was none."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, AgentSpec, ConnectionFailed, MeshError, MeshTimeout
from openagentmesh.protocol.subjects import REGISTRY_BUCKET
from openagentmesh.registry import presence
from openagentmesh.transport.server import EmbeddedServer

from tests.support.meshes import flush, node_of, pending_instance, serve, take_next
from tests.support.servers import restartable
from tests.support.waiting import until

Hold = Callable[[AgentMesh], asyncio.Event]


class Server:
    """A server that goes away, and comes back with what it stores."""

    def __init__(self, store: Path) -> None:
        self._store = str(store)
        self._server = EmbeddedServer(store=self._store)

    async def go_away(self, *meshes: AgentMesh) -> None:
        """Stop; ends when all of these have lost it."""
        await self._server.stop()
        for mesh in meshes:
            await connected(mesh, wanted=False)

    async def come_back(self) -> None:
        self._server = EmbeddedServer(self._server.port, self._store)
        await self._server.start()


async def connected(mesh: AgentMesh, *, wanted: bool = True) -> None:
    async def as_wanted() -> bool:
        return node_of(mesh).connection.connected is wanted

    await until(as_wanted)


@asynccontextmanager
async def served(store: Path) -> AsyncIterator[tuple[Server, AgentMesh, AgentMesh]]:
    """A server, and two meshes on it: a provider and a caller."""
    server = Server(store)
    await server._server.start()
    try:
        async with AgentMesh(server._server.url) as provider, AgentMesh(server._server.url) as caller:
            yield server, provider, caller
    finally:
        await server._server.stop()


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Hold:
    """Lets a mesh come back to the server only when what this gives is set."""

    def holding(mesh: AgentMesh) -> asyncio.Event:
        client, released = node_of(mesh).connection._client, asyncio.Event()
        select = client._select_next_server

        async def wait() -> None:
            await released.wait()
            await select()

        monkeypatch.setattr(client, "_select_next_server", wait)
        return released

    return holding


@pytest.mark.parametrize("kind", ["call", "failing-call", "stream", "ending-stream"])
async def test_an_answer_waits_for_a_caller_that_comes_back_later(
    hold: Hold, tmp_path: Path, kind: str
) -> None:
    """What a handler had to say while the server was away arrives, though its host is back first."""
    begun, go, said = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await go.wait()
        said.set()
        if kind == "failing-call":
            raise MeshError("own", "no")

    async with served(tmp_path) as (server, provider, caller), asyncio.timeout(20):

        @provider.agent(AgentSpec(name="call"))
        async def call(req: int) -> int:
            await work()
            return req

        @provider.agent(AgentSpec(name="stream"))
        async def stream(req: int) -> AsyncIterator[int]:
            yield 0
            await work()
            if kind == "stream":
                yield req

        async def ask() -> object:
            if kind.endswith("call"):
                return await caller.call("call", 7, timeout=15)
            return [chunk async for chunk in caller.stream("stream", 7, timeout=15)]

        await provider.catalog()
        asking = asyncio.create_task(ask())
        await begun.wait()
        await pending_instance(caller)
        released = hold(caller)
        await server.go_away(provider, caller)
        go.set()
        await said.wait()
        await server.come_back()
        await connected(provider)
        await flush(provider)  # the server has had what was sent meanwhile
        released.set()
        if kind == "failing-call":
            with pytest.raises(MeshError, match="no") as caught:
                await asking
            assert "own" == caught.value.code
        else:
            assert {"call": 7, "stream": [0, 7], "ending-stream": [0]}[kind] == await asking


async def test_an_absence_of_the_server_is_nobodys_death(
    hold: Hold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it is, and also when who waits is back before the instance that works for it."""
    monkeypatch.setattr("openagentmesh.registry.liveness._PING_S", 0.02)
    monkeypatch.setattr("openagentmesh.transport.connection._RECOVERY_S", 10.0)
    begun, go = asyncio.Event(), asyncio.Event()
    async with served(tmp_path) as (server, provider, caller), asyncio.timeout(20):

        @provider.agent(AgentSpec(name="slow"))
        async def slow(req: int) -> int:
            begun.set()
            await go.wait()
            return req

        await provider.catalog()
        asking = asyncio.create_task(caller.call("slow", 7, timeout=15))
        await begun.wait()
        await pending_instance(caller)
        released = hold(provider)
        await server.go_away(provider, caller)
        # Twice as long as silence is borne, and as NATS has to say that nobody is there.
        for seconds in (0.8, 0.2):
            assert not (await asyncio.wait([asking], timeout=seconds))[0]
            await server.come_back() if seconds == 0.8 else released.set()
            await connected(caller)
        go.set()
        assert 7 == await asking


async def test_everything_is_there_again_after_two_new_servers(name: str) -> None:
    """Registry, record and watches come back though a watch's reader was busy all the time."""
    async with restartable("") as (mesh, restart), AgentMesh(node_of(mesh).connection.target.url) as other:
        serve(mesh, name)
        await mesh.kv.put(name, "1")

        async def there() -> bool:
            records = await presence.read_records(node_of(other).buckets)
            listed = [entry.name for entry in await other.catalog()]
            return mesh.instance_id in records and name in listed

        async with aclosing(mesh.kv.watch(name)) as watch:
            assert "1" == await take_next(watch)  # and from here on its reader is busy
            for _ in range(2):
                await restart()
                await until(there)
            await mesh.kv.put(name, "2")
            assert "2" == await take_next(watch)


@pytest.mark.parametrize("away", [False, True], ids=["server-there", "server-away"])
async def test_who_watches_is_told_that_the_mesh_was_left(tmp_path: Path, *, away: bool) -> None:
    """A watch of the shared state does not hang, but raises ConnectionFailed."""
    server = Server(tmp_path)
    await server._server.start()
    mesh = AgentMesh(server._server.url)
    async with mesh:
        await mesh.kv.put("key", "1")
        watch = mesh.kv.watch("key")
        assert "1" == await take_next(watch)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)  # it begins to wait
        if away:
            await server.go_away(mesh)
    async with asyncio.timeout(5):
        with pytest.raises(ConnectionFailed):
            await waiting
    await server._server.stop()


async def test_a_timeout_holds_while_the_server_takes_nothing() -> None:
    """Calls end in time also when more waits to be sent than the buffer holds; then calls go on."""
    server = EmbeddedServer()
    await server.start()
    async with AgentMesh(server.url) as mesh:
        serve(mesh, "agent")
        await mesh.catalog()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            large = {"text": "x" * 900_000}
            calls = [asyncio.create_task(mesh.call("agent", large, timeout=0.3)) for _ in range(40)]
            await asyncio.wait(calls, timeout=10)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert [MeshTimeout] * 40 == [type(call.done() and call.exception()) for call in calls]
        assert {"text": "ok"} == await mesh.call("agent", {}, timeout=10)
    await server.stop()


async def test_a_catalog_waits_once_for_a_revision_that_was_purged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the copy of the registry is known to be as new as it gets, it is read at once."""
    server = EmbeddedServer()
    await server.start()
    stays, goes, reader = (AgentMesh(server.url) for _ in range(3))
    serve(stays, "stays")
    serve(goes, "goes")
    async with stays:
        async with goes:
            assert {"stays", "goes"} == {entry.name for entry in await stays.catalog()}
        await node_of(stays).buckets._open[REGISTRY_BUCKET].purge_deletes(olderthan=-1)
        async with reader, asyncio.timeout(10):
            for standstill in (0.1, 60):
                monkeypatch.setattr("openagentmesh.registry.directory._MAX_SILENCE_S", standstill)
                assert ["stays"] == [entry.name for entry in await reader.catalog()]
    await server.stop()
