"""`retry=`: asked again, where the agent's author says that this does no harm."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from openagentmesh import AgentMesh, AgentSpec, InvalidInput, MeshError, NotAvailable, NotFound, Overloaded


async def test_an_overloaded_agent_is_asked_again(mesh: AgentMesh, name: str) -> None:
    """A refusal is not the last word within the retries and the timeout; the answer comes."""
    asked = 0

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def busy(req: int) -> int:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise Overloaded("not now", details={"retry_after_ms": 1})
        return req

    assert 7 == await mesh.call(name, 7, retry=2)
    assert 3 == asked


async def test_the_last_refusal_is_raised(mesh: AgentMesh, name: str) -> None:
    """After as many tries as were asked for, what came last is the error."""
    asked = 0

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def gone(req: int) -> int:
        nonlocal asked
        asked += 1
        raise NotAvailable(f"try {asked}")

    with pytest.raises(NotAvailable, match="try 3"):
        await mesh.call(name, 7, retry=2)
    assert 3 == asked


async def test_what_the_agent_says_for_good_is_not_asked_again(mesh: AgentMesh, name: str) -> None:
    """An error of the handler is an answer."""
    asked = 0

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def fails(req: int) -> int:
        nonlocal asked
        asked += 1
        raise MeshError("own", "no")

    with pytest.raises(MeshError, match="no"):
        await mesh.call(name, 7, retry=5)
    assert 1 == asked


async def test_the_timeout_holds_for_all_tries_together(mesh: AgentMesh, name: str) -> None:
    """A host that asks for more patience than there is left gets no further try."""

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def busy(req: int) -> int:
        raise Overloaded("not now", details={"retry_after_ms": 60_000})

    async with asyncio.timeout(10):
        with pytest.raises(Overloaded):
            await mesh.call(name, 7, 1.0, retry=100)


async def test_only_agents_that_allow_it_are_asked_again(mesh: AgentMesh, name: str) -> None:
    """Without the author's word `retry=` is refused before anything is sent; nobody is nobody."""
    asked = 0

    @mesh.agent(AgentSpec(name=name))
    async def once(req: int) -> int:
        nonlocal asked
        asked += 1
        return req

    with pytest.raises(InvalidInput, match="idempotent=True"):
        await mesh.call(name, 7, retry=1)
    with pytest.raises(NotFound):
        await mesh.call(f"{name}x", 7, retry=1)
    assert 0 == asked


async def test_a_stream_is_asked_again_until_its_first_chunk(mesh: AgentMesh, name: str) -> None:
    """What has been read is never read twice: after a chunk the error is raised."""
    asked = 0

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def stream(late: bool) -> AsyncIterator[int]:
        nonlocal asked
        asked += 1
        if late:
            yield 0
        if asked < 3:
            raise NotAvailable("not now")
        yield asked

    assert [3] == [chunk async for chunk in mesh.stream(name, payload=False, retry=5)]
    asked, chunks = 0, []
    with pytest.raises(NotAvailable):
        async for chunk in mesh.stream(name, payload=True, retry=5):
            chunks += [chunk]
    assert ([0], 1) == (chunks, asked)


async def test_the_contract_says_whether_it_may_be_asked_again(mesh: AgentMesh, name: str) -> None:
    """The author's word is published among our own keys, and only when it was given."""

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def agent(req: int) -> int:
        return req

    @mesh.agent(AgentSpec(name=f"{name}x"))
    async def other(req: int) -> int:
        return req

    contract, plain = await mesh.contract(name), await mesh.contract(f"{name}x")
    assert contract.idempotent
    assert contract.to_document()["x-agentmesh"]["idempotent"] is True
    assert not plain.idempotent
    assert "idempotent" not in plain.to_document()["x-agentmesh"]
