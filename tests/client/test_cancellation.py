"""Nobody works for a caller that is gone, and nobody waits for a host that is."""

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

from tests.support.meshes import Text, listen, node_of, pending_instance, serve
from tests.support.waiting import until


class Hanging:
    """An agent `{name}.call` and a streamer `{name}.stream` that hang, and tell what becomes of them."""

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

    async def stops(self, seconds: float = 2) -> None:
        async with asyncio.timeout(seconds):
            await self.stopped.wait()


async def ask(
    mesh: AgentMesh,
    verb: str,
    name: str,
    timeout: float | None = 60,
    headers: Mapping[str, str] | None = None,
) -> object:
    """Call or stream one of the agents that hang."""
    if verb == "call":
        return await mesh.call(f"{name}.call", {}, timeout=timeout, headers=headers)
    return [chunk async for chunk in mesh.stream(f"{name}.stream", {}, timeout=timeout, headers=headers)]


def start(path: Path, program: str) -> "subprocess.Popen[str]":
    path.write_text(textwrap.dedent(program))
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)


async def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return (await asyncio.to_thread(process.stdout.readline)).strip()


@pytest.mark.parametrize("accepted", [False, True], ids=["at-once", "after-it-was-accepted"])
@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_a_cancelled_caller_stops_the_handler(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, verb: str, accepted: bool
) -> None:
    """Whoever stops waiting ends the work, also before the host said that it has it in hand."""
    hanging = Hanging(mesh, name)
    await mesh.catalog()
    async with new_mesh() as caller:
        asking = asyncio.create_task(ask(caller, verb, name))
        await hanging.started.wait()
        if accepted:
            await pending_instance(caller)
        assert asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await hanging.stops()


@pytest.mark.parametrize("verb", ["call", "stream"])
@pytest.mark.parametrize("how", ["timeout", "asyncio.timeout", "left"])
async def test_a_caller_that_gives_up_stops_the_handler(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, verb: str, how: str
) -> None:
    """A timeout of the verb, one around it, and leaving the mesh end the work as well."""
    hanging = Hanging(mesh, name)
    await mesh.catalog()
    async with new_mesh() as caller:
        if how == "timeout":
            with pytest.raises(MeshTimeout):
                await ask(caller, verb, name, timeout=0.2)
        elif how == "asyncio.timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await ask(caller, verb, name)
        else:
            asking = asyncio.create_task(ask(caller, verb, name))
            await hanging.started.wait()
    await hanging.stops(10 if how == "left" else 2)  # when it is left, NATS tells
    if how == "left":
        await asyncio.wait([asking])
        assert asking.exception() is not None


@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_who_waited_in_vain_says_so(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, verb: str
) -> None:
    """A request whose caller's time is up is reported as that, though the host saw time left."""
    hanging = Hanging(mesh, name)
    copies = await listen(mesh, subjects.errors(f"{name}.{verb}"))
    await mesh.catalog()
    async with new_mesh() as caller:
        with pytest.raises(MeshTimeout):
            await ask(caller, verb, name, timeout=0.2, headers={subjects.TIMEOUT_MS: "60000"})
        await hanging.stops()
        async with asyncio.timeout(2):
            copy = await copies.get()
    assert MeshTimeout.code == codec.decode_error(copy.body).code


@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_a_killed_caller_stops_the_handler(
    mesh: AgentMesh, url: str, name: str, verb: str, tmp_path: Path
) -> None:
    """A caller that can say nothing any more is noticed within seconds."""
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
    await hanging.stops(10)


async def test_the_cancel_travels_on(mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str) -> None:
    """A handler that is stopped while it waits for another agent's answer stops that one too."""
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
        await hanging.stops()
        async with asyncio.timeout(2):
            await first_stopped.wait()


