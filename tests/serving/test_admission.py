"""How many requests an agent has room for, and who takes it, when plugins stand before it."""

import asyncio

import pytest
from openagentmesh import AgentMesh, AgentSpec, Call, Endpoint, KVEntry, Middleware, Overloaded, hookimpl
from openagentmesh.agent.agent import AgentVersion, Limits

from tests.support.meshes import node_of


class Turnstile:
    """Lets through who is welcome, and refuses the others after a moment."""

    @hookimpl
    def mesh_middleware(self) -> Middleware:
        def middleware(endpoint: Endpoint) -> Endpoint:
            async def look(call: Call) -> object:
                await asyncio.sleep(0)
                if "X-Unwelcome" in call.headers:
                    raise Overloaded("Not you.")
                return await endpoint(call)

            return look

        return middleware


@pytest.fixture
def small(url: str) -> AgentMesh:
    """A mesh whose agents have room for one request and for one that waits, behind a plugin."""
    mesh = AgentMesh(url, plugins=[Turnstile()])
    wrap = mesh._plugins.wrap
    mesh._plugins.wrap = lambda agent, tables: wrap(shrunk(agent), tables)  # type: ignore[method-assign]
    return mesh


def shrunk(agent: AgentVersion) -> AgentVersion:
    return agent.with_limits(Limits(concurrency=1, queue=1))


async def test_room_is_counted_behind_plugins(small: AgentMesh, name: str) -> None:
    """Who a plugin refuses takes no room, however many; of the others one runs, one waits, one is refused."""
    go = asyncio.Event()

    @small.agent(AgentSpec(name=name))
    async def hold() -> str:
        await go.wait()
        return "done"

    async with small:
        await small.catalog()
        unwelcome = [small.call(name, headers={"X-Unwelcome": "1"}) for _ in range(50)]
        calls = [asyncio.create_task(call) for call in [*unwelcome, *[small.call(name) for _ in range(3)]]]
        with pytest.raises(Overloaded, match="1 requests running and 1 waiting"):
            await calls[-1]
        go.set()
        assert ["done", "done"] == await asyncio.gather(*calls[50:52])
        told = await asyncio.gather(*calls[:50], return_exceptions=True)
        assert {"Not you."} == {error.message for error in told if isinstance(error, Overloaded)}
        route = node_of(small).router.get(name)
        assert route is not None
        assert (51, 51) == (route.stats.overloaded, route.stats.errors)


async def test_a_change_of_a_key_waits_for_room(small: AgentMesh, name: str) -> None:
    """A change that comes while requests take all the room is not lost: it is told when there is some."""
    changed = asyncio.Event()

    @small.agent(AgentSpec(name=name), sources=[small.kv_source(f"{name}.*")])
    async def driven(entry: KVEntry[str]) -> None:
        changed.set()

    async with small:
        await small.catalog()
        route = node_of(small).router.get(name)
        assert route is not None

        async def pass_through() -> None:
            async with route._limiter:
                pass

        async with route._limiter:
            waiting = asyncio.create_task(pass_through())
            await asyncio.sleep(0)
            assert route._limiter.is_full
            await small.kv.put(f"{name}.key", "1")
            async with asyncio.timeout(10):
                while not route.in_flight:
                    await asyncio.sleep(0.001)
        await waiting
        await asyncio.wait_for(changed.wait(), 10)
