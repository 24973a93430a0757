"""Outages of the server: state is restored, answers are delivered, and no instance is reported dead."""

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

DelayReconnect = Callable[[AgentMesh], asyncio.Event]


class Server:
    """A server that can be stopped, and started again at the same port with the same store."""

    def __init__(self, store: Path) -> None:
        self._store = str(store)
        self._server = EmbeddedServer(store=self._store)

    @property
    def url(self) -> str:
        return self._server.url

    async def stop(self, *meshes: AgentMesh) -> None:
        """Stop, and wait until all of these meshes are disconnected."""
        await self._server.stop()
        await until(lambda: not any(map(is_connected, meshes)))

    async def start(self) -> None:
        self._server = EmbeddedServer(self._server.port, self._store)
        await self._server.start()


def is_connected(mesh: AgentMesh) -> bool:
    return node_of(mesh).connection.connected


@asynccontextmanager
async def provider_and_caller(store: Path) -> AsyncIterator[tuple[Server, AgentMesh, AgentMesh]]:
    """A server, and two meshes on it."""
    server = Server(store)
    await server.start()
    try:
        async with AgentMesh(server.url) as provider, AgentMesh(server.url) as caller:
            yield server, provider, caller
    finally:
        await server.stop()


@pytest.fixture
def delay_reconnect(monkeypatch: pytest.MonkeyPatch) -> DelayReconnect:
    """Lets a mesh reconnect only when the returned event is set."""

    def delay(mesh: AgentMesh) -> asyncio.Event:
        client, released = node_of(mesh).connection._client, asyncio.Event()
        select = client._select_next_server

        async def wait() -> None:
            await released.wait()
            await select()

        monkeypatch.setattr(client, "_select_next_server", wait)
        return released

    return delay


@pytest.mark.parametrize("kind", ["call", "failing-call", "stream", "ending-stream"])
async def test_an_answer_is_delivered_to_a_caller_that_reconnects_later(
    delay_reconnect: DelayReconnect, tmp_path: Path, kind: str
) -> None:
    """The answer of a handler that ends during an outage arrives, though its host reconnects first."""
    started, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        await go.wait()
        done.set()
        if kind == "failing-call":
            raise MeshError("own", "no")

    async with provider_and_caller(tmp_path) as (server, provider, caller), asyncio.timeout(20):

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

        async def request() -> object:
            if kind.endswith("call"):
                return await caller.call("call", 7, timeout=15)
            return [chunk async for chunk in caller.stream("stream", 7, timeout=15)]

        await provider.catalog()
        pending = asyncio.create_task(request())
        await started.wait()
        await pending_instance(caller)
        released = delay_reconnect(caller)
        await server.stop(provider, caller)
        go.set()
        await done.wait()
        await server.start()
        await until(lambda: is_connected(provider))
        await flush(provider)  # the server has processed what was sent meanwhile
        released.set()
        if kind == "failing-call":
            with pytest.raises(MeshError, match="no") as caught:
                await pending
            assert "own" == caught.value.code
        else:
            assert {"call": 7, "stream": [0, 7], "ending-stream": [0]}[kind] == await pending


async def test_an_outage_of_the_server_is_not_reported_as_a_death(
    delay_reconnect: DelayReconnect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes, and also when the caller reconnects before the instance that answers it."""
    monkeypatch.setattr("openagentmesh.registry.liveness._PING_S", 0.02)
    monkeypatch.setattr("openagentmesh.transport.connection._RECOVERY_S", 10.0)
    started, go = asyncio.Event(), asyncio.Event()
    async with provider_and_caller(tmp_path) as (server, provider, caller), asyncio.timeout(20):

        @provider.agent(AgentSpec(name="slow"))
        async def slow(req: int) -> int:
            started.set()
            await go.wait()
            return req

        await provider.catalog()
        pending = asyncio.create_task(caller.call("slow", 7, timeout=15))
        await started.wait()
        await pending_instance(caller)
        released = delay_reconnect(provider)
        await server.stop(provider, caller)
        # Twice as long as ten unanswered pings, then as two 503s, would take.
        assert not (await asyncio.wait([pending], timeout=0.8))[0]
        await server.start()
        await until(lambda: is_connected(caller))
        assert not (await asyncio.wait([pending], timeout=0.2))[0]
        released.set()
        await until(lambda: is_connected(provider))
        go.set()
        assert 7 == await pending


async def test_all_state_is_restored_on_two_new_servers(name: str) -> None:
    """Registry, record and watches are restored, though the reader of the watch is busy meanwhile."""
    async with restartable("") as (mesh, restart), AgentMesh(node_of(mesh).connection.target.url) as other:
        serve(mesh, name)
        await mesh.kv.put(name, "1")

        async def is_restored() -> bool:
            records = await presence.read_records(node_of(other).buckets)
            listed = [entry.name for entry in await other.catalog()]
            return mesh.instance_id in records and name in listed

        async with aclosing(mesh.kv.watch(name)) as watch:
            assert "1" == await take_next(watch)  # from here on its reader is busy
            for _ in range(2):
                await restart()
                await until(is_restored)
            await mesh.kv.put(name, "2")
            assert "2" == await take_next(watch)


@pytest.mark.parametrize("outage", [False, True], ids=["server-runs", "server-stopped"])
async def test_closing_the_mesh_fails_a_watch(tmp_path: Path, *, outage: bool) -> None:
    """A watch of the shared state raises ConnectionFailed, also during an outage."""
    server = Server(tmp_path)
    await server.start()
    mesh = AgentMesh(server.url)
    async with mesh:
        await mesh.kv.put("key", "1")
        watch = mesh.kv.watch("key")
        assert "1" == await take_next(watch)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)  # the task begins to wait
        if outage:
            await server.stop(mesh)
    async with asyncio.timeout(5):
        with pytest.raises(ConnectionFailed):
            await waiting
    await server.stop()


async def test_calls_time_out_while_the_server_reads_nothing() -> None:
    """Also when more is to be sent than the buffer holds; afterwards calls are answered."""
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


async def test_the_catalog_waits_only_once_for_a_purged_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards the copy of the registry counts as up to date, and is read without waiting."""
    server = EmbeddedServer()
    await server.start()
    staying, stopping, reader = (AgentMesh(server.url) for _ in range(3))
    serve(staying, "staying")
    serve(stopping, "stopping")
    async with staying:
        async with stopping:
            assert {"staying", "stopping"} == {entry.name for entry in await staying.catalog()}
        await node_of(staying).buckets._open[REGISTRY_BUCKET].purge_deletes(olderthan=-1)
        async with reader, asyncio.timeout(10):
            for max_silence in (0.1, 60):
                monkeypatch.setattr("openagentmesh.registry.directory._CATCH_UP_TIMEOUT_S", max_silence)
                assert ["staying"] == [entry.name for entry in await reader.catalog()]
    await server.stop()
