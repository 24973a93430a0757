"""Swaps: a new version of an agent replaces a running one, and its sources and gates lose nothing."""

import asyncio
from collections.abc import Callable

from openagentmesh import AgentMesh, AgentSpec, KVEntry, MeshMessage

from tests.support.meshes import node_of
from tests.support.waiting import until


async def test_a_swap_loses_no_message_of_a_source(mesh: AgentMesh, name: str) -> None:
    """Each message that arrives while the handler is replaced repeatedly is handled once."""
    handled: list[int] = []

    def declare() -> None:
        @mesh.agent(AgentSpec(name=name), sources=[mesh.subject_source(f"{name}.in")])
        async def driven(message: MeshMessage[int]) -> None:
            handled.append(message.data)

    declare()
    await mesh.catalog()
    for number in range(200):
        if number % 20 == 10:
            declare()
        await node_of(mesh).connection.publish(f"{name}.in", str(number).encode())
        await asyncio.sleep(0.001)
    await mesh.catalog()
    await until(lambda: len(handled) >= 200)
    assert list(range(200)) == sorted(handled)


async def test_a_swap_repeats_no_key_of_a_source(mesh: AgentMesh, name: str) -> None:
    """The new handler gets later changes, but not the keys that the old one has handled."""
    handled: list[tuple[str, str]] = []
    changed = asyncio.Event()

    def declare(version: str) -> None:
        @mesh.agent(AgentSpec(name=name, version=version), sources=[mesh.kv_source(f"{name}.*")])
        async def driven(entry: KVEntry[str]) -> None:
            handled.append((version, entry.key))
            changed.set()

    await mesh.kv.put(f"{name}.a", "1")
    declare("1.0.0")
    await mesh.catalog()
    await asyncio.wait_for(changed.wait(), 10)
    declare("2.0.0")
    await mesh.catalog()
    changed.clear()
    await mesh.kv.put(f"{name}.b", "1")
    await asyncio.wait_for(changed.wait(), 10)
    assert [("1.0.0", f"{name}.a"), ("2.0.0", f"{name}.b")] == handled


async def test_an_active_agent_with_a_condition_stays_active_during_a_swap(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """Callers on another mesh never get NotAvailable."""

    def declare(version: str) -> None:
        condition = mesh.kv_condition(name, lambda text: text == "on")

        @mesh.agent(AgentSpec(name=name, version=version), active_when=condition)
        async def gated() -> str:
            return version

    await mesh.kv.put(name, "on")
    declare("0.0.0")
    await mesh.catalog()
    finished = asyncio.Event()
    async with new_mesh() as caller:

        async def keep_calling() -> list[str]:
            answers = []
            while not finished.is_set():
                answers.append(await caller.call(name))
            return answers

        calling = asyncio.create_task(keep_calling())
        for number in range(1, 6):
            declare(f"{number}.0.0")
            await mesh.catalog()
            await asyncio.sleep(0.02)
        finished.set()
        answers = await calling
        assert "5.0.0" == await caller.call(name)
    assert sorted(answers) == answers


async def test_a_swap_does_not_wait_for_handlers_of_a_removed_source(mesh: AgentMesh, name: str) -> None:
    """A handler may use the mesh while its agent is replaced, and finishes afterwards."""
    started, replaced, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @mesh.agent(AgentSpec(name=name), sources=[mesh.kv_source(f"{name}.old.*")])
    async def old(value: str) -> None:
        started.set()
        await replaced.wait()
        await mesh.kv.put(f"{name}.done", value)
        done.set()

    await mesh.kv.put(f"{name}.old.a", "1")
    await mesh.catalog()
    await asyncio.wait_for(started.wait(), 10)

    @mesh.agent(AgentSpec(name=name), sources=[mesh.kv_source(f"{name}.new.*")])
    async def new(value: str) -> None:
        raise AssertionError("no key of the new source has changed")

    await asyncio.wait_for(mesh.catalog(), 10)
    replaced.set()
    await asyncio.wait_for(done.wait(), 10)
    assert "1" == await mesh.kv.get(f"{name}.done")
