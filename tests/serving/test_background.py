"""Publishers and watchers: each runs once at a time, restarts after failures, and ends when it is stopped."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
from openagentmesh import AgentMesh, AgentSpec, MeshError
from openagentmesh.protocol import subjects

from tests.support.meshes import (
    Text,
    background_of,
    declare_background,
    listen,
    next_frame,
    reconnects,
    restart_soon,
    run_forever,
    serve,
)
from tests.support.waiting import until

KINDS = pytest.mark.parametrize("kind", ["publisher", "watcher"])


def event(mesh: AgentMesh, seq: int, *, end: bool = False) -> dict[str, str]:
    """The headers of a publisher's event, or of its end frame."""
    return {
        "X-Mesh-Instance-Id": mesh.instance_id,
        "X-Mesh-Stream-Seq": str(seq),
        "X-Mesh-Stream-End": "true" if end else "false",
    }


def task_of(mesh: AgentMesh, name: str) -> "asyncio.Task[None]":
    """The task of a publisher or watcher, which a stop may leave running."""
    task = background_of(mesh, name)._task
    assert task is not None
    return task


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop waits briefly for a function that swallows its cancellation, and for messages on their way."""
    monkeypatch.setattr("openagentmesh.serving.background._CANCEL_GRACE_S", 0.1)
    monkeypatch.setattr("openagentmesh.transport.connection.LINGER_S", 0.01)


async def test_events_and_end_frame_have_sequence_numbers(mesh: AgentMesh, name: str) -> None:
    """Events count from 0 and have no request id; the end frame is empty and carries their number."""
    frames = await listen(mesh, subjects.events(name))

    @mesh.agent(AgentSpec(name=name))
    async def two() -> AsyncIterator[list[int]]:
        yield [1]
        yield [2]

    await mesh.catalog()
    assert (event(mesh, 0), b"[1]") == await next_frame(frames)
    assert (event(mesh, 1), b"[2]") == await next_frame(frames)
    assert (event(mesh, 2, end=True), b"") == await next_frame(frames)


async def test_a_failure_is_published_and_the_next_run_counts_from_0(mesh: AgentMesh, name: str) -> None:
    """An exception is published as an error frame and on `mesh.errors`; the next run counts from 0."""
    restart_soon(mesh)
    frames = await listen(mesh, subjects.events(name))
    copies = await listen(mesh, subjects.errors(name))
    failed = {"X-Mesh-Instance-Id": mesh.instance_id, "X-Mesh-Status": "error", "X-Mesh-Stream-End": "true"}
    runs = 0

    @mesh.agent(AgentSpec(name=name))
    async def fragile() -> AsyncIterator[int]:
        nonlocal runs
        runs += 1
        yield runs
        if runs == 1:
            raise MeshError("quota", "used up", details={"left": 0})
        if runs == 2:
            raise ZeroDivisionError("divided")
        await run_forever()

    await mesh.catalog()
    for run, code, message in ((1, "quota", "used up"), (2, "handler_error", "divided")):
        assert (event(mesh, 0), str(run).encode()) == await next_frame(frames)
        headers, body = await next_frame(frames)
        assert failed == headers
        details = {"left": 0} if run == 1 else {}
        envelope = {"code": code, "message": message, "agent": name, "request_id": "", "details": details}
        assert envelope == json.loads(body)
        headers, copy = await next_frame(copies)
        assert ("error", body) == (headers["X-Mesh-Status"], copy)
    assert (event(mesh, 0), b"3") == await next_frame(frames)


async def test_the_failure_of_a_watcher_is_published_on_errors_only(mesh: AgentMesh, name: str) -> None:
    """A watcher publishes no event and no error frame; its failure is published on `mesh.errors`."""
    restart_soon(mesh)
    frames = await listen(mesh, subjects.events(name))
    copies = await listen(mesh, subjects.errors(name))

    async def run() -> None:
        raise ValueError("broken")

    declare_background(mesh, name, "watcher", run)
    await mesh.catalog()
    for _ in range(3):
        envelope = json.loads((await next_frame(copies))[1])
        assert ("handler_error", "broken", name) == (envelope["code"], envelope["message"], envelope["agent"])
    assert frames.empty()


async def test_restart_pauses_are_doubled_jittered_and_bounded(mesh: AgentMesh, name: str) -> None:
    """Each failure doubles the pause up to the maximum; jitter shortens it by up to a half."""
    restart_soon(mesh, 0.01, 0.08)
    loop, ended, pauses = asyncio.get_running_loop(), 0.0, list[float]()
    enough = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def fragile() -> None:
        nonlocal ended
        if ended:
            pauses.append(loop.time() - ended)
        if len(pauses) == 16:
            enough.set()
            await run_forever()
        ended = loop.time()
        raise ValueError("broken")

    await mesh.catalog()
    async with asyncio.timeout(30):  # without a maximum the last pause alone would be five minutes
        await enough.wait()
    minima = [0.5 * min(0.01 * 2**n, 0.08) for n in range(16)]
    assert all(pause > minimum - 0.002 for pause, minimum in zip(pauses, minima, strict=True))
    assert min(pauses[3:]) < 0.079  # without jitter each of them would be at least 0.08
    assert 16 == background_of(mesh, name).restarts


@KINDS
async def test_a_function_that_returns_is_not_restarted(mesh: AgentMesh, name: str, kind: str) -> None:
    """Its state is `done`, also after a stop."""
    runs: list[int] = []

    async def run() -> None:
        runs.append(1)

    declare_background(mesh, name, kind, run)
    await mesh.catalog()
    background = background_of(mesh, name)
    await until(lambda: background.state == "done")
    await background.stop()
    assert ([1], "done", 0) == (runs, background.state, background.restarts)


@KINDS
async def test_at_most_one_run_is_active(mesh: AgentMesh, name: str, kind: str) -> None:
    """Runs never overlap, neither after failures nor when a new version is declared."""
    restart_soon(mesh)
    running, maximum, versions = 0, 0, list[int]()

    def version(number: int) -> Callable[[], object]:
        async def run() -> None:
            nonlocal running, maximum
            running += 1
            maximum = max(maximum, running)
            versions.append(number)
            try:
                if len(versions) % 3:
                    raise ValueError("broken")
                await run_forever()
            finally:
                try:
                    await asyncio.sleep(0.002)  # the next run waits for this
                finally:
                    running -= 1

        return run

    for number in range(5):
        declare_background(mesh, name, kind, version(number))
        await mesh.catalog()
        await until(lambda: number in versions)  # noqa: B023 - of this iteration
    assert (1, sorted(versions)) == (maximum, versions)


@pytest.mark.parametrize("is_replaced", [False, True], ids=["stopped", "replaced-and-stopped"])
async def test_a_stopped_publisher_sends_its_end_frame(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, is_replaced: bool
) -> None:
    """It cleans up before; a new version continues the sequence for the same subscribers instead."""
    frames, cleaned = await listen(mesh, subjects.events(name)), asyncio.Event()
    async with new_mesh() as provider:

        @provider.agent(AgentSpec(name=name))
        async def old() -> AsyncIterator[str]:
            try:
                yield "old"
                await run_forever()
            finally:
                await asyncio.sleep(0.01)
                cleaned.set()

        await provider.catalog()
        assert (event(provider, 0), b'"old"') == await next_frame(frames)
        if is_replaced:

            @provider.agent(AgentSpec(name=name, version="2.0.0"))
            async def new() -> AsyncIterator[int]:
                assert cleaned.is_set()
                yield 7
                await run_forever()

            assert "2.0.0" == (await provider.contract(name)).version
            assert (event(provider, 1), b"7") == await next_frame(frames)
    assert cleaned.is_set()
    assert (event(provider, 1 + is_replaced, end=True), b"") == await next_frame(frames)


async def test_a_function_that_swallows_its_cancellation_is_left_running_and_logged(
    new_mesh: Callable[[], AgentMesh], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not delay the stop, and the log names the agent."""
    release, started = asyncio.Event(), asyncio.Event()
    async with asyncio.timeout(10), new_mesh() as provider:

        @provider.agent(AgentSpec(name=name))
        async def stubborn() -> None:
            started.set()
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue

        await started.wait()
        task = task_of(provider, name)
    assert [name] == [r.message.split()[0] for r in caplog.records if "did not stop" in r.message]
    assert not task.done()
    release.set()
    await task


