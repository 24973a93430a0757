"""The time limit of a running request, and cancellations at the same time."""

import asyncio

import pytest
from openagentmesh.agent.call import ServedCall
from openagentmesh.agent.concurrency import Limiter
from openagentmesh.protocol.codec import decode_request
from openagentmesh.serving.deadline import RequestDeadline


def expired_call() -> ServedCall:
    """A request whose deadline has passed."""
    now = asyncio.get_running_loop().time()
    return ServedCall("agent", deadline=now, request=decode_request(b"", b""), limiter=Limiter(1, 0))


async def test_the_block_raises_timeout_error_after_the_deadline() -> None:
    """The task is not cancelled any more afterwards."""
    with pytest.raises(TimeoutError), RequestDeadline(expired_call(), 1.0):
        await asyncio.sleep(60)
    task = asyncio.current_task()
    assert task is not None
    assert 0 == task.cancelling()


async def test_a_cancellation_from_elsewhere_is_not_a_timeout() -> None:
    """A task that is cancelled at the moment of its deadline ends as cancelled."""

    async def run() -> None:
        with RequestDeadline(expired_call(), 1.0) as deadline:
            try:
                await asyncio.sleep(60)
            finally:
                assert deadline.expired
                task.cancel()

    task = asyncio.create_task(run())
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()
