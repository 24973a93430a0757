"""What drives agents, when a start fails half way, or when it is closed while something runs."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from openagentmesh import AgentMesh, AgentSpec, ConnectionFailed, KVEntry, NotAvailable, NotFound

from tests.support.meshes import node_of, sources_started


async def test_a_gate_that_could_not_start_is_started_again(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent whose gate could not read its key comes up at the next try, and follows the key then."""
    buckets, failures = node_of(mesh).buckets, [ConnectionFailed("The server is away.")]
    entry = buckets.get_entry

    async def away_once(bucket: str, key: str) -> Any:
        if key == name and failures:
            raise failures.pop()
        return await entry(bucket, key)

    monkeypatch.setattr(buckets, "get_entry", away_once)

    @mesh.agent(AgentSpec(name=name), active_when=mesh.kv_condition(name, lambda value: value == "on"))
    async def gated() -> str:
        return "here"

    with pytest.raises(ConnectionFailed, match="away"):
        await mesh.catalog()
    await mesh.kv.put(name, "on")
    async with asyncio.timeout(10):
        while True:
            with suppress(NotAvailable, NotFound):
                assert "here" == await mesh.call(name)
                return
            await asyncio.sleep(0.01)


async def test_changes_of_keys_stay_one_after_the_other_over_a_gate(mesh: AgentMesh, name: str) -> None:
    """A gate that shuts and opens while a change is handled does not start the next one beside it."""
    going, release, running, most = asyncio.Semaphore(0), asyncio.Event(), set[str](), 0
    await mesh.kv.put(f"{name}-gate", "on")

    @mesh.agent(
        AgentSpec(name=name),
        sources=[mesh.kv_source(f"{name}.*", on_init="skip")],
        active_when=mesh.kv_condition(f"{name}-gate", lambda value: value == "on"),
    )
    async def handler(entry: KVEntry[str]) -> None:
        nonlocal most
        running.add(entry.key)
        most = max(most, len(running))
        going.release()
        await release.wait()
        running.discard(entry.key)

    route = None
    await mesh.catalog()
    while route is None or not route.is_open:
        route = node_of(mesh).router.get(name)
        await asyncio.sleep(0.01)
    async with asyncio.timeout(10):
        await sources_started(mesh, name)
        await mesh.kv.put(f"{name}.a", "1")
        await going.acquire()
        for value, is_open in (("off", False), ("on", True)):
            await mesh.kv.put(f"{name}-gate", value)
            while route.is_open is not is_open:
                await asyncio.sleep(0.01)
        await mesh.kv.put(f"{name}.b", "2")
        with pytest.raises(TimeoutError):  # as long as the other one runs
            await asyncio.wait_for(going.acquire(), 0.5)
        release.set()
        await going.acquire()
    assert 1 == most