@KINDS
@pytest.mark.parametrize("late", [False, True], ids=["at-once", "after-the-stop"])
async def test_a_function_that_fails_while_it_is_stopped_is_not_restarted(
    new_mesh: Callable[[], AgentMesh], name: str, kind: str, late: bool
) -> None:
    """An exception from its cleanup ends it, during the stop or after the stop has given up."""
    runs, is_over, started, release = 0, False, asyncio.Event(), asyncio.Event()

    async def run() -> None:
        nonlocal runs
        runs += 1
        started.set()
        if is_over:  # a defect must not outlive its test
            return
        try:
            await run_forever()
        finally:
            while late and not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            raise ValueError("cannot clean up")

    async with new_mesh() as provider:
        restart_soon(provider)
        declare_background(provider, name, kind, run)
        await started.wait()
        task = task_of(provider, name)
    release.set()
    await asyncio.wait([task], timeout=1)
    has_ended, is_over = task.done(), True
    task.cancel()
    await asyncio.wait([task], timeout=1)
    assert (True, 1) == (has_ended, runs)


@KINDS
@pytest.mark.parametrize(
    "raised", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit(), None], ids=repr
)
async def test_any_exception_and_its_own_cancellation_end_one_run(
    mesh: AgentMesh, name: str, kind: str, raised: BaseException | None
) -> None:
    """The next run starts after exceptions that end programs or tasks, and other agents still answer."""
    restart_soon(mesh)
    runs, third_run = 0, asyncio.Event()

    async def run() -> None:
        nonlocal runs
        runs += 1
        if runs == 3:
            third_run.set()
            await run_forever()
        if raised is not None:
            raise raised
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        await run_forever()

    declare_background(mesh, name, kind, run)
    serve(mesh, f"{name}.other")
    async with asyncio.timeout(5):
        await third_run.wait()
    assert ("running", 2) == (background_of(mesh, name).state, background_of(mesh, name).restarts)
    assert {"text": "ok"} == await mesh.call(f"{name}.other", {})


