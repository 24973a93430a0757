"""Sending: what comes of a request whose sender goes on."""

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


class Told:
    """What the callbacks of one `send` were told, in order."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()

    async def of(
        self,
        mesh: AgentMesh,
        name: str,
        payload: object,
        timeout: float | None = 60,
        headers: dict[str, str] | None = None,
    ) -> None:
        tell = self.queue.put_nowait
        await mesh.send(name, payload, on_reply=tell, on_error=tell, timeout=timeout, headers=headers)

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
    """A streamer that counts, and tells when it is through."""
    ends: asyncio.Queue[str] = asyncio.Queue()

    @mesh.agent(AgentSpec(name=name))
    async def stream(req: Count) -> AsyncIterator[int]:
        through = False
        try:
            for number in range(req.count):
                await asyncio.sleep(req.waits)
                yield number
            if req.fails:
                raise ValueError("late")
            through = True
        finally:
            ends.put_nowait("end" if through else "stopped")

    return ends


async def nothing_under_way(mesh: AgentMesh) -> None:
    """Wait until the mesh awaits no more replies to what it sent."""
    while sending := node_of(mesh).requests._sending:
        await asyncio.wait(sending, timeout=10)


async def send_and_hear(mesh: AgentMesh, name: str, how: str) -> None:
    """Send, and raise what the callback for errors is told."""
    async with asyncio.timeout(5):
        if how == "nothing":
            await mesh.send(name, {})
        elif how == "reply_to":
            await mesh.send(name, {}, reply_to=f"somewhere.{name}")
        else:
            told = Told()
            await told.of(mesh, name, {})
            raise await told.next()


@pytest.fixture(params=[False, True], ids=["quiet", "somebody-listens-to-everything"])
async def crowd(request: pytest.FixtureRequest, mesh: AgentMesh) -> None:
    """With and without a subscriber on `mesh.>`, which keeps NATS from saying that nobody is there."""
    if request.param:
        await listen(mesh, "mesh.>")


@pytest.mark.parametrize("kind", ["responder", "streamer"])
async def test_what_nobody_waits_for_is_done(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, kind: str
) -> None:
    """The handler runs to its end with the payload and the headers; nothing is replied to anybody."""
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
        assert seen.empty()  # it did not wait for the work
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


@pytest.mark.usefixtures("crowd")
@pytest.mark.parametrize("how", ["nothing", "on_reply", "reply_to"])
async def test_an_unknown_agent_is_not_found_at_once(mesh: AgentMesh, name: str, how: str) -> None:
    """A name that nobody has fails long before the timeout, for who waits for nothing as well."""
    with pytest.raises(NotFound) as caught:
        await send_and_hear(mesh, name, how)
    assert (name, 32) == (caught.value.agent, len(caught.value.request_id))


@pytest.mark.parametrize("how", ["nothing", "on_reply"])
async def test_an_agent_that_is_away_is_not_available(mesh: AgentMesh, name: str, how: str) -> None:
    """In the catalog but with nobody there: another error, as soon."""
    serve(mesh, f"{name}.there")
    contract = await mesh.contract(f"{name}.there")
    contract.name = name
    await node_of(mesh).registry.publish([contract])
    with pytest.raises(NotAvailable) as caught:
        await send_and_hear(mesh, name, how)
    assert name == caught.value.agent


@pytest.mark.parametrize("shape", ["publisher", "watcher"])
@pytest.mark.parametrize("how", ["call", "stream", "nothing", "on_reply", "reply_to"])
async def test_publishers_and_watchers_take_no_requests(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, shape: str, how: str
) -> None:
    """Every verb that asks is refused with the text that tools match on, here and from afar."""
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
                    await send_and_hear(caller, name, how)
            assert f"Agent '{name}' {what}" == caught.value.message
    assert "running" == background_of(mesh, name).state


@pytest.mark.parametrize("coroutine", [False, True], ids=["function", "coroutine-function"])
async def test_a_reply_comes_to_its_callback(mesh: AgentMesh, name: str, coroutine: bool) -> None:
    """It comes on `mesh.results.{id}`, once, while the sender goes on; nobody listens there afterwards."""
    go, told = asyncio.Event(), Told()

    @mesh.agent(AgentSpec(name=name))
    async def echo(req: Text) -> Text:
        await go.wait()
        return req

    async def later(value: object) -> None:
        await asyncio.sleep(0)
        told.queue.put_nowait(value)

    await mesh.catalog()
    requests, headers = await listen(mesh, subjects.agent(name)), {"X-Mesh-Request-Id": f"id-{name}"}
    on_reply = later if coroutine else told.queue.put_nowait
    await mesh.send(name, Text(text="x"), on_reply=on_reply, on_error=told.queue.put_nowait, headers=headers)
    assert f"mesh.results.id-{name}" == (await requests.get()).reply
    assert [] == told.so_far()
    go.set()
    assert {"text": "x"} == await told.next()
    await nothing_under_way(mesh)
    assert [] == told.so_far()
    assert not await is_subscribed(mesh, f"mesh.results.id-{name}")


async def test_chunks_come_to_the_callback_until_the_end(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """Each chunk of a streamer is told in order; nothing follows its end, and its error comes last."""
    streamer(mesh, name)
    await mesh.catalog()
    async with new_mesh() as sender:
        told = Told()
        await told.of(sender, name, Count(count=200))
        assert list(range(200)) == [await told.next() for _ in range(200)]
        await nothing_under_way(sender)
        assert [] == told.so_far()
        await told.of(sender, name, Count(count=2, fails=True))
        assert [0, 1] == [await told.next(), await told.next()]
        error = await told.next()
        assert (HandlerError, "late", name) == (type(error), error.message, error.agent)
        await nothing_under_way(sender)
        assert [] == told.so_far()


async def test_after_success_no_timeout_is_told(mesh: AgentMesh, name: str) -> None:
    """A timeout that would have come after the reply, or after the last chunk, is nobody's."""
    serve(mesh, name)
    streamer(mesh, f"{name}.s")
    await mesh.catalog()
    told = Told()
    await told.of(mesh, name, {}, timeout=0.3)
    await told.of(mesh, f"{name}.s", {"count": 1}, timeout=0.3)
    assert {0, "ok"} == {r["text"] if isinstance(r, dict) else r for r in [await told.next() for _ in "ab"]}
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.6):
            raise AssertionError(await told.queue.get())


