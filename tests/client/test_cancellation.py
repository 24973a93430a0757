"""Cancelled and expired requests stop their handlers; requests to dead instances fail."""

import asyncio
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path

import pytest
from openagentmesh import AgentDied, AgentMesh, AgentSpec, MeshTimeout, current_call
from openagentmesh.agent.agent import Limits
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.headers import read_headers, write_headers
from openagentmesh.protocol.messages import DeathNotice
from openagentmesh.transport.nats_client import Message

from tests.support.meshes import Text, listen, node_of, pending_instance, route_of
from tests.support.waiting import until


class Hanging:
    """A responder `{name}.call` and a streamer `{name}.stream` that hang; events show their state."""

    def __init__(self, mesh: AgentMesh, name: str) -> None:
        self.started, self.stopped = asyncio.Event(), asyncio.Event()

        @mesh.agent(AgentSpec(name=f"{name}.call"))
        async def call(req: Text) -> Text:
            await self.hang()
            return req

        @mesh.agent(AgentSpec(name=f"{name}.stream"))
        async def stream(req: Text) -> AsyncIterator[Text]:
            await self.hang()
            yield req

    async def hang(self) -> None:
        self.started.set()
        try:
            await asyncio.sleep(60)
        finally:
            self.stopped.set()

    async def wait_stopped(self, seconds: float = 2) -> None:
        async with asyncio.timeout(seconds):
            await self.stopped.wait()


async def request(
    mesh: AgentMesh,
    verb: str,
    name: str,
    timeout: float | None = 60,
    headers: Mapping[str, str] | None = None,
) -> object:
    """Call, or stream, one of the agents that hang."""
    if verb == "call":
        return await mesh.call(f"{name}.call", {}, timeout=timeout, headers=headers)
    return [chunk async for chunk in mesh.stream(f"{name}.stream", {}, timeout=timeout, headers=headers)]


def start(path: Path, program: str) -> "subprocess.Popen[str]":
    path.write_text(textwrap.dedent(program))
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)


async def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return (await asyncio.to_thread(process.stdout.readline)).strip()


@pytest.mark.parametrize("accepted", [False, True], ids=["immediately", "after-acknowledgement"])
@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_cancelling_a_request_stops_the_handler(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, verb: str, accepted: bool
) -> None:
    """The handler is cancelled, also when the host has not acknowledged the request yet."""
    hanging = Hanging(mesh, name)
    await mesh.catalog()
    async with new_mesh() as caller:
        pending = asyncio.create_task(request(caller, verb, name))
        await hanging.started.wait()
        if accepted:
            await pending_instance(caller)
        assert pending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pending
        await hanging.wait_stopped()


@pytest.mark.parametrize("verb", ["call", "stream"])
@pytest.mark.parametrize("how", ["timeout", "asyncio.timeout", "close"])
async def test_an_expired_request_and_a_closed_mesh_stop_the_handler(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, verb: str, how: str
) -> None:
    """A timeout of the request, one around it, and closing the caller's mesh cancel the handler."""
    hanging = Hanging(mesh, name)
    await mesh.catalog()
    async with new_mesh() as caller:
        if how == "timeout":
            with pytest.raises(MeshTimeout):
                await request(caller, verb, name, timeout=0.2)
        elif how == "asyncio.timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await request(caller, verb, name)
        else:
            pending = asyncio.create_task(request(caller, verb, name))
            await hanging.started.wait()
    await hanging.wait_stopped(10 if how == "close" else 2)  # after a close, the host gets a 503 from NATS
    if how == "close":
        await asyncio.wait([pending])
        assert pending.exception() is not None


@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_a_cancel_after_a_timeout_is_reported_as_a_timeout(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, verb: str
) -> None:
    """The host publishes the error `timeout` though the request's own deadline has not expired."""
    hanging = Hanging(mesh, name)
    copies = await listen(mesh, subjects.errors(f"{name}.{verb}"))
    await mesh.catalog()
    async with new_mesh() as caller:
        with pytest.raises(MeshTimeout):
            await request(caller, verb, name, timeout=0.2, headers={subjects.TIMEOUT_MS: "60000"})
        await hanging.wait_stopped()
        async with asyncio.timeout(2):
            copy = await copies.get()
    assert MeshTimeout.code == codec.decode_error(copy.body).code


