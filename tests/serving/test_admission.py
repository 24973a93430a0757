"""Admission of requests: the limits of an agent apply behind the middlewares of plugins."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from openagentmesh import AgentMesh, AgentSpec, Call, Endpoint, Middleware, Overloaded, hookimpl
from openagentmesh.agent.agent import Limits
from openagentmesh.agent.concurrency import Limiter

from tests.support.meshes import node_of, route_of
from tests.support.waiting import until


class RejectingPlugin:
    """Rejects requests that have the header X-Reject."""

    @hookimpl
    def mesh_middleware(self) -> Middleware:
        def middleware(endpoint: Endpoint) -> Endpoint:
            async def reject_or_pass(call: Call) -> object:
                await asyncio.sleep(0)
                if "X-Reject" in call.headers:
                    raise Overloaded("Rejected by the plugin.")
                return await endpoint(call)

            return reject_or_pass

        return middleware


@pytest.fixture
async def limited_mesh(url: str) -> AsyncIterator[AgentMesh]:
    """A mesh with the plugin whose agents run one request at once and let one more wait."""
    async with AgentMesh(url, plugins=[RejectingPlugin()]) as mesh:
        apply_plugins = node_of(mesh).prepare
        limits = Limits(concurrency=1, queue=1)
        node_of(mesh).prepare = lambda agent: apply_plugins(agent.with_limits(limits))
        yield mesh


async def test_the_limits_apply_behind_middlewares(limited_mesh: AgentMesh, name: str) -> None:
    """Requests that a plugin rejects use no capacity; of three others one runs and one waits."""
    release = asyncio.Event()

    @limited_mesh.agent(AgentSpec(name=name))
    async def hold() -> str:
        await release.wait()
        return "done"

    await limited_mesh.catalog()
    rejected = [limited_mesh.call(name, headers={"X-Reject": "1"}) for _ in range(50)]
    admitted = [limited_mesh.call(name) for _ in range(3)]
    calls = [asyncio.create_task(call) for call in [*rejected, *admitted]]
    with pytest.raises(Overloaded, match="1 requests running and 1 waiting"):
        await calls[-1]
    release.set()
    assert ["done", "done"] == await asyncio.gather(*calls[50:52])
    errors = await asyncio.gather(*calls[:50], return_exceptions=True)
    assert ["Rejected by the plugin."] * 50 == [getattr(error, "message", "") for error in errors]
    stats = route_of(limited_mesh, name).stats
    assert (51, 51) == (stats.overloaded, stats.errors)


async def test_a_change_of_a_key_waits_for_capacity(limited_mesh: AgentMesh, name: str) -> None:
    """A change that arrives while the agent is at its limits is handled as soon as it has capacity."""
    release, handled = asyncio.Event(), list[str]()
    sources = limited_mesh.subject_source(f"{name}.in"), limited_mesh.kv_source(f"{name}.*")

    @limited_mesh.agent(AgentSpec(name=name), sources=sources)
    async def handler(text: str) -> None:
        await release.wait()
        handled.append(text)

    await limited_mesh.catalog()
    route = route_of(limited_mesh, name)
    for text in ("first", "second"):
        await limited_mesh.publish(f"{name}.in", text)
    await until(lambda: route.in_flight == 2)
    await limited_mesh.kv.put(f"{name}.key", "change")
    await until(lambda: route.in_flight == 3)
    assert (2, 0, []) == (route.status().waiting, route.stats.errors, handled)
    release.set()
    await until(lambda: len(handled) == 3)
    assert ["first", "second", "change"] == handled


class CopyingPlugin:
    """Passes on a copy of each call."""

    @hookimpl
    def mesh_middleware(self) -> Middleware:
        def middleware(endpoint: Endpoint) -> Endpoint:
            async def copy_and_pass(call: Call) -> object:
                return await endpoint(replace(call))

            return copy_and_pass

        return middleware


async def test_a_copied_call_releases_its_permit(url: str, name: str) -> None:
    """A middleware may pass on a copy of the call: sequential requests never exceed the limits."""
    async with AgentMesh(url, plugins=[CopyingPlugin()]) as mesh:
        apply_plugins = node_of(mesh).prepare
        limits = Limits(concurrency=1, queue=0)
        node_of(mesh).prepare = lambda agent: apply_plugins(agent.with_limits(limits))

        @mesh.agent(AgentSpec(name=name))
        async def answer() -> str:
            return "done"

        assert ["done"] * 5 == [await mesh.call(name) for _ in range(5)]


async def test_all_versions_share_the_limits(mesh: AgentMesh, name: str) -> None:
    """Requests of an older version count after limits have changed; raised limits admit waiting ones."""
    running, most, release = 0, 0, asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def hold() -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await release.wait()
        running -= 1
        return "done"

    await mesh.catalog()
    route = route_of(mesh, name)
    version = route.agent
    calls: list[asyncio.Task[str]] = []

    async def all_arrived() -> bool:
        return route.in_flight == len(calls)

    for concurrency in (3, 2, 3, 2):
        route.swap(version.with_limits(Limits(concurrency=concurrency, queue=10)))
        calls += [asyncio.create_task(mesh.call(name)) for _ in range(2)]
        await until(all_arrived)
    await until(lambda: running == 3)
    assert 3 == most
    route.swap(version.with_limits(Limits(concurrency=5, queue=10)))
    await until(lambda: running == 5)
    release.set()
    assert ["done"] * 8 == await asyncio.gather(*calls)
    assert 0 == route.status().waiting


async def test_a_cancelled_waiter_keeps_no_slot() -> None:
    """Whether it is cancelled while it waits or just as it gets its slot, the next one gets it."""
    limiter = Limiter(1, 10)

    async def enter() -> None:
        async with limiter:
            pass

    for is_granted in (False, True):
        async with limiter:
            waiting = asyncio.create_task(enter())
            await until(lambda: limiter.waiting == 1)
            if not is_granted:
                waiting.cancel()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        await asyncio.wait_for(enter(), 5)
    assert 0 == limiter.waiting


async def test_a_closed_waiter_lets_no_other_one_in() -> None:
    """A coroutine that is closed while it waits, as at the end of a loop, takes and frees no slot."""
    limiter = Limiter(1, 10)

    async def enter() -> None:
        async with limiter:
            pass

    async with limiter:
        first = asyncio.create_task(enter())
        await until(lambda: limiter.waiting == 1)
        closed = enter()
        closed.send(None)
        closed.close()
        await asyncio.sleep(0)
        assert (1, False) == (limiter.waiting, first.done())
    await asyncio.wait_for(first, 5)
    assert 0 == limiter.waiting
