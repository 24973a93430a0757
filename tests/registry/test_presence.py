"""Instance records and death notices, and recovery after the death of a process or a server."""

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
from openagentmesh.protocol.status import InstanceRecord
from openagentmesh.registry import liveness, presence
from openagentmesh.registry.presence import Presence
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.server import EmbeddedServer

from tests.support.meshes import Text, flush, listen, node_of, reconnects, serve
from tests.support.waiting import until


async def test_the_instance_record_lists_the_served_agents(mesh: AgentMesh, name: str) -> None:
    """The instance record has the instance's agents in alphabetical order."""
    serve(mesh, f"{name}.b")
    serve(mesh, f"{name}.a")
    await mesh.catalog()
    records = await presence.read_records(node_of(mesh).buckets)
    assert [f"{name}.a", f"{name}.b"] == records[mesh.instance_id].agents


async def test_only_the_last_instance_publishes_a_death_notice(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """The stop of one of two replicas publishes no death notice, that of the second one does."""
    notices = await listen(mesh, subjects.death(name))
    first, second = new_mesh(), new_mesh()
    serve(first, name)
    serve(second, name)
    async with first, second:
        await flush(mesh)
    notice = DeathNotice.model_validate_json((await notices.get()).body)
    assert (name, "graceful_shutdown", first.instance_id) == (notice.agent, notice.reason, notice.instance_id)
    assert notices.empty()


async def test_the_agents_of_a_killed_process_are_removed(
    mesh: AgentMesh, url: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another instance removes its record and its agents, and pending calls raise AgentDied."""
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
    serve(mesh, f"{name}.monitor")  # an instance with agents monitors the others
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "up\n" == await asyncio.to_thread(process.stdout.readline)
    call = asyncio.create_task(mesh.call(name, 1))
    assert "working\n" == await asyncio.to_thread(process.stdout.readline)
    # The next instance in the order of their ids does not answer pings.
    peer, record = f"{mesh.instance_id}0", json.dumps({"agents": [f"{name}.peer"]}).encode()
    await node_of(mesh).buckets.put(subjects.INSTANCES_BUCKET, peer, record)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    async with asyncio.timeout(20):
        with pytest.raises(AgentDied):
            await call
    with pytest.raises(NotFound):
        await mesh.call(name, 1, timeout=5)
    assert [f"{name}.monitor"] == [entry.name for entry in await mesh.catalog(channel=name)]
    records = await presence.read_records(node_of(mesh).buckets)
    assert not [record for record in records.values() if name in record.agents]
    await node_of(mesh).buckets.delete_all(subjects.INSTANCES_BUCKET, [peer])


async def test_an_instance_that_reconnects_keeps_its_record(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ping without a responder removes nothing, nor do pings that are not answered in time."""
    node, results = node_of(mesh), asyncio.Queue[bool | None]()
    monkeypatch.setattr(presence, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(liveness, "_PING_S", 0.05)

    async def is_dead(inbox: Inbox, instance_id: str) -> bool | None:
        result = await liveness.is_dead(inbox, instance_id)
        if instance_id == name:
            if results.empty():  # it reconnects, but is too busy to answer
                await node.connection.subscribe(subjects.host(name, "ping"), lambda _message: None)
                await node.connection.flush()
            results.put_nowait(result)
        return result

    monkeypatch.setattr(presence, "is_dead", is_dead)
    monkeypatch.setattr(Presence, "_neighbour", lambda *_args: {name})
    record = InstanceRecord(agents=[f"{name}.agent"], answers_pings=True)
    await node.buckets.put(subjects.INSTANCES_BUCKET, name, record.model_dump_json().encode())
    serve(mesh, f"{name}.monitor")
    await mesh.catalog()
    await until(lambda: results.qsize() >= 4)
    assert [True, None, None, None] == [results.get_nowait() for _ in range(4)]
    assert name in await presence.read_records(node.buckets)


@pytest.mark.parametrize("kept", [True, False], ids=["store-kept", "store-lost"])
async def test_all_state_is_restored_after_a_restart_of_the_server(kept: bool, tmp_path: Path) -> None:
    """On a new server at the same port, calls work, and catalog, contracts and records are complete."""
    store = str(tmp_path / "store") if kept else ""
    server = EmbeddedServer(store=store)
    await server.start()
    async with AgentMesh(server.url) as provider, AgentMesh(server.url) as caller:
        serve(provider, "survivor")
        await provider.catalog()
        assert {"text": "ok"} == await caller.call("survivor", {})
        assert ["survivor"] == [entry.name for entry in await caller.catalog()]
        await server.stop()
        restarted = EmbeddedServer(server.port, store)
        await restarted.start()
        async with asyncio.timeout(2):
            assert {"text": "ok"} == await caller.call("survivor", {}, timeout=2)

        async def has_record() -> bool:
            return provider.instance_id in await presence.read_records(node_of(caller).buckets)

        await until(has_record)
        assert ["survivor"] == [entry.name for entry in await caller.catalog()]
        assert "survivor" == (await caller.contract("survivor")).name
        serve(provider, "later")
        await provider.catalog()
        assert ["survivor", "later"] == [entry.name for entry in await caller.catalog()]
    await restarted.stop()


async def test_a_call_in_flight_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    """A handler that runs while the server restarts answers its caller afterwards."""
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
        restarted = EmbeddedServer(server.port, str(tmp_path / "store"))
        await restarted.start()
        await until(lambda: reconnects(provider) and reconnects(caller))
        go.set()
        assert {"text": "kept"} == await call
    await restarted.stop()


async def test_a_failed_restore_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """When restoring the registry fails once after a restart, the catalog is complete in the end."""
    server = EmbeddedServer()
    await server.start()
    async with AgentMesh(server.url) as provider:
        serve(provider, "survivor")
        await provider.catalog()
        registry = node_of(provider).registry
        attempts, restore = 0, registry.restore

        async def restore_failing_once() -> None:
            nonlocal attempts
            attempts += 1
            if attempts == 1:
                raise ConnectionFailed("not yet")
            await restore()

        monkeypatch.setattr(registry, "restore", restore_failing_once)
        await server.stop()
        restarted = EmbeddedServer(server.port)
        await restarted.start()

        async def is_listed() -> bool:
            return attempts == 2 and ["survivor"] == [entry.name for entry in await provider.catalog()]

        await until(is_listed)
    await restarted.stop()


async def test_invalid_names_in_a_record_are_ignored(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that cannot be part of a subject are ignored when the record's instance is removed."""
    monkeypatch.setattr(presence, "HEARTBEAT_S", 0.1)
    node, dead = node_of(mesh), f"0{name}"
    serve(mesh, name)
    await mesh.catalog()
    record = {"agents": ["a b", 7, f"{name}.lost"], "answers_pings": True}
    notices = await listen(mesh, subjects.death(f"{name}.lost"))
    await node.buckets.put(subjects.INSTANCES_BUCKET, dead, json.dumps(record).encode())
    assert [f"{name}.lost"] == (await presence.read_records(node.buckets))[dead].agents
    async with asyncio.timeout(10):
        await notices.get()
        while dead in await presence.read_records(node.buckets):
            await asyncio.sleep(0.05)
    await flush(mesh)
    assert 0 == reconnects(mesh)


@pytest.mark.parametrize("more", [{"version": None}, {"host": 3}, {"pid": "12a"}, {"answers_pings": "maybe"}])
async def test_extra_keys_of_a_record_do_not_hide_its_agents(
    mesh: AgentMesh, name: str, more: dict[str, object]
) -> None:
    """A peer may use our own keys for something else: its agents still count as served."""
    node = node_of(mesh)
    record = json.dumps({"agents": [name]} | more).encode()
    await node.buckets.put(subjects.INSTANCES_BUCKET, name, record)
    assert [name] == (await presence.read_records(node.buckets))[name].agents
    await node.buckets.delete_all(subjects.INSTANCES_BUCKET, [name])
