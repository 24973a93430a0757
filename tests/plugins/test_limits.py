"""Limits: requests above a caller's rate or share are refused, and those of other callers are not."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import oam_limits
import pytest
from openagentmesh import AgentMesh, AgentSpec, KVEntry, MeshMessage, Overloaded

from tests.support.limits import Clock, Limited, Serve, outcomes, refused, serve_echo
from tests.support.modules import MESH, agent


async def test_a_greedy_caller_does_not_starve_a_modest_one(
    serve_limited: Serve, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """While one caller sends far more requests than an agent can run, those of another are all answered."""
    source = "import asyncio\n" + MESH + agent(name, "await asyncio.sleep(0.005) or 'done'")
    limits = "limits = {concurrency = 4, queue = 2}"
    async with serve_limited({"a.py": source}, limits), new_mesh() as greedy, new_mesh() as modest:
        stopping = asyncio.Event()

        async def send_many() -> list[Any]:
            found = []
            while not stopping.is_set():
                found += await outcomes(greedy, name, 200, payload={})
            return found

        sending = asyncio.create_task(send_many())
        answers = [await modest.call(name, {}) for _ in range(50)]
        stopping.set()
        of_greedy = await sending
    assert ["done"] * 50 == answers
    assert refused(of_greedy)
    assert "done" in of_greedy
    assert len(refused(of_greedy)) + of_greedy.count("done") == len(of_greedy)


async def test_a_share_limits_the_concurrent_requests_of_a_caller(
    limited: Limited, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """With a concurrency of 128, a share of 0.02 is two: a third request is refused until one has ended."""
    mesh, release = limited(share=0.02), asyncio.Event()
    running = asyncio.Semaphore(0)

    @mesh.agent(AgentSpec(name=name))
    async def hold() -> str:
        running.release()
        await release.wait()
        return "done"

    async with mesh, new_mesh() as caller, new_mesh() as other:
        held = [asyncio.create_task(caller.call(name)) for _ in range(2)]
        await running.acquire()
        await running.acquire()
        with pytest.raises(Overloaded, match="has 2 requests at agent"):
            await caller.call(name)
        of_other = asyncio.create_task(other.call(name))
        await running.acquire()
        release.set()
        assert ["done"] * 3 == await asyncio.gather(*held, of_other)
        assert "done" == await caller.call(name)


async def test_a_cancelled_request_releases_its_share(limited: Limited, name: str) -> None:
    """After a caller with a share of one request has cancelled it, its next request is permitted."""
    mesh, began, ended = limited(share=0.001), asyncio.Event(), asyncio.Event()

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def hold(forever: bool) -> str:
        began.set()
        try:
            if forever:
                await asyncio.Event().wait()
        finally:
            ended.set()
        return "done"

    async with mesh:
        calling = asyncio.create_task(mesh.call(name, payload=True))
        await began.wait()
        calling.cancel()
        await asyncio.wait_for(ended.wait(), 10)
        assert "done" == await mesh.call(name, payload=False, retry=3)


@pytest.mark.parametrize(
    ("settings", "burst"),
    [({"rate": 2.5}, 3), ({"rate": 0.1}, 1), ({"rate": 50, "burst": 7}, 7), ({"rate": 3, "burst": 1}, 1)],
)
async def test_a_rate_permits_a_request_after_the_retry_time(
    limited: Limited, clock: Clock, name: str, settings: dict[str, float], burst: int
) -> None:
    """After the burst, a request is refused before `retry_after_ms` has passed, and permitted then."""
    mesh = limited(**settings)
    serve_echo(mesh, name)
    async with mesh:
        found = await outcomes(mesh, name, burst + 2)
        assert ["ok"] * burst == found[:burst]
        assert 2 == len(refused(found))
        for _ in range(5):
            [refusal] = refused(await outcomes(mesh, name, 1))
            retry_after_ms = refusal.details["retry_after_ms"]
            assert retry_after_ms == pytest.approx(1000 / settings["rate"], abs=2)
            clock.now += (retry_after_ms - 2) / 1000
            assert refused(await outcomes(mesh, name, 1))
            clock.now += 2 / 1000
            assert "ok" == await mesh.call(name)


async def test_the_retry_time_of_a_share_is_the_expected_end_of_the_oldest_request(
    limited: Limited, clock: Clock, name: str
) -> None:
    """For an agent that takes three seconds, and a request of a second ago, the retry time is two seconds."""
    mesh, began, release = limited(share=0.001), asyncio.Event(), asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def hold() -> str:
        began.set()
        await release.wait()
        return "done"

    async with mesh:
        for _ in range(60):  # until the average duration is three seconds
            release.clear()
            calling = asyncio.create_task(mesh.call(name))
            await began.wait()
            began.clear()
            clock.now += 3
            release.set()
            await calling
        release.clear()
        calling = asyncio.create_task(mesh.call(name))
        await began.wait()
        clock.now += 1
        [refusal] = refused(await outcomes(mesh, name, 1))
        release.set()
        await calling
    assert refusal.details["retry_after_ms"] == pytest.approx(2000, abs=10)


async def test_refused_calls_with_retry_are_answered(limited: Limited, name: str) -> None:
    """A refused call with `retry` waits for `retry_after_ms`, and is answered then."""
    mesh = limited(rate=100, burst=2)

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def echo() -> str:
        return "ok"

    async with mesh:
        await mesh.contract(name)
        assert ["ok"] * 6 == await outcomes(mesh, name, 6, retry=9, timeout=20)


async def test_all_callers_share_the_total(
    limited: Limited, new_mesh: Callable[[], AgentMesh], clock: Clock, name: str
) -> None:
    """No more than `total_rate` reaches the agent, and a refused request does not count for any rate."""
    mesh = limited(rate=1, burst=2, total_rate=10, total_burst=3)
    serve_echo(mesh, name)
    async with mesh, new_mesh() as first, new_mesh() as second:
        assert ["ok", "ok"] == await outcomes(first, name, 2)
        assert 1 == len(refused(await outcomes(second, name, 2)))
        [refusal] = refused(await outcomes(first, name, 1))
        assert refusal.details["retry_after_ms"] == pytest.approx(1000, abs=2)  # of its own rate
        [refusal] = refused(await outcomes(second, name, 1))
        assert refusal.details["retry_after_ms"] == pytest.approx(100, abs=2)
        clock.now += 0.101
        assert "ok" == await second.call(name)


async def test_without_a_rate_one_caller_has_its_share_of_the_total(
    limited: Limited, new_mesh: Callable[[], AgentMesh], clock: Clock, name: str
) -> None:
    """A caller that sends requests all the time leaves the rest of the total to other callers."""
    mesh = limited(total_rate=10, total_burst=4, share=0.5)
    serve_echo(mesh, name)
    async with mesh, new_mesh() as greedy, new_mesh() as modest:
        assert 2 == len(refused(await outcomes(greedy, name, 4)))
        assert ["ok", "ok"] == await outcomes(modest, name, 2)
        for _ in range(3):
            clock.now += 0.201  # two more of the total are permitted
            assert 1 == len(refused(await outcomes(greedy, name, 2)))
            assert "ok" == await modest.call(name)


def test_a_share_is_a_number_of_whole_requests() -> None:
    """With a concurrency of 100, a share of 0.29 is 29, in spite of the rounding of binary fractions."""
    shares = {0.29: 29, 0.57: 57, 0.07: 7, 0.001: 1, 1: 100}
    assert list(shares.values()) == [oam_limits._share(share, 100) for share in shares]


async def test_streams_and_sends_count(limited: Limited, clock: Clock, name: str) -> None:
    """A refused stream ends with the error, and a refused send is not handled."""
    mesh, runs = limited(rate=1, burst=2), 0

    @mesh.agent(AgentSpec(name=name))
    async def count(to: int) -> AsyncIterator[int]:
        nonlocal runs
        runs += 1
        for number in range(to):
            yield number

    async with mesh:
        assert [0, 1] == [number async for number in mesh.stream(name, 2)]
        assert [0] == [number async for number in mesh.stream(name, 1)]
        with pytest.raises(Overloaded):
            [number async for number in mesh.stream(name, 1)]
        await mesh.send(name, 1)
        clock.now += 1
        assert [0] == [number async for number in mesh.stream(name, 1)]
    assert 3 == runs


async def test_messages_of_a_source_count_and_changes_of_keys_do_not(
    limited: Limited, clock: Clock, name: str
) -> None:
    """Messages of a subject are limited to the rate, changes of keys are not."""
    mesh, messages, values = limited(rate=1, burst=2, share=0.001), [], []
    last = asyncio.Event()

    @mesh.agent(AgentSpec(name=f"{name}.messages"), sources=[mesh.subject_source(f"{name}.in")])
    async def on_message(message: MeshMessage[int]) -> None:
        messages.append(message.data)

    @mesh.agent(AgentSpec(name=f"{name}.changes"), sources=[mesh.kv_source(f"{name}.*")])
    async def on_change(entry: KVEntry[int]) -> None:
        values.append(entry.value)
        if entry.value == 9:
            last.set()

    async with mesh:
        await mesh.catalog()
        for number in range(10):
            await mesh.publish(f"{name}.in", str(number))
            await mesh.kv.put(f"{name}.key", str(number))
        await asyncio.wait_for(last.wait(), 10)
    assert [0, 1] == messages
    assert 9 == values[-1]