async def test_each_error_is_told(mesh: AgentMesh, name: str) -> None:
    """What the handler raises, bad input, silence and death come to `on_error`, each once."""
    started, over = asyncio.Event(), asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def work(req: Text) -> Text:
        if req.text == "hang":
            started.set()
            await over.wait()
        raise MeshError("quota", "used up", details={"left": 0})

    told = Told()
    await told.of(mesh, name, {})
    error = await told.next()
    assert ("quota", "used up", {"left": 0}) == (error.code, error.message, error.details)
    await told.of(mesh, name, {"text": []})
    assert isinstance(await told.next(), InvalidInput)
    await told.of(mesh, name, {"text": "hang"}, 0.2, {"X-Mesh-Request-Id": "mine"})
    error = await told.next()
    assert (MeshTimeout, "No message on mesh.results.mine within 0.2s", name, "mine") == (
        type(error), error.message, error.agent, error.request_id
    )  # fmt: skip
    started.clear()
    await told.of(mesh, name, {"text": "hang"})
    await started.wait()
    notice = DeathNotice(agent=name, reason="disconnect", detected_at="now", instance_id="i")
    await node_of(mesh).connection.publish(subjects.death(name), notice.model_dump_json().encode())
    error = await told.next()
    assert (AgentDied, notice.model_dump()) == (type(error), error.details)
    over.set()
    await nothing_under_way(mesh)
    assert [] == told.so_far()