async def test_a_publisher_that_never_awaits_blocks_no_other_agent(mesh: AgentMesh, name: str) -> None:
    """While a publisher only yields, requests are answered and other publishers send events."""
    serve(mesh, f"{name}.other")
    frames = await listen(mesh, subjects.events(f"{name}.slow"))

    @mesh.agent(AgentSpec(name=f"{name}.greedy"))
    async def greedy() -> AsyncIterator[int]:
        while True:
            yield 0

    @mesh.agent(AgentSpec(name=f"{name}.slow"))
    async def slow() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    assert {"text": "ok"} == await mesh.call(f"{name}.other", {}, timeout=10)
    assert [b"0", b"1", b"2", b""] == [(await next_frame(frames))[1] for _ in range(4)]
    assert "running" == background_of(mesh, f"{name}.greedy").state


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [("text", "handler_error", "declared"), (Text(text="x" * 2_000_000), "payload_too_large", "larger")],
    ids=["type", "size"],
)
async def test_an_event_that_cannot_be_sent_fails_the_publisher(
    mesh: AgentMesh, name: str, value: Text, code: str, text: str
) -> None:
    """A wrong type or size is published as the publisher's error; the connection stays open."""
    frames = await listen(mesh, subjects.events(name))

    @mesh.agent(AgentSpec(name=name))
    async def wrong() -> AsyncIterator[Text]:
        yield value

    await mesh.catalog()
    envelope = json.loads((await next_frame(frames))[1])
    assert (code, name, True) == (envelope["code"], envelope["agent"], text in envelope["message"])
    assert reconnects(mesh) == 0


async def test_publishers_and_watchers_are_in_the_catalog(mesh: AgentMesh, name: str) -> None:
    """A publisher is streaming with a chunk schema, a watcher is not; neither is invocable."""
    declare_background(mesh, f"{name}.p", "publisher", run_forever)
    declare_background(mesh, f"{name}.w", "watcher", run_forever)
    listed = [(e.name, e.invocable, e.streaming) for e in await mesh.catalog(channel=name)]
    assert [(f"{name}.p", False, True), (f"{name}.w", False, False)] == listed
    contract = await mesh.contract(f"{name}.p")
    assert {"type": "integer"} == contract.to_document()["x-agentmesh"]["chunk_schema"]
    assert {"streaming": True, "invocable": False} == contract.capabilities
    assert (await mesh.contract(f"{name}.w")).chunk_schema is None
