"""How many requests an agent has room for, and who takes it, when plugins stand before it."""

import asyncio
from contextlib import aclosing

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

        limiter = route._limiter
        limiter.admit()
        limiter.admit()
        async with limiter:
            assert limiter.is_full
            async with aclosing(small.kv.watch(f"{name}.key")) as values:
                await small.kv.put(f"{name}.key", "1")
                await anext(values)  # so the agent's source has received the change too
            assert not changed.is_set()
        await asyncio.wait_for(changed.wait(), 10)