async def test_an_error_that_nobody_wants_is_logged(
    mesh: AgentMesh, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without `on_error` the log tells what became of it."""
    await mesh.send(name, {}, on_reply=pytest.fail)
    await nothing_under_way(mesh)
    assert [True] == [name in record.message for record in caplog.records if "not_found" in record.message]


@pytest.mark.parametrize("raised", [ValueError("mine"), asyncio.CancelledError()], ids=repr)
@pytest.mark.parametrize("coroutine", [False, True], ids=["function", "coroutine-function"])
async def test_a_callback_that_raises(
    mesh: AgentMesh, name: str, raised: BaseException, coroutine: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the next chunks still come; so do the replies to others."""
    streamer(mesh, name)
    told, seen = Told(), list[object]()

    def bad(value: object) -> None:
        seen.append(value)
        raise raised

    async def bad_too(value: object) -> None:
        bad(value)

    with caplog.at_level(logging.ERROR):
        await mesh.send(name, {}, on_reply=bad_too if coroutine else bad, on_error=bad)
        await told.of(mesh, name, {})
        assert [0, 1, 2] == [await told.next() for _ in range(3)]
        await nothing_under_way(mesh)
    assert [0, 1, 2] == seen
    assert 3 == len([record for record in caplog.records if name in record.message and record.exc_info])


async def test_a_reply_goes_where_it_is_wanted(mesh: AgentMesh, name: str) -> None:
    """With `reply_to` the request names that subject in its header, and the reply is there."""
    serve(mesh, name)
    await mesh.catalog()
    requests, replies = await listen(mesh, subjects.agent(name)), await listen(mesh, f"somewhere.{name}")
    await mesh.send(name, {}, reply_to=f"somewhere.{name}", headers={"X-Mine": "yes"})
    request = await requests.get()
    headers = read_headers(request.head)
    assert [f"somewhere.{name}", "yes"] == [headers["X-Mesh-Reply-To"], headers["X-Mine"]]
    assert f"somewhere.{name}" == request.reply
    headers, body = await next_frame(replies)
    assert ("ok", name, b'{"text":"ok"}') == (headers["X-Mesh-Status"], headers["X-Mesh-Source"], body)
    with pytest.raises(ValueError, match="mutually exclusive"):
        await mesh.send(name, {}, reply_to="x", on_reply=print)


async def test_a_sender_that_waits_no_more_stops_a_streamer(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """After its timeout nobody listens to the chunks, and the streamer does not run on for ever."""
    ends = streamer(mesh, name)
    await mesh.catalog()
    async with new_mesh() as sender:
        told = Told()
        await told.of(sender, name, Count(count=1_000_000, waits=0.15), timeout=0.05)
        assert isinstance(await told.next(), MeshTimeout)
        async with asyncio.timeout(5):
            assert "stopped" == await ends.get()


@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "while-it-works"])
async def test_leaving_the_mesh_tells_who_awaits_replies(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, at_once: bool
) -> None:
    """Replies that cannot come any more are ConnectionFailed, and leaving does not wait for them."""
    started, over, told = asyncio.Event(), asyncio.Event(), Told()

    @mesh.agent(AgentSpec(name=name))
    async def hang(req: Text) -> None:
        started.set()
        await over.wait()

    await mesh.catalog()
    async with asyncio.timeout(5):
        async with new_mesh() as sender:
            await told.of(sender, name, {}, timeout=None)
            if not at_once:
                await started.wait()
    over.set()
    assert [ConnectionFailed] == [type(error) for error in told.so_far()]


async def test_a_callback_that_hangs_holds_up_no_leaving(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """A callback that swallows its cancellation is left, as a handler would be."""
    serve(mesh, name)
    await mesh.catalog()
    begun, release = asyncio.Event(), asyncio.Event()

    async def deaf(_: object) -> None:
        begun.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    sender = new_mesh()
    await sender.__aenter__()
    await sender.send(name, {}, on_reply=deaf)
    await begun.wait()
    leaving = asyncio.create_task(sender.__aexit__(None, None, None))
    await asyncio.wait([leaving], timeout=5)
    left = leaving.done()
    release.set()
    await leaving
    assert left
