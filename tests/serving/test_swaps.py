"""Declaring an agent again while it is at work: what drives it misses nothing."""

import asyncio
from collections.abc import Callable

from openagentmesh import AgentMesh, AgentSpec, KVEntry, MeshMessage

from tests.support.meshes import node_of


async def test_a_swap_loses_no_message_of_a_source(mesh: AgentMesh, name: str) -> None:
    """Messages that come while the handler is replaced again and again are all handled, once."""
    got: list[int] = []

    def declare() -> None:
        @mesh.agent(AgentSpec(name=name), sources=[mesh.subject_source(f"{name}.in")])
        async def driven(message: MeshMessage[int]) -> None:
            got.append(message.data)

    declare()
    await mesh.catalog()
    for number in range(200):
        if number % 20 == 10:
            declare()
        await node_of(mesh).connection.publish(f"{name}.in", str(number).encode())
        await asyncio.sleep(0.001)
    await mesh.catalog()
    async with asyncio.timeout(10):
        while len(got) < 200:
            await asyncio.sleep(0.005)
    assert list(range(200)) == sorted(got)


async def test_a_swap_repeats_no_key_of_a_source(mesh: AgentMesh, name: str) -> None:
    """The new handler is told of what changes, not again of what the old one has handled."""
    got: list[tuple[str, str]] = []
    changed = asyncio.Event()

    def declare(version: str) -> None:
        @mesh.agent(AgentSpec(name=name, version=version), sources=[mesh.kv_source(f"{name}.*")])
        async def driven(entry: KVEntry[str]) -> None:
            got.append((version, entry.key))
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
    assert [("1.0.0", f"{name}.a"), ("2.0.0", f"{name}.b")] == got


async def test_a_gated_agent_that_is_on_stays_on_over_a_swap(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """Callers of another mesh never hear that it is not available."""

    def declare(version: str) -> None:
        condition = mesh.kv_condition(name, lambda text: text == "on")

        @mesh.agent(AgentSpec(name=name, version=version), active_when=condition)
        async def gated() -> str:
            return version

    await mesh.kv.put(name, "on")
    declare("0.0.0")
    await mesh.catalog()
    over = asyncio.Event()
    async with new_mesh() as caller:

        async def keep_calling() -> list[str]:
            answers = []
            while not over.is_set():
                answers.append(await caller.call(name))
            return answers

        calling = asyncio.create_task(keep_calling())
        for number in range(1, 6):
            declare(f"{number}.0.0")
            await mesh.catalog()
            await asyncio.sleep(0.02)
        over.set()
        answers = await calling
        assert "5.0.0" == await caller.call(name)
    assert sorted(answers) == answers


async def test_a_swap_does_not_wait_for_what_a_dropped_source_has_brought(mesh: AgentMesh, name: str) -> None:
    """A handler may use the mesh while its agent is declared again; nothing waits for it."""
    began, done = asyncio.Event(), asyncio.Event()
    declared = asyncio.Event()

    @mesh.agent(AgentSpec(name=name), sources=[mesh.kv_source(f"{name}.old.*")])
    async def old(value: str) -> None:
        began.set()
        await declared.wait()
        await mesh.kv.put(f"{name}.done", value)
        done.set()

    await mesh.kv.put(f"{name}.old.a", "1")
    await mesh.catalog()
    await asyncio.wait_for(began.wait(), 10)

    @mesh.agent(AgentSpec(name=name), sources=[mesh.kv_source(f"{name}.new.*")])
    async def new(value: str) -> None:
        raise AssertionError("nothing has changed there")

    await asyncio.wait_for(mesh.catalog(), 10)
    declared.set()
    await asyncio.wait_for(done.wait(), 10)
    assert "1" == await mesh.kv.get(f"{name}.done")
