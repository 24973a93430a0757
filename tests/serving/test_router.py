"""Requests: whatever a handler does, its agent answers the next one, and other agents are unaffected."""

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator

import pytest
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    HandlerError,
    InvalidInput,
    InvocationMismatch,
    MeshError,
    MeshTimeout,
    Overloaded,
    PayloadTooLarge,
    current_call,
)
from openagentmesh.agent.agent import Limits
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.headers import read_headers, write_headers
from openagentmesh.transport.nats_client import Message
from pydantic import BaseModel

from tests.support.meshes import Number, node_of, reconnects, route_of
from tests.support.waiting import until


class WithoutText(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


async def test_requests_run_concurrently(mesh: AgentMesh, name: str) -> None:
    """A hundred calls of a handler that waits take about as long as one."""

    @mesh.agent(AgentSpec(name=name))
    async def wait(req: Number) -> Number:
        await asyncio.sleep(0.1)
        return req

    began = time.perf_counter()
    results = await asyncio.gather(*[mesh.call(name, {"value": n}) for n in range(100)])
    assert [{"value": n} for n in range(100)] == results
    assert time.perf_counter() - began < 5  # one at a time would take ten seconds


async def test_an_agent_may_call_itself(mesh: AgentMesh, name: str) -> None:
    """Nested calls of a handler to its own agent are answered."""

    @mesh.agent(AgentSpec(name=name))
    async def countdown(req: Number) -> Number:
        if req.value == 0:
            return req
        return Number.model_validate(await mesh.call(name, {"value": req.value - 1}, timeout=5))

    assert {"value": 0} == await mesh.call(name, {"value": 5}, timeout=5)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (ValueError("boom"), "handler_error", "boom"),
        (KeyError("k"), "handler_error", "'k'"),
        (ValueError(), "handler_error", "ValueError"),
        (WithoutText(), "handler_error", "WithoutText: <exception str() failed>"),
        (SystemExit(3), "handler_error", "3"),
        (KeyboardInterrupt(), "handler_error", "KeyboardInterrupt"),
        (GeneratorExit(), "handler_error", "GeneratorExit"),
        (asyncio.CancelledError(), "handler_error", "CancelledError"),
        (TimeoutError("own"), "handler_error", "own"),
        (MeshError("quota", "used up", details={"left": 0}), "quota", "used up"),
        (InvalidInput("not that"), "invalid_input", "not that"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
async def test_any_exception_is_answered(
    mesh: AgentMesh, name: str, raised: BaseException, code: str, message: str
) -> None:
    """An exception ends its own request with an error code, and the next request is answered."""

    @mesh.agent(AgentSpec(name=name))
    async def fail(req: Number) -> Number:
        if req.value:
            raise raised
        return req

    for _ in range(2):
        with pytest.raises(MeshError) as caught:
            await mesh.call(name, {"value": 1}, timeout=5)
        assert (code, message, name) == (caught.value.code, caught.value.message, caught.value.agent)
    assert {"value": 0} == await mesh.call(name, {}, timeout=5)


async def test_a_handler_is_cancelled_at_the_callers_timeout(mesh: AgentMesh, name: str) -> None:
    """The request carries the caller's timeout, after which the host cancels the handler."""
    stopped = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def hang(req: Number) -> Number:
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()
        return req

    with pytest.raises(MeshTimeout) as caught:
        await mesh.call(name, {}, timeout=0.2)
    assert "timeout" == caught.value.code
    async with asyncio.timeout(2):
        await stopped.wait()


async def test_a_handler_is_cancelled_at_the_agents_timeout(mesh: AgentMesh, name: str) -> None:
    """The host cancels and answers a request that takes longer than the agent's own timeout."""
    node_of(mesh).prepare = lambda agent: agent.with_limits(Limits(timeout=0.1))

    @mesh.agent(AgentSpec(name=name))
    async def hang(req: Number) -> Number:
        await asyncio.sleep(60)
        return req

    with pytest.raises(MeshTimeout, match="was stopped"):
        await mesh.call(name, {}, timeout=10)


async def test_a_request_above_concurrency_and_queue_is_overloaded(mesh: AgentMesh, name: str) -> None:
    """One request runs, one waits, and the third is rejected immediately with a retry delay."""
    node_of(mesh).prepare = lambda agent: agent.with_limits(Limits(concurrency=1, queue=1))
    started, release = asyncio.Semaphore(0), asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def hold(req: Number) -> Number:
        started.release()
        await release.wait()
        return req

    first = asyncio.create_task(mesh.call(name, {"value": 1}))
    await started.acquire()
    second = asyncio.create_task(mesh.call(name, {"value": 2}))
    await until(lambda: route_of(mesh, name).in_flight == 2)
    with pytest.raises(Overloaded) as caught:
        await mesh.call(name, {"value": 3})
    assert caught.value.details["retry_after_ms"] > 0
    release.set()
    assert [{"value": 1}, {"value": 2}] == [await first, await second]


async def test_a_reply_above_the_size_limit_is_an_error(mesh: AgentMesh, name: str) -> None:
    """The error contains the sizes, and the connection stays open."""

    @mesh.agent(AgentSpec(name=name))
    async def big(req: Number) -> str:
        return "x" * req.value

    with pytest.raises(PayloadTooLarge) as caught:
        await mesh.call(name, {"value": 2_000_000}, timeout=5)
    assert caught.value.details["size"] > caught.value.details["limit"]
    assert "xx" == await mesh.call(name, {"value": 2})
    assert reconnects(mesh) == 0


async def test_an_error_above_the_size_limit_is_shortened(mesh: AgentMesh, name: str) -> None:
    """An error with large details arrives without them, with its own code."""

    @mesh.agent(AgentSpec(name=name))
    async def fail(req: Number) -> str:
        raise MeshError("custom", "m" * 100_000, details={"much": "x" * 2_000_000})

    with pytest.raises(MeshError) as caught:
        await mesh.call(name, {}, timeout=5)
    assert ("custom", {"truncated": True}) == (caught.value.code, caught.value.details)


async def test_an_error_with_details_that_are_not_json_arrives(mesh: AgentMesh, name: str) -> None:
    """An error whose details contain an exception still reaches the caller."""

    @mesh.agent(AgentSpec(name=name))
    async def fail(req: Number) -> str:
        raise MeshError("custom", "message", details={"cause": ValueError("inner"), "n": float("nan")})

    with pytest.raises(MeshError, match="message"):
        await mesh.call(name, {}, timeout=5)


async def test_errors_are_published_on_the_errors_subject(mesh: AgentMesh, name: str) -> None:
    """A copy of the error envelope with the request's id is published on `mesh.errors.{name}`."""
    copies: asyncio.Queue[Message] = asyncio.Queue()
    await node_of(mesh).connection.subscribe(subjects.errors(name), copies.put_nowait)

    @mesh.agent(AgentSpec(name=name))
    async def fail(req: Number) -> str:
        raise ValueError("boom")

    with pytest.raises(HandlerError) as caught:
        await mesh.call(name, {})
    copy = await copies.get()
    headers = read_headers(copy.head)
    assert ("error", caught.value.request_id) == (headers["X-Mesh-Status"], headers["X-Mesh-Request-Id"])
    assert "handler_error" == json.loads(copy.body)["code"]


async def test_a_request_without_a_reply_subject_is_handled(mesh: AgentMesh, name: str) -> None:
    """The handler runs although there is no subject for a reply."""
    handled: asyncio.Queue[int] = asyncio.Queue()

    @mesh.agent(AgentSpec(name=name))
    async def take(req: Number) -> Number:
        handled.put_nowait(req.value)
        return req

    await mesh.catalog()
    await node_of(mesh).connection.publish(subjects.agent(name), b'{"value": 7}')
    assert 7 == await handled.get()


async def test_current_call_is_the_running_request(mesh: AgentMesh, name: str) -> None:
    """It has the caller, the headers and the remaining time; outside a handler it raises RuntimeError."""

    @mesh.agent(AgentSpec(name=name))
    async def describe() -> dict[str, object]:
        call = current_call()
        return {"caller": call.caller, "header": call.headers["X-Custom"], "remaining": call.remaining}

    described = await mesh.call(name, timeout=9, headers={"X-Custom": "yes"})
    assert (mesh.instance_id, "yes") == (described["caller"], described["header"])
    assert 0 < described["remaining"] <= 9
    with pytest.raises(RuntimeError, match="handlers"):
        current_call()


async def test_an_invalid_request_id_of_a_stream_is_rejected(mesh: AgentMesh, name: str) -> None:
    """Request ids that cannot be part of a subject are `invalid_input`, and the host stays connected."""
    replies: asyncio.Queue[Message] = asyncio.Queue()
    node = node_of(mesh)

    @mesh.agent(AgentSpec(name=name))
    async def chunks(req: Number) -> AsyncIterator[Number]:
        yield req

    await mesh.catalog()
    reply = node.inbox.register(replies.put_nowait)
    for request_id in ("a b", "*", ">", "a..b", "\x00", "é", "x" * 5000):
        head = write_headers({"X-Mesh-Request-Id": request_id, "X-Mesh-Stream": "true"})
        await node.connection.publish(subjects.agent(name), b"{}", head, reply)
        error = codec.decode_error((await replies.get()).body)
        assert "invalid_input" == error.code
    assert node.connection.reconnects == 0


async def test_the_host_rejects_a_wrong_verb(mesh: AgentMesh, name: str) -> None:
    """A call of a streamer by a caller that does not check the verb is an InvocationMismatch."""
    replies: asyncio.Queue[Message] = asyncio.Queue()
    node = node_of(mesh)

    @mesh.agent(AgentSpec(name=name))
    async def chunks(req: Number) -> AsyncIterator[Number]:
        yield req

    await mesh.catalog()
    await node.connection.publish(subjects.agent(name), b"{}", b"", node.inbox.register(replies.put_nowait))
    error = codec.decode_error((await replies.get()).body)
    assert f"Agent '{name}' is streaming-only. Use stream() instead" == error.message
    assert isinstance(error, InvocationMismatch)


async def test_a_failing_handler_is_logged(
    mesh: AgentMesh, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log contains the traceback, which the caller does not get."""

    @mesh.agent(AgentSpec(name=name))
    async def fail(req: Number) -> str:
        raise ZeroDivisionError("divided")

    with caplog.at_level(logging.ERROR), pytest.raises(HandlerError):
        await mesh.call(name, {})
    assert [ZeroDivisionError] == [r.exc_info[0] for r in caplog.records if r.exc_info]
    assert name in caplog.text
    assert sys.exc_info() == (None, None, None)


async def test_a_reused_error_has_the_id_of_the_current_request(mesh: AgentMesh, name: str) -> None:
    """An error instance that is raised twice carries the id of each request."""
    limit = MeshError("limit", "enough")
    replies: asyncio.Queue[Message] = asyncio.Queue()
    node = node_of(mesh)

    @mesh.agent(AgentSpec(name=name))
    async def fail(req: Number) -> str:
        raise limit

    await mesh.catalog()
    for request_id in ("first", "second"):
        head = write_headers({"X-Mesh-Request-Id": request_id})
        await node.connection.publish(
            subjects.agent(name), b"{}", head, node.inbox.register(replies.put_nowait)
        )
        assert request_id == json.loads((await replies.get()).body)["request_id"]


async def test_the_problems_of_a_large_invalid_input_arrive(mesh: AgentMesh, name: str) -> None:
    """Pydantic's list of problems arrives without the input, which is above the size limit of errors."""

    class Long(BaseModel):
        text: str
        required: int

    @mesh.agent(AgentSpec(name=name))
    async def take(req: Long) -> str:
        return req.text

    with pytest.raises(InvalidInput) as caught:
        await mesh.call(name, {"text": "x" * 200_000})
    assert [["required"]] == [error["loc"] for error in caught.value.details["errors"]]