async def test_a_request_that_waits_for_its_turn_is_never_begun(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """What is cancelled while it queues gives up its place, and its handler does not run."""
    node_of(mesh).prepare = lambda agent: agent.with_limits(Limits(concurrency=1))
    started, go, ran = asyncio.Event(), asyncio.Event(), list[str]()

    @mesh.agent(AgentSpec(name=name))
    async def one_by_one(req: Text) -> Text:
        ran.append(req.text)
        started.set()
        await go.wait()
        return req

    await mesh.catalog()
    route = node_of(mesh).router.get(name)
    assert route is not None

    async def runs(requests: int) -> None:
        async def as_many() -> bool:
            return route.in_flight == requests

        await until(as_many)

    async with new_mesh() as caller:
        first = asyncio.create_task(caller.call(name, {"text": "first"}))
        await started.wait()
        second = asyncio.create_task(caller.call(name, {"text": "second"}))
        await runs(2)
        second.cancel()
        await runs(1)
        go.set()
        assert {"text": "first"} == await first
        assert {"text": "third"} == await caller.call(name, {"text": "third"})
    assert ["first", "third"] == ran


async def test_only_those_who_understand_it_hear_accepted(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for it hears at once and again who has the request; a stock caller hears the reply only."""
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
    word = {"X-Mesh-Request-Id": f"{name}-1", "X-Mesh-Instance-Id": mesh.instance_id}
    async with asyncio.timeout(10):
        for _ in range(3):
            accepted = await ours.get()
            assert word | {"X-Mesh-Status": "accepted"} == read_headers(accepted.head)
            assert (b"", True) == (accepted.body, bool(accepted.reply))
        go.set()
        while (answer := await ours.get()).body == b"":
            pass
        assert word | {"X-Mesh-Status": "ok", "X-Mesh-Source": name} == read_headers(answer.head)
        only = await stock.get()
    assert ("ok", f"{name}-0") == tuple(
        read_headers(only.head)[key] for key in ("X-Mesh-Status", "X-Mesh-Request-Id")
    )
    assert (b'{"text":""}', "") == (only.body, only.reply)
    await node.connection.flush()
    assert (0, 0) == (stock.qsize(), ours.qsize())


@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_the_death_of_one_of_two_replicas(
    mesh: AgentMesh, url: str, name: str, verb: str, tmp_path: Path
) -> None:
    """Who waits for a killed instance is told within seconds, though the agent itself lives on."""
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
        for _ in range(200):  # until NATS happens to choose the other replica
            asking = asyncio.create_task(ask(caller, verb, name))
            await asyncio.wait([asking, working], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                break
            assert alive == await asking
        assert ("working", instance) == (await working, await pending_instance(caller))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        async with asyncio.timeout(10):
            with pytest.raises(AgentDied) as caught:
                await asking
        notice = DeathNotice.model_validate(caught.value.details)
        assert (f"{name}.{verb}", "disconnect", instance) == (
            notice.agent, notice.reason, notice.instance_id
        )  # fmt: skip
        assert alive == await ask(caller, verb, name)


async def test_a_nested_request_has_what_is_left(mesh: AgentMesh, name: str) -> None:
    """What a handler asks of others is bound by its own deadline; a task it leaves behind is not."""
    go, left_behind = asyncio.Event(), list[asyncio.Task[list[float]]]()

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
        left_behind.append(asyncio.create_task(later()))
        found = [await mesh.call(f"{name}.b", {}, timeout=timeout) for timeout in (30, None)]
        return found + [chunk async for chunk in mesh.stream(f"{name}.s", {}, timeout=30)]

    found = await mesh.call(f"{name}.a", {}, timeout=2)
    assert 3 == len(found)
    assert all(0 < remaining <= 2 and milliseconds <= 2000 for remaining, milliseconds in found)
    assert (await mesh.call(f"{name}.b", {}, timeout=1))[0] <= 1
    go.set()
    [free, announced] = await left_behind[0]
    assert free > 2
    assert announced > 2000


@pytest.mark.parametrize(
    ("produces", "reads"),
    [(0.01, 0), (0, 0), (0, 0.01), (60, 0)],
    ids=["steady", "fast", "slow-reader", "hanging"],
)
async def test_a_stream_has_so_long_in_total(
    mesh: AgentMesh, name: str, produces: float, reads: float
) -> None:
    """After `total` seconds a stream ends with MeshTimeout, however well its chunks come, and is stopped."""
    stopped = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def endless(req: Text) -> AsyncIterator[int]:
        try:
            while True:
                if produces:
                    await asyncio.sleep(produces)
                yield 0
        finally:
            stopped.set()

    async with asyncio.timeout(5), aclosing(mesh.stream(name, {}, timeout=30, total=0.3)) as chunks:
        with pytest.raises(MeshTimeout):
            async for _ in chunks:
                await asyncio.sleep(reads)
    async with asyncio.timeout(2):
        await stopped.wait()


async def test_a_stream_that_ends_in_time_minds_no_total(mesh: AgentMesh, name: str) -> None:
    """`total` shortens nothing that is done before; without a `timeout` it is the only bound."""

    @mesh.agent(AgentSpec(name=name))
    async def two(req: Text) -> AsyncIterator[int]:
        yield 1
        yield 2

    serve(mesh, f"{name}.other")
    assert [1, 2] == [chunk async for chunk in mesh.stream(name, {}, timeout=None, total=30)]
