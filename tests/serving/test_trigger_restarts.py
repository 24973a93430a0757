"""Gates and sources that fail to start, or that stop and start while a handler runs."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from openagentmesh import AgentMesh, AgentSpec, ConnectionFailed, KVEntry, NotAvailable, NotFound

from tests.support.meshes import node_of, route_of, sources_started
from tests.support.waiting import until


async def test_the_start_of_a_gate_is_retried(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent whose gate could not read its key is served by a later attempt, and follows the key."""
    buckets, failures = node_of(mesh).buckets, [ConnectionFailed("The server is unreachable.")]
    get_entry = buckets.get_entry

    async def fail_once(bucket: str, key: str) -> Any:
        if key == name and failures:
            raise failures.pop()
        return await get_entry(bucket, key)

    monkeypatch.setattr(buckets, "get_entry", fail_once)

    @mesh.agent(AgentSpec(name=name), active_when=mesh.kv_condition(name, lambda value: value == "on"))
    async def gated() -> str:
        return "active"

    with pytest.raises(ConnectionFailed, match="unreachable"):
        await mesh.catalog()
    await mesh.kv.put(name, "on")
    async with asyncio.timeout(10):
        while True:
            with suppress(NotAvailable, NotFound):
                assert "active" == await mesh.call(name)
                return
            await asyncio.sleep(0.01)


async def test_changes_of_keys_are_handled_in_sequence_across_a_reactivation(
    mesh: AgentMesh, name: str
) -> None:
    """Deactivated and activated while it handles a change, an agent handles the next change after it."""
    started, release, running, maximum = asyncio.Semaphore(0), asyncio.Event(), set[str](), 0
    await mesh.kv.put(f"{name}-gate", "on")

    @mesh.agent(
        AgentSpec(name=name),
        sources=[mesh.kv_source(f"{name}.*", on_init="skip")],
        active_when=mesh.kv_condition(f"{name}-gate", lambda value: value == "on"),
    )
    async def handler(entry: KVEntry[str]) -> None:
        nonlocal maximum
        running.add(entry.key)
        maximum = max(maximum, len(running))
        started.release()
        await release.wait()
        running.discard(entry.key)

    await mesh.catalog()
    route = route_of(mesh, name)
    await until(lambda: route.is_open)
    async with asyncio.timeout(10):
        await sources_started(mesh, name)
        await mesh.kv.put(f"{name}.a", "1")
        await started.acquire()
        for value, is_open in (("off", False), ("on", True)):
            await mesh.kv.put(f"{name}-gate", value)
            await until(lambda: route.is_open == is_open)  # noqa: B023 - of this iteration
        await mesh.kv.put(f"{name}.b", "2")
        with pytest.raises(TimeoutError):  # while the first change is handled
            await asyncio.wait_for(started.acquire(), 0.5)
        release.set()
        await started.acquire()
    assert 1 == maximum
