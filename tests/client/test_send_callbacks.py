"""Callbacks of `send`: replies, chunks and errors, each once and in order."""

import asyncio
import logging
from collections.abc import Callable

import pytest
from openagentmesh import AgentDied, AgentMesh, AgentSpec, HandlerError, InvalidInput, MeshError, MeshTimeout
from openagentmesh.protocol import subjects
from openagentmesh.protocol.messages import DeathNotice

from tests.support.meshes import Text, is_subscribed, listen, node_of, serve
from tests.support.sending import Callbacks, Count, streamer


async def all_replies_received(mesh: AgentMesh) -> None:
    """Wait until the mesh waits for no more replies to sent requests."""
    while sending := node_of(mesh).requests._sending:
        await asyncio.wait(sending, timeout=10)


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
