"""Who is alive: records, notices, and what happens after a death or a restart."""

import asyncio
import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from openagentmesh import AgentDied, AgentMesh, AgentSpec, ConnectionFailed, NotFound
from openagentmesh.protocol import subjects
from openagentmesh.protocol.messages import DeathNotice
from openagentmesh.registry import presence
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.server import EmbeddedServer

from tests.support.meshes import Text, flush, node_of, reconnects, serve
from tests.support.waiting import until


async def test_the_record_lists_what_is_served(mesh: AgentMesh, name: str) -> None:
    """The instance record has this instance's agents, sorted, and goes away with it."""
    serve(mesh, f"{name}.b")
    serve(mesh, f"{name}.a")
    await mesh.catalog()
    records = await presence.read_records(node_of(mesh).buckets)
    assert [f"{name}.a", f"{name}.b"] == records[mesh.instance_id].agents


async def test_only_the_last_instance_gives_notice(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """A clean stop of one of two replicas is no death; that of the second is."""
    notices: asyncio.Queue[Message] = asyncio.Queue()
    await node_of(mesh).connection.subscribe(subjects.death(name), notices.put_nowait)
    first, second = new_mesh(), new_mesh()
    serve(first, name)
    serve(second, name)
    async with first, second:
        await flush(mesh)
    notice = DeathNotice.model_validate_json((await notices.get()).body)
    assert (name, "graceful_shutdown", first.instance_id) == (notice.agent, notice.reason, notice.instance_id)
    assert notices.empty()


async def test_after_a_killed_process_others_clear_up(
    mesh: AgentMesh, url: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that is killed leaves no ghost, and its waiting caller is told that it died."""
    monkeypatch.setattr(presence, "HEARTBEAT_S", 0.1)
    script = tmp_path / "provider.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio
        from openagentmesh import AgentMesh, AgentSpec
        mesh = AgentMesh({url!r})
        @mesh.agent(AgentSpec(name={name!r}))
        async def hang(req: int) -> int:
            print("working", flush=True)
            await asyncio.sleep(60)
            return req
        async def main():
            async with mesh:
                print("up", flush=True)
                await asyncio.sleep(60)
        asyncio.run(main())
        """)
    )
    serve(mesh, f"{name}.watcher")  # an instance with agents looks after the others
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "up\n" == await asyncio.to_thread(process.stdout.readline)
    call = asyncio.create_task(mesh.call(name, 1))
    assert "working\n" == await asyncio.to_thread(process.stdout.readline)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    async with asyncio.timeout(20):
        with pytest.raises(AgentDied):
            await call
    assert [] == await mesh.catalog(channel=name + ".x")
    with pytest.raises(NotFound):
        await mesh.call(name, 1, timeout=5)
    records = await presence.read_records(node_of(mesh).buckets)
    assert name not in json.dumps([record.agents for record in records.values()]).split('"')


@pytest.mark.parametrize("kept", [True, False], ids=["store-kept", "store-thrown-away"])
async def test_everything_is_true_again_after_a_restart(kept: bool, tmp_path: Path) -> None:
    """A new server on the same port: calls, catalog, contracts and records, with nobody touching it."""
    store = str(tmp_path / "store") if kept else ""
    server = EmbeddedServer(store=store)
    await server.start()
    async with AgentMesh(server.url) as provider, AgentMesh(server.url) as caller:
        serve(provider, "survivor")
        await provider.catalog()
        assert {"text": "ok"} == await caller.call("survivor", {})
        assert ["survivor"] == [entry.name for entry in await caller.catalog()]
        await server.stop()
        again = EmbeddedServer(server.port, store)
        await again.start()
        async with asyncio.timeout(2):
            assert {"text": "ok"} == await caller.call("survivor", {}, timeout=2)

        async def restored() -> bool:
            return provider.instance_id in await presence.read_records(node_of(caller).buckets)

        await until(restored)
        assert ["survivor"] == [entry.name for entry in await caller.catalog()]
        assert "survivor" == (await caller.contract("survivor")).name
        serve(provider, "later")
        await provider.catalog()
        assert ["survivor", "later"] == [entry.name for entry in await caller.catalog()]
    await again.stop()


async def test_a_call_in_flight_survives_a_restart(tmp_path: Path) -> None:
    """A handler that is at work while the server restarts answers its caller afterwards."""
    server = EmbeddedServer(store=str(tmp_path / "store"))
    await server.start()
    async with AgentMesh(server.url) as provider, AgentMesh(server.url) as caller:
        started, go = asyncio.Event(), asyncio.Event()

        @provider.agent(AgentSpec(name="slow"))
        async def slow(req: Text) -> Text:
            started.set()
            await go.wait()
            return req

        await provider.catalog()
        call = asyncio.create_task(caller.call("slow", {"text": "kept"}, timeout=10))
        await started.wait()
        await server.stop()
        again = EmbeddedServer(server.port, str(tmp_path / "store"))
        await again.start()

        async def both_are_back() -> bool:
            return all(reconnects(mesh) for mesh in (provider, caller))

        await until(both_are_back)
        go.set()
        assert {"text": "kept"} == await call
    await again.stop()


async def test_a_restore_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One failure after a restart is not the last word: the catalog is whole in the end."""
    server = EmbeddedServer()
    await server.start()
    async with AgentMesh(server.url) as provider:
        serve(provider, "survivor")
        await provider.catalog()
        registry = node_of(provider).registry
        tries, restore = 0, registry.restore

        async def fails_once() -> None:
            nonlocal tries
            tries += 1
            if tries == 1:
                raise ConnectionFailed("not yet")
            await restore()

        monkeypatch.setattr(registry, "restore", fails_once)
        await server.stop()
        again = EmbeddedServer(server.port)
        await again.start()

        async def listed() -> bool:
            return tries == 2 and ["survivor"] == [entry.name for entry in await provider.catalog()]

        await until(listed)
        assert ["survivor"] == [entry.name for entry in await provider.catalog()]
    await again.stop()


async def test_a_record_of_a_stranger_costs_nobody_the_connection(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that cannot be part of a subject are none: whoever clears up after them stays connected."""
    monkeypatch.setattr(presence, "HEARTBEAT_S", 0.1)
    node, stranger = node_of(mesh), f"0{name}"
    serve(mesh, name)
    await mesh.catalog()
    record = {"agents": ["a b", 7, f"{name}.lost"], "answers_pings": True}
    await node.buckets.put(subjects.INSTANCES_BUCKET, stranger, json.dumps(record).encode())
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await node.connection.subscribe(subjects.death(f"{name}.lost"), heard.put_nowait)
    assert [f"{name}.lost"] == (await presence.read_records(node.buckets))[stranger].agents
    async with asyncio.timeout(10):
        await heard.get()
        while stranger in await presence.read_records(node.buckets):
            await asyncio.sleep(0.05)
    await node.connection.flush()
    assert 0 == node.connection.reconnects
