"""`send`: requests whose sender does not wait for the result."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from openagentmesh import (
    AgentDied,
    AgentMesh,
    AgentSpec,
    ConnectionFailed,
    HandlerError,
    InvalidInput,
    InvocationMismatch,
    MeshError,
    MeshTimeout,
    NotAvailable,
    NotFound,
    current_call,
)
from openagentmesh.protocol import subjects
from openagentmesh.protocol.headers import read_headers
from openagentmesh.protocol.messages import DeathNotice
from pydantic import BaseModel

from tests.support.meshes import (
    Text,
    background_of,
    declare_background,
    flush,
    is_subscribed,
    listen,
    next_frame,
    node_of,
    run_forever,
    serve,
)


class Callbacks:
    """The callbacks of one `send`, and what they were called with, in order."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()

    async def send(
        self,
        mesh: AgentMesh,
        name: str,
        payload: object,
        timeout: float | None = 60,
        headers: dict[str, str] | None = None,
    ) -> None:
        put = self.queue.put_nowait
        await mesh.send(name, payload, on_reply=put, on_error=put, timeout=timeout, headers=headers)

    def so_far(self) -> list[Any]:
        return [self.queue.get_nowait() for _ in range(self.queue.qsize())]

    async def next(self) -> Any:
        async with asyncio.timeout(10):
            return await self.queue.get()


class Count(BaseModel):
    count: int = 3
    fails: bool = False
    waits: float = 0


def streamer(mesh: AgentMesh, name: str) -> asyncio.Queue[str]:
    """Declare a streamer that counts; returns a queue of how its runs ended."""
    ends: asyncio.Queue[str] = asyncio.Queue()

    @mesh.agent(AgentSpec(name=name))
    async def stream(req: Count) -> AsyncIterator[int]:
        is_complete = False
        try:
            for number in range(req.count):
                await asyncio.sleep(req.waits)
                yield number
            if req.fails:
                raise ValueError("late")
            is_complete = True
        finally:
            ends.put_nowait("complete" if is_complete else "stopped")

    return ends


async def all_replies_received(mesh: AgentMesh) -> None:
    """Wait until the mesh waits for no more replies to sent requests."""
    while sending := node_of(mesh).requests._sending:
        await asyncio.wait(sending, timeout=10)


async def send_and_raise(mesh: AgentMesh, name: str, how: str) -> None:
    """Send, and raise what the callback receives."""
    async with asyncio.timeout(5):
        if how == "nothing":
            await mesh.send(name, {})
        elif how == "reply_to":
            await mesh.send(name, {}, reply_to=f"replies.{name}")
        else:
            callbacks = Callbacks()
            await callbacks.send(mesh, name, {})
            raise await callbacks.next()


@pytest.fixture(params=[False, True], ids=["no-subscriber", "subscriber-of-all-subjects"])
async def wildcard_subscriber(request: pytest.FixtureRequest, mesh: AgentMesh) -> None:
    """With and without a subscription to `mesh.>`, which keeps NATS from answering 503."""
    if request.param:
        await listen(mesh, "mesh.>")


@pytest.mark.parametrize("kind", ["responder", "streamer"])
async def test_a_request_without_a_callback_is_handled_and_not_answered(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, kind: str
) -> None:
    """The handler completes with the payload and the headers of the request; no reply is published."""
    seen: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    go = asyncio.Event()

    async def responder(req: Text) -> Text:
        await go.wait()
        seen.put_nowait((req.text, current_call().headers["X-Mine"]))
        return req

    async def stream(req: Text) -> AsyncIterator[Text]:
        yield req
        yield await responder(req)

    mesh.agent(AgentSpec(name=name))(responder if kind == "responder" else stream)
    await mesh.catalog()
    requests = await listen(mesh, subjects.agent(name))
    everything = await listen(mesh, ">")
    async with new_mesh() as sender:
        await sender.send(name, Text(text="x"), headers={"X-Mine": "yes"})
        assert seen.empty()  # `send` did not wait for the handler
        go.set()
        async with asyncio.timeout(10):
            assert ("x", "yes") == await seen.get()
        while any(route.in_flight for route in node_of(mesh).router):
            await asyncio.sleep(0)
        await flush(mesh)
    request = await requests.get()
    request_id = read_headers(request.head)["X-Mesh-Request-Id"]
    replies = {request.reply or "none", subjects.stream(request_id), subjects.results(request_id)}
    while not everything.empty():
        assert everything.get_nowait().subject not in replies


@pytest.mark.usefixtures("wildcard_subscriber")
@pytest.mark.parametrize("how", ["nothing", "on_reply", "reply_to"])
async def test_an_unknown_agent_is_reported_immediately(mesh: AgentMesh, name: str, how: str) -> None:
    """A request to an unregistered name fails long before the timeout, also without a callback."""
    with pytest.raises(NotFound) as caught:
        await send_and_raise(mesh, name, how)
    assert (name, 32) == (caught.value.agent, len(caught.value.request_id))


