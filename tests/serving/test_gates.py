"""Gates: a key or a message activates and deactivates an agent, which stays in the catalog."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, AgentSpec, Cancelled, MeshMessage, NotAvailable
from openagentmesh.protocol import codec, subjects
from openagentmesh.registry import presence
from openagentmesh.state.kv import KV

from tests.support.gates import call_when_active, declare_gated, is_active, wait_for_event, wait_until
from tests.support.meshes import flush, listen, node_of
from tests.support.servers import restartable
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("short_linger")


async def test_a_key_activates_and_deactivates_an_agent(mesh: AgentMesh, name: str) -> None:
    """Inactive, it stays registered and raises `NotAvailable`; both transitions are log events."""
    events = await listen(mesh, subjects.logs(name))
    declare_gated(mesh, name, mesh.kv_condition(f"{name}.mode", lambda mode: mode == "on"))
    await mesh.catalog()
    for _ in range(2):
        for request in (mesh.call, mesh.send):
            with pytest.raises(NotAvailable):
                await request(name)
        assert name in {entry.name for entry in await mesh.catalog()}
        assert name == (await mesh.contract(name)).name
        assert name in (await presence.read_records(node_of(mesh).buckets))[mesh.instance_id].agents
        await mesh.kv.put(f"{name}.mode", "on")
        await wait_for_event(events, "agent_activated")
        assert mesh.instance_id == await mesh.call(name)
        await mesh.kv.put(f"{name}.mode", "off")
        await wait_for_event(events, "agent_deactivated")


async def test_a_message_activates_and_deactivates_an_agent(mesh: AgentMesh, name: str) -> None:
    """The predicate gets what a subscriber gets; a message on which it fails changes nothing."""
    declare_gated(mesh, name, mesh.subject_condition(f"{name}.*", lambda status: status["open"]))
    await mesh.catalog()
    assert not is_active(mesh, name)
    connection = node_of(mesh).connection
    await connection.publish(f"{name}.status", b'{"open": true}')
    await wait_until(mesh, name, active=True)
    await connection.publish(f"{name}.status", b"junk")
    await connection.publish(f"{name}.status", b"")
    await connection.publish(f"{name}.status", b"{}")
    await connection.flush()
    assert mesh.instance_id == await mesh.call(name)
    await connection.publish(f"{name}.status", b'{"open": false}')
    await wait_until(mesh, name, active=False)


async def test_an_agent_that_is_active_at_the_start_is_callable_immediately(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """The condition is evaluated before `async with mesh` is entered."""
    await mesh.kv.put(name, "on")
    provider = new_mesh()
    declare_gated(provider, name, provider.kv_condition(name, lambda text: text == "on"))
    async with provider:
        assert provider.instance_id == await mesh.call(name)


async def test_requests_go_to_the_instances_where_the_agent_is_active(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """An instance on which the agent is inactive gets none of its requests."""
    other = new_mesh()
    declare_gated(mesh, name, mesh.kv_condition(f"{name}.first", bool))
    declare_gated(other, name, other.kv_condition(f"{name}.second", bool, initial=True))
    async with other:
        await mesh.catalog()
        assert {other.instance_id} == {await mesh.call(name) for _ in range(20)}


@pytest.mark.parametrize("in_time", [True, False], ids=["finished", "cancelled"])
async def test_running_requests_are_drained_when_an_agent_is_deactivated(
    mesh: AgentMesh, name: str, *, in_time: bool
) -> None:
    """A request may finish within `drain_timeout`; after that it is cancelled and answered."""
    started, release = asyncio.Event(), asyncio.Event()
    condition = mesh.kv_condition(name, lambda text: text == "on", drain_timeout=20 if in_time else 0.05)

    @mesh.agent(AgentSpec(name=name), active_when=condition)
    async def slow() -> str:
        started.set()
        await release.wait()
        return "done"

    await mesh.kv.put(name, "on")
    await mesh.catalog()
    call = asyncio.create_task(mesh.call(name))
    await started.wait()
    await mesh.kv.put(name, "off")
    await wait_until(mesh, name, active=False)
    if in_time:
        release.set()
        assert "done" == await call
    else:
        with pytest.raises(Cancelled):
            await call


async def test_a_gate_controls_background_tasks_and_sources(mesh: AgentMesh, name: str) -> None:
    """Publishers, watchers and sources run only while the agent is active, and restart with it."""
    runs: dict[str, int] = {"publisher": 0, "watcher": 0}
    ended: asyncio.Queue[str] = asyncio.Queue()
    handled: asyncio.Queue[int] = asyncio.Queue()
    condition = mesh.kv_condition(name, lambda text: text == "on")

    @mesh.agent(AgentSpec(name=f"{name}.publisher"), active_when=condition)
    async def publisher() -> AsyncIterator[int]:
        runs["publisher"] += 1
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            ended.put_nowait("publisher")

    @mesh.agent(AgentSpec(name=f"{name}.watcher"), active_when=condition)
    async def watcher() -> None:
        runs["watcher"] += 1
        try:
            await asyncio.Event().wait()
        finally:
            ended.put_nowait("watcher")

    @mesh.agent(
        AgentSpec(name=f"{name}.driven"), sources=[mesh.subject_source(f"{name}.in")], active_when=condition
    )
    async def driven(message: MeshMessage[int]) -> None:
        handled.put_nowait(message.data)

    events = await listen(mesh, subjects.logs(f"{name}.driven"))
    await mesh.catalog()
    await node_of(mesh).connection.publish(f"{name}.in", b"0")
    for number in (1, 2):
        await mesh.kv.put(name, "on")
        await wait_for_event(events, "agent_activated")
        await node_of(mesh).connection.publish(f"{name}.in", str(number).encode())
        async with asyncio.timeout(20):
            assert number == await handled.get()
            await until(lambda: set(runs.values()) == {number})  # noqa: B023 - of this iteration
        await mesh.kv.put(name, "off")
        await wait_for_event(events, "agent_deactivated")
        async with asyncio.timeout(20):
            assert {"publisher", "watcher"} == {await ended.get(), await ended.get()}
        await node_of(mesh).connection.publish(f"{name}.in", b"9")
        await flush(mesh)
    assert handled.empty()


@pytest.mark.parametrize("kept", [True, False], ids=["store kept", "store removed"])
async def test_a_gate_is_correct_after_a_restart_of_the_server(
    name: str, tmp_path: Path, *, kept: bool
) -> None:
    """It follows the keys on the new server, with the changes made while the mesh was disconnected."""

    async def meanwhile(kv: KV) -> None:
        await kv.put(f"{name}.b", "off")
        await kv.put(f"{name}.c", "on")
        await kv.delete(f"{name}.d")

    async with restartable(tmp_path if kept else "") as (mesh, restart):
        for key in ("a", "b", "c", "d"):
            declare_gated(
                mesh, f"{name}.{key}", mesh.kv_condition(f"{name}.{key}", lambda text: text == "on")
            )
            await mesh.kv.put(f"{name}.{key}", "off" if key == "c" else "on")
            await mesh.catalog()
            await wait_until(mesh, f"{name}.{key}", active=key != "c")
        await restart(meanwhile if kept else None)
        for key in ("b", "d", "c", "a"):
            await wait_until(mesh, f"{name}.{key}", active=kept and key in {"a", "c"})
        for key in ("a", "b"):
            await mesh.kv.put(f"{name}.{key}", "on")
            assert mesh.instance_id == await call_when_active(mesh, f"{name}.{key}")


async def test_a_new_version_replaces_the_gate(mesh: AgentMesh, name: str) -> None:
    """After a new version with another condition, the old condition has no effect."""
    declare_gated(mesh, name, mesh.kv_condition(f"{name}.old", lambda text: text == "on"))
    await mesh.kv.put(f"{name}.old", "on")
    await mesh.catalog()
    assert mesh.instance_id == await mesh.call(name)
    declare_gated(mesh, name, mesh.kv_condition(f"{name}.new", lambda text: text == "on"))
    with pytest.raises(NotAvailable):
        await mesh.call(name)
    await mesh.kv.put(f"{name}.old", "off")
    await mesh.kv.put(f"{name}.old", "on")
    await mesh.kv.put(f"{name}.new", "on")
    await wait_until(mesh, name, active=True)
    assert mesh.instance_id == await mesh.call(name)


async def test_the_last_message_applies_to_the_next_version(mesh: AgentMesh, name: str) -> None:
    """The predicate of a new version evaluates the last message; `initial` does not apply."""
    declare_gated(mesh, name, mesh.subject_condition(f"{name}.switch", lambda text: text == "on"))
    await mesh.catalog()
    await mesh.publish(f"{name}.switch", "on")
    await wait_until(mesh, name, active=True)
    for number in range(2):
        declare_gated(
            mesh, name, mesh.subject_condition(f"{name}.switch", lambda text: text in {"on", "yes"})
        )
        assert mesh.instance_id == await mesh.call(name), number
    declare_gated(mesh, name, mesh.subject_condition(f"{name}.switch", lambda text: text != "on"))
    with pytest.raises(NotAvailable):
        await mesh.call(name)


async def test_a_new_version_waits_for_a_deactivation_in_progress(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Declared while the old version is being deactivated, the new one is inactive."""
    key, events = f"{name}.on", await listen(mesh, subjects.logs(name))
    await mesh.kv.put(key, "on")
    declare_gated(mesh, name, mesh.kv_condition(key, lambda text: text == "on"))
    assert mesh.instance_id == await mesh.call(name)
    draining, release = asyncio.Event(), asyncio.Event()
    drain = node_of(mesh).connection.drain

    async def drain_slowly(*sids: int) -> None:
        draining.set()
        await release.wait()
        await drain(*sids)

    monkeypatch.setattr(node_of(mesh).connection, "drain", drain_slowly)
    await mesh.kv.put(key, "off")
    await asyncio.wait_for(draining.wait(), 10)
    declare_gated(mesh, name, mesh.kv_condition(key, lambda text: text == "on"))
    asyncio.get_running_loop().call_later(0.05, release.set)
    await mesh.catalog()
    await wait_for_event(events, "agent_deactivated")
    assert not is_active(mesh, name)
    with pytest.raises(NotAvailable):
        await mesh.call(name)