@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_a_killed_caller_stops_the_handler(
    mesh: AgentMesh, url: str, name: str, verb: str, tmp_path: Path
) -> None:
    """A caller that cannot send a cancel is detected within seconds."""
    hanging = Hanging(mesh, name)
    await mesh.catalog()
    process = start(
        tmp_path / "caller.py",
        f"""
        import asyncio
        from openagentmesh import AgentMesh
        async def main():
            async with AgentMesh({url!r}) as mesh:
                if {verb!r} == "call":
                    await mesh.call("{name}.call", {{}}, timeout=None)
                async for _ in mesh.stream("{name}.stream", {{}}, timeout=None):
                    pass
        asyncio.run(main())
        """,
    )
    async with asyncio.timeout(20):
        await hanging.started.wait()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    await hanging.wait_stopped(10)


async def test_a_cancel_is_propagated_to_nested_requests(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """A handler that is cancelled while it waits for another agent's answer cancels that request, too."""
    hanging, first_stopped = Hanging(mesh, name), asyncio.Event()

    @mesh.agent(AgentSpec(name=f"{name}.first"))
    async def first(req: Text) -> None:
        try:
            await mesh.call(f"{name}.call", req)
        finally:
            first_stopped.set()

    await mesh.catalog()
    async with new_mesh() as caller:
        call = asyncio.create_task(caller.call(f"{name}.first", {}))
        await hanging.started.wait()
        call.cancel()
        await hanging.wait_stopped()
        async with asyncio.timeout(2):
            await first_stopped.wait()


async def test_a_request_that_is_cancelled_in_the_queue_does_not_run(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """A queued request that is cancelled is removed from the queue, and its handler is not called."""
    node_of(mesh).prepare = lambda agent: agent.with_limits(Limits(concurrency=1))
    started, go, ran = asyncio.Event(), asyncio.Event(), list[str]()

    @mesh.agent(AgentSpec(name=name))
    async def one_by_one(req: Text) -> Text:
        ran.append(req.text)
        started.set()
        await go.wait()
        return req

    await mesh.catalog()
    route = route_of(mesh, name)
    async with new_mesh() as caller:
        first = asyncio.create_task(caller.call(name, {"text": "first"}))
        await started.wait()
        second = asyncio.create_task(caller.call(name, {"text": "second"}))
        await until(lambda: route.in_flight == 2)
        second.cancel()
        await until(lambda: route.in_flight == 1)
        go.set()
        assert {"text": "first"} == await first
        assert {"text": "third"} == await caller.call(name, {"text": "third"})
    assert ["first", "third"] == ran


async def test_acknowledgements_are_sent_only_to_callers_that_accept_them(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request with `X-Mesh-Accept: ack` is acknowledged repeatedly; without it there is only the reply."""
    monkeypatch.setattr("openagentmesh.serving.keepalive._INTERVAL_S", 0.05)
    go = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def slow(req: Text) -> Text:
        await go.wait()
        return req

    await mesh.catalog()
    node = node_of(mesh)
    stock, ours = asyncio.Queue[Message](), asyncio.Queue[Message]()
    for answers, extra in ((stock, {}), (ours, {"X-Mesh-Accept": "ack"})):
        head = write_headers({"X-Mesh-Request-Id": f"{name}-{len(extra)}"} | extra)
        await node.connection.publish(
            subjects.agent(name), b"{}", head, node.inbox.register(answers.put_nowait)
        )
    expected = {"X-Mesh-Request-Id": f"{name}-1", "X-Mesh-Instance-Id": mesh.instance_id}
    async with asyncio.timeout(10):
        for _ in range(3):
            accepted = await ours.get()
            assert expected | {"X-Mesh-Status": "accepted"} == read_headers(accepted.head)
            assert (b"", True) == (accepted.body, bool(accepted.reply))
        go.set()
        while (answer := await ours.get()).body == b"":
            pass
        assert expected | {"X-Mesh-Status": "ok", "X-Mesh-Source": name} == read_headers(answer.head)
        only = await stock.get()
    assert ("ok", f"{name}-0") == tuple(
        read_headers(only.head)[key] for key in ("X-Mesh-Status", "X-Mesh-Request-Id")
    )
    assert (b'{"text":""}', "") == (only.body, only.reply)
    await node.connection.flush()
    assert (0, 0) == (stock.qsize(), ours.qsize())


@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_a_request_to_a_killed_replica_fails_while_the_other_one_serves(
    mesh: AgentMesh, url: str, name: str, verb: str, tmp_path: Path
) -> None:
    """A request that a killed instance handled raises AgentDied; the next one is answered."""
    process = start(
        tmp_path / "replica.py",
        f"""
        import asyncio
        from openagentmesh import AgentMesh, AgentSpec
        mesh = AgentMesh({url!r})
        async def hang():
            print("working", flush=True)
            await asyncio.sleep(60)
        @mesh.agent(AgentSpec(name="{name}.call"))
        async def call(req: dict) -> str:
            await hang()
        @mesh.agent(AgentSpec(name="{name}.stream"))
        async def stream(req: dict) -> str:
            await hang()
            yield ""
        async def main():
            async with mesh:
                print(mesh.instance_id, flush=True)
                await asyncio.sleep(60)
        asyncio.run(main())
        """,
    )

    @mesh.agent(AgentSpec(name=f"{name}.call"))
    async def call(req: dict[str, int]) -> str:
        return "alive"

    @mesh.agent(AgentSpec(name=f"{name}.stream"))
    async def stream(req: dict[str, int]) -> AsyncIterator[str]:
        yield "alive"

    alive = {"call": "alive", "stream": ["alive"]}[verb]
    instance = await line(process)
    await mesh.catalog()
    async with AgentMesh(url) as caller:
        working = asyncio.create_task(line(process))
        for _ in range(200):  # until NATS chooses the other replica
            pending = asyncio.create_task(request(caller, verb, name))
            await asyncio.wait([pending, working], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                break
            assert alive == await pending
        assert ("working", instance) == (await working, await pending_instance(caller))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        async with asyncio.timeout(10):
            with pytest.raises(AgentDied) as caught:
                await pending
        notice = DeathNotice.model_validate(caught.value.details)
        assert (f"{name}.{verb}", "disconnect", instance) == (
            notice.agent, notice.reason, notice.instance_id
        )  # fmt: skip
        assert alive == await request(caller, verb, name)


async def test_a_nested_request_inherits_the_deadline(mesh: AgentMesh, name: str) -> None:
    """Requests of a handler have at most its remaining time; a task that outlives the handler does not."""
    go, outliving = asyncio.Event(), list[asyncio.Task[list[float]]]()

    @mesh.agent(AgentSpec(name=f"{name}.b"))
    async def b(req: Text) -> list[float]:
        return [current_call().remaining, float(current_call().headers["X-Mesh-Timeout-Ms"])]

    @mesh.agent(AgentSpec(name=f"{name}.s"))
    async def s(req: Text) -> AsyncIterator[list[float]]:
        yield [current_call().remaining, float(current_call().headers["X-Mesh-Timeout-Ms"])]

    async def later() -> list[float]:
        await go.wait()
        found: list[float] = await mesh.call(f"{name}.b", {}, timeout=30)
        return found

    @mesh.agent(AgentSpec(name=f"{name}.a"))
    async def a(req: Text) -> list[object]:
        outliving.append(asyncio.create_task(later()))
        found = [await mesh.call(f"{name}.b", {}, timeout=timeout) for timeout in (30, None)]
        return found + [chunk async for chunk in mesh.stream(f"{name}.s", {}, timeout=30)]

    found = await mesh.call(f"{name}.a", {}, timeout=2)
    assert 3 == len(found)
    assert all(0 < seconds <= 2 and announced <= 2000 for seconds, announced in found)
    assert (await mesh.call(f"{name}.b", {}, timeout=1))[0] <= 1
    go.set()
    [remaining, milliseconds] = await outliving[0]
    assert remaining > 2
    assert milliseconds > 2000


@pytest.mark.parametrize(
    ("produce_s", "read_s"),
    [(0.01, 0), (0, 0), (0, 0.01), (60, 0)],
    ids=["steady", "fast", "slow-reader", "hanging"],
)
async def test_a_stream_is_stopped_after_its_total_time(
    mesh: AgentMesh, name: str, produce_s: float, read_s: float
) -> None:
    """After `total` seconds a stream raises MeshTimeout and stops its handler, also while chunks arrive."""
    stopped = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def endless(req: Text) -> AsyncIterator[int]:
        try:
            while True:
                if produce_s:
                    await asyncio.sleep(produce_s)
                yield 0
        finally:
            stopped.set()

    async with asyncio.timeout(5), aclosing(mesh.stream(name, {}, timeout=30, total=0.3)) as chunks:
        with pytest.raises(MeshTimeout):
            async for _ in chunks:
                await asyncio.sleep(read_s)
    async with asyncio.timeout(2):
        await stopped.wait()


async def test_a_stream_that_ends_within_its_total_time_is_complete(mesh: AgentMesh, name: str) -> None:
    """With `total` and without `timeout`, all chunks are read."""

    @mesh.agent(AgentSpec(name=name))
    async def two(req: Text) -> AsyncIterator[int]:
        yield 1
        yield 2

    assert [1, 2] == [chunk async for chunk in mesh.stream(name, {}, timeout=None, total=30)]