@pytest.mark.parametrize("how", ["nothing", "on_reply"])
async def test_an_agent_without_an_instance_is_not_available(mesh: AgentMesh, name: str, how: str) -> None:
    """A request to an agent that is in the catalog, but that no instance serves, raises NotAvailable."""
    serve(mesh, f"{name}.there")
    contract = await mesh.contract(f"{name}.there")
    contract.name = name
    await node_of(mesh).registry.publish([contract])
    with pytest.raises(NotAvailable) as caught:
        await send_and_raise(mesh, name, how)
    assert name == caught.value.agent


@pytest.mark.parametrize("shape", ["publisher", "watcher"])
@pytest.mark.parametrize("how", ["call", "stream", "nothing", "on_reply", "reply_to"])
async def test_publishers_and_watchers_take_no_requests(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, shape: str, how: str
) -> None:
    """Every verb raises the error that tools match on, in the agent's own node and in another one."""
    declare_background(mesh, name, shape, run_forever)
    await mesh.catalog()
    done = {"call": "called", "stream": "streamed"}.get(how, "sent to")
    what = f"is a background task and cannot be {done}"
    if shape == "publisher":
        what = f"is a publisher and cannot be {done}. Subscribe to its events instead"
    async with new_mesh() as other:
        for caller in (mesh, other, other):
            with pytest.raises(InvocationMismatch) as caught:
                if how == "call":
                    await caller.call(name, {}, timeout=10)
                elif how == "stream":
                    await anext(caller.stream(name, {}, timeout=10))
                else:
                    await send_and_raise(caller, name, how)
            assert f"Agent '{name}' {what}" == caught.value.message
    assert "running" == background_of(mesh, name).state


@pytest.mark.parametrize("coroutine", [False, True], ids=["function", "coroutine-function"])
async def test_the_callback_receives_the_reply(mesh: AgentMesh, name: str, coroutine: bool) -> None:
    """It is called once, with the reply on `mesh.results.{id}`, to which nothing is subscribed afterwards."""
    go, callbacks = asyncio.Event(), Callbacks()

    @mesh.agent(AgentSpec(name=name))
    async def echo(req: Text) -> Text:
        await go.wait()
        return req

    async def later(value: object) -> None:
        await asyncio.sleep(0)
        callbacks.queue.put_nowait(value)

    await mesh.catalog()
    requests, headers = await listen(mesh, subjects.agent(name)), {"X-Mesh-Request-Id": f"id-{name}"}
    on_reply = later if coroutine else callbacks.queue.put_nowait
    await mesh.send(
        name, Text(text="x"), on_reply=on_reply, on_error=callbacks.queue.put_nowait, headers=headers
    )
    assert f"mesh.results.id-{name}" == (await requests.get()).reply
    assert [] == callbacks.so_far()
    go.set()
    assert {"text": "x"} == await callbacks.next()
    await all_replies_received(mesh)
    assert [] == callbacks.so_far()
    assert not await is_subscribed(mesh, f"mesh.results.id-{name}")


async def test_the_callback_receives_all_chunks_in_order(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """It is called with each chunk of a streamer, last with its error, and not after the end."""
    streamer(mesh, name)
    await mesh.catalog()
    async with new_mesh() as sender:
        callbacks = Callbacks()
        await callbacks.send(sender, name, Count(count=200))
        assert list(range(200)) == [await callbacks.next() for _ in range(200)]
        await all_replies_received(sender)
        assert [] == callbacks.so_far()
        await callbacks.send(sender, name, Count(count=2, fails=True))
        assert [0, 1] == [await callbacks.next(), await callbacks.next()]
        error = await callbacks.next()
        assert (HandlerError, "late", name) == (type(error), error.message, error.agent)
        await all_replies_received(sender)
        assert [] == callbacks.so_far()


async def test_no_timeout_is_reported_after_a_success(mesh: AgentMesh, name: str) -> None:
    """When the timeout expires after the reply or the last chunk, no callback is called."""
    serve(mesh, name)
    streamer(mesh, f"{name}.s")
    await mesh.catalog()
    callbacks = Callbacks()
    await callbacks.send(mesh, name, {}, timeout=0.3)
    await callbacks.send(mesh, f"{name}.s", {"count": 1}, timeout=0.3)
    replies = [await callbacks.next(), await callbacks.next()]
    assert {0, "ok"} == {reply["text"] if isinstance(reply, dict) else reply for reply in replies}
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.6):
            raise AssertionError(await callbacks.queue.get())


async def test_on_error_receives_each_error_once(mesh: AgentMesh, name: str) -> None:
    """It is called for an error of the handler, invalid input, a timeout and a dead instance."""
    started, over = asyncio.Event(), asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def work(req: Text) -> Text:
        if req.text == "hang":
            started.set()
            await over.wait()
        raise MeshError("quota", "used up", details={"left": 0})

    callbacks = Callbacks()
    await callbacks.send(mesh, name, {})
    error = await callbacks.next()
    assert ("quota", "used up", {"left": 0}) == (error.code, error.message, error.details)
    await callbacks.send(mesh, name, {"text": []})
    assert isinstance(await callbacks.next(), InvalidInput)
    await callbacks.send(mesh, name, {"text": "hang"}, 0.2, {"X-Mesh-Request-Id": "mine"})
    error = await callbacks.next()
    assert (MeshTimeout, "No message on mesh.results.mine within 0.2s", name, "mine") == (
        type(error), error.message, error.agent, error.request_id
    )  # fmt: skip
    started.clear()
    await callbacks.send(mesh, name, {"text": "hang"})
    await started.wait()
    notice = DeathNotice(agent=name, reason="disconnect", detected_at="now", instance_id="i")
    await node_of(mesh).connection.publish(subjects.death(name), notice.model_dump_json().encode())
    error = await callbacks.next()
    assert (AgentDied, notice.model_dump()) == (type(error), error.details)
    over.set()
    await all_replies_received(mesh)
    assert [] == callbacks.so_far()