async def test_a_reactivated_agent_serves_immediately(mesh: AgentMesh, name: str) -> None:
    """It does not wait for a request that still runs from before, which finishes too."""
    started, release = asyncio.Event(), asyncio.Event()

    @mesh.agent(AgentSpec(name=name), active_when=mesh.kv_condition(name, lambda text: text == "on"))
    async def wait(text: str) -> str:
        if text == "slow":
            started.set()
            await release.wait()
        return text

    await mesh.kv.put(name, "on")
    await mesh.catalog()
    slow = asyncio.create_task(mesh.call(name, "slow"))
    await started.wait()
    await mesh.kv.put(name, "off")
    await wait_until(mesh, name, active=False)
    await mesh.kv.put(name, "on")
    try:
        await wait_until(mesh, name, active=True)
        assert "quick" == await mesh.call(name, "quick")
    finally:
        release.set()
        assert "slow" == await slow


async def test_a_deactivated_publisher_sends_its_end_frame(mesh: AgentMesh, name: str) -> None:
    """The end frame carries the number of events; reactivated, the publisher counts from 0."""
    frames: asyncio.Queue[codec.Reply] = asyncio.Queue()
    receive = lambda message: frames.put_nowait(codec.decode_reply(message.head, message.body))  # noqa: E731
    await node_of(mesh).connection.subscribe(subjects.events(name), receive)

    @mesh.agent(AgentSpec(name=name), active_when=mesh.kv_condition(name, lambda text: text == "on"))
    async def publisher() -> AsyncIterator[int]:
        yield 7
        await asyncio.Event().wait()

    await mesh.catalog()
    for _ in range(2):
        await mesh.kv.put(name, "on")
        frame = await asyncio.wait_for(frames.get(), 10)
        assert (b"7", 0, False) == (frame.body, frame.seq, frame.end)
        await mesh.kv.put(name, "off")
        frame = await asyncio.wait_for(frames.get(), 10)
        assert (b"", 1, True, False) == (frame.body, frame.seq, frame.end, frame.error)
        await wait_until(mesh, name, active=False)
