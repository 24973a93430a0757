"""Draining: a mesh that closes finishes its running requests, or cancels and answers them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openagentmesh import AgentMesh, AgentSpec, Cancelled

from tests.support.meshes import Number, node_of


async def test_closing_a_mesh_drains_its_requests(url: str, mesh: AgentMesh, name: str) -> None:
    """A graceful close answers all running requests."""
    started, release = asyncio.Event(), asyncio.Event()
    provider = AgentMesh(url)

    @provider.agent(AgentSpec(name=name))
    async def work(req: Number) -> Number:
        started.set()
        await release.wait()
        return req

    async with provider:
        calls = [asyncio.create_task(mesh.call(name, {"value": n})) for n in range(20)]
        await started.wait()
        asyncio.get_running_loop().call_later(0.3, release.set)
    assert [{"value": n} for n in range(20)] == await asyncio.gather(*calls)


async def test_a_handler_may_call_agents_of_a_closing_mesh(url: str, mesh: AgentMesh, name: str) -> None:
    """While a mesh closes, a running handler calls, streams from and sends to agents that it serves."""
    started, release = asyncio.Event(), asyncio.Event()
    provider, sent = AgentMesh(url), []

    @provider.agent(AgentSpec(name=f"{name}.inner"))
    async def inner(req: Number) -> Number:
        sent.append(req.value)
        return Number(value=req.value + 1)

    @provider.agent(AgentSpec(name=f"{name}.chunks"))
    async def chunks(req: Number) -> AsyncIterator[int]:
        for number in range(req.value):
            yield number

    @provider.agent(AgentSpec(name=name))
    async def outer(req: Number) -> list[Any]:
        started.set()
        await release.wait()
        await provider.send(f"{name}.inner", {"value": 7})
        streamed = [chunk async for chunk in provider.stream(f"{name}.chunks", {"value": 3})]
        return [await provider.call(f"{name}.inner", req), streamed]

    async with provider:
        call = asyncio.create_task(mesh.call(name, {"value": 1}))
        await started.wait()
        asyncio.get_running_loop().call_later(0.3, release.set)
    assert [{"value": 2}, [0, 1, 2]] == await call
    assert [7, 1] == sent


async def test_after_the_drain_timeout_requests_are_cancelled_and_answered(
    url: str, mesh: AgentMesh, name: str
) -> None:
    """The caller of a handler that does not finish in time gets Cancelled."""
    started = asyncio.Event()
    provider = AgentMesh(url)

    @provider.agent(AgentSpec(name=name))
    async def hang(req: Number) -> Number:
        started.set()
        await asyncio.sleep(60)
        return req

    await provider.__aenter__()
    call = asyncio.create_task(mesh.call(name, {}))
    await started.wait()
    await node_of(provider).stop(0.1)
    with pytest.raises(Cancelled):
        await call


async def test_a_handler_of_a_closing_mesh_may_call_other_meshes(
    url: str, mesh: AgentMesh, name: str
) -> None:
    """A running request finishes, including its nested call."""
    provider, started = AgentMesh(url), asyncio.Event()

    @mesh.agent(AgentSpec(name=f"{name}.other"))
    async def other(req: Number) -> Number:
        return req

    @provider.agent(AgentSpec(name=name))
    async def nested(req: Number) -> Number:
        started.set()
        await asyncio.sleep(0.3)
        return Number.model_validate(await provider.call(f"{name}.other", req))

    await mesh.catalog()
    async with provider:
        call = asyncio.create_task(mesh.call(name, {"value": 3}))
        await started.wait()
    assert {"value": 3} == await call