async def test_an_error_without_on_error_is_logged(
    mesh: AgentMesh, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without `on_error` the log names the agent and the error's code."""
    await mesh.send(name, {}, on_reply=pytest.fail)
    await all_replies_received(mesh)
    assert [True] == [name in record.message for record in caplog.records if "not_found" in record.message]


@pytest.mark.parametrize("raised", [ValueError("mine"), asyncio.CancelledError()], ids=repr)
@pytest.mark.parametrize("coroutine", [False, True], ids=["function", "coroutine-function"])
async def test_a_callback_that_raises_is_logged_and_called_for_the_next_chunk(
    mesh: AgentMesh, name: str, raised: BaseException, coroutine: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Each failure is logged with its traceback; the callbacks of other requests are called, too."""
    streamer(mesh, name)
    callbacks, seen = Callbacks(), list[object]()

    def failing(value: object) -> None:
        seen.append(value)
        raise raised

    async def failing_coroutine(value: object) -> None:
        failing(value)

    with caplog.at_level(logging.ERROR):
        await mesh.send(name, {}, on_reply=failing_coroutine if coroutine else failing, on_error=failing)
        await callbacks.send(mesh, name, {})
        assert [0, 1, 2] == [await callbacks.next() for _ in range(3)]
        await all_replies_received(mesh)
    assert [0, 1, 2] == seen
    assert 3 == len([record for record in caplog.records if name in record.message and record.exc_info])


async def test_the_reply_is_published_on_reply_to(mesh: AgentMesh, name: str) -> None:
    """The request has the subject `reply_to` in its header, and the reply is published there."""
    serve(mesh, name)
    await mesh.catalog()
    reply_to = f"replies.{name}"
    requests, replies = await listen(mesh, subjects.agent(name)), await listen(mesh, reply_to)
    await mesh.send(name, {}, reply_to=reply_to, headers={"X-Mine": "yes"})
    request = await requests.get()
    headers = read_headers(request.head)
    assert [reply_to, "yes", reply_to] == [headers["X-Mesh-Reply-To"], headers["X-Mine"], request.reply]
    headers, body = await next_frame(replies)
    assert ("ok", name, b'{"text":"ok"}') == (headers["X-Mesh-Status"], headers["X-Mesh-Source"], body)
    with pytest.raises(ValueError, match="mutually exclusive"):
        await mesh.send(name, {}, reply_to="x", on_reply=print)


async def test_a_streamer_is_stopped_after_the_timeout_of_the_sender(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """After the timeout the chunks have no subscription any more, and the streamer is cancelled."""
    ends = streamer(mesh, name)
    await mesh.catalog()
    async with new_mesh() as sender:
        callbacks = Callbacks()
        await callbacks.send(sender, name, Count(count=1_000_000, waits=0.15), timeout=0.05)
        assert isinstance(await callbacks.next(), MeshTimeout)
        async with asyncio.timeout(5):
            assert "stopped" == await ends.get()


@pytest.mark.parametrize("immediately", [True, False], ids=["immediately", "while-the-handler-runs"])
async def test_closing_the_mesh_fails_requests_without_a_reply(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, immediately: bool
) -> None:
    """`on_error` receives ConnectionFailed, and closing does not wait for the reply."""
    started, over, callbacks = asyncio.Event(), asyncio.Event(), Callbacks()

    @mesh.agent(AgentSpec(name=name))
    async def hang(req: Text) -> None:
        started.set()
        await over.wait()

    await mesh.catalog()
    async with asyncio.timeout(5):
        async with new_mesh() as sender:
            await callbacks.send(sender, name, {}, timeout=None)
            if not immediately:
                await started.wait()
    over.set()
    assert [ConnectionFailed] == [type(error) for error in callbacks.so_far()]


async def test_a_callback_that_hangs_does_not_block_closing(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """A callback that suppresses its cancellation is not waited for."""
    serve(mesh, name)
    await mesh.catalog()
    begun, release = asyncio.Event(), asyncio.Event()

    async def hanging(_: object) -> None:
        begun.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    sender = new_mesh()
    await sender.__aenter__()
    await sender.send(name, {}, on_reply=hanging)
    await begun.wait()
    closing = asyncio.create_task(sender.__aexit__(None, None, None))
    await asyncio.wait([closing], timeout=5)
    is_closed = closing.done()
    release.set()
    await closing
    assert is_closed
