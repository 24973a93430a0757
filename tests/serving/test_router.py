"""A handler may do anything; its agent answers the next request, and others never notice."""

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    Cancelled,
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

from tests.support.meshes import flush, node_of, reconnects


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Number(BaseModel):
    value: int = 0


async def test_requests_run_side_by_side(mesh: AgentMesh, name: str) -> None:
    """A hundred calls of a handler that waits take about as long as one."""

    @mesh.agent(AgentSpec(name=name))
    async def wait(req: Number) -> Number:
        await asyncio.sleep(0.1)
        return req

    began = time.perf_counter()
    results = await asyncio.gather(*[mesh.call(name, {"value": n}) for n in range(100)])
    assert [{"value": n} for n in range(100)] == results
    assert time.perf_counter() - began < 5  # one at a time would take ten seconds


async def test_an_agent_calls_itself(mesh: AgentMesh, name: str) -> None:
    """A handler that calls its own agent gets its answer; nothing waits for itself."""

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
        (Unspeakable(), "handler_error", "Unspeakable: <exception str() failed>"),
        (SystemExit(3), "handler_error", "3"),
        (KeyboardInterrupt(), "handler_error", "KeyboardInterrupt"),
        (GeneratorExit(), "handler_error", "GeneratorExit"),
        (asyncio.CancelledError(), "handler_error", "CancelledError"),
        (TimeoutError("mine"), "handler_error", "mine"),
        (MeshError("quota", "used up", details={"left": 0}), "quota", "used up"),
        (InvalidInput("not that"), "invalid_input", "not that"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
async def test_whatever_is_raised_is_answered(
    mesh: AgentMesh, name: str, raised: BaseException, code: str, message: str
) -> None:
    """Any exception ends its own request with a code, and the next request is served."""

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


async def test_a_timed_out_handler_is_stopped(mesh: AgentMesh, name: str) -> None:
    """The caller's timeout travels with the request, and ends the handler's work."""
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


async def test_the_agents_own_limit_answers(mesh: AgentMesh, name: str) -> None:
    """A handler that outlives its agent's timeout is stopped and answered by the host."""
    node_of(mesh).prepare = lambda agent: agent.with_limits(Limits(timeout=0.1))

    @mesh.agent(AgentSpec(name=name))
    async def hang(req: Number) -> Number:
        await asyncio.sleep(60)
        return req

    with pytest.raises(MeshTimeout, match="was stopped"):
        await mesh.call(name, {}, timeout=10)


async def test_beyond_concurrency_and_queue_is_overloaded(mesh: AgentMesh, name: str) -> None:
    """One runs, one waits, the third is refused at once with when to try again."""
    node_of(mesh).prepare = lambda agent: agent.with_limits(Limits(concurrency=1, queue=1))
    going, go = asyncio.Semaphore(0), asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def hold(req: Number) -> Number:
        going.release()
        await go.wait()
        return req

    first = asyncio.create_task(mesh.call(name, {"value": 1}))
    await going.acquire()
    second = asyncio.create_task(mesh.call(name, {"value": 2}))
    route = node_of(mesh).router.get(name)
    assert route is not None
    while route.in_flight < 2:  # the second one is on its way through a real server
        await flush(mesh)
    with pytest.raises(Overloaded) as caught:
        await mesh.call(name, {"value": 3})
    assert caught.value.details["retry_after_ms"] > 0
    go.set()
    assert [{"value": 1}, {"value": 2}] == [await first, await second]


async def test_a_reply_that_is_too_large(mesh: AgentMesh, name: str) -> None:
    """A large reply is an error with its size, and the connection lives on."""

    @mesh.agent(AgentSpec(name=name))
    async def big(req: Number) -> str:
        return "x" * req.value

    with pytest.raises(PayloadTooLarge) as caught:
        await mesh.call(name, {"value": 2_000_000}, timeout=5)
    assert caught.value.details["size"] > caught.value.details["limit"]
    assert "xx" == await mesh.call(name, {"value": 2})
    assert reconnects(mesh) == 0


async def test_an_error_that_is_too_large(mesh: AgentMesh, name: str) -> None:
    """An error with huge details arrives shortened, with its own code."""

    @mesh.agent(AgentSpec(name=name))
    async def fail(req: Number) -> str:
        raise MeshError("mine", "m" * 100_000, details={"much": "x" * 2_000_000})

    with pytest.raises(MeshError) as caught:
        await mesh.call(name, {}, timeout=5)
    assert ("mine", {"truncated": True}) == (caught.value.code, caught.value.details)


async def test_details_that_are_no_json(mesh: AgentMesh, name: str) -> None:
    """An error whose details hold an exception still reaches the caller."""

    @mesh.agent(AgentSpec(name=name))
    async def fail(req: Number) -> str:
        raise MeshError("mine", "message", details={"cause": ValueError("inner"), "n": float("nan")})

    with pytest.raises(MeshError, match="message"):
        await mesh.call(name, {}, timeout=5)


async def test_every_error_is_copied(mesh: AgentMesh, name: str) -> None:
    """`mesh.errors.{name}` gets the envelope with the request's id, as peers expect it."""
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


async def test_without_a_reply_subject_there_is_no_reply(mesh: AgentMesh, name: str) -> None:
    """A request that nobody waits for is handled, and answers nobody."""
    handled: asyncio.Queue[int] = asyncio.Queue()

    @mesh.agent(AgentSpec(name=name))
    async def take(req: Number) -> Number:
        handled.put_nowait(req.value)
        return req

    await mesh.catalog()
    await node_of(mesh).connection.publish(subjects.agent(name), b'{"value": 7}')
    assert 7 == await handled.get()


async def test_current_call_tells_of_the_request(mesh: AgentMesh, name: str) -> None:
    """A handler sees its caller, its headers and how long it has; nobody else does."""

    @mesh.agent(AgentSpec(name=name))
    async def look() -> dict[str, object]:
        call = current_call()
        return {"caller": call.caller, "mine": call.headers["X-Mine"], "left": call.remaining}

    seen = await mesh.call(name, timeout=9, headers={"X-Mine": "yes"})
    assert (mesh.instance_id, "yes") == (seen["caller"], seen["mine"])
    assert 0 < seen["left"] <= 9
    with pytest.raises(RuntimeError, match="handlers"):
        current_call()


async def test_a_stranger_cannot_break_the_wire(mesh: AgentMesh, name: str) -> None:
    """Request ids that no subject can hold are refused, and the host stays connected."""
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


async def test_wrong_verbs_are_refused_by_the_host_too(mesh: AgentMesh, name: str) -> None:
    """A caller that does not check is told the same."""
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


async def test_a_stop_finishes_what_runs(url: str, mesh: AgentMesh, name: str) -> None:
    """A graceful stop answers the calls in flight, those that waited for their turn as well."""
    started, go = asyncio.Event(), asyncio.Event()
    provider = AgentMesh(url)

    @provider.agent(AgentSpec(name=name))
    async def work(req: Number) -> Number:
        started.set()
        await go.wait()
        return req

    async with provider:
        calls = [asyncio.create_task(mesh.call(name, {"value": n})) for n in range(20)]
        await started.wait()
        asyncio.get_running_loop().call_later(0.3, go.set)
    assert [{"value": n} for n in range(20)] == await asyncio.gather(*calls)


async def test_what_finishes_may_ask_its_neighbours(url: str, mesh: AgentMesh, name: str) -> None:
    """While a mesh is left, what still runs there calls, streams from and sends to others that it serves."""
    started, go = asyncio.Event(), asyncio.Event()
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
        await go.wait()
        await provider.send(f"{name}.inner", {"value": 7})
        streamed = [chunk async for chunk in provider.stream(f"{name}.chunks", {"value": 3})]
        return [await provider.call(f"{name}.inner", req), streamed]

    async with provider:
        call = asyncio.create_task(mesh.call(name, {"value": 1}))
        await started.wait()
        asyncio.get_running_loop().call_later(0.3, go.set)
    assert [{"value": 2}, [0, 1, 2]] == await call
    assert [7, 1] == sent


async def test_what_does_not_finish_is_cancelled_and_answered(url: str, mesh: AgentMesh, name: str) -> None:
    """After the drain timeout a handler is cancelled, and its caller is told so."""
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


async def test_a_failing_handler_is_logged(
    mesh: AgentMesh, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The traceback that the caller does not get is in the host's log."""

    @mesh.agent(AgentSpec(name=name))
    async def fail(req: Number) -> str:
        raise ZeroDivisionError("divided")

    with caplog.at_level(logging.ERROR), pytest.raises(HandlerError):
        await mesh.call(name, {})
    assert [ZeroDivisionError] == [r.exc_info[0] for r in caplog.records if r.exc_info]
    assert name in caplog.text
    assert sys.exc_info() == (None, None, None)


async def test_one_error_raised_twice_belongs_to_each_request(mesh: AgentMesh, name: str) -> None:
    """An error that an author keeps and raises again carries the id of the request at hand."""
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


async def test_a_large_input_that_does_not_fit_says_why(mesh: AgentMesh, name: str) -> None:
    """Pydantic's list arrives, without the input that would crowd it out."""

    class Long(BaseModel):
        text: str
        needed: int

    @mesh.agent(AgentSpec(name=name))
    async def take(req: Long) -> str:
        return req.text

    with pytest.raises(InvalidInput) as caught:
        await mesh.call(name, {"text": "x" * 200_000})
    assert [["needed"]] == [error["loc"] for error in caught.value.details["errors"]]


async def test_a_handler_may_call_others_while_its_mesh_stops(url: str, mesh: AgentMesh, name: str) -> None:
    """What runs finishes, nested calls included."""
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
