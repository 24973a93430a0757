"""`retry=`: requests to idempotent agents are repeated after certain errors."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from openagentmesh import AgentMesh, AgentSpec, InvalidInput, MeshError, NotAvailable, NotFound, Overloaded


async def test_a_request_to_an_overloaded_agent_is_retried(mesh: AgentMesh, name: str) -> None:
    """Within the retries and the timeout the request is repeated until it is answered."""
    attempts = 0

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def busy(req: int) -> int:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise Overloaded("not now", details={"retry_after_ms": 1})
        return req

    assert 7 == await mesh.call(name, 7, retry=2)
    assert 3 == attempts


async def test_the_error_of_the_last_attempt_is_raised(mesh: AgentMesh, name: str) -> None:
    """When all retries have failed, the last error is raised."""
    attempts = 0

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def unavailable(req: int) -> int:
        nonlocal attempts
        attempts += 1
        raise NotAvailable(f"attempt {attempts}")

    with pytest.raises(NotAvailable, match="attempt 3"):
        await mesh.call(name, 7, retry=2)
    assert 3 == attempts


async def test_other_errors_are_not_retried(mesh: AgentMesh, name: str) -> None:
    """An error of the handler is raised after the first attempt."""
    attempts = 0

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def fails(req: int) -> int:
        nonlocal attempts
        attempts += 1
        raise MeshError("own", "no")

    with pytest.raises(MeshError, match="no"):
        await mesh.call(name, 7, retry=5)
    assert 1 == attempts


async def test_the_timeout_includes_all_attempts(mesh: AgentMesh, name: str) -> None:
    """When `retry_after_ms` exceeds the time that is left, there is no further attempt."""
    attempts = 0

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def busy(req: int) -> int:
        nonlocal attempts
        attempts += 1
        raise Overloaded("not now", details={"retry_after_ms": 60_000})

    async with asyncio.timeout(10):
        with pytest.raises(Overloaded):
            await mesh.call(name, 7, 1.0, retry=100)
    assert 1 == attempts


async def test_a_retry_waits_for_retry_after_ms(mesh: AgentMesh, name: str) -> None:
    """The next attempt is sent no earlier than the overloaded host permits."""
    times: list[float] = []

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def busy(req: int) -> int:
        times.append(time.monotonic())
        if len(times) == 1:
            raise Overloaded("not now", details={"retry_after_ms": 400})
        return req

    assert 7 == await mesh.call(name, 7, retry=1)
    first, second = times
    assert second - first >= 0.4


async def test_retries_require_an_idempotent_agent(mesh: AgentMesh, name: str) -> None:
    """For an agent that is not declared idempotent, and for an unknown one, no request is sent."""
    attempts = 0

    @mesh.agent(AgentSpec(name=name))
    async def once(req: int) -> int:
        nonlocal attempts
        attempts += 1
        return req

    with pytest.raises(InvalidInput, match="idempotent=True"):
        await mesh.call(name, 7, retry=1)
    with pytest.raises(NotFound):
        await mesh.call(f"{name}x", 7, retry=1)
    assert 0 == attempts


async def test_a_stream_is_retried_before_its_first_chunk_only(mesh: AgentMesh, name: str) -> None:
    """No chunk is read twice: an error after a chunk is raised."""
    attempts = 0

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def stream(late: bool) -> AsyncIterator[int]:
        nonlocal attempts
        attempts += 1
        if late:
            yield 0
        if attempts < 3:
            raise NotAvailable("not now")
        yield attempts

    assert [3] == [chunk async for chunk in mesh.stream(name, payload=False, retry=5)]
    attempts, chunks = 0, []
    with pytest.raises(NotAvailable):
        async for chunk in mesh.stream(name, payload=True, retry=5):
            chunks += [chunk]
    assert ([0], 1) == (chunks, attempts)


async def test_the_contract_contains_idempotent_only_if_declared(mesh: AgentMesh, name: str) -> None:
    """The document has the key `idempotent` in `x-agentmesh` for agents that declare it, and no others."""

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
