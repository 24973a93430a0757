"""`send`: requests whose sender does not wait for the result."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    ConnectionFailed,
    InvocationMismatch,
    MeshTimeout,
    NotAvailable,
    NotFound,
    current_call,
)
from openagentmesh.protocol import subjects
from openagentmesh.protocol.headers import read_headers

from tests.support.meshes import (
    Text,
    background_of,
    declare_background,
    flush,
    listen,
    next_frame,
    node_of,
    run_forever,
    serve,
)
from tests.support.sending import Callbacks, Count, streamer


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
